"""Models with Engram and hyper-connections in both runners: right, and exact, whatever the arrangement of the rows."""

import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "model"))
from test_exact import PROMPT, repetitive, requests
from test_native import pack_some, run, runner_of, sequences
from test_runner import VOCABULARY, Numbers, following, full_scores, make_step
from test_transformer import CONFIGS, V3, changed, random_model

from twelve.engine import Engine, Request, make_engine, native
from twelve.engine.runner import PAGE, PlainRunner, Step, make_runner, model_identity
from twelve.engine.scheduler import before

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C++ compiler on this machine")
STREAMS = {"model_type": "twelve", "hc_mult": 4, "max_position_embeddings": 512}
MEMORY = {"model_type": "twelve", "engram_layer_ids": [1, 0], "engram_vocab_size": 300, "engram_head_dim": 8,
          "engram_n_heads": 2, "max_position_embeddings": 512}  # fmt: skip
BOTH, LLAMA = STREAMS | MEMORY, CONFIGS["llama"]
MODELS = {
    "streams": changed(V3, **STREAMS),
    "streams-deepseek-v4": changed(V3, **STREAMS, hc_sinkhorn_order="deepseek_v4"),
    "streams-to-a-tolerance": changed(V3, **STREAMS | {"hc_mult": 3}, hc_tolerance=0.03),
    "streams-unconstrained": changed(LLAMA, **STREAMS | {"hc_mult": 2}, hc_constrained=False),
    "memory": changed(V3, **MEMORY),
    "memory-bfloat16": changed(LLAMA, **MEMORY, engram_dtype="bfloat16", engram_max_ngram_size=2),
    "memory-int8": changed(V3, **MEMORY, engram_dtype="int8", engram_kernel_size=2),
    "memory-no-convolution": changed(LLAMA, **MEMORY, engram_kernel_size=0),
    "both-v3": changed(V3, **BOTH, num_nextn_predict_layers=1),
    "both-llama": changed(LLAMA, **BOTH, engram_dtype="bfloat16"),
    "both-no-convolution": changed(V3, **BOTH, engram_kernel_size=0, engram_dtype="int8", num_nextn_predict_layers=1),
}  # fmt: skip


def model_of(name, dtype=torch.float32):
    model = random_model(MODELS[name], dtype)
    if model.memory is not None:
        model.memory.compressed = (np.arange(model.config.vocab_size) * 2 // 3).astype(np.int32)
        model.memory.create()
        fill(model.memory.table)
    return model


def fill(table, seed=0):
    """Rows of numbers about 1: one step of training, from zero."""
    leaf = torch.zeros(table.count, table.width, requires_grad=True)
    leaf.grad = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(seed))
    table.begin("unused")
    table.pending.append((np.arange(table.count), leaf))
    table.update(1.0)


# --- the native step --------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_models_own(name):
    model = model_of(name)
    vocab = model.config.vocab_size
    texts = sequences(vocab, (150, 9, 1, 66))
    found = run(runner_of(model, vocab), texts, 50, vocab)
    for text, logits in zip(texts, found, strict=True):
        with torch.inference_mode():
            wanted = model(torch.from_numpy(text)[None])[0].numpy()
        assert wanted.std() > 0.5
        # unconstrained streams amplify what is rounded: the model's own float32 is as far from its float64
        np.testing.assert_allclose(logits, wanted, atol=2e-3 if "unconstrained" in name else 1e-4)


