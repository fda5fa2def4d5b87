"""The front door: one verb a function, no logic. What a verb does lives in the room that it imports.

A verb returns what it found as a dict. Without --json its numbers and words are printed one a line, and `next` last;
with --json the dict is the one thing on standard output, and all else goes to standard error. The verbs that talk
(chat, generate, serve) print for themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twelve.errors import InputError
from twelve.files import command
from twelve.options import finer
from twelve.parser import FINER, build_parser

STARTED = time.monotonic()  # --minutes counts the seconds that torch takes to import, too
Result = dict[str, Any]
Options = argparse.Namespace

# --- verbs ------------------------------------------------------------------------------------------------------------


def demo(options: Options) -> Result:
    from twelve.demo import demo

    return demo(options.out, **_given(options, {"minutes", "seed", "device"}))


def doctor(options: Options) -> None:
    from twelve.doctor import doctor

    doctor(as_json=options.json)


def pull(options: Options) -> Result:
    from twelve.pull import pull

    return pull(options.name, **_given(options, {"out", "revision", "file", "endpoint"}))


def plan(options: Options) -> Result:
    from twelve.planner import plan

    return plan(options.paths, **_given(options, PLAN), switches=_given(options, {"hc_mult", "engram_vocab_size"}))


def tokenize(options: Options) -> Result:
    from twelve.data.corpus import tokenize

    return tokenize(options.paths, options.out, options.tokenizer, options.vocab_size, filter=options.filter)


def filter(options: Options) -> Result:
    from twelve.filter import filter_text

    given = _given(options, {"against", "languages", "budget", "temperature", "report"})
    return filter_text(options.paths, options.out, weights=dict(options.weight), quiet=options.json, **given)


def pretrain(options: Options) -> Result:
    from twelve.train.pretrain import pretrain

    given, switches = _given(options, TRAINING | SHAPE), _given(options, SWITCHES)
    if "engram_layers" in switches:
        switches["engram_layer_ids"] = switches.pop("engram_layers")
    return pretrain(options.paths, options.out, **given, switches=switches or None, started=STARTED)


def sft(options: Options) -> Result:
    from twelve.train.sft import sft

    return sft(options.model, options.paths, options.out, **_given(options, TRAINING | {"lora"}), started=STARTED)


def rl(options: Options) -> Result:
    from twelve.posttrain.rl import rl

    given = _given(options, REINFORCEMENT | RECIPE) | finer(options.set, FINER)
    if options.recipe:
        from twelve.posttrain.recipes import follow

        return follow(options.model, options.out, options.task, **given, started=STARTED)
    if alone := [name for name in sorted(RECIPE) if name in given]:
        raise InputError(f"--{alone[0].replace('_', '-')} belongs to a recipe: add --recipe r1")
    return rl(options.model, options.out, options.task, **given, started=STARTED)


def distill(options: Options) -> Result:
    from twelve.posttrain.distill import distill

    given = _given(options, DISTILLATION | TRAINING)
    return distill(options.teachers, options.out, **given, teacher_for=dict(options.teacher_for), started=STARTED)


def evaluate(options: Options) -> Result:
    if options.audit:
        from twelve.evaluate.audit import audit

        return audit(options.audit, **_given(options, {"wrong_answers", "seed"}))
    if options.facts_text:
        from twelve.evaluate.facts import write_documents

        given = _given(options, {"seed"}) | ({"count": options.facts} if options.facts else {})
        count = write_documents(options.facts_text, languages=options.language, **given)
        following = command("twelve", "pretrain", "TEXT", options.facts_text)
        return {"documents": count, "file": options.facts_text, "next": following}
    if options.model is None and (options.compare or not options.contamination):
        raise InputError(
            "name a MODEL to measure; only --audit TASK, --facts-text FILE and --contamination PATH do without one"
        )
    from twelve.evaluate.evaluate import evaluate

    return evaluate(
        options.model, texts=options.text, tasks=options.task, choices=options.choices, languages=options.language,
        levels=options.level, without_memory=options.without_memory, contamination=options.contamination,
        **_given(options, EVALUATION),
    )  # fmt: skip


def chat(options: Options) -> None:
    from twelve.serve import terminal

    terminal.chat(_engine(options), **_given(options, SAMPLING | {"system"}), as_json=options.json)


def generate(options: Options) -> None:
    from twelve.serve import terminal

    given = _given(options, SAMPLING | {"n", "stop"})
    terminal.generate(_engine(options), options.prompt, **given, as_json=options.json)


def serve(options: Options) -> None:
    from twelve.serve import bind, run, url_of

    listening = bind(options.host, options.port)  # a port in use should not cost the time to load a model
    engine = _engine(options)
    name = options.name or os.path.basename(os.path.abspath(options.model))
    with contextlib.ExitStack() as quiet:
        if options.json:
            print(json.dumps({"url": url_of(listening), "model": name}, ensure_ascii=False), flush=True)
            quiet.enter_context(contextlib.redirect_stdout(sys.stderr))
        run(engine, name, sock=listening)


def convert(options: Options) -> Result:
    sizes = _given(options, {"layers", "width", "experts"})
    if options.text and not sizes:
        raise InputError("--text shows what a smaller model must keep: name its --layers, --width or --experts, too")
    if options.out.endswith(".gguf"):
        if sizes:
            raise InputError("resize into a folder first, then convert that folder to a .gguf file")
        from twelve.convert.gguf_export import export

        return export(options.model, options.out, options.dtype)
    if options.dtype in ("q8_0", "q4_0"):
        raise InputError(f"--dtype {options.dtype} is for a .gguf file; `twelve quantize` packs a folder")
    import torch

    from twelve.convert import check_place, load, save
    from twelve.convert.card import render
    from twelve.quantize import dequantize

    check_place(Path(options.out), options.model)
    model, tokenizer = load(options.model, device="cpu", dtype=getattr(torch, options.dtype))
    made = f"`{options.model}` written as {options.dtype}."
    if sizes:
        from twelve.convert.resize import resize

        model = resize(model, **sizes, tokenizer=tokenizer, texts=options.text)
        asked = ", ".join(f"{name} {value}" for name, value in sizes.items())
        made = f"`{options.model}` resized ({asked}), before any training, written as {options.dtype}."
    dequantize(model)
    seed = 0 if sizes else None
    card = render(options.out, made, verb="convert", config=model.config, parents=[options.model], seed=seed)
    save(model, tokenizer, options.out, card)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    following = command("twelve", *(["pretrain", "TEXT", "--from"] if sizes else ["chat"]), options.out)
    return {"model": options.out, "parameters": parameters, "next": following}


def quantize(options: Options) -> Result:
    from twelve.calibrate import quantize

    return quantize(
        options.model, options.out, texts=options.text, evaluate=options.eval,
        **_given(options, {"bits", "group", "limit", "embedding_bits"}),
    )  # fmt: skip


def _allow_code(options: Options) -> None:
    if getattr(options, "unsafe_code", False):
        from twelve.tasks import sandbox

        sandbox.UNSAFE = True


def _engine(options: Options):
    from twelve.convert import load
    from twelve.engine import make_engine

    if options.cache == "":  # of a variable that is not set
        raise InputError("--cache names nothing: give it a folder")
    folder = options.cache and os.path.expanduser(options.cache)
    if folder is None and options.cache_disk:
        raise InputError("--cache-disk says how much, not where: name a folder with --cache FOLDER")
    model, tokenizer = load(options.model, device=options.device, packed=True)
    if tokenizer is None:
        raise InputError(f"{options.model} has no tokenizer, so it cannot read or write text")
    cold = {"cache_folder": folder, "cache_disk": options.cache_disk or DISK} if folder else {}
    return make_engine(model, tokenizer, **_given(options, ENGINE), **cold)


# --- their options ----------------------------------------------------------------------------------------------------

TRAINING = {"minutes", "steps", "seed", "batch", "context", "learning_rate", "device"}
REINFORCEMENT = {
    "level", "language", "minutes", "steps", "seed", "prompts", "group", "max_tokens", "temperature", "learning_rate",
    "lora", "memory", "curriculum", "problems", "method", "device",
}  # fmt: skip
RECIPE = {"recipe", "cold_start", "mix", "judge", "judge_model", "judge_prompts"}
DISTILLATION = {
    "how", "student", "layers", "width", "task", "level", "language", "key_env", "traces", "max_tokens", "lora",
}  # fmt: skip
SHAPE = {
    "memory", "tokenizer", "vocab_size", "width", "layers", "experts", "experts_per_token", "mtp", "start", "filter",
}  # fmt: skip
PLAN = {
    "minutes", "memory", "tokenizer", "vocab_size", "filter", "batch", "context", "mtp", "watts", "price", "currency",
    "model", "gpus", "parameters", "tokens", "utilisation", "rent", "device",
}  # fmt: skip
SWITCHES = {"hc_mult", "engram_vocab_size", "engram_layers", "engram_dtype"}
ENGINE = {"kv_memory", "warm_memory", "speculation", "selection"}
DISK = 4 * 2**30  # bytes of --cache without --cache-disk
SAMPLING = {"temperature", "top_p", "max_tokens", "seed"}
EVALUATION = {
    "problems", "limit", "context", "samples", "temperature", "seed", "device", "facts", "compare", "out", "report",
}  # fmt: skip


def _given(options: Options, names: set[str]) -> Result:
    """The options that were given; the rest keep the room's own defaults."""
    return {name: getattr(options, name) for name in sorted(names) if getattr(options, name) is not None}


