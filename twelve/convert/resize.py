"""A model of another size made from a given one, so that training starts ahead of random weights: `twelve convert`.

A larger model computes at first what the given one does, to rounding. A smaller one keeps what mattered most on the way
through some text. Layers are changed here, experts in `experts.py`, width in `width.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from twelve.config import ModelConfig
from twelve.convert.experts import PER_TOKEN, with_experts
from twelve.convert.huggingface import LARGE
from twelve.convert.importance import WINDOWS, drawn, influence
from twelve.convert.width import with_width
from twelve.data.tokenizer import Tokenizer
from twelve.data.windows import WINDOW, calibration
from twelve.errors import InputError
from twelve.heap import memory
from twelve.model import Transformer
from twelve.model.engram import EngramMemory
from twelve.quantize import forms_of

LAYER = re.compile(r"^layers\.(\d+)\.")
OUTPUTS = ("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias", "experts.down_proj")


@torch.no_grad()
def resize(
    model: Transformer, layers: int | None = None, width: int | None = None, experts: int | None = None, *,
    tokenizer: Tokenizer | None = None, texts: Sequence[str | Path] = (), seed: int = 0,
) -> Transformer:  # fmt: skip
    """A model with `layers` decoder layers, a residual `width` wide and `experts` routed experts a layer (0: dense),
    made of the weights of `model`, which stays as it is; what is None or the same stays, and may be shared with it.

    Fewer layers: those that change the residual most on some `texts`; without any the first, the last and others spread
    evenly. More layers: each is followed by copies of itself whose output projections are zero (LLaMA-Pro, arXiv
    2401.02415). Width, and with it heads, latent ranks and feed-forward layers in proportion: `width.py`. Experts:
    `experts.py`. What these cut by is measured on the texts, or else on tokens drawn from the vocabulary. Everything
    drawn comes from `seed`. A memory (Engram) keeps its table, but for the rows of a layer that finds no place.

    `InputError` for packed weights, more layers or another width with hyper-connections, sizes that cannot be, and what
    `calibration` refuses.
    """
    _check(model, layers, width, experts, tokenizer, texts)
    model, depth = model.eval(), model.config.num_hidden_layers
    if texts:
        ids = calibration(tokenizer, texts, min(WINDOW, model.config.max_position_embeddings))
        ids = ids[:: -(-len(ids) // WINDOWS)]  # a part of it, from all of it, is enough for means
    else:
        ids = drawn(model, seed)
    if layers is not None and layers < depth:
        kept = sorted(influence(model, ids).topk(layers).indices.tolist()) if texts else spread(depth, layers)
        model = with_layers(model, kept)
    elif layers is not None and layers > depth:
        model = with_layers(model, [place * depth // layers for place in range(layers)])
    if experts is not None:
        model = assemble(*with_experts(model, experts, ids, seed), model.memory)
    if width is not None and width != model.config.hidden_size:
        model = assemble(*with_width(model, width, ids, seed), model.memory)
    return model


def _check(
    model: Transformer, layers: int | None, width: int | None, experts: int | None, tokenizer: Tokenizer | None,
    texts: Sequence[str | Path],
) -> None:
    config = model.config
    if forms_of(model):
        raise InputError("packed weights cannot be resized: `twelve convert MODEL --out FOLDER` makes floats of them")
    for name, value, least in (("layers", layers, 1), ("width", width, 1), ("experts", experts, 0)):
        if value is not None and not least <= value <= LARGE:
            raise InputError(f"--{name} {value} is not possible: ask for {least:,} to {LARGE:,}")
    grown = max(1, (layers or 1) / config.num_hidden_layers) * max(1, (width or 1) / config.hidden_size) ** 2
    grown *= max(1, (experts or 1) / (config.n_routed_experts or PER_TOKEN + 1))  # parts of a dense layer
    weights = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name.startswith("layers."))
    if (needed := grown * weights) > memory()[0]:
        raise InputError(f"a model of that size has about {needed / 2**30:,.0f} GiB of weights, more than the memory")
    if config.hc_mult > 1 and ((layers or 0) > config.num_hidden_layers or width not in (None, config.hidden_size)):
        raise InputError("hyper-connections allow fewer layers and other experts, not more layers or another width")
    if texts and tokenizer is None:
        raise InputError("the model has no tokenizer, so it cannot read --text")


def spread(depth: int, layers: int) -> list[int]:
    """The first and the last of `depth` layers, and the rest spread evenly between them; one alone is the first."""
    return [round(index * (depth - 1) / max(1, layers - 1)) for index in range(layers)]


def with_layers(model: Transformer, sources: list[int]) -> Transformer:
    """The model whose layer i is layer sources[i] of `model`, which must not fall; a layer that comes again adds
    nothing to the residual at first. Embedding, final norm, head and MTP modules are the model's own; so is the memory,
    each Engram in the place that `_engram_places` gives it, with the hashes and the rows that it had."""
    config = model.config
    engrams = _engram_places(config.engram_layer_ids, sources)
    left = [layer for layer in config.engram_layer_ids if layer in engrams]
    depth, dense = config.num_hidden_layers, config.first_k_dense_replace
    first_dense = sum(index < dense for index in sources) + max(0, dense - depth)  # MTP counts on
    state = {}
    for name, tensor in model.state_dict().items():
        found = LAYER.match(name)
        if found is None:
            state[name] = tensor
            continue
        if name.startswith("engram.", found.end()):
            if int(found[1]) in engrams:
                state[f"layers.{engrams[int(found[1])]}.{name[found.end():]}"] = tensor
            continue
        places = [place for place, source in enumerate(sources) if source == int(found[1])]
        for place in places:
            copy = torch.zeros_like if name.endswith(OUTPUTS) else torch.clone
            state[f"layers.{place}.{name[found.end():]}"] = tensor if place == places[0] else copy(tensor)
    config = replace(
        config, num_hidden_layers=len(sources), first_k_dense_replace=first_dense,
        engram_layer_ids=[engrams[layer] for layer in left], engram_hash_layers=_hash_layers(config, left),
        kv_token_layer_ids=[place for place, source in enumerate(sources) if source in config.kv_token_layer_ids],
    )  # fmt: skip
    return assemble(config, state, model.memory)


def _engram_places(layers: list[int], sources: list[int]) -> dict[int, int]:
    """Where the Engrams of `layers` go: with their layer, to the first of its copies; without it to the next one, or
    the last, unless another Engram is there. Those left out find no place."""
    taken: dict[int, int] = {}
    for layer in sorted(layers, key=lambda layer: (layer not in sources, layer)):  # who moves comes last
        place = next((place for place, source in enumerate(sources) if source >= layer), len(sources) - 1)
        taken.setdefault(place, layer)
    return {layer: place for place, layer in taken.items()}


def _hash_layers(config: ModelConfig, left: list[int]) -> list[int]:
    """`engram_hash_layers` when of `engram_layer_ids` only those `left` go on. It ends with the last of them."""
    layers = iter(config.engram_layer_ids)
    before = config.engram_hash_layers or config.engram_layer_ids
    after = [number if number >= 0 and next(layers) in left else -1 for number in before]
    return after[: max((place + 1 for place, number in enumerate(after) if number >= 0), default=0)]


def assemble(config: ModelConfig, state: dict[str, Tensor], memory: EngramMemory | None = None) -> Transformer:
    """A model with these tensors themselves as its weights, and the table of this memory."""
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(state, assign=True)
    if memory is not None:
        model.memory.adopt(memory)
    return model.eval()
