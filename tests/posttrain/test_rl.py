"""Whole runs of reinforcement learning: they learn, resume, keep their limits, and end for a reason."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from small import LETTERS, SMALL, folder, llama, v3

import twelve
from twelve import tasks
from twelve.errors import InputError
from twelve.posttrain import health, memory, reinforcement
from twelve.posttrain import judge as judging
from twelve.posttrain.recipe_report import measure
from twelve.posttrain.reinforcement import Reinforcement
from twelve.posttrain.rl import cells_of, rl
from twelve.train import loop
from twelve.train.loop import Interrupted


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    path = tmp_path_factory.mktemp("task") / "letters.py"
    path.write_text(LETTERS)
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    return folder(tmp_path_factory.mktemp("base") / "v3", tokenizer, v3(tokenizer, initializer_range=0.05))


@pytest.fixture(scope="module")
def finished(base, task, tmp_path_factory):
    out = tmp_path_factory.mktemp("done") / "run"
    return rl(base, out, [task], steps=8, seed=1, **SMALL), out


def metrics(out):
    return [json.loads(line) for line in (out / "training" / "metrics.jsonl").read_text().splitlines()]


def test_r1_zero_from_random_weights_learns_in_20_seconds(base, task, tmp_path):
    """No cold start, no traces: reward alone moves a random model, here towards letters."""
    result = rl(base, tmp_path / "run", [task], minutes=20 / 60, learning_rate=3e-3, started=time.monotonic(),
                **SMALL | {"prompts": 8, "group": 8})  # fmt: skip
    rows = metrics(tmp_path / "run")
    assert result["accuracy_after"] > result["accuracy_before"] + 0.2 or rows[-1]["accuracy"] > 0.5
    assert max(row["difference"] for row in rows if "difference" in row) < 1e-5
    assert result["seconds"] < 30


def test_a_run_leaves_a_model_its_report_and_its_figures(finished):
    result, out = finished
    rows = metrics(out)
    assert [row["step"] for row in rows] == list(range(1, 9)) and result["steps"] == 8
    assert all(row["difference"] < 1e-5 and row["kept"] <= 1 for row in rows)
    model, tokenizer = twelve.load(out)
    assert model(torch.tensor([tokenizer.encode("abc")])).isfinite().all()
    card = (out / "README.md").read_text()
    assert "reinforcement learning (GRPO)" in card and 'language: ["en"]' in card
    page = (out / "training" / "report.html").read_text()
    assert "Held-out problems" in page and "Right answers" in page
    assert not list((out / "training").glob("*.safetensors"))
    assert result["peak_memory"] > 50 * 2**20 and 0 <= result["accuracy_before"] <= 1


@pytest.mark.parametrize("options", [
    {"updates": 2, "kl": 0.1, "off_policy": 0.5}, {"lora": 4, "kl": 0.1}, {"method": "rejection"},
    {"loss": "sequence", "normalise": "mean", "temperature": 0.8, "max_tokens": 40, "mask_overlong": True},
    {"curriculum": "curriculum", "loss": "constant"},
], ids=str)  # fmt: skip
def test_every_way_of_learning_runs(base, task, tmp_path, options):
    rl(base, tmp_path / "run", [task], steps=3, **SMALL, **options)
    rows = [row for row in metrics(tmp_path / "run") if row["kept"]]
    assert rows and all(row["difference"] < 1e-5 for row in rows)
    if "kl" in options:
        assert rows[0]["kl"] == pytest.approx(0, abs=1e-3) and rows[-1]["kl"] > 0
    before, after = load_file(f"{base}/model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    assert any((before[name] != after[name]).any() for name in before)


def test_sigkill_in_the_middle_ends_with_the_same_weights(base, task, finished, tmp_path):
    out = tmp_path / "run"
    threads = json.loads((finished[1] / "training" / "plan.json").read_text())["threads"]  # another number, other sums
    code = (
        f"import time, torch\ntorch.set_num_threads({threads})\n"
        "from twelve.posttrain import reinforcement\n"
        "from twelve.posttrain.rl import rl\n"
        "from twelve.train import loop\n"
        "loop.SAVE_EVERY, loop.SAVE_SHARE = 0.0, 10.0\n"
        "step = reinforcement.Reinforcement.train_step\n"
        "reinforcement.Reinforcement.train_step = lambda self: (time.sleep(0.2), step(self))[1]  # time to be killed\n"
        f"rl({base!r}, {str(out)!r}, [{task!r}], steps=8, seed=1, **{SMALL!r})\n"
    )
    running = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    log = out / "training" / "metrics.jsonl"
    limit = time.monotonic() + 60
    while not (out / "training" / "checkpoint.safetensors").exists() or len(log.read_text().splitlines()) < 3:
        assert running.poll() is None and time.monotonic() < limit, running.stderr.read().decode()
        time.sleep(0.02)
    os.kill(running.pid, signal.SIGKILL)
    running.communicate()
    result = rl(base, out, [task], steps=8, seed=1, **SMALL)
    assert result["steps"] == 8 and [row["step"] for row in metrics(out)] == list(range(1, 9))
    ours, theirs = (load_file(place / "model.safetensors") for place in (out, finished[1]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_ctrl_c_saves(base, task, tmp_path, monkeypatch):
    step = Reinforcement.train_step
    monkeypatch.setattr(Reinforcement, "train_step", lambda self: (os.kill(os.getpid(), signal.SIGINT), step(self))[1])
    with pytest.raises(Interrupted, match="saved at step 1; run the same command again"):
        rl(base, tmp_path / "run", [task], steps=5, **SMALL)


def test_memory_stays_below_its_limit(base, task, tmp_path):
    code = (
        "import sys, json; from twelve.posttrain.rl import rl; from twelve.posttrain import memory\n"
        f"limit = memory.resident() + 2**28\n"
        f"rl({base!r}, {str(tmp_path / 'run')!r}, [{task!r}], steps=2, memory=limit, **{SMALL!r})\n"
        "print(limit, memory.peak())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    limit, peak = map(int, done.stdout.split()[-2:])
    assert peak <= limit
    with pytest.raises(InputError, match="GiB do not hold this run"):
        rl(base, tmp_path / "small", [task], steps=2, memory=memory.resident(), **SMALL)
    assert not (tmp_path / "small" / "config.json").exists()


def test_routing_is_kept_for_every_further_update(base, task, tmp_path, monkeypatch):
    forced = []
    keep = Reinforcement._force
    monkeypatch.setattr(Reinforcement, "_force", lambda self, routing: (forced.append(routing), keep(self, routing)))
    rl(base, tmp_path / "run", [task], steps=1, updates=2, **SMALL)
    assert forced[0] is not None and forced[0][0].shape[1] == 2  # [tokens, experts a token]
    assert forced[1] is None


def test_a_collapse_ends_the_run_with_a_reason_and_the_state_before(base, task, tmp_path, monkeypatch):
    monkeypatch.setattr(reinforcement.health, "collapse", lambda rows: "it broke" if len(rows) > 4 else None)
    result = rl(base, tmp_path / "run", [task], steps=50, **SMALL)
    assert result["steps"] == 5 and "it broke; there is no state before to keep" in result["ended"]
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert health.collapse([{}]) is None


@pytest.mark.parametrize("links", [True, False])
def test_what_a_collapse_keeps_is_not_what_collapsed(base, task, tmp_path, monkeypatch, links):
    """Every step is saved, and is the best so far: that of step 4 is kept."""
    states, save = {}, Reinforcement.save

    def saving(self, log):
        states[self.step] = self.model.lm_head.weight.detach().clone()
        save(self, log)

    monkeypatch.setattr(Reinforcement, "save", saving)
    monkeypatch.setattr(loop, "SAVE_EVERY", 0)
    monkeypatch.setattr(loop, "SAVE_SHARE", 1e9)
    monkeypatch.setattr(reinforcement, "_mean", lambda values: len(list(values)))
    monkeypatch.setattr(reinforcement.health, "collapse", lambda rows: "it broke" if len(rows) > 4 else None)
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links")))
    result = rl(base, tmp_path / "run", [task], steps=50, learning_rate=3e-3, **SMALL)
    assert "kept is the best state before" in result["ended"] and sorted(states) == [1, 2, 3, 4, 5]
    kept = twelve.load(tmp_path / "run")[0].lm_head.weight
    assert torch.equal(kept, states[4]) and not torch.equal(kept, states[5])


def test_rows_that_all_fall_to_one_side_are_told(base, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "x?", "answer": 1}))
    with pytest.raises(InputError, match="rows.jsonl has no problems for (train|test), level 1, en: of few rows"):
        rl(base, tmp_path / "run", [str(path)], language=["en"], steps=1, **SMALL)


def test_a_file_to_learn_from_and_one_to_be_measured_by(base, tmp_path):
    task = []
    for split in ("train", "test"):
        path = tmp_path / f"{split}.jsonl"
        path.write_text("\n".join(json.dumps({"question": f"{split} {n}?", "answer": n}) for n in range(6)))
        task.append(f"{path}#{split}")
    result = rl(base, tmp_path / "run", task, steps=1, max_tokens=4, **SMALL)
    assert [cell["task"] for cell in result["before"]] == [task[1]]
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"- problems of the task `{task[0]}`" in card and f"- problems of the task `{task[1]}`" not in card
    for one, missing in ((task[0], "test"), (task[1], "train")):
        with pytest.raises(InputError, match=rf"nothing here is for {missing}; name a task .* FILE.jsonl#{missing}"):
            rl(base, tmp_path / "none", [one], steps=1, **SMALL)
    assert [cell.task for cell in cells_of(task[:1], None, None, ("train",))] == task[:1]
    with pytest.raises(InputError, match="train.jsonl#train and .*train.jsonl#test hold the same problems"):
        cells_of([task[0], task[0].replace("#train", "#test")], None, None)
    with pytest.raises(InputError, match="#test is for test only"):
        cells_of(task, None, None, ("train",))


LONG = '''
LANGUAGES = ("en",)

def generate(seed):
    return {"question": "Write " * (300 if seed % SHARE else 1) + f"{seed % 1000}.", "answer": "letters"}

def score(problem, text):
    return min(1, len(text) / 9)
'''


def test_problems_that_do_not_fit_are_passed_over(base, tmp_path):
    """Nearly every step draws some whose prompts are longer than the model's context."""
    path = tmp_path / "long.py"
    path.write_text(LONG.replace("SHARE", "3"))
    result = rl(base, tmp_path / "run", [str(path)], steps=3, max_tokens=4, **SMALL)
    assert result["steps"] == 3 and all(row["length"] > 0 for row in metrics(tmp_path / "run"))
    measured = measure(base, cells_of([str(path)], None, None), 8, 4)
    assert measured["tasks"][0]["asked"] == 8 and measured["length"] > 0
    path.write_text(LONG.replace("SHARE", "99999999999999999999"))
    with pytest.raises(InputError, match="level 1 in en, are too long: no prompt of 200 has fewer than 256 tokens"):
        rl(base, tmp_path / "none", [str(path)], steps=3, max_tokens=4, **SMALL)


