"""Distillation from stored probabilities: the loss against its float64 twin, the store over kills, the run."""

import json

import pytest
import torch
from small import folder, gradients, llama, v3

from twelve import convert
from twelve.data.corpus import tokenize
from twelve.data.shards import PackedData
from twelve.data.tokenizer import Tokenizer
from twelve.errors import InputError
from twelve.posttrain import logits
from twelve.posttrain.divergence import plain_soft_cross_entropy, soft_cross_entropy, top_logprobs
from twelve.posttrain.logits import LogitsLesson, TeacherLogits, ask
from twelve.train.sft import sft

N, WIDTH, VOCABULARY = 23, 12, 40


def drawn(k, temperature=1.0, seed=0):
    """hidden, weight, targets, and a teacher's likeliest tokens, in float64."""
    torch.manual_seed(seed)
    hidden, weight, theirs = (torch.randn(rows, WIDTH, dtype=torch.float64) for rows in (N, VOCABULARY, N))
    targets = torch.randint(VOCABULARY, (N,))
    ids, logprobs = top_logprobs(theirs, weight.flip(0), k, temperature)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, ids, logprobs.double()


@pytest.mark.parametrize("k", [1, 7, VOCABULARY - 1, VOCABULARY])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("hard", [0.0, 0.3, 1.0])
def test_loss_and_gradient_are_those_of_the_plain_twin(k, temperature, hard):
    hidden, weight, *rest = drawn(k, temperature)
    fast = soft_cross_entropy(hidden, weight, *rest, temperature, hard, chunk=5)
    plain = plain_soft_cross_entropy(hidden, weight, *rest, temperature, hard)
    torch.testing.assert_close(fast, plain)
    # the twin's bucket of the rest is a difference that rounds: at k = V - 1 some digits are lost
    for ours, twin in zip(gradients(fast, hidden, weight), gradients(plain, hidden, weight), strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-5, atol=1e-9)


def test_float32_is_close_to_float64():
    hidden, weight, targets, ids, logprobs = drawn(7)
    twin = plain_soft_cross_entropy(hidden, weight, targets, ids, logprobs, 2.0, 0.1)
    single = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight)]
    ours = soft_cross_entropy(*single, targets, ids, logprobs.half(), 2.0, 0.1)
    torch.testing.assert_close(ours.double(), twin, rtol=2e-3, atol=2e-3)  # float16 holds three digits
    for a, b in zip(gradients(ours, *single), gradients(twin, hidden, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_all_tokens_are_the_full_divergence(temperature):
    hidden, weight, targets, ids, logprobs = drawn(VOCABULARY, temperature)
    mine = (hidden @ weight.T / temperature).log_softmax(-1)
    theirs = torch.empty_like(mine).scatter_(1, ids, logprobs[:, :-1])
    full = torch.nn.functional.kl_div(mine, theirs, reduction="batchmean", log_target=True) * temperature**2
    torch.testing.assert_close(soft_cross_entropy(hidden, weight, targets, ids, logprobs, temperature), full,
                               rtol=1e-5, atol=1e-6)  # fmt: skip


def test_a_student_that_equals_its_teacher_has_nothing_to_learn():
    hidden, weight, targets, *_ = drawn(7)
    ids, logprobs = top_logprobs(hidden.detach(), weight.detach(), 7)
    assert logprobs.exp().sum(-1).sub(1).abs().max() < 1e-6
    loss = soft_cross_entropy(hidden, weight, targets, ids, logprobs.double())
    assert abs(loss.item()) < 1e-6
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients(loss, hidden, weight))


# --- the store and the run --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    path = tmp_path_factory.mktemp("talk") / "talk.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"{n} + 1?"},
                      {"role": "assistant", "content": f"<think>{n}+1={n + 1}</think><answer>{n + 1}</answer>"}]}
        for n in range(60)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(talk, tmp_path, tokenizer):
    tokenize([talk], tmp_path / "shards", tokenizer, progress=False)
    return PackedData(tmp_path / "shards")


