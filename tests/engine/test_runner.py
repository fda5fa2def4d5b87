"""The plain runner against the model's full forward pass: every family, in pieces, in batches, with MTP drafts."""

import numpy as np
import pytest
import torch

from twelve.config import ModelConfig, small_v3
from twelve.engine import Engine, Request
from twelve.engine.engine import make_engine
from twelve.engine.runner import PAGE, PlainRunner, Step, model_identity
from twelve.engine.sampler import draw, seed_key
from twelve.engine.scheduler import before
from twelve.engine.tiers import Tiers
from twelve.errors import InputError
from twelve.model import Transformer

VOCABULARY = 203
V3 = small_v3(VOCABULARY + 5, width=64, layers=2, experts=8, experts_per_token=3, context=256, mtp=1)
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.9,
        "original_max_position_embeddings": 16}  # fmt: skip
GQA = {"vocab_size": VOCABULARY + 5, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
       "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}  # fmt: skip
CONFIGS = {
    "v3": V3,
    "v3-q-lora-yarn": ModelConfig(**{**V3.to_dict(), "q_lora_rank": 24, "rope_parameters": YARN}),
    "v2": ModelConfig(**{**V3.to_dict(), "model_type": "deepseek_v2", "scoring_func": "softmax", "n_group": 2,
                         "topk_group": 1, "topk_method": "group_limited_greedy", "v_head_dim": 24}),
    "llama": ModelConfig(model_type="llama", **GQA),
    "qwen2-tied": ModelConfig(model_type="qwen2", attention_bias=True, tie_word_embeddings=True, **GQA),
    "qwen3": ModelConfig(model_type="qwen3", head_dim=24, **GQA),
}  # fmt: skip


def random_model(config: ModelConfig, dtype=torch.float64) -> Transformer:
    """Weights large enough that a wrong formula shows."""
    generator = torch.Generator().manual_seed(0)
    model = Transformer(config).to(dtype)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.copy_(noise * 0.15 if tensor.dim() > 1 else 1 + 0.3 * noise if "norm" in name else 0.1 * noise)
    return model.eval()


def random_ids(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()


def make_step(parts, **more) -> Step:
    """Of (ids, first, count, pages): rows first .. first + count of each, a token drawn after every row."""
    counts = [count for _, _, count, _ in parts]
    rows = sum(counts)
    table = np.full((len(parts), max(len(pages) for *_, pages in parts)), -1, np.int32)
    for row, (*_, pages) in zip(table, parts, strict=True):
        row[: len(pages)] = pages
    tokens = [token for ids, first, count, _ in parts for token in ids[first : first + count]]
    defaults = {
        "before": before([(ids, first) for ids, first, *_ in parts], more.pop("reach", 0)),
        "drawn": np.arange(rows), "temperature": np.zeros(rows, np.float32), "top_p": np.ones(rows, np.float32),
        "keys": np.zeros((rows, 4), np.uint32),
    }  # fmt: skip
    return Step(
        np.array(tokens), np.cumsum([0, *counts]), np.array([first for _, first, *_ in parts]), table,
        **(defaults | more),
    )  # fmt: skip


def following(parts) -> np.ndarray:
    return np.array([token for ids, first, count, _ in parts for token in ids[first + 1 : first + count + 1]])


def full_scores(model, ids) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, :-1, :VOCABULARY]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_pieces_and_batches_equal_the_full_pass(name):
    model = random_model(CONFIGS[name])
    runner = PlainRunner(model, VOCABULARY)
    runner.allocate(12)
    runner._pool.fill_(float("nan"))  # what others left behind does not matter
    sequences = [(random_ids(151, 1), [4, 2, 7]), (random_ids(80, 2), [0, 11]), (random_ids(20, 3), [5])]
    for chunks in ((1, 1, 1), (7, 16, 3), (64, 64, 64), (150, 2, 19)):
        scores, done = [[] for _ in sequences], [0] * 3
        while any(at < len(ids) - 1 for at, (ids, _) in zip(done, sequences, strict=True)):
            parts, owners = [], []
            for index, ((ids, pages), chunk) in enumerate(zip(sequences, chunks, strict=True)):
                if count := min(chunk, len(ids) - 1 - done[index]):
                    parts.append((ids, done[index], count, pages))
                    owners.append(index)
                    done[index] += count
            tokens, logprobs = runner.step(make_step(parts, targets=following(parts)))
            assert (tokens == following(parts)).all()
            for (*_, count, _), index in zip(parts, owners, strict=True):
                scores[index].append(logprobs[:count])
                logprobs = logprobs[count:]
        for (ids, _), found in zip(sequences, scores, strict=True):
            assert np.abs(np.concatenate(found) - full_scores(model, ids)).max() < 1e-10


def test_tokens_are_drawn_from_the_logits_with_the_sequences_own_coins():
    model, ids = random_model(V3), random_ids(30)
    runner = PlainRunner(model, VOCABULARY)
    runner.allocate(1)
    keys = np.tile(seed_key(5), (3, 1))
    settings = {
        "drawn": np.array([3, 10, 29]), "temperature": np.array([0.0, 1.0, 0.7], np.float32),
        "top_p": np.array([1.0, 1.0, 0.9], np.float32), "keys": keys,
    }  # fmt: skip
    tokens, logprobs = runner.step(make_step([(ids, 0, 30, [0])], logprobs=True, **settings))
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, settings["drawn"], :VOCABULARY].numpy()
    expected = draw(logits, np.array([4, 11, 30]), settings["temperature"], settings["top_p"], keys)
    assert tokens.tolist() == expected.tolist()
    table = torch.tensor(logits).log_softmax(-1).numpy()
    assert logprobs == pytest.approx(table[np.arange(3), expected], abs=1e-10)
    assert (runner.step(make_step([(ids, 0, 30, [0])], **settings))[1] == 0).all()


