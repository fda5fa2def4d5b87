"""GGUF files of ours: blocks and structure against the `gguf` package, models against transformers, what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import twelve
from twelve import cli
from twelve.config import small_v3
from twelve.convert.card import origin
from twelve.convert.gguf import GGUFFile
from twelve.convert.gguf_blocks import BLOCK_TYPES
from twelve.convert.gguf_config import metadata
from twelve.convert.gguf_export import export
from twelve.convert.gguf_tokenizer import SPLITS, _cutting, read_tokenizer, tokenizer_metadata
from twelve.convert.gguf_write import Entry, write_gguf
from twelve.data.tokenizer import Tokenizer
from twelve.errors import InputError
from twelve.model.transformer import Transformer
from twelve.quantize import dequantize

gguf = pytest.importorskip("gguf")
TYPES = {block.name: block for block in BLOCK_TYPES.values()}
WRITTEN = [name for name, block in TYPES.items() if block.write]


# --- the file ---------------------------------------------------------------------------------------------------------


def difficult(kind: str) -> np.ndarray:
    """Rows of many sizes, zeros, single values, ties, the largest and the smallest numbers."""
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(40, 96)) * 10.0 ** rng.integers(-6, 4, (40, 1))).astype(np.float32)
    rows[0], rows[1, :32], rows[2, 5:] = 0, -1.5, 0
    rows[3] = np.tile(np.arange(-16, 16) / 2, 3)  # with ties between two integers
    rows[4, ::7] = 65504
    rows[5] = 1e-30 if kind in ("F32", "BF16") else 1e-7
    return rows


@pytest.mark.parametrize("kind", WRITTEN)
def test_blocks_equal_the_reference(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("twelve.convert.gguf_write.CHUNK", 7 * 32)
    data = {"matrix": difficult(kind), "stack": difficult(kind)[:36].reshape(3, 12, 96)}
    entries = [Entry(name, value.shape, TYPES[kind]) for name, value in data.items()]
    write_gguf(tmp_path / "a.gguf", {"general.architecture": "llama"}, entries, map(torch.from_numpy, data.values()))
    for found in gguf.GGUFReader(tmp_path / "a.gguf").tensors:
        wanted = data[found.name]
        assert tuple(found.shape[::-1]) == wanted.shape and found.tensor_type.name == kind
        assert np.array_equal(found.data.view(np.uint8), gguf.quantize(wanted, found.tensor_type).view(np.uint8))


def test_metadata_equals_what_the_package_reads(tmp_path):
    values = {
        "general.architecture": "llama", "a.int": 7, "a.float": 0.5, "a.text": "한글", "a.yes": True, "a.no": False,
        "a.list": [1, -2, 3], "a.words": ["x", "é", ""], "a.floats": [0.5, 1.5], "a.none": [], "a.flags": [True, False],
    }  # fmt: skip
    x, y = torch.randn(3, 5), torch.randn(7)
    entries = [Entry("x", (3, 5), TYPES["F32"]), Entry("y", (7,), TYPES["F16"])]
    write_gguf(tmp_path / "a.gguf", values, entries, [x, y])
    theirs, ours = gguf.GGUFReader(tmp_path / "a.gguf"), GGUFFile(tmp_path / "a.gguf")
    for key, value in values.items():
        assert ours.metadata[key] == value and (value == [] or theirs.fields[key].contents() == value), key
    assert np.array_equal(theirs.tensors[0].data, x.numpy()) and torch.equal(ours.tensor("y"), y.half().float())
    assert (tmp_path / "a.gguf").stat().st_size % 32 == 0


@pytest.mark.parametrize("value", [2**32, -1, 1e39, [2**31]])
def test_values_of_more_than_32_bits_leave_no_file(value, tmp_path):
    with pytest.raises(InputError, match="a.key is .*: a GGUF file has 32 bits for it"):
        write_gguf(tmp_path / "a.gguf", {"a.key": value}, [], [])
    assert not list(tmp_path.iterdir())


RANGE, BROKEN = "its weights.*--dtype float32", "some of its weights are no numbers: the model is damaged"


@pytest.mark.parametrize(("kind", "bad", "words"), [
    ("F16", 7e4, RANGE), ("Q4_0", float("-inf"), RANGE), ("Q8_0", float("nan"), BROKEN), ("F32", float("nan"), BROKEN),
])  # fmt: skip
def test_weights_that_a_type_cannot_hold_leave_no_file(kind, bad, words, tmp_path):
    good, wrong = torch.ones(2, 32), torch.full((2, 32), bad)
    entries = [Entry("good", (2, 32), TYPES[kind]), Entry("wrong", (2, 32), TYPES[kind])]
    with pytest.raises(InputError, match=f"wrong: {words}"):
        write_gguf(tmp_path / "a.gguf", {}, entries, [good, wrong])
    assert not list(tmp_path.iterdir())


# --- models -----------------------------------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")
from families import CASES, difference, peer  # noqa: E402

REFUSED = {
    "v3-tied-bias": "no biases", "v3-halves-unnormalised": "rope_interleave", "v3-mscales-differ": "YaRN",
    "v2-groups-qlora-yarn": "two best", "v2-tied-bias": "no biases", "qwen3-bias-yarn": "no such biases in qwen3",
}  # fmt: skip


def folder_of(case: str, tokenizer: Tokenizer, path):
    """A transformers model, and a folder with it and a tokenizer."""
    theirs = peer(*CASES[case])
    theirs.save_pretrained(path)
    ours, _ = twelve.load(path)
    twelve.save(ours, tokenizer, path)
    return theirs


@pytest.mark.parametrize("case", [case for case in CASES if case not in REFUSED])
def test_a_model_comes_back_bit_for_bit(case, tokenizer, tmp_path, capsys):
    theirs = folder_of(case, tokenizer, tmp_path / "folder")
    result = export(tmp_path / "folder", tmp_path / "model.gguf")
    assert result["bytes"] == (tmp_path / "model.gguf").stat().st_size and result["type"] == "F32"
    ours, words = twelve.load(tmp_path / "model.gguf", device="cpu")
    assert difference(ours, theirs) <= 1e-4
    source, _ = twelve.load(tmp_path / "folder", device="cpu")
    mine, wanted = ours.state_dict(), source.state_dict()
    assert mine.keys() == wanted.keys() and all(torch.equal(mine[name], wanted[name]) for name in mine)
    same = {"n_group": None, "topk_group": None, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
            "num_key_value_heads": 4 if source.config.is_mla else source.config.num_key_value_heads}  # fmt: skip
    found, expected = (replace(model.config, **same).to_dict() for model in (ours, source))
    rope, wanted_rope = found.pop("rope_parameters"), expected.pop("rope_parameters")
    assert rope == {key: value for key, value in wanted_rope.items() if key in rope}
    if case == "v3-all-dense":
        assert found["n_routed_experts"] is None and expected["n_routed_experts"] == 12  # which no layer has
    else:
        assert found == expected
    assert words.encode("배 열두 척이<|im_end|>7") == tokenizer.encode("배 열두 척이<|im_end|>7")
    assert [remark for remark in result["remarks"] if remark in capsys.readouterr().err] == result["remarks"]
    assert bool(result["remarks"]) == (case == "v2-greedy")


def test_numbers_of_layers_that_llama_cpp_takes_for_v2_lite_have_no_latent_of_queries():
    sizes = ((26, 300, True), (27, 300, True), (48, 128256, True), (25, 300, False), (48, 300, False))
    for layers, vocabulary, refused in sizes:
        config = replace(small_v3(vocabulary, 64, layers, 0), q_lora_rank=32)
        assert metadata(replace(config, q_lora_rank=None))
        if refused:
            with pytest.raises(InputError, match="like V2-Lite, without a latent of queries"):
                metadata(config)
        else:
            assert metadata(config)


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_run_wrongly_is_refused(case, tokenizer, tmp_path):
    folder_of(case, tokenizer, tmp_path / "folder")
    with pytest.raises(InputError, match=f"cannot become a GGUF file: .*{REFUSED[case]}") as caught:
        export(tmp_path / "folder", tmp_path / "model.gguf")
    assert "\n" not in str(caught.value) and not (tmp_path / "model.gguf").exists()


def own(tokenizer: Tokenizer, path, **changed) -> Transformer:
    """A model of ours in a folder; changed: keys of its config."""
    switches = {key: changed.pop(key) for key in list(changed) if key.startswith(("hc_", "engram_"))}
    config = small_v3(tokenizer.vocab_size + 8, width=64, layers=3, experts=8, experts_per_token=2, **switches)
    model = Transformer(replace(config, **changed))
    if model.memory is not None:
        model.memory.use_tokenizer(tokenizer)
    model.init_weights(0)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.1)
    twelve.save(model, tokenizer, path)
    return model


@pytest.mark.parametrize(("changed", "message"), [
    ({"hc_mult": 2}, "no hyper-connections"), ({"engram_layer_ids": [1]}, "no Engram memory"),
    ({"n_shared_experts": None}, "wants a shared expert"), ({"n_group": 8, "topk_group": 4}, "two best"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "no linear positions in latent"),
    ({"kv_lora_rank": None}, "no deepseek_v3 without latent"),
])  # fmt: skip
def test_our_switches_are_refused(changed, message, tokenizer, tmp_path):
    own(tokenizer, tmp_path / "folder", **changed)
    with pytest.raises(InputError, match=message):
        export(tmp_path / "folder", tmp_path / "model.gguf")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0", "q4_0"])
def test_types_of_tensors(dtype, tokenizer, tmp_path, capsys):
    """Vectors and routers stay float32, odd rows become F16, and of q4_0 what hurts most stays in 8 bits."""
    model = own(tokenizer, tmp_path / "folder", q_lora_rank=48, n_group=2, topk_group=1)
    result = export(tmp_path / "folder", tmp_path / "model.gguf", dtype)
    kind = {"float16": "F16", "bfloat16": "BF16"}.get(dtype, dtype.upper())
    tensors = {one.name: one for one in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    for name, tensor in tensors.items():
        wanted = kind
        if len(tensor.shape) == 1 or name.endswith("ffn_gate_inp.weight"):
            wanted = "F32"
        elif name.endswith("attn_q_b.weight") and dtype.startswith("q"):
            wanted = "F16"
        elif dtype == "q4_0" and (name.endswith(("k_b.weight", "v_b.weight")) or not name.startswith("blk.")):
            wanted = "Q8_0"
        assert tensor.tensor_type.name == wanted, name
    assert ("attn_q_b.weight" in capsys.readouterr().err) == bool(result["remarks"]) == dtype.startswith("q")
    stack = tensors["blk.2.ffn_down_exps.weight"]
    down = model.layers[2].mlp.experts.down_proj.detach().numpy()
    assert np.array_equal(stack.data.view(np.uint8), gguf.quantize(down, stack.tensor_type).view(np.uint8))
    again, _ = twelve.load(tmp_path / "model.gguf")
    assert again.config.n_group == 2 and again.config.topk_group == 1
    routers = (one.layers[2].mlp.gate for one in (again, model))
    assert torch.equal(*(router.e_score_correction_bias for router in routers))


def test_mtp_modules_are_left_out_and_that_is_said(tokenizer, tmp_path, capsys):
    model = own(tokenizer, tmp_path / "folder", num_nextn_predict_layers=1)
    result = export(tmp_path / "folder", tmp_path / "model.gguf")
    assert "1 MTP module(s)" in result["remarks"][0] and result["remarks"][0] in capsys.readouterr().err
    again, _ = twelve.load(tmp_path / "model.gguf")
    assert again.config.num_nextn_predict_layers == 0 and len(again.mtp) == 0
    ids = torch.randint(0, 300, (1, 12))
    with torch.no_grad():
        assert torch.equal(again(ids), model.eval()(ids))


def test_a_packed_folder_gives_its_floats(tokenizer, tmp_path):
    from twelve.calibrate import quantize

    own(tokenizer, tmp_path / "folder")
    quantize(tmp_path / "folder", tmp_path / "packed", bits=4)
    export(tmp_path / "packed", tmp_path / "model.gguf")
    wanted, _ = twelve.load(tmp_path / "packed", device="cpu")
    dequantize(wanted)
    found = twelve.load(tmp_path / "model.gguf", device="cpu")[0].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.state_dict().items())


def test_a_gguf_file_becomes_another(tokenizer, tmp_path):
    own(tokenizer, tmp_path / "folder")
    export(tmp_path / "folder", tmp_path / "a.gguf", "q8_0")
    export(tmp_path / "a.gguf", tmp_path / "b.gguf", "q8_0")
    first, second = (gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors for name in "ab")
    assert [one.name for one in first] == [one.name for one in second]
    assert all(np.array_equal(one.data, two.data) for one, two in zip(first, second, strict=True))


def test_licence_languages_and_ends_come_along(tokenizer, tmp_path):
    own(tokenizer, tmp_path / "folder")
    (tmp_path / "folder" / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [ko, en]\n---\n")
    path = tmp_path / "folder" / "generation_config.json"
    end = tokenizer.encode("7", control=False)[0]
    path.write_text(json.dumps({"eos_token_id": [*json.loads(path.read_text())["eos_token_id"], end]}))
    source = Tokenizer.load(tmp_path / "folder")
    export(tmp_path / "folder", tmp_path / "a.gguf")
    assert origin(tmp_path / "a.gguf") == {"license": ["apache-2.0"], "language": ["ko", "en"]}
    assert end in source.stop_ids and read_tokenizer(GGUFFile(tmp_path / "a.gguf")).stop_ids == source.stop_ids


def test_a_bias_may_correct_scores_by_softmax(tokenizer, tmp_path):
    config = replace(small_v3(tokenizer.vocab_size, width=64, layers=2, experts=4), scoring_func="softmax")
    model = Transformer(config).init_weights(0).eval()
    twelve.save(model, tokenizer, tmp_path / "folder")
    export(tmp_path / "folder", tmp_path / "a.gguf")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert (twelve.load(tmp_path / "a.gguf", device="cpu")[0](ids) - model(ids)).abs().max() <= 1e-5


def test_the_verb(tokenizer, tmp_path, capsys):
    own(tokenizer, tmp_path / "folder")
    folder, file = str(tmp_path / "folder"), str(tmp_path / "model.gguf")
    assert cli.main(["convert", folder, "--out", file, "--dtype", "q8_0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["architecture"] == "deepseek2"
    twelve.save(Transformer(small_v3(300, width=64, layers=1, experts=0)), None, tmp_path / "mute")
    (tmp_path / "dir.gguf").mkdir()
    for arguments, message in (
        ([folder, "--out", str(tmp_path / "new"), "--dtype", "q4_0"], "--dtype q4_0 is for a .gguf file"),
        ([str(tmp_path / "mute"), "--out", file], "has no tokenizer, and a GGUF file needs one"),
        ([file, "--out", file], "is the model to read"),
        ([folder, "--out", str(tmp_path / "new"), "--text", "a.txt"], "--text shows what a smaller model must keep"),
        ([folder, "--out", str(tmp_path / "dir.gguf")], "is a folder, not a .gguf file"),
    ):
        assert cli.main(["convert", *arguments]) == 2
        assert message in capsys.readouterr().err


# --- tokenizers -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def through(tokenizer, tmp_path_factory) -> Tokenizer:
    """Ours, written and read."""
    path = tmp_path_factory.mktemp("tokenizer") / "a.gguf"
    write_gguf(path, tokenizer_metadata(tokenizer, tokenizer.vocab_size + 3), [], [])
    return read_tokenizer(GGUFFile(path))


@given(text=st.text(max_size=60).map(lambda text: f"배 12<think>{text}<|im_end|>"))
def test_ids_are_the_same(tokenizer, through, text):
    assert through.encode(text) == tokenizer.encode(text)
    assert through.encode(text, control=False) == tokenizer.encode(text, control=False)
    assert through.decode(tokenizer.encode(text), skip_special=False) == tokenizer.decode(
        tokenizer.encode(text), skip_special=False
    )


def test_special_tokens_and_template_are_the_same(tokenizer, through):
    for key in ("bos_id", "eos_id", "pad_id", "chat_template", "control_tokens", "stop_ids", "prefix_ids", "start_ids"):
        assert getattr(through, key) == getattr(tokenizer, key), key
    assert through.vocab_size == tokenizer.vocab_size + 3


@pytest.mark.parametrize("split", SPLITS)
def test_names_of_cuttings(split, tokenizer, tmp_path):
    """A tokenizer that cuts in a known way is named by it; any other is refused, and so is another way of merging."""
    content = json.loads(tokenizer.to_json())
    whole = split.startswith("llama")
    content["pre_tokenizer"] = json.loads(_with(_cutting(split)))["pre_tokenizer"]
    content["model"]["ignore_merges"] = whole
    keys = tokenizer_metadata(Tokenizer.from_json(json.dumps(content)), 400)
    assert SPLITS[keys["tokenizer.ggml.pre"]] == SPLITS[split]
    content["model"]["ignore_merges"] = not whole
    with pytest.raises(InputError, match="merges words otherwise"):
        tokenizer_metadata(Tokenizer.from_json(json.dumps(content)), 400)


@pytest.mark.parametrize(("changed", "message"), [
    ({"pre_tokenizer": {"type": "Whitespace"}}, "no name for how this tokenizer cuts"),
    ({"pre_tokenizer": None}, "no name for how this tokenizer cuts"),
    ({"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, "of another kind"),
])  # fmt: skip
def test_other_tokenizers_are_refused(changed, message, tokenizer):
    content = json.loads(tokenizer.to_json()) | changed
    with pytest.raises(InputError, match=message):
        tokenizer_metadata(Tokenizer.from_json(json.dumps(content)), 400)


def _with(cutting) -> str:
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = cutting
    return backend.to_str()


def test_the_same_weights_give_the_same_bytes(tokenizer, tmp_path):
    own(tokenizer, tmp_path / "folder")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        export(tmp_path / "folder", tmp_path / name / "model.gguf", "q4_0")
    assert (tmp_path / "a" / "model.gguf").read_bytes() == (tmp_path / "b" / "model.gguf").read_bytes()
