"""Traces: what the verifier lets through, a collection that goes on after a stop, endpoints that die, the selection."""

import json
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random

import pytest
from small import folder, llama, model, v3

from twelve.data.reader import read_documents
from twelve.data.tokenizer import Tokenizer
from twelve.engine import Engine
from twelve.errors import InputError
from twelve.posttrain import teacher as teachers
from twelve.posttrain import traces as collecting
from twelve.posttrain.curriculum import Cell
from twelve.posttrain.teacher import Answer, Endpoint, EndpointError, LocalTeacher, open_teacher
from twelve.posttrain.traces import WINDOW, NothingPassed, collect, problem_stream, read_traces, select

sys.path.append(str(Path(__file__).parents[1] / "serve"))
from scripted import ScriptedEngine, serving

CELLS = [Cell("arithmetic", 1, "en"), Cell("arithmetic", 2, "ko"), Cell("word_problems", 1, "en")]


class Oracle:
    """Solves some problems always, some sometimes, some never; stops for ever after `patience` problems."""

    def __init__(self, patience=10**9):
        self.asked, self.patience = [], patience

    def answers(self, problems, n, max_tokens, temperature, seeds):
        for index, problem in enumerate(problems):
            if len(self.asked) == self.patience:
                raise EndpointError("the endpoint died")
            self.asked.append(problem.question)
            right = problem.messages()[-1]["content"]
            texts = [right, right.replace("<think>", "<think>hm ")]
            skill = problem.answer % 4  # of 4 answers
            yield index, [Answer(texts[i % 2] if i < skill else "<answer>-1</answer>", True) for i in range(n - 1)] + [
                Answer(right, False)  # right, but cut off
            ]


def gather(path, oracle, **options):
    return collect(path, {None: [oracle]}, CELLS, **{"problems": 50, "samples": 5, "quiet": True} | options)


def test_only_complete_right_answers_are_kept_with_their_rate(tmp_path):
    oracle = Oracle()
    counts = gather(tmp_path / "t.jsonl", oracle)
    traces = read_traces(tmp_path / "t.jsonl")
    problems = dict(enumerate(problem for problem, _ in zip(problem_stream(CELLS), range(50), strict=False)))
    assert oracle.asked == [problem.question for problem in problems.values()]
    for trace in traces:
        problem = problems[trace["problem"]]
        assert trace["messages"][0]["content"] == problem.question
        assert trace["messages"][1]["content"].endswith(f"<answer>{problem.answer}</answer>")
        assert trace["pass_rate"] == problem.answer % 4 / 5
        assert [trace[key] for key in ("task", "level", "language")] == [problem.task, problem.level, problem.language]
    texts = {json.dumps(trace["messages"]) for trace in traces}
    expected = {(p.question, min(2, p.answer % 4)) for p in problems.values()}
    assert len(texts) == len(traces) == sum(count for _, count in expected)
    assert counts["accepted"] == len(traces) and counts["samples"] == 250
    assert counts["pass_rate"] == pytest.approx(sum(p.answer % 4 for p in problems.values()) / 250, abs=1e-4)
    assert sum(1 for _ in read_documents([tmp_path / "t.jsonl"])) == len(traces)  # as `twelve sft` reads it


@pytest.mark.parametrize("patience", [10**9, 30])
def test_problems_that_come_again_count_in_the_rate(tmp_path, monkeypatch, patience):
    """Each comes twice, and its answers are the same again."""
    some = [problem for problem, _ in zip(problem_stream(CELLS), range(25), strict=False)]
    monkeypatch.setattr(collecting, "problem_stream", lambda *_: iter(some * 2))
    path = tmp_path / "t.jsonl"
    if patience < 50:
        with pytest.raises(InputError, match="died"):
            gather(path, Oracle(patience))
    counts = gather(path, Oracle())
    rate, distinct = sum(problem.answer % 4 for problem in some) / 125, select(read_traces(path), 10**9)
    assert counts["problems"] == 50 and counts["pass_rate"] == pytest.approx(rate, abs=1e-4)
    said = [json.dumps(trace["messages"]) for trace in distinct]
    assert counts["accepted"] == len(said) == len({*said}) == sum(min(2, problem.answer % 4) for problem in some)