@pytest.mark.parametrize("pieces", [[29], [10, 19], [1] * 29])
def test_drafts_are_the_mtp_modules(pieces):
    model, ids = random_model(V3), random_ids(30)
    runner = PlainRunner(model, VOCABULARY)
    runner.allocate(2)
    other, at, guesses = random_ids(5, 9), 0, []
    for count in pieces:
        parts = [(other, 0, 3, [1]), (ids, at, count, [0])]
        runner.step(make_step(parts))
        rows = np.arange(2, 3 + count)  # one row of the other, and all of these
        known = np.concatenate((other[3:4], ids[at + 1 : at + count + 1]))
        guesses += runner.draft(rows, known, np.arange(1, 1 + count), np.zeros(count, np.float32),
                                np.zeros((count, 4), np.uint32)).tolist()  # fmt: skip
        at += count
    with torch.no_grad():
        expected = model.mtp_logits(torch.tensor([ids]))[0][0, :, :VOCABULARY].argmax(-1)
    assert guesses == expected.tolist()


@pytest.mark.parametrize("name", ["v3", "qwen3"])
def test_pages_can_be_copied_and_have_the_agreed_layout(name):
    config = CONFIGS[name]
    model, ids = random_model(config, torch.float32), random_ids(PAGE + 2)
    first, second = PlainRunner(model, VOCABULARY), PlainRunner(model, VOCABULARY)
    first.allocate(2)
    second.allocate(3)
    first.step(make_step([(ids, 0, PAGE, [1])]))
    page = first.page(1)
    assert page.dtype == np.float32 and page.nbytes == first.page_bytes
    assert sum(count * sum(lengths) for count, *lengths in first.page_shape) == page.size
    second.write_page(2, page)
    parts = [(ids, PAGE, 1, [2, 0])]
    found = second.step(make_step(parts, targets=following(parts)))[1]
    assert found == pytest.approx(full_scores(model, ids)[PAGE:], abs=1e-4)
    cache = model.new_cache(1, PAGE)
    with torch.no_grad():
        model(torch.tensor([ids[:PAGE]]), cache=cache)
    if config.is_mla:
        expected = [cache.layers[0].buffers[0][0]]
    else:
        key, value = (buffer[0] for buffer in cache.layers[0].buffers)  # [PAGE, heads, width]
        expected = [key.permute(1, 2, 0), value.permute(1, 0, 2)]
    expected = torch.cat([part.flatten() for part in expected]).numpy()
    assert page[: expected.size] == pytest.approx(expected, abs=1e-5)