# --- running ----------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    try:
        options = build_parser().parse_args(arguments)
        if getattr(options, "out", None) == "":  # of a variable that is not set
            raise InputError("--out names nothing: give it a folder, or a file")
        run = globals()["evaluate" if options.verb == "eval" else options.verb]
        _set_threads(options)
        _allow_code(options)
        if options.talks:
            run(options)
        elif options.json:
            with contextlib.redirect_stdout(sys.stderr):
                result = run(options)
            print(json.dumps(result, ensure_ascii=False))
        else:
            _show(run(options))
        sys.stdout.flush()
    except InputError as error:
        return _fail(str(error), 2)
    except BrokenPipeError:  # whoever read our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}", 2)
    except KeyboardInterrupt as stop:  # a verb that can go on later says how in the exception
        return _fail(str(stop) or "interrupted", 130, kind="stopped")
    return 0


def _set_threads(options: Options) -> None:
    if getattr(options, "threads", None):
        import torch

        torch.set_num_threads(options.threads)


def _show(result: Result) -> None:
    """The result's numbers and words, one a line; nested parts are for --json and the report."""
    rows = {name: value for name, value in result.items() if isinstance(value, str | int | float) and name != "next"}
    width = max(map(len, rows), default=0)
    for name, value in rows.items():
        print(f"{name.replace('_', ' '):<{width}}  {f'{value:.6g}' if isinstance(value, float) else _visible(value)}")
    if "next" in result:
        print(f"next: {_visible(result['next'])}")


def _fail(message: str, status: int, kind: str = "error") -> int:
    print(f"twelve: {kind}: {_visible(' '.join(message.splitlines()))}", file=sys.stderr)
    return status


def _visible(said: Any) -> str:
    """As text whose control characters, which a terminal would obey, are spelled out: names and cards are others'."""
    return "".join(one if unicodedata.category(one) not in ("Cc", "Cs") else repr(one)[1:-1] for one in str(said))