@needs_compiler
@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("streams")])
def test_a_stream_that_hardly_gets_anything_is_as_in_the_model(name):
    """Where a whole row of comb vanishes beside the others, each of its entries counts as the least."""
    model = model_of(name)
    n, vocab = model.config.hc_mult, model.config.vocab_size
    with torch.no_grad():
        for layer in model.layers:
            comb = layer.attn_hc.base[2 * n :].view(n, n)
            (comb.T if model.config.hc_sinkhorn_order == "deepseek_v4" else comb)[0] = -200
    [text] = sequences(vocab, (70,))
    [found] = run(runner_of(model, vocab), [text], 50, vocab)
    with torch.inference_mode():
        wanted = model(torch.from_numpy(text)[None])[0].numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_row_is_the_same_to_the_last_bit_in_any_company(name, packed):
    model = model_of(name)
    if packed:
        pack_some(model)
    vocab = model.config.vocab_size
    texts = sequences(vocab, (150, 9, 66))
    alone = [run(runner_of(model, vocab), [text], 1, vocab)[0] for text in texts]
    threads = torch.get_num_threads()
    try:
        for cuts, count in ((2, 1), (7, 2), (64, 3), (1000, 1)):
            torch.set_num_threads(count)
            for one, other in zip(alone, run(runner_of(model, vocab), texts, cuts, vocab), strict=True):
                assert np.array_equal(one, other)
    finally:
        torch.set_num_threads(threads)


@needs_compiler
@pytest.mark.parametrize("name", ["both-v3", "both-llama"])
def test_bfloat16_weights_and_packed_ones_are_close_to_the_plain_runners(name):
    for change in (lambda model: model.bfloat16(), pack_some):
        model = model_of(name)
        change(model)
        texts = [text.tolist() for text in sequences(VOCABULARY, (100,))]
        parts = [(texts[0], 0, 99, [0, 1])]
        scores = []
        for kind in (PlainRunner, native.NativeRunner):
            runner = kind(model, VOCABULARY)
            runner.allocate(2)
            step = make_step(parts, targets=following(parts), reach=runner.reach)
            scores.append(runner.step(step)[1])
        assert np.abs(scores[0] - scores[1]).mean() < 0.05


@needs_compiler
@pytest.mark.parametrize("name", ["both-v3", "both-no-convolution"])
def test_drafts_and_gates_equal_the_plain_runners(name):
    model = model_of(name)
    vocab = model.config.vocab_size
    texts = sequences(vocab, (70, 20))
    drafts, gates = [], []
    for kind in (native.NativeRunner, PlainRunner):
        runner = kind(model, vocab)
        runner.allocate(5)
        drawn, greedy, keys = np.array([69, 89]), np.zeros(2, np.float32), np.zeros((2, 4), np.uint32)
        step = Step(np.concatenate(texts), np.array([0, 70, 90]), np.zeros(2, np.int64),
                    np.array([[3, 1], [2, -1]], np.int32), drawn, greedy, np.ones(2, np.float32), keys,
                    before=before([([], 0)] * 2, runner.reach))  # fmt: skip
        tokens, _ = runner.step(step)
        gates.append(runner.gates)
        known = np.concatenate([texts[0][1:], tokens[:1], texts[1][1:], tokens[1:]])
        every = np.arange(90)
        drafts.append(runner.draft(every, known, every, np.zeros(90, np.float32), np.zeros((90, 4), np.uint32)))
    assert (drafts[0] == drafts[1]).all() and len(set(drafts[0].tolist())) > 20
    np.testing.assert_allclose(*gates, atol=1e-5)


@needs_compiler
def test_a_table_without_an_address_is_read_by_the_plain_runner():
    model = model_of("memory")
    request = Request(sequences(VOCABULARY, (100,))[0].tolist(), 10, temperature=0, stop_ids=frozenset())
    mapped = make_engine(model, Numbers())
    found = mapped.generate([request])
    assert isinstance(mapped.runner, native.NativeRunner)
    model.memory.table._rows.array, held = None, model.memory.table._rows.array
    model.memory.table._rows.take = lambda rows: held[rows]
    unmapped = make_engine(model, Numbers())
    assert isinstance(unmapped.runner, PlainRunner)
    assert unmapped.generate([request])[0].token_ids == found[0].token_ids


