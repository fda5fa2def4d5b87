"""Models of another size: larger ones compute the same, smaller ones keep what mattered, and both are whole models."""

import json
from dataclasses import replace

import pytest
import torch
from families import CASES, V3, V3_GROUPS, assert_same, difference, everything, random_ids, randomise
from hypothesis import given, settings
from hypothesis import strategies as st

import twelve
from twelve import cli
from twelve.config import ModelConfig, small_v3
from twelve.convert import width
from twelve.convert.axis import padded, repeated
from twelve.convert.experts import with_experts
from twelve.convert.importance import activity, drawn, influence, use
from twelve.convert.resize import assemble, resize, with_layers
from twelve.convert.width import with_width
from twelve.data.tokenizer import Tokenizer
from twelve.data.windows import calibration
from twelve.errors import InputError
from twelve.model import Transformer
from twelve.train.pretrain import pretrain

IDS = random_ids()
SHAPES = CASES | {
    "v3-mtp": ("deepseek_v3", V3 | {"num_nextn_predict_layers": 2}),
    "v3-groups-qlora-bias-mtp": ("deepseek_v3", V3_GROUPS | {"num_nextn_predict_layers": 1, "attention_bias": True}),
    "token-latents": ("twelve", V3 | {"kv_token_rank": 5, "kv_token_layer_ids": [0, 2]}),
}
FAMILIES = ["v3-groups-qlora-bias-mtp", "v3-mtp", "v3-tied-bias", "v2-groups-qlora-yarn", "llama-tied-biases", "qwen2",
            "qwen3-bias-yarn", "v3-all-dense", "token-latents"]  # fmt: skip


def model_of(case: str, **changes) -> Transformer:
    """In float64, with norms, biases and router biases that matter."""
    family, values = SHAPES[case]
    model = Transformer(ModelConfig.from_dict(values | changes | {"model_type": family})).double().eval()
    torch.manual_seed(0)
    randomise(model)
    return model


# --- larger -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("size", [{"layers": 7}, {"width": 96}, {"width": 76}, {"layers": 4, "width": 130}], ids=str)
def test_a_larger_model_computes_the_same(case, size):
    model = model_of(case)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    larger = resize(model, **size)
    assert larger.config.num_hidden_layers == size.get("layers", 3)
    assert larger.config.hidden_size == size.get("width", 48)
    # an MTP module norms states that a tied head's norm has scaled: the norm's epsilon shows
    assert_same(larger, model, 1e-5 if case == "v3-tied-bias" else 1e-9)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_more_layers_are_copies_that_say_nothing_yet():
    model = model_of("v3-groups-qlora-yarn")
    larger = with_layers(model, [0, 0, 1, 2, 2])
    assert larger.config.first_k_dense_replace == 2
    assert torch.equal(larger.layers[4].self_attn.q_b_proj.weight, model.layers[2].self_attn.q_b_proj.weight)
    assert not larger.layers[4].mlp.experts.down_proj.any() and larger.layers[3].mlp.experts.down_proj.any()


@pytest.mark.parametrize("case", ["v3-groups-qlora-yarn", "llama-linear-head-dim"])
def test_what_is_new_in_a_wider_model_learns_something_of_its_own(case):
    model = resize(model_of(case), width=128).train()
    model.losses(IDS, IDS).total.backward()
    for name, parameter in model.named_parameters():
        rows = parameter.grad.flatten(0, -2) if parameter.dim() > 1 else None
        if name.endswith(("down_proj.weight", "q_proj.weight", "q_b_proj.weight", "gate_proj.weight")):
            rows = rows[rows.abs().sum(1) > 0]
            directions = torch.nn.functional.normalize(rows) @ torch.nn.functional.normalize(rows).T
            assert (directions.abs() - torch.eye(len(rows)) < 0.9999).all(), name
    assert model.embed_tokens.weight.grad[IDS.unique()].ne(0).all()  # channels that were zero included


@settings(max_examples=30, deadline=None)
@given(old=st.integers(1, 12), more=st.integers(0, 30), how=st.sampled_from([padded, repeated]))
def test_a_larger_axis_loses_nothing(old, more, how):
    draw = torch.Generator().manual_seed(0)
    axis = how(old, old + more, draw=draw, spread=0.02)
    z, w = torch.randn(5, old, dtype=torch.float64), torch.randn(7, old, dtype=torch.float64)
    torch.testing.assert_close(axis.rows(z.T).T @ axis.columns(w).T, z @ w.T)
    if how is padded:
        torch.testing.assert_close(axis.rows(z.T).pow(2).mean(0), z.pow(2).mean(1))


