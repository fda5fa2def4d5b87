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
    assert found.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 19))
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


def test_what_follows_a_think_of_the_prompts_own_is_reasoning(tokenizer, monkeypatch):
    opening = tokenizer.chat_template.replace("assistant\\n' }}", "assistant\\n<think>' }}")
    assert opening != tokenizer.chat_template
    monkeypatch.setattr(tokenizer, "chat_template", opening)
    texts = [f"so <answer>{problems(1)[0].answer}</answer>", f"so</think><answer>{problems(2)[1].answer}</answer>"]
    found = task_accuracy(Answers(texts), tokenizer, "arithmetic", "ko", 2, 2)
    assert found.scores == [[0], [1]] and found.votes[0] == [None]
    assert [sample["reasoning"] for sample in found.samples] == [texts[0], "so"]


def test_without_a_template_a_task_keeps_its_system_message_and_examples(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "sums.py"
    path.write_text(
        "SYSTEM = 'Add {them}.'\nEXAMPLES = [('1 + 1?', '<answer>2</answer>')]\n"
        "def generate(seed):\n    return {'question': f'{seed} + 1?', 'answer': seed + 1}\n"
    )
    monkeypatch.setattr(tokenizer, "chat_template", None)
    problem = tasks.get(str(path)).generate(5, 1, "en")
    told = tokenizer.decode(accuracy.prompt_ids(tokenizer, problem), skip_special=False)
    lines = told.removeprefix(accuracy.PLAIN).split("\n")
    assert lines == ["Add {them}.", "User: 1 + 1?", "Assistant: <answer>2</answer>", "User: 5 + 1?", "Assistant: "]


def test_the_answers_of_a_group_are_scored_at_once(tokenizer, monkeypatch):
    sizes, score_all = [], tasks.score_all
    monkeypatch.setattr(tasks, "score_all", lambda asked, texts: (sizes.append(len(texts)), score_all(asked, texts))[1])
    task_accuracy(Answers(["x"] * 70), tokenizer, "arithmetic", "en", 2, 70)
    assert sizes == [accuracy.GROUP, 70 - accuracy.GROUP]


@pytest.mark.parametrize(
    ("task", "language", "level", "words"),
    [("chess", "en", 1, "unknown task"), ("arithmetic", "fr", 1, "unknown language"), ("arithmetic", "en", 99, "99")],
)
def test_unknown_things_are_told(tokenizer, task, language, level, words):
    with pytest.raises(InputError, match=words):
        task_accuracy(Answers([]), tokenizer, task, language, level, 1)


# --- several answers a problem ----------------------------------------------------------------------------------------


def test_several_samples_are_grouped_by_problem(tokenizer):
    """Of four answers to each problem: all right, all wrong but alike, one right, two right and two without answer."""
    wrong, other, texts = "<answer>-1</answer>", "<answer>-2</answer>", []
    for index, problem in enumerate(problems(40)):
        right = solved(problem)
        kinds = [right] * 4, [wrong] * 4, [wrong, other, right, wrong], [right, "", right, ""]
        texts += kinds[index % 4]
    found = task_accuracy(Answers(texts), tokenizer, "arithmetic", "ko", 2, 40, temperature=1.0, samples=4)
    assert (found.asked, found.repeats, found.accuracy) == (40, 4, pytest.approx((1 + 0 + 0.25 + 0.5) / 4))
    measures = {name: measure.value for name, measure in found.measures.items()}
    assert list(measures) == ["pass@1", "pass@2", "pass@4", "maj@2", "maj@4", "agreement"]
    assert measures["pass@1"] == pytest.approx(found.accuracy)
    assert measures["pass@4"] == pytest.approx(3 / 4)
    assert measures["pass@2"] == pytest.approx((1 + 0 + 3 / 6 + 5 / 6) / 4)
    assert measures["maj@4"] == pytest.approx((1 + 0 + 0 + 1) / 4)
    assert measures["maj@2"] == pytest.approx((1 + 0 + 3 / 6 / 2 + 5 / 6) / 4)
    assert measures["agreement"] == pytest.approx((1 + 1 + 1 / 6 + 1 / 6) / 4)
    assert found.standard_error == found.measures["pass@1"].standard_error
    row = found.to_dict()
    assert row["measures"]["pass@4"].keys() == {"value", "standard_error"} and not {"scores", "votes"} & row.keys()
    assert len(row["samples"]) == accuracy.KEPT_SAMPLES and row["samples"][1]["prompt"] == problems(2)[1].question


def test_the_draws_of_a_problem_differ_and_so_do_those_of_all(tokenizer):
    engine = Answers(["x"] * 60)
    task_accuracy(engine, tokenizer, "arithmetic", "en", 1, 20, seed=3, temperature=0.7, samples=3)
    asked = [tuple(request.prompt_ids) for request in engine.requests]
    assert len({request.seed for request in engine.requests}) == 60
    assert {request.temperature for request in engine.requests} == {0.7}
    assert all(len({*asked[start : start + 3]}) == 1 for start in range(0, 60, 3)) and len({*asked}) == 20


def test_several_samples_that_do_not_fit_are_all_wrong(tokenizer):
    class Short:
        def generate(self, requests):
            raise ContextLengthError("too long")

    found = task_accuracy(Short(), tokenizer, "arithmetic", "en", 2, 3, temperature=1.0, samples=2)
    assert (found.score, found.cut_short, found.measures["pass@2"].value) == (0, 6, 0)
    assert found.measures["agreement"].value == 0  # no answer agrees with no answer


def test_greedy_samples_would_all_be_the_same(tokenizer):
    with pytest.raises(InputError, match="temperature above 0"):
        task_accuracy(Answers([]), tokenizer, "arithmetic", samples=4)


# --- files of others --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "rows"), [("gsm8k-test.jsonl#test", 1319), ("svamp.jsonl#test", 1000)])
def test_gsm8k_and_svamp_load_and_score(tokenizer, shared_data, name, rows):
    task = str(shared_data / "tasks" / name)
    asked = list(tasks.problems(task, "test", 0, [1], ["en"]))
    assert 0.99 * rows < len(asked) <= rows  # a question that stands there twice is asked once
    assert all(problem.answer.replace(",", "").lstrip("-").replace(".", "").isdigit() for problem in asked)
    forms = ("#### {}", "<answer>{}</answer>", "<think>is it 7?</think>So \\boxed{{{}}}", "#### {}0")
    texts = [forms[index % 4].format(problem.answer) for index, problem in enumerate(asked[:40])]
    found = task_accuracy(Answers(texts), tokenizer, task, "en", 1, 40)
    assert found.asked == 40 and found.score == 30 + sum(asked[index].answer == "0" for index in range(3, 40, 4))


def test_a_file_without_problems_is_told(tokenizer, tmp_path):
    (tmp_path / "none.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match="none.jsonl has no problems"):
        task_accuracy(Answers([]), tokenizer, str(tmp_path / "none.jsonl"))
    (tmp_path / "broken.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n{"question": "1 + \n')
    with pytest.raises(InputError, match="broken.jsonl line 2 is not JSON"):
        task_accuracy(Answers([]), tokenizer, str(tmp_path / "broken.jsonl"))
