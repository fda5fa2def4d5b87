"""Hugging Face folders: what a tensor is called on disk and in the model, both ways, and the two spellings of a config.

The model's names are the disk's without the leading "model.", but for two things. The experts of a layer are one tensor
here and one each on disk. MTP module k is `mtp.k` here and layer `num_hidden_layers + k` on disk, with copies of the
embedding and the head, as DeepSeek-V3 was released.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from twelve.config import ModelConfig
from twelve.convert import fp8
from twelve.convert.packing import METHOD, check_method, read_forms
from twelve.data.tokenizer import Tokenizer
from twelve.errors import InputError
from twelve.files import read_json
from twelve.model.rope import inverse_frequencies
from twelve.quantize import BUFFERS, Form

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TABLE = "engram.safetensors"  # the rows of a conditional memory: `twelve.table`
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "twelve": "TwelveForCausalLM",  # that no library has
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# what no key of a config goes beyond: tensors of absurd shapes take hours, or more memory than there is
LARGEST = {
    "vocab_size": 1 << 24, "max_position_embeddings": 1 << 31, "engram_vocab_size": 1 << 32, "engram_seed": 1 << 64,
    "engram_max_ngram_size": 1 << 8, "engram_n_heads": 1 << 8,
}  # fmt: skip
LARGE = 1 << 18  # of all others
ROPE_NUMBERS = {
    "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "beta_fast",
    "beta_slow", "mscale", "mscale_all_dim", "attention_factor",
}  # fmt: skip
EXPERT_KEYS = {"n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size"}


def pieces(name: str, tensor: Tensor, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The tensors on disk that the model's tensor `name` consists of, each with its view of that tensor."""
    if name.endswith(".packed_weight"):
        # a shape that no other reader expects under this name, so that none takes the rest for a whole model
        name = name.removesuffix("packed_weight") + "weight"
    if name.startswith("lm_head."):
        yield name, tensor
        return
    mtp = re.fullmatch(r"mtp\.(\d+)\.(?:block\.)?(.+)", name)
    if mtp:
        rest = "shared_head.norm.weight" if mtp[2] == "norm.weight" else mtp[2]
        name = f"layers.{config.num_hidden_layers + int(mtp[1])}.{rest}"
    name = f"model.{name}"
    if name.endswith(".experts.gate_up_proj"):
        for expert, both in enumerate(tensor):
            gate, up = both.chunk(2)
            stem = name.replace("gate_up_proj", str(expert))
            yield f"{stem}.gate_proj.weight", gate
            yield f"{stem}.up_proj.weight", up
    elif name.endswith(".experts.down_proj"):
        for expert, down in enumerate(tensor):
            yield name.replace("down_proj", f"{expert}.down_proj.weight"), down
    else:
        yield name, tensor


def mtp_copies(config: ModelConfig) -> dict[str, str]:
    """Name on disk of each copy that an MTP module carries -> name on disk of the original."""
    embedding = "model.embed_tokens.weight"
    head = embedding if config.tie_word_embeddings else "lm_head.weight"
    copies = {}
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = embedding
        copies[f"model.layers.{layer}.shared_head.head.weight"] = head
    return copies


