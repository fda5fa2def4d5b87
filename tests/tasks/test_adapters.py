"""Tasks from a user's file, rows of a .jsonl file, and reasoning-gym; what goes wrong in them, told in one line."""

import json
import os
import sys
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest

from twelve import tasks
from twelve.errors import InputError
from twelve.tasks import adapters, gym
from twelve.tasks.problem import Problem, is_held_out
from twelve.tasks.worker import DIED, LATE, Worker

MINE = """
import random
LEVELS = (1, 3)
LANGUAGES = ("en",)
SYSTEM = "Answer with a number."
MAX_TOKENS = 64

def generate(seed, level, language):
    a, b = random.Random(seed).choices(range(10 ** level), k=2)
    return {"question": f"{a} + {b}?", "answer": a + b, "solution": f"{a}+{b}={a + b}", "pair": (a, b)}
"""
SCORE = """
def score(problem, text):
    print("to standard output")
    assert problem["answer"] == problem.answer == sum(problem["pair"]) and problem.get("none") is None
    return f"<answer>{problem['answer']}</answer>" in text
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Puts a task file in place and gives the name to use."""
    monkeypatch.chdir(tmp_path)

    def put(text: str, name: str = "mine.py") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return name

    yield put
    tasks._adapter.cache_clear()


def right(problem: Problem) -> str:
    return problem.messages()[-1]["content"]


# --- a user's file ----------------------------------------------------------------------------------------------------


def test_a_file_of_ones_own(write, capfd):
    name = write(MINE + SCORE)
    task = tasks.get(name)
    assert tasks.get(name) is task
    assert (task.LEVELS, task.LANGUAGES, task.LARGEST_LEVEL) == ((1, 3), ("en",), 3)
    assert (task.SYSTEM, task.MAX_TOKENS) == ("Answer with a number.", 64)
    some = list(islice(tasks.problems(name, "train", levels=task.LEVELS), 300))
    first = [(problem.task, problem.language, problem.level) for problem in some[:2]]
    assert first == [(name, "en", 1), (name, "en", 3)]
    assert some == list(islice(tasks.problems(name, "train", levels=task.LEVELS), 300))
    assert some[0].steps.endswith(f"={some[0].answer}")
    texts = [right(problem) if n % 3 else "no" for n, problem in enumerate(some)]
    assert tasks.score_all(some, texts) == [float(n % 3 > 0) for n in range(300)]
    assert task.score(some[0], right(some[0])) == 1
    assert "to standard output" not in capfd.readouterr().out
    tasks.check(name)


def test_its_splits_do_not_meet(write):
    name = write(MINE)
    train = {problem.question for problem in islice(tasks.problems(name, "train"), 300)}
    test = [problem.question for problem in tasks.problems(name, "test", levels=(1,))]
    assert 0 < len(test) == len(set(test)) < 30
    assert not train & set(test)


@pytest.mark.parametrize(
    "generate",
    [
        "import random\ndef generate(seed): return {'question': f'{random.random()}?', 'answer': 3}",
        "def generate(seed, level=1, size=7, **more): return {'question': f'{seed} {level} {size}?', 'answer': 3.0}",
        "from twelve.tasks import Problem\ndef generate(seed, level, language):\n"
        "    return Problem('', language, level, f'{seed}?', '', 3)",
        "from fractions import Fraction\ndef generate(seed): return {'question': f'{seed}?', 'answer': Fraction(6, 2)}",
    ],
)
def test_shapes_of_generate_without_a_scorer(write, generate):
    name = write(generate)
    task = tasks.get(name)
    problem = task.generate(5, 1, "en")
    assert problem == task.generate(5, 1, "en") != task.generate(6, 1, "en")
    assert (problem.task, problem.level, problem.language, str(problem.answer)) == (name, 1, "en", "3")
    assert tasks.score_all([problem] * 4, ["3", "#### 3", "\\boxed{3.0}", "<answer>4</answer>"]) == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("MAX_TOKENS = '64'", "MAX_TOKENS must be a whole number"), ("MAX_TOKENS = -3", "MAX_TOKENS must be"),
        ("MAX_TOKENS = 2.5", "MAX_TOKENS must be"), ("SYSTEM = 5", "SYSTEM must be text"),
        ("EXAMPLES = [('a', 'b', 'c')]", "EXAMPLES must be pairs"), ("LEVELS = 3", "LEVELS must be .*not 3"),
        ("LEVELS = ('easy', 'hard')", "LEVELS must be"), ("LEVELS = (0, 1)", "LEVELS must be"),
    ],
)  # fmt: skip
def test_what_a_file_says_of_itself_is_checked(write, line, words):
    with pytest.raises(InputError, match=f"mine.py: {words}"):
        tasks.get(write(f"{line}\ndef generate(seed): return {{'question': f'{{seed}}?', 'answer': 3}}"))


