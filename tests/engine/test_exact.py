"""Exact mode: the same tokens whatever the batch, the chunk, the prefix hit, the tier and the guesses."""

import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "model"))
from test_native import pack_some
from test_runner import Numbers
from test_transformer import CONFIGS, V3, changed, random_model

from twelve.engine import Request, make_engine, native
from twelve.engine.runner import PAGE

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler on this machine")
VOCABULARY, PROMPT, DRAWN = 1003, 150, 24
MODELS = {"v3-mtp": changed(V3, num_nextn_predict_layers=1, max_position_embeddings=512),
          "llama": changed(CONFIGS["llama"], max_position_embeddings=512)}  # fmt: skip
MATRIX = list(product((1, 2, 8), (7, 64, 512), ("no", "RAM", "disk"), ("off", "on")))


def requests(batch):
    """The first is always the same; greedy and sampled in turn; some share a beginning."""
    rng = np.random.default_rng(0)
    shared = rng.integers(0, VOCABULARY, PROMPT).tolist()
    out = []
    for index in range(batch):
        prompt = shared if index % 3 == 0 else [*shared[: PAGE + index], *rng.integers(0, VOCABULARY, 20).tolist()]
        out += [Request(prompt, DRAWN, temperature, 0.95, seed=index, stop_ids=frozenset(), logprobs=True)
                for temperature in (0.0, 0.8)]  # fmt: skip
    return out


def repetitive(model):
    """Let every answer repeat itself, so that guesses are often right."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                tensor.mul_(0.03)
    return model


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_matrix(name, packed, tmp_path):
    model = repetitive(random_model(MODELS[name], torch.float32))
    if packed:
        pack_some(model)
    words = Numbers()

    def engine(**options):
        return make_engine(model, words, kv_memory=2**24, **options)

    alone = [engine(speculation="off").generate([request])[0] for request in requests(8)]
    assert len({tuple(done.token_ids) for done in alone}) > 8
    guessed = 0
    for number, (batch, chunk, hit, speculation) in enumerate(MATRIX):
        mode = {"off": "off", "on": "mtp" if number % 4 == 1 and model.mtp else "ngram"}[speculation]
        options = {"prefill_chunk": chunk, "speculation": mode}
        if hit == "disk":
            options |= {"cache_folder": tmp_path / str(number), "cache_disk": 2**26}
        found = engine(**options)
        if hit != "no":  # the same texts once before, here or in an engine that is gone
            found.generate(requests(batch))
        if hit == "disk":
            found.close()
            found = engine(**options)
        for _ in range(1 if hit == "disk" else 2 - (hit == "no")):
            answers = found.generate(requests(batch))
            for one, other in zip(answers, alone, strict=False):
                assert one.token_ids == other.token_ids and one.logprobs == other.logprobs
        if hit != "no":
            assert answers[0].cached_tokens == PROMPT // PAGE * PAGE
        if hit == "disk":
            assert found.stats.cached_tokens > 0
        guessed += found.stats.accepted
    assert guessed > 10  # how often it guesses depends on the machine's speed


@pytest.mark.parametrize("name", MODELS)
def test_warm_pages_are_the_stated_exception(name):
    """A hit on an 8-bit page is close, not equal."""
    model = random_model(MODELS[name], torch.float32)
    prompt = requests(1)[0].prompt_ids
    request = Request(prompt, 1, 0.0, seed=0, stop_ids=frozenset(), logprobs=True)
    others = [Request(np.random.default_rng(i).integers(0, VOCABULARY, PROMPT).tolist(), 1) for i in (1, 2, 3)]
    first = make_engine(model, Numbers())
    pages = 5 * first.runner.page_bytes
    engine = make_engine(model, Numbers(), kv_memory=pages, warm_memory=2**24)
    fresh = engine.generate([request])[0]
    for other in others:  # they take its place in the pool
        engine.generate([other])
    again = engine.generate([request])[0]
    assert again.cached_tokens == PROMPT // PAGE * PAGE
    assert again.logprobs != fresh.logprobs and again.logprobs == pytest.approx(fresh.logprobs, abs=0.1)
