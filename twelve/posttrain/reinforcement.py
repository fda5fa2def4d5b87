"""Reinforcement learning from checkable tasks: sample groups of answers, score them, step towards the better ones.

One process and one set of weights: the engine samples from the very tensors that the optimiser changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twelve import lora, report, tasks
from twelve.engine import Engine
from twelve.engine.runner import PAGE, make_runner
from twelve.engine.scheduler import pages_for
from twelve.errors import InputError
from twelve.evaluate.accuracy import prompt_ids, task_accuracy
from twelve.heap import give_back
from twelve.model import Transformer
from twelve.posttrain import health, memory
from twelve.posttrain.curriculum import Cell, Curriculum, serving
from twelve.posttrain.grpo import Objective, advantages, answer_weights, policy_loss
from twelve.posttrain.rewards import Rewards, language_share, well_formed
from twelve.posttrain.rollout import Group, Rows, fitting, logprobs, rows_of, sample
from twelve.train.checkpoint import load_checkpoint
from twelve.train.loop import Trainer
from twelve.train.plan import Plan

DIFFERENCE = 1e-3  # nats; a sampler and a trainer that differ more do not have the same policy
# Where two experts are as good as equal, rounding may send a token to the one here and to the other there. Such an
# answer is left out; more of them are a fault.
FLIPPED = 0.01  # of a step's answers, of a model with routed experts
IDLE = 20  # steps in a row without anything to compare, after which a run ends


class Reinforcement(Trainer):
    """GRPO on a model and its tasks, or rejection sampling, its control."""

    timed = True
    trains_table = False  # it goes back to its last checkpoint only, not to the healthy one

    def __init__(
        self, model: Transformer, tokenizer, plan: Plan, folder: Path, cells: Sequence[Cell], objective: Objective,
        rewards: Rewards, reference: Transformer | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, plan, folder)
        self.tokenizer, self.objective, self.rewards = tokenizer, objective, rewards
        self.cells, self.measured = serving("train", cells), serving("test", cells)
        self.reference = reference
        options = plan.options
        self.prompts, self.group = options["prompts"], options["group"]
        self.max_tokens, self.temperature = options["max_tokens"], options["temperature"]
        self.healthy = folder / "training" / "healthy.safetensors"
        self._ended: str | None = None
        self.room = model.config.max_position_embeddings  # a prompt has fewer tokens
        self.engine, self.phases = self._make_engine()
        self.routers = [layer.gate for layer in model.moe_layers()]

    def _make_engine(self) -> tuple[Engine, memory.Phases]:
        """The engine over the model's weights, with as much memory for keys and values as the limit leaves."""
        parameters = sum(parameter.nbytes for parameter in self.parameters)
        prompt = self._longest_prompt()
        longest = min(5 * prompt // 4 + self.max_tokens, self.room)  # others are longer
        runner = make_runner(self.model, self.tokenizer.vocab_size)  # moves the weights: not before their memory counts
        fixed = memory.resident() + 3 * parameters  # gradients and the two averages are not there yet
        shared = prompt // PAGE  # full pages of a prompt, which its answers share
        pages = self.prompts * (shared + self.group * (pages_for(longest) - shared))
        limit = self.plan.options["memory"]
        phases = memory.fit(limit, fixed, runner.page_bytes, pages, self.model.config, longest)
        kv = {"kv_memory": phases.kv_memory, "speculation": "off"}
        engine = Engine(self.model, self.tokenizer, **kv, runner=runner)
        if (held := engine.pool.count * PAGE) < self.room:  # keys and values of one answer must fit, too
            self.room = held - self.max_tokens + 1
        return engine, phases

    def _longest_prompt(self) -> int:
        """Tokens of the longest of a few prompts."""
        return max(len(prompt_ids(self.tokenizer, problem)) for problem in self._problems(self.cells, "longest"))

    # --- one step -----------------------------------------------------------------------------------------------------

    def train_step(self) -> dict[str, float]:
        began = time.monotonic()
        groups = self.rollout()
        sampled = time.monotonic()
        figures = self.learn(groups)
        answers = [answer for group in groups for answer in group.answers]
        texts = [(group.problem, answer.text) for group in groups for answer in group.answers]
        scores = [score for group in groups for score in group.scores]
        rewards = [reward for group in groups for reward in group.rewards]
        self.step += 1
        self.tokens += sum(answer.completion_tokens for answer in answers)
        figures = {
            "step": self.step, "tokens": self.tokens, "reward": _mean(rewards), "accuracy": _mean(scores),
            **health.figures(answers), "well_formed": _mean(well_formed(text) for _, text in texts),
            "language": _mean(language_share(text, problem.language) for problem, text in texts),
            **figures, "sampling_seconds": sampled - began, "learning_seconds": time.monotonic() - sampled,
            "memory": memory.peak(),
        }  # fmt: skip
        self._look_after(figures)
        return figures

    def rollout(self) -> list[Group]:
        """Sample and score the step's groups, and tell the curriculum."""
        self.model.eval()
        if self.phases.apart:
            give_back()  # activations of the last step: keys and values are to take their place
        cells = self.curriculum.draw(self.prompts, f"{self.plan.seed} {self.step}")
        problems = self._problems(cells, self.step)
        seed = _number(self.plan.seed, "answers", self.step)
        groups = sample(self.engine, self.tokenizer, problems, self.group, self.max_tokens, self.temperature, seed)
        if self.phases.apart:
            self.engine.release()
        score(groups, self.rewards, self.max_tokens)
        self._require_same_tasks()
        for cell, group in zip(cells, groups, strict=True):
            self.curriculum.record(cell, _mean(group.scores))
        return groups

    def learn(self, groups: list[Group]) -> dict[str, float]:
        """Step on the groups that have something to compare; the figures of it."""
        self.model.train()
        if self.objective.method == "rejection":
            gains = torch.tensor([[float(score == 1) for score in group.scores] for group in groups])
        else:
            gains = advantages(torch.tensor([group.rewards for group in groups]), self.objective.normalise)
        counted = torch.tensor([[not self._overlong(answer) for answer in group.answers] for group in groups])
        if self.objective.method == "rejection":
            counted &= gains > 0
        kept = [index for index in range(len(groups)) if (gains[index] != 0).any() and counted[index].any()]
        figures = {"kept": len(kept) / len(groups), "loss": 0.0, "learning_rate": 0.0}
        updates = min(self.plan.options["updates"], len(kept))
        parts = [kept[part::updates] for part in range(updates)]
        before = [self._read([groups[index] for index in part]) for part in parts] if updates > 1 else None
        totals = Counter(answers=sum(len(groups[index].answers) for index in kept))
        norms = []
        # fewer groups make a noisier direction: the step shrinks with them, since AdamW's does not by itself
        rate = self.plan.learning_rate * min(1.0, (self.step + 1) / self.plan.warmup) * len(kept) / len(groups)
        for number, part in enumerate(parts):
            lengths = torch.tensor([len(answer.token_ids) for index in part for answer in groups[index].answers])
            weights = answer_weights(lengths, counted[part].flatten(), self.objective.loss, self.max_tokens)
            self._accumulate(
                self._read([groups[index] for index in part]) if before is None else before[number],
                gains[part].flatten(), weights, totals,
            )  # fmt: skip
            norms.append(self.update(rate, totals["loss"]))
        if kept:
            tokens = totals["tokens"]
            figures |= {
                "loss": totals["loss"] / updates, "learning_rate": rate, "grad_norm": max(norms),
                "entropy": totals["entropy"] / tokens, "clipped": totals["clipped"] / tokens,
                "kl": totals["kl"] / tokens, "masked": totals["masked"], "difference": totals["difference"],
                "flipped": totals["flipped"],
            }  # fmt: skip
        return figures

    def _overlong(self, answer) -> bool:
        return self.objective.mask_overlong and answer.finish_reason == "length"

    def _read(self, groups: list[Group]) -> list[dict[str, Any]]:
        """The groups as batches of rows. Where they will be read more than once, with their log-probabilities before
        the step and the experts that their tokens went to; with a divergence, with those of the reference."""
        rows = rows_of(groups, self.phases.tokens)
        batches = [{"rows": each.to(self.model.device)} for each in rows]
        with torch.no_grad():
            for batch in batches if self.plan.options["updates"] > 1 else ():
                batch["old"], _, routings = logprobs(self.model, batch["rows"], *self._sampling)
                batch["routing"] = [routing.experts for routing in routings]
            for batch in batches if self.temperature != 1 else ():  # the sampler's are at temperature 1
                batch["untempered"] = logprobs(self.model, batch["rows"], self.tokenizer.vocab_size)[0]
            if self.objective.kl:
                with contextlib.nullcontext(self.reference) if self.reference else lora.bare(self.model) as reference:
                    for batch in batches:
                        batch["reference"] = logprobs(reference, batch["rows"], *self._sampling)[0]
        return batches

    @property
    def _sampling(self) -> tuple[int, float]:
        return self.tokenizer.vocab_size, self.temperature

    def _accumulate(self, batches: list[dict[str, Any]], gains: Tensor, weights: Tensor, totals: Counter) -> None:
        """Add the gradients of the batches, and their figures to `totals`."""
        gains, weights = gains.to(self.model.device), weights.to(self.model.device)
        for batch in batches:
            rows: Rows = batch["rows"]
            self._force(batch.get("routing"))
            now, entropy, _ = logprobs(self.model, rows, *self._sampling)
            self._force(None)
            old = batch.get("old", now.detach())  # nothing has changed before the first update
            sampled = rows.sampled if self.temperature == 1 else old
            used = weights * self._same_policy(batch.get("untempered", old), rows, gains, totals)
            reference = batch.get("reference")
            terms = policy_loss(now, old, sampled, reference, rows.answers, gains, used, self.objective)
            terms.loss.backward()
            totals.update(
                loss=terms.loss.item(), tokens=len(rows.targets), entropy=entropy.sum().item(), kl=terms.kl,
                clipped=terms.clipped, masked=terms.masked,
            )  # fmt: skip

    def _force(self, routing: list[Tensor] | None) -> None:
        for index, router in enumerate(self.routers[: len(routing or self.routers)]):
            router.forced = routing[index] if routing else None

    def _same_policy(self, mine: Tensor, rows: Rows, answers: Tensor, totals: Counter) -> Tensor:
        """1 for each of the `answers` [A] that trainer and sampler gave the same log-probabilities, 0 for another; the
        largest difference goes to `totals`, those of the step. InputError when they do not run the same policy."""
        apart = (mine - rows.sampled).abs().to(answers)
        worst = torch.zeros_like(answers).scatter_reduce(0, rows.answers, apart, "amax")
        differs = ~(worst <= DIFFERENCE)
        totals["difference"] = max(totals["difference"], worst[~differs].max().item() if not differs.all() else 0.0)
        totals["flipped"] += int(differs.sum())
        if totals["flipped"] > (max(1, FLIPPED * totals["answers"]) if self.routers else 0):
            raise InputError(
                f"the sampler's and the trainer's log-probabilities differ by {worst.max().item():.2g} at step "
                f"{self.step + 1}, more than {DIFFERENCE:g}: they do not run the same model, so nothing can be learnt"
            )
        return 1.0 - differs.to(answers)

    # --- over the run -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        self.curriculum = Curriculum(self.cells, self.plan.options["curriculum"], self.memory.setdefault("rates", {}))
        if "before" not in self.memory:
            self.memory["before"] = self.measure()
        self.closing = 1.2 * sum(cell["seconds"] for cell in self.memory["before"])

    def changed(self) -> None:
        super().changed()
        self.engine.forget()  # it may hold copies of the weights, too

    def measure(self) -> list[dict[str, Any]]:
        """Accuracy on held-out problems of every cell, greedily."""
        each = -(-self.plan.options["problems"] // len(self.measured))
        self.model.eval()
        found = [
            task_accuracy(self.engine, self.tokenizer, cell.task, cell.language, cell.level, each,
                          max_tokens=self.max_tokens).to_dict()
            for cell in self.measured
        ]  # fmt: skip
        self._require_same_tasks()
        return found

    def _require_same_tasks(self) -> None:
        """InputError before anything is learnt, or told, of a task whose file was changed during the run."""
        tasks.require_unchanged(self.plan.options.get("task_sha256", {}))

    def outcome(self) -> dict[str, Any]:
        if self.memory.get("collapsed") and self.healthy.exists():
            load_checkpoint(self.healthy, self.model, self.optimizer)
            self.changed()
        if not self.step and not self._ended:
            seconds = sum(cell["seconds"] for cell in self.memory["before"])
            self._ended = (
                f"no time for a step: reading the model and measuring it ({seconds:.0f} s, and again at the end) took "
                "all minutes; give more, or fewer --problems"
            )
        after, before = self.measure(), self.memory["before"]
        self.memory["after"] = after
        self.healthy.unlink(missing_ok=True)
        figures = {
            "accuracy_before": pooled(before)[0], "accuracy_after": pooled(after)[0],
            "standard_error": pooled(after)[1], "before": before, "after": after, "peak_memory": memory.peak(),
        }  # fmt: skip
        return figures | ({"ended": self._ended} if self._ended else {})

    def save(self, log) -> None:
        super().save(log)
        if self.memory.get("is_best"):  # a link costs nothing, and the next checkpoint is another file
            self.healthy.unlink(missing_ok=True)
            try:
                os.link(self.checkpoint, self.healthy)
            except OSError:  # a file system without links
                shutil.copyfile(self.checkpoint, self.healthy)

    def _look_after(self, figures: dict[str, float]) -> None:
        """Remember what tells a healthy run from a collapsing one; end it with a reason."""
        rows = self.memory.setdefault("history", [])
        if "entropy" in figures:
            rows.append({name: figures[name] for name in (*health.NAMES, "reward")})
            del rows[health.WINDOW : -health.WINDOW]
        self.memory["idle"] = 0 if figures["kept"] else self.memory.get("idle", 0) + 1
        recent = _mean(row["reward"] for row in rows[-health.WINDOW :])
        self.memory["is_best"] = recent >= self.memory.get("best", -math.inf)
        self.memory["best"] = max(recent, self.memory.get("best", -math.inf))
        if reason := health.collapse(rows):
            self.memory |= {"collapsed": True, "is_best": False}
            kept = "kept is the best state before" if self.healthy.exists() else "there is no state before to keep"
            self._ended = f"the model collapsed: {reason}; {kept}"
        elif self.memory["idle"] >= IDLE:
            self._ended = (
                f"no group of answers differed in {IDLE} steps (accuracy {figures['accuracy']:.0%}): choose "
                + ("harder levels" if figures["accuracy"] > 0.5 else "easier levels, or begin with a cold start")
            )
        self.stopped = self._ended is not None

    def describe(self, figures: dict[str, float], seconds_left) -> str:
        left = f", {max(0, seconds_left()) / 60:.1f} min left" if seconds_left else ""
        return f"right {figures['accuracy']:.1%}, {figures['length']:.0f} tokens, kept {figures['kept']:.0%}{left}"

    def announce(self) -> dict[str, str]:
        gib = self.phases.bytes / 2**30
        apart = ", sampling and learning in turn" if self.phases.apart else ""
        return {
            "tasks": ", ".join(cell.key for cell in self.cells[:6]) + (", ..." if len(self.cells) > 6 else ""),
            "step": f"{self.prompts} problems x {self.group} answers of at most {self.max_tokens} tokens",
            "memory": f"{gib:.2f} GiB expected{apart}",
        }  # fmt: skip

    def sections(self, rows: list[dict[str, float]]) -> list[tuple[str, list[str]]]:
        def line(title: str, *names: str) -> str:
            points = {name: ([row["step"] for row in rows if name in row], [row[name] for row in rows if name in row])
                      for name in names}  # fmt: skip
            return report.curve(title, points)

        table = [
            {"task": before["task"], "language": before["language"], "level": before["level"],
             "before": before["accuracy"], "after": after["accuracy"], "± s.e.": after["standard_error"]}
            for before, after in zip(self.memory["before"], self.memory["after"], strict=True)
        ]  # fmt: skip
        return [
            ("Held-out problems, greedy answers", [report.table(table)]),
            ("Training", [line("Right answers", "accuracy"), line("Tokens of an answer", "length"),
                          line("Entropy, nats a token", "entropy"), line("Groups that taught something", "kept"),
                          line("Largest difference between sampler and trainer", "difference")]),
        ]  # fmt: skip

    def _problems(self, cells: Sequence[Cell], purpose: Any) -> list[tasks.Problem]:
        """A problem for each cell, in order, whose prompt leaves room for an answer: a function of seed and purpose."""
        seed = _number(self.plan.seed, "problems", purpose)
        streams = {
            cell: tasks.problems(cell.task, "train", seed, [cell.level], [cell.language]) for cell in set(cells)
        }
        found = {cell: fitting(self.tokenizer, stream, self.room) for cell, stream in streams.items()}
        return [next(found[cell]) for cell in cells]


def score(groups: Sequence[Group], rewards: Rewards, max_tokens: int) -> None:
    """Fill in the scores and rewards of every answer."""
    problems = [group.problem for group in groups for _ in group.answers]
    texts = [answer.text for group in groups for answer in group.answers]
    scores = iter(tasks.score_all(problems, texts))
    for group in groups:
        group.scores = [next(scores) for _ in group.answers]
        group.rewards = [
            rewards.of(group.problem, answer.text, one, answer.completion_tokens, max_tokens)
            for answer, one in zip(group.answers, group.scores, strict=True)
        ]


def pooled(cells: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Accuracy over cells, and its binomial standard error."""
    asked = sum(cell["asked"] for cell in cells)
    share = sum(cell["score"] for cell in cells) / asked
    return share, math.sqrt(share * (1 - share) / asked)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / max(1, len(values))


def _number(*parts: Any) -> int:
    """A seed of 31 bits from anything that can be printed."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4]) >> 1
