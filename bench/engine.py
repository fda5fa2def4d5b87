"""The engine by itself: what quantised weights, kept prefixes, guesses and the native step give.

    python bench/engine.py packed MODEL --text VALIDATION --calibration TRAINING
    python bench/engine.py prefix MODEL... [--folder DIR]
    python bench/engine.py sampling [MODEL]
    python bench/engine.py speculation MODEL --text FILE
    python bench/engine.py decode
    python bench/engine.py plain MODEL
    all of them: [--rounds 5] [--threads N] [--json FILE]

MODEL is a folder, a GGUF file or a name, as everywhere. A round is every variant once, another one first each time; a
table shows medians over the rounds, with the slowest and fastest, and --json keeps every run. Prompts of random tokens
where nothing else is said, speculation off except where it is measured. Decoding is the time for n + 1 tokens each
less the time for 1 token each, so that prompts and first tokens cancel.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from peers import bandwidth, processor
from torch import nn

from twelve.calibrate import calibration, quantize_model
from twelve.config import ModelConfig, small_v3
from twelve.convert import load, save
from twelve.data.chat import encode_prompt
from twelve.engine import Completion, Engine, Request, make_engine, native
from twelve.engine.runner import PlainRunner
from twelve.errors import InputError
from twelve.evaluate.bits import _texts, ratio_error, split
from twelve.model import Transformer, count_parameters
from twelve.model.moe import Experts
from twelve.quantize import Form

Runs = dict[str, list[dict[str, float]]]  # variant: of every round, what was measured


def main() -> None:
    common = shared_options()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tables = parser.add_subparsers(dest="table", required=True, metavar="TABLE")

    def table(run: Callable, model: dict | None = None) -> argparse.ArgumentParser:
        made = tables.add_parser(run.__name__, parents=[common], help=run.__doc__.splitlines()[0])
        made.set_defaults(run=run)
        if model is not None:
            made.add_argument("model", metavar="MODEL", **model)
        return made

    made = table(packed, {"help": "a float model of this project, with a tokenizer"})
    made.add_argument("--text", metavar="FILE", required=True, help="what bits per byte are measured on")
    made.add_argument("--calibration", metavar="FILE", required=True, help="other text, which GPTQ fits 4 bits to")
    made.add_argument("--documents", type=int, default=60, help="of --text, at most")
    made = table(prefix, {"nargs": "+"})
    made.add_argument("--tokens", type=int, default=2000, help="of the prompt, as far as the model's context allows")
    made.add_argument("--folder", metavar="DIR", help="for the files: on a disk, not in memory (default: TMPDIR)")
    made = table(sampling, {"nargs": "?", "default": "smollm2", "help": "default: smollm2; none: small ones only"})
    made.add_argument("--large-rounds", type=int, default=1, help="of MODEL, which takes minutes")
    made.add_argument("--sequences", type=int, default=256)
    made = table(speculation, {})
    made.add_argument("--text", metavar="FILE", required=True)
    made.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    table(decode)
    made = table(plain, {})
    made.add_argument("--tokens", type=int, default=32, help="of each of 16 sequences, to count flips over")
    made.add_argument("--packed", action="store_true", help="keep packed weights, which the plain one unpacks at use")
    options = parser.parse_args()
    perform(parser, options, options.run)


# --- measuring and showing --------------------------------------------------------------------------------------------


def shared_options() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(add_help=False)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--json", metavar="FILE")
    return made


def perform(parser: argparse.ArgumentParser, options: argparse.Namespace, run: Callable[..., dict]) -> None:
    """Run it, under a line about the machine, and write what it gives."""
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads of {os.cpu_count()} ({processor()}), {options.rounds} rounds, "
          f"torch {torch.__version__}")  # fmt: skip
    random.seed(0)
    try:
        result = run(options)
    except InputError as error:
        parser.error(str(error))
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "run"}
        machine = {"processor": processor(), "cores": os.cpu_count(), "torch": torch.__version__}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"settings": settings, "machine": machine, **result}, file, indent=2)


def interleave(variants: dict[str, Callable[[], dict]], rounds: int, warm: bool = True) -> Runs:
    """Every variant once a round, another one first each time; before that once for nothing if `warm`."""
    names, runs = list(variants), {name: [] for name in variants}
    for name in names if warm else ():
        variants[name]()
    for turn in range(rounds):
        shift = turn % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            runs[name].append(variants[name]())
    return runs


def median(runs: list[dict], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def spread(runs: list[dict], key: str, form: str = ",.0f") -> str:
    values = [run[key] for run in runs]
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table, its first column to the left."""
    widths = [max(len(row[i]) for row in [[title, *columns], *rows]) + 2 for i in range(len(columns) + 1)]
    print()
    for first, *rest in [[title, *columns], *rows]:
        print(first.ljust(widths[0]) + "".join(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)))


