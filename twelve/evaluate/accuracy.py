"""Accuracy on checkable tasks, with its standard error; from several answers a problem also pass@k and maj@k."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from statistics import fmean
from typing import Any

from tqdm import tqdm

from twelve import tasks
from twelve.data.chat import encode_prompt, opens_reasoning, split_reasoning
from twelve.data.reasoning import OPEN
from twelve.engine import Completion, ContextLengthError, Engine, Request, sub_seed
from twelve.errors import InputError
from twelve.evaluate.repeats import MOST, Vote, agreement, maj_at_k, pass_at_k, sizes, vote
from twelve.evaluate.statistics import Share, share, standard_error
from twelve.tasks.problem import Problem

KEPT_SAMPLES = 8
GROUP = 64  # answers that are made together
# for a base model that knows no chat: R1-Zero's idea (arXiv 2501.12948, section 2.2) in words of our own
PLAIN = """\
The assistant thinks about the user's question inside <think> </think> first, then gives the result inside \
<answer> </answer>.
"""
SPEAKERS = {"system": "", "user": "User: ", "assistant": "Assistant: "}


@dataclass
class Accuracy:
    """The share of problems solved, and some of the answers."""

    task: str
    language: str
    level: int
    asked: int
    score: float  # sum over problems; each counts from 0 to 1, the mean of its answers
    cut_short: int  # answers that ran into `max_tokens` or the model's context
    tokens: int  # drawn for the answers
    seconds: float
    samples: list[dict[str, Any]] = field(default_factory=list)
    drawn: bool = False  # at a temperature above 0
    repeats: int = 1  # answers to a problem
    scores: list[list[float]] = field(default_factory=list, repr=False)  # of every problem's answers
    votes: list[list[Vote]] = field(default_factory=list, repr=False)  # what they say: `repeats.vote`

    @property
    def accuracy(self) -> float:
        return self.score / self.asked

    @property
    def solved(self) -> list[float]:
        """Of every problem, the share of its answers that are right."""
        return [fmean(scores) for scores in self.scores]

    @property
    def standard_error(self) -> float:
        """Problems being the sample: repeats of one are no new problem."""
        return standard_error(self.solved)

    @cached_property
    def measures(self) -> dict[str, Share]:
        """pass@k, maj@k and agreement across repeats, once all are there; none for a single answer a problem."""
        if self.repeats == 1:
            return {}
        pairs = list(zip(self.votes, self.scores, strict=True))
        return {
            **{f"pass@{k}": share([pass_at_k(scores, k) for scores in self.scores]) for k in sizes(self.repeats)},
            **{f"maj@{k}": share([maj_at_k(*pair, k) for pair in pairs]) for k in sizes(self.repeats)[1:]},
            "agreement": share([agreement(votes) for votes in self.votes]),
        }

    def __str__(self) -> str:
        several = ", ".join(f"{name} {measure}" for name, measure in self.measures.items())
        asked = f"{self.asked} problems" + (several and f" x {self.repeats} answers")
        told = f"{share(self.solved)} ({asked}, {self.cut_short} answers cut short)"
        return told + (several and f"\n  {several}")

    def to_dict(self) -> dict[str, Any]:
        kept = {name: value for name, value in asdict(self).items() if name not in ("scores", "votes")}
        measures = {name: asdict(measure) for name, measure in self.measures.items()}
        return {"accuracy": self.accuracy, "standard_error": self.standard_error, **kept, "measures": measures}


def task_accuracy(
    engine: Engine, tokenizer, task: str, language: str = "en", level: int = 1, n: int = 100, seed: int = 0,
    temperature: float = 0.0, max_tokens: int = 256, samples: int = 1,
) -> Accuracy:  # fmt: skip
    """Ask `n` problems of the task's test split through the chat template, and score `samples` answers to each.

    There are fewer problems where the split has fewer. Greedy by default; a temperature draws by `seed`. InputError for
    an unknown task, language or level, and for several samples without a temperature, which would all be the same.
    """
    started = time.monotonic()
    if samples > MOST or (samples > 1 and not temperature):
        raise InputError(f"{samples} samples a problem need a temperature above 0, and may be at most {MOST}")
    asked = list(islice(tasks.problems(task, "test", seed, [level], [language]), n))
    if not asked:
        raise InputError(f"{task} has no test problems of level {level} in {language}")
    result = Accuracy(task, language, level, asked=len(asked), score=0.0, cut_short=0, tokens=0, seconds=0.0,
                      repeats=samples)  # fmt: skip
    bar = tqdm(total=len(asked), desc=f"{task} {language} {level}", unit="problem", leave=False)
    for problem, answers, scores in _answers(engine, tokenizer, asked, samples, seed, temperature, max_tokens):
        bar.update()
        result.score += fmean(scores)
        result.scores.append(scores)
        result.votes.append([vote(answer.text, answer.finish_reason != "length") for answer in answers])
        result.cut_short += sum(answer.finish_reason == "length" for answer in answers)
        result.tokens += sum(answer.completion_tokens for answer in answers)
        if len(result.samples) < KEPT_SAMPLES:
            reasoning, text = split_reasoning(answers[0].text)
            sample = {"prompt": problem.question, "reasoning": reasoning, "text": text}
            result.samples.append({**sample, "expected": problem.answer, "score": scores[0]})
    bar.close()
    result.seconds = time.monotonic() - started
    return result


def prompt_ids(tokenizer, problem: Problem) -> list[int]:
    """The tokens that ask for an answer: through the chat template, or in plain words where the model has none."""
    messages = asked(problem)
    if tokenizer.chat_template is None:
        told = "".join(f"{SPEAKERS[message['role']]}{message['content']}\n" for message in messages)
        return tokenizer.encode(f"{PLAIN}{told}{SPEAKERS['assistant']}", control=False)
    return encode_prompt(tokenizer, messages)


def asked(problem: Problem) -> list[dict[str, str]]:
    """The conversation that an answer follows: the task's SYSTEM message, its EXAMPLES (questions with their answers),
    where it has them, and the question."""
    task = tasks.get(problem.task)
    messages = [{"role": "system", "content": task.SYSTEM}] if getattr(task, "SYSTEM", None) else []
    for question, answer in getattr(task, "EXAMPLES", ()):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": problem.question}]


def generate(engine: Engine, tokenizer, requests: Sequence[Request]) -> list[Completion]:
    """The engine's answers; one whose prompt itself opens the reasoning begins with the <think> that it lacks."""
    answers = engine.generate(requests)
    prompts = (tokenizer.decode(request.prompt_ids[-16:], skip_special=False) for request in requests)
    return [
        replace(answer, text=OPEN + answer.text) if opens_reasoning(prompt) else answer
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def generate_what_fits(engine: Engine, tokenizer, requests: Sequence[Request]) -> list[Completion]:
    """As `generate`; where the model cannot even read a prompt, its answer is empty and cut off."""
    try:
        return generate(engine, tokenizer, requests)
    except ContextLengthError:  # one of them; before any has begun
        if len(requests) > 1:
            return [answer for request in requests for answer in generate_what_fits(engine, tokenizer, [request])]
        return [Completion("", [], [], "length", len(requests[0].prompt_ids))]


def _answers(
    engine: Engine, tokenizer, problems: list[Problem], samples: int, seed: int, temperature: float, max_tokens: int
) -> Iterator[tuple[Problem, list[Completion], list[float]]]:
    """Every problem with its answers and their scores, in order; those of a group are made, and scored, at once."""
    size = max(1, GROUP // samples)
    for start in range(0, len(problems), size):
        group = problems[start : start + size]
        requests = [
            Request(prompt, max_tokens, temperature, seed=sub_seed(seed, number))
            for index, prompt in enumerate((prompt_ids(tokenizer, problem) for problem in group), start=start)
            for number in range(index * samples, (index + 1) * samples)
        ]
        made = generate_what_fits(engine, tokenizer, requests)
        repeated = [problem for problem in group for _ in range(samples)]
        scores = tasks.score_all(repeated, [answer.text for answer in made])
        for index, problem in enumerate(group):
            mine = slice(index * samples, (index + 1) * samples)
            yield problem, made[mine], scores[mine]