def test_the_language_is_seen_where_none_is_told(write):
    name = write("def generate(seed): return {'question': f'{seed} 더하기 1은?', 'answer': seed + 1}")
    assert tasks.get(name).LANGUAGES == ("ko",)
    assert next(tasks.problems(name, "train")).language == "ko"
    with pytest.raises(InputError, match="mine.py has no problems in another language than ko"):
        next(tasks.problems(name, "train", languages=["en"]))
    with pytest.raises(InputError, match="mine.py has no level 2; it has 1"):
        next(tasks.problems(name, "train", levels=[2]))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def generate(seed:\n", "mine.py line 1: SyntaxError"),
        ("import json\n\njson.nothing", "mine.py line 3: AttributeError"),
        ("import no_such_module", "mine.py line 1: ModuleNotFoundError"),
        ("raise SystemExit", "mine.py line 1: SystemExit"),
        ("import os\nos._exit(0)", "mine.py ends its process"),
        ("def make(seed): pass", r"mine.py has no function generate\(seed, level, language\)"),
        ("def generate(): pass", "mine.py: generate takes"),
        ("def generate(seed, size): pass", "mine.py: generate takes .* not size"),
        ("LEVELS = ()\ndef generate(seed): pass", "mine.py: LEVELS"),
        ("LANGUAGES = ('fr',)\ndef generate(seed): pass", "mine.py: LANGUAGES has 'fr'"),
        ("def generate(seed, language):\n    return 1 / 0", "mine.py line 2: ZeroDivisionError: .*, in generate"),
        ("def generate(seed, language): return 5", "mine.py: generate returned int, not a Problem or a dict"),
        ("def generate(seed, language): return {'question': 'x?'}", "'question' .* and an 'answer'"),
        ("def generate(seed, language): return {'question': 'x?', 'answer': None}", "the answer None is neither"),
        ("def generate(seed, language): return {'question': 'x?', 'answer': 1, 'f': print}", "must be JSON"),
        ("def generate(seed, language):\n    while True: pass", "mine.py: it did not return in time"),
    ],
)
def test_a_broken_file_is_one_line(write, monkeypatch, text, told):
    monkeypatch.setattr(adapters.WorkerTask.__init__, "__defaults__", (0.3,))
    name = write(text)
    with pytest.raises(InputError, match=told) as caught:
        next(tasks.problems(name, "train"))
    assert "\n" not in str(caught.value)


def test_a_program_has_no_parts(write):
    with pytest.raises(InputError, match="mine.py draws its problems"):
        tasks.get(write(MINE) + "#train")


def test_no_file(tmp_path):
    for name in (f"{tmp_path}/none.py", f"{tmp_path}/none.jsonl"):
        with pytest.raises(InputError, match="there is no task file .*none"):
            tasks.get(name)


# --- scorers that go wrong --------------------------------------------------------------------------------------------


def scored(write, score: str, texts: list[str], seconds: float = 0.3) -> list[float]:
    write(MINE + score)
    task = adapters.WorkerTask("mine.py", "user_file", seconds)
    problem = task.generate(0, 1, "en")
    return task.score_all([problem] * len(texts), texts)


def test_a_scorer_that_raises_counts_zero_and_warns_once(write, capsys):
    texts = ["1", "x", "0.5", "y"] * 40
    score = "def score(problem, text):\n    return float(text)"
    assert scored(write, score, texts) == [1, 0, 0.5, 0] * 40
    [line] = capsys.readouterr().err.splitlines()
    assert "mine.py line 12: ValueError: could not convert string to float: 'x'" in line


def test_a_scorer_that_mostly_raises_stops(write):
    score = "def score(problem, text):\n    return float(text)"
    assert scored(write, score, ["x"] * 63) == [0] * 63
    with pytest.raises(InputError, match=r"score raised on 64 of 64 answers, last: mine.py line 12: ValueError"):
        scored(write, score, ["x"] * 64)
    with pytest.raises(InputError, match="mine.py: score ended its process 3 times in a row"):
        scored(write, "import os\ndef score(problem, text): os._exit(0)", ["x"] * 64)