def test_what_the_memory_does_not_hold_is_passed_over(base, tmp_path, monkeypatch):
    """The first prompts are short; keys and values are for such."""
    path = tmp_path / "long.py"
    path.write_text(LONG.replace("300", "30").replace("SHARE", "3"))
    monkeypatch.setattr(Reinforcement, "_longest_prompt", lambda self: 30)
    fit = memory.fit
    monkeypatch.setattr(reinforcement.memory, "fit", lambda limit, fixed, page, pages, *rest: fit(
        limit, fixed, page, 2, *rest))  # fmt: skip
    monkeypatch.setattr(Reinforcement, "measure", lambda self: [{"asked": 1, "score": 1, "seconds": 0.0}])
    monkeypatch.setattr(Reinforcement, "sections", lambda *_: [])
    assert rl(base, tmp_path / "run", [str(path)], steps=3, max_tokens=40, **SMALL)["steps"] == 3


def test_a_task_that_changes_ends_the_run_before_anything_is_learnt_of_it(base, tmp_path, monkeypatch):
    path = tmp_path / "letters.py"
    path.write_text(LETTERS)
    steps, score = [], reinforcement.score

    def edit(*arguments):
        score(*arguments)
        steps.append(1)
        if len(steps) == 3:
            path.write_text(LETTERS.replace("min(1, 2", "min(1, 3"))

    monkeypatch.setattr(reinforcement, "score", edit)
    monkeypatch.setattr(loop, "SAVE_EVERY", 0)
    monkeypatch.setattr(loop, "SAVE_SHARE", 1e9)
    for _ in range(2):  # in the middle, and where the run is resumed
        with pytest.raises(InputError, match="letters.py is not the file that this run began with: put that back"):
            rl(base, tmp_path / "run", [str(path)], steps=5, **SMALL)
        assert len(steps) == 3
    path.write_text(LETTERS)
    assert rl(base, tmp_path / "run", [str(path)], steps=5, **SMALL)["steps"] == 5
    assert len(steps) == 6  # the third again, and two more
    assert "task_sha256" in (tmp_path / "run" / "README.md").read_text()


