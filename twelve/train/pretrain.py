"""Pretraining: text in, a model folder out."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from twelve import convert
from twelve.config import ModelConfig, small_v3, with_memory
from twelve.data.corpus import tokenize
from twelve.data.shards import PackedData
from twelve.data.survey import holds_tokens
from twelve.data.tokenizer import Tokenizer
from twelve.errors import InputError
from twelve.heap import give_back
from twelve.model import Transformer
from twelve.plan.cost import drawn
from twelve.plan.fit import EPOCHS
from twelve.train.loop import Supervised
from twelve.train.memory import own_table
from twelve.train.outlook import can_plan, compiles, expect, fitting_micro_batch, require_room
from twelve.train.plan import Plan, describe, holds_data
from twelve.train.precision import pick_device, pick_precision
from twelve.train.run import Prepared, run, spoken

BETAS = (0.8, 0.995)  # of AdamW (docs/lab.md)
LATER_RATE = 1e-3  # of a model that is trained already: the rate of a fresh one undoes what it knows (docs/lab.md)
# of what neither the user nor a plan chose
DEFAULTS = {
    "width": 256, "layers": 4, "experts": 8, "experts_per_token": 2, "context": 512, "batch": 8, "learning_rate": 4e-3,
}  # fmt: skip


def pretrain(
    paths: list[str], out: str | Path, *, minutes: float | None = None, steps: int | None = None, seed: int = 0,
    tokenizer: str | None = None, vocab_size: int | None = None, width: int | None = None, layers: int | None = None,
    experts: int | None = None, experts_per_token: int | None = None, mtp: int = 0, context: int | None = None,
    batch: int | None = None, learning_rate: float | None = None, memory: int | None = None,
    muon: bool = True, compile: bool | None = None, device: str | None = None, switches: dict[str, Any] | None = None,
    start: str | Path | None = None, filter: bool = False, started: float | None = None, quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Train a V3-shape model with a memory on documents and save it as a folder; the same call again resumes.

    `paths` are text files or folders, or one folder that `twelve tokenize` wrote. `batch` is in rows of `context`
    tokens. `switches` are more keys of the config, of hyper-connections (hc_), memory (engram_) and tokens' own parts
    of latents (kv_token_); an engram_vocab_size of 0 leaves out the last two. One of `minutes` (for everything, from
    `started`, a time.monotonic(), to the end) and `steps` sets the length; 10 minutes if none does. Where minutes are
    given and none of the model's sizes, a plan chooses what is not given (`outlook.expect`); else DEFAULTS do.
    `memory`: bytes that the process is to stay below, by smaller micro-batches and models. `start`: a model whose
    weights, sizes and tokenizer the run begins with. `filter`: drop bad text first. Returns the figures of the run.
    Raises InputError for bad input and Interrupted on Ctrl-C.
    """
    if minutes is None and steps is None:
        minutes = 10.0
    planned = steps is None and start is None and width is layers is experts is experts_per_token is None
    options = {
        "paths": [str(path) for path in paths], "minutes": minutes, "steps": steps, "seed": seed,
        "tokenizer": tokenizer, "vocab_size": vocab_size, "width": width, "layers": layers, "experts": experts,
        "experts_per_token": experts_per_token, "mtp": mtp, "context": context, "batch": batch,
        "learning_rate": learning_rate, "muon": muon, "compile": compile, "device": device, "switches": switches,
        "memory": memory, "start": start and str(start), "filter": filter or None,
    }  # fmt: skip
    if start is not None:
        _check_start(options, out)
    holds_tokens(paths, tokenizer=tokenizer, vocab_size=vocab_size, filter=filter)
    there = DEFAULTS["experts"] if experts is None else experts
    if start is None and there and experts_per_token is not None and experts_per_token > there:
        raise InputError(f"--experts-per-token {experts_per_token}: there are {there} experts in a layer")
    of_memory = [key for key in switches or () if key.startswith("engram_") and key != "engram_vocab_size"]
    if of_memory and switches.get("engram_vocab_size") == 0:
        option = _option(of_memory[0])
        raise InputError(f"--{option} is for a memory, and --engram-vocab-size 0 leaves it out: drop one of them")

    def prepare(folder: Path, plan: Plan | None) -> Prepared:
        target = pick_device(device)
        chosen = plan.outlook if plan is not None else {}
        if plan is None and planned and can_plan(target):
            outlook = expect(
                paths, minutes, memory=memory, device=device, tokenizer=tokenizer, vocab_size=vocab_size,
                context=context, batch=batch, learning_rate=learning_rate, mtp=mtp, switches=switches, compile=compile,
                filter=filter,
            )  # fmt: skip
            print(*(f"{name:<9} {told}" for name, told in outlook.lines().items()), sep="\n", flush=True)
            chosen = outlook.to_dict()
        known = tokenizer if start is None else convert.load_tokenizer(start)
        shards = folder / "training" / "data"
        if plan is None or not holds_data(plan, shards):
            shards = _shards(paths, folder, known, chosen.get("vocab_size", vocab_size), filter, quiet)
        data, words = PackedData(shards), Tokenizer.load(shards)
        if start is not None and words.fingerprint != known.fingerprint:
            raise InputError(f"{shards} was made with another tokenizer than {start} has: name the text itself")
        if plan is None:
            defaults = DEFAULTS | ({} if start is None else {"learning_rate": LATER_RATE})
            sizes = {name: _first(options[name], chosen.get(name), default) for name, default in defaults.items()}
            rows, length = sizes["batch"], sizes["context"]
            shape = (sizes[name] for name in ("width", "layers", "experts", "experts_per_token", "context"))
            micro = chosen.get("micro_batch")
            if start is None:
                known_rows = {"engram_vocab_size": chosen["memory_rows"]} if chosen else {}
                parts = with_memory(known_rows | (switches or {}), data.tokens, (steps or 0) * rows * length)
                config = small_v3(words.vocab_size, *shape, mtp, **parts)
                config.bos_token_id = words.bos_id
                config.eos_token_id = words.eos_id
                config.pad_token_id = words.pad_id
            else:
                config = convert.load_config(start)
                most = config.max_position_embeddings
                if context is not None and context > most:
                    raise InputError(f"--context {context}: {start} reads {most} tokens at most")
                length = min(length, most)
            if memory is None:
                require_room(config, length, target)
            plan = Plan(
                stage="pretrain", options=options, config=config.to_dict(), data=describe(data), context=length,
                batch_size=rows, learning_rate=sizes["learning_rate"], seed=seed,
                micro_batch_size=micro or fitting_micro_batch(config, rows, length, memory, data.tokens),
                threads=torch.get_num_threads(), precision=pick_precision(target), muon=muon,
                betas=BETAS, drawn=drawn(config.vocab_size) if target.type == "cpu" else 0,
                compile=compiles(target, minutes) if compile is None else compile, outlook=chosen,
            )  # fmt: skip
            if chosen:
                plan.most_steps = max(1, EPOCHS * data.tokens // (rows * length))
        plan.check_data(data, folder)
        order = reading_order(plan.seed, start)
        config = ModelConfig(**plan.config)

        def batches(step: int):
            return data.batch(step, plan.batch_size, plan.context, order)

        def about(figures: dict[str, Any]) -> dict[str, Any]:
            return _about(plan, figures) | {"languages": spoken(batches, words)}

        def make_trainer() -> Supervised:
            if start is not None:
                return Supervised(convert.load(start, target, torch.float32)[0], batches, plan, folder)
            model = Transformer(config)
            if model.memory is not None:
                model.memory.use_tokenizer(words)
                own_table(model, folder)
            return Supervised(model.init_weights(seed).to(target), batches, plan, folder)

        epoch_steps = data.windows(plan.context) / plan.batch_size
        chats = data.conversations > 0
        return Prepared(plan, make_trainer, words, about, chats, epoch_steps)

    return run("pretrain", out, options, prepare, minutes, steps, started, quiet)


def reading_order(seed: int, start: str | Path | None) -> int:
    """The seed by which text is read. A model to start from may have read it in the order of the same seed, and learns
    nothing from what it knows by heart: it gets another."""
    return seed if start is None else crc32(f"{seed} once more".encode())


def _check_start(options: dict[str, Any], out: str | Path) -> None:
    """InputError for what does not go with a model to start from."""
    start = options["start"]
    convert.require_floats(start)
    if convert.resolve(start).resolve() == Path(out).resolve():
        raise InputError(f"{out} is the model to start from: name another folder with --out")
    sizes = ("tokenizer", "vocab_size", "width", "layers", "experts", "experts_per_token", "mtp")
    given = [name for name in sizes if options[name] or (options[name] == 0 and name != "mtp")]
    if given := [*given, *(options["switches"] or {})]:
        raise InputError(f"--from {start} brings its own sizes and tokenizer: leave out --{_option(given[0])}")


def _option(name: str) -> str:
    return name.replace("layer_ids", "layers").replace("_", "-")


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _shards(
    paths: list[str], folder: Path, tokenizer: str | None, vocab_size: int | None, filter: bool, quiet: bool
) -> Path:
    """The folder with the token shards of `paths` and their tokenizer, made if need be."""
    if holds_tokens(paths):
        return Path(paths[0])
    shards = folder / "training" / "data"
    tokenize(paths, shards, tokenizer, vocab_size, filter=filter, progress=not quiet)
    give_back()  # hundreds of megabytes, after a tokenizer was trained
    return shards


def _about(plan: Plan, figures: dict[str, Any]) -> dict[str, Any]:
    start = plan.options.get("start")
    memory = " with a conditional memory (Engram)" if plan.config.get("engram_layer_ids") else ""
    made = f"Pretrained on text, from the weights of `{start}` on." if start else ""
    return {
        "made": made or f"A small language model in DeepSeek-V3's shape{memory}, pretrained on text.",
        "parents": [start] if start else [],
        "measured": {
            "tokens seen": f"{figures['tokens']:,} of {plan.data['tokens']:,} in the data",
            "training loss": f"{figures['loss']} nats a token",
        },
    }
