"""GGUF: the format against the `gguf` package, damage of every kind, and SmolLM2 against transformers' own loading."""

import functools
import re
import struct
import subprocess
import sys
from itertools import cycle

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

import twelve
from twelve.convert import load_config, resolve
from twelve.convert.gguf import GGUFFile
from twelve.errors import InputError
from twelve.quantize import forms_of

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
from families import GQA, difference, peer  # noqa: E402

TYPES = gguf.GGMLQuantizationType
TEXTS = [
    "안녕하세요, 세상! 오늘은 2024년 3월 15일입니다. 값은 1,234.5원.",
    "Hello world, it's 3.14159 and 10,000 — don't   stop\n\n\tplease.  ",
    "🙂👍🏽 가족 👨‍👩‍👧 emoji ☃️",
    "<|im_start|>user\nWhat is 12+34?<|im_end|>\n<|im_start|>assistant\n",
    "x²½ Ⅳ ٣ 三 한글ㄱㄴ 漢字 ñandú e\u0301",
    "def f(x):\n    return x ** 2  # 제곱\r\n",
    " ",
    "",
]


def write(path, metadata: dict, tensors: dict, architecture: str = "llama") -> None:
    """A GGUF file; tensors: name -> float array, or (array, type) to quantise it."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        kind = {int: "uint32", float: "float32", str: "string", bool: "bool", list: "array"}[type(value)]
        kind = "int32" if type(value) is int and value < 0 else kind
        getattr(writer, f"add_{kind}")(key, value)
    for name, value in tensors.items():
        data, kind = value if isinstance(value, tuple) else (value, TYPES.F32)
        writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_blocks_equal_the_reference(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("twelve.convert.gguf.CHUNK", 7 * 32)  # several chunks, and an uneven last one
    data = (np.random.default_rng(0).normal(size=(5, 3, 96)) * 10).astype(np.float32)
    data[0, 0, :32] = 0
    write(tmp_path / "a.gguf", {}, {"x": (data, TYPES[kind])})
    ours = GGUFFile(tmp_path / "a.gguf").tensor("x").numpy()
    stored = gguf.GGUFReader(tmp_path / "a.gguf").tensors[0].data
    assert np.array_equal(ours, gguf.dequantize(stored, TYPES[kind]).reshape(5, 3, 96))
    assert np.abs(ours - data).max() < 3


@pytest.mark.parametrize("kind", ["Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "Q4_1", "BF16"])
def test_any_bytes_are_the_references_floats(kind, tmp_path, monkeypatch):
    """Bit for bit, with scales of every size and sign; those that are no numbers aside."""
    monkeypatch.setattr("twelve.convert.gguf.CHUNK", 5 * 256)
    size, record = gguf.GGML_QUANT_SIZES[TYPES[kind]]
    stored = np.random.default_rng(1).integers(0, 256, (3, 7, 1024 // size * record), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("x", stored, raw_dtype=TYPES[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with np.errstate(all="ignore"):
        ours, theirs = GGUFFile(tmp_path / "a.gguf"), gguf.dequantize(stored, TYPES[kind])
        whole, slices = ours.tensor("x").numpy(), [ours.tensor("x", index).numpy() for index in range(3)]
    assert whole.shape == theirs.shape == (3, 7, 1024) and np.isfinite(theirs).mean() > 0.5
    numbers = ~np.isnan(theirs)
    assert np.array_equal(whole.view(np.uint32)[numbers], theirs.view(np.uint32)[numbers])
    assert np.array_equal(np.isnan(whole), ~numbers)
    assert np.array_equal(np.stack(slices), whole, equal_nan=True)


def test_metadata_equals_what_was_written(tmp_path):
    values = {"a.int": 7, "a.float": 0.5, "a.text": "한글", "a.yes": True, "a.list": [1, 2, 3], "a.words": ["x", "é"]}
    write(tmp_path / "a.gguf", values, {"x": np.ones((2, 3), np.float32), "s": np.ones(1, np.float32)})
    file = GGUFFile(tmp_path / "a.gguf")
    assert {key: file.metadata[key] for key in values} == values
    assert file.tensors["x"].shape == (2, 3) and file.tensor("s").tolist() == [1.0]


def test_a_file_cut_anywhere_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {name: (rng.normal(size=(4, 64)).astype(np.float32), TYPES.Q4_1) for name in ("x", "y")}
    write(tmp_path / "a.gguf", {"a.words": ["one", "two"], "a.list": [1, 2, 3]}, tensors)
    whole = (tmp_path / "a.gguf").read_bytes()
    last = GGUFFile(tmp_path / "a.gguf").tensors["y"].start + 4 * 2 * 20  # padding follows
    cut = tmp_path / "cut.gguf"
    for size in range(last):
        cut.write_bytes(whole[:size])
        with pytest.raises(InputError, match="cut.gguf"):
            GGUFFile(cut)
    cut.write_bytes(whole[:last])
    assert len(GGUFFile(cut).tensors) == 2


def test_damage_of_any_byte_is_told_or_harmless(tmp_path):
    """No other error than InputError, and no memory for counts that the file cannot hold."""
    write(tmp_path / "a.gguf", {"a.words": ["one", "two"], "a.list": [1, 2, 3]}, {"x": np.ones((2, 32), np.float32)})
    whole = (tmp_path / "a.gguf").read_bytes()
    end = GGUFFile(tmp_path / "a.gguf").tensors["x"].start
    for position in range(end):
        for value in (0, 9, 0x7F, 0xFF):
            (tmp_path / "b.gguf").write_bytes(whole[:position] + bytes([value]) + whole[position + 1 :])
            try:
                GGUFFile(tmp_path / "b.gguf")
            except InputError as error:
                assert "\n" not in str(error)


HEAD = b"GGUF" + struct.pack("<I", 3)
KEY = struct.pack("<Q", 1) + b"k"
ABSURD = {
    "empty": b"",
    "other magic": b"PK\x03\x04" + bytes(100),
    "version 1": b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "2^64 keys": HEAD + struct.pack("<QQ", 0, 2**64 - 1) + bytes(64),
    "2^63 tensors": HEAD + struct.pack("<QQ", 2**63, 0) + bytes(64),
    "a long string": HEAD + struct.pack("<QQQ", 0, 1, 2**62) + bytes(64),
    "a long array": HEAD + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IIQ", 9, 5, 2**60) + bytes(64),
    "many strings": HEAD + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IIQ", 9, 8, 2**60) + bytes(64),
    "arrays in arrays": HEAD + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IIQ", 9, 9, 1) + b"\x09\0\0\0\x01" * 4000,
    "an unknown value type": HEAD + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<I", 13) + bytes(64),
    "text that is not UTF-8": HEAD + struct.pack("<QQQ", 0, 1, 1) + b"\xff" + struct.pack("<I", 0) + bytes(64),
    "nine dimensions": HEAD + struct.pack("<QQ", 1, 0) + KEY + struct.pack("<I", 9) + bytes(128),
    "a huge tensor": HEAD + struct.pack("<QQ", 1, 0) + KEY + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0) + bytes(64),
    "an unknown tensor type": HEAD + struct.pack("<QQ", 1, 0) + KEY + struct.pack("<IQIQ", 1, 4, 10, 0) + bytes(64),
    "a tensor without weights": HEAD + struct.pack("<QQ", 1, 0) + KEY + struct.pack("<IQQIQ", 2, 0, 2**60, 0, 0),
    "a row of half a block": HEAD + struct.pack("<QQ", 1, 0) + KEY + struct.pack("<IQIQ", 1, 16, 8, 0) + bytes(64),
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_files_are_refused(name, tmp_path):
    (tmp_path / "absurd.gguf").write_bytes(ABSURD[name])
    with pytest.raises(InputError, match="absurd.gguf") as caught:
        twelve.load(tmp_path / "absurd.gguf")
    assert "\n" not in str(caught.value)
    if name == "an unknown tensor type":
        assert "type Q2_K; supported: F32, F16, Q4_0" in str(caught.value)


PLACES = {  # of two tensors of 128 bytes
    "one in the other": ([0, 96], "tensor 'y' cannot begin at byte"),
    "in the same place": ([0, 0], "cannot begin at byte"),
    "between two places": ([0, 130], "tensor 'y' cannot begin at byte"),
    "in reverse": ([128, 0], None),
    "with a gap": ([0, 160], None),
}


@pytest.mark.parametrize("name", PLACES)
def test_tensors_share_no_bytes(name, tmp_path):
    places, message = PLACES[name]
    entries = [struct.pack("<Q1sIQIQ", 1, b"xy"[i : i + 1], 1, 32, 0, place) for i, place in enumerate(places)]
    head = HEAD + struct.pack("<QQ", 2, 0) + b"".join(entries)
    (tmp_path / "a.gguf").write_bytes(head + bytes(-len(head) % 32) + bytes(320))
    if message is None:
        assert GGUFFile(tmp_path / "a.gguf").tensor("y").shape == (32,)
        return
    with pytest.raises(InputError, match=f"a.gguf is damaged: .*{message}"):
        GGUFFile(tmp_path / "a.gguf")


def test_a_key_comes_once_and_a_number_is_no_block(tmp_path):
    pair = KEY + struct.pack("<II", 4, 1)
    (tmp_path / "a.gguf").write_bytes(HEAD + struct.pack("<QQ", 0, 2) + pair + pair)
    with pytest.raises(InputError, match="a.gguf is damaged: the key 'k' is there twice"):
        GGUFFile(tmp_path / "a.gguf")
    scalar = HEAD + struct.pack("<QQ", 1, 0) + KEY + struct.pack("<IIQ", 0, 8, 0)  # no dimension, in Q8_0
    (tmp_path / "a.gguf").write_bytes(scalar + bytes(64))
    with pytest.raises(InputError, match="tensor 'k' has rows of 1, not a multiple of 32"):
        GGUFFile(tmp_path / "a.gguf")


FAMILIES = {
    "llama": ("llama", GQA),
    "llama-tied": ("llama", GQA | {"tie_word_embeddings": True, "head_dim": 16}),
    "qwen2": ("qwen2", GQA),
    "qwen3": ("qwen3", GQA | {"head_dim": 20}),
}
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def write_model(path, family: str, theirs, **changed) -> None:
    """A transformers model as llama.cpp's converter writes it, with a byte-level vocabulary without merges."""
    config = theirs.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], config.num_hidden_layers)
    tensors = {}
    for name, tensor in theirs.state_dict().items():
        module, suffix = name.rsplit(".", 1)
        projection = module.rsplit(".", 1)[-1]
        if family == "llama" and projection in heads:  # rows of a head by pairs, not by halves
            tensor = tensor.unflatten(0, (heads[projection], 2, -1)).transpose(1, 2).reshape(tensor.shape)
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        tensors[f"{names.get_name(module)}.{suffix}"] = tensor.numpy()
    kinds = cycle(changed.pop("kinds", [TYPES.F32]))
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            kind = next(kinds)
            tensors[name] = (tensor, kind if kind == TYPES.F32 or tensor.shape[1] % 32 == 0 else TYPES.F16)
    words = [*BYTES, "<|im_end|>", "<think>", "th", *(f"[unused{i}]" for i in range(config.vocab_size - 259))]
    metadata = {
        f"{family}.context_length": 64, f"{family}.block_count": config.num_hidden_layers,
        f"{family}.embedding_length": config.hidden_size, f"{family}.feed_forward_length": config.intermediate_size,
        f"{family}.attention.head_count": heads["q_proj"], f"{family}.attention.head_count_kv": heads["k_proj"],
        f"{family}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{family}.rope.freq_base": config.rope_parameters["rope_theta"],
        f"{family}.attention.key_length": getattr(config, "head_dim", None) or config.hidden_size // heads["q_proj"],
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [1] * 256 + [3, 4, 1] + [5] * (config.vocab_size - 259),
        "tokenizer.ggml.merges": ["t h"], "tokenizer.ggml.eos_token_id": 256,
    }  # fmt: skip
    metadata |= changed.pop("metadata", {})
    write(path, {key: value for key, value in metadata.items() if value is not None}, tensors | changed, family)