def test_a_judges_prompts_count_in_the_memory(base, task, tmp_path, monkeypatch):
    """Its longest one, and what the last step has left is given back before it is answered."""
    asked = [[{"role": "user", "content": "why " * 40}], [{"role": "user", "content": "so?"}]]
    judge, events, fit, generate = judging.Judge(None, asked), [], memory.fit, judging.generate
    judge.scores = lambda questions, texts: [0.5] * len(texts)

    def apart(*arguments):
        events.append(arguments[-1])
        return replace(fit(*arguments), apart=True)

    monkeypatch.setattr(reinforcement.memory, "fit", apart)
    monkeypatch.setattr(judging, "give_back", lambda: events.append("back"))
    monkeypatch.setattr(judging, "generate", lambda *given: (events.append("answers"), generate(*given))[1])
    rl(base, tmp_path / "run", [task], steps=1, judge=judge, **SMALL)
    assert events[0] > 5 * 40 / 4 and events[1:] == ["back", "answers"]


def test_a_run_without_time_for_a_step_says_so(base, task, tmp_path):
    result = rl(base, tmp_path / "run", [task], minutes=0.001, **SMALL)
    assert result["steps"] == 0 and "no time for a step" in result["ended"] and "fewer --problems" in result["ended"]


def test_nothing_to_compare_ends_it_too(base, tmp_path, monkeypatch):
    monkeypatch.setattr(reinforcement, "IDLE", 3)
    path = tmp_path / "never.py"
    path.write_text("def generate(seed):\n    return {'question': f'{seed % 9}?', 'answer': 'impossible'}\n")
    result = rl(base, tmp_path / "run", [str(path)], language=["en"], steps=50, max_tokens=4, **SMALL)
    assert result["steps"] == 3 and "easier levels" in result["ended"]


