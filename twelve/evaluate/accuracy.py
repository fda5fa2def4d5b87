"""Accuracy on checkable tasks, with its standard error."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from tqdm import tqdm

from twelve import tasks
from twelve.data.chat import encode_prompt, split_reasoning
from twelve.engine import Completion, ContextLengthError, Engine, Request, sub_seed
from twelve.errors import InputError
from twelve.tasks.problem import Problem

KEPT_SAMPLES = 8
GROUP = 64  # problems that are answered together
# for a base model that knows no chat: R1-Zero's idea (arXiv 2501.12948, section 2.2) in words of our own
PLAIN = """\
The assistant thinks about the user's question inside <think> </think> first, then gives the result inside \
<answer> </answer>.
User: {question}
Assistant: """


@dataclass
class Accuracy:
    """The share of problems solved, and some of the answers."""

    task: str
    language: str
    level: int
    asked: int
    score: float  # sum over problems; each counts from 0 to 1
    cut_short: int  # answers that ran into `max_tokens` or the model's context
    tokens: int  # drawn for the answers
    seconds: float
    samples: list[dict[str, Any]] = field(default_factory=list)
    drawn: bool = False  # at a temperature above 0

    @property
    def accuracy(self) -> float:
        return self.score / self.asked

    @property
    def standard_error(self) -> float:
        """Binomial: sqrt(p (1 - p) / n)."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.asked)

    def to_dict(self) -> dict[str, Any]:
        return {"accuracy": self.accuracy, "standard_error": self.standard_error, **asdict(self)}


def task_accuracy(
    engine: Engine, tokenizer, task: str, language: str = "en", level: int = 1, n: int = 100, seed: int = 0,
    temperature: float = 0.0, max_tokens: int = 256,
) -> Accuracy:  # fmt: skip
    """Ask `n` problems of the task's test split through the chat template, and score the answers.

    There are fewer where the split has fewer. Greedy by default; a temperature draws by `seed`. InputError for an
    unknown task, language or level.
    """
    started = time.monotonic()
    scorer = tasks.get(task)
    asked = list(islice(tasks.problems(task, "test", seed, [level], [language]), n))
    if not asked:
        raise InputError(f"{task} has no test problems of level {level} in {language}")
    result = Accuracy(task, language, level, asked=len(asked), score=0.0, cut_short=0, tokens=0, seconds=0.0)
    bar = tqdm(total=len(asked), desc=f"{task} {language} {level}", unit="problem", leave=False)
    for index, (problem, answer) in enumerate(_answers(engine, tokenizer, asked, seed, temperature, max_tokens)):
        bar.update()
        score = scorer.score(problem, answer.text)
        result.score += score
        result.cut_short += answer.finish_reason == "length"
        result.tokens += answer.completion_tokens
        if index < KEPT_SAMPLES:
            reasoning, text = split_reasoning(answer.text)
            sample = {"prompt": problem.question, "reasoning": reasoning, "text": text}
            result.samples.append({**sample, "expected": problem.answer, "score": score})
    bar.close()
    result.seconds = time.monotonic() - started
    return result


def prompt_ids(tokenizer, problem: Problem) -> list[int]:
    """The tokens that ask for an answer: through the chat template, or PLAIN where the model has none."""
    if tokenizer.chat_template is None:
        return tokenizer.encode(PLAIN.format(question=problem.question), control=False)
    return encode_prompt(tokenizer, asked(problem))


def asked(problem: Problem) -> list[dict[str, str]]:
    """The conversation that an answer follows: the task's SYSTEM message, its EXAMPLES (questions with their answers),
    where it has them, and the question."""
    task = tasks.get(problem.task)
    messages = [{"role": "system", "content": task.SYSTEM}] if getattr(task, "SYSTEM", None) else []
    for question, answer in getattr(task, "EXAMPLES", ()):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": problem.question}]


def _answers(
    engine: Engine, tokenizer, problems: list[Problem], seed: int, temperature: float, max_tokens: int
) -> Iterator[tuple[Problem, Completion]]:
    """Every problem with its answer, in order; those of a group are made at once."""
    for start in range(0, len(problems), GROUP):
        group = problems[start : start + GROUP]
        prompts = [prompt_ids(tokenizer, problem) for problem in group]
        requests = [
            Request(prompt, max_tokens, temperature, seed=sub_seed(seed, start + index))
            for index, prompt in enumerate(prompts)
        ]
        try:
            yield from zip(group, engine.generate(requests), strict=True)
        except ContextLengthError:  # one of them; before any has begun
            for problem, request in zip(group, requests, strict=True):
                try:
                    [answer] = engine.generate([request])
                except ContextLengthError:  # the model cannot even read it
                    answer = Completion("", [], [], "length", len(request.prompt_ids))
                yield problem, answer