def generate(
    engine: Engine, prompts: list[list[int]], count: int, temperature: float = 0.0, seed: int = 0, **options
) -> tuple[float, list[Completion]]:
    """(seconds, completions) of all prompts at once, the seeds counting from `seed`; `options` go to the requests."""
    options = {"stop_ids": frozenset(), **options}
    requests = [Request(ids, count, temperature, seed=seed + at, **options) for at, ids in enumerate(prompts)]
    began = time.perf_counter()
    completions = engine.generate(requests)
    return time.perf_counter() - began, completions


def decoding(engine: Engine, prompts: list[list[int]], count: int) -> float:
    """tokens/s of all together, `count` tokens each after the first."""
    first, _ = generate(engine, prompts, 1)
    whole, _ = generate(engine, prompts, count + 1)
    return len(prompts) * count / max(whole - first, 1e-9)


def random_prompts(vocab_size: int, number: int, length: int) -> list[list[int]]:
    return [[random.randrange(vocab_size) for _ in range(length)] for _ in range(number)]


class Bare:
    """A tokenizer for models without one: tokens are no text."""

    stop_ids = frozenset()

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def decode(self, ids) -> str:
        return ""

    def decode_bytes(self, ids) -> bytes:
        return b""


def with_tokenizer(name: str, packed: bool = False, text: bool = False) -> tuple:
    """Model and tokenizer, its own if it has to read `text`."""
    model, tokenizer = load(name, device="cpu", packed=packed)
    if text and tokenizer is None:
        raise InputError(f"{name} has no tokenizer, so it cannot read text")
    return model, Bare(model.config.vocab_size) if tokenizer is None else tokenizer


# --- the tables -------------------------------------------------------------------------------------------------------


