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
from twelve.convert.experts import with_experts
from twelve.convert.importance import WINDOWS, drawn, influence
from twelve.convert.width import with_width
from twelve.data.tokenizer import Tokenizer
from twelve.data.windows import WINDOW, calibration
from twelve.errors import InputError
from twelve.model import Transformer
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
    drawn comes from `seed`.

    `InputError` for packed weights, a model with a memory (Engram), more layers or another width with
    hyper-connections, sizes that cannot be, and what `calibration` refuses.
    """
    _check(model, layers, width, tokenizer, texts)
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
        model = assemble(*with_experts(model, experts, ids, seed))
    if width is not None and width != model.config.hidden_size:
        model = assemble(*with_width(model, width, ids, seed))
    return model


def _check(
    model: Transformer, layers: int | None, width: int | None, tokenizer: Tokenizer | None, texts: Sequence[str | Path]
) -> None:
    config = model.config
    if forms_of(model):
        raise InputError("packed weights cannot be resized: `twelve convert MODEL --out FOLDER` makes floats of them")
    if config.engram_layer_ids:
        raise InputError("a model with a memory (Engram) cannot be resized: its rows belong to its layers and width")
    for name, value in (("layers", layers), ("width", width)):
        if value is not None and value < 1:
            raise InputError(f"--{name} {value} is not possible: ask for 1 or more")
    if config.hc_mult > 1 and ((layers or 0) > config.num_hidden_layers or width not in (None, config.hidden_size)):
        raise InputError("hyper-connections allow fewer layers and other experts, not more layers or another width")
    if texts and tokenizer is None:
        raise InputError("the model has no tokenizer, so it cannot read --text")


def spread(depth: int, layers: int) -> list[int]:
    """The first and the last of `depth` layers, and the rest spread evenly between them; one alone is the first."""
    return [round(index * (depth - 1) / max(1, layers - 1)) for index in range(layers)]


def with_layers(model: Transformer, sources: list[int]) -> Transformer:
    """The model whose layer i is layer sources[i] of `model`, which must not fall; a layer that comes again adds
    nothing to the residual at first. Embedding, final norm, head and MTP modules are the model's own."""
    config = model.config
    depth, dense = config.num_hidden_layers, config.first_k_dense_replace
    first_dense = sum(index < dense for index in sources) + max(0, dense - depth)  # MTP counts on
    state = {}
    for name, tensor in model.state_dict().items():
        found = LAYER.match(name)
        if found is None:
            state[name] = tensor
            continue
        places = [place for place, source in enumerate(sources) if source == int(found[1])]
        for place in places:
            copy = torch.zeros_like if name.endswith(OUTPUTS) else torch.clone
            state[f"layers.{place}.{name[found.end():]}"] = tensor if place == places[0] else copy(tensor)
    return assemble(replace(config, num_hidden_layers=len(sources), first_k_dense_replace=first_dense), state)


def assemble(config: ModelConfig, state: dict[str, Tensor]) -> Transformer:
    """A model with these tensors themselves as its weights."""
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(state, assign=True)
    return model.eval()
