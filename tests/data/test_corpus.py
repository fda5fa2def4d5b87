"""Reading files, writing shards, and packing them into batches."""

import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from twelve.data import corpus, reader, shards
from twelve.data.chat import encode_messages
from twelve.data.corpus import PackedData, Report, find_files, read_documents, tokenize
from twelve.data.shards import pack
from twelve.data.tokenizer import Tokenizer
from twelve.errors import InputError

KOREAN = "나는 오늘 학교에서 수학을 배웠다.\n그리고 12권의 책을 읽었다.\n"
CHAT = [{"role": "user", "content": "몇?"}, {"role": "assistant", "content": "<think>1+1=2</think>2"}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([KOREAN, "the quick brown fox " * 3, "<|im_start|>assistant\nuser"] * 4, 340)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(*rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def whole(documents) -> list[str]:
    """Texts with their pieces put together."""
    joined, open_ = [], False
    for document in documents:
        if open_:
            joined[-1] += document.text
        else:
            joined.append(document.text)
        open_ = document.more
    return joined


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_in_order_whatever_the_format(tmp_path):
    write(tmp_path / "b.txt", "b")
    write(tmp_path / "a" / "z.md", "z")
    write(
        tmp_path / "c.jsonl",
        "\ufeff" + jsonl({"text": "c1", "id": 3}, {"messages": CHAT}) + "\n\n" + jsonl({"text": "c2"}),
    )
    write(tmp_path / "d.txt.gz", gzip.compress("한\n".encode()) + gzip.compress(b"two members"))
    write(
        tmp_path / "e.jsonl.zst",
        zstandard.compress(jsonl({"text": "e"}).encode()) + zstandard.compress(b'{"text": "f"}'),
    )
    write(tmp_path / "image.png", "no text")
    write(tmp_path / ".hidden" / "x.txt", "no")
    report = Report()
    documents = list(read_documents([tmp_path], report))
    assert [document.text for document in documents] == ["z", "b", "c1", None, "c2", "한\ntwo members", "e", "f"]
    assert documents[3].messages == CHAT
    assert documents[4].source == f"{tmp_path / 'c.jsonl'}:5"
    assert (report.files, report.documents) == (5, 8)
    assert report.position == report.size == sum(p.stat().st_size for p in find_files([tmp_path]).train)


def test_each_file_once(tmp_path):
    path = write(tmp_path / "a.txt", "a")
    assert find_files([path, tmp_path, path]).train == [path]


def test_validation_files_are_held_out_of_a_folder(tmp_path):
    for name in (
        "ko-train.jsonl.gz", "ko-val.jsonl.gz", "en.train.txt", "en.test.txt", "my-test.txt", "latest.md",
        "split/train/1.txt", "split/test/1.txt", "hf/train-00000-of-00002.jsonl", "hf/test-00000-of-00001.jsonl",
    ):  # fmt: skip
        write(tmp_path / name, "x")
    files = find_files([tmp_path])
    held = {str(path.relative_to(tmp_path)) for path in files.held_out}
    assert held == {"ko-val.jsonl.gz", "en.test.txt", "split/test/1.txt", "hf/test-00000-of-00001.jsonl"}
    assert len(files.train) == 6
    named = tmp_path / "ko-val.jsonl.gz"
    assert named in find_files([tmp_path, named]).train
    assert find_files([tmp_path / "split" / "test"]).train == [tmp_path / "split" / "test" / "1.txt"]


@pytest.fixture
def stdin(monkeypatch):
    def put(content: bytes):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))

    return put


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (KOREAN.encode(), [KOREAN]),
        (jsonl({"text": "a"}, {"text": "b"}).encode(), ["a", "b"]),
        (b'{ is no JSON: "but text"\n', ['{ is no JSON: "but text"\n']),
        (b'{"text": "' + b"x" * reader.PIECE + b'"}', ["x" * reader.PIECE]),
    ],
)
def test_standard_input(stdin, content, texts):
    stdin(content)
    assert whole(read_documents(["-"])) == texts


# --- long and damaged text --------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["a", " ", "\n", "한", "é", "🙂", "\r\n", "abcdefgh" * 3]), min_size=1, max_size=200))
def test_pieces_are_bounded_and_whole(parts):
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "PIECE", 16)
        pieces = list(reader._cut([text.encode()[n : n + 7] for n in range(0, len(text.encode()), 7)]))
        assert pieces == list(reader._cut([text.encode()]))
    assert b"".join(pieces).decode() == text
    assert all(0 < len(piece) <= 16 for piece in pieces)
    assert "".join(piece.decode() for piece in pieces) == text  # no character is cut


