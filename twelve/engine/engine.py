"""One request at a time, one decode path with a cache."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from twelve.engine.detokenize import TextStream
from twelve.engine.request import Completion, Delta, Request
from twelve.engine.sampler import log_probability, make_sampler
from twelve.engine.turn import FairLock
from twelve.errors import InputError


class ContextLengthError(InputError):
    """The prompt does not fit into the model's context."""


class Engine:
    """Runs a model in evaluation mode. Threads may share it: their requests are served in the order they came."""

    def __init__(self, model, tokenizer, prefill_chunk: int = 512):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.context = model.config.max_position_embeddings  # tokens of a prompt and its completion together
        self.prefill_chunk = prefill_chunk
        self._device = next(model.parameters()).device
        self._turn = FairLock()
        self._pieces: dict[int, bytes] = {}

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """Complete every request, in order. InputError if one of them cannot be served, before any has begun."""
        streams = [(request, self.stream(request)) for request in requests]
        return [collect(request, deltas) for request, deltas in streams]

    def stream(self, request: Request) -> Iterator[Delta]:
        """Complete one request step by step; closing the iterator stops it at once.

        The request is checked here and waits for its turn at the first `next`. The turn ends with the iterator: a
        thread that asks for a second stream while it holds an open one waits for itself.
        """
        prompt = len(request.prompt_ids)
        if not prompt:
            raise InputError("the prompt is empty: give at least one token")
        if prompt >= self.context:
            raise ContextLengthError(
                f"the prompt has {prompt} tokens, and the model's context of {self.context} leaves no room for an "
                "answer: shorten the prompt"
            )
        return self._decode(request)

    def _decode(self, request: Request) -> Iterator[Delta]:
        prompt = list(request.prompt_ids)
        room = self.context - len(prompt)
        limit = room if request.max_tokens is None else min(request.max_tokens, room)
        stop_ids = self.tokenizer.stop_ids if request.stop_ids is None else request.stop_ids
        sample = make_sampler(request.temperature, request.top_p, request.seed)
        text = TextStream(self._piece, request.stop)
        with self._turn:
            yield Delta()  # its turn has come
            cache = self.model.new_cache(batch_size=1, max_length=len(prompt) + limit)
            for start in range(0, len(prompt), self.prefill_chunk):
                logits = self._forward(prompt[start : start + self.prefill_chunk], cache)
                yield Delta()
            for count in range(1, limit + 1):
                token = sample(logits, cache.length)
                delta = Delta(token_ids=[token])
                if request.logprobs:
                    delta.logprobs.append(log_probability(logits, token))
                ended = token in stop_ids
                if not ended:
                    delta.text = text.feed(token)
                if ended or text.stopped:
                    delta.finish_reason = "stop"
                elif count == limit:
                    delta.finish_reason = "length"
                if delta.finish_reason:
                    delta.text += text.flush()
                yield delta
                if delta.finish_reason:
                    return
                logits = self._forward([token], cache)

    # The decorator, not a `with` inside the generator: inference mode belongs to the thread and would leak to whoever
    # consumes the deltas.
    @torch.inference_mode()
    def _forward(self, ids: Sequence[int], cache) -> np.ndarray:
        """Append ids to the cache; the logits after the last one, [V] float64."""
        batch = torch.tensor([ids], device=self._device)  # [1, T]
        logits = self.model(batch, cache=cache, last_only=True)[0, -1]
        # a model's vocabulary may be padded beyond its tokenizer's
        logits = logits[: self.tokenizer.vocab_size].cpu().double().numpy()  # not every device has float64
        if not np.isfinite(logits.max()):
            raise InputError("the model's output is not a number: its weights are damaged, or its training diverged")
        return logits

    def _piece(self, token: int) -> bytes:
        """The bytes of a token; none for control tokens, which are no text."""
        if token not in self._pieces:
            shown = self.tokenizer.decode([token])
            self._pieces[token] = self.tokenizer.decode_bytes([token]) if shown else b""
        return self._pieces[token]


def collect(request: Request, deltas: Iterable[Delta]) -> Completion:
    """Put the deltas of a request together."""
    done = Completion("", [], [], "length", len(request.prompt_ids))
    texts = []
    for delta in deltas:
        texts.append(delta.text)
        done.token_ids += delta.token_ids
        done.logprobs += delta.logprobs
        done.finish_reason = delta.finish_reason or done.finish_reason
    done.text = "".join(texts)
    return done