def test_a_scorer_that_changes_meanwhile_ends_it(tmp_path):
    task = tmp_path / "ships.py"
    task.write_text("def generate(seed):\n    return {'question': f'{seed}?', 'answer': 12}\n")
    oracle, path = Oracle(), tmp_path / "t.jsonl"

    def answers(problems, n, *_):
        for index in range(len(problems)):
            if index == 3:
                task.write_text(task.read_text() + "\ndef score(problem, text):\n    return 1\n")
            yield index, [Answer("<answer>12</answer>", True)] * n

    oracle.answers = answers
    with pytest.raises(InputError, match="ships.py is not the file that this run began with"):
        collect(path, {None: [oracle]}, [Cell(str(task), 1, "en")], problems=50, quiet=True)
    assert len(read_traces(path)) == 3


@pytest.mark.parametrize("patience", [3, WINDOW, WINDOW + 5, 40])
def test_a_dead_endpoint_loses_nothing_and_a_resume_repeats_nothing(tmp_path, patience):
    gather(tmp_path / "whole.jsonl", Oracle())
    path = tmp_path / "cut.jsonl"
    with pytest.raises(InputError, match=r"died; \d+ traces are kept in .*: run the same command again"):
        gather(path, Oracle(patience))
    before = path.read_bytes()
    second = Oracle()
    gather(path, second)
    assert path.read_bytes().startswith(before)
    assert sorted(path.read_text().splitlines()) == sorted((tmp_path / "whole.jsonl").read_text().splitlines())
    solved = {json.loads(line)["messages"][0]["content"] for line in before.splitlines()}
    late = set(second.asked) & solved
    known = [problem.question for problem, _ in zip(problem_stream(CELLS), range(50), strict=False)]
    assert all(known.count(question) > 1 for question in late)  # the same question drawn twice


def test_half_a_line_of_a_killed_process_is_mended(tmp_path):
    path = tmp_path / "t.jsonl"
    gather(path, Oracle())
    whole = path.read_text()
    path.write_text(whole[: len(whole) - 25])
    with pytest.raises(InputError, match="ends within a line"):
        read_traces(path)
    gather(path, Oracle())
    assert sorted(path.read_text().splitlines()) == sorted(whole.splitlines())
    path.write_text('{"messages": 1}\n')
    with pytest.raises(InputError, match=r"t.jsonl:1: not a trace"):
        read_traces(path)


def test_nothing_that_passes_is_told_with_the_rate(tmp_path):
    oracle = Oracle()
    oracle.answers = lambda problems, n, *_: ((i, [Answer("no idea", True)] * n) for i in range(len(problems)))
    with pytest.raises(NothingPassed, match=r"nothing passed the verifier: 0 of 250 answers to 50 problems of "
                       r"arithmetic, word_problems, a pass rate of 0%"):  # fmt: skip
        gather(tmp_path / "t.jsonl", oracle)
    with pytest.raises(InputError, match=r"0 of 1,280 answers to 256 problems"):  # long before the 100,000th
        gather(tmp_path / "t.jsonl", oracle, problems=100_000)


def test_teachers_by_task_and_in_turn(tmp_path):
    arithmetic, first, second = Oracle(), Oracle(), Oracle()
    collect(tmp_path / "t.jsonl", {"arithmetic": [arithmetic], None: [first, second]}, CELLS, problems=48, samples=2,
            quiet=True)  # fmt: skip
    stream = [problem for problem, _ in zip(problem_stream(CELLS), range(48), strict=False)]
    assert arithmetic.asked == [problem.question for problem in stream if problem.task == "arithmetic"]
    words = [problem.question for problem in stream if problem.task == "word_problems"]
    assert sorted(first.asked + second.asked) == sorted(words) and len(first.asked) == len(second.asked) == 8


@pytest.mark.parametrize("shape", [v3, llama])
def test_a_model_here_teaches_and_repeats_with_its_seed(tokenizer, shape):
    local = LocalTeacher(model(shape(tokenizer)), tokenizer)
    problems = [next(problem_stream(CELLS[index:])) for index in range(3)]
    once, again, other = (dict(local.answers(problems, 2, 9, 1.0, [seed, 8, 9])) for seed in (5, 5, 6))
    assert once == again and once[0] != other[0] and (once[1], once[2]) == (other[1], other[2])
    assert all(len(answers) == 2 for answers in once.values())


