"""A model that says what a test wrote down, at the speed the test wants, behind the real engine and the real server."""

import socket
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import uvicorn

from twelve.engine import Engine
from twelve.serve import app, bind


class ScriptedModel:
    """Answers every prompt with `script` (token ids), whatever was asked; `delay` seconds a step. Is its own runner.

    With `memory` it has gates: token i's is `gate_of(i)`.
    """

    reach, gates = 0, None
    page_bytes, page_shape, cache_bytes_per_token, exact = 4, [(1, 1)], 0, True

    def __init__(self, script: list[int], delay: float, context: int, memory: bool = False):
        self.config = SimpleNamespace(max_position_embeddings=context, vocab_size=1 << 20)
        self.script, self.delay = script, delay
        self.prompts: dict[bytes, int] = {}  # tokens of the prompt, by the sequence's key
        self.passes = 0
        self.memory = object() if memory else None

    def eval(self):
        return self

    def allocate(self, pages):
        pass

    def page(self, index):
        return None

    def write_page(self, index, data):
        pass

    def step(self, step):
        time.sleep(self.delay)
        self.passes += 1
        tokens = []
        for row, key in zip(step.drawn, step.keys, strict=True):
            sequence = np.searchsorted(step.starts, row, side="right") - 1
            at = step.positions[sequence] + row - step.starts[sequence] + 1 - self.prompts[key.tobytes()]
            tokens.append(self.script[min(at, len(self.script) - 1)])
        if self.memory is not None:
            self.gates = np.array([gate_of(token) for token in step.tokens.tolist()], np.float32)
        return np.array(tokens, np.int64), np.zeros(len(tokens))


def gate_of(token: int) -> float:
    return token % 11 / 10


class ScriptedEngine(Engine):
    """Says `text` and ends its turn."""

    def __init__(
        self, tokenizer, text: str, delay: float = 0.0, context: int = 4096, prefill_chunk: int = 512,
        memory: bool = False, **options,
    ):  # fmt: skip
        model = ScriptedModel([*tokenizer.encode(text), min(tokenizer.stop_ids)], delay, context, memory)
        super().__init__(model, tokenizer, prefill_chunk=prefill_chunk, speculation="off", runner=model, **options)

    def _sequence(self, request, streamed):
        sequence = super()._sequence(request, streamed)
        self.model.prompts[sequence.key.tobytes()] = sequence.prompt
        return sequence


@contextmanager
def serving(engine, name: str = "tiny"):
    """The server on a free port of the loopback interface, in a thread; gives its address."""
    sock: socket.socket = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app(engine, name), log_level="warning", lifespan="off", access_log=False))
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(10)
        sock.close()
