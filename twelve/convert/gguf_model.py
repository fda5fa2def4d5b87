"""What a GGUF file says, in Hugging Face's terms: the config, the names of the tensors, the tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from torch import Tensor

from twelve.convert.gguf import GGUFFile
from twelve.convert.huggingface import config_from
from twelve.data.tokenizer import Tokenizer
from twelve.errors import InputError
from twelve.quantize import Form, Packed, packable

ARCHITECTURES = ("llama", "qwen2", "qwen3")
WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SIZES = {
    "max_position_embeddings": "context_length",
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
}
SPECIALS = {"bos": "bos", "eos": "eos", "pad": "padding"}  # ours: tokenizer.ggml.*_token_id
CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # tokenizer.ggml.pre: how text is cut into words, as regular expressions; None is GPT-2's own
    "smollm": None,
    "gpt-2": None,
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), rf"{WORDS}|\p{{N}}|{OTHERS}"),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), rf"{WORDS}|\p{{N}}{{1,3}}|{OTHERS}"),
}


class GGUFModel:
    """A `huggingface.Source`: a GGUF file, its tensors named and their rows ordered as in a Hugging Face folder.

    packed: matrices of Q4_0, Q4_1 and Q8_0 keep their numbers, as a packed folder's two tensors.
    """

    def __init__(self, path: Path, packed: bool = False) -> None:
        self._file, self.path = GGUFFile(path), path
        file, values = self._file, config_values(self._file)
        self.config = config_from(values)
        self._names = {_folder_name(name): name for name in file.tensors}
        self.shapes = {name: file.tensors[stored].shape for name, stored in self._names.items()}
        embedding = file.tensors.get("token_embd.weight")
        stored = {"F32": torch.float32, "F16": torch.float16}
        self.dtype = stored.get(embedding.type.name, torch.bfloat16) if embedding else torch.float32
        self._rotated: dict[str, int] = {}  # name of a projection whose rows are reordered -> its heads
        if values["model_type"] == "llama":
            self._rotated = {"q_proj": values["num_attention_heads"], "k_proj": values["num_key_value_heads"]}
        self._forms: dict[str, Form] = {}  # name of a weight that stays packed -> how
        self._last: tuple[str, Packed | None] = "", None
        if packed:
            types = {name: file.tensors[stored].type for name, stored in self._names.items()}
            self._forms = {n: t.form for n, t in types.items() if t.form and len(self.shapes[n]) == 2}
        for name, form in self._forms.items():
            empty = Packed.empty(self.shapes[name], form, "meta")
            self.shapes[name], self.shapes[_scales(name)] = tuple(empty.weights.shape), tuple(empty.scales.shape)

    def forms(self, plain: torch.nn.Module) -> dict[str, Form]:
        known = packable(plain)
        forms = {n.removeprefix("model.").removesuffix(".weight"): form for n, form in self._forms.items()}
        return {name: form for name, form in forms.items() if name in known}  # of no other is there a place

    def read(self, name: str) -> Tensor:
        weight = name.replace("packed_scales", "weight")
        order = self._order(weight)
        if weight not in self._forms:
            tensor = self._file.tensor(self._names[name])
            return tensor if order is None else tensor[torch.from_numpy(order)]
        if self._last[0] != weight:  # its scales are asked for next
            self._last = weight, self._file.packed(self._names[weight], order)
        return self._last[1].weights if name == weight else self._last[1].scales

    def _order(self, name: str) -> np.ndarray | None:
        """The folder's order of the file's rows, where they differ."""
        heads = self._rotated.get(name.split(".")[-2])
        if not heads:
            return None
        # llama.cpp rotates adjacent pairs, so its rows of a head are pair by pair; a folder has the halves in turn
        rows = self._file.tensors[self._names[name]].shape[0]
        return np.arange(rows).reshape(heads, -1, 2).transpose(0, 2, 1).ravel()

    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(self._file)


def _scales(weight: str) -> str:
    return weight.removesuffix("weight") + "packed_scales"


def _folder_name(name: str) -> str:
    """The folder's name of a GGUF tensor; one that a folder does not have stays as it is, and is then unexpected."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if layer and layer[2] in IN_LAYER:
        return f"model.layers.{layer[1]}.{IN_LAYER[layer[2]]}.{layer[3]}"
    return WHOLE.get(name, name)