def test_a_scorer_that_does_not_return(write, capsys):
    score = "def score(problem, text):\n    while text == 'x': pass\n    return 1"
    assert scored(write, score, ["1", "x", "1", "x", "x", "1"]) == [1, 0, 1, 0, 0, 1]
    [line] = capsys.readouterr().err.splitlines()
    assert "mine.py: it did not return in time" in line
    begun = time.monotonic()
    with pytest.raises(InputError, match=r"mine.py: score did not return in time 3 times in a row \(limit: 0.3 s\)"):
        scored(write, score, ["x"] * 1000)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ("value", "told"),
    [("2", "returned 2.0, which is not from 0 to 1"), ("-0.1", "returned -0.1"), ("float('nan')", "returned nan"),
     ("None", "returned None, not a number"), ("'good'", "returned 'good', not a number")],
)  # fmt: skip
def test_scores_outside_of_zero_to_one(write, value, told):
    with pytest.raises(InputError, match=f"mine.py: score {told}"):
        scored(write, f"def score(problem, text): return {value}", ["x"])


def test_reference_answers_that_fail_their_own_scorer(write):
    name = write(MINE + "def score(problem, text): return text == 'nothing'")
    with pytest.raises(InputError, match=r"mine.py: the reference answer \d+ scores 0 by its own scorer; question: \d"):
        tasks.check(name)
    name = write("def generate(seed): return {'question': 'always?', 'answer': 1, 'steps': 'd'}", "same.py")
    assert is_held_out(tasks.get(name).generate(0, 1, "en")) is (not list(islice(tasks.problems(name, "train"), 1)))


# --- the worker -------------------------------------------------------------------------------------------------------


def test_a_worker_ends_with_its_parent_and_starts_again(write):
    write(MINE + "import os, sys, time\ndef score(problem, text):\n    eval(text)\n    return os.getpid() % 2")
    worker = Worker("twelve.tasks.user_file", "mine.py")
    problem = vars(adapters.WorkerTask("mine.py", "user_file").generate(0, 1, "en"))
    calls = ["0", "time.sleep(9)", "os.close(1)", "os._exit(3)", "sys.exit()", "print('x' * 100_000)", "0"]
    replies = worker.call("score", [[problem, text] for text in calls], 1.0)
    assert [reply.error and reply.error.split(":")[-1].split()[-1] for reply in replies] == [
        "", LATE.split()[-1], "", DIED.split()[-1], "SystemExit", "", "",
    ]  # fmt: skip
    child = worker._stop.peek()[2][0].pid
    worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_a_workers_end_is_that_of_what_its_code_started(write):
    write(MINE + "import subprocess\ndef score(problem, text): return subprocess.Popen(['sleep', '60']).pid")
    worker = Worker("twelve.tasks.user_file", "mine.py")
    problem = vars(adapters.WorkerTask("mine.py", "user_file").generate(0, 1, "en"))
    [reply] = worker.call("score", [[problem, ""]], 5.0)
    state = Path(f"/proc/{reply.value:.0f}/stat")
    assert state.read_text().split()[2] in "SRD"  # D: still reading itself from the disk
    worker.close()
    deadline = time.monotonic() + 5
    while state.exists() and state.read_text().split()[2] != "Z":  # until somebody takes note of its end
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_file_that_changed_is_noticed(write):
    names = [write(MINE), write(rows({"question": "x?", "answer": 1}), "rows.jsonl") + "#train", "arithmetic", "gym:a"]
    before = tasks.fingerprints(names)
    assert list(before) == names[:2] and before["mine.py"] != before["rows.jsonl#train"]
    tasks.require_unchanged(before)
    os.utime("mine.py", ns=(0, 0))  # touched, but the same
    tasks.require_unchanged(before)
    write(MINE + SCORE)
    with pytest.raises(InputError, match="mine.py is not the file that this run began with: put that back"):
        tasks.require_unchanged(before)
    os.remove("mine.py")
    with pytest.raises(InputError, match="mine.py is not the file"):
        tasks.require_unchanged(before)


def test_large_batches_do_not_block(write):
    write(MINE + "def score(problem, text): return len(text) > 9")
    task = adapters.WorkerTask("mine.py", "user_file")
    problem = task.generate(0, 1, "en")
    texts = ["\ud800\0\n" * 20_000, "x"] * 100  # more than any pipe holds; what UTF-8 cannot write
    assert task.score_all([problem] * 200, texts) == [1, 0] * 100


# --- rows of a file ---------------------------------------------------------------------------------------------------


def rows(*given) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in given)


