"""Muon for matrices, AdamW for the rest, as one optimiser with one state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from twelve.model import Transformer
from twelve.model.attention import LatentAttention
from twelve.model.engram import Engram
from twelve.model.moe import Experts
from twelve.table import Table

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
TABLE_LR_SCALE = 5.0  # of the rows of a memory (Engram, arXiv 2601.07372), which are not decayed


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearest (semi-)orthogonal matrices of [..., n, m] by Newton-Schulz; singular values end in about 0.7 to 1.2.

    The quintic iteration of Muon (Jordan et al., 2024). bfloat16 on accelerators, float32 on CPU.
    """
    x = matrices.to(torch.bfloat16) if matrices.device.type != "cpu" else matrices
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def matrix_shapes(model: Transformer) -> dict[str, tuple[int, ...]]:
    """Names of the parameters for Muon, and the shape [..., n, m] of the matrices that each one holds.

    Projections that stack something are taken apart, since orthogonalising the stack would tie its parts together:
    experts, gate from up, the heads of MLA (as in GLM-5, arXiv 2602.15763; a head's keys and values stay together),
    and the keys of Engram's streams. Embedding, head, router and vectors are AdamW's.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Experts):
            experts, double, hidden = module.gate_up_proj.shape
            shapes[f"{prefix}.gate_up_proj"] = (2 * experts, double // 2, hidden)
            shapes[f"{prefix}.down_proj"] = tuple(module.down_proj.shape)
        elif isinstance(module, nn.Linear) and prefix != "lm_head":
            shapes[f"{prefix}.weight"] = tuple(module.weight.shape)
    for prefix, module in model.named_modules():
        if isinstance(module, LatentAttention):
            for name in ("q_proj", "q_b_proj", "kv_b_proj"):
                if f"{prefix}.{name}.weight" in shapes:
                    rows, columns = shapes[f"{prefix}.{name}.weight"]
                    shapes[f"{prefix}.{name}.weight"] = (module.heads, rows // module.heads, columns)
        elif isinstance(module, Engram) and f"{prefix}.key_proj.weight" in shapes:
            rows, columns = shapes[f"{prefix}.key_proj.weight"]
            shapes[f"{prefix}.key_proj.weight"] = (module.streams, rows // module.streams, columns)
    return shapes


class MuonAdamW:
    """One step of Muon on the matrices and of AdamW on everything else, at one learning rate.

    Muon's update is scaled to the root mean square 0.2 that AdamW's has (arXiv 2502.16982), so both share the rate;
    `adamw_lr_scale` multiplies it for what AdamW steps. Only Muon's matrices are decayed, or, where AdamW steps
    everything, all that are no vectors. A memory's table takes its own kind of step (`twelve.table`) at TABLE_LR_SCALE
    times the rate.
    """

    def __init__(
        self, model: Transformer, momentum: float = 0.95, betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1, muon: bool = True, adamw_lr_scale: float = 1.0,
    ) -> None:  # fmt: skip
        shapes = matrix_shapes(model) if muon else {}
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.muon_names = [name for name in named if name in shapes]
        self.adam_names = [name for name in named if name not in shapes]
        self.shapes = shapes
        self.named, self.memory = named, model.memory
        self.momentum, self.betas, self.weight_decay = momentum, betas, weight_decay
        self.adamw_lr_scale = adamw_lr_scale
        self.step_count = 0
        # one flat dictionary of tensors, which is also what a checkpoint holds
        self.state = {f"{name}.momentum": torch.zeros_like(named[name]) for name in self.muon_names}
        for key in ("mean", "square"):
            self.state |= {f"{name}.{key}": torch.zeros_like(named[name]) for name in self.adam_names}

    @torch.no_grad()
    def step(self, lr: float, table_lr: float | None = None) -> None:
        """Update every parameter that has a gradient, at learning rate `lr`; a table's rows at `table_lr`, or that."""
        self.step_count += 1
        self._step_matrices(lr)
        self._step_rest(lr * self.adamw_lr_scale)
        if self.table is not None:
            self.table.update((lr if table_lr is None else table_lr) * TABLE_LR_SCALE)

    @property
    def table(self) -> Table | None:
        """What the model's memory reads, if there is one and it is trained."""
        table = self.memory.table if self.memory is not None else None
        return table if table is not None and table.trainable else None

    def _step_matrices(self, lr: float) -> None:
        # matrices of one shape are orthogonalised together: fewer, larger products
        batches: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for name in self.muon_names:
            parameter = self.named[name]
            if parameter.grad is None:
                continue
            momentum = self.state[f"{name}.momentum"]
            momentum.lerp_(parameter.grad, 1 - self.momentum)
            update = parameter.grad.lerp(momentum, self.momentum)  # Nesterov
            view = update.view(-1, *self.shapes[name][-2:])
            batches.setdefault(tuple(view.shape[1:]), []).append((parameter, view))
        for (rows, columns), members in batches.items():
            scale = 0.2 * max(rows, columns) ** 0.5
            views = [view for _, view in members]
            updates = orthogonalize(torch.cat(views) if len(views) > 1 else views[0])
            for (parameter, _), update in zip(members, updates.split([len(view) for view in views]), strict=True):
                parameter.mul_(1 - lr * self.weight_decay).add_(update.reshape(parameter.shape), alpha=-lr * scale)

    def _step_rest(self, lr: float) -> None:
        names = [name for name in self.adam_names if self.named[name].grad is not None]
        decayed = set() if self.muon_names else {name for name in names if self.named[name].dim() > 1}
        for decays in (True, False):
            chosen = [name for name in names if (name in decayed) == decays]
            if not chosen:
                continue
            parameters = [self.named[name] for name in chosen]
            torch._fused_adamw_(
                parameters, [p.grad for p in parameters], [self.state[f"{name}.mean"] for name in chosen],
                [self.state[f"{name}.square"] for name in chosen], [],
                [torch.tensor(float(self.step_count), device=p.device) for p in parameters],
                lr=lr, beta1=self.betas[0], beta2=self.betas[1], weight_decay=self.weight_decay if decays else 0.0,
                eps=1e-10, amsgrad=False, maximize=False,
            )  # fmt: skip

    def zero_grad(self) -> None:
        for parameter in self.named.values():
            parameter.grad = None
        if self.table is not None:
            self.table.pending.clear()