def packed(options) -> dict:
    """INT8 and INT4 weights of a model of ours against float32"""
    model, tokenizer = with_tokenizer(options.model, text=True)
    context = model.config.max_position_embeddings
    texts = _texts([options.text], options.documents)
    sizes = torch.tensor([len(text.encode()) for text in texts], dtype=torch.float64)
    encoded = [[*tokenizer.start_ids, *tokenizer.encode(text, control=False)] for text in texts]
    windows = [one for index, ids in enumerate(encoded) for one in split(ids, context - 1, index)]
    calibrating = calibration(tokenizer, [options.calibration], min(512, context))
    forms = {"float32": None, "INT8": (Form(8, 32, True), None), "INT4, rounded plainly": (Form(4, 32, False), None),
             "INT4, GPTQ": (Form(4, 32, False), calibrating)}  # fmt: skip
    engines, bits = {}, {}
    for name, how in forms.items():
        if how is not None:
            model, _ = load(options.model, device="cpu")
            quantize_model(model, how[0], Form(8, 32, True), how[1])  # embedding and head: 8 bits, as `twelve quantize`
        engines[name] = make_engine(model.eval(), tokenizer, speculation="off")
        bits[name] = torch.zeros(len(texts), dtype=torch.float64)
        for window, scores in zip(windows, engines[name].score([one.ids for one in windows]), strict=True):
            bits[name][window.document] -= scores[-window.scored :].sum() / math.log(2)

    def measure(engine: Engine) -> dict[str, float]:
        one, many = (random_prompts(tokenizer.vocab_size, number, 16) for number in (1, 64))
        return {"batch 1": decoding(engine, one, min(192, context - 17)), "batch 64": decoding(engine, many, 64)}

    runs = interleave({name: lambda engine=engine: measure(engine) for name, engine in engines.items()}, options.rounds)
    peak = max(bandwidth(options.threads) for _ in range(3))
    summary, rows = {}, []
    for name, engine in engines.items():
        total, token = weight_bytes(engine.model)
        ratio = float(bits[name].sum() / sizes.sum())
        loss = float((bits[name] - bits["float32"]).sum() / sizes.sum())
        speed = token * median(runs[name], "batch 1") / 1e9
        error = ratio_error(bits[name] - bits["float32"], sizes, loss)
        summary[name] = {"weight_bytes": total, "bytes_a_token": token, "gb_per_second": speed, "bits_per_byte": ratio,
                         "loss": loss, "loss_error": error}  # fmt: skip
        rows.append([name, spread(runs[name], "batch 1"), spread(runs[name], "batch 64"), f"{total / 1e6:.2f}",
                     f"{token / 1e6:.2f}", f"{speed:.1f}", f"{ratio:.4f}", f"{loss:+.4f} ± {error:.4f}"])  # fmt: skip
    show("decoding, tokens/s", ["batch 1", "batch 64", "MB", "MB a token", "GB/s", "bits/byte", "loss"], rows)
    print(f"bits per byte through the engine: {int(sizes.sum()):,} bytes, {len(texts)} documents, windows of "
          f"{context - 1}; the error is that of the loss. bandwidth of memory {peak:.1f} GB/s")  # fmt: skip
    return {"runs": runs, "summary": summary, "bandwidth": peak}


def weight_bytes(model: nn.Module) -> tuple[int, int]:
    """(all, those read for one token) of the main model; of an untied embedding a token reads one row."""
    total = idle = 0
    config = model.config
    for name, module in model.named_modules():
        if name.startswith("mtp."):
            continue
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        size = sum(tensor.nbytes for tensor in tensors)
        total += size
        if isinstance(module, Experts):
            idle += size - size * config.num_experts_per_tok // config.n_routed_experts
        elif name == "embed_tokens" and not config.tie_word_embeddings:
            idle += size - size // config.vocab_size
    return total, total - idle


CACHE = 8 * 2**30  # bytes of files, at most


def prefix(options) -> dict:
    """time to the first token of a long prompt: new, known in RAM, known on disk after a restart"""
    result, rows, sizes = {}, [], []
    for name in options.model:
        model, tokenizer = with_tokenizer(name, packed=True)
        length = min(options.tokens, model.config.max_position_embeddings - 1)
        prompts = random_prompts(tokenizer.vocab_size, options.rounds + 1, length)
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            fresh = make_engine(model, tokenizer, speculation="off")
            kept = make_engine(model, tokenizer, speculation="off", cache_folder=folder, cache_disk=CACHE)
            runs = []
            for ids in prompts:
                run = {"new": first_token(fresh, ids), "new, written to files": first_token(kept, ids)}
                kept.pool.tiers.flush()
                runs.append(run | {"known, in RAM": first_token(kept, ids)})
            cache = kept.runner.cache_bytes_per_token
            del fresh, kept
            gc.collect()
            with multiprocessing.get_context("spawn").Pool(1) as process:  # the restart
                after = process.apply(restarted, (name, folder, prompts, options.threads))
        runs, after = runs[1:], after[1:]  # the first warms up
        result[name] = {"tokens": length, "before": runs, "after": after}
        for label, group in (("", runs), (" (restarted)", after)):
            for key in group[0]:
                cached = min(run[key]["cached_tokens"] for run in group)
                ratios = [{"ratio": run["new"]["seconds"] / run[key]["seconds"]} for run in group]
                rows.append([f"{name}: {key}{label}", str(length), str(cached),
                             spread([run[key] for run in group], "seconds", ".4f"),
                             spread(ratios, "ratio", ".1f")])  # fmt: skip
        config = model.config
        heads = config.num_attention_heads
        groups = max(n for n in range(1, min(9, max(2, heads))) if heads % n == 0)
        twins = {"the model": cache, "MHA": twin_bytes(config, heads), f"GQA-{groups}": twin_bytes(config, groups)}
        result[name]["cache_bytes_per_token"] = twins
        sizes += [[f"{name}: {kind}", f"{size:,}", f"{size / cache:.2f}"] for kind, size in twins.items()]
    show("time to the first token", ["tokens", "of them cached", "seconds", "times as fast as new"], rows)
    print("restarted: a new process; on disk: the files are dropped from the system's page cache first, where it lets "
          "us; page cache: read once more by another engine")  # fmt: skip
    show("keys and values", ["bytes a token", "times the model's"], sizes)
    return result