def stored(place, data, teacher, k=5):
    place.mkdir(exist_ok=True)
    store = TeacherLogits(place, data, 64, k)
    ask(teacher, store, data, 64, 300, 1.0, quiet=True)
    return store


def test_what_is_stored_is_what_the_teacher_expects_at_each_target(tmp_path, data, tokenizer):
    teacher = convert.load(folder(tmp_path / "teacher", tokenizer, v3(tokenizer)))[0]
    store = stored(tmp_path / "logits", data, teacher)
    assert store.done() == data.windows(64) > logits.ROWS
    for window in (0, data.windows(64) - 1):
        row = data.batch(window, 1, 64, None)
        with torch.no_grad():
            out = teacher(row.ids, documents=row.documents, positions=row.positions)
        expected = out[row.targets >= 0][:, :300].log_softmax(-1)
        ids, logprobs = (torch.from_numpy(array) for array in store.read(window))
        torch.testing.assert_close(expected.gather(1, ids), logprobs[:, :-1].float(), rtol=2e-3, atol=1e-3)
        torch.testing.assert_close(expected.topk(5).values, logprobs[:, :-1].float(), rtol=2e-3, atol=1e-3)
        assert (logprobs.float().exp().sum(-1) - 1).abs().max() < 2e-3


def test_a_store_that_was_cut_off_goes_on_to_the_same_bytes(tmp_path, data, tokenizer):
    teacher = convert.load(folder(tmp_path / "teacher", tokenizer, v3(tokenizer)))[0]
    whole = stored(tmp_path / "whole", data, teacher)
    (tmp_path / "part").mkdir()
    for path, _, _ in whole.names:
        content = path.read_bytes()
        cut = len(content) * 2 // 3 + (3 if path.suffix == ".ids" else -40)  # within a row, at different places
        (tmp_path / "part" / path.name).write_bytes(content[:cut])
    part = TeacherLogits(tmp_path / "part", data, 64, 5)
    assert 0 < part.done() < whole.done()
    stored(tmp_path / "part", data, teacher)
    for path, _, _ in whole.names:
        assert (tmp_path / "part" / path.name).read_bytes() == path.read_bytes()


def test_the_student_comes_to_expect_what_its_teacher_does(tmp_path, talk, tokenizer):
    teacher = folder(tmp_path / "teacher", tokenizer, v3(tokenizer, initializer_range=0.5))
    student = folder(tmp_path / "student", tokenizer, llama(tokenizer), seed=1)
    lesson = LogitsLesson(teacher, k=8, hard=0.0, quiet=True)
    sft(student, [talk], tmp_path / "out", steps=30, context=64, batch=4, learning_rate=1e-2, quiet=True, lesson=lesson)
    rows = [json.loads(line) for line in (tmp_path / "out" / "training" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert teacher in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(InputError, match="k=8, not 9"):
        sft(student, [talk], tmp_path / "out", steps=30, context=64, batch=4, learning_rate=1e-2, quiet=True,
            lesson=LogitsLesson(teacher, k=9, hard=0.0))  # fmt: skip


def test_another_tokenizer_is_refused_even_of_the_same_size(tmp_path, talk, tokenizer):
    text = "zebras graze quietly beyond quartz quarries, and foxes jump over them, foxes and zebras beyond"
    other = Tokenizer.train([text, text.upper()] * 4, vocab_size=tokenizer.vocab_size)
    assert other.vocab_size == tokenizer.vocab_size
    teacher = folder(tmp_path / "teacher", other, llama(other))
    student = folder(tmp_path / "student", tokenizer, llama(tokenizer))
    with pytest.raises(InputError, match=r"tokenizers of .*teacher and the student differ .*use --how traces"):
        sft(student, [talk], tmp_path / "out", steps=1, context=64, quiet=True, lesson=LogitsLesson(teacher))
    assert not (tmp_path / "out" / "config.json").exists()