def test_rows_of_the_known_shapes(write):
    name = write(rows(
        {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
        {"Body": "He had 3.", "Question": "How many?", "Answer": "51.0"},
        {"problem": "Halve 1.", "solution": "It is \\boxed{\\frac{1}{2}}."},
        {"problem": "Who?", "solution": "Thus.", "answer": "Anna"},
        {"question": "하나 더하기 이천은?", "answer": "2,001"},
        {"question": "Which one?", "answer": "Python 18.0"},
    ), "rows.jsonl") + "#train"  # fmt: skip
    found = {problem.question: problem for problem in islice(tasks.problems(name, "train"), 20)}
    assert {question: (problem.steps, problem.answer) for question, problem in found.items()} == {
        "Two and two?": ("2 + 2 = 4", "4"), "He had 3. How many?": ("", "51"), "Who?": ("Thus.", "Anna"),
        "Halve 1.": ("It is \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"), "하나 더하기 이천은?": ("", "2,001"),
        "Which one?": ("", "Python 18.0"),
    }  # fmt: skip
    right_ones = {"Two and two?": "4", "Halve 1.": "0.5", "Who?": "anna", "하나 더하기 이천은?": "2001"}
    for question, answer in right_ones.items():
        assert tasks.score_all([found[question]] * 2, [f"#### {answer}", "#### 5"]) == [1, 0]
    assert {problem.language for problem in found.values()} == {"ko", "en"}
    tasks.check(name)
    with pytest.raises(InputError, match="rows.jsonl#train is for train only"):
        next(tasks.problems(name, "test"))


def test_a_byte_order_mark_is_none_of_the_row(write):
    name = write("\ufeff" + rows({"question": "x?", "answer": 1}), "rows.jsonl") + "#train"
    assert next(tasks.problems(name, "train")).question == "x?"


def test_rows_are_split_by_content_or_as_told(write):
    odd = "\u2028"  # an end of line to str.splitlines, not to JSON
    name = write(rows(*({"question": f"What is{odd}{n}?", "answer": n} for n in range(500))), "rows.jsonl")
    every = {f"What is{odd}{n}?" for n in range(500)}
    test = [problem.question for problem in tasks.problems(name, "test")]
    train = {problem.question for problem in islice(tasks.problems(name, "train"), 2000)}
    assert 20 < len(test) < 90
    assert len(set(test)) == len(test)
    assert train | set(test) == every
    assert not train & set(test)
    assert {problem.question for problem in tasks.problems(f"{name}#test", "test")} == every
    first = [problem.question for problem in islice(tasks.problems(f"{name}#train", "train"), 500)]
    assert set(first) == every  # a round goes through all rows
    assert first != sorted(first)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "rows.jsonl line 1 is not JSON"),
        ('{"question": "x?", "answer": 1}\n\n{"question": "y?"}', "rows.jsonl line 3 has no question with an answer"),
        ("[1]", "rows.jsonl line 1 has no question"),
        ('{"question": "x?", "answer": NaN}', "rows.jsonl line 1: the answer is no number"),
        ("", "rows.jsonl has no problems"),
    ],
)
def test_broken_rows_are_one_line(write, text, told):
    with pytest.raises(InputError, match=told):
        tasks.get(write(text, "rows.jsonl"))


def test_real_files(shared_data):
    folder = shared_data / "tasks"
    assert len(list(tasks.problems(f"{folder}/gsm8k-test.jsonl#test", "test"))) == 1319
    for name in ("gsm8k-train.jsonl", "svamp.jsonl"):
        tasks.check(f"{folder}/{name}")


# --- reasoning-gym ----------------------------------------------------------------------------------------------------


def test_seeds_of_reasoning_gym_do_not_meet(monkeypatch):
    """Nor do they go beyond what numpy takes."""
    asked = []
    factory = SimpleNamespace(DATASETS=["x"])
    row = {"question": "?", "answer": "1"}
    made = SimpleNamespace(create_dataset=lambda kind, seed, size: asked.append(seed) or [row])
    monkeypatch.setitem(sys.modules, "reasoning_gym", made)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)
    generate = gym.functions("gym:x")["generate"]
    for seed in range(3):
        for number in range(200):
            generate(seed << 32 | number, 1, "en")
    assert len(set(asked)) == 600 and max(asked) < 2**31


def test_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    for name in ("gym:chain_sum", "gym:countdown"):
        tasks.check(name)
        problem = next(tasks.problems(name, "train"))
        assert problem == next(tasks.problems(name, "train"))
        assert tasks.score_all([problem] * 2, [right(problem), "<answer>-1</answer>"])[0] == 1
    with pytest.raises(InputError, match="reasoning-gym has no generator 'nothing'"):
        tasks.get("gym:nothing")


def test_mixed_batches(write):
    name = write(MINE)
    mine, ours = next(tasks.problems(name, "train")), next(tasks.problems("arithmetic", "train"))
    given = [mine, ours, mine, ours]
    assert tasks.score_all(given, [right(mine), right(ours), right(mine) + "#### 0", "no"]) == [1, 1, 1, 0]
    assert tasks.score_all([], []) == []
