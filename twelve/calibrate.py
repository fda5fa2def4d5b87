"""A model into packed weights, layer by layer: `twelve quantize`."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from twelve.convert import check_place, load, open_parts, resolve, save
from twelve.convert.card import render
from twelve.data.reader import STDIN
from twelve.data.tokenizer import Tokenizer
from twelve.data.windows import WINDOW, calibration
from twelve.errors import InputError
from twelve.evaluate.bits import bits_per_byte
from twelve.files import command
from twelve.gptq import LARGEST, Inputs, gptq, gptq_experts, round_plainly, stacked
from twelve.model.moe import Experts
from twelve.model.mtp import MTPModule
from twelve.model.transformer import Transformer
from twelve.quantize import Form, forms_of, matrices, packable, packs, replace

TOKENS = 2048  # through a layer at a time


def quantize(
    model: str | Path, out: str | Path, bits: int = 8, group: int = 32, texts: Sequence[str | Path] = (),
    limit: int | None = None, evaluate: Sequence[str | Path] = (), embedding_bits: int = 8,
) -> dict[str, Any]:  # fmt: skip
    """Write `model` to the folder `out` with its matrices in 8 or 4 bits, `group` columns to a scale.

    4 bits are fitted to calibration text (`texts`, the first `limit` documents), so far as it fills WINDOWS windows;
    without any they are rounded plainly. Embedding and head stay at `embedding_bits` 8: a head's error goes into the
    choice of the token as it is, no layer behind it takes it back, and a rare token's row is not in the text that
    rounding would be fitted to. On a trained model of 8M parameters 4 bits cost 0.0011 bits a byte (rounded plainly
    0.0031), and 0.0066 with the embeddings in 4 bits, too. `evaluate`: text whose bits per byte are measured before and
    after, `limit` documents of it. Nothing is written before the end. `InputError` for a model that is packed already,
    a group or bits that cannot be, and bad input.
    """
    path = resolve(model)
    check_place(Path(out), path)
    if STDIN in map(str, evaluate):
        raise InputError("--eval -: standard input can be read once, and this reads it twice: save it in a file")
    form, ends = Form(bits, group, bits == 8), Form(embedding_bits, group, embedding_bits == 8)
    form.check(group, "--group")
    network, tokenizer, read = open_parts(path)
    if forms_of(network):
        raise InputError(f"{path} is quantised already: name the model that it was made from")
    if tokenizer is None and (texts or evaluate):
        raise InputError(f"{path} has no tokenizer, so it cannot read text")
    before = _measure(load(path, device="cpu")[0], tokenizer, evaluate, limit) if evaluate else None
    gc.collect()
    ids = None
    if bits == 4 and texts:
        ids = calibration(tokenizer, texts, min(WINDOW, network.config.max_position_embeddings), limit)
    elif bits == 4:
        print("no calibration text (--text PATH): 4 bits are rounded plainly, at some loss", file=sys.stderr)
    quantize_model(network, form, ends, ids, read)
    size, parameters = (sum(column) for column in zip(*_sizes(network), strict=True))
    result = {
        "model": str(out), "bits": bits, "group": group, "bits_a_weight": 8 * size / parameters,
        "calibration_tokens": 0 if ids is None else ids.numel(), "bytes_before": _file_bytes(path),
    }  # fmt: skip
    if before is not None:
        after = _measure(network.eval(), tokenizer, evaluate, limit)
        result |= {"bits_per_byte_before": before, "bits_per_byte": after, "bits_per_byte_loss": after - before}
    save(network, tokenizer, out, _card(model, network, result, embedding_bits, texts))
    result["bytes"] = _file_bytes(Path(out))
    return result | {"next": command("twelve", "chat", out)}


def _card(
    model: str | Path, network: Transformer, result: dict[str, Any], embedding_bits: int, texts: Sequence[str | Path]
) -> str:
    measured = {
        "bits": f"{result['bits']}, {result['group']} columns to a scale; embedding and head {embedding_bits}",
        "bits a weight, scales counted": result["bits_a_weight"],
    }
    if "bits_per_byte" in result:
        before, after = result["bits_per_byte_before"], result["bits_per_byte"]
        measured["error"] = f"{after - before:+.4f} bits per byte: {before:.4f} before, {after:.4f} now"
    return render(
        result["model"], f"`{model}` with its matrices packed into {result['bits']} bits.", verb="quantize",
        config=network.config, parents=[model], data=[f"`{path}`, which rounding was fitted to" for path in texts],
        measured=measured, packed=True,
    )  # fmt: skip


def _measure(model: Transformer, tokenizer: Tokenizer, paths: Sequence[str | Path], limit: int | None) -> float:
    return bits_per_byte(model, tokenizer, list(paths), limit=limit).bits_per_byte


def _file_bytes(path: Path) -> int:
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _sizes(model: nn.Module) -> list[tuple[int, int]]:
    """(bytes, numbers) of every matrix and vector, packed or not."""
    sizes = [(tensor.nbytes, tensor.numel()) for tensor in model.parameters()]
    packed = [one for name in forms_of(model) for one in packs(model.get_submodule(name))]
    return sizes + [(p.nbytes, p.weights.shape[:-3].numel() * p.rows * p.columns) for p in packed]


@torch.no_grad()
def quantize_model(
    model: Transformer, form: Form, ends: Form, ids: Tensor | None = None,
    read: Callable[[str], None] = lambda name: None,
) -> None:  # fmt: skip
    """Replace the float32 matrices of a model, in place, one layer after the other.

    ends: the form of embedding and head. ids [W, T]: calibration windows; None rounds plainly. Every layer is fitted to
    what the packed layers before it give. read(name) is called before a part is first used, so that the model can be
    on the meta device and only one layer be in floats; beside it there are the states [W, T, D] and a layer's
    Hessians. A matrix whose width is not a multiple of 32 stays float. `InputError` for weights that are not finite or
    beyond float16, and a group that does not divide a width.
    """
    blocks = [f"layers.{index}" for index in range(len(model.layers))]
    blocks += [f"mtp.{index}" for index in range(len(model.mtp))]
    for name in ("norm", "embed_tokens") if model.config.tie_word_embeddings else ("norm", "embed_tokens", "lm_head"):
        read(name)
        if name != "norm":
            _replace(model, name, ends, None)
    if model.hc_head is not None:
        read("hc_head")
    states = None if ids is None else model.embed_tokens(ids)
    if ids is not None and model.hc_head is not None:
        states = states[:, :, None].repeat(1, 1, model.config.hc_mult, 1)
    for name in tqdm(blocks, desc="quantize", unit="layer"):
        read(name)
        if name == "mtp.0" and ids is not None:
            states = model.norm(states if model.hc_head is None else model.hc_head(states))
        if name.startswith("mtp.") and ids is not None:
            states, ids = states[:, :-1].contiguous(), ids[:, 1:]
        inputs = Inputs()
        names = [found for found in packable(model) if found.startswith(f"{name}.")]
        if ids is not None:
            with inputs.watch([model.get_submodule(found) for found in names]):
                _through(model, name, states, ids, keep=False)
        for found in names:
            _replace(model, found, form, inputs)
        if ids is not None and name != blocks[-1]:
            _through(model, name, states, ids, keep=True)


def _through(model: Transformer, name: str, states: Tensor, ids: Tensor, keep: bool) -> None:
    """Run a layer or MTP module over states [W, T, D], a few windows at a time; `keep` puts the output there."""
    at, block = model.positions(ids[:1]), model.get_submodule(name)
    for rows, tokens in zip(*(x.split(max(1, TOKENS // ids.shape[1])) for x in (states, ids)), strict=True):
        if isinstance(block, MTPModule):
            out, _ = block(rows, model.embed_tokens(tokens), at)
        else:
            at.ids = tokens
            found = model.memory.look_up(tokens, at)[int(name.split(".")[1])] if block.engram is not None else None
            out, _ = block(rows, at, found=found)
        if keep:
            rows.copy_(out)


def _replace(model: Transformer, name: str, form: Form, inputs: Inputs | None) -> None:
    module = model.get_submodule(name)
    if any(matrix.shape[-1] % 32 for matrix in matrices(module)):
        return
    for matrix in matrices(module):
        form.check(matrix.shape[-1], name)
        least, most = matrix.aminmax()
        if not (least >= -LARGEST and most <= LARGEST):
            raise InputError(f"{name}: its weights are not finite numbers that float16 scales can reach")
    if inputs is not None and module in inputs.hessians:
        packed = [gptq(module.weight, inputs.hessians[module], form)]
    elif inputs is not None and inputs.routed and isinstance(module, Experts):
        packed = gptq_experts(module, inputs.routed, form)
    elif isinstance(module, Experts):
        packed = [stacked([round_plainly(matrix, form) for matrix in stack]) for stack in matrices(module)]
    else:
        packed = [round_plainly(module.weight, form)]
    replace(model, name, packed)
