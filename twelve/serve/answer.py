"""From the engine's deltas to the bodies and events of a chat completion."""

import asyncio
import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass

from twelve.engine import Delta, Engine, Request, sub_seed
from twelve.errors import InputError
from twelve.serve import protocol
from twelve.serve.conversation import Prompt
from twelve.serve.protocol import ApiError, ChatRequest

KEEPALIVE_SECONDS = 10.0  # proxies and clients tend to give up after 30 to 60 silent seconds
log = logging.getLogger("twelve.serve")  # never sees what was asked or answered


@dataclass(frozen=True)
class Part:
    """What one step of the engine gave."""

    texts: list[tuple[str, str]]  # (kind, text), kind "reasoning" or "content"
    logprobs: list[dict]
    gates: list[dict]  # of tokens in their order, which come a step after the tokens
    finish_reason: str | None = None


class Answer:
    """One choice of a chat completion while it is made."""

    def __init__(self, engine: Engine, prompt: Prompt, chat: ChatRequest, index: int):
        most = engine.fitting(prompt.ids, chat.max_tokens)
        request = Request(
            prompt.ids, most, chat.temperature, chat.top_p, sub_seed(chat.seed, index), chat.stop,
            logprobs=chat.logprobs, memory_gates=chat.memory_gates,
        )  # fmt: skip
        self.index = index
        self.prompt_tokens, self.completion_tokens, self.cached_tokens = len(prompt.ids), 0, 0
        self.finish_reason: str | None = None
        self._tokenizer = engine.tokenizer
        self._splitter = prompt.splitter()
        self._left = threading.Event()  # nobody waits for it any more
        self._deltas = engine.stream(request, self._left)
        self._gated = chat.memory_gates
        self._unread: deque[int] = deque()  # tokens whose gate is not known yet

    async def parts(self) -> AsyncIterator[Part | None]:
        """What the steps give; None when there was none for a while."""
        started = time.perf_counter()
        try:
            async with aclosing(in_thread(self._deltas, self._left, KEEPALIVE_SECONDS)) as deltas:
                async for delta in deltas:
                    yield None if delta is None else self._read(delta)
        finally:
            log.info(
                "%d + %d tokens, %.1f s, %s", self.prompt_tokens, self.completion_tokens,
                time.perf_counter() - started, self.finish_reason or "not finished",
            )  # fmt: skip

    def _read(self, delta: Delta) -> Part:
        self.completion_tokens += len(delta.token_ids)
        self.cached_tokens += delta.cached_tokens
        self.finish_reason = delta.finish_reason
        texts = self._splitter.feed(delta.text) + (self._splitter.flush() if delta.finish_reason else [])
        drawn = zip(delta.token_ids, delta.logprobs, strict=False)  # no logprobs unless asked for
        logprobs = [{**self._shown(token), "logprob": logprob, "top_logprobs": []} for token, logprob in drawn]
        return Part(texts, logprobs, self._gates(delta) if self._gated else [], delta.finish_reason)

    def _gates(self, delta: Delta) -> list[dict]:
        """Every token with its gate as that becomes known; the last token of all is never read, and has none."""
        self._unread += delta.token_ids
        found = [{**self._shown(self._unread.popleft()), "gate": round(gate, 4)} for gate in delta.memory_gates]
        return found + [{**self._shown(token), "gate": None} for token in self._unread if delta.finish_reason]

    def _shown(self, token: int) -> dict:
        data = self._tokenizer.decode_bytes([token])
        return {"token": data.decode(errors="replace"), "bytes": list(data)}


async def whole_answer(head: dict, answers: list[Answer]) -> dict:
    """The answer in one piece."""
    said = [{"content": [], "reasoning": [], "logprobs": [], "gates": []} for _ in answers]
    async with aclosing(together(answers)) as parts:
        async for answer, part in parts:
            if part is not None:
                said[answer.index]["logprobs"] += part.logprobs
                said[answer.index]["gates"] += part.gates
                for kind, text in part.texts:
                    said[answer.index][kind].append(text)
    choices = [
        {
            "index": answer.index,
            "message": protocol.message("".join(own["content"]), "".join(own["reasoning"])),
            "finish_reason": answer.finish_reason,
            **protocol.by_token(own["logprobs"], own["gates"]),
        }
        for answer, own in zip(answers, said, strict=True)
    ]
    return {**head, "object": "chat.completion", "choices": choices, "usage": total_usage(answers)}