def test_a_problem_that_does_not_fit_costs_a_teacher_no_other(tokenizer):
    local = LocalTeacher(model(llama(tokenizer)), tokenizer)
    short = next(problem_stream(CELLS))
    long = replace(short, question=short.question * 50)
    answers = dict(local.answers([short, long, short], 2, 9, 1.0, [5, 6, 7]))
    assert answers[1] == [Answer("", False)] * 2
    assert [answers[0], answers[2]] == [answers for _, answers in local.answers([short] * 2, 2, 9, 1.0, [5, 7])]


def test_reasoning_that_the_prompt_opens_is_closed_in_the_answer(tokenizer, tmp_path):
    folder(tmp_path / "m", tokenizer, llama(tokenizer))
    opening = Tokenizer.load(tmp_path / "m")
    end = "assistant\\n' }}\n{%- endif"
    assert end in opening.chat_template
    opening.chat_template = opening.chat_template.replace(end, end.replace("' }}", "<think>' }}"))
    local = LocalTeacher(model(llama(tokenizer)), opening)
    local.engine = ScriptedEngine(tokenizer, "1+1=2</think><answer>2</answer>")
    [(_, [answer])] = local.answers([next(problem_stream(CELLS))], 1, 99, 1.0, [0])
    assert answer == Answer("<think>1+1=2</think><answer>2</answer>", True)


# --- endpoints --------------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(teachers, "RETRIES", (0.01, 0.02))


def test_our_own_server_teaches_with_its_reasoning(tokenizer, tmp_path, impatient):
    text = "<think>7-0=7\n7</think><answer>7</answer>"
    with serving(ScriptedEngine(tokenizer, text), name="ships") as url:
        endpoint = open_teacher(f"{url}/v1")
        assert endpoint.model == "ships"
        counts = collect(tmp_path / "t.jsonl", {None: [endpoint]}, CELLS, problems=80, samples=2, quiet=True)
        traces = read_traces(tmp_path / "t.jsonl")
        assert counts["samples"] == 160 and len(traces) >= 1
        assert {trace["messages"][-1]["content"] for trace in traces} == {text}
        cut = Endpoint(f"{url}/v1", "ships").answers([next(problem_stream(CELLS))], 1, 5, 1.0, [0])
        assert not next(cut)[1][0].complete


def test_a_real_model_behind_our_server_draws_by_the_seed(tokenizer, impatient):
    with serving(Engine(model(llama(tokenizer)), tokenizer)) as url:
        endpoint = open_teacher(f"{url}/v1#tiny")
        problems = [next(problem_stream(CELLS))] * 2
        once, again = (dict(endpoint.answers(problems, 3, 8, 1.0, [4, 5])) for _ in range(2))
        assert {i: sorted(a) for i, a in once.items()} == {i: sorted(a) for i, a in again.items()}
        assert len({answer for answers in once.values() for answer in answers}) > 3


class Scripted(BaseHTTPRequestHandler):
    """Answers with what `server.script` says for each request's number: an HTTP status, or a text."""

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.seen.append((body, self.headers.get("Authorization")))
            said = server.script(len(server.seen))
        busy = json.dumps({"error": {"message": "too\nbusy"}})
        status, content = (200, said) if isinstance(said, str) else (said, busy)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint(impatient):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    server.seen, server.lock, server.script = [], threading.Lock(), lambda number: OK
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "m", "secret-key"), server
    server.shutdown()
    server.server_close()


OK = json.dumps({"choices": [{"message": {"content": "<answer>3</answer>", "reasoning_content": "1+2=3"},
                              "finish_reason": "stop"}]})  # fmt: skip


def test_busy_is_tried_again_and_the_key_is_sent(endpoint):
    teacher, server = endpoint
    server.script = lambda number: 429 if number == 1 else 503 if number == 2 else OK
    [(index, [answer])] = teacher.answers([next(problem_stream(CELLS))], 1, 9, 0.5, [0])
    assert (index, answer) == (0, Answer("<think>1+2=3</think><answer>3</answer>", True))
    assert len(server.seen) == 3 and server.seen[0] == server.seen[2]
    body, key = server.seen[0]
    assert key == "Bearer secret-key" and body["temperature"] == 0.5 and body["max_tokens"] == 9


