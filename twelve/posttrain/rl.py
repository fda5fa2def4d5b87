"""The verb `rl`: a model folder and tasks in, a model folder out, better at these tasks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from twelve import convert, tasks
from twelve.errors import InputError
from twelve.lora import attach
from twelve.model import Transformer, count_parameters
from twelve.posttrain.curriculum import HOW, Cell, serving
from twelve.posttrain.grpo import Objective
from twelve.posttrain.judge import Judge, Judged
from twelve.posttrain.reinforcement import Reinforcement
from twelve.posttrain.rewards import Rewards
from twelve.train.plan import Plan
from twelve.train.precision import pick_device
from twelve.train.run import Prepared, run

MINUTES = 10.0  # where neither minutes nor steps are given
ADAPTERS_FROM = 20_000_000  # parameters; a larger model is trained through adapters unless told otherwise
RANK = 16
LEARNING_RATE = {"grpo": 3e-4, "rejection": 1e-4}  # each the best of 1e-4, 2e-4 and 3e-4: docs/lab.md
LORA_LEARNING_RATE = 2e-4
MAX_TOKENS = 128


def rl(
    model: str | Path, out: str | Path, task: Sequence[str], *, level: Sequence[int] | None = None,
    language: Sequence[str] | None = None, minutes: float | None = None, steps: int | None = None, seed: int = 0,
    prompts: int = 16, group: int = 8, max_tokens: int | None = None, temperature: float = 1.0,
    learning_rate: float | None = None, lora: int | None = None, memory: int | None = None,
    curriculum: str = HOW[0], problems: int = 200, updates: int = 1, method: str = "grpo", loss: str = "token",
    mask_overlong: bool = False, normalise: str = "std", kl: float = 0.0, off_policy: float | None = None,
    format_reward: float = 0.0, language_reward: float = 0.0, length_penalty: float = 0.0, device: str | None = None,
    started: float | None = None, quiet: bool = False, judge: Judge | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Improve a model (a folder, a .gguf file, a package's name) on checkable tasks by GRPO; the same call resumes.

    task: names that `tasks.get` knows, a user's .py file among them. A step samples `group` answers to each of
    `prompts` problems. lora: rank of the adapters, 0 trains everything; by default a model above 20M parameters gets
    adapters. memory: bytes that the process stays below. problems: held-out ones, answered before and after. updates:
    optimiser steps a rollout. judge: scores general prompts, which are mixed in. The rest: `grpo.Objective`,
    `rewards.Rewards`, `curriculum`.

    Returns the figures of the run. InputError for whatever of this cannot be, Interrupted on Ctrl-C.
    """
    if minutes is None and steps is None:
        minutes = MINUTES
    source = convert.resolve(model)
    if source.resolve() == Path(out).resolve():
        raise InputError(f"{out} is the model to start from: name another folder with --out")
    cells = cells_of(task, level, language)
    if max_tokens is None:
        max_tokens = max(getattr(tasks.get(name), "MAX_TOKENS", MAX_TOKENS) for name in task)
    if group < 2:
        raise InputError("a group of one answer has nothing to compare: ask for --group 2 or more")
    objective = Objective(
        method=method, loss=loss, normalise=normalise, kl=kl, mask_overlong=mask_overlong, off_policy=off_policy
    )  # fmt: skip
    rewards = Rewards(format=format_reward, language=language_reward, length=length_penalty)
    config = convert.load_config(source)
    if lora is None:
        sizes = count_parameters(config)
        lora = RANK if sizes["total"] - sizes["table"] >= ADAPTERS_FROM else 0
    learning_rate = learning_rate or (LORA_LEARNING_RATE if lora else LEARNING_RATE[method])
    options = {
        "model": str(model), "task": [str(name) for name in task], "level": level and list(level),
        "language": language and list(language), "minutes": minutes, "steps": steps, "seed": seed, "prompts": prompts,
        "group": group, "max_tokens": max_tokens, "temperature": temperature, "learning_rate": learning_rate,
        "lora": lora, "memory": memory, "curriculum": curriculum, "problems": problems, "updates": updates,
        "method": method, "mask_overlong": mask_overlong, "loss": loss, "normalise": normalise, "kl": kl,
        "off_policy": off_policy, "format_reward": format_reward, "language_reward": language_reward,
        "length_penalty": length_penalty,
        "device": device,
    }  # fmt: skip
    options |= judge.options if judge else {}

    def prepare(folder: Path, plan: Plan | None) -> Prepared:
        target = pick_device(device)
        if not lora:
            convert.require_floats(source)
        words = convert.load_tokenizer(source)
        if plan is not None:
            tasks.require_unchanged(plan.options.get("task_sha256", {}))
        else:
            files = tasks.fingerprints(map(str, task))
            asked = options | ({"task_sha256": files} if files else {})
            plan = Plan(
                stage="rl", options=asked, config=config.to_dict(), data={}, batch_size=prompts * group,
                micro_batch_size=prompts * group, context=config.max_position_embeddings, learning_rate=learning_rate,
                seed=seed, threads=torch.get_num_threads(), precision="float32", muon=False, weight_decay=0.0, warmup=5,
            )  # fmt: skip

        def make_trainer() -> Reinforcement:
            network, reference = _load(source, lora, target, seed), None
            if kl and not lora:
                reference = _load(source, 0, target, seed).requires_grad_(False)
            kind = partial(Judged, judge=judge) if judge else Reinforcement
            return kind(network, words, plan, folder, cells, objective, rewards, reference)

        return Prepared(plan, make_trainer, words, lambda figures: _about(plan, figures, cells), chats=True)

    return run("rl", out, options, prepare, minutes, steps, started, quiet)


