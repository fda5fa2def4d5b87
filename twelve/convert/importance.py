"""What matters in a model, measured while it reads: which layers, directions, heads, neurons and experts to keep."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from twelve.model import Transformer
from twelve.model.engram import Engram
from twelve.model.layers import RMSNorm
from twelve.model.moe import Experts

WINDOWS = 16  # that are read
LENGTH = 256  # of one, where there is no text and tokens are drawn
TOKENS = 2048  # through the model at a time
Hook = tuple[nn.Module, Callable]


def drawn(model: Transformer, seed: int = 0) -> Tensor:
    """Token ids [WINDOWS, LENGTH or less] int64 drawn evenly from the vocabulary, for when there is no text to read."""
    length = min(LENGTH, model.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (WINDOWS, length), generator=generator)


def influence(model: Transformer, ids: Tensor) -> Tensor:
    """1 - cos(a layer's input, its output), mean over the tokens of ids [W, T] (ShortGPT, arXiv 2403.03853): [layers]
    float64."""
    found = torch.zeros(len(model.layers), dtype=torch.float64)

    def see(index: int) -> Callable:
        def hook(_, arguments: tuple, output: tuple) -> None:
            cosine = F.cosine_similarity(arguments[0].double(), output[0].double(), dim=-1)  # [B, T], or with streams
            found[index] += (1 - cosine).flatten(1).mean(1).sum() / len(ids)

        return hook

    _read(model, ids, [(layer, see(index)) for index, layer in enumerate(model.layers)])
    return found


def moments(model: Transformer, ids: Tensor) -> dict[str, Tensor]:
    """Of every RMSNorm but those inside heads, by name: the mean outer product [N, N] float64 of what enters it, each
    token's scaled to the mean square 1, as the norm does. Engram's norms, of one stream, are among them: tokens for
    which its table has nothing count as zeros, and where it has nothing at all, all directions are alike."""
    names = {m: n for n, m in model.named_modules() if isinstance(m, RMSNorm) and not n.endswith(("q_norm", "k_norm"))}
    engrams = {module: name for name, module in model.named_modules() if isinstance(module, Engram)}
    found: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}

    def add(name: str, x: Tensor) -> None:
        x = x.flatten(0, -2)
        x = F.rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[-1:])
        found[name] = found.get(name, 0.0) + (x.T @ x).double()
        tokens[name] = tokens.get(name, 0) + len(x)

    def see(norm: nn.Module, arguments: tuple, _) -> None:
        add(names[norm], arguments[0])

    def see_engram(engram: Engram, arguments: tuple, _) -> None:
        x, rows = arguments[:2]
        add(f"{engrams[engram]}.query_norm", x)
        add(f"{engrams[engram]}.key_norm", engram.key_proj(rows.to(x.dtype)))
        add(f"{engrams[engram]}.conv_norm", engram.value_proj(rows.to(x.dtype)))

    _read(model, ids, [*((norm, see) for norm in names), *((engram, see_engram) for engram in engrams)])
    return {name: total / tokens[name] if total.any() else total.fill_diagonal_(1.0) for name, total in found.items()}


def activity(model: Transformer, ids: Tensor) -> dict[str, Tensor]:
    """By name of each o_proj and down_proj the mean |x| [N] of what enters it; of each `Experts` the mean of |h| over
    all tokens [E, I], h being zero in those that a token does not use. float64."""
    found: dict[str, Tensor] = {}

    def see(name: str) -> Callable:
        def hook(module: nn.Module, arguments: tuple, _) -> None:
            size = inner(module, *arguments) if isinstance(module, Experts) else arguments[0].flatten(0, -2).abs()
            size = size.double().sum(-2) / ids.numel()
            found[name] = found.get(name, 0.0) + size

        return hook

    def inner(experts: Experts, x: Tensor, chosen: Tensor, _) -> Tensor:
        """|h| [E, N, I] of tokens x [N, D]."""
        out = x.new_zeros(len(experts.down_proj), len(x), experts.down_proj.shape[2])
        for expert in chosen.unique().tolist():
            rows = (chosen == expert).any(1)
            gate, up = F.linear(x[rows], experts.gate_up_proj[expert]).chunk(2, dim=-1)
            out[expert, rows] = (F.silu(gate) * up).abs()
        return out

    _read(model, ids, [
        (module, see(name)) for name, module in model.named_modules()
        if isinstance(module, Experts) or name.endswith(("o_proj", "down_proj"))
    ])  # fmt: skip
    return found


def use(model: Transformer, ids: Tensor) -> dict[str, Tensor]:
    """By name of each `Experts`: an expert's gate, zero where it is not chosen, mean over the tokens: [E] float64."""
    found: dict[str, Tensor] = {}

    def see(name: str) -> Callable:
        def hook(experts: Experts, arguments: tuple, _) -> None:
            _, chosen, gates = arguments
            total = torch.zeros(len(experts.down_proj), dtype=torch.float64)
            total.index_add_(0, chosen.flatten(), gates.flatten().double())
            found[name] = found.get(name, 0.0) + total / ids.numel()

        return hook

    _read(model, ids, [(m, see(name)) for name, m in model.named_modules() if isinstance(m, Experts)])
    return found


@torch.no_grad()
def _read(model: Transformer, ids: Tensor, hooks: list[Hook]) -> None:
    """Run the model, its MTP modules too, over ids [W, T] with these hooks on its modules."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        for rows in tqdm(ids.split(max(1, TOKENS // ids.shape[1])), desc="measure", leave=False):
            model.mtp_logits(rows)
    finally:
        for handle in handles:
            handle.remove()