def test_a_long_text_is_one_document_in_pieces(tmp_path, tokenizer):
    text = (KOREAN * 20 + "\n") * 600
    for path in (write(tmp_path / "a.txt", text), write(tmp_path / "a.jsonl", jsonl({"text": text}))):
        documents = list(read_documents([path, write(tmp_path / "b.txt", "b")]))
        assert len(documents) > 3
        assert max(len(document.text.encode()) for document in documents) <= reader.PIECE
        assert whole(documents) == [text, "b"]


def test_a_huge_line_needs_little_memory(tmp_path):
    block = ("한국어 " * 20_000).encode()
    with open(tmp_path / "line.txt", "wb") as file:
        for _ in range(150):  # 30 MB, no line break
            file.write(block)
    size = (tmp_path / "line.txt").stat().st_size
    tracemalloc.start()
    total = sum(len(document.text.encode()) for document in read_documents([tmp_path / "line.txt"]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == size > 29e6
    assert peak < 8 * reader.PIECE


def test_a_line_of_jsonl_above_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "LINE_LIMIT", 1 << 20)
    path = write(tmp_path / "a.jsonl", jsonl({"text": "a"}) + '{"text": "' + "x" * (2 << 20) + '"}')
    with pytest.raises(InputError, match=r"a.jsonl:2: a line above 1 MiB"):
        list(read_documents([path]))


def test_bad_bytes_in_good_text_are_skipped_and_counted(tmp_path):
    text = KOREAN * 5
    broken = text.encode().replace("학교".encode(), b"\xff\xed\xa0\x80" + "학교".encode())
    report = Report()
    rows = b'{"text": "a\xff"}\n{"text": "b\\ud800c"}\n'
    paths = [write(tmp_path / "a.txt", broken), write(tmp_path / "b.jsonl", rows)]
    assert [document.text for document in read_documents(paths, report)] == [text, "a", "bc"]
    assert report.bad_bytes == 5 * 4 + 1 + 3


def test_empty_documents_are_skipped_and_counted(tmp_path):
    write(tmp_path / "a.txt", "")
    write(tmp_path / "b.md", " \n")
    write(tmp_path / "c.jsonl", jsonl({"text": "  "}, {"text": "x"}))
    report = Report()
    assert [document.text for document in read_documents([tmp_path], report)] == ["x"]
    assert (report.documents, report.empty) == (1, 3)


def noise(size: int) -> bytes:
    return random.Random(0).randbytes(size)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", noise(5000), "a.txt: .*cannot be read as UTF-8"),
        ("a.txt", KOREAN.encode() + noise(3_000_000), "cannot be read as UTF-8"),
        ("a.md", (KOREAN * 10).encode("cp949"), "iconv -f cp949"),
        ("a.txt", KOREAN.encode("utf-16"), "cannot be read"),
        ("a.txt", gzip.compress(KOREAN.encode() * 99), "cannot be read"),
        ("a.txt", bytes(1000), "cannot be read"),
        ("a.jsonl", noise(5000), "a.jsonl:1: not a line of JSON"),
        ("a.txt", b"", "the corpus is empty"),
        ("a.jsonl", b"\n\n", "the corpus is empty"),
        ("a.bin", b"text", "not a kind of file that can be read"),
        ("a.txt.gz", gzip.compress(noise(9000))[:-9], "a.txt.gz is damaged or cut short"),
        ("a.txt.gz", b"no gzip", "damaged"),
        ("a.txt.gz", gzip.compress(KOREAN.encode())[:-12] + b"\0" * 12, "damaged"),
        ("a.txt.zst", zstandard.compress(KOREAN.encode() * 99)[:-3], "a.txt.zst is damaged or cut short"),
        ("a.txt.zst", b"no zstd", "damaged"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}', "a.jsonl:2: `text` is int, not text"),
        ("a.jsonl", b'{"question": "a"}', "a.jsonl:1: `text` is missing"),
        ("a.jsonl", b'{"text": null}', "a.jsonl:1: `text` is NoneType"),
        ("a.jsonl", b"[1]", "a.jsonl:1: must be an object"),
        ("a.jsonl", b'{"text": "a"', "a.jsonl:1: not a line of JSON"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: not a line of JSON"),
        ("a.jsonl", b'\n{"messages": []}', "a.jsonl:2: messages must be a list with at least one"),
        ("a.jsonl", b'{"messages": [{"role": "x", "content": ""}]}', r"a.jsonl:1: messages\[0\].role must be one of"),
    ],
)
def test_bad_input_is_told_in_one_line_and_leaves_nothing(tmp_path, tokenizer, name, content, told):
    path = write(tmp_path / "in" / name, content)
    for read in (
        lambda: list(read_documents([path])),
        lambda: tokenize([path], tmp_path / "out", tokenizer, progress=False),
    ):
        with pytest.raises(InputError, match=told) as error:
            read()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_zst_without_its_package(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt.zst", zstandard.compress(b"text"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "compression", None)
    with pytest.raises(InputError, match=r"pip install 'twelve\[zst\]'"):
        list(read_documents([path]))


def test_what_is_left_out_is_told(tmp_path, chats, tokenizer, capsys):
    write(tmp_path / "in" / "a-train.jsonl", chats.read_bytes())
    write(tmp_path / "in" / "a-val.jsonl", chats.read_bytes())
    write(tmp_path / "in" / "b.txt", KOREAN.encode() + b"\xff\xff")
    tokenize([tmp_path / "in"], tmp_path / "out", tokenizer)
    said = capsys.readouterr().err
    assert f"held out for validation: {tmp_path / 'in' / 'a-val.jsonl'}" in said
    assert "skipped 2 bytes that are no UTF-8" in said
    assert "left out 1 conversations" in said
    assert "MB/s of text" in said


def test_missing_paths(tmp_path, tokenizer):
    with pytest.raises(InputError, match="nowhere: no such file or folder"):
        tokenize([tmp_path / "nowhere"], tmp_path / "out", tokenizer)
    with pytest.raises(InputError, match="the corpus is empty"):
        tokenize([tmp_path], tmp_path / "out", tokenizer)
    with pytest.raises(InputError, match="too small"):
        tokenize([write(tmp_path / "a.txt", KOREAN)], tmp_path / "out", vocab_size=100)
    with pytest.raises(InputError, match="is a file"):
        tokenize([tmp_path], tmp_path / "a.txt", tokenizer)
    assert not (tmp_path / "out").exists()


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path) -> Path:
    rows = [{"text": KOREAN * n + "the quick <|endoftext|> fox"} for n in range(1, 8)]
    return write(tmp_path / "texts.jsonl", jsonl(*rows))


