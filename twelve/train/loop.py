"""The one training loop: a step, a log line, a checkpoint. Every stage brings its model, its plan and its step."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from tqdm import tqdm

from twelve import report
from twelve.errors import InputError
from twelve.files import atomic_write
from twelve.lora import refresh
from twelve.model import Transformer
from twelve.model.hyper_connections import sampled_gain
from twelve.model.layers import linear_cross_entropy, sampled_cross_entropy
from twelve.model.transformer import MainLoss
from twelve.train.checkpoint import load_checkpoint, save_checkpoint
from twelve.train.memory import JOURNAL, describe_table, own_table
from twelve.train.optimizer import MuonAdamW
from twelve.train.plan import Plan
from twelve.train.precision import autocast
from twelve.train.schedule import learning_rate

REVISE_AT = (0.1, 0.3, 0.5, 0.7, 0.82, 0.9, 0.95, 0.98)  # shares of a timed run where its length is corrected
SAVE_EVERY = 15.0  # seconds between checkpoints, or more where they would take over SAVE_SHARE of the time
SAVE_SHARE = 0.02
NO_END = 10**9  # steps of a run that time ends


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the work was saved; the message says how to go on."""


class Trainer:
    """A model with its optimiser and its plan; `run` trains from wherever the folder's checkpoint stands.

    A stage brings `train_step`, which does one optimiser step through `update` and returns its figures. What else it
    must remember over an interruption stands in `memory` (JSON).
    """

    timed = False  # with a time to keep: go on until it is over, rather than for a planned number of steps
    trains_table = True  # where all parameters are trained, so is the memory's table
    closing = 0.0  # seconds that `outcome` is thought to take
    stopped = False  # a step may set it, and is then the last
    earlier = 0.0  # seconds before it was resumed: a resume has the rest of the minutes

    def __init__(self, model: Transformer, plan: Plan, folder: Path) -> None:
        self.model, self.plan, self.folder = model.train(), plan, folder
        if self.trains_table:
            own_table(model, folder)
        self.optimizer = MuonAdamW(
            model, betas=plan.betas, weight_decay=plan.weight_decay, muon=plan.muon,
            adamw_lr_scale=plan.adamw_lr_scale if plan.muon else 1.0,
        )  # fmt: skip
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.step, self.seconds, self.tokens = 0, 0.0, 0
        self.memory: dict[str, Any] = {}
        self.checkpoint = folder / "training" / "checkpoint.safetensors"
        self.metrics = folder / "training" / "metrics.jsonl"
        if self.optimizer.table is not None:
            self.optimizer.table.begin(folder / JOURNAL)
        if plan.compile:
            model.compile_layers()

    def train_step(self) -> dict[str, float]:
        """One optimiser step; the figures of it, for the log."""
        raise NotImplementedError

    def begin(self) -> None:
        """Before the first step of a run or of its resume, once the checkpoint is read."""

    def outcome(self) -> dict[str, Any]:
        """After the last step: more figures of the run."""
        return {}

    def announce(self) -> dict[str, str]:
        """More lines of the plan that is printed."""
        return {}

    def sections(self, rows: list[dict[str, float]]) -> list[tuple[str, list[str]]]:
        """What the report shows of the run, from the lines of its log."""
        return [("Training", report.training_curves(rows))]

    def update(self, rate: float, loss: float, table_rate: float | None = None) -> float:
        """Clip the gradients, step, and clear them; the gradients' norm before that. A table's rows step at
        `table_rate`, or else at `rate`, too.

        InputError, weights untouched, when it or the `loss` it came from is not finite.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.plan.clip).item()
        if not math.isfinite(loss + norm):  # before it reaches weights and checkpoint
            raise InputError(
                f"training diverged: the loss is {loss:.3g}, its gradient {norm:.3g} "
                f"at step {self.step + 1}; start again in another folder with a lower --learning-rate"
            )
        self.optimizer.step(rate, table_lr=table_rate)
        self.optimizer.zero_grad()
        self.changed()
        return norm

    def changed(self) -> None:
        """The parameters are new ones: after a step, and once the checkpoint is read."""
        refresh(self.model)

    def run(self, seconds_left: Callable[[], float] | None = None, quiet: bool = False) -> None:
        """Train to the planned end. With `seconds_left` the plan's length is corrected so that it ends on time, or, for
        a `timed` trainer, steps are made until the time is over.

        Raises Interrupted on Ctrl-C, once a checkpoint is written.
        """
        self.restore()
        self.begin()
        stop = _InterruptFlag()
        began, before, first = time.monotonic(), self.seconds, self.step
        saved, save_cost = began, 0.0
        ahead = [share for share in REVISE_AT if share * self.plan.steps(self.step) > self.step]
        marks = ahead if seconds_left and not self.timed else []
        total = self.plan.steps(self.step)
        longest = 0.0  # seconds of a step
        bar = tqdm(
            total=total if total < NO_END else None, initial=self.step, unit="step", disable=quiet, file=sys.stderr,
            mininterval=0.5, smoothing=0.05, dynamic_ncols=True,
        )  # fmt: skip
        with stop, open(self.metrics, "a", encoding="utf-8") as log, bar:
            while self.step < self.plan.steps(self.step):
                if self.timed and seconds_left and seconds_left() < longest:
                    break
                started, tokens = time.monotonic(), self.tokens
                figures = self.train_step()
                now = time.monotonic()
                self.seconds, longest = before + now - began, max(longest, now - started)
                figures |= {"seconds": self.seconds, "tokens_per_second": (self.tokens - tokens) / (now - started)}
                gain = sampled_gain(self.model.layers)
                if gain is not None:
                    figures["hc_gain"] = gain
                log.write(json.dumps({key: _short(value) for key, value in figures.items()}) + "\n")
                bar.update()
                bar.set_postfix_str(self.describe(figures, seconds_left))
                if marks and self.step >= marks[0] * self.plan.steps(self.step):
                    while marks and self.step >= marks[0] * self.plan.steps(self.step):
                        marks.pop(0)
                    self._revise(seconds_left(), (now - began) / (self.step - first))
                    bar.total = self.plan.steps(self.step)
                if self.stopped or stop.asked or now - saved > max(SAVE_EVERY, save_cost / SAVE_SHARE):
                    self.save(log)
                    saved = time.monotonic()
                    save_cost = saved - now
                if self.stopped:
                    break
                if stop.asked:
                    raise Interrupted(f"saved at step {self.step}; run the same command again to go on")
            self.save(log)

    def describe(self, figures: dict[str, float], seconds_left: Callable[[], float] | None) -> str:
        """What the progress bar says of a step."""
        return f"loss {figures['loss']:.3f}, {figures['tokens_per_second']:,.0f} tokens/s"

    def _revise(self, seconds_left: float, seconds_per_step: float) -> None:
        steps = self.step + max(1, round(seconds_left / seconds_per_step))
        steps = min(steps, self.plan.most_steps or NO_END)
        self.plan.revisions.append((self.step, steps))
        self.plan.save(self.folder)  # before the next step, which already follows it

    def save(self, log) -> None:
        log.flush()
        state = {"step": self.step, "seconds": self.seconds, "tokens": self.tokens, "memory": self.memory}
        save_checkpoint(self.checkpoint, self.model, self.optimizer, state)

    def restore(self) -> None:
        """Go back to the folder's checkpoint, if there is one, and drop log lines of steps after it."""
        if self.checkpoint.exists():
            state = load_checkpoint(self.checkpoint, self.model, self.optimizer)
            self.changed()
            self.step, self.seconds, self.tokens = state["step"], state["seconds"], state["tokens"]
            self.memory = state["memory"]
            self.earlier = self.seconds
        elif self.optimizer.table is not None:
            self.optimizer.table.rollback(0)
        if self.metrics.exists():
            lines = self.metrics.read_text(encoding="utf-8").splitlines()[: self.step]
            with atomic_write(self.metrics) as temporary:
                temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


