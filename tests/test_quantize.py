"""Packed weights against plain loops, rounding against its float64 twin, folders both ways, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import twelve
from twelve import cli
from twelve.calibrate import calibration, quantize, quantize_model
from twelve.config import ModelConfig, small_v3
from twelve.convert import load_config, load_weights
from twelve.engine import Engine
from twelve.errors import InputError
from twelve.gptq import DAMPING, fit, gptq, gptq_experts, inverse_root, nearest, round_plainly, values
from twelve.model.moe import Experts
from twelve.model.transformer import Transformer
from twelve.quantize import (
    Form,
    Packed,
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedLinear,
    dequantize,
    forms_of,
    pack,
    packable,
    packs,
)

FORMS = [Form(4, 32, False), Form(4, 64, False), Form(8, 32, True), Form(4, 32, True), Form(8, 64, False)]
GQA = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
       "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
MLA = GQA | {
    "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}  # fmt: skip
MODELS = {
    "llama": {"model_type": "llama", **GQA, "mlp_bias": True, "attention_bias": True},
    "llama-tied": {"model_type": "llama", **GQA, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", **GQA},
    "qwen3": {"model_type": "qwen3", **GQA, "head_dim": 32, "tie_word_embeddings": True},
    "v2": {"model_type": "deepseek_v2", **MLA, "q_lora_rank": 32},
    "v3-mtp": {"model_type": "deepseek_v3", **MLA, "num_nextn_predict_layers": 2},
    "v3-tied": {"model_type": "deepseek_v3", **MLA, "tie_word_embeddings": True, "num_nextn_predict_layers": 1},
    "v3-dense": {"model_type": "deepseek_v3", **MLA, "n_routed_experts": None},
    "v3-narrow-experts": {"model_type": "deepseek_v3", **MLA, "moe_intermediate_size": 28},
}
INT4, INT8 = Form(4, 32, False), Form(8, 32, True)


def model_of(case: str) -> Transformer:
    torch.manual_seed(0)  # of the biases
    model = Transformer(ModelConfig.from_dict(MODELS[case])).init_weights(0).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.empty(parameter.shape).normal_(0, 0.05, generator=generator))
    return model


def windows(rows: int = 8, length: int = 48) -> torch.Tensor:
    return torch.randint(0, 300, (rows, length), generator=torch.Generator().manual_seed(1))


def numbers(rows: int, columns: int, form: Form):
    """Random q, and scale and low that float16 holds."""
    q = torch.randint(0, 2**form.bits, (rows, columns))
    scale = torch.randn(rows, columns // form.group).half().float()
    return q, scale, None if form.symmetric else torch.randn_like(scale).half().float()


def plain_value(packed: Packed, row: int, column: int) -> float:
    """One weight by the layout's description alone."""
    panel, r, block, k = row // 16, row % 16, column // 32, column % 32
    if packed.bits == 8:
        q = packed.weights[panel, block, (k // 4) * 64 + r * 4 + k % 4].item()
    else:
        byte = packed.weights[panel, block, (k % 16 // 4) * 64 + r * 4 + k % 4].item()
        q = byte >> 4 if k >= 16 else byte & 15
    group = column // packed.group
    if packed.has_low:
        return q * packed.scales[panel, group, 0, r].float() + packed.scales[panel, group, 1, r].float()
    return (q - 2 ** (packed.bits - 1)) * packed.scales[panel, group, r].float()


# --- one matrix -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 16, 21])
def test_the_layout_is_what_is_described(form, rows):
    q, scale, low = numbers(rows, 128, form)
    packed = pack(q, scale, low, form.bits, form.group)
    assert packed.form == form and (packed.rows, packed.columns) == (rows, 128)
    panels = -(-rows // 16)
    assert packed.weights.shape == (panels, 4, 64 * form.bits) and packed.weights.dtype == torch.uint8
    assert packed.scales.shape == (panels, 128 // form.group, *([] if form.symmetric else [2]), 16)
    assert packed.nbytes == packed.weights.numel() + 2 * packed.scales.numel()
    floats = packed.dequantize()
    plain = torch.tensor([[plain_value(packed, row, column) for column in range(128)] for row in range(rows)])
    assert torch.equal(floats, plain)
    wide = scale.repeat_interleave(form.group, 1)
    zero = q - 2 ** (form.bits - 1)
    assert torch.equal(floats, wide * zero if low is None else q * wide + low.repeat_interleave(form.group, 1))
    ids = torch.tensor([[rows - 1, 0], [rows // 2, rows - 1]])
    assert torch.equal(packed.rows_of(ids), floats[ids])
    if rows % 16:  # beyond the last row: zeros
        assert not packed.weights[-1].view(4, -1, 16, 4)[:, :, rows % 16 :].any()
        assert not packed.scales[-1][..., rows % 16 :].any()


@pytest.mark.parametrize("bits, group, columns", [(3, 32, 64), (4, 48, 96), (4, 64, 96), (8, 0, 64), (8, 16, 64)])
def test_forms_that_cannot_be_are_refused(bits, group, columns):
    q = torch.zeros(16, columns)
    with pytest.raises(InputError, match="bits are not supported|group of"):
        pack(q, torch.ones(16, 1), None, bits, group)


def test_8_bits_are_within_half_a_step_and_4_bits_better_than_the_span():
    w = torch.randn(40, 128)
    step = w.unflatten(1, (-1, 32)).abs().amax(-1).repeat_interleave(32, 1) / 127
    assert ((round_plainly(w, INT8).dequantize() - w).abs() <= step * 0.51).all()
    groups = w.unflatten(1, (-1, 32))
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    spanned = ((groups - least) / (most - least) * 15).round() * (most - least) / 15 + least
    searched = round_plainly(w, INT4).dequantize()
    assert (searched - w).square().sum() < 0.93 * (spanned.flatten(1) - w).square().sum()


def test_groups_of_one_value_of_zeros_and_of_extremes():
    w = torch.zeros(16, 128)
    w[1], w[2], w[3], w[4, 5] = 0.25, 1e-9, -60000.0, 60000.0
    for form in (INT4, INT8):
        floats = round_plainly(w, form).dequantize()
        assert floats.isfinite().all()
        assert torch.allclose(floats, w, rtol=0.005, atol=1e-6), form


def plain_gptq(weight, hessian, form):
    """The paper's algorithm as loops: every error goes at once into all columns to come, in float64."""
    w, columns = weight.double().clone(), weight.shape[1]
    damped = hessian.double() + DAMPING * hessian.double().diagonal().mean() * torch.eye(columns)
    inverse = torch.linalg.inv(damped)
    done = torch.zeros_like(w)
    for start in range(0, columns, form.group):
        importance = []
        trial = inverse.clone()
        for column in range(start, start + form.group):  # [H^-1]_qq once all columns before q are gone
            importance.append(1 / trial[column, column])
            trial = trial - torch.outer(trial[:, column], trial[column]) / trial[column, column]
        scale, low = fit(w[:, start : start + form.group], form, torch.stack(importance))
        for column in range(start, start + form.group):
            for row in range(len(w)):
                one = None if low is None else low[row]
                done[row, column] = values(nearest(w[row, column], scale[row], one, form), scale[row], one, form)
                error = (w[row, column] - done[row, column]) / inverse[column, column]
                for other in range(column + 1, columns):
                    w[row, other] -= error * inverse[column, other]
            inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return done


def correlated(tokens: int, width: int) -> torch.Tensor:
    """Inputs as a layer sees them: few strong directions, and the rest weak."""
    mix = torch.randn(width, width) @ torch.diag(torch.logspace(0, -2, width)) @ torch.randn(width, width)
    return torch.randn(tokens, width) @ mix / width


@pytest.mark.parametrize("form", [INT4, Form(4, 64, False), INT8])
def test_blocked_gptq_equals_its_plain_twin(form):
    weight, x = torch.randn(5, 128).double(), correlated(400, 128).double()
    hessian = x.T @ x
    assert (gptq(weight, hessian, form).dequantize() - plain_gptq(weight, hessian, form)).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gptq_has_a_smaller_output_error_than_rounding(dtype):
    weight, x, unseen = torch.randn(48, 128), *correlated(1200, 128).split((800, 400))
    made = gptq(weight, (x.T @ x).to(dtype), INT4).dequantize()
    rounded = round_plainly(weight, INT4).dequantize()

    def error(floats):
        return (unseen @ (floats - weight).T).square().sum()

    assert error(made) < 0.5 * error(rounded)


def test_gptq_takes_inputs_that_are_few_or_never_seen():
    weight = torch.randn(16, 64)
    x = torch.randn(3, 64)
    x[:, 5:9] = 0
    for hessian in (x.T @ x, torch.zeros(64, 64)):
        floats = gptq(weight, hessian, INT4).dequantize()
        assert floats.isfinite().all() and (floats - weight)[:, 5:9].abs().max() < 0.5
    unseen = gptq(weight, torch.zeros(64, 64), INT4).dequantize()
    assert torch.allclose(unseen, round_plainly(weight, INT4).dequantize())
    with pytest.raises(InputError, match="not numbers"):
        inverse_root(torch.full((4, 4), float("nan")))


@torch.no_grad()
def test_an_expert_that_saw_few_tokens_borrows_others():
    """Fitted to what it saw, and no worse than rounding where it saw nothing."""
    experts = model_of("v3-mtp").layers[1].mlp.experts
    x = correlated(900, 64)
    x, unseen = x[:600], x[600:]
    chosen = torch.zeros(600, 2, dtype=torch.int64)
    chosen[:, 1], chosen[:5, 1] = 1, 2  # expert 2 saw five tokens, expert 3 none
    gate_up, down = gptq_experts(experts, [(x[:300], chosen[:300]), (x[300:], chosen[300:])], INT4)
    assert gate_up.weights.shape[0] == down.weights.shape[0] == 4
    for expert in range(4):
        weight = experts.gate_up_proj[expert]
        errors = [
            (unseen @ (made.dequantize() - weight).T).square().sum()
            for made in (gate_up[expert], round_plainly(weight, INT4))
        ]
        assert errors[0] < (0.6 if expert < 2 else 0.9) * errors[1], expert
        assert (down[expert].dequantize() - experts.down_proj[expert]).abs().max() < 0.2


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [INT4, INT8])
@pytest.mark.parametrize("case", MODELS)
@torch.no_grad()
def test_every_family_is_packed_and_runs(case, form):
    model, ids = model_of(case), windows()
    before = model(ids)
    kinds = packable(model)
    quantize_model(model, form, INT8, ids if form.bits == 4 else None)
    forms, narrow = forms_of(model), case == "v3-narrow-experts"
    left = {name for name in kinds if name not in forms}
    assert left == {name for name in kinds if narrow and (name.endswith(("experts", "down_proj")) and ".1." in name)}
    assert all(form == (INT8 if name in ("embed_tokens", "lm_head") else forms[name]) for name, form in forms.items())
    assert (model(ids) - before).norm() < (0.3 if form.bits == 4 else 0.03) * before.norm()
    # the same floats in the model's own modules, and the same numbers through the cache, token by token
    twin = model_of(case)
    quantize_model(twin, form, INT8, ids if form.bits == 4 else None)
    dequantize(twin)
    assert not forms_of(twin) and type(twin.embed_tokens) is torch.nn.Embedding
    assert [type(m) for m in twin.modules()] == [type(m) for m in model_of(case).modules()]
    assert (model(ids) - twin(ids)).abs().max() < 1e-4
    for mine, theirs in zip(model.mtp_logits(ids), twin.mtp_logits(ids), strict=True):
        assert (mine - theirs).abs().max() < 1e-4
    cache = model.new_cache(1, 8)
    steps = torch.cat([model(ids[:1, t : t + 1], cache) for t in range(8)], dim=1)
    assert (steps - twin(ids[:1, :8])).abs().max() < 1e-3


def test_modules_are_what_they_replace():
    model = model_of("v3-mtp")
    quantize_model(model, INT4, INT8)
    assert type(model.embed_tokens) is QuantizedEmbedding and type(model.lm_head) is QuantizedLinear
    experts = model.layers[1].mlp.experts
    assert isinstance(experts, Experts) and type(experts) is QuantizedExperts
    assert experts.gate_up_proj.shape == (4, 64, 64) and experts.down_proj.shape == (4, 64, 32)
    assert experts.gate_up_packed_weight.shape == (4, 4, 2, 256) and experts.gate_up_packed_weight.is_contiguous()
    assert experts.gate_up_packed_scales.shape == (4, 4, 2, 2, 16)
    assert isinstance(model.layers[0].self_attn.kv_b_proj, torch.nn.Linear)
    assert model.layers[1].mlp.gate.weight.dtype == torch.float32
    assert isinstance(model.mtp[1].eh_proj, QuantizedLinear)


@torch.no_grad()
def test_calibration_makes_a_better_model_than_rounding():
    """Of the layers' own outputs; experts included, some of which see few tokens."""
    ids, unseen = windows(64, 48).split((48, 16))
    model = model_of("v3-mtp")
    rounded, fitted = model_of("v3-mtp"), model_of("v3-mtp")
    quantize_model(rounded, INT4, INT8)
    quantize_model(fitted, INT4, INT8, ids)
    errors = [(one(unseen) - model(unseen)).square().sum() for one in (fitted, rounded)]
    assert errors[0] < 0.9 * errors[1]


@torch.no_grad()
def test_a_part_is_read_before_it_is_used_and_memory_is_that_of_a_part(tmp_path):
    twelve.save(model_of("v3-mtp"), None, tmp_path / "m")
    outline, _, read = twelve.convert.open_parts(tmp_path / "m")
    floats = []

    def watched(name):
        read(name)
        floats.append(sum(p.numel() for n, p in outline.named_parameters() if not p.is_meta and p.dim() > 1))

    quantize_model(outline, INT4, INT8, windows(), watched)
    whole = model_of("v3-mtp")
    quantize_model(whole, INT4, INT8, windows())
    mine, theirs = outline.state_dict(), whole.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert max(floats) < 0.5 * sum(p.numel() for p in model_of("v3-mtp").parameters())


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A quantised V3 model with experts and MTP."""
    model = model_of("v3-mtp")
    quantize_model(model, INT4, INT8)
    twelve.save(model, None, tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("case", MODELS)
def test_a_folder_comes_back_bit_for_bit(case, tmp_path):
    model = model_of(case)
    quantize_model(model, INT4, INT8)
    twelve.save(model, None, tmp_path / "a")
    again, _ = twelve.load(tmp_path / "a", device="cpu")
    mine, theirs = model.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine)
    assert forms_of(again) == forms_of(model) and again.config == load_config(tmp_path / "a")
    twelve.save(again, None, tmp_path / "b")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    entry = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert (entry["quant_method"], entry["bits"], entry["group_size"], entry["symmetric"]) == ("twelve", 4, 32, False)
    assert entry["exceptions"]["embed_tokens"] == {"bits": 8, "group_size": 32, "symmetric": True}
    narrow, _ = twelve.load(tmp_path / "a", device="cpu", dtype=torch.bfloat16)
    with torch.no_grad():
        assert narrow(windows()).dtype == torch.bfloat16 and narrow.norm.weight.dtype == torch.bfloat16


def test_transformers_refuses_a_packed_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    for case in ("llama", "v3-mtp"):
        model = model_of(case)
        quantize_model(model, INT4, INT8)
        twelve.save(model, None, tmp_path / case)
        with pytest.raises(RuntimeError, match="ismatch"):  # of shapes: an unknown quant_method is only warned of
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / case)


def edit(folder, change) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values, values["quantization_config"])
    (folder / "config.json").write_text(json.dumps(values))


def edit_weights(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(folder, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        twelve.load(folder, device="cpu")
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


NORM = "model.norm.weight"
O, EXPERTS = "model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.experts.gate_up_packed_scales"
WRONG_CONFIGS = {
    "3 bits": (lambda c, q: q.update(bits=3), "3 bits are not supported, only 4 and 8"),
    "bits of no whole number": (lambda c, q: q.update(bits=8.0), "8.0 bits are not supported"),
    "bits of text": (lambda c, q: q.update(bits="4"), "'4' bits are not supported"),
    "a group": (lambda c, q: q.update(group_size=128), "a group of 128 columns does not divide its 64 columns"),
    "an odd group": (lambda c, q: q.update(group_size=20), "20 columns is not a multiple of 32"),
    "another group": (lambda c, q: q.update(group_size=64), "a group of 64 columns does not divide its"),
    "no bits": (lambda c, q: q.pop("bits"), "quantization_config: a value is missing"),
    "exceptions": (lambda c, q: q.update(exceptions=[1]), "quantization_config: a value is missing or of the wrong"),
    "another form": (lambda c, q: q.update(symmetric=True), r"packed_scales' is \[.*, 2, 16\], the config makes it"),
    "another width": (lambda c, q: c.update(intermediate_size=128), "for a model of another shape"),
    "fewer layers": (lambda c, q: c.update(num_hidden_layers=1), "for a model of another shape"),
    "another method": (lambda c, q: q.update(quant_method="gptq"), "quantised weights"),
    "no method": (lambda c, q: c.update(quantization_config=[4]), "quantised weights"),
    "nothing said": (lambda c, q: c.pop("quantization_config"), "stored as U8"),
}


@pytest.mark.parametrize("wrong", WRONG_CONFIGS)
def test_wrong_configs_are_named(wrong, folder):
    change, message = WRONG_CONFIGS[wrong]
    edit(folder, change)
    refused(folder, message)


WRONG_WEIGHTS = {
    "no scales": (lambda t: t.pop(EXPERTS), f"{EXPERTS}.*missing"),
    "no weights": (lambda t: t.pop(O), "o_proj.weight.*missing"),
    "shape": (lambda t: t.update({O: t[O][:, :1].contiguous()}), r"o_proj.weight' is \[4, 1, 256\].*\[4, 2, 256\]"),
    "floats": (lambda t: t.update({O: t[O].float()}), "o_proj.weight' is stored as torch.float32, not torch.uint8"),
    "bytes": (lambda t: t.update({NORM: t[NORM].to(torch.uint8)}), "norm.weight' is stored as torch.uint8"),
    "scales that are no numbers": (lambda t: t[EXPERTS].view(-1)[7].fill_(float("nan")), "damaged: its scales"),
}


@pytest.mark.parametrize("wrong", WRONG_WEIGHTS)
def test_damaged_weights_are_named(wrong, folder):
    change, message = WRONG_WEIGHTS[wrong]
    edit_weights(folder, change)
    refused(folder, message)


def test_training_asks_for_floats(folder):
    with pytest.raises(InputError, match="quantised.*twelve convert"):
        load_weights(model_of("v3-mtp"), folder)


# --- the verb ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def room(tmp_path, tokenizer):
    """A small model with a tokenizer, and a text."""
    config = small_v3(tokenizer.vocab_size, width=64, layers=2, experts=4, experts_per_token=2, context=64, mtp=1)
    twelve.save(Transformer(config).init_weights(0), tokenizer, tmp_path / "model")
    lines = [f"The ship {n} sails at dawn. 배 {n} 척이 새벽에 떠난다." for n in range(200)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return tmp_path


def run(capsys, *arguments, expect=0):
    status = cli.main([*map(str, arguments), "--json"])
    told = capsys.readouterr()
    assert status == expect, told.err
    return json.loads(told.out) if expect == 0 else told.err.splitlines()[-1]


def test_the_verb_from_end_to_end(room, capsys):
    out, text = room / "int4", room / "text.jsonl"
    result = run(capsys, "quantize", room / "model", "--out", out, "--bits", 4, "--text", text, "--eval", text,
                 "--limit", 150)  # fmt: skip
    assert result["bits"] == 4 and result["calibration_tokens"] == 64 * 64 and result["next"] == f"twelve chat {out}"
    assert result["bytes"] < 0.4 * result["bytes_before"] and 4.5 < result["bits_a_weight"] < 12
    assert abs(result["bits_per_byte_loss"]) < 0.1
    assert result["bits_per_byte_loss"] == result["bits_per_byte"] - result["bits_per_byte_before"]
    model, words = twelve.load(out, device="cpu")
    assert words.encode("배") and forms_of(model)["layers.0.self_attn.q_proj"] == INT4
    assert forms_of(model)["lm_head"] == forms_of(model)["embed_tokens"] == INT8
    # floats again, of the same values
    run(capsys, "convert", out, "--out", room / "floats")
    floats = twelve.load(room / "floats", device="cpu")[0]
    assert "quantization_config" not in json.loads((room / "floats" / "config.json").read_text())
    assert torch.equal(floats.lm_head.weight, model.lm_head.weight) and not forms_of(floats)
    with torch.no_grad():
        assert (floats(windows(2, 20)) - model(windows(2, 20))).abs().max() < 1e-5
    assert Engine(model, words) is not None


def test_8_bits_are_the_default_and_need_no_text(room, capsys):
    result = run(capsys, "quantize", room / "model", "--out", room / "int8")
    assert result["bits"] == 8 and result["calibration_tokens"] == 0
    assert set(forms_of(twelve.load(room / "int8", device="cpu")[0]).values()) == {INT8}


def test_4_bits_without_text_say_so(room, capsys):
    quantize(room / "model", room / "out", bits=4, embedding_bits=4, group=32)
    assert "no calibration text (--text PATH)" in capsys.readouterr().err
    assert set(forms_of(twelve.load(room / "out", device="cpu")[0]).values()) == {INT4}


def test_bad_input_is_one_line_and_nothing_is_left(room, capsys, tmp_path):
    def line(*arguments):
        message = run(capsys, "quantize", *arguments, expect=2)
        assert not (room / "out").exists()
        return message

    model, out = room / "model", ("--out", room / "out")
    assert "not a multiple of 32" in line(model, *out, "--group", 48)
    assert "group of 96 columns does not divide its 64 columns" in line(model, *out, "--group", 96)
    assert "name another folder" in run(capsys, "quantize", model, "--out", model, expect=2)
    assert "does not exist" in line(room / "none", *out)
    assert "is a file" in run(capsys, "quantize", model, "--out", room / "text.jsonl", expect=2)
    assert "invalid choice" in line(model, *out, "--bits", 5)
    assert "standard input can be read once" in line(model, *out, "--eval", "-")
    (room / "short.txt").write_text("배")
    assert "64 are the least" in line(model, *out, "--bits", 4, "--text", room / "short.txt")
    run(capsys, "quantize", model, "--out", room / "packed")
    assert "quantised already" in line(room / "packed", *out)
    assert "quantised" in run(capsys, "sft", room / "packed", room / "text.jsonl", "--out", room / "out", expect=2)
    assert not (room / "out").exists()
    shutil.copytree(model, room / "bad")
    tensors = load_file(room / "bad" / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"][0, 0] = float("inf")
    save_file(tensors, room / "bad" / "model.safetensors", {"format": "pt"})
    assert "layers.0.self_attn.o_proj: its weights are not finite" in line(room / "bad", *out)


def test_interrupted_work_leaves_no_folder(room, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("twelve.calibrate.gptq_experts", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize(room / "model", room / "out", bits=4, texts=[room / "text.jsonl"])
    assert not (room / "out").exists()


def test_calibration_windows_begin_documents_as_training_does(tokenizer, tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": "배 열두 척"}) + "\n" for _ in range(30)))
    one = [*tokenizer.start_ids, *tokenizer.encode("배 열두 척", control=False)]
    ids = calibration(tokenizer, [tmp_path / "t.jsonl"], 16, limit=20)
    assert ids.shape[1] == 16 and ids.flatten().tolist() == (one * 20)[: ids.numel()]


def test_packs_share_the_buffers_memory():
    model = model_of("llama-tied")
    quantize_model(model, INT4, INT8)
    [packed] = packs(model.layers[0].mlp.up_proj)
    assert packed.weights.data_ptr() == model.layers[0].mlp.up_proj.packed_weight.data_ptr()
    assert {name.rsplit(".", 1)[-1] for name, _ in model.named_parameters()} == {"weight"}
    assert all(parameter.dim() == 1 for parameter in model.parameters())