@pytest.mark.parametrize("case", FAMILIES)
def test_a_model_written_as_llama_cpp_does_equals_transformers(case, tmp_path):
    family, values = FAMILIES[case]
    theirs = peer(family, values | {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}})
    write_model(tmp_path / "model.gguf", family, theirs)
    ours, tokenizer = twelve.load(tmp_path)
    assert difference(ours, theirs) <= 1e-4
    assert ours.config.tie_word_embeddings == theirs.config.tie_word_embeddings
    assert load_config(tmp_path / "model.gguf") == ours.config
    assert tokenizer.eos_id == 256 and tokenizer.id_of("<think>") == 257
    assert tokenizer.encode("th<|im_end|>")[-2:] == [258, 256]
    # a folder made of it is the same model
    twelve.save(ours, tokenizer, tmp_path / "folder")
    again, reread = twelve.load(tmp_path / "folder")
    assert difference(again, theirs) <= 1e-4
    assert reread.encode("th<think>7") == tokenizer.encode("th<think>7")


@pytest.mark.parametrize("keys", [{"rope.scaling.factor": 4.0}, {"rope.scale_linear": 4.0}], ids=str)
def test_a_scaling_without_its_kind_is_linear(keys, tmp_path):
    """llama.cpp's rule, and the key of its first files."""
    theirs = peer("llama", GQA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}})
    metadata = {f"llama.{key}": value for key, value in keys.items()}
    write_model(tmp_path / "model.gguf", "llama", theirs, metadata=metadata)
    ours, _ = twelve.load(tmp_path)
    assert ours.config.rope_parameters["rope_type"] == "linear" and difference(ours, theirs) <= 1e-4
    write_model(tmp_path / "model.gguf", "llama", theirs, metadata=metadata | {"llama.rope.scaling.type": "none"})
    assert load_config(tmp_path).rope_parameters["rope_type"] == "default"


