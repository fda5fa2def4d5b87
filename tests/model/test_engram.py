"""Engram: addresses against plain Python, the layer against plain loops, and the same answer however a text is cut."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twelve.config import ModelConfig, small_v3
from twelve.errors import InputError
from twelve.model import Transformer, count_parameters
from twelve.model.attention import Positions
from twelve.model.branches import Branches
from twelve.model.engram import Engram, EngramMemory, NGramHash
from twelve.model.transformer import depth_in

SWITCHES = {"engram_layer_ids": [0, 2], "engram_vocab_size": 97, "engram_head_dim": 6, "engram_n_heads": 2}
SMALL = small_v3(503, width=64, layers=3, experts=0, context=64, **SWITCHES)
N, SPAN = 3, 9  # of it: n-grams up to 3, a convolution of 4 taps that reaches 9 tokens back


def changed(config: ModelConfig = SMALL, **values) -> ModelConfig:
    return ModelConfig(**{**config.to_dict(), **values})


def random_model(config: ModelConfig = SMALL, dtype=torch.float64) -> Transformer:
    """Weights and rows large enough that a wrong formula shows."""
    generator = torch.Generator().manual_seed(0)
    model = Transformer(config).init_weights(0).to(dtype)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if "hc" not in name:
            tensor.copy_(noise * 0.15 if tensor.dim() > 1 else 1 + 0.3 * noise)
    fill_table(model)
    return model.eval()


def fill_table(model: Transformer, scale: float = 1.0) -> None:
    rows = model.memory.table._rows.array
    rows[:] = np.random.default_rng(1).normal(size=rows.shape) * scale


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 503, shape, generator=torch.Generator().manual_seed(seed))


# --- addresses --------------------------------------------------------------------------------------------------------


def naive_heads(config: ModelConfig) -> list[tuple[int, int]]:
    """(prime, first row) of every head of every n of every layer: the smallest primes that no other head has."""
    primes: list[int] = []
    while len(primes) < len(config.engram_layer_ids) * (config.engram_max_ngram_size - 1) * config.engram_n_heads:
        prime = primes[-1] + 1 if primes else config.engram_vocab_size
        while any(prime % divisor == 0 for divisor in range(2, math.isqrt(prime) + 1)):
            prime += 1
        primes.append(prime)
    return [(prime, sum(primes[:index])) for index, prime in enumerate(primes)]


def naive_rows(memory: EngramMemory, heads: list[tuple[int, int]], tokens: list[int]) -> list[int]:
    """The rows of one document, by layer, token, n and head, in Python's integers."""
    config, rows = memory.config, []
    known = [int(memory.compressed[token]) for token in tokens]
    for layer, multipliers in enumerate(memory.hash.multipliers.tolist()):
        for t in range(len(known)):
            for n in range(2, config.engram_max_ngram_size + 1):
                z = 0
                for i in range(n):
                    z ^= (known[t - i] if t >= i else config.engram_pad_id) * multipliers[i]
                first = (layer * (config.engram_max_ngram_size - 1) + n - 2) * config.engram_n_heads
                rows += [start + z % prime for prime, start in heads[first : first + config.engram_n_heads]]
    return rows


@pytest.mark.parametrize("text", ["The ship sails at dawn, and THE captain.", "배 열두 척이 새벽에 떠나고 본다."])
def test_addresses_equal_a_naive_implementation(tokenizer, text):
    config = small_v3(tokenizer.vocab_size, **SWITCHES, engram_max_ngram_size=4, engram_seed=3)
    memory, heads = EngramMemory(config), naive_heads(config)
    memory.use_tokenizer(tokenizer)
    assert memory.compressed.max() < tokenizer.vocab_size - 1  # some tokens are one
    draw, known = np.random.default_rng(0), np.array(tokenizer.encode(text))
    for length in range(1, 11):
        batch = known[draw.integers(len(known), size=(500, length))]
        mine = memory.addresses(torch.from_numpy(batch), Positions(None, None, None))
        for row, tokens in enumerate(batch.tolist()):
            assert mine[:, row].ravel().tolist() == naive_rows(memory, heads, tokens)


