"""The tasks: right, repeatable, in correct Korean, and scored exactly."""

import re
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twelve import tasks
from twelve.errors import InputError
from twelve.tasks import arithmetic, word_problems
from twelve.tasks.korean import Noun, final_consonant, with_particle
from twelve.tasks.problem import Problem
from twelve.tasks.verify import as_integer, final_answer

SEEDS = st.integers(0, 2**63)
CHAINS = ("arithmetic", "word_problems")  # the others: test_generators.py
NAMES = st.sampled_from(CHAINS)
LANGUAGES = st.sampled_from(["ko", "en"])
LEVELS = st.integers(1, 10)


# --- generating -------------------------------------------------------------------------------------------------------


@given(NAMES, SEEDS, LEVELS, LANGUAGES)
def test_the_steps_lead_from_the_question_to_the_answer(name, seed, level, language):
    problem = tasks.get(name).generate(seed, level, language)
    assert (problem.task, problem.level, problem.language) == (name, level, language)
    steps = problem.steps.split("\n")
    assert len(steps) == level
    total = None
    for step in steps:
        left, sign, right, result = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", step).groups()
        assert total is None or int(left) == total
        total = int(result)
        assert {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}.get(
            sign, int(left) / int(right)
        ) == total
        assert 0 <= total <= 99
    assert problem.answer == total
    told = [int(number) for number in re.findall(r"\d+", problem.question)]
    worked = [int(re.split(r"\D", steps[0])[0])] + [int(re.split(r"\D", step)[1]) for step in steps]
    assert sorted(told) == sorted(worked)


@given(NAMES, SEEDS, LEVELS)
def test_both_languages_say_the_same_and_every_call_does(name, seed, level):
    task = tasks.get(name)
    korean, english = task.generate(seed, level, "ko"), task.generate(seed, level, "en")
    assert (korean.steps, korean.answer) == (english.steps, english.answer)
    assert korean == task.generate(seed, level, "ko")
    assert re.search("[가-힣]", korean.question)
    assert english.question.isascii()
    assert not re.search("[a-zA-Z{}]", korean.question)


def test_known_problems_stay_what_they_are():
    """A change here makes old results incomparable."""
    assert arithmetic.generate(7, 3, "en").question == KNOWN["arithmetic en"]
    assert arithmetic.generate(7, 3, "ko").question == KNOWN["arithmetic ko"]
    assert word_problems.generate(7, 2, "en").question == KNOWN["word_problems en"]
    assert word_problems.generate(7, 2, "ko").question == KNOWN["word_problems ko"]


KNOWN = {
    "arithmetic en": "Start with 24. Divide by 4, divide by 3, then divide by 2. What is the result?",
    "arithmetic ko": "24에서 시작해 4로 나누고 3으로 나누고 2로 나눈다. 결과는?",
    "word_problems en": "A library has 24 books. Jun borrows 3. Jieun returns 2. How many books are there?",
    "word_problems ko": "도서관에 책이 24권 있다. 준이 3권을 빌려 간다. 지은이 2권을 돌려준다. 책은 몇 권인가?",
}


def test_problems_are_short_and_varied():
    for name in CHAINS:
        for language in ("ko", "en"):
            some = [tasks.get(name).generate(seed, 2, language) for seed in range(500)]
            assert max(len(problem.question) for problem in some) < 130
            assert len({problem.question for problem in some}) > 450
            assert len({problem.answer for problem in some}) > 60
            assert {sign for problem in some for sign in re.findall(r"[-+*/]", problem.steps)} == set("+-*/")


def test_messages_teach_the_worked_answer():
    problem = Problem("arithmetic", "en", 1, "Start with 7. Add 5. What is the result?", "7+5=12", 12)
    assert problem.messages() == [
        {"role": "user", "content": "Start with 7. Add 5. What is the result?"},
        {"role": "assistant", "content": "<think>7+5=12</think><answer>12</answer>"},
    ]


