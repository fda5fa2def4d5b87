"""The verb `filter`: files in, one file out, and a report."""

import gzip
import json
import random
from datetime import datetime

import pytest

from twelve import cli
from twelve.data.cleaning import write_rows
from twelve.data.reader import Document, read_documents
from twelve.errors import InputError
from twelve.filter import filter_text

NAMES = ("강가", "나루터", "마을", "다리", "읍내", "뱃사공", "장날", "노인", "가을", "새벽", "포구", "바다")
THINGS = ("ferry", "village", "bridge", "market", "river", "harbour", "captain", "lantern", "island", "letter", "storm")
TALK = [{"role": "user", "content": "몇 척?"}, {"role": "assistant", "content": "12"}]


def korean(number):
    draw = random.Random(number)
    words = ((draw.choice(NAMES), draw.choice(NAMES), draw.choice(NAMES), draw.randrange(90)) for _ in range(12))
    return " ".join(f"{one}에서 {two}까지 {three}{number}을 보러 걸어서 갔다." for one, two, three, number in words)


def english(number):
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


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(path):
    return [document.text for document in read_documents([path])]


@pytest.fixture
def dirty(tmp_path):
    rows = [{"id": str(number), "text": text} for number, (text, _) in enumerate(DIRTY)]
    return write(tmp_path / "dirty.jsonl", [*rows, {"messages": TALK}])


@pytest.fixture
def two(tmp_path):
    """A Korean and an English file, a hundred documents each, and the bytes of both."""
    made = {"ko": [{"text": korean(n)} for n in range(100)], "en": [{"text": english(n)} for n in range(100)]}
    paths = [write(tmp_path / f"{name}.jsonl", rows) for name, rows in made.items()]
    return paths, [sum(len(text.encode()) for text in texts(path)) for path in paths]


def sizes(out):
    """Bytes of Korean and of English text."""
    ko = [text for text in texts(out) if not text.isascii()]
    return sum(len(t.encode()) for t in ko), sum(len(text) for text in texts(out) if text.isascii())


def test_what_is_kept_and_what_is_said(tmp_path, dirty, capsys):
    made = filter_text([dirty], tmp_path / "clean.jsonl.gz", report=tmp_path / "report.html")
    lines = gzip.decompress((tmp_path / "clean.jsonl.gz").read_bytes()).decode().splitlines()
    rows = [json.loads(line) for line in lines]
    kept = [{"id": str(number), "text": text} for number, (text, reason) in enumerate(DIRTY) if not reason]
    assert rows == [*kept, {"messages": TALK}]
    assert (made["documents"], made["kept"], made["dropped"]["duplicate"]["documents"]) == (11, 5, 2)
    page = (tmp_path / "report.html").read_text()
    for words in ("Dropped: near duplicate", "Kept", "% like", "Der Fluss", "in another language"):
        assert words in page
    said = capsys.readouterr().out
    assert "kept 5 of 11 documents" in said and "dropped as broken: 1 documents" in said


