"""Recipes: stages that are folders, time that is divided, resume after SIGKILL in each stage, bad input in one line."""

import json
import multiprocessing
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch

from twelve import cli, convert, tasks
from twelve.errors import InputError
from twelve.evaluate.accuracy import prompt_ids
from twelve.files import read_json, sha256
from twelve.posttrain import judge as judging
from twelve.posttrain import recipes, teacher, traces
from twelve.posttrain.curriculum import Cell
from twelve.posttrain.distill import distill
from twelve.posttrain.recipes import RECIPES, follow
from twelve.posttrain.reinforcement import Reinforcement
from twelve.posttrain.stages import Progress
from twelve.tasks import Problem
from twelve.train import loop
from twelve.train.plan import Plan
from twelve.train.pretrain import pretrain
from twelve.train.sft import sft

TASK = '''"""Ships: twelve are left, every day."""
LEVELS = (1, 2)
SYSTEM = "Count."


def generate(seed, level, language):
    day = seed % 100_000
    question = {"en": f"Day {day}: how many ships?", "ko": f"{day}일: 배가 몇 척?"}[language]
    return {"question": question, "answer": 12, "steps": f"{day}: " + {"en": "ships ", "ko": "배 "}[language] * level}
'''
SHORT = {"steps": 8, "problems": 4, "max_tokens": 32, "prompts": 2, "group": 4, "traces": 8, "quiet": True}