def config_values(file: GGUFFile) -> dict[str, Any]:
    """The keys of a `config.json`. `InputError` for another architecture, a missing key, a scaling of the rotations."""
    data, path = file.metadata, file.path
    family = data.get("general.architecture")
    if family not in ARCHITECTURES:
        raise InputError(f"{path}: unknown architecture {family!r}; supported in GGUF: {', '.join(ARCHITECTURES)}")

    def integer(key: str, default: int | None = None) -> int:
        value = data.get(f"{family}.{key}", default)
        if not isinstance(value, int) or value <= 0:
            raise InputError(f"{path}: {family}.{key} must be a positive integer, not {value!r}")
        return value

    values: dict[str, Any] = {key: integer(stored) for key, stored in SIZES.items()}
    heads = values["num_attention_heads"]
    head_dim = integer("attention.key_length", values["hidden_size"] // heads)
    if integer("rope.dimension_count", head_dim) != head_dim:
        raise InputError(f"{path}: rotating only a part of each head ({family}.rope.dimension_count) is not supported")
    scaling = data.get(f"{family}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in file.tensors:
        raise InputError(f"{path}: scaled rotary positions ({scaling}, rope_freqs) are not supported in GGUF")
    return {
        **values,
        "model_type": family,
        "num_key_value_heads": integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": integer("vocab_size", len(data.get("tokenizer.ggml.tokens", ()))),
        "rms_norm_eps": data.get(f"{family}.attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": data.get(f"{family}.rope.freq_base", 10000.0),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **{f"{key}_token_id": data.get(f"tokenizer.ggml.{stored}_token_id") for key, stored in SPECIALS.items()},
    }


def read_tokenizer(file: GGUFFile) -> Tokenizer:
    """The byte-level BPE tokenizer inside the file, with its special tokens and chat template.

    `InputError` for another kind of tokenizer, and for a way of cutting words that is not known: it would give token
    ids that look right and are wrong.
    """
    data, path = file.metadata, file.path
    kind, split = data.get("tokenizer.ggml.model"), data.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise InputError(f"{path}: tokenizer model {kind!r} is not supported, only byte-level BPE ('gpt2')")
    if split not in SPLITS:
        raise InputError(f"{path}: pre-tokenizer {split!r} is unknown; known: {', '.join(SPLITS)}")
    try:
        tokens, kinds = data["tokenizer.ggml.tokens"], data["tokenizer.ggml.token_type"]
        merges = [tuple(merge.split(" ", 1)) for merge in data["tokenizer.ggml.merges"]]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        # llama.cpp's Llama 3 takes a word that is a token whole, whatever the merges would give
        bpe = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split.startswith("llama"))
        backend = tokenizers.Tokenizer(bpe)
        for wanted, special in ((CONTROL, True), (USER_DEFINED, False)):
            chosen = [token for token, kind in zip(tokens, kinds, strict=True) if kind == wanted]
            backend.add_tokens([AddedToken(token, special=special, normalized=False) for token in chosen])
        special_ids = {key: data.get(f"tokenizer.ggml.{stored}_token_id") for key, stored in SPECIALS.items()}
        names = {key: tokens[index] for key, index in special_ids.items() if index is not None}
        if data.get("tokenizer.ggml.add_bos_token", split.startswith("llama")):
            first = names["bos"]
            backend.post_processor = processors.TemplateProcessing([first, "$A"], None, [(first, special_ids["bos"])])
    except Exception as error:  # tokenizers raises plain Exception for merges that its vocabulary lacks
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{path}: the tokenizer is damaged ({reason})") from error
    backend.pre_tokenizer = _cutting(split)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer.from_json(backend.to_str(), chat_template=data.get("tokenizer.chat_template"), **names)


def _cutting(split: str) -> pre_tokenizers.PreTokenizer:
    if SPLITS[split] is None:
        cut = [pre_tokenizers.Digits(individual_digits=True)] if split == "smollm" else []
        return pre_tokenizers.Sequence([*cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    words = pre_tokenizers.Split(Regex(SPLITS[split]), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