def test_hash_functions_differ_and_do_not_overflow():
    config = changed(vocab_size=130_000, engram_vocab_size=50_000, engram_n_heads=8, engram_max_ngram_size=4)
    functions = NGramHash(config)
    primes, multipliers = functions.primes.ravel(), functions.multipliers
    assert list(zip(primes.tolist(), functions.offsets.ravel().tolist(), strict=True)) == naive_heads(config)
    assert functions.total_rows == primes.sum() and functions.primes.shape == (2, 3, 8)
    assert (multipliers % 2 == 1).all() and len(set(multipliers.ravel().tolist())) == multipliers.size == 8
    assert multipliers.max() * (130_000 - 1) < 2**63 and multipliers.min() > 0
    assert multipliers.max() > 2**40  # nearly all bits are used
    again, other = NGramHash(config), NGramHash(changed(config, engram_seed=1))
    assert (again.multipliers == multipliers).all() and not (other.multipliers == multipliers).any()
    # layer l draws from seed + 10007 l, so layers keep their functions when others come or go
    alone = NGramHash(changed(config, engram_layer_ids=[2], engram_seed=0))
    assert (alone.multipliers[0] == multipliers[1]).all()
    edge = np.array([0, 129_999])
    rows = functions.rows([edge] * 4)
    assert (rows >= functions.offsets[:, None]).all()
    assert (rows < functions.offsets[:, None] + functions.primes[:, None]).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equal_suffixes_give_equal_rows_anywhere(data):
    memory, token = EngramMemory(SMALL), st.integers(0, 502)
    suffix = data.draw(st.lists(token, min_size=N, max_size=N + 3))
    length = data.draw(st.integers(len(suffix), 20))
    starts = data.draw(st.lists(st.integers(0, length - len(suffix)), min_size=2, max_size=4))
    ids = random_ids(len(starts), length, seed=data.draw(st.integers(0, 99)))
    for row, start in enumerate(starts):
        ids[row, start : start + len(suffix)] = torch.tensor(suffix)
    rows = memory.addresses(ids, Positions(None, None, None))
    found = [rows[:, row, start + N - 1 : start + len(suffix)] for row, start in enumerate(starts)]
    assert all((one == found[0]).all() for one in found)
    assert len(np.unique(rows)) > 1


def test_depth_counts_within_documents():
    documents = torch.tensor([[0, 0, 1, 2, 2, 2], [4, 4, 4, 4, 4, 4]])
    assert depth_in(documents).tolist() == [[0, 1, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5]]


# --- the layer --------------------------------------------------------------------------------------------------------


def plain_engram(layer: Engram, x: np.ndarray, found: np.ndarray, documents: list[int]) -> np.ndarray:
    """x [T, streams, D], found [T, E] -> [T, streams, D], token by token."""
    state = {name: tensor.detach().numpy() for name, tensor in layer.state_dict().items()}
    streams, width = x.shape[1:]

    def norm(vector, weight):
        return vector / np.sqrt((vector**2).mean() + layer.eps) * weight

    out, normed = np.zeros_like(x), np.zeros_like(x)
    for t in range(len(x)):
        value = state["value_proj.weight"] @ found[t]
        keys = (state["key_proj.weight"] @ found[t]).reshape(streams, width)
        for j in range(streams):
            part = slice(j * width, (j + 1) * width)
            query, key = norm(x[t, j], state["query_norm"][part]), norm(keys[j], state["key_norm"][part])
            score = query @ key / math.sqrt(width)
            score = math.copysign(math.sqrt(max(abs(score), 1e-6)), score)
            out[t, j] = value / (1 + math.exp(-score))
            if not layer.taps:
                continue
            normed[t, j] = norm(out[t, j], state["conv_norm"][part])
            mixed = np.zeros(width)
            for tap in range(layer.taps):
                back = t - tap * layer.dilation
                if back >= 0 and documents[back] == documents[t]:
                    mixed += state["conv"][layer.taps - 1 - tap, part] * normed[back, j]
            out[t, j] += mixed / (1 + np.exp(-mixed))
    return out


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("taps", [0, 1, 4])
@pytest.mark.parametrize("cut", [25, 12])
def test_layer_equals_plain_loops(streams, taps, cut):
    layer = random_layer(changed(hc_mult=streams, engram_kernel_size=taps))
    x, found = torch.randn(1, 25, streams, 64, dtype=torch.float64), torch.randn(1, 25, 24, dtype=torch.float64)
    documents = [0] * cut + [1] * (25 - cut)
    depth = depth_in(torch.tensor([documents])) if cut < 25 else None
    given = x[:, :, 0] if streams == 1 else x
    with torch.no_grad():
        out = layer.eval()(given, found, Positions(None, None, None, depth=depth))
    assert out.shape == given.shape and out.std() > 0.1
    plain = plain_engram(layer, x[0].numpy(), found[0].numpy(), documents)
    np.testing.assert_allclose(out.numpy().reshape(plain.shape), plain, atol=1e-10)
    assert layer.last_gates.shape == (1, 25, streams) and (layer.last_gates > 0).all()


def random_layer(config: ModelConfig) -> Engram:
    layer, draw = Engram(config).double(), torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        parameter.data = noise * 0.3 if parameter.dim() > 1 else 1 + 0.3 * noise
    return layer


