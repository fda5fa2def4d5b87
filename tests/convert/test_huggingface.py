"""Folders of the five families against transformers, both ways; what is wrong in a folder is named in one line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import twelve
from twelve.config import ModelConfig
from twelve.convert.huggingface import disk_tensors, pieces
from twelve.errors import InputError
from twelve.model.transformer import Transformer

transformers = pytest.importorskip("transformers")
from families import CASES, GQA, V3, V3_GROUPS, YARN, difference, peer, random_ids, randomise  # noqa: E402


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.disable_progress_bar()


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_both_ways(case, tmp_path):
    theirs = peer(*CASES[case])
    theirs.save_pretrained(tmp_path / "theirs")
    ours, tokenizer = twelve.load(tmp_path / "theirs")
    assert tokenizer is None
    assert difference(ours, theirs) <= 1e-4

    twelve.save(ours, None, tmp_path / "ours")
    back, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values()), report
    assert difference(ours, back) <= 1e-4
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name
    again, _ = twelve.load(tmp_path / "ours")
    assert again.config.to_dict() == ours.config.to_dict()


@pytest.mark.parametrize("tied", [False, True])
def test_mtp_agrees_with_transformers(tied, tmp_path, monkeypatch):
    from transformers.modeling_layers import MtpModel
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3PreTrainedModel

    ours = model_of(V3_GROUPS | {"num_nextn_predict_layers": 2, "tie_word_embeddings": tied})
    twelve.save(ours, None, tmp_path)
    # transformers knows MTP layers by name, and only those of DeepSeek's 61-layer model
    monkeypatch.setattr(DeepseekV3PreTrainedModel, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.[34]\..*"])
    main = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    modules = MtpModel.from_pretrained(main)
    ids = random_ids()
    with torch.no_grad():
        states = main.model(ids).last_hidden_state
        for k, logits in enumerate(ours.mtp_logits(ids), start=1):
            following = ids[:, k:]
            places = torch.arange(k, ids.shape[1])[None]
            states = modules.forward_layer(k - 1, states[:, : following.shape[1]], places, None, input_ids=following)
            assert (modules._project_to_logits(states) - logits).abs().max() <= 1e-4
    again, _ = twelve.load(tmp_path)
    assert again.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), again.state_dict().values(), strict=True))


def test_names_on_disk_are_those_of_the_v3_release():
    ours = model_of(V3 | {"num_nextn_predict_layers": 1, "first_k_dense_replace": 1})
    names = dict(disk_tensors(ours))
    for name, shape in {
        "model.embed_tokens.weight": (1003, 48),
        "model.layers.0.mlp.gate_proj.weight": (72, 48),
        "model.layers.1.mlp.gate.e_score_correction_bias": (12,),
        "model.layers.1.mlp.experts.11.up_proj.weight": (28, 48),
        "model.layers.1.mlp.shared_experts.down_proj.weight": (48, 56),
        "model.layers.3.eh_proj.weight": (48, 96),
        "model.layers.3.enorm.weight": (48,),
        "model.layers.3.shared_head.norm.weight": (48,),
        "model.layers.3.shared_head.head.weight": (1003, 48),
        "model.layers.3.embed_tokens.weight": (1003, 48),
        "model.layers.3.mlp.experts.0.gate_proj.weight": (28, 48),
        "lm_head.weight": (1003, 48),
    }.items():
        assert tuple(names[name].shape) == shape, name
    gate_up = ours.layers[1].mlp.experts.gate_up_proj
    assert torch.equal(names["model.layers.1.mlp.experts.2.gate_proj.weight"], gate_up[2, :28])
    parts = dict(pieces("layers.1.mlp.experts.gate_up_proj", gate_up, ours.config))
    assert parts["model.layers.1.mlp.experts.2.up_proj.weight"].data_ptr() == gate_up[2, 28:].data_ptr()  # a view


def test_the_older_spelling_of_a_config_is_read(tmp_path):
    theirs = peer("llama", GQA | {"rope_parameters": YARN})
    theirs.save_pretrained(tmp_path)

    def older(values):
        rope = values.pop("rope_parameters")
        values["rope_theta"] = rope.pop("rope_theta")
        values["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
        values["torch_dtype"] = values.pop("dtype")

    edit_config(tmp_path, older)
    ours, _ = twelve.load(tmp_path)
    assert difference(ours, theirs) <= 1e-4


def test_a_config_without_mtp_says_so(tmp_path):
    twelve.save(model_of(V3), None, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["num_nextn_predict_layers"] == 0  # transformers' own default is 1
    assert values["architectures"] == ["DeepseekV3ForCausalLM"]


def test_mtp_modules_that_are_announced_and_absent_are_left_out(tmp_path):
    """transformers writes `num_nextn_predict_layers: 1` for a model it saves without the module."""
    theirs = peer("deepseek_v3", V3 | {"num_nextn_predict_layers": 1})
    theirs.save_pretrained(tmp_path)
    ours, _ = twelve.load(tmp_path)
    assert ours.config.num_nextn_predict_layers == 0
    assert difference(ours, theirs) <= 1e-4


def test_a_dense_model_of_v3s_shape_loads_in_transformers(tmp_path):
    dense = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size")
    ours = model_of(V3 | dict.fromkeys(dense) | {"first_k_dense_replace": 0, "n_group": None})
    twelve.save(ours, None, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert difference(ours, theirs) <= 1e-4
    again, _ = twelve.load(tmp_path)
    assert again.config.n_routed_experts is None


def test_dtype_is_chosen_by_the_caller_and_the_routers_bias_stays_float32(tmp_path):
    theirs = peer("deepseek_v3", V3).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    assert twelve.load(tmp_path)[0].lm_head.weight.dtype == torch.float32
    ours, _ = twelve.load(tmp_path, dtype=torch.bfloat16)
    assert ours.lm_head.weight.dtype == torch.bfloat16
    assert ours.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert ours(random_ids()).isfinite().all()
    twelve.save(ours, None, tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16


def test_weights_beyond_float16_are_not_made_infinite(tmp_path):
    model = model_of(GQA, "llama")
    model.layers[1].mlp.up_proj.weight.data[3, 4] = 7e4
    twelve.save(model, None, tmp_path)
    assert twelve.load(tmp_path, dtype=torch.bfloat16)[0].layers[1].mlp.up_proj.weight.isfinite().all()
    with pytest.raises(InputError, match=r"layers.1.mlp.up_proj.weight' is not all within float16's range"):
        twelve.load(tmp_path, dtype=torch.float16)


def test_tied_weights_stored_twice_must_be_equal(tmp_path):
    twelve.save(model_of(GQA | {"tie_word_embeddings": True}, "llama"), None, tmp_path)
    edit_weights(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    twelve.load(tmp_path)
    edit_weights(tmp_path, lambda t: t["lm_head.weight"].add_(1))
    refused(tmp_path, "lm_head.weight is not the embedding")


def test_rotary_buffers_of_old_checkpoints_are_ignored(tmp_path):
    twelve.save(model_of(GQA, "llama"), None, tmp_path)
    edit_weights(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}))
    twelve.load(tmp_path)


DOWN, UP = "model.layers.2.mlp.experts.0.down_proj.weight", "model.layers.1.mlp.experts.3.up_proj.weight"
COPY, HNORM = "model.layers.3.embed_tokens.weight", "model.layers.3.hnorm.weight"
WRONG_WEIGHTS = {  # change to the tensors on disk: what the message says
    "missing": (lambda t: t.pop(UP), r"layers.1.mlp.experts.3.up_proj.*missing"),
    "unexpected": (lambda t: t.update(extra=torch.ones(2, 3)), r"unexpected tensor 'extra' \[2, 3\]"),
    "shape": (lambda t: t.update({"model.norm.weight": torch.ones(47)}), r"'model.norm.weight' is \[47\].*\[48\]"),
    "one expert's shape": (lambda t: t.update({DOWN: torch.ones(48, 27)}), r"weight' is \[48, 27\].*\[48, 28\]"),
    "an MTP copy's shape": (lambda t: t.update({COPY: torch.ones(9, 48)}), r"\[9, 48\].*\[1003, 48\]"),
    "half of an MTP module": (lambda t: t.pop(HNORM), r"hnorm.weight.*missing; config.json announces 1"),
    "8-bit floats": (lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), "stored as F8_E4M3"),
    "integers": (lambda t: t.update({UP: t[UP].to(torch.int8)}), "stored as I8"),
}


@pytest.mark.parametrize("wrong", WRONG_WEIGHTS)
def test_wrong_weights_are_named(wrong, tmp_path):
    change, message = WRONG_WEIGHTS[wrong]
    twelve.save(model_of(V3 | {"num_nextn_predict_layers": 1}), None, tmp_path)
    edit_weights(tmp_path, change)
    refused(tmp_path, message)


def test_a_cut_safetensors_file_is_named(tmp_path):
    twelve.save(model_of(GQA, "llama"), None, tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(tmp_path, "model.safetensors is damaged or cut short")
    path.write_bytes(b"\xff" * 4096)
    refused(tmp_path, "model.safetensors is damaged or cut short")


WRONG_CONFIGS = {
    "family": ({"model_type": "mamba"}, "unknown model_type 'mamba'.*deepseek_v2, deepseek_v3, llama, qwen2, qwen3"),
    "no family": ({"model_type": None}, "model_type must be str, not None"),
    "quantised": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised weights.*'gptq'"),
    "fp8 without blocks": ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size.*not None"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "rope type": ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope_type 'longrope'"),
    "old rope type": ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    "rope per layer": ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ between layers"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "window": ({"use_sliding_window": True}, "sliding-window"),
    "layer types": ({"layer_types": ["sliding_attention"] * 3}, "sliding-window"),
    "alternate layers": ({"moe_layer_freq": 2}, "moe_layer_freq 2"),
    "type of a number": ({"hidden_size": "48"}, "hidden_size must be int, not '48'"),
    "type of a norm": ({"rms_norm_eps": None}, "rms_norm_eps must be float, not None"),
    "type of a switch": ({"attention_bias": "no"}, "attention_bias must be bool"),
    "type of a rope number": ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor must be a number"),
    "a switch for a rope number": ({"rope_parameters": {"rope_type": "linear", "factor": True}}, "number, not True"),
    "a rope number is missing": ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "missing"),
    "a rope number is zero": ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "no finite frequencies"),
    "type of the rope": ({"rope_parameters": [1, 2]}, "wrong type"),
    "sizes": ({"num_key_value_heads": 3}, "num_key_value_heads"),
    "no number": ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be float, not nan"),
    "below zero": ({"n_shared_experts": -1}, "n_shared_experts -1 is no possible size"),
    "too many bytes": ({"intermediate_size": 2**63}, "intermediate_size 9223372036854775808 is no possible size"),
    "too many positions": ({"head_dim": 2**31}, "head_dim 2147483648 is no possible size"),
    "too many tokens": ({"vocab_size": 2**31}, "vocab_size 2147483648 is no possible size"),
}


@pytest.mark.parametrize("wrong", WRONG_CONFIGS)
def test_wrong_configs_are_named(wrong, tmp_path):
    values, message = WRONG_CONFIGS[wrong]
    twelve.save(model_of(GQA, "llama"), None, tmp_path)
    edit_config(tmp_path, lambda config: config.update(values))
    refused(tmp_path, rf"config.json.*{message}")


@pytest.mark.parametrize("text", ["", "{", "[]", '"text"', "\xff"])
def test_a_config_that_is_no_object_is_named(text, tmp_path):
    twelve.save(model_of(GQA, "llama"), None, tmp_path)
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    refused(tmp_path, "config.json.* is not")


def model_of(values: dict, family: str = "deepseek_v3") -> Transformer:
    model = Transformer(ModelConfig.from_dict({"model_type": family, **values})).eval()
    randomise(model)
    return model


def edit_config(folder, change) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def edit_weights(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(folder, message: str) -> None:
    """Loading raises InputError of one line that matches `message`."""
    with pytest.raises(InputError, match=message) as caught:
        twelve.load(folder)
    assert "\n" not in str(caught.value)