@pytest.mark.parametrize("kind", [PlainRunner, pytest.param(native.NativeRunner, marks=needs_compiler)])
@pytest.mark.parametrize("name", ["both-v3", "memory-no-convolution"])
@pytest.mark.parametrize("far", [False, True])
def test_all_rows_of_a_step_are_fetched_where_the_table_may_lie_on_a_disk(name, kind, far, monkeypatch):
    model = model_of(name)
    runner, table = kind(model, VOCABULARY), type(model.memory.table)
    runner.allocate(5)
    fetched = []
    texts = [text.tolist() for text in sequences(VOCABULARY, (90, 20))]
    parts = [(texts[0], 30, 59, [4, 2]), (texts[1], 0, 19, [1])]
    scores = []
    for ready in (False, far):
        monkeypatch.setattr(table, "is_far", property(lambda table, ready=ready: ready))
        monkeypatch.setattr(table, "prefetch", lambda table, rows: fetched.append(rows))
        runner.step(make_step([(texts[0], 0, 30, [4])], targets=np.array(texts[0][1:31]), reach=runner.reach))
        scores.append(runner.step(make_step(parts, targets=following(parts), reach=runner.reach))[1])
    assert np.array_equal(*scores)
    assert len(fetched) == 2 * far
    for text, first in ((texts[0][:89], 30), (texts[1][:19], 0)) if far else ():
        ids = torch.tensor([text])
        wanted = model.memory.addresses(ids, model.positions(ids))[:, :, first:]
        assert np.isin(wanted, fetched[1]).all()


# --- the plain runner -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["both-v3", "both-llama", "both-no-convolution"])
def test_pieces_and_batches_equal_the_full_pass(name):
    model = model_of(name, torch.float64)
    runner = PlainRunner(model, VOCABULARY)
    runner.allocate(12)
    runner._pool.fill_(float("nan"))  # what others left behind does not matter
    texts = [text.tolist() for text in sequences(VOCABULARY, (91, 70, 20))]
    pages = [[4, 2], [0, 11], [5]]
    for chunks in ((1, 2, 1), (7, 16, 3), (90, 2, 19)):
        scores, done = [[] for _ in texts], [0] * 3
        while live := [i for i in range(3) if done[i] < len(texts[i]) - 1]:
            parts = [(texts[i], done[i], min(chunks[i], len(texts[i]) - 1 - done[i]), pages[i]) for i in live]
            _, logprobs = runner.step(make_step(parts, targets=following(parts), reach=runner.reach))
            for i, (*_, count, _) in zip(live, parts, strict=True):
                scores[i].append(logprobs[:count])
                logprobs = logprobs[count:]
                done[i] += count
        for ids, found in zip(texts, scores, strict=True):
            assert np.abs(np.concatenate(found) - full_scores(model, ids)).max() < 1e-10


@pytest.mark.parametrize("kind", [PlainRunner, pytest.param(native.NativeRunner, marks=needs_compiler)])
def test_the_answer_tells_where_memory_opened(kind):
    model = model_of("both-llama")
    engine = Engine(model, Numbers(), runner=kind(model, VOCABULARY), prefill_chunk=20)
    prompt = sequences(VOCABULARY, (90,))[0].tolist()
    request = Request(prompt, 15, seed=3, memory_gates=True, stop_ids=frozenset())
    deltas = list(engine.stream(request))
    [done] = engine.generate([request])
    assert done.cached_tokens > 0 and engine.generate([Request(prompt, 15, seed=3)])[0].memory_gates == []
    with torch.no_grad():
        model(torch.tensor([prompt + done.token_ids]))
    gates = sum(model.layers[index].engram.last_gates[0].mean(-1) for index in (0, 1)) / 2
    assert done.memory_gates == pytest.approx(gates[len(prompt) : -1].tolist(), abs=1e-4)
    told = [gate for delta in deltas for gate in delta.memory_gates]
    assert told == pytest.approx(done.memory_gates, abs=1e-5)
    assert gates.std() > 0.01


# --- the engine -------------------------------------------------------------------------------------------------------

ARRANGED = ["streams", "memory", "memory-int8", "both-v3", "both-llama"]
# every pair of values once or more
MATRIX = [(1, 7, "RAM", "on"), (1, 512, "no", "off"), (2, 7, "disk", "off"), (2, 64, "no", "on"), (8, 64, "RAM", "off"),
          (8, 512, "disk", "on"), (8, 7, "no", "on"), (1, 64, "disk", "on"), (2, 512, "RAM", "on")]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize(("name", "packed"), [*product(ARRANGED, [False]), ("both-v3", True), ("both-llama", True)])
