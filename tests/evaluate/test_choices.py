"""Choices by likelihood: against transformers, one choice at a time; rows of every kind; bad rows."""

import gzip
import json
import math
import re
from statistics import fmean

import pytest
import torch

from twelve.config import small_v3
from twelve.convert import load
from twelve.data.tokenizer import Tokenizer
from twelve.errors import InputError
from twelve.evaluate import likelihood
from twelve.evaluate.choices import choice_accuracy
from twelve.evaluate.items import Item, read_items
from twelve.evaluate.likelihood import encode_pairs, fit, log_likelihoods
from twelve.model import Transformer

TEXTS = ["The ship went out to sea with twelve men. ", "열두 척의 배가 바다로 나갔다. ", "2 + 3 = 5, and 4 - 1 = 3. "]
PAIRS = [
    ("The ship went", " out"), ("The ship went", " out to sea with twelve men"), ("The ship went ", "out"),
    ("", " sea"), ("The ship went\n", "out"), ("", "바다로"), ("열두 척의 배가", " 나갔다."),
    ("열두 척의 배가 ", "없다"), ("2 +", " 3 = 5"), ("2 +", " 4"), (" ", "x"), ("The ship went", "."),
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([text * 20 for text in TEXTS], 400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A Llama of random weights, as transformers writes it."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save(path)
    return path


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


# --- tokens and likelihoods -------------------------------------------------------------------------------------------


def lm_evals(encode, first, context, continuation):
    """What lm-eval's documentation of `loglikelihood` says of context and continuation, in plain steps."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    if not context:
        return [first], encode(continuation)
    size = len(encode(context))
    return encode(context), encode(context + continuation)[size:]


def test_text_becomes_tokens_as_in_lm_eval(folder, tokenizer):
    transformers = pytest.importorskip("transformers")
    own = transformers.AutoTokenizer.from_pretrained(folder)
    found = encode_pairs(tokenizer, PAIRS)
    assert found == [lm_evals(own.encode, own.bos_token_id, *pair) for pair in PAIRS]


def test_a_tokenizer_that_begins_texts_itself_begins_these(tokenizer):
    class Begins(Tokenizer):
        prefix_ids = property(lambda self: [7])

    begins = Begins(tokenizer._backend, bos="<|endoftext|>", eos="<|endoftext|>")
    for (before, after), (own, same) in zip(encode_pairs(begins, PAIRS), encode_pairs(tokenizer, PAIRS), strict=True):
        assert before == ([7] if own == [0] else [7, *own]) and after == same


def test_a_continuation_that_melts_into_the_context_is_encoded_apart(tokenizer):
    text = next(text for text, index in tokenizer.vocabulary.items() if re.fullmatch("[a-z]{2}", text))
    assert len(tokenizer.encode(text)) == 1
    assert encode_pairs(tokenizer, [(text[0], text[1])]) == [(tokenizer.encode(text[0]), tokenizer.encode(text[1]))]


def test_likelihoods_are_those_of_transformers(folder, tokenizer):
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    pairs = encode_pairs(tokenizer, PAIRS)
    with torch.inference_mode():
        for (before, after), found in zip(pairs, log_likelihoods(load(folder)[0], pairs), strict=True):
            logits = peer(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
            nats = logits.log_softmax(-1)[range(len(after)), after].sum().item()
            assert found.nats == pytest.approx(nats, rel=1e-4, abs=1e-4)
            assert found.greedy == (logits.argmax(-1).tolist() == after)


def small(context=64):
    """Latent attention, experts, hyper-connections, Engram: all that could see the wrong neighbour in a packed row."""
    switches = {"engram_layer_ids": [1], "engram_vocab_size": 512, "engram_n_heads": 2, "engram_head_dim": 8}
    config = small_v3(400, width=64, layers=2, experts=4, experts_per_token=2, context=context, hc_mult=2, **switches)
    config.initializer_range = 0.2
    return Transformer(config).init_weights(1).double().eval()


@pytest.mark.parametrize("row", [1, 24, 2048])
def test_a_context_read_once_is_a_context_read_each_time(monkeypatch, row):
    model, draw = small(), torch.Generator().manual_seed(0)
    contexts = [torch.randint(0, 400, (size,), generator=draw).tolist() for size in (1, 5, 5, 30)]
    pairs = [
        (context, torch.randint(0, 400, (size,), generator=draw).tolist())
        for size in (1, 3, 9, 1, 30) for context in contexts
    ]  # fmt: skip
    monkeypatch.setattr(likelihood, "ROW", row)
    with torch.inference_mode():
        for (before, after), found in zip(pairs, log_likelihoods(model, pairs), strict=True):
            logits = model(torch.tensor([before + after]))[0, len(before) - 1 : -1]
            nats = logits.log_softmax(-1)[range(len(after)), after].sum().item()
            assert found.nats == pytest.approx(nats, rel=1e-6)


def test_greedy_is_what_greedy_decoding_gives():
    model, ids = small(), [5, 6, 7]
    with torch.inference_mode():
        for _ in range(4):
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    pairs = [(ids[:3], ids[3:]), (ids[:3], [*ids[3:6], (ids[6] + 1) % 400])]
    assert [found.greedy for found in log_likelihoods(model, pairs)] == [True, False]


def test_contexts_that_are_too_long_lose_their_beginning():
    assert fit([([1, 2, 3, 4], [5, 6]), ([1], [2])], 4) == [([2, 3, 4], [5, 6]), ([1], [2])]
    with pytest.raises(InputError, match="5 tokens are more than the model's context of 4"):
        fit([([1], [2] * 5)], 4)


def test_a_diverged_model_is_told():
    model = small()
    with torch.no_grad():
        model.norm.weight.fill_(math.nan)
    with pytest.raises(InputError, match="not a number"):
        log_likelihoods(model, [([1], [2])])


# --- accuracy ---------------------------------------------------------------------------------------------------------


def test_accuracy_is_that_of_one_choice_at_a_time(folder):
    model, tokenizer = load(folder)
    items = [
        Item("The ship went", ("out", "out to sea", "배"), number % 3, "ko" if number % 4 else "en", f"a:{number}")
        for number in range(9)
    ]  # fmt: skip
    found = choice_accuracy(model, tokenizer, "a", items)
    assert [(one.language, one.items) for one in found] == [("en", 3), ("ko", 6)]
    pairs = encode_pairs(tokenizer, items[0].pairs())
    nats = [one.nats for one in log_likelihoods(model, pairs)]
    by_byte = [value / size for value, size in zip(nats, (3, 10, 3), strict=True)]
    for result in found:
        own = [item for item in items if item.language == result.language]
        assert result.right == [float(item.answer == nats.index(max(nats))) for item in own]
        assert result.right_by_byte == [float(item.answer == by_byte.index(max(by_byte))) for item in own]
        row = result.to_dict()
        assert row["accuracy"] == fmean(result.right) and row["chance"] == pytest.approx(1 / 3)
        p = row["accuracy"]
        assert row["standard_error"] == pytest.approx(math.sqrt(p * (1 - p) / (len(own) - 1)))
        assert not {"right", "right_by_byte"} & row.keys() and json.dumps(row)


def test_who_knows_nothing_gets_what_guessing_gets(tokenizer):
    """All tokens are equally likely, so that choices of as many tokens tie."""
    model = small()
    torch.nn.init.zeros_(model.lm_head.weight)
    items = [Item("2 +", ("1", "2", "3", "4"), 0, "en", "a:1")] * 5
    [found] = choice_accuracy(model, tokenizer, "a", items)
    assert found.right == [0.25] * 5 and found.chance == 0.25


def test_long_contexts_are_cut_and_counted_and_long_choices_refused(folder):
    model, tokenizer = load(folder)
    [found] = choice_accuracy(model, tokenizer, "a", [Item("sea " * 200, ("a", "b"), 0, "en", "a:1")])
    assert found.cut_short == 1
    with pytest.raises(InputError, match="a:7: a choice of .* tokens are more than"):
        choice_accuracy(model, tokenizer, "a", [Item("sea", ("a", "b ? " * 200), 0, "en", "a:7")])


# --- rows -------------------------------------------------------------------------------------------------------------

KOBEST = [
    {"paragraph": "배는 열두 척이다.", "question": "배는 열두 척인가", "label": 1},
    {"premise": "배가 나갔다.", "question": "결과", "alternative_1": "이겼다.", "alternative_2": "졌다.", "label": 0},
    {"word": "배", "context_1": "배를 탔다.", "context_2": "배가 고프다.", "label": 0},
    {"context": "바람이 분다.", "ending_1": "ㄱ", "ending_2": "ㄴ", "ending_3": "ㄷ", "ending_4": "ㄹ", "label": 3},
    {"sentence": "정말 좋은 배였다.", "label": 1},
]


def test_rows_of_every_kind(tmp_path):
    rows = [
        {"prompt": "2 + 2 =", "choices": ["3", "4"], "answer": 1},
        {"context": "It rains.", "question": "Wet?", "choices": ["yes", "no"], "label": "yes"},
        {"question": "셋?", "choices": ["2", "3"], "gold": "3", "language": "ja"},
        {"question": "Which?", "choices": ["a", "b"], "answer": "1"},
        {"sentence_good": "They were here.", "sentence_bad": "They was here.", "field": "syntax"},
        *KOBEST,
    ]
    items = read_items(write(tmp_path / "a.jsonl", rows))
    assert [item.answer for item in items] == [1, 0, 1, 1, 0, 1, 0, 0, 3, 1]
    assert [item.language for item in items] == ["en", "en", "ja", "en", "en", *["ko"] * 5]
    assert items[1].prompt == "It rains.\nWet?" and items[4].prompt == "" and items[4].choices[1] == "They was here."
    assert [item.where.rpartition(":")[2] for item in items] == [str(line) for line in range(1, 11)]
    boolq, copa, wic, hellaswag, sentineg = items[5:]
    assert boolq.choices == wic.choices == ("아니오", "예") and sentineg.choices == ("부정", "긍정")
    assert copa.prompt == "배가 나갔다. 그래서" and copa.choices == ("이겼다.", "졌다.")
    assert hellaswag.choices == ("ㄱ", "ㄴ", "ㄷ", "ㄹ") and "'배'" in wic.prompt and "질문: 배는" in boolq.prompt


def test_one_blank_stands_before_a_choice():
    def text(prompt, choice):
        return "".join(Item(prompt, (choice, "x"), 0, "en", "a:1").pairs()[0])

    assert text("2 + 2 =", "4") == text("2 + 2 = ", "4") == text("2 + 2 =", " 4") == "2 + 2 = 4"
    assert text("Answer:\n", "4") == "Answer:\n4" and text("", "They were") == " They were"


def test_a_limit_compression_and_blank_lines(tmp_path):
    row = json.dumps({"prompt": "a", "choices": ["b", "c"], "answer": 0})
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(f"{row}\n\n{row}\nbroken")
    assert [item.where[-2:] for item in read_items(tmp_path / "a.jsonl.gz", 2)] == [":1", ":3"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "not a line of JSON"),
        ("[1]", "must be an object"),
        ('{"choices": ["a", "b"], "answer": 0}', "give a `prompt`"),
        ('{"prompt": 3, "choices": ["a", "b"], "answer": 0}', "give a `prompt`"),
        ('{"prompt": "q", "choices": ["a"], "answer": 0}', "give two or more"),
        ('{"prompt": "q", "choices": [], "answer": 0}', "give two or more"),
        ('{"prompt": "q", "choices": ["a", 3], "answer": 0}', "a choice must be a text, not 3"),
        ('{"prompt": "q", "choices": ["a", " "], "answer": 0}', "a choice must be a text, not ' '"),
        ('{"prompt": "q", "choices": ["a", "b"]}', "no `answer`: it must be one of the 2 choices"),
        ('{"prompt": "q", "choices": ["a", "b"], "answer": 2}', "the answer 2: it must be one of the 2"),
        ('{"prompt": "q", "choices": ["a", "b"], "answer": -1}', "the answer -1"),
        ('{"prompt": "q", "choices": ["a", "b"], "answer": "c"}', "the answer 'c'"),
        ('{"prompt": "q", "choices": ["a", "b"], "answer": true}', "the answer True"),
        ('{"sentence_good": "a", "sentence_bad": null}', "a choice must be a text, not None"),
        ('{"text": "a"}', "neither `choices`"),
        ('{"sentence": "A good film.", "label": 1}', "neither `choices`"),
        ('{"premise": "a", "question": "?", "alternative_1": "나", "alternative_2": "c", "label": 0}', "neither"),
    ],
)
def test_a_broken_row_is_one_line_with_its_place(tmp_path, row, words):
    path = tmp_path / "a.jsonl"
    good = '{"prompt": "q", "choices": ["a", "b"], "answer": 0}\n'
    path.write_text(f"{good * 2}{row}\n{good}")
    with pytest.raises(InputError) as error:
        read_items(path)
    assert str(error.value).startswith(f"{path}:3: ") and words in str(error.value) and "\n" not in str(error.value)


def test_half_a_character_is_no_harm(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a\\ud800", "choices": ["b\\udc00", "c"], "answer": 0}')
    [found] = choice_accuracy(small(), tokenizer, "a", read_items(path))
    assert found.samples[0]["choices"][0] == "b\ufffd" and json.dumps(found.to_dict()).encode()


def test_no_rows_and_no_file(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(InputError, match="a.jsonl has no rows"):
        read_items(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="none.jsonl"):
        read_items(tmp_path / "none.jsonl")