@pytest.fixture
def chats(tmp_path) -> Path:
    rows = [{"messages": [CHAT[0], CHAT[1] | {"content": CHAT[1]["content"] + "x" * n}]} for n in range(23)]
    rows.append({"messages": CHAT[:1]})
    return write(tmp_path / "chats.jsonl", jsonl(*rows))


def test_tokenize_says_what_it_made(tmp_path, texts, chats, tokenizer):
    made = tokenize([texts, chats], tmp_path / "out", tokenizer, progress=False)
    data = PackedData(tmp_path / "out")
    assert made["documents"] == data.documents == 7 + 23
    assert made["tokens"] == data.tokens > 0
    assert data.meta["kinds"]["text"]["bytes"] == sum(
        len(json.loads(row)["text"].encode()) for row in texts.read_text().splitlines()
    )
    assert made["unanswered"] == 1
    assert made["vocabulary"] == tokenizer.vocab_size
    assert data.meta["dtype"] == "uint16"
    assert Tokenizer.load(tmp_path / "out").fingerprint == tokenizer.fingerprint
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "meta.json", "tokenizer.json", "tokenizer_config.json",
        "text-00000.tokens", "text.ends", "chat-00000.tokens", "chat-00000.mask", "chat.ends",
    }  # fmt: skip


