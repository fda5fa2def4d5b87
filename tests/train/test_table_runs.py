"""Runs of models with a memory: the table is trained in the run's folder, and nowhere else."""

import json

import numpy as np
import pytest
import torch

from twelve.cli import main
from twelve.config import small_v3
from twelve.convert import load, load_tokenizer, save
from twelve.convert.huggingface import TABLE
from twelve.errors import InputError
from twelve.model import Transformer
from twelve.model.compression import compress
from twelve.train.optimizer import matrix_shapes
from twelve.train.pretrain import pretrain
from twelve.train.sft import sft

WORDS = "배 열두 척이 새벽에 떠나고 장군은 바다를 본다. The ship sails at dawn, and the captain counts twelve. "
SMALL = {"width": 64, "layers": 3, "experts": 0, "context": 32, "batch": 2, "vocab_size": 300, "quiet": True}
SWITCHES = {"engram_vocab_size": 97, "engram_layer_ids": [1], "engram_n_heads": 2, "engram_head_dim": 8}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(WORDS * 40, encoding="utf-8")
    return [str(path)]


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "base"
    pretrain(text, folder, steps=6, switches=SWITCHES, **SMALL)
    return folder


def rows(folder):
    table = load(folder)[0].memory.table
    return table.read(np.arange(table.count))


def test_pretraining_fills_a_table_and_leaves_only_that(trained):
    model, words = load(trained)
    changed = rows(trained).any(axis=1).mean()
    assert 0.05 < changed < 1  # only what was looked up
    assert model.config.model_type == "twelve" and model.config.engram_layer_ids == [1]
    assert (model.memory.compressed == compress(words)).all() and model.memory.compressed.max() + 1 < words.vocab_size
    assert sorted(file.name for file in trained.rglob("engram*")) == [TABLE]


def test_the_same_run_gives_the_same_bytes(text, trained, tmp_path):
    pretrain(text, tmp_path / "again", steps=6, switches=SWITCHES, **SMALL)
    for name in (TABLE, "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (trained / name).read_bytes()


def test_an_interrupted_run_goes_on_with_its_table(text, trained, tmp_path, monkeypatch):
    from twelve.train import loop

    folder, real, steps = tmp_path / "run", loop.Supervised.train_step, []

    def killed(self):
        if len(steps) == 4:
            raise RuntimeError("killed")
        steps.append(self.step)
        return real(self)

    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(loop, "SAVE_SHARE", 1e9)
    monkeypatch.setattr(loop.Supervised, "train_step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        pretrain(text, folder, steps=6, switches=SWITCHES, **SMALL)
    monkeypatch.setattr(loop.Supervised, "train_step", real)
    pretrain(text, folder, steps=6, switches=SWITCHES, **SMALL)
    assert (folder / TABLE).read_bytes() == (trained / TABLE).read_bytes()
    with pytest.raises(InputError, match="switches="):
        pretrain(text, folder, steps=6, switches={**SWITCHES, "engram_seed": 1}, **SMALL)


def test_trial_steps_that_lead_to_no_plan_leave_no_trace(trained, text, tmp_path):
    with pytest.raises(InputError, match="ask for more minutes"):
        pretrain(text, tmp_path / "run", minutes=0.01, switches=SWITCHES, **SMALL)
    pretrain(text, tmp_path / "run", steps=6, switches=SWITCHES, **SMALL)
    assert (tmp_path / "run" / TABLE).read_bytes() == (trained / TABLE).read_bytes()


@pytest.mark.parametrize("lora", [None, 4])
def test_fine_tuning_changes_a_copy_unless_only_adapters_are_trained(trained, tmp_path, lora):
    before, chats = (trained / TABLE).read_bytes(), tmp_path / "chats.jsonl"
    talk = [{"role": "user", "content": "ship?"}, {"role": "assistant", "content": "twelve ships sail"}]
    chats.write_text(json.dumps({"messages": talk}) + "\n", encoding="utf-8")
    sft(trained, [str(chats)], tmp_path / "tuned", steps=2, context=32, batch=2, lora=lora, quiet=True)
    assert (trained / TABLE).read_bytes() == before
    assert np.array_equal(rows(tmp_path / "tuned"), rows(trained)) == bool(lora)
    assert not list((tmp_path / "tuned" / "training").glob("engram*"))


def test_the_command_line_sets_the_switches_and_prints_what_they_take(text, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["pretrain", *text, "--out", str(out), "--steps", "1", "--width", "64", "--layers", "4"]
    arguments += ["--experts", "0", "--context", "32", "--batch", "2", "--vocab-size", "300", "--hc-mult", "2"]
    assert main([*arguments, "--engram-vocab-size", "53", "--engram-layers", "0,2", "--engram-dtype", "int8"]) == 0
    printed = capsys.readouterr().out
    assert "rows of 32 int8" in printed and "reads 16 rows" in printed and "distinct 3-grams" in printed
    config = load(out)[0].config
    assert (config.engram_layer_ids, config.engram_vocab_size, config.hc_mult) == ([0, 2], 53, 2)
    arguments[3] = str(tmp_path / "other")
    assert main([*arguments, "--engram-layers", "9"]) == 2
    assert "no layer 9" in capsys.readouterr().err


def test_muon_takes_the_keys_of_streams_apart():
    model = Transformer(small_v3(300, width=64, layers=2, experts=0, hc_mult=3, **SWITCHES))
    shapes = matrix_shapes(model)
    assert shapes["layers.1.engram.key_proj.weight"] == (3, 64, 32)
    assert shapes["layers.1.engram.value_proj.weight"] == (64, 32)


def test_a_saved_copy_still_answers_alike(trained, tmp_path):
    model, words = load(trained)
    save(model, words, tmp_path / "copy")
    ids = torch.tensor([load_tokenizer(trained).encode(WORDS)])
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "copy")[0](ids), model(ids))
