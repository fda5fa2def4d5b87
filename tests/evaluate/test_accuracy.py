"""Accuracy with an engine whose answers are known."""

import math

import pytest

from twelve import tasks
from twelve.data.tokenizer import Tokenizer
from twelve.engine import Completion, ContextLengthError
from twelve.errors import InputError
from twelve.evaluate import accuracy, task_accuracy


@pytest.fixture(scope="module")
def tokenizer():
    texts = [problem.question for problem, _ in zip(tasks.problems("arithmetic", "train"), range(50), strict=False)]
    return Tokenizer.train(texts, 300)


class Answers:
    """An engine that gives the answers it was made with, in turn."""

    def __init__(self, texts):
        self.texts, self.requests = iter(texts), []

    def generate(self, requests):
        self.requests += requests
        return [Completion(next(self.texts), [1, 2, 3], [], "stop", len(request.prompt_ids)) for request in requests]


def problems(n, level=2, language="ko"):
    return [p for p, _ in zip(tasks.problems("arithmetic", "test", 0, [level], [language]), range(n), strict=False)]


def solved(problem):
    return problem.messages()[-1]["content"]


def test_counts_right_answers_and_their_standard_error(tokenizer):
    texts = [solved(problem) if index % 4 else "no idea" for index, problem in enumerate(problems(20))]
    found = task_accuracy(Answers(texts), tokenizer, "arithmetic", "ko", 2, 20)
    assert (found.asked, found.score, found.accuracy) == (20, 15, 0.75)
    assert found.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 20))
    assert found.tokens == 60 and found.cut_short == 0
    assert len(found.samples) == accuracy.KEPT_SAMPLES
    first, second = found.samples[:2]
    assert (first["text"], first["score"]) == ("no idea", 0)
    assert second["score"] == 1 and second["reasoning"] == problems(2)[1].steps
    assert {"accuracy", "standard_error", "samples"} <= found.to_dict().keys()


def test_asks_greedily_for_problems_of_the_test_split(tokenizer):
    engine = Answers(["x"] * 10)
    task_accuracy(engine, tokenizer, "arithmetic", "ko", 2, 10)
    for request, problem in zip(engine.requests, problems(10), strict=True):
        assert tasks.is_held_out(problem) and request.temperature == 0
        asked = tokenizer.decode(request.prompt_ids, skip_special=False)
        assert asked == f"<|im_start|>user\n{problem.question}<|im_end|>\n<|im_start|>assistant\n"


def test_draws_differ_between_problems_and_repeat_with_the_seed(tokenizer):
    seeds = []
    for _ in range(2):
        engine = Answers(["x"] * 5)
        task_accuracy(engine, tokenizer, "arithmetic", "en", 1, 5, seed=3, temperature=1.0)
        seeds.append([request.seed for request in engine.requests])
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == 5


def test_a_problem_that_does_not_fit_the_context_counts_as_wrong(tokenizer):
    class Short:
        def generate(self, requests):
            raise ContextLengthError("too long")

    found = task_accuracy(Short(), tokenizer, "arithmetic", "en", 2, 3)
    assert (found.asked, found.score, found.cut_short, found.tokens) == (3, 0, 3, 0)


def test_a_small_level_may_have_fewer_problems_than_asked_for(tokenizer):
    found = task_accuracy(Answers(["x"] * 5000), tokenizer, "arithmetic", "en", 1, 5000)
    assert 20 < found.asked < 5000


@pytest.mark.parametrize(
    ("task", "language", "level", "words"),
    [("chess", "en", 1, "unknown task"), ("arithmetic", "fr", 1, "unknown language"), ("arithmetic", "en", 99, "99")],
)
def test_unknown_things_are_told(tokenizer, task, language, level, words):
    with pytest.raises(InputError, match=words):
        task_accuracy(Answers([]), tokenizer, task, language, level, 1)