@pytest.fixture(scope="module", autouse=True)
def _fewer_worked_solutions():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "WORKED", 300)
        yield


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A task in two languages, and a model of one layer that answers it right half of the time."""
    place = tmp_path_factory.mktemp("recipes")
    (place / "ships.py").write_text(TASK)
    talk = []
    for n in range(600):
        asked, word = (f"Day {n}: how many ships?", "ships ") if n % 2 else (f"{n}일: 배가 몇 척?", "배 ")
        said = f"<think>{n}: {word * (1 + n // 2 % 2)}</think><answer>{12 + n // 4 % 2}</answer>"
        talk.append({"messages": [{"role": "system", "content": "Count."}, {"role": "user", "content": asked},
                                  {"role": "assistant", "content": said}]})  # fmt: skip
    (place / "talk.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in talk))
    pretrain([str(place / "talk.jsonl")], place / "model", steps=70, width=64, layers=1, experts=0, vocab_size=330,
             context=128, batch=8, learning_rate=1e-2, switches={"engram_vocab_size": 500}, quiet=True)  # fmt: skip
    return SimpleNamespace(path=place, model=str(place / "model"), task=[str(place / "ships.py")])


@pytest.fixture(scope="module")
def finished(room):
    out = room.path / "finished"
    return follow(room.model, out, room.task, "r1", **SHORT), out


def options_of(folder):
    return Plan.load(folder).options


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_r1_leaves_four_folders_a_report_and_a_model(finished, room):
    result, out = finished
    names = [stage.name for stage in RECIPES["r1"]]
    assert [row["name"] for row in result["stages"]] == ["0-start", *names]
    assert [row.get("steps") for row in result["stages"]] == [None, 2, 2, 2, 2]
    for name in names:
        network, tokenizer = convert.load(out / name)
        assert network(torch.tensor([tokenizer.encode("배")])).isfinite().all()
    convert.load(out)
    assert (out / "model.safetensors").samefile(out / "4-all" / "model.safetensors")  # a link: no room is taken twice
    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    assert all(name in page and name in card for name in names) and "%" in card
    for row in result["stages"]:
        measured = row["measured"]
        assert [task["asked"] for task in measured["tasks"]] == [4]
        assert 0 <= measured["language"] <= 1 and 0 <= measured["format"] <= 1 and measured["length"] > 0
    assert result["accuracy_after"] == result["stages"][-1]["measured"]["tasks"][0]["accuracy"]
    with pytest.raises(InputError, match="is complete: `twelve chat"):
        follow(room.model, out, room.task, "r1", **SHORT)


def test_each_stage_begins_where_r1s_does(finished, room):
    _, out = finished
    starts = [options_of(out / stage.name)["model"] for stage in RECIPES["r1"]]
    assert starts == [room.model, str(out / "1-cold-start"), room.model, str(out / "3-rejection")]
    second, last = options_of(out / "2-reasoning"), options_of(out / "4-all")
    assert second["format_reward"] == second["language_reward"] == 1 and second["length_penalty"] == 0
    assert last["length_penalty"] > 0 and 0.7 <= last["temperature"] <= 1
    zero = RECIPES["r1-zero"]
    assert len(zero) == 1 and zero[0].rewards == {"format_reward": 1.0}  # as much as accuracy, and nothing else


def test_what_is_taught_is_right_easy_and_in_both_languages(finished):
    _, out = finished
    for stage in ("1-cold-start", "3-rejection"):
        rows = rows_of(out / stage / "training" / "traces.jsonl")
        assert all(row["messages"][0] == {"role": "system", "content": "Count."} for row in rows)
        assert all(row["messages"][-1]["content"].endswith("<answer>12</answer>") for row in rows)
        assert {"일" in row["messages"][1]["content"] for row in rows} == {True, False}
        if stage == "1-cold-start":  # of the easier level only, one word of reasoning
            assert {len(row["messages"][-1]["content"].split()) for row in rows} == {3}
    assert len(rows) == 8 and {row["language"] for row in rows} == {"en", "ko"}
    assert {row["level"] for row in rows} == {1, 2}


def test_given_conversations_and_more_of_them_are_used(room, tmp_path):
    talk = str(room.path / "talk.jsonl")
    follow(room.model, tmp_path / "out", room.task, cold_start=talk, mix=[talk], restart=False, **SHORT)
    assert options_of(tmp_path / "out" / "1-cold-start")["paths"] == [talk]
    third = options_of(tmp_path / "out" / "3-rejection")
    assert third["paths"][1:] == [talk] and third["model"] == str(tmp_path / "out" / "2-reasoning")


def test_r1_zero_asks_a_model_without_a_template_in_plain_words(room, tmp_path):
    network, tokenizer = convert.load(room.model)
    tokenizer.chat_template = None
    convert.save(network, tokenizer, tmp_path / "base")
    said = tmp_path / "base" / "tokenizer_config.json"
    said.write_text(json.dumps({name: value for name, value in read_json(said).items() if name != "chat_template"}))
    prompt = tokenizer.decode(prompt_ids(tokenizer, Problem(room.task[0], "en", 1, "How many?", "", 12)))
    assert "inside <think> </think>" in prompt and prompt.endswith("User: How many?\nAssistant: ")
    result = follow(tmp_path / "base", tmp_path / "zero", room.task, "r1-zero", **{**SHORT, "steps": 2})
    assert [row["name"] for row in result["stages"]] == ["0-start", "1-reasoning"]
    convert.load(tmp_path / "zero")
    with pytest.raises(InputError, match="has no chat template.*--recipe r1-zero"):
        follow(tmp_path / "base", tmp_path / "one", room.task, "r1", **SHORT)


def chain(tmp_path, **options):
    stages = RECIPES["r1"]
    asked = {"minutes": None, "steps": None, **options}
    return recipes._Chain(tmp_path, stages, [Cell("a", 1, "en")], asked, {}, Progress(tmp_path / "r", {}), None, 0.0)


@pytest.mark.parametrize("steps", [4, 5, 17, 1000])
def test_steps_are_divided_without_a_rest(tmp_path, steps):
    parts = [chain(tmp_path, steps=steps)._allot(index)["steps"] for index in range(4)]
    assert sum(parts) == steps and min(parts) >= 1
    if steps == 1000:
        assert [abs(part - 1000 * share) <= 3 for part, share in zip(parts, (0.2, 0.35, 0.2, 0.25), strict=True)]


def test_minutes_are_divided_and_what_is_left_goes_on(tmp_path):
    made = chain(tmp_path, minutes=10.0)
    made.progress.stages = [{"name": "0-start", "seconds": 20.0, "measured": {"seconds": 5.0}}]
    assert made._allot(0)["minutes"] == pytest.approx(0.2 * (600 - 20 - 4 * 5) / 60, abs=1e-3)
    made.progress.stages.append({"name": "1-cold-start", "seconds": 30.0})  # it ended long before its time
    assert made._allot(1)["minutes"] == pytest.approx(0.35 / 0.8 * (600 - 50 - 3 * 5) / 60, abs=1e-3)
    made.progress.stages.append({"name": "2-reasoning", "seconds": 900.0})
    assert made._allot(2)["minutes"] == 0


@pytest.mark.parametrize(("done", "stage", "part"), [(0, "1-cold-start", 0.2), (1, "2-reasoning", 0.35 / 0.8)])
def test_more_minutes_are_for_a_stage_that_has_begun_too(tmp_path, monkeypatch, done, stage, part):
    """For one of RL; fine-tuning keeps the length that it began with, and leaves the rest to those after it."""
    given = []

    def begin(*_, minutes, **__):
        plan = Plan.load(tmp_path / stage)
        if plan is None:
            plan = Plan("rl", {"minutes": minutes}, {}, {}, 1, 1, 1, 1.0, 0, 1, "float32")
            plan.save(tmp_path / stage)
        plan.check_options("rl", {"minutes": minutes}, tmp_path / stage)
        given.append(minutes)
        raise KeyboardInterrupt

    for verb in ("rl", "sft"):
        monkeypatch.setattr(recipes, verb, begin)
    asked = dict.fromkeys(("level", "language", "max_tokens", "lora", "device"))
    asked |= {"seed": 0, "quiet": True, "model": "m", "task": ["a"], "cold_start": "talk.jsonl"}
    for minutes in (10.0, 10.0, 20.0):
        made = chain(tmp_path, minutes=minutes, **asked)
        made.progress.stages = made.progress.stages or [
            {"name": name, "seconds": 60.0, "measured": {"seconds": 0.0}} for name in ("0-start", "1-cold-start")
        ][: done + 1]
        with pytest.raises(KeyboardInterrupt):
            made.run()
    short, long = (part * (minutes - 1 - done) for minutes in (10, 20))
    assert given == pytest.approx([short, short, long if done else short], abs=1e-3)


def test_the_rejection_stage_knows_its_speed_from_the_cold_start(tmp_path):
    made = chain(tmp_path, minutes=10.0)
    (tmp_path / "1-cold-start" / "training").mkdir(parents=True)
    (tmp_path / "1-cold-start" / "training" / "metrics.jsonl").write_text('{"step": 50, "seconds": 100.0}\n')
    made.began = time.monotonic() - 30  # of sampling
    begun = {"name": "3-rejection", "minutes": 2.0}
    assert made._steps_left(begun) == pytest.approx((120 - 30) / 2, abs=1)
    made.began -= 1000
    assert made._steps_left(begun) == begun["fine_tuning_steps"] > 40  # fixed: a resume does the same
    assert made._steps_left({"name": "3-rejection", "minutes": 2.0}) == recipes.LEAST  # never none


def test_minutes_do_not_read_few_conversations_too_often(room, tmp_path):
    talk = str(room.path / "talk.jsonl")
    once = sft(room.model, [talk], tmp_path / "one", minutes=0.5, epochs=1, quiet=True)
    twice = sft(room.model, [talk], tmp_path / "two", minutes=0.5, epochs=2, quiet=True)
    assert twice["steps"] in (2 * once["steps"] - 1, 2 * once["steps"]) and twice["seconds"] < 20


# --- killed -----------------------------------------------------------------------------------------------------------

def slowly(function, seconds):
    return lambda *given: (time.sleep(seconds), function(*given))[1]


def work(room, out, options):
    """In a process that is to be killed: checkpoints after every step, and time between them."""
    loop.SAVE_EVERY, loop.SAVE_SHARE = 0.0, 1e9
    for kind in (loop.Supervised, Reinforcement):
        kind.train_step = slowly(kind.train_step, 0.1)
    traces._accepted = slowly(traces._accepted, 0.02)
    follow(room.model, out, room.task, "r1", **options)


def test_killed_in_every_stage_it_goes_on(room, tmp_path):
    out, options = tmp_path / "out", {**SHORT, "steps": 20}
    tasks._adapter.cache_clear()  # a child must not talk to the task of its parent
    moments = ["1-cold-start/training/metrics.jsonl", "2-reasoning/training/metrics.jsonl",
               "3-rejection/training/sampled.jsonl", "3-rejection/training/metrics.jsonl",
               "4-all/training/metrics.jsonl"]  # fmt: skip
    for moment in moments:
        process = multiprocessing.get_context("fork").Process(target=work, args=(room, out, options))
        process.start()
        deadline = time.monotonic() + 60
        while process.is_alive() and time.monotonic() < deadline:
            if (out / moment).exists() and (out / moment).stat().st_size:
                break
            time.sleep(0.01)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, moment
        assert not (out / "config.json").exists()  # no model before there is one
    result = follow(room.model, out, room.task, "r1", **options)
    assert [row.get("steps") for row in result["stages"]] == [None, 4, 7, 4, 5]
    for stage, steps in zip(RECIPES["r1"], (4, 7, 4, 5), strict=True):
        rows = rows_of(out / stage.name / "training" / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert sha256(out / "model.safetensors") == sha256(out / "4-all" / "model.safetensors")


def test_killed_before_it_was_measured_or_published(room, tmp_path, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipes, "publish", die)
        with pytest.raises(KeyboardInterrupt):
            follow(room.model, tmp_path / "out", room.task, "r1-zero", **{**SHORT, "steps": 1})
    state = read_json(tmp_path / "out" / "recipe.json")
    del state["stages"][1]["measured"]
    (tmp_path / "out" / "recipe.json").write_text(json.dumps(state))
    result = follow(room.model, tmp_path / "out", room.task, "r1-zero", **{**SHORT, "steps": 1})
    assert result["stages"][1]["measured"] and result["stages"][1]["steps"] == 1
    convert.load(tmp_path / "out")


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recipe": "r2"}, "unknown recipe 'r2'; there are: r1-zero, r1"),
        ({"recipe": "r1-zero", "cold_start": "talk.jsonl"}, "r1-zero has no cold start: leave out --cold-start"),
        ({"recipe": "r1-zero", "mix": ["talk.jsonl"]}, "leave out --mix"),
        ({"recipe": "r1-zero", "judge": "http://127.0.0.1:9/v1"}, "r1-zero asks no judge"),
        ({"cold_start": "texts.jsonl"}, r"texts.jsonl: row 2 has no 'messages' in which an assistant answers"),
        ({"mix": ["questions.jsonl"]}, r"questions.jsonl: row 1 has no 'messages' in which an assistant answers"),
        ({"cold_start": "absent.jsonl"}, "absent.jsonl: no such file"),
        ({"judge": "http://127.0.0.1:9/v1"}, "a judge needs both"),
        ({"judge": "http://127.0.0.1:9/v1", "judge_prompts": "prompts.jsonl"}, "127.0.0.1:9/v1/models does not answer"),
        ({"judge": "http://127.0.0.1:9/v1", "judge_prompts": "talk.jsonl"}, "talk.jsonl:1: the last message must be"),
        ({"judge": "http://127.0.0.1:9/v1", "judge_prompts": "bad.jsonl"}, "bad.jsonl:1: not a prompt"),
        ({"steps": 3}, "--steps 3: --recipe r1 has 4 stages"),
        ({"group": 1}, "a group of one answer has nothing to compare"),
        ({"loss": "tokens"}, "loss 'tokens' is not one of token, sequence, constant"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(room, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(room.path)
    monkeypatch.setattr(teacher, "RETRIES", ())
    question = {"messages": [{"role": "user", "content": "Why?"}]}
    answered = {"messages": [*question["messages"], {"role": "assistant", "content": "So."}]}
    (room.path / "texts.jsonl").write_text(json.dumps(answered) + '\n{"text": "no talk"}\n')
    (room.path / "questions.jsonl").write_text(json.dumps(question))
    (room.path / "prompts.jsonl").write_text('{"prompt": "Why?"}')
    (room.path / "bad.jsonl").write_text("[1]")
    with pytest.raises(InputError, match=words) as error:
        follow(room.model, tmp_path / "out", room.task, **{**SHORT, **options})
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_parts_of_a_recipe_without_one(capsys):
    assert cli.main(["rl", "model", "--task", "arithmetic", "--mix", "a.jsonl"]) == 2
    assert "--mix belongs to a recipe: add --recipe r1" in capsys.readouterr().err


def test_a_folder_of_another_run_is_refused(finished, room):
    _, out = finished
    with pytest.raises(InputError, match="1-cold-start holds a run without a recipe"):
        follow(room.model, out / "1-cold-start", room.task, "r1", **SHORT)


@pytest.mark.parametrize("name", ["README.md", "report.html", "chat_template.jinja"])
def test_files_of_others_stay(room, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"holds a {name} that is no"):
        follow(room.model, tmp_path, room.task, "r1-zero", **SHORT)
    with pytest.raises(InputError, match=f"holds a {name} that is no"):
        distill([room.model], tmp_path, task=room.task, layers=[1], steps=1, quiet=True)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_other_options_are_refused_but_more_minutes_are_not(tmp_path):
    Progress(tmp_path / "recipe.json", {"seed": 0, "minutes": 1.0}).save()
    Progress(tmp_path / "recipe.json", {"seed": 0, "minutes": 2.0}, free=("minutes",))
    with pytest.raises(InputError, match="seed=0, not 1"):
        Progress(tmp_path / "recipe.json", {"seed": 1, "minutes": 1.0})


def test_where_nothing_passes_what_was_trained_stays(room, tmp_path):
    hard = tmp_path / "hard.py"
    hard.write_text(TASK + "\n\ndef score(problem, text):\n    return float(text.startswith('####'))\n")
    again = "no answer of .*2-reasoning passed the checker, a pass rate of 0%.*what was trained is kept"
    for _ in range(2):
        with pytest.raises(InputError, match=again):
            follow(room.model, tmp_path / "out", [str(hard)], **{**SHORT, "steps": 4})
    convert.load(tmp_path / "out" / "2-reasoning")
    bare = tmp_path / "bare.py"
    bare.write_text("def generate(seed):\n    return {'question': f'{seed}?', 'answer': seed}\n")
    with pytest.raises(InputError, match="bare.py has no worked solutions to begin with: give some with --cold-start"):
        follow(room.model, tmp_path / "bare", [str(bare)], **{**SHORT, "steps": 4})


def test_another_fault_is_not_taken_for_wrong_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "open_teacher", lambda *_, **__: None)
    made = chain(tmp_path, traces=8, max_tokens=8, seed=0, device=None, quiet=True)
    for fault, told in ((InputError("the disk is full"), "^the disk is full$"),
                        (traces.NothingPassed("nothing"), "no answer of m passed the checker")):  # fmt: skip
        monkeypatch.setattr(recipes, "collect", lambda *_, fault=fault, **__: (_ for _ in ()).throw(fault))
        with pytest.raises(InputError, match=told):
            made._rejected("m", tmp_path / "3-rejection", {})


def test_a_recipe_is_not_resumed_with_another_scorer(room, tmp_path, monkeypatch):
    task = tmp_path / "ships.py"
    task.write_text(TASK)
    options = {**SHORT, "steps": 1, "recipe": "r1-zero"}
    with monkeypatch.context() as patch:
        patch.setattr(recipes, "rl", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            follow(room.model, tmp_path / "out", [str(task)], **options)
    task.write_text(TASK + "\n\ndef score(problem, text):\n    return 1\n")
    with pytest.raises(InputError, match="ships.py is not the file that this run began with"):
        follow(room.model, tmp_path / "out", [str(task)], **options)


# --- a judge ----------------------------------------------------------------------------------------------------------


class Scripted(BaseHTTPRequestHandler):
    """Replies with what `server.script` makes of the number of the request: a score, or a status that is no success."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append(body["messages"][0]["content"])
            said = self.server.script(len(self.server.seen))
        self.send_response(said if isinstance(said, int) else 200)
        self.end_headers()
        reply = {"choices": [{"message": {"content": said}, "finish_reason": "stop"}]}
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setattr(teacher, "RETRIES", ())
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    server.seen, server.lock, server.script = [], threading.Lock(), lambda number: "7"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("reply", "value"),
    [("7", 0.7), (" 10\n", 1.0), ("0", 0.0), ("<think>8 or 9</think>3", 0.3), ("11", None), ("-1", None),
     ("7/10", None), ("Score: 7", None), ("7.5", None), ("", None), ("７", None)],
)  # fmt: skip
def test_only_a_whole_number_from_0_to_10_is_a_score(endpoint, reply, value):
    judge = judging.Judge(teacher.Endpoint(endpoint.url, "m"), [])
    endpoint.script = lambda number: reply
    texts = ["<think>why not</think><answer>yes</answer>", "<think>only this</think>"]
    if value is None:
        with pytest.raises(InputError, match="does not judge"):
            judge.scores(["user: Why?"] * 2, texts)
    else:
        assert judge.scores(["user: Why?"] * 2, texts) == [value, 0.0]  # who says nothing is not even judged
    assert len(endpoint.seen) == 1 and "yes" in endpoint.seen[0] and "why not" not in endpoint.seen[0]


