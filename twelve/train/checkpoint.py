"""One file that holds everything a run needs to go on: replaced atomically, so it is whole or the one before."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from twelve.convert.huggingface import write_safetensors
from twelve.errors import InputError
from twelve.files import atomic_write
from twelve.model import Transformer
from twelve.quantize import BUFFERS
from twelve.train.optimizer import MuonAdamW


def trained_state(model: Transformer) -> dict[str, Tensor]:
    """What training changes: all of a model's state but frozen parameters and packed weights."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if name not in frozen and not name.endswith(BUFFERS)}


def save_checkpoint(path: Path, model: Transformer, optimizer: MuonAdamW, state: dict) -> None:
    """Weights and router biases, optimiser, and `state` (numbers and text: step, seconds, ...).

    There is no random state to keep: initial weights, order of the data and everything else drawn are functions of the
    seed and the step. A memory's table is on the disk before, and can be rolled back to the file before until this one
    is in its place. Raises InputError when the disk is full; the file before stays.
    """
    if optimizer.table is not None:
        optimizer.table.flush()
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in trained_state(model).items()}
    tensors |= {f"optimizer.{name}": tensor.contiguous() for name, tensor in optimizer.state.items()}
    metadata = {"state": json.dumps({**state, "optimizer_steps": optimizer.step_count})}
    with atomic_write(path) as temporary:
        write_safetensors(tensors, temporary, metadata)
    if optimizer.table is not None:
        optimizer.table.commit(state["step"])


def load_checkpoint(path: Path, model: Transformer, optimizer: MuonAdamW) -> dict:
    """Restore both in place and give the `state` back. Raises InputError when the file does not fit the model."""
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            for prefix, tensors in (("model", trained_state(model)), ("optimizer", optimizer.state)):
                for name, mine in tensors.items():
                    mine.copy_(file.get_tensor(f"{prefix}.{name}"))
            state = json.loads(file.metadata()["state"])
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise InputError(f"{path}: not a checkpoint of this model ({error}); remove it to start again") from error
    optimizer.step_count = state["optimizer_steps"]
    if optimizer.table is not None:
        optimizer.table.rollback(state["step"])
    return state
