"""Another number of routed experts made from a model's own: from a dense model, to one, more of them, or fewer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from twelve.config import ModelConfig
from twelve.convert.importance import use
from twelve.errors import InputError
from twelve.model import Transformer
from twelve.model.moe import MoE

PER_TOKEN = 2  # routed experts that work on a token where a dense model gets experts
NOISE = 0.1  # of the router's rows that are copies, in units of the rows' own spread

Changed = tuple[ModelConfig, dict[str, Tensor]]


def with_experts(model: Transformer, experts: int, ids: Tensor, seed: int) -> Changed:
    """Config and tensors of the model with `experts` routed experts a layer; 0: with dense layers only.

    Dense to experts (fine-grained upcycling by virtual groups, arXiv 2410.07524): a layer's neurons are cut into
    PER_TOKEN + 1 parts. One becomes the shared expert, copies of the others the routed ones. The experts of a group,
    one of each part, have one row of the router, so that at first top-k takes a whole group, with equal gates: exact,
    because gates are normalised to sum to 1. The rows of groups are drawn, so that groups see different tokens. The
    first layer stays dense.
    More experts: copies whose correction bias is below all others', so that none is chosen until balancing has lifted
    it: exact where the gates of the chosen do not depend on the rest (sigmoid scores, or normalised gates).
    Fewer experts: in every routing group those with the largest gates on the ids [W, T] int64. Inexact.
    Experts to dense: the shared expert and then, as far as intermediate_size reaches, those with the largest gates,
    each at its mean gate, scaled so that they add up to all. Inexact.
    """
    config, state = model.config, dict(model.state_dict())
    moe = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
    draw = torch.Generator().manual_seed(seed)
    before = config.n_routed_experts if moe else 0
    if experts == before:
        return config, state
    if not moe:
        return _from_dense(model, state, experts, draw)
    if experts == 0:
        return _to_dense(config, state, list(moe), use(model, ids), draw)
    groups = config.n_group or 1
    if experts % groups:
        raise InputError(f"--experts {experts} is not a multiple of the model's {groups} routing groups (n_group)")
    found = use(model, ids) if experts < before else {}
    if experts > before and config.topk_method != "noaux_tc":
        raise InputError(f"more experts need a router with a correction bias (noaux_tc), not {config.topk_method}")
    for name in moe:
        kept = _within_groups(found.get(f"{name}.experts"), before, experts, groups)
        for part in ("gate.weight", "gate.e_score_correction_bias", "experts.gate_up_proj", "experts.down_proj"):
            if f"{name}.{part}" in state:
                state[f"{name}.{part}"] = state[f"{name}.{part}"][kept]
        if experts > before:
            _hold_back(state, f"{name}.gate", kept.tolist(), draw)
    chosen = min(config.num_experts_per_tok, (config.topk_group or groups) * (experts // groups))
    return replace(config, n_routed_experts=experts, num_experts_per_tok=chosen), state


# --- experts to experts -----------------------------------------------------------------------------------------------


def _within_groups(found: Tensor | None, before: int, experts: int, groups: int) -> Tensor:
    """Of every new expert, group by group, the old one that it is: those most used, or all and then copies of them."""
    size = before // groups
    if found is None:
        kept = torch.arange(experts // groups).remainder(size).expand(groups, -1)
    else:
        kept = found.view(groups, size).topk(experts // groups, dim=1).indices.sort(1).values
    return (kept + size * torch.arange(groups)[:, None]).flatten()


def _hold_back(state: dict[str, Tensor], gate: str, kept: list[int], draw: torch.Generator) -> None:
    """Move the router's rows of copies a little, and their biases below what any score, at most 1, makes up for."""
    copies = torch.tensor([index in kept[:place] for place, index in enumerate(kept)])
    weight, bias = state[f"{gate}.weight"], state[f"{gate}.e_score_correction_bias"]
    weight[copies] += NOISE * weight.std() * torch.randn(weight[copies].shape, generator=draw).to(weight)
    bias[copies] = bias.min() - 1.0


# --- dense to experts -------------------------------------------------------------------------------------------------