def test_few_strange_replies_count_nothing(endpoint):
    endpoint.script = lambda number: "well..." if number == 1 else "5"
    scores = judging.Judge(teacher.Endpoint(endpoint.url, "m"), []).scores(["Why?"] * 4, ["So."] * 4)
    assert sorted(scores) == [0.0, 0.5, 0.5, 0.5]


def test_a_judge_comes_last_and_what_was_learnt_survives_it(endpoint, room, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Day 5: how many ships?"}\n{"prompt": "7일: 배가 몇 척?"}\n')
    out = tmp_path / "out"
    asked = {**SHORT, "steps": 12, "judge": endpoint.url, "judge_model": "m", "judge_prompts": str(prompts)}
    endpoint.script = lambda number: str(number % 11) if number <= 6 else 500
    with pytest.raises(InputError, match=r"does not answer: 500.*; step \d is saved: run the same command again"):
        follow(room.model, out, room.task, **asked)
    convert.load(out / "4-all")
    assert (out / "5-judge" / "training" / "checkpoint.safetensors").exists()
    assert endpoint.seen[0].count("What is 2 + 2?") == 1 and len(endpoint.seen) >= 6  # asked before training, once
    endpoint.script = lambda number: str(number % 11)
    result = follow(room.model, out, room.task, **asked)
    assert [row["name"] for row in result["stages"]][-2:] == ["4-all", "5-judge"]
    assert options_of(out / "5-judge")["judge"] == endpoint.url and "judge" not in options_of(out / "4-all")
    convert.load(out)
