"""Verdicts on a stream of documents, whatever its batches and processes; and filtering on the way into shards."""

import gzip
import json
import random
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path

import pytest

from twelve.data import reader
from twelve.data.cleaning import EXAMPLES, Cleaner, Tally, check_out, write_rows
from twelve.data.corpus import PackedData, tokenize
from twelve.data.reader import Document, batches, read_documents
from twelve.errors import InputError

NAMES = ("강가", "나루터", "마을", "다리", "읍내", "뱃사공", "장날", "노인", "가을", "새벽", "포구", "바다")
THINGS = ("ferry", "village", "bridge", "market", "river", "harbour", "captain", "lantern", "island", "letter", "storm")


def korean(number: int) -> str:
    draw = random.Random(number)
    words = ((draw.choice(NAMES), draw.choice(NAMES), draw.choice(NAMES), draw.randrange(90)) for _ in range(12))
    return " ".join(f"{one}에서 {two}까지 {three}{number}을 보러 걸어서 갔다." for one, two, three, number in words)


def english(number: int) -> str:
    draw = random.Random(number)
    words = ((draw.choice(THINGS), draw.choice(THINGS), draw.randrange(90), draw.choice(THINGS)) for _ in range(9))
    return " ".join(f"The {one} of the {two} was {age} years old when it came to {by}." for one, two, age, by in words)


DIRTY = [
    (korean(1), ""), (english(1), ""), (korean(2), ""), (korean(1), "duplicate"),
    (english(1).replace(".", "!") + " And that was all.", "near duplicate"),
    (korean(3).encode().decode("latin-1"), "broken"),
    ("Der Fluss war breit und die Brücke war alt, aber nicht so alt wie das Dorf auf der anderen Seite.", "language"),
    ("Ship", "short"), (english(2), ""), (korean(2), "duplicate"),
]  # fmt: skip
TALK = [{"role": "user", "content": "몇 척?"}, {"role": "assistant", "content": "12"}]


def documents():
    return [Document(text, None, f"a.jsonl:{number}") for number, (text, _) in enumerate(DIRTY, 1)]


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def verdicts(source, **given):
    return [(one.reason, one.detail, one.language, one.score) for one in Cleaner().verdicts(source, **given)]


def test_every_document_gets_its_verdict_in_order():
    found = list(Cleaner().verdicts(documents()))
    assert [one.reason for one in found] == [reason for _, reason in DIRTY]
    assert [one.document for one in found] == documents()
    assert found[3].detail == "100% like a.jsonl:1" and found[9].detail == "100% like a.jsonl:3"
    assert found[4].detail.endswith("% like a.jsonl:2") and found[0].language == "ko" and found[1].language == "en"


def test_batches_and_processes_make_no_difference(monkeypatch):
    alone = verdicts(documents())
    monkeypatch.setattr(reader, "BATCH_DOCUMENTS", 3)
    assert verdicts(documents()) == alone
    assert verdicts(documents(), workers=2) == alone


def test_a_stream_is_read_no_further_than_asked(monkeypatch):
    monkeypatch.setattr(reader, "BATCH_DOCUMENTS", 2)
    read = []
    stream = Cleaner().verdicts(read.append(one) or one for one in documents())
    assert next(stream).reason == "" and len(read) == 2
    stream.close()


def test_talk_is_dropped_only_as_broken_or_the_very_same():
    said = ("1 + 2?", "1 - 2?", "👍", "❤️", "1 + 2?", korean(1).encode().decode("latin-1"))
    talk = [Document(None, [{"role": "user", "content": text}, TALK[1]], "c:1") for text in said]
    assert [one.reason for one in Cleaner().verdicts(talk)] == ["", "", "", "", "duplicate", "broken"]


def test_reasoning_and_calls_are_part_of_talk(tmp_path):
    path = write(tmp_path / "eval.jsonl", [{"question": english(2)}])

    def answered(**answer):
        return Document(None, [TALK[0], {"role": "assistant", **answer}], "c:1")

    calls = [[{"function": {"name": "weather", "arguments": f'{{"city": "{city}"}}'}}] for city in ("Seoul", "Busan")]
    talk = [
        answered(content="408", reasoning_content="340 + 68"), answered(content="408", reasoning_content="480 - 72"),
        answered(content="408", reasoning_content="480 - 72"), answered(content="408", reasoning_content=english(2)),
        *(answered(content=None, tool_calls=made) for made in calls),
    ]  # fmt: skip
    found = [one.reason for one in Cleaner(against=[path]).verdicts(talk)]
    assert found == ["", "", "duplicate", "contaminated", "", ""]


def test_long_talk_is_judged_in_small_batches():
    talk = [Document(None, [{"role": "user", "content": "a " * (1 << 17)}], "c:1")] * 16
    assert [len(batch) for batch in batches(talk)] == [4] * 4


def test_a_killed_process_is_told(monkeypatch):
    def killed(*_):
        raise BrokenProcessPool

    monkeypatch.setattr(Future, "result", killed)
    with pytest.raises(InputError, match="was killed, most likely for want of memory"):
        list(Cleaner().verdicts(documents(), workers=2))


def test_against_evaluation_files(tmp_path):
    path = write(tmp_path / "eval.jsonl", [{"question": english(2)}])
    cleaner = Cleaner(against=[path])
    found = [one for one in cleaner.verdicts(documents()) if one.reason == "contaminated"]
    assert [one.document.source for one in found] == ["a.jsonl:9"] and found[0].detail.startswith(f"{path}:1: the ")
    assert [one.reason for one in cleaner.verdicts(documents(), workers=2)][8] == "contaminated"