def first_token(engine: Engine, prompt: list[int]) -> dict[str, float]:
    seconds, [one] = generate(engine, [prompt], 1)
    return {"seconds": seconds, "cached_tokens": one.cached_tokens}


def restarted(name: str, folder: str, prompts: list[list[int]], threads: int) -> list[dict]:
    """In a new process: the first tokens of new prompts and of those whose pages are in the folder."""
    torch.set_num_threads(threads)
    model, tokenizer = with_tokenizer(name, packed=True)
    fresh = make_engine(model, tokenizer, speculation="off")
    disk, again = (make_engine(model, tokenizer, speculation="off", cache_folder=folder, cache_disk=CACHE)
                   for _ in range(2))  # fmt: skip
    runs = []
    for ids in prompts:
        new = first_token(fresh, *random_prompts(tokenizer.vocab_size, 1, len(ids)))
        for file in Path(folder).rglob("*"):
            if file.is_file() and hasattr(os, "posix_fadvise"):
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        known = first_token(disk, ids)
        runs.append({"new": new, "known, on disk": known, "known, page cache": first_token(again, ids)})
    return runs


def twin_bytes(config: ModelConfig, kv_heads: int) -> int:
    """Bytes a token of keys and values of the model's like with so many heads of keys and values, in float32."""
    twin = ModelConfig(
        model_type="llama", vocab_size=64, hidden_size=config.hidden_size, intermediate_size=64,
        num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
        num_key_value_heads=kv_heads, head_dim=config.v_head_dim if config.is_mla else config.head_dim,
    )  # fmt: skip
    with torch.device("meta"):
        return PlainRunner(Transformer(twin), 64).cache_bytes_per_token


PER_CORE = {"0.35M": 10_000, "3M": 2_800}  # tokens/s of a batch of 256 on one core, measured before this engine was