def test_the_verb(tmp_path, dirty, capsys):
    evaluation = write(tmp_path / "eval.jsonl", [{"q": english(2)}])
    arguments = ["filter", str(dirty), "--out", str(tmp_path / "x.jsonl"), "--against", str(evaluation), "--json"]
    assert cli.main([*arguments, "--languages", "en"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["dropped"]["contaminated"]["documents"] == 1 and made["evaluation_rows"] == 1
    assert texts(tmp_path / "x.jsonl") == [english(1), None]


@pytest.mark.parametrize("budget", [0.25, 20_000, 0.9])
def test_a_budget_is_kept_within_a_document_of_each_source(tmp_path, two, budget):
    paths, whole = two
    filter_text(paths, tmp_path / "x.jsonl", budget=budget, quiet=True)
    share = budget if isinstance(budget, float) else budget / sum(whole)
    for size, of in zip(sizes(tmp_path / "x.jsonl"), whole, strict=True):
        assert share * of <= size + 1 and size < share * of + 1500


def test_weights_and_temperature_mix_exactly(tmp_path, two):
    paths, whole = two
    filter_text(paths, tmp_path / "x.jsonl", weights={str(paths[1]): 3.0}, quiet=True)
    ko, en = sizes(tmp_path / "x.jsonl")
    assert en == whole[1] and abs(ko - whole[0] / 3) < 1500  # English whole, Korean a third
    filter_text(paths, tmp_path / "x.jsonl", temperature=1e9, quiet=True)
    ko, en = sizes(tmp_path / "x.jsonl")
    assert en == whole[1] and abs(ko - en) < 1500
    filter_text(paths, tmp_path / "x.jsonl", budget=10_000, weights={str(paths[0]): 0.0}, quiet=True)
    assert sizes(tmp_path / "x.jsonl")[0] == 0


def test_a_weight_holds_for_a_file_in_a_folder_that_is_named_too(tmp_path_factory, two):
    paths, whole = two
    folder, out = paths[0].parent, tmp_path_factory.mktemp("out") / "x.jsonl"
    for names in ([folder, paths[1]], [paths[1], folder]):
        filter_text(names, out, weights={str(paths[1]): 0.0}, quiet=True)
        assert sizes(out) == (whole[0], 0)


def test_talk_from_parquet_may_hold_times(tmp_path):
    talk = [{**message, "at": datetime(1597, 10, 26)} for message in TALK]
    with write_rows(tmp_path / "x.jsonl") as write_row:
        write_row(Document(None, talk, "a.parquet:1"))
    assert json.loads((tmp_path / "x.jsonl").read_text())["messages"][0]["at"].startswith("1597-10-26")


def test_the_same_again_is_the_same(tmp_path, two):
    made = []
    for name in ("a.jsonl", "b.jsonl"):
        filter_text(two[0], tmp_path / name, budget=0.3, quiet=True, workers=1 + len(made))
        made.append((tmp_path / name).read_bytes())
    assert made[0] == made[1]


def test_bad_requests_leave_nothing(tmp_path, dirty):
    out = tmp_path / "new" / "x.jsonl"
    for told, given in (
        ("--weight y: not one of the paths", {"weights": {"y": 2.0}}),
        ("no such file", {"against": [tmp_path / "none.jsonl"]}),
        ("--against -: .* save it in a file", {"against": ["-"]}),
        ("language 'xx'", {"languages": ["xx"]}),
    ):
        with pytest.raises(InputError, match=told):
            filter_text([dirty], out, quiet=True, **given)
    with pytest.raises(InputError, match="nothing is left of .*: dropped 1 as short"):
        filter_text([write(tmp_path / "short.jsonl", [{"text": "Ship"}])], out, quiet=True)
    with pytest.raises(InputError, match="one of the files to read"):
        filter_text([dirty], dirty, quiet=True)
    test = write(tmp_path / "test.jsonl", [{"question": english(7)}])
    before = dirty.read_bytes(), test.read_bytes()
    for told, taken in (("--out", {"out": test}), ("--report", {"report": test}), ("--report", {"report": dirty})):
        with pytest.raises(InputError, match=f"{told} .* is one of the files to read"):
            filter_text([dirty], **{"out": out, **taken}, against=[test], quiet=True)
    assert (dirty.read_bytes(), test.read_bytes()) == before
    for report in (tmp_path, out):
        with pytest.raises(InputError, match="name a file of its own"):
            filter_text([dirty], out, report=report, quiet=True)
    with pytest.raises(InputError, match="standard input can be read once"):
        filter_text(["-"], out, budget=0.5, quiet=True)
    assert not out.exists()


def test_talk_without_a_word_is_no_division_by_zero(tmp_path):
    path = write(tmp_path / "silent.jsonl", [{"messages": [{"role": "user", "content": ""}]}])
    made = filter_text([path], tmp_path / "x.jsonl", report=tmp_path / "x.html", quiet=True)
    assert (made["kept"], made["bytes"], made["kept_share"]) == (1, 0, 0)


def test_half_a_character_in_talk_is_kept_as_it_came(tmp_path):
    rows = [{"messages": [{"role": "user", "content": korean(5) + "\ud800"}]}, {"messages": TALK}]
    path = tmp_path / "talk.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for given in ({}, {"budget": 1.0}):
        assert filter_text([path], tmp_path / "x.jsonl", report=tmp_path / "x.html", quiet=True, **given)["kept"] == 2
        assert [json.loads(line) for line in (tmp_path / "x.jsonl").read_text("utf-8").splitlines()] == rows


@pytest.mark.parametrize("value", ["0%", "101%", "x", "-5MB", "0"])
def test_bad_budgets_are_told(tmp_path, dirty, value, capsys):
    assert cli.main(["filter", str(dirty), "--out", str(tmp_path / "x.jsonl"), "--budget=" + value]) == 2
    assert "--budget" in capsys.readouterr().err