NARROW = GQA | {"hidden_size": 64, "intermediate_size": 96}  # 24 rows of key and value, and 48 columns of o_proj


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "all"])
@pytest.mark.parametrize(("family", "values"), [
    ("llama", NARROW | {"head_dim": 12}), ("llama", NARROW | {"tie_word_embeddings": True}), ("qwen2", NARROW),
    ("qwen3", NARROW | {"head_dim": 32}),
])  # fmt: skip
def test_blocks_stay_packed_bit_for_bit(kind, family, values, tmp_path):
    kinds = [TYPES[name] for name in ("Q4_0", "Q4_1", "Q8_0", "F32") if kind in (name, "all")]
    write_model(tmp_path / "model.gguf", family, peer(family, values), kinds=kinds)
    packed, floats = (twelve.load(tmp_path, device="cpu", packed=packed)[0] for packed in (True, False))
    forms = forms_of(packed)
    modules = {name for name, module in floats.named_modules() if isinstance(getattr(module, "weight", None), torch.nn.
               Parameter) and module.weight.dim() == 2}  # fmt: skip
    wide = {name for name in modules if floats.get_submodule(name).weight.shape[1] % 32 == 0}
    assert set(forms) == wide if kind != "all" else len({*forms.values()}) == 3 and set(forms) < wide
    for name in modules:
        assert torch.equal(packed.get_submodule(name).weight, floats.get_submodule(name).weight), name
    ids = torch.randint(0, 1003, (2, 20))
    with torch.no_grad():
        assert (packed(ids) - floats(ids)).abs().max() <= 1e-5
    # and through a folder of our own
    twelve.save(packed, None, tmp_path / "folder")
    again = twelve.load(tmp_path / "folder", device="cpu")[0].state_dict()
    mine = packed.state_dict()
    assert mine.keys() == again.keys() and all(torch.equal(mine[name], again[name]) for name in mine)