def sampling(options) -> dict:
    """256 sequences x 96 tokens at temperature 1 with log-probabilities, as in reinforcement learning"""
    made = {"0.35M": small_v3(512, width=64, layers=6, experts=0), "3M": small_v3(2048, width=192, layers=6, experts=0)}
    parts = {name: (Transformer(one).init_weights(0).eval(), Bare(one.vocab_size)) for name, one in made.items()}
    small, large = list(parts), []
    if options.model != "none":
        large = [f"{options.model}, float32", f"{options.model}, as packed in its file"]
        parts |= {name: with_tokenizer(options.model, packed=name == large[1]) for name in large}
    engines = {name: make_engine(*both, speculation="off", max_sequences=options.sequences)
               for name, both in parts.items()}  # fmt: skip

    def measure(name: str, count: int = 96) -> dict[str, float]:
        engine, before = engines[name], engines[name].stats
        prompts = random_prompts(parts[name][1].vocab_size, options.sequences, 16)
        seconds, done = generate(engine, prompts, count, temperature=1.0, logprobs=True)
        if any(len(one.logprobs) != count for one in done):
            raise SystemExit(f"{name}: a completion is short")
        after = engine.stats
        inside, rows, drawn = (getattr(after, key) - getattr(before, key) for key in ("step_seconds", "rows", "drawn"))
        products = product_seconds(engine, options.sequences, rows, drawn, options.threads)
        return {"tokens_per_second": drawn / seconds, "outside_step": 1 - inside / seconds,
                "outside_products": 1 - products / seconds}  # fmt: skip

    runs = interleave({name: lambda name=name: measure(name) for name in small}, options.rounds)
    for name in large:
        measure(name, 2)  # warm
    runs |= interleave({name: lambda name=name: measure(name) for name in large}, options.large_rounds, warm=False)
    rows, summary = [], {}
    for name, found in runs.items():
        figure = PER_CORE.get(name, math.nan) * options.threads
        config = parts[name][0].config
        summary[name] = {"parameters": count_parameters(config)["total"], "vocabulary": config.vocab_size,
                         "ratio": median(found, "tokens_per_second") / figure}  # fmt: skip
        ratio = "-" if math.isnan(figure) else f"{summary[name]['ratio']:.1f}x"
        rows.append([name, f"{summary[name]['parameters']:,}", spread(found, "tokens_per_second"), ratio,
                     spread(found, "outside_step", ".1%"), spread(found, "outside_products", ".1%")])  # fmt: skip
    show(f"{options.sequences} x 96 tokens", ["parameters", "tokens/s", f"of {options.threads} x a core's",
                                              "outside the native step", "outside products"], rows)  # fmt: skip
    print("small ones: dense, random weights; prompts of 16; products: every matrix timed by itself with as many rows, "
          f"attention's own not counted; {options.large_rounds} rounds of the large one")  # fmt: skip
    return {"runs": runs, "summary": {name: {k: v for k, v in one.items() if v == v} for name, one in summary.items()}}


def product_seconds(engine: Engine, batch: int, rows: int, drawn: int, threads: int) -> float:
    """What the layers' matrices for `rows` and the head for `drawn` rows take, each timed with `batch` rows."""
    runner, model, total = engine.runner, engine.model, 0.0
    if not isinstance(runner, native.NativeRunner):
        return math.nan
    modules = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear) or hasattr(one, "packed")}
    modules = {name: one for name, one in modules.items() if not name.startswith("mtp.") and "kv_b_proj" not in name
               and name not in ("embed_tokens", "lm_head")}  # fmt: skip
    head = model.embed_tokens if model.config.tie_word_embeddings else model.lm_head
    for module, times in [*((module, rows / batch) for module in modules.values()), (head, drawn / batch)]:
        matrix = runner.weights.matrix(module)
        x = np.ones((batch, matrix.columns), np.float32)
        out = np.empty((batch, matrix.rows), np.float32)
        taken = []
        for _ in range(3):
            began = time.perf_counter()
            native.library().matrix_product(ctypes.addressof(matrix), x.ctypes.data, batch, out.ctypes.data, threads)
            taken.append(time.perf_counter() - began)
        total += times * statistics.median(taken)
    return total


INSTRUCTION = "\n\nSummarise the text above: repeat its key sentences, one after the other."