@pytest.mark.parametrize("script", [401, 302, "<html>", '{"choices": []}', '{"choices": [{"message": null}]}'])
def test_what_cannot_work_is_one_line_without_the_key(endpoint, script):
    teacher, server = endpoint
    server.script = lambda number: script
    with pytest.raises(EndpointError) as error:
        list(teacher.answers([next(problem_stream(CELLS))], 1, 9, 1.0, [0]))
    assert teacher.url in str(error.value) and "\n" not in str(error.value) and "secret" not in str(error.value)
    assert len(server.seen) == (3 if script == "<html>" else 1)


def test_all_that_arrived_before_an_endpoint_died_is_given_out(endpoint, tmp_path, monkeypatch):
    teacher, server = endpoint
    monkeypatch.setattr(teachers, "AT_ONCE", 3)
    server.script = lambda number: OK if number <= 40 else 500
    path = tmp_path / "t.jsonl"
    with pytest.raises(InputError, match=r"does not answer: 500 too busy; (\d+) traces are kept"):
        collect(path, {None: [teacher]}, CELLS, problems=200, samples=1, quiet=True)
    solved = [trace["problem"] for trace in read_traces(path)]
    asked = [problem for problem, _ in zip(problem_stream(CELLS), range(40), strict=False)]
    assert len(solved) == sum(problem.answer == 3 for problem in asked)
    server.script = lambda number: OK
    collect(path, {None: [teacher]}, CELLS, problems=200, samples=1, quiet=True)
    again = [trace["problem"] for trace in read_traces(path)]
    assert again[: len(solved)] == solved and len(set(again)) == len(again) > len(solved)


def test_no_endpoint_and_no_key_are_told(impatient, monkeypatch):
    with pytest.raises(InputError, match=r"http://127.0.0.1:9/v1/models does not answer"):
        open_teacher("http://127.0.0.1:9/v1")
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    with pytest.raises(InputError, match="TEACHER_KEY is not set"):
        open_teacher("http://127.0.0.1:9/v1", "TEACHER_KEY")


# --- selection --------------------------------------------------------------------------------------------------------


def trace(text, rate=0.5, task="a", level=1, language="en", problem=0):
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
    return {"messages": messages, "task": task, "level": level, "language": language, "pass_rate": rate,
            "problem": problem}  # fmt: skip


def texts(chosen):
    return [each["messages"][-1]["content"] for each in chosen]


def test_selection_spreads_over_tasks_levels_and_languages():
    pool = [trace(f"{n * n} plus {n}", level=1 + (n >= 90), language="ko" if n % 3 else "en") for n in range(100)]
    chosen = select(pool, 12)
    cells = [(each["level"], each["language"]) for each in chosen]
    assert [cells.count(cell) for cell in ((1, "en"), (1, "ko"), (2, "en"), (2, "ko"))] == [3, 3, 3, 3]
    assert len(select(pool, 40)) == 40  # although a cell has fewer than a quarter
    assert select(pool, 100) == select(pool, 1000) == pool


def test_selection_prefers_problems_that_are_solved_sometimes():
    pool = [trace(f"{Random(n).random()}", rate) for n, rate in enumerate([1.0, 0.5, 0.05, 1.0, 0.5, 0.95])]
    assert {each["pass_rate"] for each in select(pool, 2)} == {0.5}


def test_selection_takes_distinct_solutions_and_the_shortest_of_equals():
    pool = [trace("12 + 7 = 19"), trace("  12 + 7 = 19 "), trace("12 + 7  =  19"), trace("double eighty eight is 176")]
    assert texts(select(pool, 2)) == ["12 + 7 = 19", "double eighty eight is 176"]


def test_random_selection_differs_and_both_repeat_with_the_seed():
    pool = [trace(f"{Random(n).random()}", problem=n) for n in range(60)]
    drawn = {(how, seed): select(pool, 10, seed, how) for how in ("best", "random") for seed in (0, 1)}
    assert drawn["random", 0] != drawn["random", 1] and drawn["random", 0] != drawn["best", 0]
    assert all(select(pool, 10, seed, how) == chosen for (how, seed), chosen in drawn.items())
    with pytest.raises(InputError, match="unknown selection"):
        select(pool, 10, how="worst")
