"""The native step against the plain path, and against itself in every other arrangement of the same rows."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "model"))
from test_transformer import CONFIGS, V3, changed, random_model

from twelve.engine import describe, native
from twelve.engine.runner import PAGE, PlainRunner, Step
from twelve.engine.sampler import draw, log_probabilities, seed_key
from twelve.engine.scheduler import before
from twelve.errors import InputError
from twelve.quantize import Form, forms_of, pack, packable, replace

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler on this machine")
MANY = {**CONFIGS, "v3-mtp": changed(V3, num_nextn_predict_layers=1),
        "v3-bias": changed(V3, attention_bias=True, q_lora_rank=24),
        "v3-halves": changed(V3, rope_interleave=False), "v3-dense": changed(V3, n_routed_experts=None),
        "v3-no-shared": changed(V3, n_shared_experts=None),
        "llama-bias": changed(CONFIGS["llama"], mlp_bias=True)}  # fmt: skip


def model_of(name):
    model = random_model(MANY[name], torch.float32)
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            torch.nn.init.normal_(module.e_score_correction_bias, std=0.1, generator=torch.Generator().manual_seed(5))
    return model


def sequences(vocab_size, lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, length) for length in lengths]


def run(runner, texts, cuts, vocab_size, pages=40):
    """Logits after every token of every text: in steps, each of which takes the next `cuts` tokens of all texts."""
    tables, used = [], 0
    for text in texts:
        need = -(-len(text) // PAGE)
        tables.append([*range(used, used + need)])
        used += need
    order = np.random.default_rng(1).permutation(pages)  # pages lie anywhere
    table = np.full((len(texts), max(map(len, tables))), -1, np.int32)
    for row, own in enumerate(tables):
        table[row, : len(own)] = order[own]
    done, logits = np.zeros(len(texts), int), [[] for _ in texts]
    while any(done < [len(text) for text in texts]):
        live = [i for i, text in enumerate(texts) if done[i] < len(text)]
        parts = [texts[i][done[i] : done[i] + cuts] for i in live]
        counts = [len(part) for part in parts]
        starts, rows = np.cumsum([0, *counts]), sum(counts)
        step = Step(np.concatenate(parts), starts, done[live], table[live], np.arange(rows), np.zeros(rows, np.float32),
                    np.ones(rows, np.float32), np.zeros((rows, 4), np.uint32),
                    before=before([(texts[i].tolist(), done[i]) for i in live], runner.reach))  # fmt: skip
        out = runner.logits(step)
        for i, begin, end in zip(live, starts, starts[1:], strict=False):
            logits[i].append(out[begin:end])
            done[i] += end - begin
    return [np.concatenate(parts) for parts in logits]


def runner_of(model, vocab_size, pages=40):
    runner = native.NativeRunner(model, vocab_size)
    runner.allocate(pages)
    runner._pool[:] = np.nan  # what nobody wrote must not matter
    return runner


@pytest.mark.parametrize("name", MANY)
def test_logits_equal_the_models_own(name):
    model = model_of(name)
    vocab = model.config.vocab_size
    texts = sequences(vocab, (150, 9, 1, 66))
    found = run(runner_of(model, vocab), texts, 50, vocab)
    for text, logits in zip(texts, found, strict=True):
        with torch.inference_mode():
            wanted = model(torch.from_numpy(text)[None])[0].numpy()
        assert wanted.std() > 0.5
        np.testing.assert_allclose(logits, wanted, atol=1e-4)


@pytest.mark.parametrize("name", ["v3", "llama"])
def test_gates_that_e_to_the_x_cannot_hold_are_closed(name):
    """Below -88.7 its inverse is beyond float32."""
    model, gates = model_of(name), []
    with torch.no_grad():
        for layer in model.layers:
            for part in layer.mlp.modules():
                if hasattr(part, "gate_proj"):
                    part.gate_proj.weight *= 60
                    part.gate_proj.register_forward_hook(lambda module, x, gate: gates.append(gate))
                elif hasattr(part, "gate_up_proj"):
                    part.gate_up_proj[:, : part.gate_up_proj.shape[1] // 2] *= 60
    [text] = sequences(model.config.vocab_size, (150,))
    with torch.inference_mode():
        wanted = model(torch.from_numpy(text)[None])[0].numpy()
    gates = torch.cat([gate.flatten() for gate in gates])
    assert ((gates < -88) & (gates > -180)).float().mean() > 0.05
    [found] = run(runner_of(model, model.config.vocab_size), [text], 50, model.config.vocab_size)
    np.testing.assert_allclose(found, wanted, atol=1e-3)


@pytest.mark.parametrize("name", MANY)
def test_a_row_is_the_same_to_the_last_bit_in_any_company(name):
    model = model_of(name)
    if "v3" in name and "mtp" not in name:
        pack_some(model)
    vocab = model.config.vocab_size
    texts = sequences(vocab, (150, 9, 66))
    alone = [run(runner_of(model, vocab), [text], 1, vocab)[0] for text in texts]
    threads = torch.get_num_threads()
    try:
        for cuts, count in ((7, 1), (64, 2), (1000, 3)):
            torch.set_num_threads(count)
            for one, other in zip(alone, run(runner_of(model, vocab), texts, cuts, vocab), strict=True):
                assert np.array_equal(one, other)
    finally:
        torch.set_num_threads(threads)


def pack_some(model):
    """8 and 4 bits, with and without `low`, in turn."""
    forms = (Form(8, 32, True), Form(4, 32, False), Form(4, 32, True), Form(8, 32, False))
    done = 0
    for name, module in packable(model).items():
        matrices = [module.gate_up_proj, module.down_proj] if hasattr(module, "gate_up_proj") else [module.weight]
        if any(matrix.shape[-1] % 32 for matrix in matrices):
            continue
        form = forms[done % 4]
        replace(model, name, [rounded(matrix.detach(), form) for matrix in matrices])
        done += 1
    assert done > 4 and forms_of(model)


def rounded(matrix, form):
    if matrix.dim() == 3:
        parts = [rounded(one, form) for one in matrix]
        stacked = parts[0]
        stacked.weights = torch.stack([part.weights for part in parts])
        stacked.scales = torch.stack([part.scales for part in parts])
        return stacked
    grouped = matrix.unflatten(1, (-1, form.group))
    top = 2**form.bits - 1
    if form.symmetric:
        low, scale = None, grouped.abs().amax(-1) / (2 ** (form.bits - 1) - 1) + 1e-8
        q = (grouped / scale[..., None]).round() + 2 ** (form.bits - 1)
    else:
        low = grouped.amin(-1)
        scale = (grouped.amax(-1) - low) / top + 1e-8
        q = ((grouped - low[..., None]) / scale[..., None]).round()
    return pack(q.clamp(0, top).flatten(1), scale, low, form.bits, form.group)


def in_8_bits(blocks):
    """float64 [..., 32] rounded to 255 even steps from -largest to largest."""
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return torch.where(scale > 0, blocks / scale.clamp(min=1e-30), 0).round() * scale


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 8, 21])
def test_packed_product_is_exact_in_its_rounded_activations(bits, symmetric, rows):
    generator = torch.Generator().manual_seed(bits + rows)
    weight, x = torch.randn(50, 192, generator=generator), torch.randn(rows, 192, generator=generator)
    x[:, 5] = 30
    x[0, 32:64] = 0
    packed = rounded(weight, Form(bits, 64, symmetric))
    blocks = x.unflatten(1, (-1, 32)).double()
    first = in_8_bits(blocks)
    outlier = blocks.abs().amax(-1, keepdim=True) > 5 * blocks.square().mean(-1, keepdim=True).sqrt()
    assert 0 < outlier.sum() < outlier.numel() / 2
    rounded_x = first + torch.where(outlier, in_8_bits(blocks - first), 0)
    wanted = rounded_x.flatten(1) @ packed.dequantize().double().T
    out = np.empty((rows, 50), np.float32)
    weights = describe.Weights(native.library(), None)
    matrix = weights.packed(packed)
    x = x.contiguous()
    for threads in (1, 3):
        native.library().matrix_product(
            native.ctypes.addressof(matrix), x.data_ptr(), rows, out.ctypes.data, threads
        )
        np.testing.assert_allclose(out, wanted.numpy(), rtol=0, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("outputs", [1, 16, 50, 176])
@pytest.mark.parametrize("columns", [40, 192])
def test_panels_give_every_row_the_same_sums_in_any_company(outputs, columns):
    weight, x = torch.randn(outputs, columns), torch.randn(21, columns)
    library = native.library()
    panels = torch.full((-(-outputs // describe.PANEL), columns, describe.PANEL), float("nan"))
    library.panels_fill(weight.data_ptr(), 1, *weight.shape, panels.data_ptr())
    matrix = describe.Matrix(weights=panels.data_ptr(), kind=describe.PANELS, rows=outputs, columns=columns)

    def product(rows, threads):
        out = np.empty((len(rows), outputs), np.float32)
        at = native.ctypes.addressof(matrix)
        library.matrix_product(at, rows.data_ptr(), len(rows), out.ctypes.data, threads)
        return out

    alone = np.concatenate([product(row[None], 1) for row in x])
    np.testing.assert_allclose(alone, (x.double() @ weight.double().T).numpy(), rtol=0, atol=1e-4)
    for count, threads in ((2, 1), (7, 2), (21, 3)):
        assert np.array_equal(product(x[:count], threads), alone[:count])


@pytest.mark.parametrize("name", ["llama-bias", "qwen2-tied", "v3-mtp"])
def test_large_models_are_read_where_they_lie(name, monkeypatch):
    """Row after row instead of panels: another order of the same sums."""
    model = model_of(name)
    vocab = model.config.vocab_size
    texts = sequences(vocab, (70, 9))
    panels = run(runner_of(model, vocab), texts, 50, vocab)
    monkeypatch.setattr(native, "MOST_PANELS", 0)
    rows = [run(runner_of(model, vocab), texts, cuts, vocab) for cuts in (50, 1)]
    for one, two, three in zip(panels, *rows, strict=True):
        assert not np.array_equal(one, two)
        np.testing.assert_allclose(one, two, atol=1e-4)
        assert np.array_equal(two, three)


def test_changed_weights_are_used_once_reloaded():
    model = model_of("qwen2-tied")
    vocab = model.config.vocab_size
    texts, runner = sequences(vocab, (70,)), runner_of(model, vocab)
    before = run(runner, texts, 50, vocab)[0]
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    runner.reload()
    after = run(runner, texts, 50, vocab)[0]
    assert not np.array_equal(after, before)
    assert np.array_equal(after, run(runner_of(model, vocab), texts, 50, vocab)[0])


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 3.0])
def test_the_draw_equals_numpys(temperature, top_p):
    model = model_of("llama")
    vocab = model.config.vocab_size
    runner = runner_of(model, vocab)
    [text] = sequences(vocab, (60,))
    table, rows = np.zeros((1, 1), np.int32), 60
    keys = np.stack([seed_key(i + (i << 70)) for i in range(rows)])
    every = np.ones(rows, np.float32)
    step = Step(text, np.array([0, rows]), np.array([0]), table, np.arange(rows), temperature * every, top_p * every,
                keys, logprobs=True)  # fmt: skip
    logits = runner.logits(step)
    tokens, logprobs = runner.step(step)
    assert (tokens == draw(logits, np.arange(1, rows + 1), step.temperature, step.top_p, keys)).all()
    np.testing.assert_allclose(logprobs, log_probabilities(logits, tokens), atol=2e-6)
    assert len(set(tokens)) > 5
    targets = Step(**{**vars(step), "targets": np.roll(text, -1)})
    np.testing.assert_allclose(runner.step(targets)[1], log_probabilities(logits, np.roll(text, -1)), atol=2e-6)


@pytest.mark.parametrize("token", [0, 20, 100, -1])
def test_one_logit_that_is_no_number_is_told(token):
    model = model_of("v3")
    vocab = model.config.vocab_size
    assert vocab % 16, "the last token is none of a whole sixteen"
    with torch.no_grad():
        model.head_weight[token] = float("nan")
    [text] = sequences(vocab, (5,))
    for kind in (native.NativeRunner, PlainRunner):
        runner = kind(model, vocab)
        runner.allocate(1)
        one = np.ones(1, np.float32)
        step = Step(text, np.array([0, 5]), np.array([0]), np.zeros((1, 1), np.int32), np.array([4]), one, one,
                    np.zeros((1, 4), np.uint32))  # fmt: skip
        with pytest.raises(InputError, match="not a number"):
            runner.step(step)


def test_drafts_equal_the_plain_modules():
    model = model_of("v3-mtp")
    vocab = model.config.vocab_size
    texts = sequences(vocab, (70, 20))
    starts = np.array([0, 70, 90])
    table = np.array([[3, 1], [2, -1]], np.int32)
    drawn = np.array([69, 89])
    greedy, keys = np.zeros(2, np.float32), np.zeros((2, 4), np.uint32)
    drafts = []
    for kind in (native.NativeRunner, PlainRunner):
        runner = kind(model, vocab)
        runner.allocate(5)
        first, top_p = np.zeros(2, np.int64), np.ones(2, np.float32)
        step = Step(np.concatenate(texts), starts, first, table, drawn, greedy, top_p, keys)
        tokens, _ = runner.step(step)
        following = np.concatenate([texts[0][1:], tokens[:1], texts[1][1:], tokens[1:]])
        drafts.append(runner.draft(np.arange(90), following, drawn, greedy, keys))
        for temperature in (0.5, 1.0):
            hot = np.full(2, temperature, np.float32)
            drafts[-1] = np.append(drafts[-1], runner.draft(np.arange(90), following, drawn, hot, keys))
    assert (drafts[0] == drafts[1]).all()


def test_bfloat16_weights_are_read_as_they_are():
    model = model_of("v3-mtp").bfloat16()
    vocab = model.config.vocab_size
    texts = sequences(vocab, (40,))
    wide = random_model(MANY["v3-mtp"], torch.float32)
    wide.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    found = run(runner_of(model, vocab), texts, 16, vocab)[0]
    np.testing.assert_allclose(found, run(runner_of(wide, vocab), texts, 16, vocab)[0], atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "v3", "v3-mtp"])
def test_selection_reads_what_it_should(name):
    model = model_of(name)
    vocab, c = model.config.vocab_size, model.config
    [text] = sequences(vocab, (PAGE * 12 + 5,))
    full = run(runner_of(model, vocab), [text], 100, vocab)[0]
    everything = native.NativeRunner(model, vocab, selection=1.0)
    everything.allocate(40)
    assert np.array_equal(run(everything, [text], 100, vocab)[0], full)
    half = native.NativeRunner(model, vocab, selection=0.6)
    half.allocate(40)
    cut = run(half, [text], 100, vocab)[0]
    read, past = half.pages_read
    assert 0.6 < read / past < 0.95
    few = PAGE * 6  # so short a past is read whole
    assert np.array_equal(cut[:few], full[:few]) and not np.array_equal(cut[few + PAGE :], full[few + PAGE :])
    assert np.array_equal(cut, run(native_with(model, vocab, 0.6), [text], 1, vocab)[0])
    assert c.num_hidden_layers > 1


def native_with(model, vocab, selection):
    runner = native.NativeRunner(model, vocab, selection=selection)
    runner.allocate(40)
    return runner
