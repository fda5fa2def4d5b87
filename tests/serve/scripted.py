"""A model that says what a test wrote down, at the speed the test wants, behind the real engine and the real server."""

import socket
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import uvicorn
from torch import nn

from twelve.engine import Engine
from twelve.serve import app, bind


class ScriptedModel(nn.Module):
    """Answers every prompt with `script` (token ids), whatever was asked; `delay` seconds a forward pass."""

    def __init__(self, vocab_size: int, script: list[int], delay: float = 0.0, context: int = 4096):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(max_position_embeddings=context)
        self.vocab_size, self.script, self.delay = vocab_size, script, delay
        self.passes = 0

    def new_cache(self, batch_size=1, max_length=None):
        return SimpleNamespace(length=0, prompt=None)

    def forward(self, ids, cache=None, last_only=False):
        time.sleep(self.delay)
        self.passes += 1
        cache.length += ids.shape[1]
        logits = torch.zeros(1, 1, self.vocab_size)
        at = max(0, cache.length - self.prompt_tokens)  # 0 while the prompt is read
        logits[..., self.script[min(at, len(self.script) - 1)]] = 100.0
        return logits


class ScriptedEngine(Engine):
    """Says `text` and ends its turn."""

    def __init__(self, tokenizer, text: str, delay: float = 0.0, context: int = 4096, prefill_chunk: int = 512):
        stop = min(tokenizer.stop_ids)
        model = ScriptedModel(tokenizer.vocab_size, [*tokenizer.encode(text), stop], delay, context)
        super().__init__(model, tokenizer, prefill_chunk)

    def _decode(self, request):
        self.model.prompt_tokens = len(request.prompt_ids)
        return super()._decode(request)


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
