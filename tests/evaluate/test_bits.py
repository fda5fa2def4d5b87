"""Bits per byte against a plain slow twin: one document, one token at a time, no batches, no padding."""

import gzip
import json
import math

import pytest
import torch

from twelve.config import ModelConfig, small_v3
from twelve.errors import InputError
from twelve.evaluate import bits, bits_per_byte
from twelve.model import Transformer


class Bytes:
    """A tokenizer of one token a byte, and a separator."""

    start_ids = (256,)

    def encode(self, text, control=True):
        assert not control, "text that others wrote must not be read as control tokens"
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode()


@pytest.fixture(scope="module")
def model():
    config = small_v3(257, width=64, layers=2, experts=4, experts_per_token=2, context=64)
    config.initializer_range = 0.2  # far from uniform, so that a slip shows
    return Transformer(config).init_weights(1).double().eval()


def slow_bits(model, ids, context):
    """-log2 likelihood of ids[1:]: each token from the window that scores it, alone in its batch."""
    total, stride, done, start = 0.0, context // 2, 0, 0
    while done < len(ids) - 1:
        end = min(start + context, len(ids) - 1)
        for target in range(done + 1, end + 1):
            logits = model(torch.tensor([ids[start:target]]))[0, -1].double()
            total -= torch.log_softmax(logits, -1)[ids[target]].item() / math.log(2)
        done, start = end, start + stride
    return total


TEXTS = ["a", "열두 척", "The quick brown fox. " * 4, "x" * 64, "y" * 65]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("context", [2, 7, 32, 64])
def test_agrees_with_the_slow_twin(model, tmp_path, context):
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    found = bits_per_byte(model, Bytes(), path, context=context)
    with torch.inference_mode():
        expected = sum(slow_bits(model, [256, *text.encode()], context) for text in TEXTS)
    size = sum(len(text.encode()) for text in TEXTS)
    assert found.bits == pytest.approx(expected, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(expected / size, rel=1e-6)
    assert (found.bytes, found.tokens, found.documents) == (size, size, len(TEXTS))
    assert found.standard_error > 0


def test_batches_do_not_matter(model, tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    together = bits_per_byte(model, Bytes(), path)
    monkeypatch.setattr(bits, "LOGITS", 1)
    alone = bits_per_byte(model, Bytes(), path)
    assert alone.bits == pytest.approx(together.bits, rel=1e-9)


def test_documents_see_nothing_of_each_other(model, tmp_path):
    one = bits_per_byte(model, Bytes(), write(tmp_path / "a.jsonl", [{"text": TEXTS[2]}]))
    two = bits_per_byte(model, Bytes(), write(tmp_path / "b.jsonl", [{"text": TEXTS[2]}] * 2))
    assert two.bits == pytest.approx(2 * one.bits, rel=1e-9) and math.isnan(one.standard_error)
    assert two.standard_error == pytest.approx(0.0, abs=1e-9)


def test_reads_text_and_compressed_files_and_keeps_to_the_limit(model, tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[1], encoding="utf-8")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(rows)
    assert bits_per_byte(model, Bytes(), tmp_path / "a.txt").bytes == len(TEXTS[1].encode())
    assert bits_per_byte(model, Bytes(), tmp_path / "b.jsonl.gz", limit=2).documents == 2


def test_a_long_document_is_one_document(model, tmp_path, monkeypatch):
    path = tmp_path / "long.txt"
    path.write_text("word " * 100)
    whole = bits_per_byte(model, Bytes(), path)
    monkeypatch.setattr("twelve.data.reader.PIECE", 70)  # from here on the reader hands it out in pieces
    pieces = bits_per_byte(model, Bytes(), path, limit=1)
    assert (pieces.documents, pieces.bytes, pieces.bits) == (1, 500, whole.bits)


@pytest.mark.parametrize("length", [2, 3, 5, 8, 9, 16, 17, 100])
@pytest.mark.parametrize("context", [2, 3, 8])
def test_windows_score_every_token_once_with_half_a_context_before_it(length, context):
    ids = list(range(length))
    scored = []
    for window in bits.split(ids, context):
        assert len(window.ids) <= context + 1
        scored += window.ids[-window.scored :]
        before = len(window.ids) - window.scored
        assert before >= min(context // 2, window.ids[-window.scored])
    assert scored == ids[1:]


def test_uniform_model_costs_log2_of_the_vocabulary(tmp_path):
    config = ModelConfig(
        model_type="llama", vocab_size=256, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = Transformer(config)
    torch.nn.init.zeros_(model.lm_head.weight)
    path = tmp_path / "a.txt"
    path.write_text("hello")
    tokenizer = Bytes()
    tokenizer.start_ids = [0]
    assert bits_per_byte(model, tokenizer, path).bits_per_byte == pytest.approx(8.0)


def test_bad_input_is_told(model, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}])
    with pytest.raises(InputError, match="no text in"):
        bits_per_byte(model, Bytes(), path)
    with pytest.raises(InputError, match="--context 65 must lie between 2 and the model's 64"):
        bits_per_byte(model, Bytes(), path, context=65)


def test_a_diverged_model_is_told(tmp_path):
    model = Transformer(small_v3(257, width=64, layers=1, experts=0, context=64)).eval()
    with torch.no_grad():
        model.norm.weight.fill_(math.nan)
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(InputError, match="not a number"):
        bits_per_byte(model, Bytes(), tmp_path / "a.txt")
