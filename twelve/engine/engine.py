"""The engine: requests in, answers out. Threads share it, and all their sequences run together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Event

import numpy as np
import torch

from twelve.engine.pages import PagePool
from twelve.engine.request import Completion, Delta, Request
from twelve.engine.runner import PAGE, Runner, make_runner, model_identity
from twelve.engine.scheduler import Scheduler, pages_for
from twelve.engine.score import score
from twelve.engine.sequence import Sequence, Status
from twelve.engine.speculate import Speculation
from twelve.engine.stepper import Stats, Stepper
from twelve.engine.tiers import Tiers
from twelve.engine.turns import Turns
from twelve.errors import InputError
from twelve.heap import memory

MOST_KV_MEMORY = 4 * 2**30  # bytes, unless asked for more


class ContextLengthError(InputError):
    """The prompt does not fit into the model's context."""


class Engine:
    """Runs a model in evaluation mode.

    There is no thread behind it: of those that wait for an answer one computes the next step for all, and whoever has
    what it waited for goes on. A consumer that takes its time holds nobody up.
    """

    def __init__(
        self, model, tokenizer, *, prefill_chunk: int = 512, kv_memory: int | None = None, max_sequences: int = 512,
        tiers=None, speculation: str = "auto", runner: Runner | None = None,
    ) -> None:  # fmt: skip
        """prefill_chunk: rows of prompts in a step. kv_memory: bytes for keys and values (default: a quarter of what is
        free, at most 4 GiB, at least one full context if three quarters of it hold that); only what is used is taken.
        tiers: see `tiers.Tiers`. speculation: see `speculate.MODES`. InputError for a memory of less than one page, and
        for one that cannot be had.
        """
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.context = model.config.max_position_embeddings  # tokens of a prompt and its completion together
        self.prefill_chunk = prefill_chunk
        self.runner = make_runner(model, tokenizer.vocab_size) if runner is None else runner
        self._page_bytes, most = self.runner.page_bytes, pages_for(self.context)
        asked = kv_memory
        if asked is None:
            free = free_memory(model)
            asked = max(min(free // 4, MOST_KV_MEMORY), most * self._page_bytes)
            asked = max(min(asked, 3 * free // 4), self._page_bytes)  # a long context may be more than there is
        count = min(asked // self._page_bytes, most * max_sequences)
        if count < 1:
            raise InputError(f"{asked:,} bytes for keys and values do not hold one page of {self._page_bytes:,} bytes")
        try:
            self.runner.allocate(count)
        except (OSError, MemoryError, torch.OutOfMemoryError) as error:
            size = f"{count * self._page_bytes / 2**30:,.1f} GiB"
            raise InputError(f"there is no memory for {size} of keys and values: --kv-memory sets less") from error
        self._tiers = tiers
        self.pool = PagePool(count, b"" if tiers is None else tiers.identity, tiers, self.runner)
        self.scheduler = Scheduler(self.pool, max_sequences, most, prefill_chunk, self.runner.reach)
        guesses = Speculation(speculation, bool(getattr(model, "mtp", None)))
        self.stepper = Stepper(self.runner, self.scheduler, guesses)
        self._pieces: dict[int, bytes] = {}
        self._turns = Turns(self._settle, self.stepper.step)  # scheduler, pool and runner are the driver's alone
        self._arrived: list[Sequence] = []  # these two under `changed`
        self._unwanted: list[Sequence] = []

    @property
    def exact(self) -> bool:
        """Whether a sequence gets the same tokens whatever runs beside it, however it was cut or guessed."""
        return self.runner.exact

    @property
    def stats(self) -> Stats:
        return self.stepper.stats

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """Complete every request, in order. InputError if one of them cannot be served, before any has begun."""
        sequences = [self._sequence(request, streamed=False) for request in requests]
        try:
            self._submit(sequences)
            for sequence in sequences:
                self._turns.run_until(lambda one=sequence: one.status is Status.DONE)
                if sequence.error is not None:
                    raise sequence.error
        finally:
            self._drop([sequence for sequence in sequences if sequence.status is not Status.DONE])
        return [sequence.completion() for sequence in sequences]

    def stream(self, request: Request, unwanted: Event | None = None) -> Iterator[Delta]:
        """Complete one request step by step; closing the iterator stops it at once.

        The request is checked here and joins the others at the first `next`. unwanted: once another thread has set it
        the iterator ends with the step under way, even where it waits for its turn.
        """
        return self._stream(self._sequence(request, streamed=True), unwanted or Event())

    def _stream(self, sequence: Sequence, unwanted: Event) -> Iterator[Delta]:
        try:
            self._submit([sequence])
            while True:
                self._turns.run_until(lambda: sequence.deltas or sequence.status is Status.DONE or unwanted.is_set())
                if unwanted.is_set():
                    return
                while sequence.deltas:
                    yield sequence.deltas.popleft()
                if sequence.error is not None:
                    raise sequence.error
                if sequence.status is Status.DONE and not sequence.deltas:
                    return
        finally:
            self._drop([sequence])

    def score(self, sequences: Iterable[list[int]]) -> list[np.ndarray]:
        """The log-probability (natural) of every token but the first of each sequence of ids: [length - 1] each.

        ContextLengthError for one that does not fit the context.
        """
        sequences = [list(ids) for ids in sequences]
        for ids in sequences:
            if len(ids) > self.context:
                raise ContextLengthError(f"{len(ids)} tokens exceed the model's context of {self.context}")
            self._check_ids(ids)
            self._check_memory(len(ids))
        with self._turns.alone():
            return score(sequences, self.runner, self.scheduler, self.prefill_chunk)

    def forget(self) -> None:
        """The model's weights have changed: what was computed with the old ones is used no more.

        Sequences under way keep what they said and go on with the new ones.
        """
        with self._turns.alone():
            self.runner.reload()
            self.scheduler.restart()
            identity = b""
            if self._tiers is not None:  # only they can meet pages of other weights
                self._tiers.clear()
                identity = model_identity(self.model, self.runner, self._tiers.identity)
            self.pool.forget(identity)

    def release(self) -> None:
        """Give the memory of all keys and values back until it is needed again; what they would have saved is lost."""
        with self._turns.alone():
            self.scheduler.restart()
            self.pool.forget(self.pool.identity)
            self.runner.allocate(self.pool.count)

    def close(self) -> None:
        """Finish writing what is on its way to the disk. An engine without tiers needs no closing."""
        if self._tiers is not None:
            self._tiers.close()

    def _sequence(self, request: Request, streamed: bool) -> Sequence:
        prompt = len(request.prompt_ids)
        if not prompt:
            raise InputError("the prompt is empty: give at least one token")
        if prompt >= self.context:
            raise ContextLengthError(
                f"the prompt has {prompt} tokens, and the model's context of {self.context} leaves no room for an "
                "answer: shorten the prompt"
            )
        self._check_ids(request.prompt_ids)
        limit = self._room(prompt) if request.max_tokens is None else min(prompt + request.max_tokens, self.context)
        self._check_memory(limit)
        stop_ids = self.tokenizer.stop_ids if request.stop_ids is None else request.stop_ids
        return Sequence(request, limit, stop_ids, self._piece, streamed)

    def _room(self, prompt: int) -> int:
        """Tokens that a sequence may have where nothing is said of its length: as many as context and memory hold."""
        return min(self.context, max(prompt + 1, self.pool.count * PAGE))

    def fitting(self, prompt_ids: list[int], max_tokens: int | None) -> int | None:
        """`max_tokens`, or as many as there is room for after this prompt, if that is fewer."""
        room = self._room(len(prompt_ids)) - len(prompt_ids)
        return max_tokens if max_tokens is None or room < 1 else min(max_tokens, room)

    def _check_ids(self, ids: list[int]) -> None:
        known = self.model.config.vocab_size
        if strange := next((token for token in ids if not 0 <= token < known), None):
            raise InputError(f"there is no token {strange}: the model knows {known:,}")

    def _check_memory(self, tokens: int) -> None:
        needed = pages_for(tokens)
        if needed > self.pool.count:
            raise InputError(
                f"a sequence of {tokens:,} tokens needs {needed * self._page_bytes:,} bytes for keys and values, and "
                f"the memory for all of them is {self.pool.count * self._page_bytes:,} bytes: give it more, or ask for "
                "fewer tokens"
            )

    def _piece(self, token: int) -> bytes:
        """The bytes of a token; none for control tokens, which are no text."""
        if token not in self._pieces:
            shown = self.tokenizer.decode([token])
            self._pieces[token] = self.tokenizer.decode_bytes([token]) if shown else b""
        return self._pieces[token]

    # --- taking turns -------------------------------------------------------------------------------------------------

    def _submit(self, sequences: list[Sequence]) -> None:
        with self._turns.changed:
            self._arrived += sequences

    def _drop(self, sequences: list[Sequence]) -> None:
        """Nobody wants these any more; whoever drives lets them go, here and now if nobody does."""
        with self._turns.changed:
            self._unwanted += sequences
            if not self._turns.driving:
                self._settle()

    def _settle(self) -> None:
        """Let in who has arrived and let go who is unwanted; for the driver, or when there is none."""
        arrived, self._arrived = self._arrived, []
        unwanted, self._unwanted = self._unwanted, []
        for sequence in arrived:
            if sequence.finish_reason is None:
                self.scheduler.add(sequence)
            else:
                sequence.status = Status.DONE
        for sequence in unwanted:
            self.scheduler.remove(sequence)


def make_engine(
    model, tokenizer, *, selection: float | None = None, warm_memory: int = 0, cache_folder: str | Path | None = None,
    cache_disk: int = 0, **options,
) -> Engine:  # fmt: skip
    """An engine with token tiers: `warm_memory` bytes of RAM for pages in 8 bits, `cache_disk` bytes of files.

    Without warm pages the files hold exact copies only, and a hit changes nothing. With them a hit is approximate, and
    pages of this kind are kept apart from exact ones. selection: see NativeRunner. options: Engine's.
    """
    runner = make_runner(model, tokenizer.vocab_size, selection)
    tiers = None
    if warm_memory or cache_disk:
        exact = not warm_memory
        identity = model_identity(model, runner, selection, exact)
        tiers = Tiers(identity, runner.page_bytes, runner.page_shape, warm_bytes=warm_memory, folder=cache_folder,
                      cold_bytes=cache_disk, exact=exact)  # fmt: skip
    return Engine(model, tokenizer, runner=runner, tiers=tiers, **options)


def free_memory(model) -> int:
    """Bytes that are free where the model is."""
    device = getattr(model, "device", torch.device("cpu"))
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return memory()[1]
