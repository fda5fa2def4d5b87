"""Whole runs: resume bit for bit, however a run ended; plans that hold; folders that are whole."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

import twelve
from twelve.data.shards import PackedData
from twelve.errors import InputError
from twelve.files import FolderLock, sha256
from twelve.train.loop import NO_END, Interrupted, Supervised
from twelve.train.plan import Plan
from twelve.train.pretrain import pretrain
from twelve.train.sft import sft

SMALL = {"width": 64, "layers": 2, "experts": 4, "experts_per_token": 2, "vocab_size": 300, "context": 32, "batch": 4,
         "switches": {"engram_vocab_size": 0}, "quiet": True}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rows = [f"{n} apples and {n * 3 % 17} pears. 사과 {n}개와 배 {n * 3 % 17}개." for n in range(400)]
    (folder / "fruit.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """A whole run, its result and its folder."""
    folder = tmp_path_factory.mktemp("run") / "model"
    return pretrain([text], folder, steps=25, mtp=1, **SMALL), folder


def test_a_run_learns_and_leaves_a_model_folder(finished):
    result, folder = finished
    rows = [json.loads(line) for line in (folder / "training" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == result["steps"] == 25
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"] and result["tokens"] == 25 * 4 * 32
    model, tokenizer = twelve.load(folder)
    assert model(torch.tensor([tokenizer.encode("사과 3개")])).isfinite().all()
    assert model.config.num_nextn_predict_layers == 1
    assert "3,200" in (folder / "README.md").read_text()
    assert (folder / "training" / "report.html").exists()
    assert not (folder / "training" / "checkpoint.safetensors").exists()  # nothing is left to resume


def test_ctrl_c_saves_and_a_resume_ends_with_the_same_weights(text, tmp_path, finished, monkeypatch):
    original = Supervised.train_step

    def interrupted(self):
        if self.step in (7, 16) and self.seconds_at_stop != self.step:
            self.seconds_at_stop = self.step
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    monkeypatch.setattr(Supervised, "train_step", interrupted)
    monkeypatch.setattr(Supervised, "seconds_at_stop", None, raising=False)
    stops = []
    for _ in range(3):
        try:
            pretrain([text], tmp_path / "run", steps=25, mtp=1, **SMALL)
        except Interrupted as stop:
            stops.append(str(stop))
            monkeypatch.setattr(Supervised, "seconds_at_stop", 7 if len(stops) == 1 else 16, raising=False)
    assert [f"saved at step {step}" in stop for step, stop in zip((8, 17), stops, strict=True)] == [True, True]
    assert sha256(tmp_path / "run" / "model.safetensors") == sha256(finished[1] / "model.safetensors")
    metrics = tmp_path / "run" / "training" / "metrics.jsonl"
    rows = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert rows == list(range(1, 26))


def test_a_killed_run_resumes_to_the_same_weights(text, tmp_path, finished):
    """SIGKILL at random moments, checkpoints after every step."""
    script = (
        "import sys, torch; torch.set_num_threads(int(sys.argv[3]))\n"
        "import time; from twelve.train import loop; loop.SAVE_EVERY = 0.0; loop.SAVE_SHARE = 1e9\n"
        "step = loop.Supervised.train_step\n"
        "loop.Supervised.train_step = lambda self: (time.sleep(0.05), step(self))[1]  # time to be killed in\n"
        "from twelve.train.pretrain import pretrain\n"
        f"pretrain([sys.argv[1]], sys.argv[2], steps=25, mtp=1, **{SMALL!r})\n"
    )
    arguments = [sys.executable, "-c", script, str(text), str(tmp_path / "run"), str(torch.get_num_threads())]
    draw, kills = random.Random(0), 0
    metrics = tmp_path / "run" / "training" / "metrics.jsonl"
    for _ in range(12):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        if kills < 3:  # once it trains, at a moment of its own
            seen = metrics.stat().st_size if metrics.exists() else -1
            while process.poll() is None and time.monotonic() < deadline:
                if metrics.exists() and metrics.stat().st_size > seen:
                    break
                time.sleep(0.02)
            time.sleep(draw.uniform(0, 0.2))
            if process.poll() is None:
                process.kill()
                kills += 1
        _, errors = process.communicate()
        plan = Plan.load(tmp_path / "run")
        if plan is not None and plan.complete:  # even if the kill met the process on its way out
            break
        assert process.returncode == -signal.SIGKILL, errors.decode()
    assert plan.complete and kills >= 2
    assert sha256(tmp_path / "run" / "model.safetensors") == sha256(finished[1] / "model.safetensors")


def interrupt_at(monkeypatch, step):
    original, done = Supervised.train_step, []

    def interrupted(self):
        if self.step == step and not done and self.plan.steps(0) < NO_END:  # no trial
            done.append(os.kill(os.getpid(), signal.SIGINT))
        return original(self)

    monkeypatch.setattr(Supervised, "train_step", interrupted)


def test_a_run_goes_on_with_its_own_tokens_whatever_became_of_the_text(text, tmp_path, finished, monkeypatch):
    shutil.copytree(text, tmp_path / "text")
    interrupt_at(monkeypatch, 7)
    with pytest.raises(Interrupted):
        pretrain([tmp_path / "text"], tmp_path / "run", steps=25, mtp=1, **SMALL)
    (tmp_path / "text" / "more.txt").write_text("One more note.\n" * 99)
    pretrain([tmp_path / "text"], tmp_path / "run", steps=25, mtp=1, **SMALL)
    assert sha256(tmp_path / "run" / "model.safetensors") == sha256(finished[1] / "model.safetensors")


def test_a_resumed_run_has_the_rest_of_its_minutes(text, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 3)
    with pytest.raises(Interrupted):
        pretrain([text], tmp_path / "run", minutes=0.15, **SMALL)
    assert Plan.load(tmp_path / "run").revisions[-1][0] == 0
    slow = Supervised.train_step
    monkeypatch.setattr(Supervised, "train_step", lambda self: time.sleep(0.05) or slow(self))
    began = time.monotonic()
    pretrain([text], tmp_path / "run", minutes=0.15, **SMALL)
    revised = Plan.load(tmp_path / "run").revisions
    assert len(revised) > 1 and revised[-1][1] < revised[0][1] and time.monotonic() - began < 60


def test_other_options_changed_data_and_finished_runs_are_refused(text, finished):
    _, folder = finished
    with pytest.raises(InputError, match="seed=0, not 1"):
        pretrain([text], folder, steps=25, mtp=1, seed=1, **SMALL)
    with pytest.raises(InputError, match="complete"):
        pretrain([text], folder, steps=25, mtp=1, **SMALL)
    with pytest.raises(InputError, match="pretrain run, not sft"):
        Plan.load(folder).check_options("sft", {}, folder)


def test_a_second_process_on_the_folder_is_refused(text, tmp_path):
    with FolderLock(tmp_path / "run"), pytest.raises(InputError, match="in use by process"):
        pretrain([text], tmp_path / "run", steps=2, **SMALL)


def test_an_existing_model_is_not_overwritten(text, tmp_path, finished):
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(InputError, match="holds a model already"):
        pretrain([text], folder, steps=2, **SMALL)


def test_too_little_time_is_said_and_nothing_is_left(text, tmp_path):
    with pytest.raises(InputError, match="ask for more minutes"):
        pretrain([text], tmp_path / "run", minutes=0.01, **SMALL)
    assert not (tmp_path / "run" / "config.json").exists()
    assert not (tmp_path / "run" / "training" / "plan.json").exists()


def test_a_timed_run_records_how_its_length_was_corrected(text, tmp_path):
    result = pretrain([text], tmp_path / "run", minutes=0.2, **SMALL)
    plan = Plan.load(tmp_path / "run")
    assert plan.complete and plan.steps(result["steps"] - 1) == result["steps"]
    assert [at for at, _ in plan.revisions] == sorted(at for at, _ in plan.revisions)
    assert len(plan.revisions) > 2


def test_a_run_that_diverges_stops_before_its_weights_are_spoilt(text, tmp_path, monkeypatch):
    original = Supervised.train_step

    def poisoned(self):
        if self.step == 3:
            self.model.losses = lambda *args, losses=self.model.losses, **keys: _scaled(losses(*args, **keys))
        return original(self)

    def _scaled(losses):
        losses.total = losses.total * float("nan")
        return losses

    monkeypatch.setattr("twelve.train.loop.SAVE_EVERY", 0.0)
    monkeypatch.setattr("twelve.train.loop.SAVE_SHARE", 1e9)
    monkeypatch.setattr(Supervised, "train_step", poisoned)
    with pytest.raises(InputError, match="diverged.*at step 4.*lower --learning-rate"):
        pretrain([text], tmp_path / "run", steps=6, **SMALL)
    kept = load_file(tmp_path / "run" / "training" / "checkpoint.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())


def test_revisions_hold_from_their_step_on():
    plan = Plan(
        stage="pretrain", options={}, config={}, data={}, context=8, batch_size=1, micro_batch_size=1,
        learning_rate=1.0, seed=0, threads=1, precision="float32", decay_share=0.2, revisions=[(0, 100), (50, 80)],
    )  # fmt: skip
    assert plan.steps(49) == 100 and plan.steps(50) == 80
    assert not plan.in_decay(63) and plan.in_decay(64)


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    rows = []
    for n in range(60):
        messages = [{"role": "user", "content": f"{n} + 1 = ?"}, {"role": "assistant", "content": f"{n + 1}"}]
        rows.append(json.dumps({"messages": messages}) + "\n")
    path.write_text("".join(rows))
    return path


def test_fine_tuning_continues_a_model(finished, conversations, tmp_path):
    result = sft(finished[1], [conversations], tmp_path / "tuned", steps=12, batch=4, context=48, quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "tuned" / "training" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"] and result["steps"] == 12
    before, after = twelve.load(finished[1])[0], twelve.load(tmp_path / "tuned")[0]
    assert before.config == after.config
    assert not torch.equal(before.norm.weight, after.norm.weight)


def test_without_a_word_of_the_assistant_nothing_is_trained(finished, conversations, tmp_path):
    with pytest.raises(InputError, match="no word of an assistant lies within the first 4 tokens"):
        sft(finished[1], [conversations], tmp_path / "out", steps=1, context=4, quiet=True)


def test_conversations_that_are_cut_are_told(finished, conversations, tmp_path, capsys):
    long = tmp_path / "long.jsonl"
    answer = {"role": "assistant", "content": "!"}
    rows = [[{"role": "user", "content": "?" * size}, answer] for size in (1, 40, 99)]
    long.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    sft(finished[1], [long], tmp_path / "out", steps=1, context=64)
    told = "2 of 3 conversations are cut after 32 tokens, 2 of them with nothing left that an assistant says"
    assert told in capsys.readouterr().out and told in (tmp_path / "out" / "README.md").read_text()


def test_three_passes_are_three(finished, conversations, tmp_path):
    result = sft(finished[1], [conversations], tmp_path / "out", batch=40, context=32, quiet=True)
    windows = PackedData(tmp_path / "out" / "training" / "data").windows(32)
    assert result["steps"] == round(3 * windows / 40)


def test_text_is_no_conversation(text, finished, tmp_path):
    with pytest.raises(InputError, match="no conversations, only text"):
        sft(finished[1], [text], tmp_path / "out", steps=1, quiet=True)


def test_adapters_leave_the_routers_alone(finished, conversations, tmp_path):
    sft(finished[1], [conversations], tmp_path / "out", steps=3, batch=4, context=48, lora=2, quiet=True)
    before, after = (twelve.load(path)[0].state_dict() for path in (finished[1], tmp_path / "out"))
    biases = [name for name in before if name.endswith("e_score_correction_bias")]
    assert biases and all(torch.equal(before[name], after[name]) for name in biases)


def test_fine_tuning_over_its_own_model_is_refused(finished, conversations):
    with pytest.raises(InputError, match="model to start from"):
        sft(finished[1], [conversations], finished[1], steps=1)


def test_training_off_the_main_thread_works(text, tmp_path):
    results = []
    worker = threading.Thread(target=lambda: results.append(pretrain([text], tmp_path / "run", steps=3, **SMALL)))
    worker.start()
    worker.join()
    assert results[0]["steps"] == 3


def test_what_a_step_draws_follows_from_seed_step_and_rows(finished, tmp_path):
    from twelve.config import ModelConfig
    from twelve.model import Transformer

    plan = Plan.load(finished[1])
    assert plan.drawn == 0  # of 300 entries all are in the loss
    plan.drawn = 40
    trainer = Supervised(Transformer(ModelConfig(**plan.config)).init_weights(0), lambda step: None, plan, tmp_path)
    hidden, targets = torch.randn(20, 64), torch.arange(20)

    def loss(step: int, first: int, seed: int = 0) -> float:
        trainer.step, plan.seed = step, seed
        return trainer.main_loss(None, slice(first, first + 2))(hidden, trainer.model.head_weight, targets).item()

    assert loss(3, 2) == loss(3, 2)
    assert len({loss(3, 2), loss(4, 2), loss(3, 0), loss(3, 2, seed=1)}) == 4


def test_micro_batches_add_up_to_the_batch(text, tmp_path, finished):
    from twelve.config import ModelConfig
    from twelve.data.shards import PackedData
    from twelve.model import Transformer

    data, plan = PackedData(finished[1] / "training" / "data"), Plan.load(finished[1])
    plan.balance_weight, plan.mtp_weight = 0.0, (0.0, 0.0)  # means over other things than the batch's targets
    gradients = []
    for plan.micro_batch_size in (4, 2, 3):
        model = Transformer(ModelConfig(**plan.config)).init_weights(0).double()
        trainer = Supervised(model, lambda step: data.batch(step, 4, 32, 0), plan, tmp_path)
        weight = model.layers[0].self_attn.o_proj.weight
        trainer.optimizer.step = lambda rate, table_lr, weight=weight: gradients.append(weight.grad)
        trainer.train_step()
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(gradients[2], gradients[0], atol=1e-7, rtol=1e-5)
