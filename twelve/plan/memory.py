"""What a table of Engram takes and gives: bytes, rows a token, and how many n-grams must share a row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from twelve.config import ModelConfig

STATE_BYTES = 4  # of the optimiser, a row
JOURNAL_BYTES = 8  # a row that a step changes: its number; its bytes and its state come on top


@dataclass
class TablePlan:
    """Sizes of a table of `rows` rows, all heads of all layers together."""

    config: ModelConfig
    rows: int

    @property
    def row_bytes(self) -> int:
        width = self.config.engram_head_dim
        return {"float32": 4 * width, "bfloat16": 2 * width, "int8": width + 4}[self.config.engram_dtype]

    @property
    def heads(self) -> int:
        """All of them: how many rows a token reads."""
        config = self.config
        return len(config.engram_layer_ids) * (config.engram_max_ngram_size - 1) * config.engram_n_heads

    @property
    def table_bytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def state_bytes(self) -> int:
        return self.rows * STATE_BYTES

    def journal_bytes(self, tokens: int) -> int:
        """Most that a step of so many tokens writes to be able to take itself back."""
        return min(self.rows, tokens * self.heads) * (self.row_bytes + STATE_BYTES + JOURNAL_BYTES)

    def lines(self, tokens: int, distinct: dict[int, int], sample: int) -> dict[str, str]:
        """To be printed; tokens a step, and of each n how many distinct n-grams a sample of tokens has."""
        config, head = self.config, self.rows / self.heads
        shared = ", ".join(
            f"{share_of_collisions(count, head):.0%} of {count:,} distinct {n}-grams" for n, count in distinct.items()
        )
        return {
            "memory": f"{self.rows:,} rows of {config.engram_head_dim} {config.engram_dtype}: {_size(self.table_bytes)}"
            f" and {_size(self.state_bytes)} for the optimiser; a token reads {self.heads} rows"
            f" ({_size(self.heads * self.row_bytes)}); journal up to {_size(self.journal_bytes(tokens))} a step",
            "sharing": f"expected to share a head's row with another: {shared} in {sample:,} tokens",
        }


def share_of_collisions(distinct: int, rows: float) -> float:
    """The expected share of so many distinct n-grams whose row, of one head, another one has too."""
    return -float(np.expm1((distinct - 1) * np.log1p(-1 / rows))) if distinct > 1 and rows > 1 else float(distinct > 1)


def distinct_ngrams(ids: np.ndarray, documents: np.ndarray, n: int) -> int:
    """How many different runs of n tokens ids [B, T] have inside the documents [B, T] packed into their rows."""
    length = ids.shape[1] - n + 1
    windows = np.stack([ids[:, at : at + length] for at in range(n)], axis=-1)
    return len(np.unique(windows[documents[:, :length] == documents[:, n - 1 :]], axis=0))


def _size(count: int) -> str:
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