def test_what_is_there_is_used_again_only_if_it_is_the_same(tmp_path, texts, tokenizer, monkeypatch):
    out = tmp_path / "out"
    made = tokenize([texts], out, tokenizer, progress=False)
    writes = []
    monkeypatch.setattr(corpus, "_write", lambda *given, write=corpus._write: writes.append(1) or write(*given))
    assert tokenize([texts], out, tokenizer, progress=False) | {"seconds": 0} == made | {"seconds": 0}
    os.utime(texts)
    tokenize([write(tmp_path / "copy.jsonl", texts.read_bytes())], out, tokenizer, progress=False)
    assert not writes
    tokenize([texts], out, vocab_size=300, progress=False)
    tokenize([texts], out, vocab_size=300, progress=False)
    assert len(writes) == 1
    texts.write_bytes(texts.read_bytes().replace(b"fox", b"dog"))
    tokenize([texts], out, vocab_size=300, progress=False)
    (out / "meta.json").write_text("{")
    tokenize([texts], out, vocab_size=300, progress=False)
    (out / "text-00000.tokens").write_bytes(b"xx")
    with pytest.raises(InputError, match="1 numbers instead of"):
        PackedData(out)
    tokenize([texts], out, vocab_size=300, progress=False)
    assert len(writes) == 4
    assert PackedData(out).tokens


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "x.gguf", "meta.json"])
def test_models_and_files_of_others_are_not_replaced(tmp_path, texts, tokenizer, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"theirs": 1}')
    with pytest.raises(InputError, match="name another folder"):
        tokenize([texts], tmp_path / "out", tokenizer, progress=False)
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ['{"theirs": 1}']


def test_a_tokenizer_is_trained_on_texts_and_chats(tmp_path, texts, chats):
    made = tokenize([texts, chats], tmp_path / "out", vocab_size=400, progress=False)
    assert 300 < made["vocabulary"] <= 400
    trained = Tokenizer.load(tmp_path / "out")
    assert len(trained.encode("assistant")) == 1  # a frequent word of the template


