"""Planned memory against what autograd keeps, and against the most that a real training held."""

import json
import subprocess
import sys

import pytest
import torch

from twelve.config import ModelConfig, small_v3, with_memory
from twelve.data.corpus import tokenize
from twelve.data.shards import PackedData
from twelve.model import Transformer
from twelve.plan import cost, memory

SHAPES = {
    "dense": small_v3(500, 64, 2, 0, 2, 128), "experts": small_v3(500, 128, 3, 8, 2, 128),
    "mtp": small_v3(500, 64, 2, 4, 3, 128, mtp=1), "streams": small_v3(500, 64, 2, 8, 2, 128, hc_mult=4),
    "engram": small_v3(500, 128, 3, 8, 2, 128, engram_vocab_size=97),
    "llama": ModelConfig(model_type="llama", vocab_size=500, hidden_size=96, intermediate_size=200,
                         num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_kept_is_what_autograd_saves(name):
    config, rows, length = SHAPES[name], 4, 128
    model = Transformer(config).init_weights(0).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
        return tensor

    ids = torch.randint(0, config.vocab_size, (rows, length))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.losses(ids, ids.roll(-1, 1))
    heads = (1 + config.num_nextn_predict_layers) * config.vocab_size * config.hidden_size  # the loss's own gradients
    found = sum(size for size, _ in saved.values()) / 4 - heads
    assert memory.kept(config) * rows * length == pytest.approx(found, rel=0.08)


def test_parts_are_the_models():
    config = SHAPES["engram"]
    parts = memory.training(config, 4, 128, data_tokens=1000)
    counts = cost.parameters(config)
    assert parts["weights"] == 4 * (counts.total - counts.table) and parts["table"] == 4 * counts.table
    assert parts["data"] == 2000 and "streams" not in parts
    assert memory.training(config, 8, 128)["activations"] == pytest.approx(2 * parts["activations"], rel=1e-6)
    plain = memory.training(config, 4, 128, muon=False)
    assert plain["optimiser"] == 2 * plain["weights"] > parts["optimiser"] and "orthogonalising" not in plain


def test_phases_of_reinforcement_learning():
    config = SHAPES["experts"]
    phases = memory.reinforcement(config, answers=128, length=200)
    assert phases["sampling"]["keys and values"] == 128 * 256 * cost.kv_bytes(config)  # whole pages of 64 tokens
    assert phases["update"]["gradients"] == phases["update"]["weights"] > 0
    assert "keys and values" not in phases["update"] and "gradients" not in phases["sampling"]
    adapters = memory.reinforcement(config, 128, 200, trained=1000)["update"]
    assert adapters["optimiser"] == 8000 and adapters["gradients"] == 4000


RUN = """
import json, sys, torch
torch.set_num_threads(1)
from twelve.posttrain.memory import peak
from twelve.train.pretrain import pretrain
pretrain([sys.argv[1]], sys.argv[2], steps=2, quiet=True, **json.loads(sys.argv[3]))
print("peak", peak())
"""


def test_a_training_holds_what_was_planned(tmp_path):
    rows = [f"{n} apples and {n * 7 % 97} pears." for n in range(3000)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    tokenize([tmp_path / "text.jsonl"], tmp_path / "tokens", vocab_size=300, progress=False)
    shape = {"width": 128, "layers": 3, "experts": 8, "experts_per_token": 2, "context": 256}
    data_tokens = PackedData(tmp_path / "tokens").tokens
    config = small_v3(300, **shape, **with_memory(text=data_tokens))
    given = (str(tmp_path / "tokens"), str(tmp_path / "run"), json.dumps(shape | {"batch": 12}))
    command = [sys.executable, "-c", RUN, *given]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    held = int(ended.stdout.split("peak ")[1])
    planned = sum(memory.training(config, 12, 256, data_tokens=data_tokens).values())
    assert 0.8 < held / planned < 1.25
