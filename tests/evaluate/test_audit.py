"""The audit: our own scorers pass, scorers with known faults are caught, and what it calls wrong is wrong."""

import json
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twelve import cli
from twelve.errors import InputError
from twelve.evaluate.audit import FORMS, answer_ways, audit, changes, might_be_right, source_ways, spellings
from twelve.tasks import code
from twelve.tasks.problem import Problem

MINE = """
import random, re
LANGUAGES = ("en",)
def generate(seed, level, language):
    a, b = random.Random(seed).choices(range(50), k=2)
    return {"question": f"{a} + {b}?", "answer": a + b, "solution": f"{a}+{b}={a + b}"}
def score(problem, text):
"""


@pytest.mark.parametrize("name", ["arithmetic", "word_problems"])
def test_our_own_tasks_pass(name, capsys):
    [found] = audit([name], 1500)["tasks"]
    assert found["passed"]
    assert found["false_accepts"]["tried"] == 1500
    assert found["false_accepts"]["failed"] == found["false_rejects"]["failed"] == 0
    assert len(found["false_accepts"]["kinds"]) > 15
    assert len(found["false_rejects"]["kinds"]) > 8
    assert sorted(found["forms"]) == ["####", "<answer>", "boxed", "reasoned"]
    assert f"{name}: passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("score", "accepts", "rejects"),
    [
        ("    return str(problem['answer']) in text",
         {"digit more", "several answers", "answer in the reasoning"}, set()),
        ("    return f\"<answer>{problem['answer']}</answer>\" in text",
         {"changed its mind"}, {"plus", "blanks around"}),
        ("    found = re.search(r'<answer>\\s*(-?\\d+)', text)\n"
         "    return bool(found and int(found[1]) == problem['answer'])",
         {"several answers", "decimal point"}, {"dollars of LaTeX"}),
        ("    found = re.search(r'<answer>(.*)</answer>', text)\n"
         "    return bool(found and (not found[1] or found[1] == str(problem['answer'])))", {"empty"}, {"plus"}),
    ],
)  # fmt: skip
def test_faulty_scorers_of_ones_own_are_caught(tmp_path, capsys, score, accepts, rejects):
    path = tmp_path / "mine.py"
    path.write_text(MINE + score)
    [found] = audit([str(path)], 1500)["tasks"]
    assert not found["passed"]
    failed = {kind for kind, each in found["false_accepts"]["kinds"].items() if each["failed"]}
    assert accepts <= failed
    assert rejects <= {kind for kind, each in found["false_rejects"]["kinds"].items() if each["failed"]}
    assert {example["kind"] for example in found["false_accepts"]["examples"]} == failed
    assert "FAILED" in capsys.readouterr().out


def test_a_sound_scorer_of_ones_own_passes(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE.partition("def score")[0])
    assert audit([str(path)], 1500)["passed"]


def test_of_a_program_one_line_is_dropped():
    seen = set()
    for seed in range(30):
        problem = code.generate(seed, 4, "en")
        ways = {kind: text for kind, _, text in source_ways(problem, ["return 1"], {"alone": str}, Random(seed))}
        lines, kept = problem.answer.splitlines(), ways.get("line dropped", "").splitlines()
        if kept:  # else what is left gives the same
            assert len(kept) == len(lines) - 1 and kept[0] == lines[0] and kept[-1] == lines[-1]
            seen.add(next((place for place, line in enumerate(kept) if line != lines[place]), len(kept)))
    assert seen == {1, 2, 3, 4}


# --- what is tried ----------------------------------------------------------------------------------------------------

ANSWERS = st.one_of(
    st.integers(-9999, 99999).map(str), st.decimals(0, 999, places=2).map(str),
    st.sampled_from(["Monday", "월요일", "6 km", "6개", "3:45", "1, 2, 3", "A", "2/3", "(3+4)*5", "2024-02-29"]),
)  # fmt: skip


@given(ANSWERS, st.integers(0, 999))
def test_what_is_called_wrong_is_wrong(answer, seed):
    problem = Problem("arithmetic", "en", 1, "What is 12 and 34?", "1+1=2", answer)
    for kind, _, text in answer_ways(problem, ["17", "Tuesday"], FORMS, Random(seed)):
        assert kind
        assert text.strip() != answer
        if not kind.startswith(("answer in", "unfinished", "changed")):
            assert text not in {wrap(answer) for wrap in FORMS.values()}


@given(st.integers(-99, 9999), st.integers(0, 999))
def test_changes_that_are_right_after_all_are_left_out(answer, seed):
    problem = Problem("arithmetic", "en", 1, f"Is it {answer}?", "", answer)
    for _, given_text in changes(str(answer), [answer], problem.question, Random(seed)):
        try:
            is_same = int(given_text) == answer
        except ValueError:
            continue
        assert might_be_right(problem, given_text) == is_same


@pytest.mark.parametrize(
    ("answer", "given_text", "right"),
    [
        (12, "12.0", True), (12, "012", True), (12, "13", False), (12, "12.5", False), (0, "-0", True),
        ("3:45", "03:45", True), ("1, 2", "[1,2]", True), ("1, 2", "2, 1", False), ("Monday", "monday", True),
        ("2*6", "6*2", True), ("2*6", "6+6", True), ("2*6", "2+6", False), ("2*6", "2*(6", False),
        ("2*6", "6/0", False), ("5 km", "5", False), ("5 km", "5 m", False),
        ("5.0 km", "5. km", True), ("5 km", "6 km", False), ("0개", "-0개", True),
    ],
)  # fmt: skip
def test_the_independent_check(answer, given_text, right):
    problem = Problem("x", "en", 1, "?", "", answer, {"target": 12} if answer == "2*6" else {})
    assert might_be_right(problem, given_text) == right


def test_spellings():
    assert dict(spellings("-1234"))["commas"] == "-1,234"
    assert dict(spellings("1234"))["zeros after the point"] == "1234.0"
    assert dict(spellings("2.5"))["zeros after the point"] == "2.50"
    assert dict(spellings("6 km"))["blank before the unit"] == "6km"
    assert dict(spellings("6개"))["blank before the unit"] == "6 개"
    assert dict(spellings("2/3"))["fraction of LaTeX"] == "\\frac{2}{3}"
    assert dict(spellings("1, 2, 3"))["commas without blanks"] == "1,2,3"


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_the_verb(tmp_path, capsys):
    assert cli.main(["eval", "--audit", "arithmetic", "--wrong-answers", "200", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"]
    assert found["tasks"][0]["false_accepts"]["tried"] == 200
    assert cli.main(["eval", "--task", "arithmetic"]) == 2
    assert "name a MODEL" in capsys.readouterr().err
    path = tmp_path / "mine.py"
    path.write_text(MINE + "    return 0")
    with pytest.raises(InputError, match="the reference answer .* scores 0"):
        audit([str(path)])
    with pytest.raises(InputError, match="unknown task 'chess'"):
        audit(["chess"])
