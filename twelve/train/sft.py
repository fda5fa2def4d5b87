"""Supervised fine-tuning: model folder and conversations in, model folder out; loss on the assistant's words only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from twelve import convert
from twelve.data.corpus import tokenize
from twelve.data.shards import PackedData
from twelve.data.tokenizer import Tokenizer
from twelve.errors import InputError
from twelve.lora import attach
from twelve.train.loop import Supervised
from twelve.train.plan import Plan, describe, holds_data
from twelve.train.precision import pick_device, pick_precision
from twelve.train.run import Prepared, run, spoken

# of 4e-4, 1e-3, 3e-3 and 6e-3 the second was best for adapters, and 3e-3 worse than no adapters at 3e-4, on SmolLM2
LEARNING_RATE, LORA_LEARNING_RATE = 3e-4, 1e-3


class Lesson(Protocol):
    """Another loss on the same rows, as distillation has it."""

    options: dict[str, Any]  # what decides it, for the plan

    def prepare(self, tokenizer: Tokenizer, data: PackedData, plan: Plan, folder: Path) -> Callable[..., Supervised]:
        """Once a run or a resume, before the model is loaded: what makes the trainer, as Supervised's arguments."""
        ...


def sft(
    model: str | Path, paths: list[str], out: str | Path, *, minutes: float | None = None, steps: int | None = None,
    seed: int = 0, context: int = 512, batch: int = 8, learning_rate: float | None = None,
    lora: int | None = None, muon: bool = False, compile: bool = False, device: str | None = None,
    started: float | None = None, quiet: bool = False, lesson: Lesson | None = None, epochs: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Fine-tune the model (a folder, a .gguf file, a package's name) on `messages`; the same call again resumes.

    Length, errors and result are as for `pretrain`; without `minutes` and `steps`, three passes over the conversations.
    AdamW by default: Muon took most of a step on a model of 135M parameters, and is of little use on weights that AdamW
    made (arXiv 2502.16982).

    With `lora`, a rank, only adapters of that rank are trained (`twelve.lora`), in a fraction of the memory, and merged
    at the end; the model may then be a packed one, and stays packed until then. A `lesson` puts another loss in the
    place of the cross entropy. `epochs` are the most passes, whatever else sets the length.
    """
    learning_rate = learning_rate or (LORA_LEARNING_RATE if lora else LEARNING_RATE)
    if lora and (muon or compile):
        raise InputError("lora goes with neither muon nor compile: leave them out")
    options = {
        "model": str(model), "paths": [str(path) for path in paths], "minutes": minutes, "steps": steps, "seed": seed,
        "context": context, "batch": batch, "learning_rate": learning_rate, "lora": lora, "muon": muon,
        "compile": compile, "device": device,
    }  # fmt: skip
    options |= (lesson.options if lesson else {}) | ({"epochs": epochs} if epochs else {})
    source = convert.resolve(model)
    if source.resolve() == Path(out).resolve():
        raise InputError(f"{out} is the model to start from: name another folder with --out")

    def prepare(folder: Path, plan: Plan | None) -> Prepared:
        target = pick_device(device)
        config = convert.load_config(source)
        if not lora:
            convert.require_floats(source)
        words = convert.load_tokenizer(source)
        shards = folder / "training" / "data"
        if plan is None or not holds_data(plan, shards):
            tokenize(paths, shards, words, progress=not quiet)
        data = PackedData(shards)
        if not data.conversations:
            named = ", ".join(map(str, paths))
            raise InputError(f"{named}: no conversations, only text, which `twelve pretrain` reads")
        row = min(context, config.max_position_embeddings)
        if not any((data.batch(number, 1, row, seed).targets >= 0).any() for number in range(data.windows(row))):
            raise InputError(f"no word of an assistant lies within the first {row} tokens: ask for a larger --context")
        epoch_steps = data.windows(row) / batch
        longer, silent = data.cut(row)
        cut = f"{longer:,} of {data.conversations:,} conversations are cut after {row:,} tokens" if longer else ""
        cut += f", {silent:,} of them with nothing left that an assistant says" if silent else ""
        if cut and not quiet:
            hint = ": --context N takes more" if row < config.max_position_embeddings else ""
            print(f"cut       {cut}{hint}", flush=True)
        if plan is None:
            plan = Plan(
                stage="sft", options=options, config=config.to_dict(), data=describe(data), context=row,
                batch_size=batch, micro_batch_size=batch, learning_rate=learning_rate, seed=seed,
                threads=torch.get_num_threads(), precision=pick_precision(target), muon=muon, adamw_lr_scale=1.0,
                compile=compile, most_steps=max(1, round(epochs * epoch_steps)) if epochs else None,
            )  # fmt: skip
        plan.check_data(data, folder)
        trainer = lesson.prepare(words, data, plan, folder) if lesson else Supervised

        def batches(step: int):
            return data.batch(step, plan.batch_size, plan.context, plan.seed)

        def about(figures: dict[str, Any]) -> dict[str, Any]:
            return _about(plan, figures, cut) | {"languages": spoken(batches, words)}

        def make_trainer() -> Supervised:
            model, _ = convert.load(source, device=target, dtype=torch.float32, packed=bool(lora))
            if lora:
                attach(model, lora, seed=seed, merged=False)
            return trainer(model, batches, plan, folder)

        return Prepared(plan, make_trainer, words, about, True, epoch_steps)

    return run("sft", out, options, prepare, minutes, steps, started, quiet)


def _about(plan: Plan, figures: dict[str, Any], cut: str) -> dict[str, Any]:
    source, teacher, rank = (plan.options.get(name) for name in ("model", "teacher", "lora"))
    how = f" with the probabilities of `{teacher}`" if teacher else ""
    how += f", through adapters of rank {rank}" if rank else ""
    return {
        "made": f"Fine-tuned from `{source}` on conversations{how}; the loss is on the assistant's words only.",
        "parents": [source],
        "measured": {
            "tokens seen": f"{figures['tokens']:,} of {plan.data['tokens']:,} in the data, with padding",
            "training loss": f"{figures['loss']} nats a token of the assistant",
            **({"of the data": cut} if cut else {}),
        },
    }