@pytest.mark.parametrize("streams", [1, 2])
def test_gradients_of_rows_and_weights(streams):
    config = changed(
        hidden_size=6, hc_mult=streams, engram_head_dim=2, engram_n_heads=1, engram_max_ngram_size=2,
        engram_kernel_size=2,
    )  # fmt: skip
    layer, depth = random_layer(config), depth_in(torch.tensor([[0, 0, 0, 1, 1, 1, 1]]))
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(1, 7, *([streams] if streams > 1 else []), 6, dtype=torch.float64, requires_grad=True)
    found = torch.randn(1, 7, 2, dtype=torch.float64, requires_grad=True)

    def run(x, found, *weights):
        given = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(layer, given, (x, found, Positions(None, None, None, depth=depth)))

    assert torch.autograd.gradcheck(run, (x, found, *layer.parameters()))


def test_begins_without_convolution_and_normal_elsewhere():
    model = Transformer(SMALL).init_weights(0)
    layer = model.layers[0].engram
    assert model.layers[1].engram is None and not layer.conv.any() and layer.key_proj.weight.any()
    assert (layer.key_norm == 1).all() and not model.memory.table.read(np.arange(model.memory.hash.total_rows)).any()


# --- the model --------------------------------------------------------------------------------------------------------

ARMS = {
    "engram": SMALL,
    "no-conv": changed(engram_kernel_size=0),
    "4-grams": changed(engram_max_ngram_size=4, engram_kernel_size=2),
    "streams": changed(hc_mult=3),
    "experts": small_v3(503, width=64, layers=3, experts=4, context=64, mtp=1, **SWITCHES),
    "gqa": ModelConfig(model_type="twelve", vocab_size=503, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                       num_attention_heads=4, num_key_value_heads=2, **SWITCHES),
}  # fmt: skip


@pytest.mark.parametrize("arm", ARMS)
def test_with_a_zero_table_it_is_the_model_without(arm):
    model, ids = random_model(ARMS[arm]), random_ids(2, 40)
    with torch.no_grad():
        touched = model(ids)
        model.memory.create()
        zeroed = model(ids)
        for layer in model.layers:
            layer.engram = None
        model.memory = None
        assert torch.equal(model(ids), zeroed)
    assert (touched - zeroed).abs().max() > 0.1


