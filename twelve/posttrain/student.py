"""The student: cut from its teacher by layers, or fresh with its teacher's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from twelve import convert
from twelve.config import ModelConfig, small_v3
from twelve.convert.card import render
from twelve.convert.resize import spread, with_layers
from twelve.data.tokenizer import Tokenizer
from twelve.errors import InputError
from twelve.model import Transformer
from twelve.quantize import dequantize


def kept_layers(depth: int, layers: int) -> list[int]:
    """The first and the last of `depth` layers, and the rest spread evenly between them; one alone is the first."""
    if not 1 <= layers <= depth:
        raise InputError(f"--layers {layers}: the teacher has {depth} layers to cut from; ask for 1 to {depth}")
    return spread(depth, layers)


def cut(teacher: Transformer, layers: int) -> tuple[Transformer, list[int]]:
    """A model of float weights made of `layers` of the teacher's, and which these are. Embedding, final norm, head and
    MTP modules are the teacher's own, and so is its memory (`with_layers`). InputError where it has fewer layers."""
    kept = kept_layers(teacher.config.num_hidden_layers, layers)
    dequantize(teacher)
    return with_layers(teacher, kept), kept


def fresh(
    tokenizer: Tokenizer, context: int, *, width: int = 256, layers: int = 4, experts: int = 8,
    experts_per_token: int = 2, seed: int = 0, memory: dict[str, Any] | None = None,
) -> Transformer:  # fmt: skip
    """A V3-shape model with random weights for this tokenizer; memory: engram_ switches of `small_v3`."""
    config: ModelConfig = small_v3(
        tokenizer.vocab_size, width, layers, experts, experts_per_token, context, **memory or {}
    )
    config.bos_token_id, config.eos_token_id, config.pad_token_id = (
        tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id,
    )  # fmt: skip
    model = Transformer(config)
    if model.memory is not None:
        model.memory.use_tokenizer(tokenizer)
    return model.init_weights(seed)


def memory_of(config: ModelConfig) -> dict[str, Any]:
    """The engram_ switches of a model, but for its layers, which another depth places anew; none without a memory."""
    keys = (key for key in vars(config) if key.startswith("engram_") and not key.endswith(("_layer_ids", "_layers")))
    return {key: getattr(config, key) for key in keys} if config.engram_layer_ids else {}


def make_student(
    teacher: str | Path, folder: str | Path, layers: int, width: int | None = None, experts: int | None = None,
    seed: int = 0,
) -> str:  # fmt: skip
    """Write a student into `folder`, unless it is there: with a width or a number of experts a fresh one, else one that
    is cut. It has a memory (Engram) where its teacher has one: the teacher's own, or an empty one of that size. Returns
    what it is, in words."""
    config = convert.load_config(teacher)
    is_fresh = width is not None or experts is not None
    if is_fresh:
        size = {"width": width, "experts": experts}
        size = {name: value for name, value in size.items() if value is not None}
        words = f"fresh: {layers} layers, {', '.join(f'{name} {value}' for name, value in size.items())}"
    else:
        kept = kept_layers(config.num_hidden_layers, layers)
        words = f"layers {', '.join(map(str, kept))} of the {config.num_hidden_layers} of {teacher}"
    if (Path(folder) / "config.json").exists():  # it is written last
        return words
    if is_fresh:
        tokenizer = convert.load_tokenizer(teacher)
        context, memory = config.max_position_embeddings, memory_of(config)
        student = fresh(tokenizer, context, layers=layers, seed=seed, memory=memory, **size)
    else:
        network, tokenizer = convert.load(teacher, device="cpu", dtype=torch.float32)
        student, _ = cut(network, layers)
    card = render(
        folder, f"A student before its training: {words}.", verb="distill", config=student.config, parents=[teacher],
        seed=seed if is_fresh else None,
    )  # fmt: skip
    convert.save(student, tokenizer, folder, card)
    return words