RESIDENT = """
import sys, torch, twelve, twelve.convert.gguf_model
from twelve.heap import give_back
def resident():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024
torch.set_num_threads(1)
twelve.load(sys.argv[1], device="cpu", packed=True)  # what the code itself takes, on a model of nothing
give_back()
before = resident()
model = twelve.load(sys.argv[2], device="cpu", packed=True)[0]
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_resident_memory_is_that_of_the_file(tmp_path):
    for name, width in (("small", 64), ("large", 1024)):
        values = GQA | {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 2}
        write_model(tmp_path / f"{name}.gguf", "llama", peer("llama", values), kinds=[TYPES.Q8_0, TYPES.Q4_0])
    paths = [str(tmp_path / f"{name}.gguf") for name in ("small", "large")]
    done = subprocess.run([sys.executable, "-c", RESIDENT, *paths], check=True, capture_output=True, text=True)
    size = (tmp_path / "large.gguf").stat().st_size
    assert size > 16e6 and int(done.stdout) <= 1.15 * size


WRONG = {
    "architecture": ({"general.architecture": "mamba"}, {}, "unknown architecture 'mamba'.*llama, qwen2, qwen3"),
    "a size is missing": ({"llama.block_count": None}, {}, "llama.block_count must be a positive integer"),
    "a size of the wrong type": ({"llama.embedding_length": "48"}, {}, "llama.embedding_length must be"),
    "a list of sizes": ({"llama.attention.head_count_kv": [2, 2, 2]}, {}, "llama.attention.head_count_kv must be"),
    "scaled positions": ({"llama.rope.scaling.type": "longrope"}, {}, "longrope.*not supported"),
    "a scaling without its factor": ({"llama.rope.scaling.type": "yarn"}, {}, "llama.rope.scaling.factor must be"),
    "partial rotation": ({"llama.rope.dimension_count": 6}, {}, "part of each head"),
    "other frequencies": ({}, {"rope_freqs.weight": np.arange(1.0, 7.0, dtype="f4")}, "rope_freqs.*not those of Llama"),
    "an unexpected tensor": ({}, {"blk.0.odd.weight": np.ones(6, np.float32)}, "unexpected tensor 'blk.0.odd.weight'"),
    "a wrong shape": ({"llama.feed_forward_length": 71}, {}, r"gate_proj.weight' is \[72, 48\].*\[71, 48\]"),
    "too few layers": ({"llama.block_count": 2}, {}, "unexpected tensor 'model.layers.2"),
    "too many layers": ({"llama.block_count": 4}, {}, "'model.layers.3.*missing"),
    "a pre-tokenizer": ({"tokenizer.ggml.pre": "klingon"}, {}, "pre-tokenizer 'klingon' is unknown"),
    "two pre-tokenizers": ({"tokenizer.ggml.pre": ["gpt-2", "smollm"]}, {}, "pre-tokenizer .*'smollm'. is unknown"),
    "a number as template": ({"tokenizer.chat_template": 5}, {}, "the tokenizer is damaged .*no text"),
    "no pre-tokenizer": ({"tokenizer.ggml.pre": None}, {}, "pre-tokenizer None is unknown"),
    "a tokenizer": ({"tokenizer.ggml.model": "llama"}, {}, "tokenizer model 'llama'"),
    "merges of no tokens": ({"tokenizer.ggml.merges": ["xyz zyx"]}, {}, "the tokenizer is damaged"),
    "merges of one word": ({"tokenizer.ggml.merges": ["xyz"]}, {}, "the tokenizer is damaged"),
    "no token types": ({"tokenizer.ggml.token_type": None}, {}, "the tokenizer is damaged"),
    "token types of half": ({"tokenizer.ggml.token_type": [1, 1]}, {}, "the tokenizer is damaged"),
    "a number of tokens": ({"tokenizer.ggml.tokens": 5}, {}, "llama.vocab_size must be a positive integer"),
    "the same token twice": ({"tokenizer.ggml.tokens": ["a"] * 1003}, {}, "the tokenizer is damaged .*twice"),
    "an id below": ({"tokenizer.ggml.padding_token_id": -1}, {}, "the tokenizer is damaged"),
    "yes as a size": ({"llama.attention.head_count_kv": True}, {}, "llama.attention.head_count_kv must be"),
    "a size beyond all": ({"llama.feed_forward_length": 2**31}, {}, "model.gguf: config: intermediate_size 2147483648"),
    "heads beyond all": ({"llama.attention.key_length": 2**31}, {}, "model.gguf: config: head_dim 2147483648"),
    "a part of a model": ({"split.count": 3}, {}, "model.gguf is one of 3 parts of a model"),
    "an id beyond": ({"tokenizer.ggml.eos_token_id": 5000}, {}, "the tokenizer is damaged"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_models_are_named(wrong, tmp_path):
    metadata, tensors, message = WRONG[wrong]
    write_model(tmp_path / "model.gguf", "llama", peer("llama", GQA), metadata=metadata, **tensors)
    with pytest.raises(InputError, match=message) as caught:
        twelve.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def smollm2():
    """Our model and tokenizer, and the path of the file."""
    try:
        path = resolve("smollm2")
    except InputError as error:
        pytest.skip(str(error))
    return *twelve.load("smollm2"), path


def test_smollm2_logits_equal_transformers(smollm2, monkeypatch):
    ours, tokenizer, path = smollm2
    # it asks for accelerate before reading any GGUF file, and does not use it for one on the CPU
    monkeypatch.setattr(transformers.modeling_utils, "is_accelerate_available", lambda: True)
    for slow in ("get_tensor_name_map", "GGUFReader"):  # called again and again with the same arguments
        monkeypatch.setattr(gguf, slow, functools.cache(getattr(gguf, slow)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode(" ".join(TEXTS))])
    with torch.no_grad():
        logits = ours(ids)
        assert (logits - theirs(ids).logits).abs().max() <= 1e-3
    assert logits.std() > 1


def test_smollm2_token_ids_equal_llama_cpps(smollm2):
    """llama.cpp's "smollm" cuts every number character out, then cuts the rest as GPT-2 does; transformers' reading of
    the file leaves the first step out, so its tokenizer gets the pieces."""
    _, tokenizer, path = smollm2
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        pieces = [piece for piece in re.split(r"(\d|[²½Ⅳ])", text) if piece]
        expected = [index for piece in pieces for index in theirs.encode(piece, add_special_tokens=False)]
        assert tokenizer.encode(text) == expected, text
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text
    assert [len(tokenizer.encode(digits)) for digits in ("7", "42", "2024")] == [1, 2, 4]


def test_smollm2_special_tokens_and_template(smollm2):
    from twelve.data.chat import render

    ours, tokenizer, _ = smollm2
    assert tokenizer.id_of("<|im_start|>") == tokenizer.bos_id == 1
    assert tokenizer.id_of("<|im_end|>") == tokenizer.eos_id == ours.config.eos_token_id == 2
    assert tokenizer.vocab_size == ours.config.vocab_size == 49152 and 2 in tokenizer.stop_ids
    assert ours.config.tie_word_embeddings
    text = render(tokenizer, [{"role": "user", "content": "What is the capital of France?"}])
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    ids, answer = tokenizer.encode(text), []
    with torch.no_grad():
        for _ in range(12):
            answer.append(int(ours(torch.tensor([ids + answer]), last_only=True)[0, -1].argmax()))
    assert "Paris" in tokenizer.decode(answer)