@pytest.mark.parametrize("arm", ARMS)
def test_cached_chunks_equal_the_full_pass(arm):
    model, ids = random_model(ARMS[arm]), random_ids(2, 33)
    with torch.no_grad():
        full = model(ids)
        for chunk in range(1, 13):
            cache = model.new_cache(2, 40)
            pieces = [model(ids[:, i : i + chunk], cache=cache) for i in range(0, 33, chunk)]
            torch.testing.assert_close(torch.cat(pieces, 1), full, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kept", [1, 2, 8, 19])
def test_a_guess_that_is_taken_back_leaves_nothing(kept):
    model, ids = random_model(), random_ids(1, 30)
    cache = model.new_cache(1, 40)
    with torch.no_grad():
        model(ids[:, :kept], cache=cache)
        for wrong in range(3):
            model(random_ids(1, 5, seed=wrong + 1), cache=cache)
            cache.truncate(kept)
        out = torch.cat([model(ids[:, i : i + 4], cache=cache) for i in range(kept, 30, 4)], 1)
        torch.testing.assert_close(out, model(ids)[:, kept:], atol=1e-10, rtol=0)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("training", [False, True])
def test_packed_documents_equal_the_documents_alone(arm, training):
    model, ids, sizes = random_model(ARMS[arm]).train(training), random_ids(1, 40), [5, 1, 20, 14]
    documents = torch.cat([torch.full((size,), number) for number, size in enumerate(sizes)])[None]
    positions = torch.cat([torch.arange(size) for size in sizes])[None]
    with torch.set_grad_enabled(training):
        packed = model(ids, documents=documents, positions=positions)
        apart = torch.cat([model(part) for part in ids.split(sizes, 1)], 1)
    torch.testing.assert_close(packed, apart, atol=1e-10, rtol=0)


@pytest.mark.parametrize("arm", ["engram", "4-grams", "streams"])
@pytest.mark.parametrize("training", [False, True])
def test_branches_equal_each_answer_behind_its_prompt(arm, training):
    model, groups = random_model(ARMS[arm]).train(training), [(7, [12, 0, 3]), (2, [15]), (1, [1, 4])]
    branches = Branches(groups)
    ids, row, places, start = random_ids(1, branches.length), [], [], 0
    for prompt, answers in groups:
        head = list(range(start, start + prompt))
        start += prompt
        row += range(prompt)
        places.append(head)
        for answer in answers:
            places.append(head + list(range(start, start + answer)))
            row += range(prompt, prompt + answer)
            start += answer
    at = replace(model.positions(ids, positions=torch.tensor([[*row, 0]])), mask=branches)
    with torch.set_grad_enabled(training):
        states, _ = model.hidden(ids, at)
        for place in places:
            alone = ids[:, place]
            wanted = model.hidden(alone, model.positions(alone))[0]
            torch.testing.assert_close(states[:, place], wanted, atol=1e-10, rtol=0)


def test_what_lies_beyond_reach_does_not_matter_to_the_memory():
    """With attention silenced only the memory looks back: N - 1 tokens, and SPAN more through the convolution."""
    model, ids = random_model(changed(engram_layer_ids=[0])), random_ids(1, 30)
    for layer in model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    assert model.memory.reach == N - 1 + SPAN
    with torch.no_grad():
        before = model(ids)
        for place in range(30):
            other = ids.clone()
            other[0, place] = (other[0, place] + 1) % 503
            differs = (model(other) - before).abs().amax(-1)[0] > 0
            where = differs.nonzero()[:, 0]
            assert where.min() == place and where.max() <= min(29, place + model.memory.reach)
    assert (differs.nonzero()[:, 0] == 29).all()


# --- training ---------------------------------------------------------------------------------------------------------


def test_gradients_of_the_table_equal_those_of_a_dense_embedding(monkeypatch):
    model, ids = random_model().train(), random_ids(2, 30)
    table = model.memory.table
    model.losses(ids, ids.roll(-1, 1)).total.backward()
    assert len(table.pending) == 2
    mine = torch.zeros(model.memory.hash.total_rows, 6, dtype=torch.float64)
    for rows, leaf in table.pending:
        mine.index_add_(0, torch.from_numpy(rows).flatten(), leaf.grad.double().view(-1, 6))
    dense = torch.from_numpy(table.read(np.arange(table.count))).double().requires_grad_()

    def look_up(ids, at):
        rows = torch.from_numpy(model.memory.addresses(ids, at))
        return dict(zip(SMALL.engram_layer_ids, dense[rows].flatten(-3), strict=True))

    monkeypatch.setattr(model.memory, "look_up", look_up)
    model.zero_grad()
    model.losses(ids, ids.roll(-1, 1)).total.backward()
    assert dense.grad.abs().max() > 1e-4
    torch.testing.assert_close(mine, dense.grad, atol=1e-9, rtol=1e-6)  # the leaves are float32


def test_only_training_asks_for_gradients():
    model, ids = random_model(), random_ids(1, 9)
    model(ids)
    with torch.no_grad():
        model.train()(ids)
    assert not model.memory.table.pending
    model(ids)
    assert len(model.memory.table.pending) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_model_keeps_its_own_precision(dtype):
    model = random_model(dtype=dtype)
    with torch.no_grad():
        assert model(random_ids(1, 9)).dtype == dtype
    found = model.memory.look_up(random_ids(1, 9), Positions(None, None, None))
    assert found[0].shape == (1, 9, 24) and found[0].dtype == torch.float32


@pytest.mark.parametrize("ids", [np.arange(502), np.arange(503) - 1, np.arange(503) + 1, np.arange(503) << 20])
def test_a_file_whose_map_of_ids_leads_out_of_the_table_is_refused(tmp_path, ids):
    memory = EngramMemory(SMALL)
    memory.compressed = ids.astype(np.int32)
    memory.create(tmp_path / "table")
    memory.table.close()
    with pytest.raises(InputError, match="table: compressed_ids are not 503 token ids below 503"):
        EngramMemory(SMALL).open(tmp_path / "table")


def test_the_table_counts_and_is_not_allocated():
    config = changed(engram_vocab_size=10**9, engram_head_dim=64)  # half a terabyte
    plain, counts = count_parameters(changed(engram_layer_ids=[], model_type="deepseek_v3")), count_parameters(config)
    with torch.device("meta"):
        memory, layer = EngramMemory(config), Engram(config)
    assert memory.table is None and memory.hash.total_rows > 8 * 10**9
    weights = 2 * sum(parameter.numel() for parameter in layer.parameters())
    assert counts["total"] == plain["total"] + weights + memory.hash.total_rows * 64
    assert counts["active"] == plain["active"] + weights + 8 * 64


@pytest.mark.parametrize(
    "values, message",
    [({"engram_layer_ids": [3]}, "no layer 3"), ({"engram_layer_ids": [1, 1]}, "twice"),
     ({"engram_max_ngram_size": 1}, "below 2"), ({"engram_pad_id": 503}, "engram_pad_id 503"),
     ({"engram_seed": -1}, "negative"), ({"engram_kernel_size": -1}, "negative"), ({"engram_dtype": "fp8"}, "'fp8'"),
     ({"model_type": "deepseek_v3"}, "model_type 'twelve'"), ({"engram_n_heads": 0}, "positive")],
)  # fmt: skip
def test_bad_settings_are_one_line(values, message):
    with pytest.raises(InputError, match=message):
        changed(**values)
