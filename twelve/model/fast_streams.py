"""Hyper-connections on a CPU in one native call each way (kernels/hyper_connections.cpp), as custom operators.

Reading makes the coefficients, the state and the mixed streams in one pass; its backward makes the coefficients again
from a few numbers a token. The twins are `plain_read` and `plain_write` of hyper_connections.py.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.library import custom_op

from twelve.compiler import compile_library
from twelve.config import ModelConfig

SOURCE = Path(__file__).with_name("kernels") / "hyper_connections.cpp"
VECTORS = SOURCE.with_name("vec.h")
STREAMS, LANES = (2, 4), 16  # numbers of streams that are compiled; a stream's width is a multiple of LANES
LEAST = 1e-20  # of an entry of comb before its first row is normalised, so that no row vanishes

pointer, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class _Rules(ctypes.Structure):
    _fields_ = [(name, integer) for name in ("width", "iterations", "constrained", "transposed")] + [
        (name, number) for name in ("lift", "least", "norm_eps")
    ]


class _Streams(ctypes.Structure):
    _fields_ = [("tokens", integer)] + [
        (name, pointer) for name in ("x", "fn", "base", "scale", "state", "mixed", "post", "comb", "kept")
    ]


class _Gradients(ctypes.Structure):
    _fields_ = [(name, pointer) for name in ("state", "mixed", "post", "x", "fn", "base", "scale")]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled source, or None where it cannot be compiled."""
    message = "compiling hyper-connections for this processor, once (some seconds)"
    found = compile_library("hyper-connections", SOURCE, [VECTORS], message)
    if found is not None:
        found.streams_read.argtypes = [integer, pointer, pointer, integer]
        found.streams_read_backward.argtypes = [integer, pointer, pointer, pointer, integer]
        found.streams_write.argtypes = [integer] * 3 + [pointer] * 4 + [integer]
        found.streams_write_backward.argtypes = [integer] * 3 + [pointer] * 5 + [integer]
    return found


@torch.compiler.assume_constant_result
def available() -> bool:
    return library() is not None


def covers(config: ModelConfig) -> bool:
    """Whether the fast path knows such streams; Sinkhorn-Knopp to a tolerance is the twin's."""
    return (
        config.hc_mult in STREAMS and config.hidden_size % LANES == 0 and not config.hc_tolerance and available()
    )  # fmt: skip


def fits(x: Tensor, fn: Tensor, config: ModelConfig) -> bool:
    """Whether the fast path can take streams x [..., n, D]."""
    return x.device.type == "cpu" and x.dtype == fn.dtype == torch.float32 and covers(config)


Rules = list[float]  # iterations, constrained, transposed, lift, least, norm_eps


def rules(config: ModelConfig) -> Rules:
    """What `fast_read` must know of a configuration."""
    transposed = config.hc_sinkhorn_order == "deepseek_v4"
    lift = config.hc_eps if transposed else 0.0
    constrained = float(config.hc_constrained)
    return [config.hc_sinkhorn_iters, constrained, float(transposed), lift, LEAST, config.rms_norm_eps]


def fast_read(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, by: Rules) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `plain_read`, for float32 streams that `fits`; `comb` is for looking at and has no gradient."""
    state, mixed, post, comb, _ = _read(x.contiguous(), fn, base, scale, by)
    return state, mixed, post, comb


def fast_write(mixed: Tensor, out: Tensor, post: Tensor) -> Tensor:
    """As `plain_write`."""
    return _write(mixed, out.contiguous(), post)


def _at(tensor: Tensor) -> int:
    return tensor.data_ptr()


def _call(name: str, n: int, by: Rules, width: int, *structures: ctypes.Structure) -> None:
    iterations, constrained, transposed, *rest = by
    described = _Rules(width, int(iterations), int(constrained), int(transposed), *rest)
    parts = [ctypes.byref(structure) for structure in (described, *structures)]
    getattr(library(), name)(n, *parts, torch.get_num_threads())


@custom_op("twelve::streams_read", mutates_args=())
def _read(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, by: list[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """State, mixed streams, post, comb; for the backward, raw values and 1 / rms of every token."""
    *lead, n, width = x.shape
    state, post, comb, kept = (x.new_empty(*lead, *s) for s in ((width,), (n,), (n, n), (fn.shape[0] + 1,)))
    mixed = torch.empty_like(x)
    tensors = (x, fn, base, scale, state, mixed, post, comb, kept)
    _call("streams_read", n, by, width, _Streams(post.numel() // n, *map(_at, tensors)))
    return state, mixed, post, comb, kept


@_read.register_fake
def _(x, fn, base, scale, by):
    *lead, n, width = x.shape
    state, post, comb, kept = (x.new_empty(*lead, *s) for s in ((width,), (n,), (n, n), (fn.shape[0] + 1,)))
    return state, torch.empty_like(x), post, comb, kept


@custom_op("twelve::streams_read_backward", mutates_args=())
def _read_backward(
    grad_state: Tensor, grad_mixed: Tensor, grad_post: Tensor, x: Tensor, fn: Tensor, base: Tensor, scale: Tensor,
    kept: Tensor, by: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n, width = x.shape[-2:]
    grads = torch.empty_like(x), torch.zeros_like(fn), torch.zeros_like(base), torch.zeros_like(scale)
    streams = _Streams(x.numel() // (n * width), *map(_at, (x, fn, base, scale)), None, None, None, None, _at(kept))
    _call("streams_read_backward", n, by, width, streams,
          _Gradients(*map(_at, (grad_state, grad_mixed, grad_post, *grads))))  # fmt: skip
    return grads


@_read_backward.register_fake
def _(grad_state, grad_mixed, grad_post, x, fn, base, scale, kept, by):
    return tuple(torch.empty_like(tensor) for tensor in (x, fn, base, scale))


def _keep_read(ctx, inputs, output) -> None:
    *tensors, ctx.by = inputs
    ctx.save_for_backward(*tensors, output[-1])


def _read_gradient(ctx, grad_state: Tensor, grad_mixed: Tensor, grad_post: Tensor, *_):
    grads = (grad.contiguous() for grad in (grad_state, grad_mixed, grad_post))
    return *_read_backward(*grads, *ctx.saved_tensors, ctx.by), None


_read.register_autograd(_read_gradient, setup_context=_keep_read)


@custom_op("twelve::streams_write", mutates_args=())
def _write(mixed: Tensor, out: Tensor, post: Tensor) -> Tensor:
    n, width = mixed.shape[-2:]
    x = torch.empty_like(mixed)
    pointers = map(_at, (mixed, out, post, x))
    library().streams_write(n, post.numel() // n, width, *pointers, torch.get_num_threads())
    return x


@_write.register_fake
def _(mixed, out, post):
    return torch.empty_like(mixed)


@custom_op("twelve::streams_write_backward", mutates_args=())
def _write_backward(grad: Tensor, out: Tensor, post: Tensor) -> tuple[Tensor, Tensor]:
    n, width = grad.shape[-2:]
    grads = torch.empty_like(out), torch.empty_like(post)
    pointers = map(_at, (grad, out, post, *grads))
    library().streams_write_backward(n, post.numel() // n, width, *pointers, torch.get_num_threads())
    return grads


@_write_backward.register_fake
def _(grad, out, post):
    return torch.empty_like(out), torch.empty_like(post)


def _keep_write(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:])


def _write_gradient(ctx, grad: Tensor):
    grad = grad.contiguous()
    return grad, *_write_backward(grad, *ctx.saved_tensors)


_write.register_autograd(_write_gradient, setup_context=_keep_write)