def test_sampler_and_trainer_that_differ_are_noticed(base, task, tmp_path, monkeypatch):
    original = reinforcement.sample

    def lying(*arguments, **named):
        made = original(*arguments, **named)
        for group in made:
            for answer in group.answers:
                answer.logprobs[0] -= 0.01
        return made

    monkeypatch.setattr(reinforcement, "sample", lying)
    with pytest.raises(InputError, match=r"differ by 0\.01 at step 1"):
        rl(base, tmp_path / "run", [task], steps=2, **SMALL)


@pytest.mark.parametrize("experts", [True, False])
def test_one_answer_whose_routing_flipped_is_left_out(base, task, tokenizer, tmp_path, monkeypatch, experts):
    """Of a model with experts; without any, nothing explains a difference."""
    original = reinforcement.sample

    def flipped(*arguments, **named):
        made = original(*arguments, **named)
        for number, group in enumerate(made):
            group.answers[0].logprobs[0] -= 0.5 if number == 0 else 0.0
        return made

    monkeypatch.setattr(reinforcement, "sample", flipped)
    model = base if experts else folder(tmp_path / "llama", tokenizer, llama(tokenizer, initializer_range=0.05))
    if not experts:
        with pytest.raises(InputError, match=r"differ by 0\.5"):
            rl(model, tmp_path / "run", [task], steps=2, **SMALL)
        return
    rl(model, tmp_path / "run", [task], steps=2, **SMALL)
    rows = metrics(tmp_path / "run")
    assert all(row["flipped"] <= 1 and row["difference"] < 1e-5 for row in rows if row["kept"])
    assert any(row.get("flipped") for row in rows)


def test_how_many_may_have_flipped_is_counted_over_the_step():
    """Four updates of 50 answers: one in a hundred of 200."""
    trainer, totals = SimpleNamespace(routers=[None], step=0), Counter(answers=200)
    rows = SimpleNamespace(sampled=torch.zeros(50), answers=torch.arange(50))
    mine = torch.zeros(50).index_fill(0, torch.tensor([3]), 0.5)
    for flipped in (1, 2):
        kept = Reinforcement._same_policy(trainer, mine, rows, torch.zeros(50), totals)
        assert kept.sum() == 49 and kept[3] == 0 and totals["flipped"] == flipped
    with pytest.raises(InputError, match=r"differ by 0\.5 at step 1"):
        Reinforcement._same_policy(trainer, mine, rows, torch.zeros(50), totals)


def test_bad_input_is_one_line(base, task, tmp_path):
    with pytest.raises(InputError, match="name another folder"):
        rl(base, base, [task])
    with pytest.raises(InputError, match="nothing to compare"):
        rl(base, tmp_path / "run", [task], group=1)
    with pytest.raises(InputError, match="curriculum"):
        rl(base, tmp_path / "run", [task], curriculum="hard", steps=1, quiet=True)
    with pytest.raises(InputError, match="nothing"):
        rl(base, tmp_path / "run", ["nothing"])
    with pytest.raises(InputError):
        rl(base, tmp_path / "run", ["arithmetic"], level=[99])
    assert not (tmp_path / "run" / "config.json").exists()


def test_cells_are_all_combinations():
    cells = cells_of(["arithmetic", "word_problems"], [1, 2], None)
    assert len(cells) == 8 and {cell.language for cell in cells} == set(tasks.LANGUAGES)


def test_a_dense_llama_learns_as_well(task, tokenizer, tmp_path):
    model = folder(tmp_path / "llama", tokenizer, llama(tokenizer, initializer_range=0.05))
    rl(model, tmp_path / "run", [task], steps=2, **SMALL)
    assert all(row["difference"] < 1e-5 for row in metrics(tmp_path / "run"))
