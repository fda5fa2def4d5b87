"""Rows that share a prompt say what separate passes say, and what the engine said."""

from dataclasses import replace

import pytest
import torch
from small import llama, model, v3

from twelve import lora, tasks
from twelve.engine import Completion, Engine, Request
from twelve.errors import InputError
from twelve.model.layers import linear_logprobs
from twelve.posttrain import rollout
from twelve.posttrain.rollout import Group, fitting, logprobs, rows_of, sample
from twelve.tasks import Problem


def groups(tokenizer, sizes, seed=0):
    """Groups of random tokens: sizes [(prompt, [answers])]."""
    draw = torch.Generator().manual_seed(seed)

    def ids(count):
        return torch.randint(tokenizer.vocab_size, (count,), generator=draw).tolist()

    return [
        Group(None, ids(prompt), [Completion("", ids(n), [0.0] * n, "stop", prompt) for n in answers])
        for prompt, answers in sizes
    ]


@pytest.mark.parametrize("shape", [v3, llama])
@pytest.mark.parametrize("tokens", [40, 200])
def test_shared_prompts_change_nothing(tokenizer, shape, tokens):
    network = model(shape(tokenizer)).double()
    made = groups(tokenizer, [(12, [5, 1, 9, 3]), (3, [7, 7]), (30, [2, 20, 11])])
    expected, owners = {}, 0
    for group in made:
        for answer in group.answers:
            ids = torch.tensor([group.prompt + answer.token_ids])
            logits = network(ids)[0, len(group.prompt) - 1 : -1, : tokenizer.vocab_size].log_softmax(-1)
            expected[owners] = logits.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0], logits
            owners += 1
    seen = []
    for rows in rows_of(made, tokens):
        with torch.no_grad():
            found, entropy, _ = logprobs(network, rows, tokenizer.vocab_size)
        assert rows.ids.numel() == rows.positions.numel() <= max(tokens, 1 + 30 + 19)
        for owner in rows.answers.unique().tolist():
            mine = rows.answers == owner
            single, logits = expected[owner]
            assert torch.allclose(found[mine], single, atol=1e-10)
            assert torch.allclose(entropy[mine], -(logits.exp() * logits).sum(-1), atol=1e-10)
            seen.append(owner)
    assert sorted(seen) == list(range(owners))  # every answer once, and whole


@pytest.mark.parametrize("kind", ["v3", "llama", "lora"])
def test_sampler_and_trainer_agree(tokenizer, kind):
    """Issue 4: within 1e-5 on a CPU, routed experts included."""
    network = model(replace(llama(tokenizer) if kind == "llama" else v3(tokenizer, layers=3), initializer_range=0.05))
    if kind == "lora":
        lora.attach(network, 4)
        with torch.no_grad():
            for name, parameter in lora.adapter_state(network).items():
                if name.endswith("B"):
                    parameter.normal_(0, 0.02)
        lora.refresh(network)
    engine = Engine(network, tokenizer, speculation="off")
    problems = [problem for problem, _ in zip(tasks.problems("arithmetic", "train"), range(6), strict=False)]
    made = sample(engine, tokenizer, problems, group=4, max_tokens=40, seed=5)
    assert [len(group.answers) for group in made] == [4] * 6
    again = sample(engine, tokenizer, problems, group=4, max_tokens=40, seed=5)
    assert [group.answers for group in made] == [group.answers for group in again]
    assert made[0].answers[0] != made[0].answers[1]
    network.train()
    for rows in rows_of(made, 2000):
        found, _, routings = logprobs(network, rows, tokenizer.vocab_size)
        assert (found - rows.sampled).abs().max() < 1e-5
        assert len(routings) == len(network.moe_layers())


def test_answers_begin_with_the_think_that_the_prompt_opened(tokenizer, monkeypatch):
    engine = Engine(model(llama(tokenizer)), tokenizer)
    problems = [Problem("arithmetic", "en", 1, "1 + 1?", "", 2)]
    [plain] = sample(engine, tokenizer, problems, group=2, max_tokens=5, seed=0)
    opening = tokenizer.chat_template.replace("assistant\\n' }}", "assistant\\n<think>' }}")
    monkeypatch.setattr(tokenizer, "chat_template", opening)
    [opened] = sample(engine, tokenizer, problems, group=2, max_tokens=5, seed=0)
    [alone] = engine.generate([Request(opened.prompt, 5, seed=0)])
    assert not any(answer.text.startswith("<think>") for answer in plain.answers)
    assert opened.answers[0].text == f"<think>{alone.text}" and opened.answers[0].token_ids == alone.token_ids
    assert opened.answers[1].text.startswith("<think>")


def test_problems_that_leave_no_room_are_left_out(tokenizer, monkeypatch):
    monkeypatch.setattr(rollout, "PATIENCE", 3)
    short, long = (Problem("arithmetic", "en", 1, text, "", 2) for text in ("1 + 1?", "1 + " * 99 + "1?"))
    room = len(rollout.prompt_ids(tokenizer, short)) + 1
    assert list(fitting(tokenizer, [long, short, long, long, short], room)) == [short] * 2
    assert list(fitting(tokenizer, [short], room - 1)) == []
    with pytest.raises(InputError, match=rf"arithmetic, level 1 in en, are too long: no prompt of 3 .* {room} tokens"):
        list(fitting(tokenizer, [short, long, long, long, short], room))


def test_log_probabilities_have_the_plain_gradient():
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 6, generator=draw, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 6, generator=draw, dtype=torch.float64, requires_grad=True)
    targets, upstream = torch.arange(11) % 9, torch.randn(11, generator=draw, dtype=torch.float64)
    for temperature in (1.0, 0.6):
        found, entropy = linear_logprobs(hidden, weight, targets, temperature, chunk=4)
        plain = (hidden @ weight.T / temperature).log_softmax(-1)
        assert torch.allclose(found, plain.gather(1, targets[:, None])[:, 0])
        assert torch.allclose(entropy, -(plain.exp() * plain).sum(-1)) and not entropy.requires_grad
        mine = torch.autograd.grad((found * upstream).sum(), (hidden, weight))
        theirs = torch.autograd.grad((plain.gather(1, targets[:, None])[:, 0] * upstream).sum(), (hidden, weight))
        assert all(torch.allclose(a, b) for a, b in zip(mine, theirs, strict=True))
    linear_logprobs(hidden, weight.detach(), targets)[0].sum().backward()  # a frozen head costs no gradient
    assert weight.grad is None
