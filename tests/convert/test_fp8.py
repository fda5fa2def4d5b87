"""Weights in 8-bit floats with a scale for every block, as DeepSeek-V3 was released: read as floats, or refused."""

import json

import pytest
import torch
from families import V3
from safetensors.torch import load_file, save_file

import twelve
from twelve.config import ModelConfig, deepseek_v3
from twelve.convert import require_floats
from twelve.convert.folder import _without_memory
from twelve.convert.fp8 import dequantize, scale_shape
from twelve.convert.huggingface import config_from, disk_tensors
from twelve.errors import InputError
from twelve.model.transformer import Transformer

BLOCK = (16, 8)
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": list(BLOCK)}
RELEASED = {  # what DeepSeek-V3's config.json has beside the sizes
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config", "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "aux_loss_alpha": 0.001, "ep_size": 1, "hidden_act": "silu", "initializer_range": 0.02, "moe_layer_freq": 1,
    "model_type": "deepseek_v3", "norm_topk_prob": True, "pretraining_tp": 1, "rms_norm_eps": 1e-06,
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True,
    "tie_word_embeddings": False, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1", "use_cache": True, "quantization_config": FP8 | {"weight_block_size": [128, 128]},
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
}  # fmt: skip
SIZES = {
    "bos_token_id": 0, "eos_token_id": 1, "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_attention_heads": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "topk_group": 4, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
SMALL = V3 | {"num_nextn_predict_layers": 1, "n_group": 4, "topk_group": 2, "q_lora_rank": 18}


def packed(weight: torch.Tensor, block=BLOCK, powers: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Plainly, block by block: the largest of each becomes 448, the largest of the type."""
    rows, columns = weight.shape
    scale = torch.empty(scale_shape((rows, columns), block))
    out = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(0, rows, block[0]):
        for j in range(0, columns, block[1]):
            part = weight[i : i + block[0], j : j + block[1]]
            each = part.abs().max() / 448
            each = torch.exp2(torch.log2(each).ceil()) if powers else each
            scale[i // block[0], j // block[1]] = each
            out[i : i + block[0], j : j + block[1]] = (part / each).to(torch.float8_e4m3fn)
    return out, scale


def reference(weight: torch.Tensor, scale: torch.Tensor, block=BLOCK) -> torch.Tensor:
    """Number by number."""
    out = torch.empty(weight.shape)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            out[i, j] = weight[i, j].float() * scale[i // block[0], j // block[1]].float()
    return out


@pytest.mark.parametrize("powers", [False, True])
@pytest.mark.parametrize("shape", [(32, 16), (33, 17), (16, 7), (1, 1), (47, 48)])
def test_blocks_equal_the_plain_reference(shape, powers):
    weight, scale = packed(torch.randn(shape), powers=powers)
    found = dequantize(weight, scale, BLOCK)
    assert found.dtype == torch.float32 and torch.equal(found, reference(weight, scale))


def test_a_block_that_is_larger_than_the_matrix_takes_no_more_memory():
    weight = torch.randn(48, 40).to(torch.float8_e4m3fn)
    for block, shape in (((10**15, 10**15), (1, 1)), ((16, 10**15), (3, 1)), ((10**30, 8), (1, 5))):
        scale = torch.rand(shape)
        assert torch.equal(dequantize(weight, scale, block), reference(weight, scale, tuple(min(x, 99) for x in block)))


def test_scales_that_are_exponents_alone_equal_those_in_float32():
    weight, scale = packed(torch.randn(40, 20), powers=True)
    exponents = scale.to(torch.float8_e8m0fnu)
    assert torch.equal(dequantize(weight, exponents, BLOCK), dequantize(weight, scale, BLOCK))


def test_the_error_is_that_of_three_bits_of_mantissa():
    weight = torch.randn(64, 64)
    found = dequantize(*packed(weight), BLOCK)
    assert 0 < (found - weight).abs().max() / weight.abs().max() <= 1 / 16


def write_released(folder, scale_dtype=torch.float32, powers: bool = False, shard_bytes: int = 10**9) -> Transformer:
    """Write a small model as DeepSeek wrote theirs, most matrices in FP8 and the rest in BF16; return what should be
    read."""
    torch.manual_seed(0)
    config = ModelConfig.from_dict({"model_type": "deepseek_v3", **SMALL})
    model = Transformer(config).init_weights(0).eval().to(torch.bfloat16)
    twelve.save(model, None, folder, shard_bytes=shard_bytes)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in list(tensors.items()):
            plain = ("embed_tokens", "lm_head", "head.weight", "mlp.gate.weight", "eh_proj", "norm")
            if tensor.dim() == 2 and not any(word in name for word in plain):
                tensors[name], scale = packed(tensor.float(), powers=powers)
                tensors[name + "_scale_inv"] = scale.to(scale_dtype)
        save_file(tensors, path, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        where = {name: path.name for path in folder.glob("*.safetensors") for name in load_file(path)}
        index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    values = {name: value for name, value in SMALL.items() if name != "rope_parameters"}
    entry = FP8 | ({"scale_fmt": "ue8m0"} if powers else {})  # as V3.1 says it
    (folder / "config.json").write_text(json.dumps(RELEASED | values | {"quantization_config": entry}))
    with torch.no_grad():
        expected = Transformer(config_from(json.loads((folder / "config.json").read_text()))).eval()
        stored = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for name, view in disk_tensors(expected):
            scale = stored.get(name + "_scale_inv")
            if scale is not None:
                rows, columns = view.shape
                blown = torch.kron(scale.float(), torch.ones(BLOCK))[:rows, :columns]
            view.copy_(stored[name] if scale is None else stored[name].float() * blown)
    return expected


@pytest.mark.parametrize(
    ("scale_dtype", "powers"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.float8_e8m0fnu, True)],
)
def test_a_folder_as_deepseek_wrote_it_is_read_exactly(scale_dtype, powers, tmp_path):
    expected = write_released(tmp_path, scale_dtype, powers)
    ours, _ = twelve.load(tmp_path, device="cpu")
    assert ours.config == expected.config and ours.config.num_nextn_predict_layers == 1
    assert ours.config.rope_parameters["rope_type"] == "yarn"
    mine, theirs = ours.state_dict(), expected.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    narrow, _ = twelve.load(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert torch.equal(narrow.layers[1].mlp.experts.down_proj, mine["layers.1.mlp.experts.down_proj"].bfloat16())


def test_scales_may_lie_in_another_shard_and_the_copy_is_plain(tmp_path):
    expected = write_released(tmp_path / "fp8", shard_bytes=60_000)
    assert len(list((tmp_path / "fp8").glob("*.safetensors"))) > 2
    require_floats(tmp_path / "fp8")  # it can be trained
    model, _ = twelve.load(tmp_path / "fp8", device="cpu")
    twelve.save(model, None, tmp_path / "floats")
    assert "quantization_config" not in json.loads((tmp_path / "floats" / "config.json").read_text())
    again, _ = twelve.load(tmp_path / "floats", device="cpu")
    wanted = expected.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in again.state_dict().items())


def test_transformers_dequantises_alike():
    reader = pytest.importorskip("transformers.integrations.finegrained_fp8").Fp8Dequantize(None)
    weight, scale = packed(torch.randn(64, 48))
    assert torch.equal(reader._dequantize_one(weight, scale, torch.float32), dequantize(weight, scale, BLOCK))


def test_the_released_config_is_that_of_the_preset_and_of_671_billion_weights():
    config = config_from(RELEASED | SIZES)
    ours = deepseek_v3()
    assert {**config.to_dict(), "rope_parameters": 0} == {
        **ours.to_dict(), "bos_token_id": 0, "eos_token_id": 1, "rope_parameters": 0
    }  # fmt: skip
    assert config.rope_parameters == ours.rope_parameters
    shapes = {name: tensor.shape for name, tensor in disk_tensors(_without_memory(config))}
    assert shapes["model.layers.61.eh_proj.weight"] == (7168, 14336)
    assert shapes["model.layers.61.shared_head.head.weight"] == (129280, 7168)
    assert shapes["model.layers.60.mlp.experts.255.down_proj.weight"] == (7168, 2048)
    main = sum(shape.numel() for name, shape in shapes.items() if ".layers.61." not in name)
    assert round(main / 1e9, 2) == 671.03


def change(folder, edit) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


NAME = "model.layers.1.self_attn.o_proj.weight"
SCALE = NAME + "_scale_inv"
WRONG = {
    "no scales": (lambda t: t.pop(SCALE), "o_proj.weight.* has no scales"),
    "scales of another shape": (lambda t: t.update({SCALE: torch.ones(2, 2)}), r"has scales \[2, 2\] for blocks"),
    "scales that are no numbers": (lambda t: t.update({SCALE: t[SCALE] / 0}), "_scale_inv' is damaged"),
    "scales of nothing": (lambda t: t.update({"model.norm.weight_scale_inv": torch.ones(1, 1)}), "unexpected tensor"),
    "a vector": (lambda t: t.update({"model.norm.weight": torch.ones(48).to(torch.float8_e4m3fn)}), "norm.weight"),
    "scales in 8 bits": (lambda t: t.update({SCALE: t[SCALE].to(torch.float8_e4m3fn)}), "stored as F8_E4M3, not F32"),
    "integers": (lambda t: t.update({NAME: t[NAME].view(torch.int8)}), "stored as I8"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_fp8_weights_are_named(wrong, tmp_path):
    edit, message = WRONG[wrong]
    write_released(tmp_path)
    change(tmp_path, edit)
    with pytest.raises(InputError, match=message) as caught:
        twelve.load(tmp_path, device="cpu")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "'gptq'"),
        ({"quant_method": "awq"}, "'awq'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'"),
        ({"quant_method": "compressed-tensors"}, "'compressed-tensors'"),
        ({"quant_method": "mxfp4"}, "'mxfp4'"),
        ({"bits": 4}, "None"),
        ("fp8", "None"),
        ({"quant_method": "fp8"}, "weight_block_size"),
        (FP8 | {"weight_block_size": None}, "weight_block_size"),
        (FP8 | {"weight_block_size": [128]}, "weight_block_size"),
        (FP8 | {"weight_block_size": [0, 128]}, "weight_block_size"),
        (FP8 | {"fmt": "e5m2"}, "'e5m2'"),
    ],
)
def test_other_methods_are_refused_by_name(entry, words, tmp_path):
    write_released(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": entry}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=f"quantised weights.*{words}") as caught:
        twelve.load(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)