# --- experts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["v3-all-dense", "llama-llama3"])
def test_a_dense_model_and_the_experts_made_of_it_compute_the_same(case):
    more = {"num_nextn_predict_layers": 1, "n_routed_experts": None} if case.startswith("v3") else {}
    model = model_of(case, **more)
    sparse = resize(model, experts=8)
    assert sparse.config.n_routed_experts == 8 and len(sparse.moe_layers()) == 2 + len(sparse.mtp)
    assert_same(sparse, model)
    assert_same(sparse.float(), model.float(), 1e-4)
    moe = sparse.layers[1].mlp
    chosen, gates, _ = moe.gate(torch.randn(200, 48))
    assert (chosen.sort(1).values.diff(dim=1) == 1).all() and (gates - 0.5).abs().max() < 1e-6  # whole groups
    assert len(set(chosen.flatten().tolist())) == 8  # of all groups
    assert model.config.intermediate_size == sparse.config.moe_intermediate_size * 3


def test_sizes_that_do_not_divide_are_filled_up():
    model = model_of("llama-llama3", intermediate_size=70)
    sparse = resize(model, experts=4)
    assert sparse.config.moe_intermediate_size == 24
    assert_same(sparse, model)
    sparse.train().losses(IDS, IDS).total.backward()
    assert sparse.layers[1].mlp.experts.down_proj.grad.ne(0).flatten(0, 1).any(0).all()  # the fill learns


@pytest.mark.parametrize("case", ["v3-one-group", "v3-groups-qlora-yarn"])
def test_more_experts_wait_until_balancing_lifts_them(case):
    model = model_of(case)
    larger = resize(model, experts=20)
    assert_same(larger, model)
    router = larger.layers[1].mlp.gate
    x = torch.randn(300, 48, dtype=torch.float64)
    new = router.e_score_correction_bias == router.e_score_correction_bias.min()
    assert new.sum() == 8 and not new[router(x)[0]].any()
    for _ in range(400):
        router.update_bias(torch.bincount(router(x)[0].flatten(), minlength=20), 0.02)
    assert new[router(x)[0]].any()


def test_fewer_experts_are_those_most_used():
    model = model_of("v3-groups-qlora-yarn")
    found = use(model, IDS)["layers.1.mlp.experts"]
    smaller = assemble(*with_experts(model, 8, IDS, 0))
    ours, theirs = (one.layers[1].mlp.experts.down_proj for one in (smaller, model))
    kept = (ours[:, None] == theirs).flatten(2).all(2).int().argmax(1).view(4, 2)
    assert torch.equal(kept, found.view(4, 3).topk(2, dim=1).indices.sort(1).values + 3 * torch.arange(4)[:, None])
    assert all(logits.isfinite().all() for logits in everything(smaller))


def test_experts_become_dense_and_stay_near():
    """Two experts, both always used at half a gate each: one layer of their neurons is the same."""
    model = model_of("v3-one-group", n_routed_experts=2, num_experts_per_tok=2, n_shared_experts=1, n_group=1,
                     intermediate_size=84, first_k_dense_replace=0)  # fmt: skip
    for layer in model.moe_layers():
        layer.gate.weight.data.zero_()
    dense = resize(model, experts=0)
    assert dense.config.n_routed_experts is None and not dense.moe_layers()
    assert_same(dense, model)


# --- smaller ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SHAPES)
def test_the_same_size_is_the_same_model(case):
    model = model_of(case)
    same = resize(model, model.config.num_hidden_layers, model.config.hidden_size, len(model.moe_layers()) and 12)
    assert same.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("case", FAMILIES[:1] + FAMILIES[4:7])