class Supervised(Trainer):
    """Next tokens of rows that are given: pretraining and fine-tuning.

    `batches(step)` must be a pure function that gives the step's rows: ids, targets, positions, documents [B, T].
    """

    def __init__(self, model: Transformer, batches: Callable[[int], Any], plan: Plan, folder: Path) -> None:
        super().__init__(model, plan, folder)
        self.batches = batches
        self.routers = [layer.gate for layer in model.moe_layers()]
        self.following: tuple[int, Any] = (-1, None)  # step, batch: read ahead

    def announce(self) -> dict[str, str]:
        return describe_table(self.model, self.batches) if self.model.memory is not None else {}

    def main_loss(self, batch: Any, rows: slice) -> MainLoss:
        """What these rows of the batch are judged by."""
        return self.token_loss(rows)

    def token_loss(self, rows: slice) -> MainLoss:
        """Cross entropy, on which MTP's predictions are judged, too: over what the plan draws of the vocabulary."""
        if not self.plan.drawn:
            return linear_cross_entropy
        seed = crc32(f"{self.plan.seed} {self.step} {rows.start}".encode())  # torch takes 32 bits
        return partial(sampled_cross_entropy, drawn=self.plan.drawn, draw=torch.Generator().manual_seed(seed))

    def train_step(self) -> dict[str, float]:
        """As Trainer's. InputError, weights untouched, when the loss is not finite."""
        plan, step = self.plan, self.step
        rate = learning_rate(step, plan.steps(step), plan.learning_rate, plan.warmup, plan.decay_share)
        decaying = plan.in_decay(step)
        batch = self._batch(step)
        counted = max(1, int((batch.targets >= 0).sum()))
        figures = {"loss": 0.0, "mtp_loss": 0.0, "balance": 0.0}
        loads = None
        parts = -(-plan.batch_size // plan.micro_batch_size)
        for part in range(parts):
            rows = slice(part * plan.micro_batch_size, (part + 1) * plan.micro_batch_size)
            ids, targets, positions, documents = (
                tensor[rows].to(self.model.device, non_blocking=True)
                for tensor in (batch.ids, batch.targets, batch.positions, batch.documents)
            )
            several = bool((documents != documents[:, :1]).any())
            with autocast(ids.device, plan.precision):
                losses = self.model.losses(
                    ids, targets, documents if several else None, positions if several else None,
                    mtp_weight=plan.mtp_weight[decaying], balance_weight=plan.balance_weight,
                    main_loss=self.main_loss(batch, rows), mtp_loss=self.token_loss(rows),
                )  # fmt: skip
            share = int((targets >= 0).sum()) / counted if parts > 1 else 1.0
            (losses.total * share).backward()
            figures["loss"] += losses.main.item() * share
            figures["mtp_loss"] += sum(loss.item() for loss in losses.mtp) / max(1, len(losses.mtp)) * share
            figures["balance"] += losses.balance.item() / parts if losses.balance is not None else 0.0
            loads = [a + b for a, b in zip(loads, losses.loads, strict=True)] if loads else losses.loads
        # what a row moves by falls with every look at it (Adagrad): a table needs no decay besides
        figures["grad_norm"] = self.update(rate, figures["loss"], table_rate=plan.learning_rate)
        if loads:
            still = decaying or plan.options.get("lora")  # then only adapters are trained
            for router, load in zip(self.routers, loads, strict=True):
                router.update_bias(load, 0.0 if still else plan.bias_update_speed)
            figures["max_violation"] = max((load.max() / load.float().mean() - 1).item() for load in loads)
        self.step += 1
        self.tokens += batch.ids.numel()
        return {"step": self.step, "tokens": self.tokens, "learning_rate": rate, **figures}

    def _batch(self, step: int) -> Any:
        """The step's batch. What the memory's table holds for the next one is fetched from the disk meanwhile."""
        if self.model.memory is None or not self.model.memory.table.is_far:
            return self.batches(step)
        at, batch = self.following
        if at != step:
            batch = self.batches(step)
        self.following = step + 1, self.batches(step + 1)
        self.model.memory.prefetch(self.following[1].ids)
        return batch


class _InterruptFlag:
    """While active, the first Ctrl-C only sets `asked`, so that a step ends and is saved; the second one interrupts."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> _InterruptFlag:
        try:
            self.previous = signal.signal(signal.SIGINT, self._ask)
        except ValueError:  # not the main thread: leave the handling to whoever runs us
            self.previous = None
        return self

    def _ask(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)


def _short(value: float) -> float:
    return float(f"{value:.6g}") if isinstance(value, float) else value