def test_bfloat16_runs_and_tells_half_the_cache():
    wide, narrow = (random_model(V3, dtype) for dtype in (torch.float32, torch.bfloat16))
    runner, ids = PlainRunner(narrow, VOCABULARY), random_ids(9)
    runner.allocate(1)
    parts = [(ids, 0, 8, [0])]
    found = runner.step(make_step(parts, targets=following(parts)))[1]
    assert found == pytest.approx(full_scores(wide, ids), abs=0.5)
    assert 2 * runner.cache_bytes_per_token == PlainRunner(wide, VOCABULARY).cache_bytes_per_token
    assert runner.page(0).dtype == np.float32


def test_the_identity_tells_models_and_precisions_apart():
    models = [random_model(V3), random_model(V3, torch.float32), random_model(CONFIGS["qwen3"]), random_model(V3)]
    models[-1].layers[1].mlp.experts.down_proj.data[3, 5, 7] += 1e-3
    runners = [PlainRunner(model, VOCABULARY) for model in models]
    found = {model_identity(model, runner) for model, runner in zip(models, runners, strict=True)}
    assert len(found) == 4
    assert model_identity(random_model(V3), runners[0]) in found


# --- the engine on it -------------------------------------------------------------------------------------------------


class Numbers:
    """A tokenizer of which only numbers matter."""

    vocab_size, stop_ids = VOCABULARY, frozenset()

    def decode(self, ids):
        return str(ids)

    def decode_bytes(self, ids):
        return b"%d " % ids[0]


def engine_for(model, **options) -> Engine:
    return Engine(model, Numbers(), runner=PlainRunner(model, VOCABULARY), **options)


@pytest.mark.parametrize("name", ["v3", "qwen3"])
def test_batch_chunk_prefix_preemption_and_guesses_change_nothing(name):
    model = random_model(CONFIGS[name])
    shared = random_ids(70, 1) + random_ids(20, 1)
    prompts = [shared, [*shared[:66], 5], random_ids(5, 2), shared[3:40] * 2]
    requests = [
        Request(prompt, 40, temperature=index % 2 * 0.8, top_p=0.95, seed=index, logprobs=True)
        for index, prompt in enumerate(prompts)
    ]
    alone = [engine_for(model, speculation="off").generate([request])[0] for request in requests]
    modes = ("auto", "ngram", "off") + ("mtp",) * bool(model.mtp)
    few = [(512, "auto", 5), (1, "ngram", 4), (512, "off", 5)]  # pages
    for chunk, mode, pages in [(7, mode, 50) for mode in modes] + few:
        options = {"kv_memory": pages * PlainRunner(model, 1).page_bytes}
        engine = engine_for(model, prefill_chunk=chunk, speculation=mode, **options)
        for _ in range(2):  # the second time with everything in the cache
            found = engine.generate(requests)
            assert [done.token_ids for done in found] == [done.token_ids for done in alone]
            for one, other in zip(found, alone, strict=True):
                assert one.logprobs == pytest.approx(other.logprobs, abs=1e-9)
        assert engine.stats.pages == 0 and (engine.stats.cached_tokens >= 64 or pages < 10)
        if pages > 10:
            assert engine.stats.preemptions == 0
        elif mode == "off":  # how much is guessed, and so who must give way, depends on measured times
            assert engine.stats.preemptions > 0
        if mode == "mtp":
            assert engine.stats.drafted > 0


