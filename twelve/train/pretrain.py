"""Pretraining: text in, a model folder out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from twelve.config import ModelConfig, small_v3
from twelve.data.corpus import tokenize
from twelve.data.shards import META, PackedData
from twelve.data.tokenizer import Tokenizer
from twelve.model import Transformer
from twelve.model.transformer import has_compiler
from twelve.train.loop import Supervised
from twelve.train.memory import own_table
from twelve.train.plan import Plan, describe
from twelve.train.precision import pick_device, pick_precision
from twelve.train.run import Prepared, run


def pretrain(
    paths: list[str], out: str | Path, *, minutes: float | None = None, steps: int | None = None, seed: int = 0,
    tokenizer: str | None = None, vocab_size: int | None = None, width: int = 256, layers: int = 4, experts: int = 8,
    experts_per_token: int = 2, mtp: int = 0, context: int = 512, batch: int = 8, learning_rate: float = 4e-3,
    muon: bool = True, compile: bool | None = None, device: str | None = None, switches: dict[str, Any] | None = None,
    started: float | None = None, quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Train a V3-shape model on documents and save it as a folder; the same call again resumes.

    `paths` are text files or folders, or one folder that `twelve tokenize` wrote. `batch` is in rows of `context`
    tokens. `switches` are more keys of the config, of hyper-connections (hc_) and memory (engram_). One of `minutes`
    (for everything, from `started`, a time.monotonic(), to the end) and `steps` sets the length; 10 minutes if none
    does. Returns the figures of the run. Raises InputError for bad input and Interrupted on Ctrl-C.
    """
    if minutes is None and steps is None:
        minutes = 10.0
    options = {
        "paths": [str(path) for path in paths], "minutes": minutes, "steps": steps, "seed": seed,
        "tokenizer": tokenizer, "vocab_size": vocab_size, "width": width, "layers": layers, "experts": experts,
        "experts_per_token": experts_per_token, "mtp": mtp, "context": context, "batch": batch,
        "learning_rate": learning_rate, "muon": muon, "compile": compile, "device": device, "switches": switches,
    }  # fmt: skip

    def prepare(folder: Path, plan: Plan | None) -> Prepared:
        target = pick_device(device)
        shards = _shards(paths, folder, tokenizer, vocab_size, quiet)
        data, words = PackedData(shards), Tokenizer.load(shards)
        if plan is None:
            shape = (words.vocab_size, width, layers, experts, experts_per_token, context, mtp)
            config = small_v3(*shape, **(switches or {}))
            config.bos_token_id = words.bos_id
            config.eos_token_id = words.eos_id
            config.pad_token_id = words.pad_id
            plan = Plan(
                stage="pretrain", options=options, config=config.to_dict(), data=describe(data), context=context,
                batch_size=batch, micro_batch_size=batch, learning_rate=learning_rate, seed=seed,
                threads=torch.get_num_threads(), precision=pick_precision(target), muon=muon,
                compile=_should_compile(target, minutes) if compile is None else compile,
            )  # fmt: skip
        plan.check_data(data, folder)
        config = ModelConfig(**plan.config)

        def batches(step: int):
            return data.batch(step, plan.batch_size, plan.context, plan.seed)

        def make_trainer() -> Supervised:
            model = Transformer(config)
            if model.memory is not None:
                model.memory.use_tokenizer(words)
                own_table(model, folder)
            return Supervised(model.init_weights(seed).to(target), batches, plan, folder)

        epoch_steps = max(1, data.windows(context) // batch)
        chats = data.conversations > 0
        return Prepared(plan, make_trainer, words, lambda figures: _about(plan, figures), chats, epoch_steps)

    return run("pretrain", out, options, prepare, minutes, steps, started, quiet)


def _should_compile(device: torch.device, minutes: float | None) -> bool:
    """Whether compiling pays: it takes up to a minute, and saves about a tenth of every step on a CPU."""
    return device.type == "cuda" or (device.type == "cpu" and (minutes or 0) >= 20 and has_compiler())


def _shards(paths: list[str], folder: Path, tokenizer: str | None, vocab_size: int | None, quiet: bool) -> Path:
    """The folder with the token shards of `paths` and their tokenizer, made if need be."""
    if len(paths) == 1 and (Path(paths[0]) / META).exists():
        return Path(paths[0])
    shards = folder / "training" / "data"
    tokenize(paths, shards, tokenizer, vocab_size, progress=not quiet)
    return shards


def _about(plan: Plan, figures: dict[str, Any]) -> dict[str, Any]:
    return {
        "made": "A small language model in DeepSeek-V3's shape, pretrained on text.",
        "measured": {
            "tokens seen": f"{figures['tokens']:,} of {plan.data['tokens']:,} in the data",
            "training loss": f"{figures['loss']} nats a token",
        },
    }
