"""What an engine is asked and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it.

    A completion depends on nothing but the request and the weights when `seed` is given; without one every run draws
    from fresh entropy.
    """

    prompt_ids: Sequence[int]
    max_tokens: int | None = 512  # None: as many as the model's context leaves room for
    temperature: float = 1.0  # 0: always the most likely token
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()  # the text ends before the first of these
    stop_ids: frozenset[int] | None = None  # None: the tokenizer's; an empty set: none
    logprobs: bool = False
    memory_gates: bool = False  # tell how far the model's memory (Engram) opened at each token


@dataclass
class Delta:
    """What one step added. `text` may be empty: a token can hold a part of a character, or a part of a stop string.

    Deltas without tokens tell that a request's turn came, or that a part of its prompt was read.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None  # "stop" or "length", on the last delta only
    cached_tokens: int = 0  # of the prompt, those found in the cache; on the first delta only
    memory_gates: list[float] = field(default_factory=list)  # of tokens of earlier deltas: the next ones in order


@dataclass
class Completion:
    """A whole answer: its deltas put together."""

    text: str
    token_ids: list[int]  # every token drawn, the stop token that ended it included
    logprobs: list[float]  # log-probability (natural) of each, before temperature and top_p; empty if not asked for
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int = field(default=0, compare=False)  # of the prompt, those found in the cache
    # mean gate of the memory, 0 to 1, where each token but the last was read; empty if not asked for or no memory
    memory_gates: list[float] = field(default_factory=list)

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids)


def sub_seed(seed: int | None, index: int) -> int | None:
    """The seed of the index-th sample of one prompt: all differ, and the first is the seed itself."""
    return None if seed is None else seed % 2**64 + (index << 64)
