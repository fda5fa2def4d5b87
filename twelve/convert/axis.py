"""What becomes of an axis of a model where its number of elements changes: copies, zeros, a choice, or a turn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NOISE = 0.5  # of what tells copies apart, in units of a matrix's own spread


@dataclass
class Axis:
    """How an axis of `old` numbers becomes one of `new`: z turns into write z, and w . z into (read w) . (write z).

    write and read are [new, old] float64. Where nothing is lost, read^T write is the identity. Then anything may be
    added to what reads that is blind to write, and noise is: otherwise copies would have equal gradients for ever, and
    what is zero none.
    """

    write: Tensor
    read: Tensor
    draw: torch.Generator
    spread: float  # of a matrix, at least, for the noise
    shrink: float = 1.0  # the mean square of what is written, over that of what it is made of

    def rows(self, weight: Tensor, dim: int = 0) -> Tensor:
        """A matrix that writes to this axis, its dimension `dim`."""
        return torch.tensordot(self.write, weight, ([1], [dim])).movedim(0, dim)

    def columns(self, weight: Tensor, dim: int = -1) -> Tensor:
        """A matrix that reads from this axis, its dimension `dim`."""
        out = torch.tensordot(weight, self.read, ([dim], [1]))
        if len(self.write) > self.write.shape[1]:
            noise = torch.randn(out.shape, generator=self.draw, dtype=out.dtype)
            blind = torch.eye(len(self.write)) - self.write @ self.read.T
            out += noise @ blind * (NOISE * max(float(out.std()), self.spread))
        return out.movedim(-1, dim)

    def factors(self, weight: Tensor) -> Tensor:
        """One factor a number, which keep their places; what is new has their mean."""
        weights = (self.write != 0).double() @ weight
        return torch.where(self.write.any(1), weights, weight.mean())

    def even(self, factor: float) -> Tensor:
        """The same factor for every number."""
        return torch.full((len(self.write),), factor, dtype=torch.float64)

    def norm(self, weight: Tensor) -> Tensor:
        """The weights of an RMSNorm on this axis."""
        return self.factors(weight) * self.shrink**0.5


def repeated(old: int, new: int, **noise) -> Axis:
    """Copies one after the other, each read at its share; for heads and neurons."""
    write = torch.eye(old, dtype=torch.float64)[torch.arange(new) % old]
    return Axis(write, write / write.sum(0), **noise)


def padded(old: int, new: int, shrink: float = 1.0, **noise) -> Axis:
    """As many whole copies as fit, then zeros, at a scale that keeps the mean square, so that an RMSNorm behind does
    the same as before (LEMON, arXiv 2310.07999); or makes it `shrink` times what it was, as must the norm's epsilon."""
    copies = new // old
    scale = (shrink * new / (copies * old)) ** 0.5
    write = torch.zeros(new, old, dtype=torch.float64)
    write[: copies * old] = torch.eye(old, dtype=torch.float64).repeat(copies, 1) * scale
    return Axis(write, write / (copies * scale**2), **noise, shrink=shrink)


def chosen(score: Tensor, new: int, **noise) -> Axis:
    """The `new` highest scores, in their order."""
    write = torch.eye(len(score), dtype=torch.float64)[score.topk(new).indices.sort().values]
    return Axis(write, write, **noise)


def principal(moment: Tensor, new: int, **noise) -> Axis:
    """The `new` directions that hold most of a mean outer product [old, old] (SliceGPT, arXiv 2401.15024)."""
    write = torch.linalg.eigh(moment).eigenvectors[:, -new:].T.contiguous()
    return Axis(write, write, **noise)