def test_standard_input_is_read_once_and_gives_the_same(tmp_path, texts, stdin, monkeypatch):
    made = tokenize([texts], tmp_path / "file", vocab_size=300, progress=False)
    for _ in range(2):  # the second time it is there already
        stdin(texts.read_bytes())
        tokenize(["-"], tmp_path / "pipe", vocab_size=300, progress=False)
        monkeypatch.setattr(corpus, "_write", None)
    assert PackedData(tmp_path / "pipe").sha256 == PackedData(tmp_path / "file").sha256
    assert PackedData(tmp_path / "pipe").tokens == made["tokens"]
    assert not (tmp_path / "pipe" / ".stdin").exists()
    stdin(b'{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(InputError, match="^standard input:2: `text` is int"):
        tokenize(["-"], tmp_path / "bad", vocab_size=300, progress=False)
    assert not (tmp_path / "bad").exists()


def test_shards_of_any_size_hold_the_same(tmp_path, texts, chats, tokenizer, monkeypatch):
    tokenize([texts, chats], tmp_path / "one", tokenizer, progress=False)
    monkeypatch.setattr(reader, "BATCH_DOCUMENTS", 2)
    tokenize([texts, chats], tmp_path / "many", tokenizer, progress=False, shard_tokens=50)
    assert len(list((tmp_path / "many").glob("text-*.tokens"))) > 5
    one, many = PackedData(tmp_path / "one"), PackedData(tmp_path / "many")
    assert one.tokens == many.tokens
    for index in range(one.windows(33)):
        a, b = one.batch(index, 1, 33, 0), many.batch(index, 1, 33, 0)
        assert all(
            (getattr(a, name) == getattr(b, name)).all() for name in ("ids", "targets", "positions", "documents")
        )


def test_a_large_vocabulary_is_kept_in_32_bits(tmp_path, texts):
    tokenizer = Tokenizer.train([KOREAN], 300)
    tokenizer.vocab_size = 100_000  # as if
    tokenize([texts], tmp_path / "out", tokenizer, progress=False)
    assert PackedData(tmp_path / "out").meta["dtype"] == "uint32"
    assert read_stream(PackedData(tmp_path / "out"))[0] == 0


def test_a_run_that_fails_leaves_nothing(tmp_path, texts, tokenizer, monkeypatch):
    tokenize([texts], tmp_path / "out", tokenizer, progress=False)
    monkeypatch.setattr(reader, "BATCH_DOCUMENTS", 2)
    write(texts, texts.read_bytes() + b"no JSON")
    with pytest.raises(InputError, match="texts.jsonl:8"):
        tokenize([texts], tmp_path / "out", tokenizer, progress=False)
    with pytest.raises(InputError, match="no tokenised corpus"):
        PackedData(tmp_path / "out")
    assert not list((tmp_path / "out").glob("text*"))


def test_a_full_disk(tmp_path, texts, tokenizer, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.Writer, "_append", full)
    with pytest.raises(InputError, match="no space left to write .*bytes free"):
        tokenize([texts], tmp_path / "out", tokenizer, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_killed_run_leaves_nothing_that_opens(tmp_path, texts, tokenizer):
    tokenizer.save(tmp_path / "tokenizer")
    many = write(tmp_path / "many.jsonl", texts.read_bytes() * 20_000)
    code = (
        "import sys; from twelve.data.corpus import tokenize;"
        "tokenize([sys.argv[1]], sys.argv[2], sys.argv[3], progress=False, shard_tokens=1000)"
    )
    run = subprocess.Popen([sys.executable, "-c", code, many, tmp_path / "out", tmp_path / "tokenizer"])
    deadline = time.monotonic() + 30
    while not (tmp_path / "out" / "text-00003.tokens").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    with pytest.raises(InputError, match="no tokenised corpus"):
        PackedData(tmp_path / "out")
    made = tokenize([texts], tmp_path / "out", tokenizer, progress=False)
    assert len(list((tmp_path / "out").glob("*.tokens"))) == 1
    assert PackedData(tmp_path / "out").tokens == made["tokens"]


def test_what_is_no_corpus(tmp_path):
    with pytest.raises(InputError, match="no tokenised corpus"):
        PackedData(tmp_path / "nowhere")
    (tmp_path / "meta.json").write_text('{"format": 99}')
    with pytest.raises(InputError, match="format 1"):
        PackedData(tmp_path)


def test_conversations_without_answers_alone(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", jsonl({"messages": CHAT[:1]}))
    with pytest.raises(InputError, match="nothing to learn from: 1 conversations"):
        tokenize([path], tmp_path / "out", tokenizer, progress=False)


def test_a_conversation_that_the_template_refuses_is_named(tmp_path, chats, tokenizer):
    strict = Tokenizer.from_json(tokenizer._backend.to_str(), chat_template="{{ raise_exception('roles!') }}")
    with pytest.raises(InputError, match="chats.jsonl:1: .*roles!"):
        tokenize([chats], tmp_path / "out", strict, progress=False)


# --- batches ----------------------------------------------------------------------------------------------------------


def read_stream(data: PackedData) -> list[int]:
    """All text tokens."""
    stream = data._kinds["text"]
    return stream.tokens(0, int(stream.first[-1])).tolist()


TEXTS = st.lists(st.text("ab 한\n", min_size=1, max_size=30).filter(str.strip), max_size=12)
ANSWERS = st.lists(st.text("cd 답", min_size=1, max_size=30), max_size=8)


@settings(max_examples=40, deadline=None)
@given(texts=TEXTS, answers=ANSWERS, seq_len=st.integers(1, 40), batch_size=st.integers(1, 3), seed=st.integers(0, 99))
def test_an_epoch_has_every_prediction_once(tmp_path_factory, tokenizer, texts, answers, seq_len, batch_size, seed):
    chats = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}] for answer in answers]
    rows = [{"text": text} for text in texts] + [{"messages": messages} for messages in chats]
    if not rows:
        return
    folder = tmp_path_factory.mktemp("packed")
    tokenize([write(folder / "a.jsonl", jsonl(*rows))], folder / "out", tokenizer, progress=False, shard_tokens=17)
    data = PackedData(folder / "out")

    expected = []  # (token, next token)
    for text in texts:
        ids = [0, *tokenizer.encode(text, control=False), 0]
        expected += pairwise(ids)
    for messages in chats:
        ids, mask = encode_messages(tokenizer, messages)
        pairs = list(zip(ids[:-1], ids[1:], mask[1:], strict=True))[:seq_len]
        expected += [(before, after) for before, after, said in pairs if said]

    windows = data.windows(seq_len)
    found = []
    for index in range(windows):  # one by one: as many rows as windows are one epoch
        batch = data.batch(index, 1, seq_len, seed)
        ids, targets, positions, documents = (
            getattr(batch, name)[0].tolist() for name in ("ids", "targets", "positions", "documents")
        )
        found += [pair for pair in zip(ids, targets, strict=True) if pair[1] != -100]
        for n in range(seq_len):
            begins = n == 0 or documents[n] != documents[n - 1]
            assert positions[n] == (0 if begins else positions[n - 1] + 1)
            assert documents[n] == (0 if n == 0 else documents[n - 1] + begins)
            if n and not begins and targets[n - 1] != -100:
                assert targets[n - 1] == ids[n]
            if ids[n] == 0 and targets[n] != -100:
                assert positions[n] == 0  # <|endoftext|> predicts only as the beginning of a document
    assert sorted(found) == sorted(expected)

    order = [shards._window(row, windows, seed) for row in range(2 * windows)]
    assert sorted(order[:windows]) == sorted(order[windows:]) == list(range(windows))
    for index in (0, windows // batch_size):  # a batch is its rows, also across two epochs
        batch = data.batch(index, batch_size, seq_len, seed)
        rows_ = [data.batch(index * batch_size + n, 1, seq_len, seed) for n in range(batch_size)]
        for name in ("ids", "targets", "positions", "documents"):
            assert (getattr(batch, name) == np.concatenate([getattr(row, name) for row in rows_])).all()


def test_batches_are_pure_and_differ_by_seed(tmp_path, texts, chats, tokenizer):
    tokenize([texts, chats], tmp_path / "out", tokenizer, progress=False)
    data, again = PackedData(tmp_path / "out"), PackedData(tmp_path / "out")
    backwards = {index: again.batch(index, 2, 32, 7) for index in reversed(range(30))}
    for index in range(30):
        assert (data.batch(index, 2, 32, 7).ids == backwards[index].ids).all()
    assert any((data.batch(index, 2, 32, 8).ids != backwards[index].ids).any() for index in range(3))
    batch = data.batch(0, 2, 32, None)
    assert batch.ids[0].tolist() == read_stream(data)[:32]
    assert [str(getattr(batch, name).dtype) for name in ("ids", "targets", "positions", "documents")] == [
        "torch.int64", "torch.int64", "torch.int64", "torch.int32",
    ]  # fmt: skip
    assert batch.ids.shape == (2, 32)


def test_one_row_by_hand(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", jsonl({"text": "ab"}, {"text": "한"}))
    tokenize([path], tmp_path / "out", tokenizer, progress=False)
    a, b = tokenizer.encode("ab"), tokenizer.encode("한")
    stream = [0, *a, 0, 0, *b, 0]
    size = len(stream) - 1
    batch = PackedData(tmp_path / "out").batch(0, 1, size + 2, 0)
    first, second = len(a) + 2, len(b) + 1
    assert batch.ids[0].tolist() == [*stream[:size], 0, 0]
    assert batch.targets[0].tolist() == [*a, 0, -100, *b, 0, -100, -100]
    assert batch.documents[0].tolist() == [0] * first + [1] * second + [2, 2]
    assert batch.positions[0].tolist() == [*range(first), *range(second), 0, 1]


@given(st.lists(st.integers(1, 20), max_size=60))
def test_packing_keeps_documents_whole_and_fills_well(lengths):
    order, first = pack(np.array(lengths, np.int64), 20)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    loads = [sum(lengths[n] for n in order[a:b]) for a, b in pairwise(first)]
    assert all(0 < load <= 20 for load in loads)
    assert len(loads) <= 1 + 11 / 9 * -(-sum(lengths) // 20) + sum(length > 10 for length in lengths)
    assert sum(load <= 10 for load in loads) <= 1  # two half-empty bins would have been one


def test_real_text(shared_data, tmp_path, tokenizer):
    report = Report()
    documents = list(read_documents([shared_data / "text" / "ko-wiki-val.jsonl.gz"], report))
    assert report.documents == 298
    assert report.bad_bytes == 0
    for document in documents[:50]:
        assert tokenizer.decode(tokenizer.encode(document.text, control=False)) == document.text
    rows = (shared_data / "chat" / "ko-smalltalk.jsonl").read_text().splitlines(keepends=True)[:1000]
    tokenize([write(tmp_path / "a.jsonl", "".join(rows))], tmp_path / "out", tokenizer, progress=False)
    data = PackedData(tmp_path / "out")
    assert data.documents == 1000
    batch = data.batch(0, 8, 256, 0)
    assert (batch.targets != -100).float().mean() > 0.3
