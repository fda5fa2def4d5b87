"""Models with a memory made larger and smaller: their Engrams find the same rows wherever they stand, and the table of
the model that was given stays as it is."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import assert_same, everything, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st

import twelve
from twelve import cli
from twelve.config import ModelConfig, small_v3
from twelve.convert import width
from twelve.convert.huggingface import TABLE
from twelve.convert.resize import _engram_places, resize, with_layers
from twelve.data.windows import calibration
from twelve.errors import InputError
from twelve.model import Transformer
from twelve.model.attention import Positions
from twelve.train.pretrain import pretrain

IDS = random_ids(vocab_size=503)
SWITCHES = {"engram_layer_ids": [0, 2], "engram_vocab_size": 97, "engram_head_dim": 6, "engram_n_heads": 2}
NOWHERE = Positions(None, None, None)


def model_of(layers: int = 4, experts: int = 8, mtp: int = 1, **changes) -> Transformer:
    """In float64, with weights, norms and rows so large that a wrong formula shows, as does the norms' epsilon."""
    switches = SWITCHES | {key: changes.pop(key) for key in list(changes) if key.startswith(("engram_", "hc_"))}
    config = replace(small_v3(503, 64, layers, experts, 2, 64, mtp, **switches), **{"rms_norm_eps": 1e-3} | changes)
    model, draw = Transformer(config).init_weights(0).double(), torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=draw, dtype=torch.float64)
        if "hc_" not in name:
            tensor.copy_(0.15 * noise if tensor.dim() > 1 else 1 + 0.3 * noise)
    table = model.memory.table
    leaf = torch.zeros(table.count, table.width, requires_grad=True)
    leaf.grad = torch.randn(leaf.shape, generator=draw)
    table.pending.append((np.arange(table.count), leaf))
    table.update(1.0)
    return model.eval()


# --- larger -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"engram_kernel_size": 0}, {"rms_norm_eps": 0.1}], ids=str)
@pytest.mark.parametrize(
    "size",
    [{"layers": 7}, {"width": 128}, {"width": 100}, {"width": 72}, {"experts": 12},
     {"layers": 5, "width": 150, "experts": 12}],
    ids=str,
)  # fmt: skip
def test_a_larger_model_computes_the_same(size, changes):
    model = model_of(**changes)
    larger = resize(model, **size)
    assert_same(larger, model)
    assert larger.memory.table is model.memory.table and larger.memory.identity == model.memory.identity


def test_a_tied_head_goes_along():
    model = model_of(tie_word_embeddings=True, mtp=0)
    assert_same(resize(model, width=100), model)


