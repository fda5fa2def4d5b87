"""Scoring answers: equal ones are accepted in every fair spelling, everything else is not, however long it is."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twelve.tasks import verify
from twelve.tasks.verify import answer_score, final_answer, is_equal, read_number

# --- the final answer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{3} so \boxed {\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\text{a{b{c}}}} }", r"\text{a{b{c}}}"),
        (r"\boxed{12", None),
        (r"\boxed{3} and \boxed{12", None),
        (r"\boxed 12", None),
        ("<answer>5</answer> or <answer>7", None),
        ("<answer>5 <think>7</answer>", None),
        ("<think>a</think><answer>5</answer><think><answer>7</answer>", "5"),
        ("a <think> <answer>7</answer>", None),
        ("<think>x</think> <think>#### 3", None),
        ("<answer>１２，３</answer>", "12,3"),
        ("#### 12\nthat is it", "12"),
        ("####", ""),
        ("</answer>5<answer>", None),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


# --- equality ---------------------------------------------------------------------------------------------------------

EQUAL = [
    ("12", "12"), ("12", "12.0"), ("12", "+12"), ("12", "012"), ("12", "１２"), ("12", "12."), ("12", "$12$"),
    ("-5", "−5"), ("-5", "- 5"), ("0", "-0"), ("0.5", ".5"), ("0.5", "0.50"), ("1/2", "0.5"), ("1/2", "2/4"),
    ("1/2", r"\frac{1}{2}"), ("1/2", r"\dfrac12"), ("-1/2", r"-\frac{1}{2}"), ("1.5", "1 1/2"),
    ("1.5", r"1\frac{1}{2}"), ("-1/2", r"\frac{-1}{2}"),
    ("50%", "50 %"), ("50%", "0.5"), ("0.5", "50%"), ("50%", r"50\%"),
    ("1234567", "1,234,567"), ("1,234", "1234"), ("1234", "1 234"), ("1234", "1{,}234"), ("1234.5", "1,234.50"),
    ("6개", "6 개"), ("6 km", "6km"), ("6 km", r"6\text{ km}"), ("6 km", "6.0 km"), ("$18", "$18.00"), ("5 m²", "5m^2"),
    ("₩1,000", "₩1000"), ("1/2 cup", "0.5 cup"),
    ("1, 2, 3", "1,2,3"), ("New York", "New  York"), ("Monday", "monday"),
    ("월요일", "월요일."), ("3시간 20분", "3시간20분"),
    ("한글", "\u1112\u1161\u11ab\u1100\u1173\u11af"), ("x", "x"), ("10:30", "10:30"),
]  # fmt: skip
DIFFERENT = [
    ("12", "12.5"), ("12", "1,2"), ("15", "1,5"), ("1000", "1e3"), ("3", "٣"), ("3", "三"), ("1/2", "½"),
    ("5.5", "5½"),
    ("11/2", "1½"), ("32", "3²"), ("6", "6개"), ("6개", "6"), ("6개", "6명"), ("6 km", "6 m"), ("5 m", "5 m²"),
    ("5 m²", "5 m³"), ("6", "여섯"), ("6", "six"), ("$18", "18"), ("18", "$18"), ("50", "50%"), ("50%", "50"),
    ("1", "1 or 2"), ("1", "1-2"), ("1", "1~2"), ("12", "12, 13"), ("12", "12 12"), ("1234", "1,234 567"),
    ("1 234", "1234"), ("1, 234", "1234"), ("3 5", "35"), ("12", "1 2"), ("12", "12\0"), ("12", "1\u200b2"),
    ("1", "1\n2"), ("5", "--5"), ("5", "5/0"), ("12", "24/2"), ("12", "12/1"), ("12", "6+6"), ("1/3", "0.333"),
    ("0.1", "0.1000000000000000055511151231257827"), ("9007199254740993", "9007199254740992"), ("0.5", "1/2/1"),
    ("12", ""), ("12", "."), ("12", "$"), ("", ""), ("x", "X"), ("Ab1", "aB1"), ("12", "12 = 12"), ("1", "1 2/3"),
    ("12", "0x0c"), ("12", "1_2"), ("12", "inf"), ("12", "nan"), ("Monday", "Mon day"), ("3 -5", "3-5"),
    ("12", "\\frac"),
    ("5", "5 6 km"), ("3-5", "-2"), ("가", "나"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "given"), EQUAL)
def test_equal(answer, given):
    assert is_equal(answer, given)
    assert answer_score(answer, f"<think>hm</think><answer>{given}</answer>") == 1
    assert answer_score(answer, f"so \\boxed{{{given}}}") == 1
    assert answer_score(answer, given) == 0  # where nothing says that this is the answer


@pytest.mark.parametrize(("answer", "given"), DIFFERENT)
def test_different(answer, given):
    assert not is_equal(answer, given)


@given(st.fractions(), st.fractions())
def test_fractions_are_equal_exactly_when_they_are(one, other):
    assert is_equal(str(one), str(other)) == (one == other)
    assert is_equal(str(one), str(one))


@given(st.decimals(-(10**9), 10**9, places=3), st.integers(1, 9), st.integers(0, 2))
def test_decimals(number, change, place):
    told = f"{number:f}"
    assert read_number(told) == (Fraction(number), "")
    assert is_equal(told, f"{number:,f}")
    assert is_equal(f"{number:,f}", f"{told}00")
    assert not is_equal(told, str(number + change * number.__class__(10) ** -place))
    assert not is_equal(told, f"{number}{change}")


@given(st.integers(-(10**60), 10**60))
def test_integers(number):
    assert answer_score(number, f"#### {number:,}") == 1
    assert answer_score(number, f"#### {number + 1}") == 0
    assert answer_score(number, f"#### {number} or {number + 1}") == 0


@given(st.text(max_size=60), st.text(max_size=60))
@settings(max_examples=300)
def test_any_text_gets_a_score(answer, given):
    for text in (given, f"<answer>{given}</answer>", f"\\boxed{{{given}}}", f"#### {given}"):
        assert answer_score(answer, text) in (0.0, 1.0)


HUGE = 10_000_000


@pytest.mark.parametrize(
    "text",
    [
        "<answer>" * (HUGE // 8), "<answer>1" + "0" * HUGE + "</answer>", "\\boxed{" * (HUGE // 7), "#" * HUGE,
        "<think>" * (HUGE // 7), "\\boxed{" + "{}" * (HUGE // 2) + "}", "<answer></answer>" * (HUGE // 17),
        "<answer>" + "\\frac{1}" * 100 + "</answer>", "<answer>" + "1 " * 450 + "</answer>",
        "<answer>" + "1," * 450 + "</answer>", "<answer>" + "a." * 480 + "</answer>",
        "<answer>1 " + "km " * 300 + "</answer>",
        "<answer>9^9^9^9^9</answer>", "<answer>1e999999999</answer>", "<answer>" + "(" * 900 + "1</answer>",
        "<answer>" + "9" * 900 + "</answer>",
        "<answer>\\text{" + "\\text{" * 100 + "</answer>", " " * HUGE, "\0" * HUGE,
    ],
    ids=lambda text: text[:24],
)  # fmt: skip
def test_long_and_hostile_texts_are_wrong_at_once(text):
    begun = time.process_time()
    assert answer_score(12, text) == answer_score("Monday", text) == 0
    assert time.process_time() - begun < 0.5


# --- formulas ---------------------------------------------------------------------------------------------------------


def test_formulas():
    pytest.importorskip("math_verify")
    for answer, same in (
        (r"\sqrt{2}", r"\sqrt2"), ("x^2+1", "1+x^2"), ("2x+4", "2(x+2)"), (r"\pi/2", r"\frac{\pi}{2}"),
    ):  # fmt: skip
        assert is_equal(answer, same)
    for answer, other in (
        (r"\sqrt{2}", "1.41421356"), ("2x+4", "2x+5"), ("x+1", "x+1 or x+2"), ("x+1", "x+1, x+2"), ("(1,2)", "(2,1)"),
        ("x^2", "9^{9^{9^9}}"), ("x+1", r"x+1 \\ x+2"), ("x+1", "correct"), ("3-5", "-2"), ("x", ""),
    ):  # fmt: skip
        assert not is_equal(answer, other)


def test_without_math_verify_formulas_are_text(monkeypatch):
    monkeypatch.setattr(verify, "_formula_worker", lambda: None)
    assert is_equal("x^2 + 1", "x^2 + 1")
    assert is_equal("x = 3", "x=3")
    assert not is_equal("x^2+1", "1+x^2")