@pytest.mark.parametrize("name", tasks.names())
@pytest.mark.parametrize(("level", "language"), [(0, "en"), (21, "ko"), (-1, "ko"), (1, "fr"), (1, "")])
def test_what_a_task_does_not_have(name, level, language):
    with pytest.raises(InputError, match="level|language"):
        tasks.get(name).generate(0, level, language)


def test_unknown_task():
    with pytest.raises(InputError, match="unknown task 'chess'; there are: arithmetic, word_problems"):
        tasks.get("chess")
    with pytest.raises(InputError, match="split"):
        next(tasks.problems("arithmetic", "dev"))


# --- training and test ------------------------------------------------------------------------------------------------


def test_no_held_out_problem_is_in_training():
    def some(split: str, seed: int):
        return [
            problem
            for name in CHAINS
            for problem in islice(tasks.problems(name, split, seed, levels=(1, 2, 3)), 600)
        ]

    train, test = some("train", 0) + some("train", 1), some("test", 0)
    for part in ("question", "steps"):
        assert not {getattr(problem, part) for problem in train} & {getattr(problem, part) for problem in test}
    assert len({(problem.task, problem.question) for problem in test}) == len(test)
    assert not any(map(tasks.is_held_out, train))
    assert {problem.language for problem in test} == {"ko", "en"}
    assert some("test", 0) == test


def test_a_tenth_is_held_out():
    held = [tasks.is_held_out(arithmetic.generate(seed, 3, "en")) for seed in range(3000)]
    assert 0.08 < sum(held) / len(held) < 0.12


def test_the_test_split_ends_when_there_is_nothing_new():
    every = list(tasks.problems("arithmetic", "test", levels=(1,), languages=("en",)))
    assert 50 < len(every) == len({problem.question for problem in every}) < 200


# --- scoring ----------------------------------------------------------------------------------------------------------


@given(NAMES, SEEDS, LEVELS, LANGUAGES, st.integers(1, 999))
def test_right_answers_score_and_mutations_do_not(name, seed, level, language, change):
    task = tasks.get(name)
    problem = task.generate(seed, level, language)
    solution = problem.messages()[1]["content"]
    right, tag = str(problem.answer), f"<answer>{problem.answer}</answer>"
    assert task.score(problem, solution) == 1
    assert tag in solution
    wrong = {
        str(problem.answer + change), str(-1 - problem.answer), right + "1", "1" + right, right + ".5", right + "개",
        "", " ", right + "+0", f"{right} {right}", f"{right}, {right}", "x" + right, right + "/1", f"{right}e0",
    }  # fmt: skip
    for other in wrong:
        assert task.score(problem, solution.replace(tag, f"<answer>{other}</answer>")) == 0
        assert task.score(problem, solution + f"<answer>{other}</answer>") == 0
    for size in range(len(solution)):
        assert task.score(problem, solution[:size]) == 0
    for size in range(1, len(tag)):  # a character of the tag is missing, or the answer
        if tag[size - 1] in "<>/answer":
            assert task.score(problem, tag[: size - 1] + tag[size:]) == 0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>12</answer>", "12"),
        ("<answer>3</answer> no, <answer> 12\n</answer>", "12"),
        ("<answer>3 <answer>12</answer></answer>", "12"),
        ("<answer>7</answer> \\boxed{12} #### 12", "7"),
        ("so \\boxed{3} and \\boxed{12} #### 3", "12"),
        ("#### 3\n#### 12\nthat is it", "12"),
        ("<think>\\boxed{3} #### 4 <answer>5</answer></think>12", None),
        ("<think><answer>5</answer></think><answer>12</answer>", "12"),
        ("3</think><answer>12</answer>", "12"),
        ("<think><answer>12</answer>", None),
        ("<answer>12", None),
        ("12", None),
        ("", None),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12", 12), (" 12 ", 12), ("-3", -3), ("+3", 3), ("007", 7), ("1,234", 1234), ("1 234 567", 1234567),
        ("１２", 12), ("１，２３４", 1234), ("−5", -5), ("\u300012", 12), ("9" * 40, int("9" * 40)),
        ("12.0", None), ("1,2", None), ("1 2", None), ("12개", None), ("$12", None), ("十二", None), ("١٢", None),
        ("①", None), ("²", None), ("", None), ("-", None), ("1,", None), ("9" * 5000, None), ("1_2", None),
    ],
)  # fmt: skip
def test_as_integer(text, number):
    assert as_integer(text) == number


