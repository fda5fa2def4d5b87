"""Recipes: R1-Zero and R1 (arXiv 2501.12948) as stages, each a model folder, for small models and one machine.

r1-zero is RL on the model as it is. r1 is a cold start of worked solutions, RL on reasoning, fine-tuning of the
*starting* model on what the result solves, and RL on everything. docs/recipes.md compares the numbers with R1's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from twelve import convert, report, tasks
from twelve.data.reader import read_documents
from twelve.errors import InputError
from twelve.evaluate.accuracy import asked
from twelve.files import FolderLock, read_json, write_json
from twelve.model import count_parameters
from twelve.posttrain.curriculum import Cell
from twelve.posttrain.grpo import Objective
from twelve.posttrain.judge import Judge, open_judge
from twelve.posttrain.recipe_report import card, figures, measure, publish, write_report
from twelve.posttrain.rl import ADAPTERS_FROM, MAX_TOKENS, MINUTES, RANK, cells_of, rl
from twelve.posttrain.stages import Progress, require_no_foreign_files
from twelve.posttrain.teacher import open_teacher
from twelve.posttrain.traces import NothingPassed, collect, problem_stream, read_traces, select, write_traces
from twelve.train.plan import Plan
from twelve.train.sft import sft

WORKED = 5000  # solutions of a cold start that is not given
EPOCHS = 3  # at most, of what is fine-tuned on (R1: 2 to 3)
SAMPLING = 0.5  # of the minutes of the rejection stage, for its answers
LEAST = 10  # steps of its fine-tuning, even where sampling took all of the time
SAMPLES = 4  # answers to a problem there


@dataclass(frozen=True)
class Stage:
    """A part of a recipe."""

    name: str  # of its folder
    share: float  # of the time or the steps, relative to the others'
    rewards: dict[str, Any] = field(default_factory=dict)  # options of its RL; empty: fine-tuning


# Rewards that are no mere right or wrong are compared as they are ("mean"): divided by the standard deviation of a
# group of right answers, the smallest difference in length or language would weigh as much as being right.
ALL = {"format_reward": 1.0, "language_reward": 1.0, "length_penalty": 0.1, "normalise": "mean", "temperature": 0.8}
COLD_START, REJECTION = Stage("1-cold-start", 0.2), Stage("3-rejection", 0.2)
RECIPES = {
    "r1-zero": (Stage("1-reasoning", 1.0, {"format_reward": 1.0}),),
    "r1": (
        COLD_START,
        Stage("2-reasoning", 0.35, {"format_reward": 1.0, "language_reward": 1.0, "normalise": "mean"}),
        REJECTION,
        Stage("4-all", 0.25, ALL),
    ),
}
JUDGED = Stage("5-judge", 0.08, ALL)  # beside 4-all, as the last 400 of R1's 1,700 steps


def follow(
    model: str | Path, out: str | Path, task: Sequence[str], recipe: str = "r1", *, cold_start: str | None = None,
    mix: Sequence[str] = (), judge: str | None = None, judge_model: str | None = None, judge_prompts: str | None = None,
    traces: int = 1000, restart: bool = True, level: Sequence[int] | None = None, language: Sequence[str] | None = None,
    minutes: float | None = None, steps: int | None = None, seed: int = 0, max_tokens: int | None = None,
    problems: int = 200, lora: int | None = None, device: str | None = None, started: float | None = None,
    quiet: bool = False, **reinforcement: Any,
) -> dict[str, Any]:  # fmt: skip
    """Follow a recipe from a model; the same call again goes on where it was stopped.

    Each stage is a model folder in `out`, and `out` itself is the last one's model. minutes, or steps: of all stages
    together, divided by their shares; time that a stage leaves goes to those after it, and a resume may ask for more
    minutes. cold_start, mix: conversations (.jsonl) in place of worked solutions, and beside the selected `traces` of
    the rejection stage. That stage fine-tunes the starting model again, as R1 did; without `restart` the model that
    found the traces. judge: the address of an endpoint that scores the answers to `judge_prompts`, in a last stage of
    its own. problems: held-out ones, by which every stage is measured. reinforcement: options of `rl` for its stages.

    Returns the figures of the run. InputError for whatever of this cannot be, Interrupted on Ctrl-C.
    """
    began = time.monotonic() if started is None else started
    if minutes is None and steps is None:
        minutes = MINUTES
    options = {
        "recipe": recipe, "model": str(model), "task": [str(name) for name in task], "level": level and list(level),
        "language": language and list(language), "cold_start": cold_start and str(cold_start),
        "mix": [str(path) for path in mix], "judge": judge, "judge_model": judge_model,
        "judge_prompts": judge_prompts and str(judge_prompts), "traces": traces, "restart": restart,
        "minutes": minutes, "steps": steps, "seed": seed, "max_tokens": max_tokens, "problems": problems, "lora": lora,
        "device": device, **reinforcement,
    }  # fmt: skip
    if files := tasks.fingerprints(options["task"]):
        options["task_sha256"] = files
    if reinforcement.get("group", 2) < 2:
        raise InputError("a group of one answer has nothing to compare: ask for --group 2 or more")
    Objective(**{name: value for name, value in reinforcement.items() if name in Objective.__dataclass_fields__})
    stages = _stages(options)
    cells = cells_of(task, level, language)
    source, folder = convert.resolve(model), Path(out)
    if folder.exists() and (not folder.is_dir() or folder.resolve() == source.resolve()):
        what = "the model to start from" if folder.is_dir() else "a file"
        raise InputError(f"{folder} is {what}: name another folder with --out")
    tokenizer = convert.load_tokenizer(source)
    if recipe == "r1" and tokenizer.chat_template is None:
        raise InputError(f"{model} has no chat template, so conversations cannot teach it: use --recipe r1-zero")
    for path in [*([cold_start] if cold_start else []), *mix]:
        _check_conversations(path)
    with FolderLock(folder):
        if Plan.load(folder) is not None:
            raise InputError(f"{folder} holds a run without a recipe: name another folder with --out")
        begun = (folder / "recipe.json").exists()
        progress = Progress(folder / "recipe.json", options, free=("minutes",))
        if (folder / "config.json").exists():
            known = f"is complete: `twelve chat {folder}`, or" if progress.stages else "holds a model already:"
            raise InputError(f"{folder} {known} name another folder with --out")
        if not begun:
            require_no_foreign_files(folder)
        max_tokens = max_tokens or max(getattr(tasks.get(name), "MAX_TOKENS", None) or MAX_TOKENS for name in task)
        config = convert.load_config(source)
        opened = None
        if judge:
            room = config.max_position_embeddings - max_tokens
            opened = open_judge(judge, judge_model, judge_prompts, tokenizer, room)
        if lora is None:
            sizes = count_parameters(config)
            lora = RANK if sizes["total"] - sizes["table"] >= ADAPTERS_FROM else 0
        resolved = options | {"max_tokens": max_tokens, "lora": lora, "quiet": quiet}
        chain = _Chain(folder, stages, cells, resolved, reinforcement, progress, opened, began)
        chain.run()
    return figures(folder, progress)


def _stages(options: dict[str, Any]) -> tuple[Stage, ...]:
    """The recipe's stages. InputError for options that it has no use for."""
    recipe = options["recipe"]
    if recipe not in RECIPES:
        raise InputError(f"unknown recipe {recipe!r}; there are: {', '.join(RECIPES)}")
    if recipe == "r1-zero":
        for name, use in (("cold_start", "has no cold start"), ("mix", "fine-tunes on nothing"),
                          ("judge", "asks no judge"), ("judge_prompts", "asks no judge")):  # fmt: skip
            if options[name]:
                raise InputError(f"--recipe r1-zero {use}: leave out --{name.replace('_', '-')}, or use --recipe r1")
    if bool(options["judge"]) != bool(options["judge_prompts"]):
        raise InputError("a judge needs both an address, --judge URL, and general prompts, --judge-prompts FILE")
    stages = RECIPES[recipe] + ((JUDGED,) if options["judge"] else ())
    if options["steps"] is not None and options["steps"] < len(stages):
        raise InputError(f"--steps {options['steps']}: --recipe {recipe} has {len(stages)} stages of a step or more")
    return stages