def test_directions_that_nothing_is_in_can_go(case, monkeypatch):
    """Made wider in its residual alone, a model has nothing in half of its directions: without them it is the same."""
    monkeypatch.setattr(width, "scaled", lambda config, size: replace(config, hidden_size=size))
    model = model_of(case, tie_word_embeddings=False, rms_norm_eps=1e-14)
    back = resize(resize(model, width=96), width=48)
    assert not torch.allclose(back.embed_tokens.weight, model.embed_tokens.weight, atol=0.1)  # turned
    with torch.no_grad():
        torch.testing.assert_close(back(IDS), model(IDS), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("case", FAMILIES)
def test_a_smaller_model_is_whole(case, tmp_path):
    smaller = resize(model_of(case).float(), layers=2, width=32)
    assert smaller.config.hidden_size == 32 and not smaller.config.tie_word_embeddings
    assert all(logits.isfinite().all() for logits in everything(smaller))
    twelve.save(smaller, None, tmp_path / "smaller")
    again, _ = twelve.load(tmp_path / "smaller")
    assert_same(again, smaller, 1e-6)


@pytest.mark.parametrize(
    ("case", "size"),
    [
        ("v3-groups-qlora-yarn", {"layers": 2, "width": 24}), ("v3-one-group", {"layers": 5, "width": 64}),
        ("v3-all-dense", {"experts": 8}), ("v3-one-group", {"experts": 16}), ("v3-one-group", {"experts": 0}),
        ("llama-tied-biases", {"width": 96}), ("llama-tied-biases", {"width": 24}), ("qwen3-head-dim", {"width": 72}),
        ("qwen2", {"layers": 2, "width": 36}),
    ],
    ids=str,
)  # fmt: skip
def test_transformers_reads_what_comes_out(case, size, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = resize(model_of(case).float(), **size)
    twelve.save(ours, None, tmp_path / "resized")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "resized", output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values()), report
    assert difference(ours, theirs) <= 1e-4


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a text and a small model that has learnt it."""
    folder = tmp_path_factory.mktemp("trained")
    lines = [f"Ship {n} of 12 sails to port {n * 7 % 12}. 배 {n}번은 {n * 5 % 12}번 항구로 간다." for n in range(400)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    pretrain([str(folder / "text.jsonl")], folder / "model", steps=40, width=64, layers=3, experts=4, context=64,
             batch=8, vocab_size=320, quiet=True, learning_rate=0.01)  # fmt: skip
    return folder


@pytest.mark.parametrize("size", [{"layers": 2}, {"width": 32}, {"experts": 2}, {"experts": 0}], ids=str)
def test_a_smaller_model_is_ahead_of_a_random_one(trained, size):
    model, tokenizer = twelve.load(trained / "model")
    data = calibration(tokenizer, [trained / "text.jsonl"], 64)
    smaller = resize(model, **size, tokenizer=tokenizer, texts=[trained / "text.jsonl"])
    random = Transformer(smaller.config).init_weights(0).eval()
    with torch.no_grad():
        ahead, behind = (one.losses(data[:, :-1], data[:, 1:]).main.item() for one in (smaller, random))
    assert ahead < behind - 2, (ahead, behind)


def test_the_verb_writes_a_model_of_another_size(trained, tmp_path, capsys):
    command = ["convert", str(trained / "model"), "--out", str(tmp_path / "half"), "--layers", "2", "--width", "32",
               "--experts", "2", "--text", str(trained / "text.jsonl"), "--json"]  # fmt: skip
    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] > 0
    half, tokenizer = twelve.load(tmp_path / "half")
    config = half.config
    assert (config.num_hidden_layers, config.hidden_size, config.n_routed_experts) == (2, 32, 2)
    assert isinstance(tokenizer, Tokenizer)
    texts = str(trained / "text.jsonl")
    onward = ["pretrain", texts, "--from", str(tmp_path / "half"), "--context", "64", "--batch", "8", "--json"]
    assert cli.main([*onward, "--out", str(tmp_path / "more"), "--steps", "10"]) == 0
    assert twelve.load(tmp_path / "more")[0].config == config
    first, *_, last = map(json.loads, (tmp_path / "more" / "training" / "metrics.jsonl").read_text().splitlines())
    assert last["loss"] < first["loss"] < 4  # a fresh one begins at 5.7
    for wrong, words in ((["--out", str(tmp_path / "half")], "the model to start from"), (["--width", "64"], "width")):
        capsys.readouterr()
        assert cli.main([*onward, *wrong]) == 2 and words in capsys.readouterr().err


def test_layers_are_judged_by_what_they_change():
    model = model_of("llama-llama3")
    for name, parameter in model.layers[1].named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data.zero_()
    found = influence(model, IDS)
    assert found[1].abs() < 1e-12 and found[[0, 2]].min() > 1e-3


def test_activity_is_what_a_plain_loop_counts():
    model = model_of("v3-one-group")
    seen = []
    handle = model.layers[1].mlp.experts.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    [(x, chosen, gates)] = seen
    sizes, shares = torch.zeros(12, 28, dtype=torch.float64), torch.zeros(12, dtype=torch.float64)
    experts = model.layers[1].mlp.experts
    for token in range(len(x)):
        for expert, gate in zip(chosen[token].tolist(), gates[token], strict=True):
            first, second = (experts.gate_up_proj[expert] @ x[token]).chunk(2)
            sizes[expert] += (torch.nn.functional.silu(first) * second).abs().detach() / len(x)
            shares[expert] += gate / len(x)
    torch.testing.assert_close(activity(model, IDS)["layers.1.mlp.experts"], sizes)
    torch.testing.assert_close(use(model, IDS)["layers.1.mlp.experts"], shares)


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "size", "words"),
    [
        ("v3-one-group", {"layers": 0}, "--layers 0"),
        ("v3-one-group", {"width": 1_000_000}, "--width 1000000 is not possible: ask for 1 to 262,144"),
        ("v3-one-group", {"width": 250_000}, "about .* GiB of weights, more than the memory"),
        ("v3-groups-qlora-yarn", {"experts": 6}, "not a multiple of the model's 4 routing groups"),
        ("v2-greedy", {"experts": 24}, "correction bias"),
        ("qwen2", {"experts": 4}, "a dense qwen2 model cannot be given experts"),
        ("llama-llama3", {"experts": 3}, "a multiple of 2"),
        ("llama-llama3", {"width": 24, "texts": ["x.txt"]}, "no tokenizer"),
    ],
)
def test_one_line_says_what_cannot_be(case, size, words):
    with pytest.raises(InputError, match=words):
        resize(model_of(case), **size)


def test_streams_and_packed_weights_are_refused(tmp_path):
    streams = Transformer(small_v3(300, 64, 3, 4, 2, hc_mult=4)).init_weights(0)
    for size in ({"layers": 4}, {"width": 128}):
        with pytest.raises(InputError, match="hyper-connections"):
            resize(streams, **size)
    fewer = resize(streams, layers=2, experts=2)
    assert fewer(IDS % 300).isfinite().all() and fewer.config.hc_mult == 4
    twelve.save(Transformer(small_v3(300, 64, 2, 0)).init_weights(0), None, tmp_path / "model")
    from twelve.calibrate import quantize

    quantize(tmp_path / "model", tmp_path / "packed")
    packed, _ = twelve.load(tmp_path / "packed")
    with pytest.raises(InputError, match="packed weights cannot be resized"):
        resize(packed, layers=1)
    assert cli.main(["convert", str(tmp_path / "packed"), "--out", str(tmp_path / "out"), "--layers", "1"]) == 2
    assert not (tmp_path / "out").exists()


def test_drawn_tokens_are_the_models(monkeypatch):
    model = model_of("llama-llama3")
    ids = drawn(model)
    assert ids.shape == (16, 256) and ids.min() >= 0 and ids.max() < 1003 and torch.equal(ids, drawn(model))
    assert with_width(model, 24, ids, 0)[0].hidden_size == 24


def test_the_text_is_read_from_every_file_in_turn(tokenizer, tmp_path):
    for name, text in (("a.jsonl", "배가 나간다"), ("b.jsonl", "Ships go out"), ("c.txt", " ")):
        (tmp_path / name).write_text(f'{{"text": "{text}"}}\n' * 50 if text.strip() else text, encoding="utf-8")
    ids = calibration(tokenizer, [tmp_path], 16).flatten().tolist()
    one, other = ([*tokenizer.start_ids, *tokenizer.encode(text)] for text in ("배가 나간다", "Ships go out"))
    assert ids == ((one + other) * 50)[: len(ids)] and len(ids) > 10 * len(one + other)
    with pytest.raises(InputError, match="empty"):
        calibration(tokenizer, [tmp_path / "c.txt"], 16)