@given(st.text(max_size=50), st.integers(-999, 999))
def test_any_text_gets_a_score(text, answer):
    problem = Problem("arithmetic", "en", 1, "?", "", answer)
    for given_text in (text, f"<answer>{text}</answer>", f"#### {text}"):
        assert arithmetic.score(problem, given_text) in (0.0, 1.0)


# --- particles --------------------------------------------------------------------------------------------------------

PARTICLES = ("은/는", "이/가", "을/를", "과/와", "으로/로", "이나/나", "아/야")


@pytest.mark.parametrize(
    ("word", "endings"),
    [
        ("사과", "는 가 를 와 로 나 야"),
        ("책", "은 이 을 과 으로 이나 아"),
        ("연필", "은 이 을 과 로 이나 아"),
        ("별", "은 이 을 과 로 이나 아"),
        ("값", "은 이 을 과 으로 이나 아"),
        ("여덟", "은 이 을 과 으로 이나 아"),
        ("0", "은 이 을 과 으로 이나 아"),  # 영
        ("1", "은 이 을 과 로 이나 아"),  # 일
        ("2", "는 가 를 와 로 나 야"),
        ("3", "은 이 을 과 으로 이나 아"),
        ("4", "는 가 를 와 로 나 야"),
        ("5", "는 가 를 와 로 나 야"),
        ("6", "은 이 을 과 으로 이나 아"),
        ("7", "은 이 을 과 로 이나 아"),
        ("8", "은 이 을 과 로 이나 아"),
        ("9", "는 가 를 와 로 나 야"),
        ("10", "은 이 을 과 으로 이나 아"),
        ("12", "는 가 를 와 로 나 야"),
        ("Tom", "는 가 를 와 로 나 야"),
        ("", "는 가 를 와 로 나 야"),
    ],
)
def test_particles(word, endings):
    assert [with_particle(word, pair) for pair in PARTICLES] == [word + ending for ending in endings.split()]


@pytest.mark.parametrize(
    ("number", "final"),
    [
        ("20", "ㅂ"), ("100", "ㄱ"), ("1000", "ㄴ"), ("10000", "ㄴ"), ("300000", "ㄴ"), ("10000000", "ㄴ"),
        ("100000000", "ㄱ"), ("1,000,000", "ㄴ"), ("1000000000000", ""), ("10000000000000000", "ㅇ"),
        ("105", ""), ("110", "ㅂ"), ("3.0", "ㅇ"), ("3.50", "ㅇ"), ("3.6", "ㄱ"), ("0", "ㅇ"), ("00", "ㅇ"),
        ("제10", "ㅂ"),
    ],
)  # fmt: skip
def test_numbers_as_they_are_read(number, final):
    assert final_consonant(number) == final


@given(st.characters(min_codepoint=0xAC00, max_codepoint=0xD7A3))
def test_hangul_syllables_against_their_decomposition(syllable):
    import unicodedata

    parts = unicodedata.normalize("NFD", syllable)
    assert bool(final_consonant(syllable)) == (len(parts) == 3)
    if len(parts) == 3:
        assert unicodedata.normalize("NFKD", final_consonant(syllable))  # a consonant of its own
        assert (with_particle(syllable, "으로/로") == syllable + "로") == (parts[2] == "ᆯ")


def test_nouns_in_format_strings():
    assert f"{Noun('사과'):은/는} {Noun(3):을/를} {Noun('별'):으로/로} {Noun('책')}" == "사과는 3을 별로 책"
    assert f"{Noun(10):이/가}" == "10이"
