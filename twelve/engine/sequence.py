"""One request under way."""

from collections import deque
from collections.abc import Callable
from enum import Enum

import numpy as np

from twelve.engine.detokenize import TextStream
from twelve.engine.pages import chain_key
from twelve.engine.request import Completion, Delta, Request
from twelve.engine.runner import PAGE
from twelve.engine.sampler import seed_key


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"


class Sequence:
    """Tokens, the pages that hold their keys and values, and what was said so far.

    `tokens` is the prompt and everything drawn; the first `computed` of them are in the pages. One token is missing
    while it decodes; more are missing while a prompt is read, or read again after it gave way to others.
    """

    __slots__ = (
        "_piece",
        "_text",
        "acceptance",
        "arrival",
        "cached_tokens",
        "chain",
        "computed",
        "deltas",
        "drafts",
        "error",
        "finish_reason",
        "gates",
        "key",
        "limit",
        "logprobs",
        "ngrams",
        "pages",
        "prompt",
        "request",
        "sealed",
        "slot",
        "status",
        "stop_ids",
        "streamed",
        "tokens",
        "twin_key",
    )  # fmt: skip

    def __init__(
        self, request: Request, limit: int, stop_ids: frozenset[int], piece: Callable[[int], bytes], streamed: bool
    ) -> None:
        """It ends with `limit` tokens, prompt included; `piece` gives the bytes of a token; `streamed` makes deltas."""
        self.request, self.limit, self.stop_ids, self.streamed, self._piece = request, limit, stop_ids, streamed, piece
        self.tokens = list(request.prompt_ids)
        self.prompt = len(self.tokens)
        self.twin_key = np.asarray(self.tokens, "<i4").tobytes()  # the same for all that begin with this prompt
        self.key = seed_key(request.seed)  # [4] uint32
        self.status, self.arrival, self.slot = Status.WAITING, 0, -1
        self.computed, self.pages = 0, []
        self.chain: list[bytes] = []  # keys of its full pages, as far as they were asked for
        self.sealed = 0  # of its pages, how many are findable
        self.drafts: list[int] = []  # guesses that the next step checks
        self.ngrams = self.acceptance = None  # of `speculate`
        self.cached_tokens: int | None = None  # of the prompt, found in the cache; None before it ran
        self.logprobs: list[float] = []
        self.gates: list[float] = []  # of the memory, at every token drawn but the last
        self.finish_reason: str | None = None
        self.error: BaseException | None = None
        self.deltas: deque[Delta] = deque()
        # The text is made along the way only where somebody reads along, or it decides when to end.
        self._text = TextStream(piece, request.stop) if streamed or request.stop else None
        if limit <= self.prompt:
            self.finish_reason = "length"
            self.deltas.append(Delta(finish_reason="length"))

    @property
    def missing(self) -> int:
        """Tokens that are not in the pages yet."""
        return len(self.tokens) - self.computed

    def page_key(self, index: int, identity: bytes) -> bytes:
        """The hash chain up to full page `index`."""
        while len(self.chain) <= index:
            start = PAGE * len(self.chain)
            previous = self.chain[-1] if self.chain else identity
            self.chain.append(chain_key(previous, self.tokens[start : start + PAGE]))
        return self.chain[index]

    def take(self, token: int, logprob: float, gate: float | None = None) -> None:
        """Add a drawn token, and end if it is the last. gate: of the memory, at the token before it."""
        gates = [gate] if gate is not None and self.request.memory_gates and len(self.tokens) > self.prompt else []
        self.gates += gates
        self.tokens.append(token)
        if self.request.logprobs:
            self.logprobs.append(logprob)
        reason = "stop" if token in self.stop_ids else "length" if len(self.tokens) >= self.limit else None
        if self._text is None:
            self.finish_reason = reason
            return
        text = "" if reason == "stop" else self._text.feed(token)
        reason = "stop" if self._text.stopped else reason
        text += self._text.flush() if reason else ""
        self.finish_reason = reason
        # whole when it is put there: another thread may take it at once
        if self.streamed:
            logprobs = [logprob] if self.request.logprobs else []
            self.deltas.append(Delta(text, [token], logprobs, memory_gates=gates, finish_reason=reason))
        elif text:
            self.deltas.append(Delta(text))

    def completion(self) -> Completion:
        """The whole answer of a request that was not streamed."""
        drawn = self.tokens[self.prompt :]
        if self._text is not None:
            text = "".join(delta.text for delta in self.deltas)
        else:
            said = drawn[:-1] if drawn and drawn[-1] in self.stop_ids else drawn
            text = b"".join(map(self._piece, said)).decode(errors="replace")
        cached = self.cached_tokens or 0
        return Completion(text, drawn, self.logprobs, self.finish_reason, self.prompt, cached, self.gates)
