"""Overlaps with evaluation files: all that were planted, and nothing in disjoint text."""

import gzip
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twelve.data import contamination
from twelve.data.contamination import Contamination
from twelve.data.words import read_words
from twelve.errors import InputError

QUESTION = (
    "A ferry carries forty people across the river every half an hour. How many people can cross in one day of ten "
    "hours if the ferry is always full and never stops?"
)
KOREAN = "나룻배 한 척이 반 시간마다 마흔 명씩 강을 건네준다. 열 시간 동안 쉬지 않으면 모두 몇 명이 건널 수 있을까?"


@pytest.fixture
def evaluation(tmp_path):
    rows = [
        {"id": "q1", "question": QUESTION, "answer": "#### 800"},
        {"question": KOREAN, "choices": ["팔백 명", "육백 명"]},
        {"messages": [{"role": "user", "content": "short"}]},
        {"sentence": "Nobody had ever seen the captain laugh before."},
    ]
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def rows(known: Contamination, *texts: str) -> list[tuple[str, str]]:
    return list(known.rows_in(texts).items())


def filler(count: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(10**6)}" for _ in range(count))


def test_planted_text_is_found_with_its_place_and_words(evaluation):
    known = Contamination([evaluation])
    [(place, words)] = rows(known, f"{filler(300)} {QUESTION.upper().replace(',', ' --')} {filler(50)}")
    assert place == f"{evaluation}:1" and read_words([words]).lengths[0] == len(QUESTION.split())
    [(place, words)] = rows(known, f"{filler(20)}.\n{KOREAN}\n{filler(20)}")
    assert place == f"{evaluation}:2" and words == KOREAN.rstrip("?")
    [(place, _)] = rows(known, "It was odd: nobody had ever seen the captain laugh before, they said.")
    assert place == f"{evaluation}:4"
    assert (known.rows, known.short) == (4, 1)


def test_nothing_is_found_in_disjoint_text(evaluation):
    known = Contamination([evaluation])
    partly = "How many people can cross the river?", "강을 건네준다. 모두 몇 명이 건널 수 있을까?"
    for text in (filler(5000), "", *partly):
        assert rows(known, text) == []


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 24), st.integers(1, 30), st.integers(0, 9))
def test_thirteen_words_are_found_and_twelve_are_not(tmp_path_factory, start, count, seed):
    path = tmp_path_factory.getbasetemp() / "one.jsonl"
    path.write_text(json.dumps({"q": QUESTION}))
    words = QUESTION.split()[start : start + count]
    found = rows(Contamination([path]), f"{filler(9, seed)} {' '.join(words)} {filler(9, seed + 10)}")
    assert bool(found) == (len(words) >= 13)


def test_korean_takes_eight_words_and_n_can_be_set(evaluation):
    known, words = Contamination([evaluation]), KOREAN.split()
    assert rows(known, " ".join(words[3:11])) and not rows(known, " ".join(words[3:10]))
    longer = Contamination([evaluation], n=20)
    assert not rows(longer, " ".join(words[3:11])) and rows(longer, " ".join(words[2:14]))


def test_a_row_is_shown_with_the_first_stretch_of_it(evaluation):
    words, known = QUESTION.split(), Contamination([evaluation])
    found = rows(known, f"{' '.join(words[:15])} and {' '.join(words[10:24])} and {KOREAN}", QUESTION)
    assert [read_words([stretch]).lengths[0] for _, stretch in found] == [15, len(KOREAN.split())]


def test_what_several_rows_say_counts_for_each(tmp_path):
    """A plain loop over all rows and texts says the same, in one batch and in many."""
    draw = random.Random(7)
    template = "Read this carefully and then say which one of the answers below it is the right one here:"
    questions = [f"{template} {filler(20, number % 15)}" for number in range(40)] + [filler(25, 99), filler(25, 98)]
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps({"q": question}) + "\n" for question in questions))
    known = Contamination([path])
    texts = [filler(20, 3), f"{filler(8, 4)} {filler(25, 99)}", filler(20, 3), "nothing of it"]

    def grams(text):
        words = text.split()
        return {tuple(words[at : at + 13]) for at in range(len(words) - 12)}

    def plain(texts):
        met = set().union(*map(grams, texts))
        return [f"{path}:{line}" for line, question in enumerate(questions, 1) if grams(question) & met]

    assert len(plain(texts)) == 4 and sorted(known.rows_in(texts)) == sorted(plain(texts))
    several = [text for text in texts for _ in range(3)] + [f"{filler(90, 50 + n)} {template}" for n in range(9)]
    draw.shuffle(several)
    found = known.rows_in(several)
    assert sorted(found) == sorted(plain([*texts, template.replace(":", "")])) and len(found) == 41
    assert found[f"{path}:41"] == filler(25, 99)


def test_what_all_rows_say_is_gone_through_once(tmp_path, monkeypatch):
    """However often training text says it: two thousand rows and two thousand texts are no four million pairs."""
    monkeypatch.setattr(contamination, "BATCH", 1 << 10)
    template = "Read this carefully and then say which one of the answers below it is the right one here:"
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps({"q": f"{template} {number}"}) + "\n" for number in range(2000)))
    known, listed = Contamination([path]), []
    real = known._stretches
    monkeypatch.setattr(known, "_stretches", lambda *given: (listed.append(each) or each for each in real(*given)))
    assert len(known.rows_in([f"{template} {filler(3, number)}" for number in range(2000)])) == 2000
    assert len(listed) <= 2 * 2000


def test_the_batch_form_agrees_with_the_single_one(evaluation):
    known = Contamination([evaluation])
    texts = [filler(40), f"{filler(5)} {KOREAN}", "", QUESTION, filler(9)]
    alone = [number for number, text in enumerate(texts) if rows(known, text)]
    assert sorted(known.first(read_words(texts))) == alone == [1, 3]


def test_text_files_give_the_line_of_their_paragraph(tmp_path):
    (tmp_path / "a.txt").write_text(f"Title\n\n{filler(30, 1)}\n\n\n{QUESTION}\nmore\n")
    (tmp_path / "b.md.gz").write_bytes(gzip.compress(KOREAN.encode()))
    known = Contamination([tmp_path])
    found = [place for place, _ in rows(known, QUESTION, KOREAN)]
    assert found == [f"{tmp_path / 'a.txt'}:6", f"{tmp_path / 'b.md.gz'}:1"]


def test_a_long_text_is_read_in_pieces(evaluation, monkeypatch):
    monkeypatch.setattr(contamination, "BATCH", 2000)
    known, sizes = Contamination([evaluation]), []
    monkeypatch.setattr(contamination, "read_words", lambda texts: sizes.append(len(texts[0])) or read_words(texts))
    for at in range(0, 2000, 130):
        text = f"{filler(900)[:at]} {QUESTION} {filler(400)}"
        assert [place for place, _ in rows(known, text)] == [f"{evaluation}:1"]
    assert max(sizes) <= 2000 + contamination.MEETING


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"q": "a"}\n{"q": \n', r"eval.jsonl:2: not a line of JSON"),
        ('["a"]\n', "eval.jsonl:1: must be an object"),
        ('{"q": "too short"}\n', "no text of 7 words or more to look for"),
        ("", "no text of 7 words"),
    ],
)
def test_bad_evaluation_files_are_told(tmp_path, content, told):
    path = tmp_path / "eval.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=told):
        Contamination([path])
    with pytest.raises(InputError, match="no such file"):
        Contamination([tmp_path / "none.jsonl"])