def disk_tensors(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model folder, by its name on disk, as views of the model's own memory."""
    tensors = _on_disk(model.state_dict(), model.config)
    yield from tensors.items()
    if any(name.endswith(BUFFERS) for name in tensors):
        return  # the copies are for readers that know no packed weights
    for copy, original in mtp_copies(model.config).items():
        yield copy, tensors[original]


class Source(Protocol):
    """Where a model comes from: a folder, or a GGUF file that gives its tensors the names that a folder has."""

    path: Path
    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype  # of the embedding, as stored

    def read(self, name: str) -> Tensor: ...

    def forms(self, plain: torch.nn.Module) -> dict[str, Form]:
        """Names of the modules whose weights it has packed, and how; plain: its model in floats, on any device."""

    def tokenizer(self) -> Tokenizer | None: ...


class Folder:
    """A `Source`: the tensors of `model.safetensors` or of the shards in its index, mapped and read one at a time.

    `InputError` when a file is missing, damaged or cut short, or holds something else than floats of 16 bits or more,
    packed weights, or FP8 ones with their scales (`fp8`), which come out of `read` as float32.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.config = folder, read_config(folder)
        entry = read_json(folder / "config.json").get("quantization_config") or {}  # read_config has seen it
        self._packing = entry if entry.get("quant_method") == METHOD else None
        self._block = fp8.block_size(entry) if entry.get("quant_method") == fp8.METHOD else None
        self._scaled: set[str] = set()  # names of FP8 weights
        self._files: dict[str, Any] = {}  # tensor name -> the open file that holds it
        self.shapes: dict[str, tuple[int, ...]] = {}
        listed = None
        if (folder / SINGLE).exists():
            shards = [SINGLE]
        elif (folder / INDEX).exists():
            listed = read_json(folder / INDEX)
            listed = listed.get("weight_map") if isinstance(listed, dict) else None
            if not isinstance(listed, dict) or not all(isinstance(s, str) and "/" not in s for s in listed.values()):
                raise InputError(f"{folder / INDEX} has no weight_map from tensor names to files beside it")
            shards = sorted(set(listed.values()))
        else:
            refuse_pickles(sorted(file for file in folder.iterdir() if file.suffix in PICKLES))
            raise InputError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}")
        self.dtype = torch.float32
        for shard in shards:
            self._open(folder / shard)
        absent = sorted(set(listed or ()) - set(self.shapes))
        if absent:
            raise InputError(f"{folder / listed[absent[0]]} lacks tensor {absent[0]!r}, which {INDEX} says it holds")
        for name in sorted(self._scaled):
            if name.removesuffix(fp8.SCALE) in self._scaled - {name}:
                raise InputError(f"{folder}: scales {name!r} are stored as {fp8.WEIGHTS}, not F32 or {fp8.EXPONENTS}")
            self._take_scale(name)

    def _open(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt")
        except FileNotFoundError:
            raise InputError(f"{path} is missing: fetch it again") from None
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise InputError(f"{path} is damaged or cut short ({error}): fetch it again") from error
        names = file.keys()
        for name in names:
            stored = file.get_slice(name)
            kind = stored.get_dtype()
            others = {"U8"} if self._packing else {fp8.WEIGHTS, fp8.EXPONENTS} if self._block else set()
            if kind not in DTYPES and kind not in others:
                raise InputError(f"{path}: tensor {name!r} is stored as {kind}; supported: {', '.join(DTYPES)}")
            self._files[name], self.shapes[name] = file, tuple(stored.get_shape())
            if kind == fp8.WEIGHTS:
                self._scaled.add(name)
            if name == ("model.norm.weight" if self._packing else "model.embed_tokens.weight"):
                self.dtype = DTYPES.get(kind, torch.float32)

    def _take_scale(self, name: str) -> None:
        """Take the scales of an FP8 weight out of the tensors that the model must have a place for."""
        shape, found = self.shapes[name], self.shapes.pop(name + fp8.SCALE, None)
        wanted = fp8.scale_shape(shape, self._block) if len(shape) == 2 else None
        if wanted is None or found != wanted:
            what = "has no scales" if found is None else f"has scales {list(found)}"
            raise InputError(f"{self.path}: the FP8 tensor {name!r} {list(shape)} {what} for blocks of {self._block}")

    def read(self, name: str) -> Tensor:
        tensor = self._files[name].get_tensor(name)
        if name not in self._scaled:
            return tensor
        scale = self._files[name + fp8.SCALE].get_tensor(name + fp8.SCALE)
        if not scale.to(torch.float32).isfinite().all():
            raise InputError(f"{self.path}: tensor {name + fp8.SCALE!r} is damaged: its scales are not all numbers")
        return fp8.dequantize(tensor, scale, self._block)

    def forms(self, plain: torch.nn.Module) -> dict[str, Form]:
        try:
            return read_forms(self._packing, plain) if self._packing else {}
        except InputError as error:
            raise InputError(f"{self.path / 'config.json'}: {error}") from error

    def tokenizer(self) -> Tokenizer | None:
        return Tokenizer.load(self.path) if (self.path / "tokenizer.json").exists() else None


def write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write tensors as safetensors, one at a time whatever device they are on; the same tensors give the same bytes.

    The package's own writer first copies all tensors from an accelerator, and leaves a large hidden file of its own
    behind when it is killed.
    """
    codes = {dtype: code for code, dtype in (*DTYPES.items(), ("I64", torch.int64), ("U8", torch.uint8))}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # wide first keeps all aligned
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def refuse_pickles(files: list[Path]) -> None:
    if files:
        raise InputError(
            f"{files[0]} is a pickle, and reading one can run code hidden in it: only safetensors and GGUF are read. "
            "Where that risk is taken, transformers' from_pretrained(FOLDER).save_pretrained(NEW) writes safetensors"
        )


def check(tensors: dict[str, Tensor], source: Source, config: ModelConfig) -> None:
    """Compare the names and shapes of the model's `tensors` (its whole state_dict, by name) with those of `source`.

    `InputError` for a tensor that is missing, of the wrong shape, or of no use in this model.
    """
    wanted = _on_disk(tensors, config)
    unused = {copy: wanted[original] for copy, original in mtp_copies(config).items()}
    if config.tie_word_embeddings:
        unused["lm_head.weight"] = wanted["model.embed_tokens.weight"]
    for name, view in {**wanted, **unused}.items():
        found, shape = source.shapes.get(name), tuple(view.shape)
        if found is None and name in wanted:
            raise InputError(f"{source.path}: tensor {name!r} {list(shape)} is missing{_hint(name, config)}")
        if found not in (None, shape):
            raise InputError(f"{source.path}: tensor {name!r} is {list(found)}, the config makes it {list(shape)}")
    for name in source.shapes:
        if name not in wanted and name not in unused and not name.endswith(".rotary_emb.inv_freq"):
            shape = list(source.shapes[name])
            raise InputError(f"{source.path}: unexpected tensor {name!r} {shape}{_hint(name, config)}")
    if config.tie_word_embeddings and "lm_head.weight" in source.shapes:
        embedding = source.read("model.embed_tokens.weight")
        if not torch.equal(source.read("lm_head.weight"), embedding):
            raise InputError(f"{source.path}: lm_head.weight is not the embedding, but tie_word_embeddings is set")


@torch.no_grad()
def fill(tensors: dict[str, Tensor], source: Source, config: ModelConfig) -> None:
    """Read the model's `tensors`, which `check` has seen, from `source`, one at a time.

    `InputError` for packed weights that are damaged: of another type, or with scales that are no numbers; and for
    weights that float16 cannot hold, where that is what is asked for.
    """
    for name, view in _on_disk(tensors, config).items():
        read = source.read(name)
        if (view.dtype == torch.uint8) != (read.dtype == torch.uint8):
            raise InputError(f"{source.path}: tensor {name!r} is stored as {read.dtype}, not {view.dtype}")
        if name.endswith("packed_scales") and not read.isfinite().all():
            raise InputError(f"{source.path}: tensor {name!r} is damaged: its scales are not all numbers")
        view.copy_(read)
        if view.dtype == torch.float16 and not view.isfinite().all():
            raise InputError(f"{source.path}: tensor {name!r} is not all within float16's range: use another --dtype")


def _on_disk(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    return {disk: view for name, tensor in tensors.items() for disk, view in pieces(name, tensor, config)}


def _hint(name: str, config: ModelConfig) -> str:
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= config.num_hidden_layers:
        return f"; config.json announces {config.num_nextn_predict_layers} MTP modules (num_nextn_predict_layers)"
    if name == "lm_head.weight":
        return "; is tie_word_embeddings right?"
    return ""


def has_mtp(source: Source, config: ModelConfig) -> bool:
    """Whether the source holds any tensor of an MTP module; transformers announces modules that it does not save."""
    return any(name.startswith(f"model.layers.{config.num_hidden_layers}.") for name in source.shapes)


def read_config(path: Path) -> ModelConfig:
    """A folder's `config.json` (or that file). `InputError` names what is wrong or not supported in it."""
    path = path / "config.json" if path.is_dir() else path
    try:
        return config_from(read_json(path))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def config_from(values: dict[str, Any]) -> ModelConfig:
    """From a config's keys; `InputError` for those that change the arithmetic in a way that the model does not know."""
    if not isinstance(values, dict):
        raise InputError("config: this is not a JSON object")
    if values.get("quantization_config"):
        check_method(values["quantization_config"])
    try:
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        if any(isinstance(value, dict) for value in rope.values()):
            raise InputError("config: rope parameters that differ between layers are not supported")
        for key in ROPE_NUMBERS & rope.keys():
            if rope[key] is not None and not _fits(rope[key], "float"):
                raise InputError(f"config: {key} must be a number, not {rope[key]!r}")
        for key, only in (("partial_rotary_factor", 1.0), ("moe_layer_freq", 1)):
            if values.get(key, rope.get(key)) not in (None, only):
                raise InputError(f"config: {key} {values.get(key, rope.get(key))} is not supported, only {only}")
        for field in fields(ModelConfig):
            if field.name in values and not _fits(values[field.name], field.type):
                raise InputError(f"config: {field.name} must be {field.type}, not {values[field.name]!r}")
            size = 0 if field.name.endswith("_token_id") else values.get(field.name)
            if type(size) is int and not 0 <= size <= LARGEST.get(field.name, LARGE):
                raise InputError(f"config: {field.name} {size} is no possible size")
        config = ModelConfig.from_dict(values)
        if not inverse_frequencies(config)[0].isfinite().all():
            raise InputError(f"config: the rope parameters {config.rope_parameters} give no finite frequencies")
        return config
    except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"config: a value is missing or of the wrong type ({error!r})") from error


def _fits(value: Any, annotation: str) -> bool:
    """Whether a value from JSON is of a field's type, written like "int | None"."""
    if isinstance(value, float) and not math.isfinite(value):
        return False
    kinds = {"int": int, "float": (int, float), "bool": bool, "str": str, "list[int]": list, "None": type(None)}
    for name in annotation.split(" | "):
        if isinstance(value, kinds.get(name, object)) and (name == "bool" or not isinstance(value, bool)):
            return True
    return False


def config_values(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The content of `config.json` in both spellings: `rope_parameters` and `dtype` are transformers 5's."""
    values = {"architectures": [ARCHITECTURES[config.model_type]], **config.to_dict()}
    values["dtype"] = values["torch_dtype"] = str(dtype).removeprefix("torch.")
    scaling = dict(config.rope_parameters)
    values["rope_theta"] = scaling.pop("rope_theta")
    plain = scaling["rope_type"] == "default"
    values["rope_scaling"] = None if plain else {**scaling, "type": scaling["rope_type"]}
    if config.model_type in ("twelve", "deepseek_v3"):
        values["n_group"], values["topk_group"] = config.n_group or 1, config.topk_group or config.n_group or 1
        if config.n_routed_experts is None:  # said in the only way that transformers understands
            values["first_k_dense_replace"] = config.num_hidden_layers
            values = {key: value for key, value in values.items() if key not in EXPERT_KEYS}
    return values
