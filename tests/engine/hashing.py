"""A model that costs nothing: its next token is a hash of the whole history, read from the pages it is given.

Whatever goes wrong with a page therefore changes the answer, and what an answer should be is known without an engine.
"""

from hashlib import blake2b
from types import SimpleNamespace

import numpy as np

from twelve.engine import Engine
from twelve.engine.runner import PAGE
from twelve.engine.sampler import seed_key

VOCABULARY = 50


def next_token(history: np.ndarray, key: np.ndarray) -> int:
    """Mostly one more than the last, so that it can be guessed; now and then whatever the history says."""
    digest = blake2b(np.asarray(history, np.int64).tobytes() + key.tobytes(), digest_size=8).digest()
    chance = int.from_bytes(digest, "little")
    return chance // 8 % VOCABULARY if chance % 8 == 0 else int(history[-1] + 1) % 7


def expected(prompt: list[int], seed: int, count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(np.array(tokens), seed_key(seed)))
    return tokens[len(prompt) :]


class HashRunner:
    """Keeps the tokens themselves in its pages; log-probabilities are minus the position."""

    page_bytes, page_shape, cache_bytes_per_token, exact = 4 * PAGE, [(1, PAGE)], 4, True
    reach, gates = 70, None  # tokens, more than a page has

    def __init__(self):
        self.steps = 0
        self.fail = None  # an exception that the next step raises

    def allocate(self, pages):
        self.memory = np.full((pages, PAGE), -1, np.float32)

    def page(self, index):
        return self.memory[index]

    def write_page(self, index, data):
        self.memory[index] = data

    def reload(self):
        pass

    def step(self, step):
        self.steps += 1
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error
        for sequence, first in enumerate(step.positions):
            known = self.memory[step.pages[sequence, : -(-first // PAGE)]].ravel()[:first][-self.reach :]
            padded = np.append(np.full(self.reach - len(known), -1), known)
            assert (step.before[sequence] == padded).all()
            for row in range(step.starts[sequence], step.starts[sequence + 1]):
                position = first + row - step.starts[sequence]
                page = step.pages[sequence, position // PAGE]
                assert page >= 0
                self.memory[page, position % PAGE] = step.tokens[row]
        self.last, tokens, logprobs = step, [], []
        self.gates = np.full(len(step.tokens), -1, np.float32)
        for index, row in enumerate(step.drawn):
            sequence = np.searchsorted(step.starts, row, side="right") - 1
            position = step.positions[sequence] + row - step.starts[sequence]
            history = self.memory[step.pages[sequence, : position // PAGE + 1]].ravel()[: position + 1]
            assert (history >= 0).all()
            self.gates[row] = position
            tokens.append(next_token(history.astype(np.int64), step.keys[index]))
            logprobs.append(-float(position))
        return np.array(step.targets if step.targets is not None else tokens, np.int64), np.array(logprobs)

    def draft(self, rows, following, drawn, temperature, keys):
        assert (np.diff(rows) > 0).all() and len(rows) == len(following) and len(drawn) == len(temperature)
        return (following[drawn] + 1) % 7


def hash_engine(pages: int, context: int = 256, mtp: bool = False, tiers=None, **options) -> Engine:
    config = SimpleNamespace(max_position_embeddings=context, vocab_size=1 << 20)
    model = SimpleNamespace(config=config, mtp=[None] if mtp else [])
    model.eval = lambda: model
    tokenizer = SimpleNamespace(
        vocab_size=VOCABULARY, stop_ids=frozenset(), decode=lambda ids: "x", decode_bytes=lambda ids: b"x" * len(ids)
    )
    options = {"prefill_chunk": 64, "max_sequences": 8} | options
    return Engine(
        model, tokenizer, kv_memory=pages * HashRunner.page_bytes, tiers=tiers, runner=HashRunner(), **options
    )


def check_pool(engine: Engine) -> None:
    """Every page is held, idle or free, and is in exactly one place; holders are those that know of it."""
    pool, scheduler = engine.pool, engine.scheduler
    counted = [0] * pool.count
    for sequence in scheduler.running:
        assert len(set(sequence.pages)) == len(sequence.pages)
        for page in sequence.pages:
            counted[page] += 1
    assert counted == pool.holders
    held = {page for page, holders in enumerate(pool.holders) if holders}
    assert sorted([*held, *pool._free, *pool._idle]) == list(range(pool.count))
    assert {page: key for key, page in pool._index.items()} == {
        page: key for page, key in enumerate(pool._keys) if key is not None
    }
    assert all(pool._keys[page] is not None for page in pool._idle)
    assert not any(pool._keys[page] for page in pool._free)
    assert sorted(scheduler._slots + [one.slot for one in scheduler.running]) == list(range(len(scheduler._table)))
    for sequence in scheduler.running:
        assert PAGE * sequence.sealed <= sequence.computed < len(sequence.tokens)
        row = scheduler._table[sequence.slot]
        assert row[: len(sequence.pages)].tolist() == sequence.pages and (row[len(sequence.pages) :] == -1).all()