def speculation(options) -> dict:
    """guesses by the model's MTP module on text, and by n-gram lookup on a prompt to summarise"""
    model, tokenizer = with_tokenizer(options.model, packed=True, text=True)
    context, result = model.config.max_position_embeddings, {}
    texts = [tokenizer.encode(text, control=False) for text in _texts([options.text], 400)]
    if len(model.mtp):
        prompts = [[*tokenizer.start_ids, *ids[:48]] for ids in texts if len(ids) >= 48]
        cells = [(model, tokenizer, "mtp", prompts[:batch], min(96, context - 49)) for batch in options.batches]
        result["mtp"] = guessing("MTP, going on with text", cells, options.rounds)
    most = min(1000, context // 2)
    articles = [tokenizer.decode(ids) for ids in texts if 0.6 * most <= len(ids) <= most]
    if tokenizer.chat_template and articles:
        prompts = [encode_prompt(tokenizer, [{"role": "user", "content": text + INSTRUCTION}]) for text in articles[:4]]
        sizes = [len(ids) for ids in prompts]
        cells = [(model, tokenizer, "ngram", prompts[:batch], min(128, context - max(sizes))) for batch in (1, 4)]
        # an answer ends where the model ends it; after the first, unmeasured run the prompts are in the prefix cache
        title = f"n-grams, summarising {min(sizes)} to {max(sizes)} tokens"
        result["ngram"] = guessing(title, cells, options.rounds, stop_ids=None)
    if not result:
        raise InputError(f"{options.model} has neither an MTP module nor a chat template that an article fits into")
    return result


def guessing(title: str, cells: list[tuple], rounds: int, **request) -> dict:
    """A table by temperature and batch; cells: (model, tokenizer, mode, prompts, most tokens) each."""
    result, rows = {}, []
    for temperature in (0.0, 1.0):
        for cell in cells:
            mode, batch = cell[2], len(cell[3])
            runs = with_and_without(*cell, temperature, rounds, **request)
            off, on = runs["off"], runs[mode]
            drafted, accepted, tokens = (sum(run[key] for run in on) for key in ("drafted", "accepted", "tokens"))
            ratios = [{"ratio": a["tokens_per_second"] / b["tokens_per_second"]} for a, b in zip(on, off, strict=True)]
            result[f"temperature {temperature:g}, batch {batch}"] = {"runs": runs, "speed_up": ratios}
            rows.append(["temperature 1" if temperature else "greedy", str(batch), spread(off, "tokens_per_second"),
                         spread(on, "tokens_per_second"), spread(ratios, "ratio", ".2f"),
                         f"{accepted / drafted:.0%}" if drafted else "-", f"{drafted / tokens:.2f}",
                         f"{tokens / rounds / batch:.0f}"])  # fmt: skip
            gc.collect()
    show(title, ["batch", "off, tokens/s", "guessing, tokens/s", "speed-up", "accepted", "guesses a token", "tokens"],
         rows)  # fmt: skip
    print("the same tokens with and without guesses, in every run")
    return result


def with_and_without(model, tokenizer, mode, prompts, count, temperature, rounds, **request) -> Runs:
    """SystemExit if guesses change a token."""
    engines = {name: make_engine(model, tokenizer, speculation=name) for name in ("off", mode)}
    answers: list[list[list[int]]] = []

    def measure(engine: Engine) -> dict[str, float]:
        before = asdict(engine.stats)
        seconds, done = generate(engine, prompts, count, temperature, **request)
        answers.append([one.token_ids for one in done])
        tokens, after = sum(one.completion_tokens for one in done), asdict(engine.stats)
        counts = {key: after[key] - before[key] for key in ("steps", "rows", "drafted", "accepted", "step_seconds")}
        return counts | {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds}

    runs = interleave({name: lambda one=one: measure(one) for name, one in engines.items()}, rounds)
    if engines["off"].exact and any(one != answers[0] for one in answers):
        raise SystemExit(f"{mode}, batch {len(prompts)}, temperature {temperature}: guesses changed the tokens")
    return runs


def decode(options) -> dict:
    """decoding one sequence of a V3-shape model beside transformers"""
    from transformers import DeepseekV3ForCausalLM

    config, count = small_v3(4096, width=256, layers=8, experts=16, experts_per_token=4, context=512), 128
    model = Transformer(config).init_weights(0).eval()
    sides = {"twelve": make_engine(model, Bare(config.vocab_size), speculation="off")}
    with tempfile.TemporaryDirectory() as folder:
        save(model, None, folder)
        for kind in ("eager", "grouped_mm"):
            theirs = DeepseekV3ForCausalLM.from_pretrained(folder).float().eval()
            theirs.set_experts_implementation(kind)
            sides[f"transformers, experts {kind}"] = theirs
    [prompt], answers = random_prompts(config.vocab_size, 1, 16), {}
    ids, ask = torch.tensor([prompt]), {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}

    def measure(name: str) -> dict[str, float]:
        began = time.perf_counter()
        if name == "twelve":
            answers[name] = generate(sides[name], [prompt], count)[1][0].token_ids
        else:
            out = sides[name].generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **ask)
            answers[name] = out[0, 16:].tolist()
        return {"tokens_per_second": count / (time.perf_counter() - began)}

    runs = interleave({name: lambda name=name: measure(name) for name in sides}, options.rounds)
    base = max(median(found, "tokens_per_second") for name, found in runs.items() if name != "twelve")
    rows = [[name, spread(found, "tokens_per_second"), f"{median(found, 'tokens_per_second') / base:.2f}",
             str(sum(a == b for a, b in zip(answers[name], answers["twelve"], strict=True)))]
            for name, found in runs.items()]  # fmt: skip
    show(f"decoding {count} tokens, batch 1", ["tokens/s", "ratio", "tokens as ours"], rows)
    print(f"{count_parameters(config)} parameters, random weights, the same on all sides; a prompt of 16 counts")
    return {"runs": runs}


