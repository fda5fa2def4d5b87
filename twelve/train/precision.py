"""Where to compute, how many threads, and in which type."""

from __future__ import annotations

import contextlib

import torch

from twelve.errors import InputError


def pick_device(name: str | None = None) -> torch.device:
    """The named device, or the accelerator that torch finds, or the CPU."""
    if name is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]  # AssertionError is torch's word for "not compiled with CUDA"
        raise InputError(f"{name!r} is not a device of this machine ({reason})") from error
    return device


def pick_precision(device: torch.device) -> str:
    """bfloat16 mixed precision where the accelerator has it; float32 on a CPU, where it is the faster one."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    return "float32"


def autocast(device: torch.device, precision: str):
    """Context in which a forward pass of that precision runs."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
