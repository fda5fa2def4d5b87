"""`ModelConfig`: one description of every model here, in transformers' keys; presets are functions that return one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from twelve.errors import InputError

FAMILIES = ("twelve", "deepseek_v2", "deepseek_v3", "llama", "qwen2", "qwen3")
# keys that a folder of the family may leave out, where the family's default differs from the field's below
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    # V3's parts with switches that no other loader knows; another loader must refuse the folder, not drop its tensors
    "twelve": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True},
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True},
    "deepseek_v2": {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False},
    "llama": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"head_dim": 128},
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
SINKHORN_ORDERS = ("columns_first", "deepseek_v4")
TABLE_DTYPES = ("float32", "bfloat16", "int8")
MOST_MTP, MOST_ROWS = 64, 1 << 32  # of a model that is made here
MEMORY_ROWS = (65536, 1 << 20)  # of a head, at least and at most, in a model that gets a memory unasked
TOKENS_A_ROW = 32  # that training reads, where it is known how many: rows cost memory and no time (docs/lab.md)
TOKEN_RANK = 64  # of latents, in such a model: a vector of a head's width for every token (docs/lab.md)


@dataclass
class ModelConfig:
    """Architecture of one model. Sizes count elements; keys are transformers' (DeepSeek's where it has its own).

    Raises `InputError` when built from values that do not fit together.
    """

    model_type: str = "deepseek_v3"
    vocab_size: int = 8192
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None  # None: as many as attention heads
    head_dim: int | None = None  # GQA only; None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    rope_parameters: dict[str, Any] | None = None  # {"rope_type", "rope_theta", ...}; None: default, theta 10,000
    rope_interleave: bool = True  # MLA only: rotate adjacent pairs rather than halves
    # multi-head latent attention (V2 section 2.1); kv_lora_rank None means grouped-query attention
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    # value embeddings (arXiv 2410.17897) in the latent: in these layers, its last kv_token_rank elements are a learned
    # vector of the token itself, the others come from the state as ever
    kv_token_rank: int = 0
    kv_token_layer_ids: list[int] = field(default_factory=list)
    # mixture of experts (V3 section 2.1.2); n_routed_experts None means dense layers only
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    first_k_dense_replace: int = 0
    n_group: int | None = None
    topk_group: int | None = None
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    # multi-token prediction (V3 section 2.2)
    num_nextn_predict_layers: int = 0
    # hyper-connections (mHC, arXiv 2512.24880; keys as deepseek_v4's); hc_mult 1 is the plain residual
    hc_mult: int = 1  # residual streams
    hc_constrained: bool = True  # residual mappings made doubly stochastic; False: HC (arXiv 2409.19606)
    hc_sinkhorn_iters: int = 20
    hc_sinkhorn_order: str = "columns_first"  # as the paper; "deepseek_v4": softmax over rows first, ends with columns
    hc_tolerance: float = 0.0  # above 0: iterate until rows and columns are that close to 1, at most hc_sinkhorn_iters
    hc_eps: float = 1e-6
    # conditional memory (Engram, arXiv 2601.07372; keys as DeepSeek-V4.1's); no layers means none
    engram_layer_ids: list[int] = field(default_factory=list)  # decoder layers, from 0, that begin with a lookup
    engram_max_ngram_size: int = 3  # n-grams of 2 .. this many compressed tokens
    engram_n_heads: int = 4  # hashes of every n
    engram_head_dim: int = 32  # elements of a row
    engram_vocab_size: int = 16384  # rows, about, of a head: each takes the next prime that no other has
    engram_kernel_size: int = 4  # taps of the short convolution, dilated by engram_max_ngram_size; 0: none
    engram_pad_id: int = 2  # compressed token that stands for those before the document begins
    engram_seed: int = 0
    # layers that the hashes were drawn for, where Engrams have moved since; -1 is one that is gone
    engram_hash_layers: list[int] | None = None  # None: engram_layer_ids
    engram_dtype: str = "float32"  # of the rows at rest
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and not self.is_mla:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0, **(self.rope_parameters or {})}
        if self.engram_hash_layers == self.engram_layer_ids:
            self.engram_hash_layers = None
        self._check()

    @property
    def is_mla(self) -> bool:
        return self.kv_lora_rank is not None

    @property
    def rope_dim(self) -> int:
        """Elements of a head that are rotated."""
        return self.qk_rope_head_dim if self.is_mla else self.head_dim

    @property
    def is_plain(self) -> bool:
        """Whether every part is one that the family's other implementations have."""
        return self.hc_mult == 1 and not self.engram_layer_ids and not self.kv_token_layer_ids

    def token_rank(self, index: int) -> int:
        """Elements of decoder layer `index`'s latent that are the token's own."""
        return self.kv_token_rank if index in self.kv_token_layer_ids else 0

    def is_moe_layer(self, index: int) -> bool:
        """Whether decoder layer `index` has routed experts; MTP modules count on from num_hidden_layers."""
        return self.n_routed_experts is not None and index >= self.first_k_dense_replace

    def _check(self) -> None:
        def need(condition: bool, message: str) -> None:
            if not condition:
                raise InputError(f"config: {message}")

        need(self.model_type in FAMILIES, f"unknown model_type {self.model_type!r}; supported: {', '.join(FAMILIES)}")
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            value = getattr(self, key)
            need(isinstance(value, int) and value > 0, f"{key} must be a positive integer, not {value!r}")
        need(self.hidden_act == "silu", f"hidden_act {self.hidden_act!r} is not supported, only 'silu'")
        rope_type = self.rope_parameters["rope_type"]
        need(rope_type in ROPE_TYPES, f"rope_type {rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
        need(rope_type == "default" or "factor" in self.rope_parameters, f"rope_type {rope_type!r} needs a factor")
        even = self.rope_dim > 0 and self.rope_dim % 2 == 0
        need(even, f"rotary dimension {self.rope_dim} must be even and positive")
        if self.is_mla:
            for key in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim"):
                need(getattr(self, key) > 0, f"{key} must be positive for latent attention")
        else:
            need(
                self.num_attention_heads % self.num_key_value_heads == 0,
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}",
            )
        if self.n_routed_experts is not None:
            experts, groups = self.n_routed_experts, self.n_group or 1
            need(bool(self.moe_intermediate_size), "moe_intermediate_size is missing")
            need(
                0 < (self.num_experts_per_tok or 0) <= experts,
                f"num_experts_per_tok must lie between 1 and n_routed_experts {experts}",
            )
            need(experts % groups == 0, f"n_routed_experts {experts} is not a multiple of n_group {groups}")
            need((self.topk_group or 1) <= groups, f"topk_group {self.topk_group} exceeds n_group {groups}")
            need(
                self.num_experts_per_tok <= (self.topk_group or groups) * (experts // groups),
                "num_experts_per_tok exceeds the experts in topk_group groups",
            )
            need(self.scoring_func in ("sigmoid", "softmax"), f"scoring_func {self.scoring_func!r} is not supported")
            methods = ("noaux_tc", "greedy", "group_limited_greedy")
            method = self.topk_method
            need(method in methods, f"topk_method {method!r} is not supported: {', '.join(methods)}")

        need(
            self.is_plain or self.model_type == "twelve",
            f"hc_mult, engram_layer_ids and kv_token_layer_ids need model_type 'twelve', not {self.model_type!r}",
        )
        if self.kv_token_layer_ids:
            need(self.is_mla, "kv_token_layer_ids need latent attention (kv_lora_rank)")
            rank = self.kv_token_rank
            need(0 < rank < self.kv_lora_rank, f"kv_token_rank {rank} is not between 0 and kv_lora_rank")
            for index in self.kv_token_layer_ids:
                known = isinstance(index, int) and 0 <= index < self.num_hidden_layers
                need(known, f"kv_token_layer_ids: there is no layer {index!r}")
        need(isinstance(self.hc_mult, int) and 1 <= self.hc_mult <= 16, f"hc_mult {self.hc_mult!r} is not 1 to 16")
        need(self.hc_sinkhorn_iters > 0, f"hc_sinkhorn_iters {self.hc_sinkhorn_iters} must be positive")
        order = self.hc_sinkhorn_order
        need(order in SINKHORN_ORDERS, f"hc_sinkhorn_order {order!r} is not one of {', '.join(SINKHORN_ORDERS)}")
        if self.engram_layer_ids:
            for index in self.engram_layer_ids:
                need(
                    isinstance(index, int) and 0 <= index < self.num_hidden_layers,
                    f"engram_layer_ids: there is no layer {index}, they are 0 to {self.num_hidden_layers - 1}",
                )
            need(len(set(self.engram_layer_ids)) == len(self.engram_layer_ids), "engram_layer_ids has a layer twice")
            if self.engram_hash_layers is not None:
                numbers = [number for number in self.engram_hash_layers if number != -1]
                need(
                    all(isinstance(number, int) and 0 <= number < 2**32 for number in numbers)
                    and len(set(numbers)) == len(numbers) == len(self.engram_layer_ids),
                    f"engram_hash_layers {self.engram_hash_layers} must name one layer for each of engram_layer_ids, "
                    "no two the same, and -1 elsewhere",
                )
            need(self.engram_max_ngram_size >= 2, f"engram_max_ngram_size {self.engram_max_ngram_size} is below 2")
            for key in ("engram_n_heads", "engram_head_dim", "engram_vocab_size"):
                need(getattr(self, key) > 0, f"{key} must be positive")
            for key in ("engram_kernel_size", "engram_seed"):
                need(getattr(self, key) >= 0, f"{key} is negative")
            pad = self.engram_pad_id
            need(0 <= pad < self.vocab_size, f"engram_pad_id {pad} is no token: they are 0 to {self.vocab_size - 1}")
            dtype = self.engram_dtype
            need(dtype in TABLE_DTYPES, f"engram_dtype {dtype!r} is not one of {', '.join(TABLE_DTYPES)}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """From a `config.json` of transformers 5 (`rope_parameters`) or of an older one (`rope_theta`, `rope_scaling`).

        Keys that are not ours are ignored, except those that change the arithmetic: these raise `InputError`.
        """
        family = values.get("model_type")
        if family not in FAMILIES:
            raise InputError(f"config: unknown model_type {family!r}; supported: {', '.join(FAMILIES)}")
        if values.get("use_sliding_window") or "sliding_attention" in (values.get("layer_types") or ()):
            raise InputError("config: sliding-window attention is not supported")
        rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
        rope.setdefault("rope_type", rope.pop("type", "default"))
        rope.setdefault("rope_theta", values.get("rope_theta", 10000.0))
        rope.pop("type", None)
        known = {field.name for field in fields(cls)}
        given = {key: value for key, value in values.items() if key in known}
        given = {**FAMILY_DEFAULTS[family], **given, "rope_parameters": rope}
        if rope["rope_type"] == "yarn":
            rope.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
        try:
            return cls(**given)
        except (TypeError, ZeroDivisionError) as error:
            raise InputError(f"config: a value has the wrong type ({error})") from error

    def to_dict(self) -> dict[str, Any]:
        """Every key, without those of parts that this model does not have."""
        values = asdict(self)
        dropped: set[str] = set()
        if not self.is_mla:
            dropped |= {
                "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_interleave",
            }  # fmt: skip
        else:
            dropped |= {"head_dim"}
        if not self.kv_token_layer_ids:
            dropped |= {"kv_token_rank", "kv_token_layer_ids"}
        if self.hc_mult == 1:
            dropped |= {key for key in values if key.startswith("hc_")}
        if not self.engram_layer_ids:
            dropped |= {key for key in values if key.startswith("engram_")}
        if self.engram_hash_layers is None:
            dropped |= {"engram_hash_layers"}
        if self.model_type not in ("twelve", "deepseek_v2", "deepseek_v3"):
            dropped |= {
                "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size",
                "first_k_dense_replace", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor",
                "scoring_func", "topk_method", "num_nextn_predict_layers",
            }  # fmt: skip
        return {key: value for key, value in values.items() if key not in dropped}


def deepseek_v3() -> ModelConfig:
    """DeepSeek-V3 and R1 as released: 671B parameters (arXiv 2412.19437, section 4.2)."""
    return ModelConfig(
        model_type="deepseek_v3", vocab_size=129280, hidden_size=7168, intermediate_size=18432, num_hidden_layers=61,
        num_attention_heads=128, max_position_embeddings=163840, q_lora_rank=1536, kv_lora_rank=512,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=256, n_shared_experts=1,
        num_experts_per_tok=8, moe_intermediate_size=2048, first_k_dense_replace=3, n_group=8, topk_group=4,
        norm_topk_prob=True, routed_scaling_factor=2.5, num_nextn_predict_layers=1,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "beta_fast": 32, "beta_slow": 1,
            "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
        },
    )  # fmt: skip


def deepseek_v2_lite() -> ModelConfig:
    """DeepSeek-V2-Lite as released: 15.7B parameters (arXiv 2405.04434, appendix B)."""
    return ModelConfig(
        model_type="deepseek_v2", vocab_size=102400, hidden_size=2048, intermediate_size=10944, num_hidden_layers=27,
        num_attention_heads=16, max_position_embeddings=163840, q_lora_rank=None, kv_lora_rank=512,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=64, n_shared_experts=2,
        num_experts_per_tok=6, moe_intermediate_size=1408, first_k_dense_replace=1, n_group=1, topk_group=1,
        scoring_func="softmax", topk_method="greedy",
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "beta_fast": 32, "beta_slow": 1,
            "mscale": 0.707, "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096,
        },
    )  # fmt: skip


def with_memory(switches: dict[str, Any] | None = None, text: int = 0, reading: int = 0) -> dict[str, Any]:
    """The `switches` of `small_v3` for a model with Engram and tokens' own parts of latents, since these predict text
    better at equal seconds (docs/lab.md). Rows grow with the tokens that training will be `reading`, each of the `text`
    counted once, and are no more than that can fill (0: not known, many). An engram_vocab_size of 0 leaves out both,
    for a shape that others know."""
    least, most = MEMORY_ROWS
    reading = min(reading, text or reading)
    rows = min(most, max(least, 1 << (reading // TOKENS_A_ROW).bit_length() >> 1))  # a power of two, rounded down
    if text:
        rows = min(rows, 1 << (text - 1).bit_length())
    switches = {"engram_vocab_size": rows, "kv_token_rank": TOKEN_RANK, **(switches or {})}
    if switches["engram_vocab_size"]:
        return switches
    return {key: value for key, value in switches.items() if not key.startswith(("engram_", "kv_token_"))}


def small_v3(
    vocab_size: int, width: int = 256, layers: int = 6, experts: int = 16, experts_per_token: int = 4,
    context: int = 1024, mtp: int = 0, **switches: Any,
) -> ModelConfig:  # fmt: skip
    """V3's shape at any size, with one shared expert and a dense first layer as wide as a token's experts together.

    Heads have 32 unrotated and 32 rotated elements and values of 64, so that the fused attention kernels, which want
    keys and values of one width, need no padding. The latent and an expert are half as wide as the model. `experts=0`
    gives dense layers only. `switches` are keys that begin with hc_, engram_ or kv_token_. Any of engram_ adds Engram,
    by default to the second layer and to the middle one; a kv_token_rank makes the latent larger by that, with the
    tokens' own vectors by default in the last layer and every second one before it.
    """
    if width % 64:
        raise InputError(f"width {width} must be a multiple of 64")
    if mtp > MOST_MTP:
        raise InputError(f"--mtp {mtp}: {MOST_MTP} modules are the most")
    if switches.get("engram_vocab_size", 0) > MOST_ROWS:
        raise InputError(f"--engram-vocab-size {switches['engram_vocab_size']}: {MOST_ROWS} rows a head are the most")
    expert_width = width // 2
    if any(key.startswith("engram_") for key in switches):
        switches = {"engram_layer_ids": sorted({min(1, layers - 1), layers // 2}), **switches}
    own = switches.get("kv_token_rank", 0)
    if own:
        switches = {"kv_token_layer_ids": list(range((layers - 1) % 2, layers, 2)), **switches}
    plain = switches.get("hc_mult", 1) == 1 and not switches.get("engram_layer_ids") and not own
    return ModelConfig(
        model_type="deepseek_v3" if plain else "twelve", vocab_size=vocab_size, hidden_size=width,
        intermediate_size=expert_width * (experts_per_token + 1), num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64), max_position_embeddings=context, q_lora_rank=None,
        kv_lora_rank=max(32, width // 2) + own, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64,
        n_routed_experts=experts or None, n_shared_experts=1 if experts else None,
        num_experts_per_tok=min(experts_per_token, experts) if experts else None,
        moe_intermediate_size=expert_width if experts else None, first_k_dense_replace=1 if experts else 0,
        n_group=1, topk_group=1, norm_topk_prob=True, routed_scaling_factor=1.0, num_nextn_predict_layers=mtp,
        **switches,
    )  # fmt: skip