def _check_conversations(path: str | Path) -> None:
    for number, document in enumerate(read_documents([path]), start=1):
        if document.messages is None or all(message["role"] != "assistant" for message in document.messages):
            raise InputError(f"{path}: row {number} has no 'messages' in which an assistant answers")


class _Chain:
    """The stages of one recipe in one folder."""

    def __init__(
        self, folder: Path, stages: Sequence[Stage], cells: Sequence[Cell], options: dict[str, Any],
        reinforcement: dict[str, Any], progress: Progress, judge: Judge | None, began: float,
    ) -> None:  # fmt: skip
        self.folder, self.stages, self.cells, self.options = folder, stages, cells, options
        self.reinforcement, self.progress, self.judge, self.began = reinforcement, progress, judge, began

    def run(self) -> None:
        """Do what is not done yet."""
        self._measured("0-start", self.options["model"])
        for index, stage in enumerate(self.stages):
            begun = self.progress.stage(stage.name)
            if begun is None:
                begun = {"name": stage.name, "seconds": 0.0}
                self.progress.stages.append(begun)
            if "measured" in begun:
                continue
            folder = self.folder / stage.name
            plan = Plan.load(folder)
            if plan is None or (stage.rewards and not plan.complete):  # fine-tuning that has begun keeps its length
                begun |= self._allot(index)
                self.progress.save()
                if plan is not None:
                    plan.options["minutes"] = begun.get("minutes")
                    plan.save(folder)
            if not self.options["quiet"]:
                print(f"\nstage {index + 1} of {len(self.stages)}: {folder}", flush=True)
            if plan is None or not plan.complete:  # else killed before it was measured
                begun |= self._train(index, begun)
            begun |= _record(folder)
            self._measured(stage.name, folder)
        write_report(self.folder, self.progress, self.options["quiet"])
        publish(self.folder / self.stages[-1].name, self.folder, card(self.folder, self.progress, self.cells))

    def _measured(self, name: str, model: str | Path) -> None:
        """Put the measure of a stage's model, and the time since the last one, into the record."""
        row = self.progress.stage(name)
        if row is None:
            self.progress.stages.append(row := {"name": name, "seconds": 0.0})
        if "measured" not in row:
            row["measured"] = measure(
                model, self.cells, self.options["problems"], self.options["max_tokens"], self.options["device"]
            )
            tasks.require_unchanged(self.options.get("task_sha256", {}))
            row["seconds"] = round(max(row["seconds"], time.monotonic() - self.began), 1)
            self.progress.save()
        self.began = time.monotonic()

    def _allot(self, index: int) -> dict[str, Any]:
        """The stage's part of the minutes that are left, or of the steps. A resume finds the same, unless it asks for
        other minutes."""
        shares = [stage.share for stage in self.stages]
        if self.options["minutes"] is None:
            spare = self.options["steps"] - len(shares)  # a step for each is sure
            ends = [round(spare * sum(shares[:count]) / sum(shares)) for count in (index, index + 1)]
            return {"steps": 1 + ends[1] - ends[0]}
        rows = self.progress.stages
        left = 60 * self.options["minutes"] - sum(row["seconds"] for row in rows)
        left -= (len(shares) - index) * rows[0]["measured"]["seconds"]  # each stage to come is measured, too
        return {"minutes": round(max(0.0, left) / 60 * shares[index] / sum(shares[index:]), 3)}

    # --- training -----------------------------------------------------------------------------------------------------

    def _train(self, index: int, begun: dict[str, Any]) -> dict[str, Any]:
        """Run or resume a stage; what only the run itself tells of it."""
        stage, options = self.stages[index], self.options
        out = self.folder / stage.name
        training = {
            "minutes": begun.get("minutes"), "steps": begun.get("steps"), "seed": options["seed"],
            "lora": options["lora"], "device": options["device"], "started": self.began, "quiet": options["quiet"],
        }  # fmt: skip
        before = self.folder / self.stages[index - 1].name if index else options["model"]
        if stage.rewards:
            cells = {name: options[name] for name in ("level", "language", "max_tokens")}
            judge = {"judge": self.judge} if stage is JUDGED else {}
            # every stage is measured here, on all of the problems: one of each kind is enough for its own report
            found = rl(
                before, out, options["task"], problems=len(self.cells), **cells, **training, **judge,
                **(stage.rewards | self.reinforcement),
            )  # fmt: skip
            return {"ended": found["ended"]} if "ended" in found else {}
        if stage is COLD_START:
            source, paths = options["model"], [options["cold_start"] or self._worked(out)]
        else:
            source = options["model"] if options["restart"] else before
            paths = [self._rejected(before, out, begun), *options["mix"]]
            if "minutes" in begun:
                training |= {"minutes": None, "steps": self._steps_left(begun)}
        training |= {"lora": options["lora"] or None, "epochs": EPOCHS if "minutes" in begun else None}
        sft(source, [str(path) for path in paths], out, **training)
        return {}

    def _steps_left(self, begun: dict[str, Any]) -> int:
        """What the rest of the rejection stage's minutes holds at the speed of the cold start, and LEAST at least."""
        if "fine_tuning_steps" not in begun:
            cold = _record(self.folder / COLD_START.name)
            left = 60 * begun["minutes"] - (time.monotonic() - self.began)
            begun["fine_tuning_steps"] = max(LEAST, int(left * cold["steps"] / max(cold["seconds"], 1e-9)))
            self.progress.save()
        return begun["fine_tuning_steps"]

    def _worked(self, out: Path) -> Path:
        """A file of worked solutions to problems of the easier half of every task's levels."""
        path = out / "training" / "traces.jsonl"
        if path.exists():
            return path
        stream = problem_stream(_easier(self.cells), self.options["seed"])
        found = {problem.question: problem for problem in islice(stream, WORKED)}
        bare = next((problem.task for problem in found.values() if not problem.steps), None)
        if bare:
            raise InputError(f"{bare} has no worked solutions to begin with: give some with --cold-start FILE.jsonl")
        solved = [{"messages": [*asked(problem), problem.messages()[-1]]} for problem in found.values()]
        write_traces(path, solved)
        return path

    def _rejected(self, teacher: Path, out: Path, begun: dict[str, Any]) -> Path:
        """A file of selected right answers of the model so far."""
        training, options = out / "training", self.options
        path, sampled = training / "traces.jsonl", training / "sampled.jsonl"
        if not path.exists():
            seconds = 60 * begun["minutes"] * SAMPLING if "minutes" in begun else None
            try:
                counts = collect(
                    sampled, {None: [open_teacher(str(teacher), device=options["device"])]}, self.cells,
                    problems=2 * options["traces"], samples=SAMPLES, max_tokens=options["max_tokens"],
                    seed=options["seed"], seconds=seconds, quiet=options["quiet"],
                )  # fmt: skip
            except NothingPassed as error:
                raise InputError(
                    f"no answer of {teacher} passed the checker, a pass rate of 0%, so there is nothing to learn from: "
                    "choose easier levels, allow more --max-tokens, or give a --cold-start; what was trained is kept"
                ) from error
            chosen = select(read_traces(sampled), options["traces"], options["seed"])
            write_json(training / "traces.json", {"traces": len(chosen), "pass_rate": counts["pass_rate"]})
            write_traces(path, chosen)
        return path


def _easier(cells: Sequence[Cell]) -> list[Cell]:
    """The cells of the easier half of every task's levels."""
    levels = {task: sorted({cell.level for cell in cells if cell.task == task}) for task in {c.task for c in cells}}
    return [cell for cell in cells if cell.level <= levels[cell.task][(len(levels[cell.task]) - 1) // 2]]


def _record(folder: Path) -> dict[str, Any]:
    """What a stage's folder says of its training."""
    traces = folder / "training" / "traces.json"
    last = (report.read_metrics(folder / "training" / "metrics.jsonl") or [{"step": 0, "seconds": 0.0}])[-1]
    return {"steps": last["step"], "seconds": last["seconds"]} | (read_json(traces) if traces.exists() else {})
