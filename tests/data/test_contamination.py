"""Overlaps with evaluation files: all that were planted, and nothing in disjoint text."""

import gzip
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


def filler(count: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(10**6)}" for _ in range(count))


def test_planted_text_is_found_with_its_place_and_words(evaluation):
    known = Contamination([evaluation])
    [(place, words)] = known.overlaps(f"{filler(300)} {QUESTION.upper().replace(',', ' --')} {filler(50)}")
    assert place == f"{evaluation}:1" and read_words([words]).lengths[0] == len(QUESTION.split())
    [(place, words)] = known.overlaps(f"{filler(20)}.\n{KOREAN}\n{filler(20)}")
    assert place == f"{evaluation}:2" and words == KOREAN.rstrip("?")
    [(place, _)] = known.overlaps("It was odd: nobody had ever seen the captain laugh before, they said.")
    assert place == f"{evaluation}:4"
    assert (known.rows, known.short) == (4, 1)


def test_nothing_is_found_in_disjoint_text(evaluation):
    known = Contamination([evaluation])
    partly = "How many people can cross the river?", "강을 건네준다. 모두 몇 명이 건널 수 있을까?"
    for text in (filler(5000), "", *partly):
        assert known.overlaps(text) == []


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 24), st.integers(1, 30), st.integers(0, 9))
def test_thirteen_words_are_found_and_twelve_are_not(tmp_path_factory, start, count, seed):
    path = tmp_path_factory.getbasetemp() / "one.jsonl"
    path.write_text(json.dumps({"q": QUESTION}))
    words = QUESTION.split()[start : start + count]
    found = Contamination([path]).overlaps(f"{filler(9, seed)} {' '.join(words)} {filler(9, seed + 10)}")
    assert bool(found) == (len(words) >= 13)


def test_korean_takes_eight_words_and_n_can_be_set(evaluation):
    known, words = Contamination([evaluation]), KOREAN.split()
    assert known.overlaps(" ".join(words[3:11])) and not known.overlaps(" ".join(words[3:10]))
    longer = Contamination([evaluation], n=20)
    assert not longer.overlaps(" ".join(words[3:11])) and longer.overlaps(" ".join(words[2:14]))


def test_stretches_are_joined_and_told_apart(evaluation):
    words = QUESTION.split()
    found = Contamination([evaluation]).overlaps(f"{' '.join(words[:15])} and {' '.join(words[10:24])} and {KOREAN}")
    assert [read_words([stretch]).lengths[0] for _, stretch in found] == [15, 14, len(KOREAN.split())]


def test_the_batch_form_agrees_with_the_single_one(evaluation):
    known = Contamination([evaluation])
    texts = [filler(40), f"{filler(5)} {KOREAN}", "", QUESTION, filler(9)]
    alone = [number for number, text in enumerate(texts) if known.overlaps(text)]
    assert sorted(known.first(read_words(texts))) == alone == [1, 3]


def test_text_files_give_the_line_of_their_paragraph(tmp_path):
    (tmp_path / "a.txt").write_text(f"Title\n\n{filler(30, 1)}\n\n\n{QUESTION}\nmore\n")
    (tmp_path / "b.md.gz").write_bytes(gzip.compress(KOREAN.encode()))
    known = Contamination([tmp_path])
    assert known.overlaps(QUESTION)[0][0] == f"{tmp_path / 'a.txt'}:6"
    assert known.overlaps(KOREAN)[0][0] == f"{tmp_path / 'b.md.gz'}:1"


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
