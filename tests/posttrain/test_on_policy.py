"""On-policy distillation: the exact gradient, zero where student and teacher agree, teachers by task, resume."""

import json
import os
import signal
from dataclasses import replace
from itertools import cycle

import pytest
import torch
from small import folder, gradients, llama, model, v3

from twelve import convert
from twelve.data.tokenizer import Tokenizer
from twelve.errors import InputError
from twelve.files import sha256
from twelve.posttrain import on_policy as learning
from twelve.posttrain.curriculum import Cell
from twelve.posttrain.divergence import plain_reverse_kl, reverse_kl
from twelve.posttrain.on_policy import OnPolicy, on_policy
from twelve.posttrain.rollout import sample
from twelve.posttrain.traces import problem_stream
from twelve.train.loop import Interrupted
from twelve.train.plan import Plan

CELLS = [Cell("arithmetic", 1, "en"), Cell("word_problems", 1, "ko")]
SMALL = {"batch": 4, "group": 2, "max_tokens": 12, "quiet": True}


def drawn():
    """hidden and weight of a student, two teachers of other widths and weights, in float64."""
    hidden, weight, wide, head, narrow, other = (
        torch.randn(*shape, dtype=torch.float64) for shape in [(23, 12), (40, 12), (23, 16), (40, 16), (23, 6), (40, 6)]
    )
    return hidden.requires_grad_(), weight.requires_grad_(), [(wide, head, 0.7), (narrow, other, 0.3)]


@pytest.mark.parametrize("chunk", [5, 23, 100])
def test_loss_and_gradient_are_those_of_the_plain_twin(chunk):
    hidden, weight, teachings = drawn()
    fast, plain = reverse_kl(hidden, weight, teachings, chunk), plain_reverse_kl(hidden, weight, teachings)
    torch.testing.assert_close(fast, plain)
    torch.testing.assert_close(gradients(fast, hidden, weight), gradients(plain, hidden, weight))


