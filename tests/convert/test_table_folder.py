"""Model folders with a conditional memory: what is saved is what is loaded, and what does not belong is refused."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors import safe_open

from twelve.config import ModelConfig, small_v3
from twelve.convert import load, load_weights, open_parts, save
from twelve.convert.huggingface import TABLE
from twelve.errors import InputError
from twelve.model import Transformer

SWITCHES = {"engram_layer_ids": [0, 1], "engram_vocab_size": 53, "engram_head_dim": 8, "engram_n_heads": 2}


def small(tokenizer, seed: int = 0, **values) -> Transformer:
    """A model with a table of random rows."""
    config = small_v3(tokenizer.vocab_size, width=64, layers=2, experts=2, context=64, **{**SWITCHES, **values})
    model = Transformer(config)
    model.memory.use_tokenizer(tokenizer)
    model.init_weights(seed)
    fill(model, seed)
    return model.eval()


def fill(model: Transformer, seed: int) -> None:
    """Through the optimiser, as any table gets its rows."""
    table, draw = model.memory.table, torch.Generator().manual_seed(seed)
    leaf = torch.zeros(table.count, table.width, requires_grad=True)
    leaf.grad = torch.randn(leaf.shape, generator=draw)
    table.begin("unused")
    table.pending.append((np.arange(table.count), leaf))
    table.update(1.0)


def logits(model: Transformer) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(60).view(2, 30) * 5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_folder_holds_the_memory(tmp_path, tokenizer, dtype):
    model = small(tokenizer, engram_dtype=dtype)
    save(model, tokenizer, tmp_path / "one")
    again, _ = load(tmp_path / "one")
    assert torch.equal(logits(again), logits(model)) and not again.memory.table.trainable
    assert (again.memory.compressed == model.memory.compressed).all() and again.memory.compressed.max() < 319
    every = np.arange(model.memory.table.count)
    assert (again.memory.table.read(every) == model.memory.table.read(every)).all()
    save(again, tokenizer, tmp_path / "two")
    assert torch.equal(logits(load(tmp_path / "two")[0]), logits(model))
    fresh = Transformer(model.config).init_weights(9).eval()
    load_weights(fresh, tmp_path / "two")
    assert torch.equal(logits(fresh), logits(model))
    parts, _, read = open_parts(tmp_path / "one")
    read("")
    assert torch.equal(logits(parts), logits(model))


def test_the_table_is_a_valid_file_that_others_can_read(tmp_path, tokenizer):
    model = small(tokenizer)
    save(model, tokenizer, tmp_path)
    with safe_open(tmp_path / TABLE, framework="np") as file:
        rows, ids = file.get_tensor("rows"), file.get_tensor("compressed_ids")
        identity = json.loads(file.metadata()["identity"])
    assert (rows == model.memory.table.read(np.arange(len(rows)))).all() and (ids == model.memory.compressed).all()
    assert identity == json.loads(json.dumps(model.memory.identity)) and identity["heads"] == 2


def test_a_copy_shares_the_file_and_saving_over_itself_does_no_harm(tmp_path, tokenizer):
    model = small(tokenizer)
    save(model, tokenizer, tmp_path / "one")
    loaded, _ = load(tmp_path / "one")
    for _ in range(2):
        save(loaded, tokenizer, tmp_path / "two")
        assert (tmp_path / "two" / TABLE).samefile(tmp_path / "one" / TABLE)
    save(loaded, tokenizer, tmp_path / "one")
    for name in ("one", "two"):
        assert torch.equal(logits(load(tmp_path / name)[0]), logits(model))
        assert not [file for file in (tmp_path / name).iterdir() if file.name.endswith(".tmp")]


def test_a_model_without_memory_leaves_no_table_behind(tmp_path, tokenizer):
    save(small(tokenizer), tokenizer, tmp_path)
    plain = Transformer(small_v3(tokenizer.vocab_size, width=64, layers=2, experts=2)).init_weights(0)
    save(plain, tokenizer, tmp_path)
    assert not (tmp_path / TABLE).exists() and load(tmp_path)[0].memory is None


def test_bad_tables_are_refused_in_one_line(tmp_path, tokenizer):
    save(small(tokenizer), tokenizer, tmp_path)
    path = tmp_path / TABLE
    whole = path.read_bytes()

    def refused(match):
        with pytest.raises(InputError, match=match) as caught:
            load(tmp_path)
        assert TABLE in str(caught.value) and "\n" not in str(caught.value)

    path.write_bytes(whole[:-100])
    refused("cut short")
    path.write_bytes(whole + b"\0")
    refused("bytes")
    path.write_bytes(whole[:5])
    refused("safetensors")
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # the last compressed id
    refused("compressed_ids")
    path.unlink()
    refused("cannot open|missing")
    path.write_bytes(whole)
    values = json.loads((tmp_path / "config.json").read_text())
    for key, value in (("engram_seed", 1), ("engram_pad_id", 5), ("engram_layer_ids", [1, 0])):
        (tmp_path / "config.json").write_text(json.dumps({**values, key: value}))
        refused("another model")
    (tmp_path / "config.json").write_text(json.dumps(values))
    load(tmp_path)


def test_a_table_of_another_size_is_refused(tmp_path, tokenizer):
    save(small(tokenizer), tokenizer, tmp_path / "one")
    save(small(tokenizer, engram_head_dim=16, engram_n_heads=1), tokenizer, tmp_path / "two")
    os.replace(tmp_path / "two" / TABLE, tmp_path / "one" / TABLE)
    with pytest.raises(InputError, match="heads"):
        load(tmp_path / "one")


def test_rows_of_another_width_or_type_are_refused(tmp_path, tokenizer):
    for name, values in (("width", {"engram_head_dim": 4}), ("type", {"engram_dtype": "bfloat16"})):
        save(small(tokenizer), tokenizer, tmp_path / "one")
        save(small(tokenizer, **values), tokenizer, tmp_path / name)
        os.replace(tmp_path / name / TABLE, tmp_path / "one" / TABLE)
        with pytest.raises(InputError, match=TABLE):
            load(tmp_path / "one")


def test_killed_between_the_renames(tmp_path, tokenizer, monkeypatch):
    """The folder then loads as the old model, or as the new one, or is refused; nothing else."""
    first, second = small(tokenizer), small(tokenizer, seed=1, engram_seed=4)
    real, outcomes = os.replace, set()
    left = 0

    def replace(old, new):
        nonlocal left
        if str(new).startswith(str(tmp_path)) and ".tmp" not in str(new):
            if not left:
                raise KeyboardInterrupt
            left -= 1
        real(old, new)

    for survived in range(8):
        save(first, tokenizer, tmp_path)
        left = survived
        monkeypatch.setattr(os, "replace", replace)
        try:
            save(second, tokenizer, tmp_path)
        except KeyboardInterrupt:
            pass
        monkeypatch.setattr(os, "replace", real)
        try:
            out = logits(load(tmp_path)[0])
        except InputError as error:
            assert "another model" in str(error)
            outcomes.add("refused")
            continue
        old, new = (torch.equal(out, logits(model)) for model in (first, second))
        assert old or new
        outcomes.add("old" if old else "new")
    assert outcomes == {"old", "refused", "new"}


def test_packed_weights_keep_their_memory(tmp_path, tokenizer):
    from twelve.calibrate import quantize_model
    from twelve.quantize import Form

    model = small(tokenizer, engram_head_dim=16)
    save(model, tokenizer, tmp_path / "float")
    before = logits(model)
    quantize_model(model, Form(8, 32), Form(8, 32), torch.arange(60).view(2, 30))
    save(model, tokenizer, tmp_path / "packed")
    again, _ = load(tmp_path / "packed")
    assert torch.equal(logits(again), logits(model)) and (logits(model) - before).std() < 0.1 * before.std()


def test_config_keys_survive(tmp_path, tokenizer):
    model = small(tokenizer)
    save(model, tokenizer, tmp_path)
    assert load(tmp_path)[0].config == ModelConfig(**model.config.to_dict()) and model.config.model_type == "twelve"