def test_the_same_tokens_whatever_the_arrangement(name, packed, tmp_path):
    model = repetitive(model_of(name))
    if packed:
        pack_some(model)

    def engine(**options):
        return make_engine(model, Numbers(), kv_memory=2**24, **options)

    alone = [engine(speculation="off").generate([request])[0] for request in requests(8)]
    assert len({tuple(done.token_ids) for done in alone}) > 8
    for number, (batch, chunk, hit, speculation) in enumerate(MATRIX):
        mode = {"off": "off", "on": "mtp" if number % 2 and model.mtp else "ngram"}[speculation]
        options = {"prefill_chunk": chunk, "speculation": mode}
        if hit == "disk":
            options |= {"cache_folder": tmp_path / str(number), "cache_disk": 2**26}
        found = engine(**options)
        if hit != "no":
            found.generate(requests(batch))
        if hit == "disk":
            found.close()
            found = engine(**options)
        answers = found.generate(requests(batch))
        assert hit == "no" or answers[0].cached_tokens == PROMPT // PAGE * PAGE
        for one, other in zip(answers, alone, strict=False):
            assert one.token_ids == other.token_ids and one.logprobs == other.logprobs


@needs_compiler
@pytest.mark.parametrize("name", ["both-v3", "both-llama"])
def test_who_gives_way_goes_on_with_the_same(name):
    model = model_of(name)
    asked = [Request(text.tolist(), 50, seed=index, logprobs=True, memory_gates=True, stop_ids=frozenset())
             for index, text in enumerate(sequences(VOCABULARY, range(50, 60)))]  # fmt: skip
    alone = [make_engine(model, Numbers(), speculation="off").generate([request])[0] for request in asked]
    page_bytes = make_runner(model, VOCABULARY).page_bytes
    for chunk in (7, 512):
        engine = make_engine(model, Numbers(), kv_memory=12 * page_bytes, prefill_chunk=chunk, speculation="ngram")
        assert engine.generate(asked) == alone and engine.stats.preemptions > 0


@pytest.mark.parametrize("kind", [PlainRunner, pytest.param(native.NativeRunner, marks=needs_compiler)])
@pytest.mark.parametrize("name", ["both-v3", "both-llama"])
def test_pages_in_8_bits_are_close(name, kind):
    model = model_of(name)
    runner = kind(model, VOCABULARY)
    assert sum(count * sum(lengths) for count, *lengths in runner.page_shape) * 4 == runner.page_bytes
    plain = PlainRunner(model, VOCABULARY)
    assert runner.cache_bytes_per_token == plain.cache_bytes_per_token == model.new_cache(1, 8).bytes_per_token
    prompt = requests(1)[0].prompt_ids
    request = Request(prompt, 1, 0.0, seed=0, stop_ids=frozenset(), logprobs=True)
    others = [Request(np.random.default_rng(i).integers(0, VOCABULARY, PROMPT).tolist(), 1) for i in (1, 2, 3)]
    engine = make_engine(model, Numbers(), kv_memory=5 * runner.page_bytes, warm_memory=2**24)
    fresh = engine.generate([request])[0]
    for other in others:  # they take its place in the pool
        engine.generate([other])
    again = engine.generate([request])[0]
    assert again.cached_tokens == PROMPT // PAGE * PAGE
    assert again.logprobs != fresh.logprobs and again.logprobs == pytest.approx(fresh.logprobs, abs=0.1)


def test_the_identity_tells_tables_apart(tmp_path):
    model = model_of("both-llama")
    runner, memory = PlainRunner(model, VOCABULARY), model.memory
    found = [model_identity(model, runner)]
    assert model_identity(model, runner) == found[0]
    fill(memory.table, seed=1)
    found.append(model_identity(model, runner))
    for name in ("one", "two"):
        memory.table.save_as(tmp_path / name)
    for name in ("one", "two"):
        memory.table = type(memory.table).open(tmp_path / name, memory.identity)
        found.append(model_identity(model, runner))
        assert model_identity(model, runner) == found[-1]
    memory.compressed = np.arange(model.config.vocab_size, dtype=np.int32)
    found.append(model_identity(model, runner))
    assert len(set(found)) == 5