def _from_dense(model: Transformer, state: dict[str, Tensor], experts: int, draw: torch.Generator) -> Changed:
    old, parts = model.config, PER_TOKEN + 1
    if old.model_type not in ("llama", "deepseek_v3", "twelve") or old.mlp_bias:
        raise InputError(f"a dense {old.model_type} model cannot be given experts, only llama without biases and V3's")
    if experts % PER_TOKEN:
        raise InputError(f"--experts {experts}: a dense model is given a multiple of {PER_TOKEN}, that many a token")
    width = -(-old.intermediate_size // parts)
    new = replace(
        old, model_type="twelve" if old.model_type == "llama" else old.model_type, n_routed_experts=experts,
        n_shared_experts=1, num_experts_per_tok=PER_TOKEN, moe_intermediate_size=width,
        first_k_dense_replace=min(1, old.num_hidden_layers - 1), n_group=1, topk_group=1, norm_topk_prob=True,
        routed_scaling_factor=1.0, scoring_func="sigmoid", topk_method="noaux_tc",
    )  # fmt: skip
    for name in _with_experts(model, new):
        gate, up, down = (state.pop(f"{name}.{part}_proj.weight") for part in ("gate", "up", "down"))
        # a size that does not divide is filled up with neurons that read but are not read
        missing = parts * width - old.intermediate_size
        gate, up = (torch.cat((w, _drawn(w, missing, w.std(), draw))).unflatten(0, (parts, width)) for w in (gate, up))
        down = torch.cat((down, down.new_zeros(len(down), missing)), 1).unflatten(1, (parts, width)).movedim(1, 0)
        part = 1 + torch.arange(experts) % PER_TOKEN
        rows = _drawn(gate[0], experts // PER_TOKEN, old.initializer_range, draw)
        state |= {
            f"{name}.shared_experts.gate_proj.weight": gate[0].contiguous(),
            f"{name}.shared_experts.up_proj.weight": up[0].contiguous(),
            f"{name}.shared_experts.down_proj.weight": down[0].contiguous(),
            f"{name}.experts.gate_up_proj": torch.cat((gate[part], up[part]), dim=1),
            f"{name}.experts.down_proj": down[part] * PER_TOKEN,  # a gate is 1 / PER_TOKEN
            f"{name}.gate.weight": rows.repeat_interleave(PER_TOKEN, 0),
            f"{name}.gate.e_score_correction_bias": torch.zeros(experts, device=gate.device),
        }
    return new, state


def _with_experts(model: Transformer, new: ModelConfig) -> Iterator[str]:
    """The feed-forward layers that are experts in the new config."""
    blocks = [f"layers.{index}" for index in range(len(model.layers))]
    blocks += [f"mtp.{index}.block" for index in range(len(model.mtp))]
    for index, name in enumerate(blocks):
        if new.is_moe_layer(index):
            yield f"{name}.mlp"


def _drawn(like: Tensor, rows: int, std: Tensor | float, draw: torch.Generator) -> Tensor:
    return (torch.randn(rows, like.shape[-1], generator=draw) * float(std)).to(like)


# --- experts to dense -------------------------------------------------------------------------------------------------


def _to_dense(
    config: ModelConfig, state: dict[str, Tensor], moe: list[str], found: dict[str, Tensor], draw: torch.Generator
) -> Changed:
    size, width = config.intermediate_size, config.moe_intermediate_size
    for name in moe:
        used = found[f"{name}.experts"]
        shared = [state.pop(f"{name}.shared_experts.{part}_proj.weight", None) for part in ("gate", "up", "down")]
        room = size - width * (config.n_shared_experts or 0)
        order = used.argsort(descending=True)[: max(0, -(-room // width))]
        gates = used[order] * used.sum() / used[order].sum()
        both, down = state.pop(f"{name}.experts.gate_up_proj"), state.pop(f"{name}.experts.down_proj")
        both, down = both[order].unflatten(1, (2, width)), down[order] * gates.to(down)[:, None, None]
        gate, up, down = both[:, 0].flatten(0, 1), both[:, 1].flatten(0, 1), down.movedim(0, 1).flatten(1)
        if config.n_shared_experts:
            gate, up, down = (torch.cat((first, rest), dim) for first, rest, dim in zip(
                shared, (gate, up, down), (0, 0, 1), strict=True))  # fmt: skip
        missing = max(0, size - len(gate))
        gate, up = (torch.cat((w, _drawn(w, missing, w.std(), draw)))[:size].contiguous() for w in (gate, up))
        down = torch.cat((down, down.new_zeros(len(down), missing)), 1)[:, :size].contiguous()
        state |= {f"{name}.gate_proj.weight": gate, f"{name}.up_proj.weight": up, f"{name}.down_proj.weight": down}
        for part in ("weight", "e_score_correction_bias"):
            state.pop(f"{name}.gate.{part}", None)
    new = replace(
        config, n_routed_experts=None, n_shared_experts=None, num_experts_per_tok=None, moe_intermediate_size=None,
        first_k_dense_replace=0,
    )  # fmt: skip
    return new, state