@pytest.mark.parametrize("restart", [False, True])
def test_tiers_give_back_what_left_the_pool(tmp_path, restart):
    model = random_model(V3, torch.float32)

    def start():
        runner = PlainRunner(model, VOCABULARY)
        folder = {"folder": tmp_path, "cold_bytes": 2**24, "exact": True}
        tiers = Tiers(model_identity(model, runner), runner.page_bytes, runner.page_shape, **folder)
        return Engine(model, Numbers(), runner=runner, tiers=tiers, kv_memory=4 * runner.page_bytes), tiers

    request, other = Request(random_ids(150), 20, seed=1), Request(random_ids(180, 2), 20, seed=2)
    engine, tiers = start()
    first = engine.generate([request])
    engine.generate([other])
    tiers.close()
    if restart:
        engine, tiers = start()
    again = engine.generate([request])
    assert again == first and again[0].cached_tokens == 128
    tiers.close()


def test_scores_are_the_log_softmax_of_the_full_pass():
    model = random_model(V3)
    engine = engine_for(model, prefill_chunk=50)
    sequences = [random_ids(length, length) for length in (2, 130, 1, 60, 256, 30)]
    for ids, found in zip(sequences, engine.score(sequences), strict=True):
        assert len(found) == len(ids) - 1
        if len(ids) > 1:
            assert np.abs(found - full_scores(model, ids)).max() < 1e-10
    done = engine.generate([Request(sequences[1], 20, seed=1, logprobs=True)])[0]
    scored = engine.score([sequences[1] + done.token_ids])[0]
    assert done.logprobs == pytest.approx(scored[-20:], abs=1e-9)


def test_changed_weights_are_used_once_the_engine_forgets():
    model = random_model(V3)
    engine, request = engine_for(model), Request(random_ids(140), 8, temperature=0)
    engine.generate([request])
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    engine.forget()
    assert engine.generate([request])[0].token_ids == engine_for(model).generate([request])[0].token_ids


def test_those_under_way_go_on_with_the_changed_weights():
    model, prompt = random_model(V3), random_ids(140)
    engine = engine_for(model, speculation="off")
    deltas = engine.stream(Request(prompt, 20, temperature=0))
    head = [token for _ in range(8) for token in next(deltas).token_ids]
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    engine.forget()
    tail = [token for delta in deltas for token in delta.token_ids]
    assert len(head) > 3 and len(tail) > 3
    request = Request([*prompt, *head], len(tail), temperature=0)
    assert engine_for(model).generate([request])[0].token_ids == tail


def test_exact_and_approximate_engines_share_a_folder_and_no_page(tmp_path, monkeypatch):
    model, hashed = random_model(V3, torch.float32), []
    monkeypatch.setattr("twelve.engine.engine.model_identity", lambda *of: hashed.append(of) or model_identity(*of))

    def run(**options):
        engine = make_engine(model, Numbers(), kv_memory=2**22, cache_folder=tmp_path, cache_disk=2**24, **options)
        done = engine.generate([Request(random_ids(150), 5, seed=1)])[0]
        engine.close()
        return done.cached_tokens, engine._tiers.stats["damaged"]

    assert run() == run(warm_memory=2**20) == (0, 0)
    assert run() == run(warm_memory=2**20) == (128, 0)
    assert len(hashed) == 4  # all weights are read once an engine


def test_a_page_spoilt_by_numbers_that_are_none_harms_nobody_later():
    model = random_model(V3)
    request = Request(random_ids(100), 30, seed=1)
    expected = engine_for(model).generate([request])
    engine = engine_for(model, kv_memory=3 * PlainRunner(model, 1).page_bytes)
    kept = model.layers[0].self_attn.kv_a_layernorm.weight.data.clone()
    model.layers[0].self_attn.kv_a_layernorm.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="not a number"):
        engine.generate([request])
    model.layers[0].self_attn.kv_a_layernorm.weight.data.copy_(kept)
    engine.forget()
    assert engine.generate([request]) == expected
