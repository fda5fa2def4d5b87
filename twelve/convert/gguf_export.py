"""A model as one GGUF file, which llama.cpp runs: `twelve convert MODEL --out FILE.gguf`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from twelve.config import ModelConfig
from twelve.convert.card import origin
from twelve.convert.folder import open_parts, resolve
from twelve.convert.gguf_blocks import BLOCK_TYPES, BlockType
from twelve.convert.gguf_config import ROPE_FACTORS, metadata, rope_factors
from twelve.convert.gguf_model import KEY_PART, VALUE_PART, stored_as
from twelve.convert.gguf_tokenizer import tokenizer_metadata
from twelve.convert.gguf_write import Entry, write_gguf
from twelve.errors import InputError
from twelve.files import check_name, command
from twelve.model.transformer import Transformer

TYPES = {block.name: block for block in BLOCK_TYPES.values()}
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}  # general.file_type
ATTRIBUTES = ("weight", "bias", "e_score_correction_bias", "gate_up_proj", "down_proj")  # of modules with tensors
ENDS = ("token_embd.weight", "output.weight")


def export(model: str | Path, out: str | Path, dtype: str = "float32") -> dict[str, Any]:
    """Write `model` to the file `out`, its matrices as `dtype`, one of DTYPES; returns figures and remarks.

    Vectors and routers are float32. With q8_0 and q4_0, matrices whose rows are no multiple of 32 are F16; with q4_0,
    embedding, head and the two parts of MLA's kv_b_proj are Q8_0: few bytes, and errors that hurt (`twelve.calibrate`).
    Read and written one module at a time: the peak is the largest, which is a layer's experts. MTP modules are left
    out, since llama.cpp has none for these architectures. `InputError` for a model that llama.cpp would run wrongly or
    not at all, one without a tokenizer, and weights that the type cannot hold.
    """
    path, target = resolve(model), Path(out)
    check_name(target)
    if target.is_dir():
        raise InputError(f"{out} is a folder, not a .gguf file to write")
    if target.exists() and target.samefile(path):
        raise InputError(f"{out} is the model to read: name another file with --out")
    network, tokenizer, read = open_parts(path)
    config = network.config
    keys = metadata(config)
    if tokenizer is None:
        raise InputError(f"{path} has no tokenizer, and a GGUF file needs one")
    kind = TYPES[DTYPES[dtype]]
    general = {"general.type": "model", "general.name": target.stem, "general.file_type": FILE_TYPES[kind.name]}
    if kind.form:
        general["general.quantization_version"] = 2
    stated = origin(model)
    if "license" in stated:
        general["general.license"] = stated["license"][0]
    if "language" in stated:
        general["general.languages"] = stated["language"]
    keys |= general | tokenizer_metadata(tokenizer, config.vocab_size)
    factors = rope_factors(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(network, lambda name: None, factors)}
    entries = [Entry(name, shape, _type(name, shape, kind)) for name, shape in shapes.items()]
    remarks = list(_remarks(config, entries, kind))
    for remark in remarks:
        print(remark, file=sys.stderr)
    floats = (tensor for _, tensor in _tensors(network, read, factors))
    write_gguf(target, keys, entries, tqdm(floats, desc="gguf", unit="tensor", total=len(entries)))
    return {
        "model": str(out), "architecture": keys["general.architecture"], "type": kind.name,
        "parameters": sum(prod(entry.shape) for entry in entries), "bytes": target.stat().st_size, "remarks": remarks,
        "next": command("twelve", "chat", out),
    }  # fmt: skip


def _tensors(
    network: Transformer, read: Callable[[str], None], factors: Tensor | None
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """The file's tensors by name, in float32; a module has memory from `read(name)` until all its tensors are taken."""
    for name, module in network.named_modules():
        own = [key for key in ATTRIBUTES if isinstance(getattr(module, key, None), Tensor)]
        if not own or name.startswith("mtp."):
            continue
        read(name)
        for key in own:
            yield from stored_as(f"{name}.{key}", getattr(module, key), network.config)
        module.to("meta")
    if factors is not None:
        yield ROPE_FACTORS, factors


def _type(name: str, shape: tuple[int, ...], kind: BlockType) -> BlockType:
    if len(shape) == 1 or name.endswith("ffn_gate_inp.weight"):
        return TYPES["F32"]
    if kind.name == "Q4_0" and (name in ENDS or name.endswith((KEY_PART, VALUE_PART))):
        kind = TYPES["Q8_0"]
    return TYPES["F16"] if shape[-1] % kind.size else kind


def _remarks(config: ModelConfig, entries: list[Entry], kind: BlockType) -> Iterator[str]:
    if config.num_nextn_predict_layers:
        yield f"left out: {config.num_nextn_predict_layers} MTP module(s), which llama.cpp does not run"
    if config.is_mla and config.rms_norm_eps != 1e-6:
        yield f"llama.cpp norms latents with epsilon {config.rms_norm_eps}, this model with 1e-06: results differ a bit"
    odd = [entry.name for entry in entries if kind.form and entry.type.name == "F16"]
    if odd:
        yield f"stored as F16, their rows being no multiple of 32: {len(odd)} matrices, such as {odd[0]}"