def plain(options) -> dict:
    """the native engine against the plain PyTorch runner, which a machine without a compiler gets"""
    engines, streams = {}, 16
    for name in ("native", "plain"):
        model, tokenizer = with_tokenizer(options.model, packed=options.packed)  # one each: native moves the weights
        runner = PlainRunner(model, tokenizer.vocab_size) if name == "plain" else None
        engines[name] = Engine(model, tokenizer, speculation="off", runner=runner)
    if not isinstance(engines["native"].runner, native.NativeRunner):
        raise InputError("there is no native runner here: it needs a C++ compiler")
    length = min(512, engines["native"].context - 1)

    def measure(engine: Engine) -> dict[str, float]:
        vocab_size = engine.tokenizer.vocab_size
        return {
            "decode": decoding(engine, random_prompts(vocab_size, 1, 16), 48),
            "prefill": length / generate(engine, random_prompts(vocab_size, 1, length), 1)[0],
            "streams": decoding(engine, random_prompts(vocab_size, streams, 16), 16),
        }

    runs = interleave({name: lambda one=one: measure(one) for name, one in engines.items()}, options.rounds)
    ratios = {key: median(runs["native"], key) / median(runs["plain"], key) for key in runs["native"][0]}
    rows = [[name, *(spread(found, key) for key in ratios)] for name, found in runs.items()]
    show("tokens/s", ["decode", f"prefill {length}", f"{streams} streams"],
         [*rows, ["native, times as fast", *(f"{ratio:.1f}" for ratio in ratios.values())]])  # fmt: skip
    flips, rows, count = {}, [], options.tokens
    prompts = random_prompts(engines["native"].tokenizer.vocab_size, streams, 16)
    for name, engine in engines.items():
        for kind, temperature in (("greedy", 0.0), ("temperature 1", 1.0)):
            together = generate(engine, prompts, count, temperature)[1]
            alone = [generate(engine, [ids], count, temperature, seed)[1][0] for seed, ids in enumerate(prompts)]
            flips[f"{name}, {kind}"] = found = differing(alone, together)
            rows.append([f"{name}, {kind}", f"{found['tokens']:.2%}", f"{found['sequences']:.0%}",
                         f"{found['rate']:.3%}"])  # fmt: skip
    show("batch 1 against 16", ["tokens that differ", "sequences", "first flips a token"], rows)
    print(f"{streams} prompts, {count} tokens each; after its first flip a sequence goes its own way: the last column "
          "counts tokens up to it")  # fmt: skip
    return {"runs": runs, "ratios": ratios, "flips": flips}


def differing(alone: list[Completion], together: list[Completion]) -> dict[str, float]:
    """Shares of tokens and of sequences that differ, and the chance of a first difference at a token."""
    pairs = [(a.token_ids, b.token_ids) for a, b in zip(alone, together, strict=True)]
    unlike = [[x != y for x, y in zip(*pair, strict=True)] for pair in pairs]
    flipped = sum(map(any, unlike))
    until = sum(one.index(True) + 1 if any(one) else len(one) for one in unlike)
    total = sum(map(len, unlike))
    return {"tokens": sum(map(sum, unlike)) / total, "sequences": flipped / len(unlike), "rate": flipped / until}


if __name__ == "__main__":
    main()