def cells_of(
    task: Sequence[str], level: Sequence[int] | None, language: Sequence[str] | None,
    splits: Sequence[str] = ("train", "test"),
) -> list[Cell]:  # fmt: skip
    """Every task with every level and language, of those asked for or else of the task's own; each is tried.

    splits: what they are needed for; a file that is for one of them only needs another for the other. InputError for
    what a task does not have.
    """
    cells = [
        Cell(str(name), each, code)
        for name in task
        for each in level or getattr(tasks.get(name), "LEVELS", (1,))
        for code in language or getattr(tasks.get(name), "LANGUAGES", tasks.LANGUAGES)
    ]
    for name in task:
        tasks.check(name)
    _require_apart(task)
    for split in splits:
        if not serving(split, cells):
            names = ", ".join(dict.fromkeys(cell.task for cell in cells))
            raise InputError(f"{names}: nothing here is for {split}; name a task for it, too, like FILE.jsonl#{split}")
    for cell in cells:
        for split in [split for split in splits if serving(split, [cell])] or splits:
            if next(tasks.problems(cell.task, split, 0, [cell.level], [cell.language]), None) is None:
                raise InputError(
                    f"{cell.task} has no problems for {split}, level {cell.level}, {cell.language}: of few rows all "
                    "may fall to one side (one in ten is for measuring); give it more, or another level or language"
                )
    return cells


def _require_apart(task: Sequence[str]) -> None:
    """InputError for one file under FILE#train and FILE#test, which would measure on what was trained on."""
    parts = {split: [name for name in task if name.endswith(f"#{split}")] for split in ("train", "test")}
    digests = {tasks.fingerprints([name]).get(name): name for name in parts["train"]}
    for name in parts["test"]:
        if (digest := tasks.fingerprints([name]).get(name)) in digests:
            raise InputError(
                f"{digests[digest]} and {name} hold the same problems: name the file without # and one row in ten is "
                "held out, or give another file for testing"
            )


def trained_on(cells: Sequence[Cell]) -> list[str]:
    """A line for each of their tasks, but for those that only measure."""
    return [f"problems of the task `{name}`" for name in dict.fromkeys(cell.task for cell in serving("train", cells))]


def _load(source: Path, rank: int, device: torch.device, seed: int) -> Transformer:
    """The model to train; with adapters, the frozen weights stay as they are stored."""
    model, _ = convert.load(source, device=device, dtype=torch.float32, packed=bool(rank))
    return attach(model, rank, seed=seed) if rank else model


def _about(plan: Plan, figures: dict[str, Any], cells: Sequence[Cell]) -> dict[str, Any]:
    o = plan.options
    how = {"grpo": "reinforcement learning (GRPO)", "rejection": "SFT on its own right answers"}[o["method"]]
    adapters = f", through adapters of rank {o['lora']}" if o["lora"] else ""
    return {
        "made": f"Made from `{o['model']}` by {how} on checkable tasks{adapters}.",
        "parents": [o["model"]],
        "data": trained_on(cells),
        "languages": {cell.language for cell in cells},
        "measured": {
            "held-out problems right before": f"{figures['accuracy_before']:.1%}",
            "after": f"{figures['accuracy_after']:.1%} ± {figures['standard_error']:.1%} (one standard error)",
            "a step": f"{o['prompts']} problems x {o['group']} answers",
            "tokens sampled": figures["tokens"],
            "most memory": f"{figures['peak_memory'] / 2**30:.2f} GiB",
        },
        "limits": "It was rewarded for nothing but these tasks, and may have become worse at others.",
    }
