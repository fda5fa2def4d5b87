"""Models with Engram and hyper-connections after pretraining: their table, their memory, adapters, and every verb."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import LETTERS, SMALL, SWITCHES, folder, llama, model, v3

import twelve
from twelve import lora
from twelve.cli import main
from twelve.convert.huggingface import TABLE
from twelve.model import fast_streams
from twelve.posttrain import memory, reinforcement
from twelve.posttrain.curriculum import Cell
from twelve.posttrain.on_policy import on_policy
from twelve.posttrain.reinforcement import Reinforcement
from twelve.posttrain.rl import rl
from twelve.train.loop import Interrupted


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    path = tmp_path_factory.mktemp("task") / "letters.py"
    path.write_text(LETTERS)
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    place = tmp_path_factory.mktemp("base") / "both"
    return folder(place, tokenizer, v3(tokenizer, initializer_range=0.05, **SWITCHES))


def bytes_of(place) -> bytes:
    return Path(place, TABLE).read_bytes()


def test_reinforcement_leaves_the_table_as_it_is(base, task, tmp_path, monkeypatch):
    """It could not go back to an older checkpoint's, as is asked for after a collapse. This run resumes and ends so."""
    before, step, stops = bytes_of(base), Reinforcement.train_step, []

    def interrupted(self):
        if self.step == 2 and not stops:
            stops.append(os.kill(os.getpid(), signal.SIGINT))
        return step(self)

    monkeypatch.setattr(Reinforcement, "train_step", interrupted)
    monkeypatch.setattr(reinforcement.health, "collapse", lambda rows: "it broke" if len(rows) > 4 else None)
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        rl(base, out, [task], steps=9, learning_rate=3e-3, **SMALL)
    assert not list((out / "training").glob("engram*"))
    result = rl(base, out, [task], steps=9, learning_rate=3e-3, **SMALL)
    assert result["steps"] == 5 and "it broke" in result["ended"]
    assert bytes_of(base) == before == bytes_of(out) and not list((out / "training").glob("engram*"))
    ids = torch.arange(60)[None]
    assert not torch.equal(twelve.load(out)[0](ids), twelve.load(base)[0](ids))
    rows = [json.loads(line) for line in (out / "training" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5] and max(row["difference"] for row in rows) < 1e-4


def test_on_policy_distillation_trains_a_copy(base, tokenizer, tmp_path):
    teacher = folder(tmp_path / "teacher", tokenizer, v3(tokenizer, initializer_range=0.4))
    before = bytes_of(base)
    on_policy(base, {None: [teacher]}, tmp_path / "out", [Cell("arithmetic", 1, "en")], steps=2, batch=4, group=2,
              max_tokens=12, quiet=True)  # fmt: skip
    assert bytes_of(base) == before != bytes_of(tmp_path / "out")


# --- how much memory it takes -----------------------------------------------------------------------------------------

NO_STREAMS, NO_MEMORY = {"hc_mult": 1}, {"engram_layer_ids": []}


@pytest.mark.parametrize("shape", [v3, llama])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    "switches",
    [{**NO_STREAMS, **NO_MEMORY, "model_type": None}, NO_STREAMS, NO_MEMORY, {}, {"engram_layer_ids": [0, 1]},
     {"hc_tolerance": 0.01}, {"hc_mult": 3}, {**NO_STREAMS, "engram_kernel_size": 0}],
    ids=str,
)  # fmt: skip
def test_what_a_token_keeps_for_the_backward_pass_is_estimated_from_above(
    tokenizer, shape, native, switches, monkeypatch
):
    if not native:
        monkeypatch.setattr(fast_streams, "available", lambda: False)
    values = {key: value for key, value in (SWITCHES | switches).items() if value is not None}
    config = shape(tokenizer, hidden_size=64, layers=3, **values)
    made = model(config).train()
    if made.memory is not None:
        made.memory.table.trainable = False
    own = {tensor.untyped_storage().data_ptr() for tensor in (*made.parameters(), *made.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # alive, so that no other takes its address
        return tensor

    ids = torch.arange(200).view(2, 100)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made.hidden(ids, made.positions(ids, 0))[0].square().sum()
    each = sum(storage.nbytes() for storage in kept.values()) / ids.numel()
    assert each < memory.activation_bytes(config) < 2.5 * each


def test_a_limit_holds_with_streams_and_memory(base, task, tmp_path):
    code = (
        "from twelve.posttrain.rl import rl; from twelve.posttrain import memory\n"
        "limit = memory.resident() + 2**28\n"
        f"rl({base!r}, {str(tmp_path / 'run')!r}, [{task!r}], steps=2, memory=limit, **{SMALL!r})\n"
        "print(limit, memory.peak())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    limit, peak = map(int, done.stdout.split()[-2:])
    assert peak <= limit


# --- adapters, and the verbs ------------------------------------------------------------------------------------------


def logits(network):
    with torch.no_grad():
        return network(torch.arange(120).view(2, 60))


@pytest.mark.parametrize("merged", [True, False])
def test_adapters_are_merged_into_a_folder_that_gives_the_same_logits(base, tokenizer, tmp_path, merged):
    network = lora.attach(twelve.load(base)[0], 4, merged=merged)
    assert not any("engram" in name or "_hc" in name for name in lora.adapters(network))
    plain = logits(network)
    assert torch.equal(plain, logits(twelve.load(base)[0]))
    with torch.no_grad():
        for parameter in lora.adapter_state(network).values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    lora.refresh(network)
    network.train()(torch.arange(120).view(2, 60)).square().mean().backward()
    assert network.memory.table.pending == []  # frozen, too
    adapted = logits(network.eval())
    assert (adapted - plain).abs().max() > 0.01
    twelve.save(lora.merge(network), tokenizer, tmp_path / "out")
    assert torch.equal(logits(twelve.load(tmp_path / "out")[0]), adapted)
    assert bytes_of(tmp_path / "out") == bytes_of(base)


def test_every_verb_takes_such_a_model(base, task, tmp_path, capsys):
    def run(*arguments, out=None):
        to = ["--out", str(tmp_path / out)] if out else []
        assert main([*map(str, arguments), *to, "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    talk = [{"role": "user", "content": "ship?"}, {"role": "assistant", "content": "twelve ships"}]
    (tmp_path / "talk.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 4)
    (tmp_path / "text.txt").write_text("The ship sails at dawn, and the captain counts twelve. " * 40)
    short = ["--steps", "2", "--batch", "2", "--context", "64"]
    (tmp_path / "easy.py").write_text(Path(task).read_text().replace("return min", "return 1 or min"))
    few = ["--task", tmp_path / "easy.py", "--max-tokens", "6"]

    run("quantize", base, "--bits", "4", "--text", tmp_path / "text.txt", out="packed")
    assert run("generate", tmp_path / "packed", "ship", "--max-tokens", "5")["completion_tokens"] <= 5
    run("convert", tmp_path / "packed", out="floats")
    torch.testing.assert_close(
        logits(twelve.load(tmp_path / "floats")[0]), logits(twelve.load(tmp_path / "packed")[0]), atol=1e-4, rtol=0
    )
    run("sft", base, tmp_path / "talk.jsonl", *short, out="tuned")
    run("sft", tmp_path / "packed", tmp_path / "talk.jsonl", *short, "--lora", "2", out="adapted")
    rollout = ["--steps", "2", "--prompts", "2", "--group", "2", "--problems", "4"]
    run("rl", tmp_path / "packed", *few, *rollout, "--lora", "2", out="reinforced")
    for how in ("traces", "logits", "on-policy"):
        length = ["--steps", "2", "--batch", "4"] if how == "on-policy" else ["--traces", "4", *short]
        run("distill", base, "--student", tmp_path / "tuned", "--how", how, *few, *length, out=how)
        assert twelve.load(tmp_path / how / f"1-{how}")[0].memory is not None
    for name in ("packed", "floats", "adapted", "reinforced"):
        assert bytes_of(tmp_path / name) == bytes_of(base) != bytes_of(tmp_path / "tuned")
    run("distill", base, "--layers", "1", "--how", "logits", *few, "--traces", "4", *short, out="cut")
    student = twelve.load(tmp_path / "cut" / "1-layers-1")[0]
    assert (student.config.engram_layer_ids, student.config.engram_hash_layers) == ([0], [1])