def test_languages_are_named():
    with pytest.raises(InputError, match="language 'fr' is not one that can be told: other, ko, en"):
        Cleaner(["ko", "fr"])
    assert [one.reason for one in Cleaner(["other"]).verdicts(documents())][6] == ""


def test_tally_counts_and_keeps_examples():
    tally = Tally()
    for verdict in Cleaner().verdicts([*documents(), *(Document(korean(n), None, f"b:{n}") for n in range(10, 30))]):
        tally.add(verdict)
    assert tally.total()[0] == 30 and tally.kept_total()[0] == 24 and tally.kept["en"][0] == 2
    assert tally.dropped["duplicate"] == [2, len((DIRTY[3][0] + DIRTY[9][0]).encode())]
    assert len(tally.examples[""]) == EXAMPLES and tally.examples["short"][0]["text"] == "Ship"
    assert tally.lines()[0].startswith("kept 24 of 30 documents")


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
def test_rows_keep_what_they_came_with(tmp_path, name):
    rows = [{"id": "7", "title": "배", "text": "가 \u2028 나"}, {"id": 3, "messages": TALK}, {"text": "x"}]
    source = list(read_documents([write(tmp_path / "in.jsonl", [rows[0] | {"url": "http://a"}, *rows[1:]])]))
    for _ in range(2):
        with write_rows(tmp_path / name) as put:
            for document in source:
                put(document)
        content = (tmp_path / name).read_bytes()
    text = gzip.decompress(content) if name.endswith("gz") else content
    assert [json.loads(line) for line in text.decode().split("\n")[:-1]] == rows
    with pytest.raises(ZeroDivisionError), write_rows(tmp_path / name) as put:
        put(source[0])
        raise ZeroDivisionError
    assert (tmp_path / name).read_bytes() == content and len(list(tmp_path.iterdir())) == 2


def test_a_long_text_stays_one_document(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(reader, "PIECE", 2000)
    story = "\n".join(english(number) for number in range(30))
    rows = [{"id": 1, "title": "배", "text": story}, {"text": korean(1)}, {"messages": TALK}]
    source = write(tmp_path / "in.jsonl", rows)
    pieces = [document for document in read_documents([source]) if document.source.endswith(":1")]
    assert len(pieces) > 5 and [piece.piece for piece in pieces] == list(range(len(pieces)))

    def written(documents):
        with write_rows(tmp_path / "out.jsonl") as put:
            for document in documents:
                put(document)
        return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    assert written(read_documents([source])) == rows
    left = written([*pieces[:2], *pieces[3:], *pieces[3:5]])  # a gap; and some that are wanted twice
    assert [row["text"] for row in left] == ["".join(piece.text for piece in part)
                                             for part in (pieces[:2], pieces[3:], pieces[3:5])]  # fmt: skip
    (tmp_path / "book.txt").write_text(story)
    assert tokenize([tmp_path / "book.txt"], tmp_path / "a", tokenizer, filter=True, progress=False)["documents"] == 1
    monkeypatch.setattr("twelve.data.cleaning.LONGEST", 3000)
    assert len(written(pieces)) > 2 and all(row["id"] == 1 for row in written(pieces))


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.jsonl.zst", "folder.jsonl"])
def test_what_cannot_be_written(tmp_path, name):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(InputError, match=r"written as .jsonl|is a folder"):
        check_out(tmp_path / name)


# --- on the way into shards -------------------------------------------------------------------------------------------


def test_tokenize_filters(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"text": text} for text, _ in DIRTY] + [{"messages": TALK}])
    clean = write(tmp_path / "b.jsonl", [{"text": text} for text, reason in DIRTY if not reason] + [{"messages": TALK}])
    made = tokenize([path], tmp_path / "filtered", tokenizer, filter=True, progress=False)
    tokenize([clean], tmp_path / "clean", tokenizer, progress=False)
    assert PackedData(tmp_path / "filtered").sha256 == PackedData(tmp_path / "clean").sha256
    assert made["dropped"] == {"duplicate": 2, "near duplicate": 1, "broken": 1, "language": 1, "short": 1}
    assert not list((tmp_path / "filtered").glob(".*"))


def test_shards_are_made_anew_when_the_filter_comes_or_goes(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"text": text} for text, _ in DIRTY])
    counts = [
        tokenize([path], tmp_path / "out", tokenizer, filter=filter, progress=False)["documents"]
        for filter in (False, True, True, False)
    ]
    assert counts == [10, 4, 4, 10]


def test_a_filter_that_leaves_nothing_says_so(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"text": "Ship"}])
    with pytest.raises(InputError, match="the filter leaves nothing: .*dropped as short: 1 documents"):
        tokenize([path], tmp_path / "out", tokenizer, filter=True, progress=False)
    assert not (tmp_path / "out").exists()


def test_real_text_is_hardly_touched(shared_data):
    """Fewer than two in a hundred articles of two encyclopedias may go, copies aside."""
    for name in ("ko-wiki-val", "en-wiki-val"):
        tally = Tally()
        source = read_documents([shared_data / "text" / f"{name}.jsonl.gz"])
        for verdict in Cleaner().verdicts(islice(source, 300)):
            tally.add(verdict)
        dropped = {reason: count for reason, (count, _) in tally.dropped.items() if reason != "duplicate"}
        assert sum(dropped.values()) < 0.02 * tally.total()[0], dropped