async def stream_events(head: dict, chat: ChatRequest, answers: list[Answer]) -> AsyncIterator[str]:
    """The answer as server-sent events, those of all choices as they come."""
    head = {**head, "object": "chat.completion.chunk"} | ({"usage": None} if chat.include_usage else {})

    def chunk(answer: Answer, delta: dict, finish_reason: str | None = None) -> str:
        choice = {"index": answer.index, "delta": delta, "finish_reason": finish_reason}
        written = protocol.event({**head, "choices": [choice | protocol.by_token(*waiting[answer.index])]})
        waiting[answer.index] = ([], [])
        return written

    waiting = [([], []) for _ in answers]  # logprobs and gates of tokens whose text is held back
    try:
        for answer in answers:
            yield chunk(answer, {"role": "assistant", "content": ""})
        async with aclosing(together(answers)) as parts:
            async for answer, part in parts:
                if part is None:
                    yield ": still working\n\n"
                    continue
                for held, new in zip(waiting[answer.index], (part.logprobs, part.gates), strict=True):
                    held += new
                for kind, text in part.texts:
                    yield chunk(answer, protocol.delta(kind, text))
                if part.finish_reason:
                    yield chunk(answer, {}, part.finish_reason)
        if chat.include_usage:
            yield protocol.event({**head, "choices": [], "usage": total_usage(answers)})
    except Exception as error:  # the status line is gone: tell it in the stream
        yield protocol.event(server_error(error).body)
    yield protocol.event("[DONE]")


async def together(answers: list[Answer]) -> AsyncIterator[tuple[Answer, Part | None]]:
    """The parts of all answers as they come, so that the engine works on all at once."""
    queue = asyncio.Queue()

    async def pump(answer: Answer) -> None:
        error: Exception | None = None
        try:
            async with aclosing(answer.parts()) as parts:
                async for part in parts:
                    queue.put_nowait((answer, part, False))
        except Exception as caught:
            error = caught
        queue.put_nowait((answer, error, True))

    pumps = [asyncio.ensure_future(pump(answer)) for answer in answers]
    try:
        left = len(pumps)
        while left:
            answer, part, ended = await queue.get()
            if not ended:
                yield answer, part
            elif part is not None:
                raise part
            else:
                left -= 1
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


def total_usage(answers: list[Answer]) -> dict:
    drawn = sum(answer.completion_tokens for answer in answers)
    return protocol.usage(answers[0].prompt_tokens, drawn, answers[0].cached_tokens)


async def in_thread(deltas: Iterator[Delta], left: threading.Event, idle_seconds: float) -> AsyncIterator[Delta | None]:
    """Iterate in a thread; None whenever nothing came for a while. Leaving the loop sets `left`, and closes `deltas`
    after this step."""
    loop, queue = asyncio.get_running_loop(), asyncio.Queue()

    def work() -> None:
        end: Exception | None = None
        try:
            for delta in deltas:
                if left.is_set():
                    return
                if delta.token_ids or delta.cached_tokens:  # the rest has nothing for the client
                    loop.call_soon_threadsafe(queue.put_nowait, (delta, None))
        except Exception as error:
            end = error
        finally:
            deltas.close()  # makes room for others
        if not left.is_set():
            loop.call_soon_threadsafe(queue.put_nowait, (None, end))

    threading.Thread(target=work).start()  # no daemon: the process may not end in the middle of a step
    try:
        while True:
            try:
                delta, end = await asyncio.wait_for(queue.get(), idle_seconds)
            except TimeoutError:
                yield None
                continue
            if end is not None:
                raise end
            if delta is None:
                return
            yield delta
    finally:
        left.set()


def server_error(error: Exception) -> ApiError:
    """What the client may know of a failure. The log gets the place, not the message, which may quote the request."""
    if isinstance(error, InputError):
        return ApiError(500, str(error))
    log.error("%s in\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)[-20:]).rstrip())
    return ApiError(500, "the server failed; its log says where")