def test_float32_is_close_to_float64():
    hidden, weight, teachings = drawn()
    single = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight)]
    ours = reverse_kl(*single, [(states.float(), head.float(), share) for states, head, share in teachings])
    plain = plain_reverse_kl(hidden, weight, teachings)
    torch.testing.assert_close(ours.double(), plain, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients(ours, *single), gradients(plain, hidden, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_it_is_the_reverse_divergence():
    """Mass where the teacher has none costs; a teacher's mass that the student lacks does not."""
    sharp = torch.tensor([[20.0, 0.0, 0.0]])
    both = torch.tensor([[20.0, 20.0, 0.0]])
    eye = torch.eye(3)
    assert reverse_kl(both, eye, [(sharp, eye, 1.0)]) > 5
    assert abs(reverse_kl(sharp, eye, [(both, eye, 1.0)]).item() - torch.tensor(2.0).log().item()) < 1e-4


def trainer(tmp_path, tokenizer, student, teachers):
    cells = [[cell.task, cell.level, cell.language] for cell in CELLS]
    options = {"cells": cells, "seed": 3, "group": 2, "max_tokens": 12}
    (tmp_path / "run" / "training").mkdir(parents=True, exist_ok=True)
    plan = Plan(
        stage="on-policy", options=options, config=student.config.to_dict(), data={}, context=256, batch_size=4,
        micro_batch_size=4, learning_rate=1e-3, seed=3, threads=1, precision="float32", muon=False, weight_decay=0.0,
        revisions=[(0, 10)],
    )  # fmt: skip
    return OnPolicy(student, plan, tmp_path / "run", tokenizer, teachers)


@pytest.mark.parametrize("shape", [v3, llama])
def test_a_student_that_equals_its_teacher_does_not_move(tmp_path, tokenizer, shape):
    student, teacher = model(shape(tokenizer)), model(shape(tokenizer))
    one = trainer(tmp_path, tokenizer, student, {None: [(teacher, 1.0)]})
    figures = one.train_step()
    assert abs(figures["loss"]) < 1e-6 and figures["grad_norm"] < 1e-5
    assert figures["answer_tokens"] > 1


def test_a_step_is_the_plain_loss_over_each_answer_alone(tmp_path, tokenizer, monkeypatch):
    """Whole sequences one by one, in float64: no packing, no chunks; each task with its own teachers."""
    student, left, right = (model(shape(tokenizer), seed) for shape, seed in ((v3, 0), (llama, 1), (v3, 2)))
    one = trainer(tmp_path, tokenizer, student, {None: [(left, 0.25), (right, 0.75)], "word_problems": [(left, 1.0)]})
    groups = sample(one.engine, tokenizer, [g.problem for g in one.answer(0)], 2, 12, 1.0, 3 << 32)
    seen = {}
    monkeypatch.setattr(one, "update", lambda rate, loss: seen.update(
        {name: p.grad.double() for name, p in student.named_parameters() if p.grad is not None}) or 0.0)  # fmt: skip
    figures = one.train_step()

    twins = {id(m): model(m.config).double() for m in (student, left, right)}
    for m in (student, left, right):
        twins[id(m)].load_state_dict(m.state_dict())
        twins[id(m)].double()
    total, count = 0.0, 0
    for group in groups:
        mixed = [(left, 1.0)] if group.problem.task == "word_problems" else [(left, 0.25), (right, 0.75)]
        for answer in group.answers:
            ids = torch.tensor([[*group.prompt, *answer.token_ids]])
            part = slice(len(group.prompt) - 1, ids.shape[1] - 1)
            logp = {key: twin(ids)[0, part, : tokenizer.vocab_size].log_softmax(-1) for key, twin in twins.items()}
            mine = logp[id(student)]
            for teacher, share in mixed:
                total = total + share * (mine.exp() * (mine - logp[id(teacher)].detach())).sum()
            count += len(answer.token_ids)
    total = total / count
    assert abs(figures["loss"] - total.item()) < 1e-4 * total.item()
    total.backward()
    for name, parameter in twins[id(student)].named_parameters():
        if name in seen:
            torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-3, atol=1e-5)
    assert {"embed_tokens.weight", "lm_head.weight", "layers.1.mlp.gate.weight"} <= seen.keys()


def test_problems_that_do_not_fit_are_passed_over(tmp_path, tokenizer, monkeypatch):
    known = [next(problem_stream(CELLS[index:])) for index in range(2)]
    long = replace(known[0], question=known[0].question * 50)
    monkeypatch.setattr(learning, "problem_stream", lambda *_: cycle([known[0], long, known[1]]))
    student = model(llama(tokenizer))
    groups = trainer(tmp_path, tokenizer, student, {None: [(student, 1.0)]}).answer(1)
    assert [group.problem for group in groups] == known


@pytest.fixture(scope="module")
def room(tmp_path_factory, tokenizer):
    place = tmp_path_factory.mktemp("on_policy")
    folder(place / "teacher", tokenizer, v3(tokenizer, initializer_range=0.4))
    folder(place / "student", tokenizer, llama(tokenizer), seed=1)
    return place


def test_the_student_comes_closer_and_is_a_folder(room, tokenizer):
    result = on_policy(
        room / "student", {None: [str(room / "teacher")]}, room / "out", CELLS[:1], steps=30, learning_rate=3e-2,
        batch=8, group=8, max_tokens=6, quiet=True,
    )  # fmt: skip
    rows = [json.loads(line) for line in (room / "out" / "training" / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["loss"] for row in rows[-5:]) / 5 < 0.8 * rows[0]["loss"]
    assert convert.load(room / "out")[0].config.model_type == "llama" and result["steps"] == 30
    assert str(room / "teacher") in (room / "out" / "README.md").read_text()


@pytest.mark.parametrize("lora", [None, 2])
def test_a_resume_ends_with_the_same_weights(room, lora, monkeypatch):
    def run(name):
        teachers = {None: [str(room / "teacher")]}
        on_policy(room / "student", teachers, room / f"{name}-{lora}", CELLS, steps=6, lora=lora, **SMALL)

    run("whole")
    original, stops = OnPolicy.train_step, []

    def interrupted(self):
        if self.step == 3 and not stops:
            stops.append(3)
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    monkeypatch.setattr(OnPolicy, "train_step", interrupted)
    with pytest.raises(Interrupted):
        run("cut")
    run("cut")
    assert len({sha256(room / f"{name}-{lora}" / "model.safetensors") for name in ("whole", "cut")}) == 1
    assert sha256(room / f"cut-{lora}" / "model.safetensors") != sha256(room / "student" / "model.safetensors")


def test_another_tokenizer_is_refused(room, tmp_path):
    other = Tokenizer.train(["zebras graze quietly beyond quartz quarries"] * 9, vocab_size=290)
    teachers = {None: [folder(tmp_path / "t", other, llama(other))]}
    with pytest.raises(InputError, match="use --how traces"):
        on_policy(room / "student", teachers, tmp_path / "o", CELLS, steps=1)


def test_weights_and_groups_must_fit(room, tmp_path):
    teacher = str(room / "teacher")
    with pytest.raises(InputError, match="2 weights for 1 teachers"):
        on_policy(room / "student", {None: [teacher]}, tmp_path / "o", CELLS, steps=1, weights=[1, 2], **SMALL)
    with pytest.raises(InputError, match="not a multiple"):
        on_policy(room / "student", {None: [teacher]}, tmp_path / "o", CELLS, steps=1, batch=5, group=2)
