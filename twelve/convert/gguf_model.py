"""A GGUF file as a model folder: its tensors under a folder's names, in a folder's order of rows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from twelve.config import ModelConfig
from twelve.convert.gguf import GGUFFile
from twelve.convert.gguf_config import ROPE_FACTORS, config_values
from twelve.convert.gguf_tokenizer import read_tokenizer
from twelve.convert.huggingface import config_from
from twelve.data.tokenizer import Tokenizer
from twelve.errors import InputError
from twelve.quantize import Form, Packed, packable

WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
IN_LAYER = {  # blk.N.*: model.layers.N.*
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_q_a.weight": "self_attn.q_a_proj.weight",
    "attn_q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn_q_b.weight": "self_attn.q_b_proj.weight",
    "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attn_kv_b.weight": "self_attn.kv_b_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    **{f"attn_{a}.{kind}": f"self_attn.{b}_proj.{kind}"
       for a, b in (("q", "q"), ("k", "k"), ("v", "v"), ("output", "o")) for kind in ("weight", "bias")},
    **{f"ffn_{part}.{kind}": f"mlp.{part}_proj.{kind}"
       for part in ("gate", "up", "down") for kind in ("weight", "bias")},
    **{f"ffn_{part}_shexp.weight": f"mlp.shared_experts.{part}_proj.weight" for part in ("gate", "up", "down")},
}  # fmt: skip
EXPERTS = {f"ffn_{part}_exps.weight": f"{part}_proj.weight" for part in ("gate", "up", "down")}  # mlp.experts.E.*
KEY_PART, VALUE_PART = "attn_k_b.weight", "attn_v_b.weight"  # of kv_b_proj: [heads, rank, nope], [heads, value, rank]
JOINED = "self_attn.kv_b_proj.weight"
KEPT = (JOINED, "mlp.gate.weight")  # never packed


class GGUFModel:
    """A `huggingface.Source`: a GGUF file, its tensors named and their rows ordered as in a Hugging Face folder.

    packed: matrices of Q4_0, Q4_1 and Q8_0 keep their numbers, as a packed folder's two tensors; a layer's experts do
    where all are of one type.
    """

    def __init__(self, path: Path, packed: bool = False) -> None:
        self._file, self.path = GGUFFile(path), path
        file, values = self._file, config_values(self._file)
        try:
            self.config = config_from(values)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        self._places: dict[str, tuple[str, int | None]] = {}  # folder's name -> the file's, and which of a stack
        self.shapes: dict[str, tuple[int, ...]] = {}
        for stored, info in file.tensors.items():
            for name, shape, index in self._names(stored, info.shape):
                self._places[name], self.shapes[name] = (stored, index), shape
        embedding = file.tensors.get("token_embd.weight")
        kept = {"F32": torch.float32, "F16": torch.float16}
        self.dtype = kept.get(embedding.type.name, torch.bfloat16) if embedding else torch.float32
        self._rotated: dict[str, int] = {}  # name of a projection whose rows are reordered -> its heads
        if values["model_type"] == "llama":
            self._rotated = {"q_proj": values["num_attention_heads"], "k_proj": values["num_key_value_heads"]}
        self._forms: dict[str, Form] = {}  # name of a module whose weights stay packed -> how
        self._packed: dict[str, tuple[str, list[str]]] = {}  # name of packed weights or scales -> weights', the file's
        self._last: tuple[str, Packed | None] = "", None
        if packed:
            self._keep_matrices()
            self._keep_experts()

    def _keep_matrices(self) -> None:
        for name, (stored, index) in self._places.items():
            form, shape = self._file.tensors[stored].type.form, self.shapes[name]
            if form and index is None and len(shape) == 2 and not name.endswith(KEPT):
                self._keep(name, [stored], shape, form)
                self._forms[name.removeprefix("model.").removesuffix(".weight")] = form

    def _keep_experts(self) -> None:
        c, tensors, kept = self.config, self._file.tensors, set()
        for layer in (index for index in range(c.num_hidden_layers) if c.is_moe_layer(index)):
            experts, width, name = c.n_routed_experts, c.moe_intermediate_size, f"layers.{layer}.mlp.experts"
            gate, up, down = (f"blk.{layer}.{part}" for part in EXPERTS)
            wide, narrow = (experts, width, c.hidden_size), (experts, c.hidden_size, width)
            found = [tensors.get(stored) for stored in (gate, up, down)]
            if None in found or [one.shape for one in found] != [wide, wide, narrow]:
                continue
            form = found[0].type.form
            if form and all(one.type.form == form for one in found):
                both = (experts, 2 * width, c.hidden_size)
                self._keep(f"model.{name}.gate_up_packed_weight", [gate, up], both, form)
                self._keep(f"model.{name}.down_packed_weight", [down], narrow, form)
                self._forms[name] = form
                kept |= {gate, up, down}
        for name, (stored, _) in self._places.items():
            if stored in kept:
                del self.shapes[name]

    def _keep(self, weight: str, stored: list[str], shape: tuple[int, ...], form: Form) -> None:
        """Name the two packed tensors of a matrix, or stack of them, whose weights a folder calls `weight`."""
        scales = weight.removesuffix("weight") + ("scales" if weight.endswith("packed_weight") else "packed_scales")
        self._packed[weight] = self._packed[scales] = weight, stored
        empty = Packed.empty(shape, form, "meta")
        self.shapes[weight], self.shapes[scales] = tuple(empty.weights.shape), tuple(empty.scales.shape)

    def forms(self, plain: torch.nn.Module) -> dict[str, Form]:
        known = packable(plain)
        return {name: form for name, form in self._forms.items() if name in known}  # of no other is there a place

    def read(self, name: str) -> Tensor:
        if name in self._packed:
            weight, stored = self._packed[name]
            if self._last[0] != weight:  # its scales are asked for next
                self._last = weight, self._read_packed(weight, stored)
            return self._last[1].weights if name == weight else self._last[1].scales
        stored, index = self._places[name]
        if stored.endswith(KEY_PART):
            return self._join(stored)
        tensor, order = self._file.tensor(stored, index), self._order(name)
        return tensor if order is None else tensor[torch.from_numpy(order)]

    def _read_packed(self, weight: str, stored: list[str]) -> Packed:
        """A matrix, or a stack whose matrices are the rows of all `stored` in turn, which fill whole panels."""
        if len(self._file.tensors[stored[0]].shape) == 2:
            return self._file.packed(stored[0], self._order(weight))
        each = []
        for expert in range(self.config.n_routed_experts):
            parts = [self._file.packed(one, index=expert) for one in stored]
            weights, scales = (torch.cat(x) for x in zip(*((part.weights, part.scales) for part in parts), strict=True))
            each.append((weights, scales))
        weights, scales = (torch.stack(x) for x in zip(*each, strict=True))
        return Packed(weights, scales, sum(part.rows for part in parts))

    def _names(self, stored: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...], int | None]]:
        """The folder's names of a GGUF tensor, their shapes, and which of a stack each is; a tensor that a folder does
        not have keeps its name, and is then unexpected."""
        layer = re.fullmatch(r"blk\.(\d+)\.(.+)", stored)
        start, rest = (f"model.layers.{layer[1]}", layer[2]) if layer else ("", stored)
        if layer and rest in EXPERTS and len(shape) == 3 and shape[0] == self.config.n_routed_experts:
            for expert in range(shape[0]):
                yield f"{start}.mlp.experts.{expert}.{EXPERTS[rest]}", shape[1:], expert
        elif layer and rest == KEY_PART and self.config.is_mla:
            yield f"{start}.{JOINED}", self._joined_shape(stored), None
        elif layer and rest in IN_LAYER:
            yield f"{start}.{IN_LAYER[rest]}", shape, None
        elif stored != ROPE_FACTORS and not (layer and rest == VALUE_PART and self.config.is_mla):
            yield WHOLE.get(stored, stored), shape, None

    def _joined_shape(self, stored: str) -> tuple[int, int]:
        """Of the projection whose two parts begin with `stored`. `InputError` when they are not as the config says."""
        c, tensors = self.config, self._file.tensors
        heads, rank = c.num_attention_heads, c.kv_lora_rank
        other = stored.replace(KEY_PART, VALUE_PART)
        for name, shape in ((stored, (heads, rank, c.qk_nope_head_dim)), (other, (heads, c.v_head_dim, rank))):
            found = tensors[name].shape if name in tensors else None
            if found != shape:
                what = "is missing" if found is None else f"is {list(found)}, the metadata make it {list(shape)}"
                raise InputError(f"{self.path}: tensor {name!r} {what}")
        return heads * (c.qk_nope_head_dim + c.v_head_dim), rank

    def _join(self, stored: str) -> Tensor:
        keys, values = (self._file.tensor(stored.replace(KEY_PART, part)) for part in (KEY_PART, VALUE_PART))
        return torch.cat((keys.transpose(1, 2), values), dim=1).flatten(0, 1)

    def _order(self, name: str) -> np.ndarray | None:
        """The folder's order of the file's rows, where they differ."""
        heads = self._rotated.get(name.split(".")[-2])
        if not heads:
            return None
        # llama.cpp rotates adjacent pairs, so its rows of a head are pair by pair; a folder has the halves in turn
        rows = self._file.tensors[self._places[name][0]].shape[0]
        return np.arange(rows).reshape(heads, -1, 2).transpose(0, 2, 1).ravel()

    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(self._file)


# --- and back ---------------------------------------------------------------------------------------------------------

STORED = {folder: stored for stored, folder in (*WHOLE.items(), *IN_LAYER.items())}


def stored_as(name: str, tensor: Tensor, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The GGUF tensors, by name, of which the model's tensor `name` consists; experts are stacks [E, rows, columns]."""
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if not layer:
        yield STORED[name if name.startswith("lm_head.") else f"model.{name}"], tensor
        return
    start, rest = f"blk.{layer[1]}.", layer[2]
    projection, heads = rest.split(".")[-2], config.num_attention_heads
    if rest == JOINED:
        heads_first = tensor.unflatten(0, (heads, -1))
        keys, values = heads_first.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
        yield start + KEY_PART, keys.transpose(1, 2)
        yield start + VALUE_PART, values
    elif rest == "mlp.experts.gate_up_proj":
        gate, up = tensor.chunk(2, dim=1)
        yield f"{start}ffn_gate_exps.weight", gate
        yield f"{start}ffn_up_exps.weight", up
    elif rest == "mlp.experts.down_proj":
        yield f"{start}ffn_down_exps.weight", tensor
    elif config.model_type == "llama" and projection in ("q_proj", "k_proj"):  # halves into pairs: `GGUFModel._order`
        rows = tensor.unflatten(0, (heads if projection == "q_proj" else config.num_key_value_heads, 2, -1))
        yield start + STORED[rest], rows.transpose(1, 2).flatten(0, 2)
    else:
        yield start + STORED[rest], tensor