def test_every_part_of_a_wider_engram_learns():
    """Copies something of their own, and so, a few steps later, what began as zero."""
    model = resize(model_of(mtp=0), width=150).train()
    before = {name: parameter.clone() for name, parameter in model.layers[2].engram.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.losses(IDS, IDS).total.backward()
        optimizer.step()
    for name, parameter in model.layers[2].engram.named_parameters():
        change = (parameter - before[name]).T if name == "conv" else parameter - before[name]
        assert change[-1].ne(0).all() and (change[:64] - change[64:128]).abs().max() > 1e-6, name


# --- fewer layers -----------------------------------------------------------------------------------------------------


def test_a_moved_engram_does_what_it_did():
    model = model_of(mtp=0)
    smaller = with_layers(model, [1, 3])
    assert (smaller.config.engram_layer_ids, smaller.config.engram_hash_layers) == ([0, 1], [0, 2])
    at = model.positions(IDS)
    with torch.no_grad():
        found, x = model.memory.look_up(IDS, at), model.embed_tokens(IDS)
        for layer, engram in ((1, 0), (3, 2)):
            x = x + model.layers[engram].engram(x, found[engram], at)
            x, _ = model.layers[layer](x, at)
        torch.testing.assert_close(smaller(IDS), model.norm(x) @ model.head_weight.T)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize(
    ("engrams", "sources", "places", "hashes"),
    [
        ([0, 2], [0, 2], [0, 1], [0, 2]),
        ([1, 2], [2, 3], [0], [-1, 2]),  # layer 1's is in the way of layer 2's
        ([0, 3], [1, 2], [0, 1], [0, 3]),
        ([1, 3], [0], [0], [1]),
        ([0, 1, 2], [0, 2, 3], [0, 1], [0, -1, 2]),
        ([2, 0], [0, 0, 1, 2, 2, 3], [3, 0], [2, 0]),
    ],
    ids=str,
)
def test_rows_go_along_and_those_of_no_use_stay_behind(engrams, sources, places, hashes, dtype, tmp_path):
    model = model_of(engram_layer_ids=engrams, engram_dtype=dtype).float()
    twelve.save(model, None, tmp_path / "given")
    given, _ = twelve.load(tmp_path / "given")
    table = (tmp_path / "given" / TABLE).read_bytes()
    made = with_layers(given, sources)
    assert made.config.engram_layer_ids == places
    assert made.config.engram_hash_layers == (None if hashes == places else hashes)

    kept = [engrams.index(number) for number in hashes if number >= 0]
    before = given.memory.table.read(given.memory.addresses(IDS, NOWHERE)[kept])
    assert (made.memory.table.read(made.memory.addresses(IDS, NOWHERE)) == before).all()
    assert made.memory.table.count == given.memory.hash.primes[kept].sum()
    twelve.save(made, None, tmp_path / "made")
    again, _ = twelve.load(tmp_path / "made")
    assert again.config == made.config
    assert_same(again, made, 0)
    assert (tmp_path / "made" / TABLE).stat().st_size <= len(table)
    once_more = with_layers(again, [0])  # a second time, from a file
    last = once_more.memory.table.read(once_more.memory.addresses(IDS, NOWHERE))
    assert (last[0] == before[places.index(0)]).all()
    assert (tmp_path / "given" / TABLE).read_bytes() == table
    twelve.save(made, None, tmp_path / "given")  # over what its rows are read from
    assert_same(twelve.load(tmp_path / "given")[0], again, 0)


def test_a_table_that_is_not_mapped_gives_its_part(tmp_path, monkeypatch):
    twelve.save(model_of(engram_layer_ids=[1, 2]).float(), None, tmp_path)
    mapped = with_layers(twelve.load(tmp_path)[0], [2, 3])
    monkeypatch.setattr("twelve.rows._map", lambda *_: None)
    assert_same(with_layers(twelve.load(tmp_path)[0], [2, 3]), mapped, 0)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_every_engram_has_a_place_of_its_own_or_none(data):
    depth = data.draw(st.integers(1, 8))
    layers = data.draw(st.lists(st.integers(0, depth - 1), unique=True, min_size=1))
    sources = sorted(data.draw(st.lists(st.integers(0, depth - 1), min_size=1, max_size=12)))
    places = _engram_places(layers, sources)
    assert len(set(places.values())) == len(places) and places
    for layer in layers:
        later = [place for place, source in enumerate(sources) if source >= layer]
        wanted = later[0] if later else len(sources) - 1
        assert places.get(layer, wanted) == wanted and wanted in places.values()
        assert layer in places or layer not in sources


# --- narrower ---------------------------------------------------------------------------------------------------------


def test_directions_that_nothing_is_in_can_go(monkeypatch):
    """Without a convolution and with even norms a model is the same without the half of a width that holds nothing."""
    monkeypatch.setattr(width, "scaled", lambda config, size: replace(config, hidden_size=size))
    model = model_of(engram_kernel_size=0, rms_norm_eps=1e-14, mtp=0)
    for index in (0, 2):
        model.layers[index].engram.query_norm.data.fill_(0.7)
        model.layers[index].engram.key_norm.data.fill_(1.4)
    back = resize(resize(model, width=128), width=64)
    ours, theirs = (one.layers[0].engram.value_proj.weight for one in (back, model))
    assert not torch.allclose(ours, theirs, atol=0.1)  # turned
    with torch.no_grad():
        torch.testing.assert_close(back(IDS), model(IDS), rtol=1e-8, atol=1e-8)


def test_a_memory_that_has_learnt_nothing_can_be_cut():
    model = Transformer(model_of().config).init_weights(0).eval()
    smaller = resize(model, layers=2, width=48)
    assert all(logits.isfinite().all() for logits in everything(smaller))
    assert all(parameter.isfinite().all() for parameter in smaller.parameters())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a text and a small model that has learnt it, much of it in its memory."""
    folder = tmp_path_factory.mktemp("trained")
    lines = [f"Ship {n} of 12 sails to port {n * 7 % 12}. 배 {n}번은 {n * 5 % 12}번 항구로 간다." for n in range(400)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    pretrain([str(folder / "text.jsonl")], folder / "model", steps=40, width=64, layers=4, experts=4, context=64,
             batch=8, vocab_size=320, quiet=True, learning_rate=0.01, switches={"engram_vocab_size": 499})  # fmt: skip
    return folder


@pytest.mark.parametrize("size", [{"width": 48}, {"width": 32}, {"layers": 3}, {"layers": 2, "experts": 2}], ids=str)
def test_a_smaller_model_still_uses_its_memory(trained, size):
    texts = [trained / "text.jsonl"]
    model, tokenizer = twelve.load(trained / "model")
    data = calibration(tokenizer, texts, 64)

    @torch.no_grad()
    def loss(model: Transformer) -> float:
        return model.losses(data[:, :-1], data[:, 1:]).main.item()

    smaller = resize(model, **size, tokenizer=tokenizer, texts=texts)
    with_it = loss(smaller)
    assert with_it < loss(model) + 0.4
    for part in ("conv", "value_proj.weight"):  # each is of use, the convolution as it was turned, too
        for index in smaller.config.engram_layer_ids:
            smaller.layers[index].engram.get_parameter(part).data.zero_()
        assert loss(smaller) > with_it + 0.1, part


# --- folders and what cannot be ---------------------------------------------------------------------------------------


def test_the_verb_writes_a_model_that_trains_on(trained, tmp_path, capsys):
    text, table = str(trained / "text.jsonl"), Path(trained, "model", TABLE).read_bytes()
    size = ["--layers", "3", "--width", "128", "--experts", "8"]
    assert cli.main(["convert", str(trained / "model"), "--out", str(tmp_path / "made"), *size, "--json"]) == 0
    made = twelve.load(tmp_path / "made")[0]
    assert made.config.hidden_size == 128 and made.memory.table.read(np.arange(made.memory.table.count)).any()
    onward = ["pretrain", text, "--from", str(tmp_path / "made"), "--context", "64", "--batch", "8", "--steps", "3"]
    assert cli.main([*onward, "--out", str(tmp_path / "more"), "--json"]) == 0, capsys.readouterr().err
    assert twelve.load(tmp_path / "more")[0].config == made.config
    assert (tmp_path / "more" / TABLE).read_bytes() != (tmp_path / "made" / TABLE).read_bytes()
    assert Path(trained, "model", TABLE).read_bytes() == table


def test_streams_allow_fewer_layers_and_other_experts():
    model = model_of(hc_mult=4, mtp=0)
    assert_same(resize(model, experts=12), model)
    smaller = resize(model, layers=2, experts=4)
    assert smaller.config.engram_layer_ids == [0, 1] and smaller(IDS).isfinite().all()
    for size in ({"layers": 5}, {"width": 128}):
        with pytest.raises(InputError, match="hyper-connections"):
            resize(model, **size)


def test_the_key_is_written_only_where_hashes_have_moved():
    config = small_v3(503, 64, 4, **SWITCHES)
    assert "engram_hash_layers" not in config.to_dict()
    assert "engram_hash_layers" not in replace(config, engram_hash_layers=[0, 2]).to_dict()
    moved = replace(config, engram_hash_layers=[1, -1, 2])
    assert moved.to_dict()["engram_hash_layers"] == [1, -1, 2] and ModelConfig(**moved.to_dict()) == moved
    for wrong in ([1], [1, 1], [0, 1, 2], [0, -2], [0, 2**40], ["0", 1], [0, None], []):
        with pytest.raises(InputError, match="engram_hash_layers"):
            replace(config, engram_hash_layers=wrong)
