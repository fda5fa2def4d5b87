"""Selection of pages: what reading only a share of a long past gives, and what it loses.

    python bench/selection.py [MODEL --text FILE] [--recall FOLDER] [--rounds 5] [--threads N] [--json FILE]

MODEL with --text: decoding at the end of its context, and bits per byte of the last quarter of long windows. --recall,
a model of bench/recall.py: how many of the values told at the beginning are found again. "all" reads every page; the
first page and the last few are read at any share. As in bench/engine.py: medians (slowest-fastest) over rounds.
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np
import torch
from engine import decoding, interleave, median, perform, shared_options, show, spread, with_tokenizer
from recall import LENGTHS, recall_batch

from twelve.convert import load
from twelve.engine import Engine, make_engine
from twelve.engine.runner import PAGE, Runner, Step, make_runner
from twelve.errors import InputError
from twelve.evaluate.bits import _texts

SHARES = {"all": None, "0.5": 0.5, "0.25": 0.25, "0.125": 0.125}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=[shared_options()])
    parser.add_argument("model", metavar="MODEL", nargs="?")
    parser.add_argument("--text", metavar="FILE", help="for MODEL")
    parser.add_argument("--recall", metavar="FOLDER", help="a model of bench/recall.py")
    parser.add_argument("--context", type=int, default=8192, help="tokens, as far as the model's context allows")
    parser.add_argument("--windows", type=int, default=2, help="of --text, for bits per byte")
    options = parser.parse_args()
    if bool(options.model) != bool(options.text) or not (options.model or options.recall):
        parser.error("give a MODEL with --text FILE, or --recall FOLDER, or both")
    tables = {"text": on_text} if options.model else {}
    if options.recall:
        tables["recall"] = on_recall
    perform(parser, options, lambda options: {name: table(options) for name, table in tables.items()})


def on_text(options: argparse.Namespace) -> dict:
    model, tokenizer = with_tokenizer(options.model, packed=True, text=True)
    context, count = min(options.context, model.config.max_position_embeddings), 32
    texts = sorted(_texts([options.text], None), key=len, reverse=True)  # long documents have a past to look back to
    ids: list[int] = []
    for text in texts:
        if len(ids) < options.windows * context:
            ids += [*tokenizer.start_ids, *tokenizer.encode(text, control=False)]
    windows = [ids[i * context : (i + 1) * context] for i in range(options.windows)]
    if len(windows[-1]) < context:
        raise InputError(f"--text has {len(ids):,} tokens: {options.windows} windows of {context:,} need more")
    prompt = ids[: (context - count - 2) // PAGE * PAGE + 1]  # all but one token in whole pages: found in the cache
    engines = {name: make_engine(model, tokenizer, selection=share, speculation="off")
               for name, share in SHARES.items()}  # fmt: skip

    def measure(engine: Engine) -> dict[str, float]:
        speed = decoding(engine, [prompt], count)
        read, past = engine.runner.pages_read
        return {"tokens_per_second": speed, "read": (read / past if past else 1.0) * (len(prompt) + count / 2)}

    runs = interleave({name: lambda engine=engine: measure(engine) for name, engine in engines.items()}, options.rounds)
    last, summary, rows = context // 4, {}, []
    size = sum(len(tokenizer.decode_bytes(one[-last:])) for one in windows)
    for name, engine in engines.items():
        began = time.perf_counter()
        scores = engine.score(windows)
        taken = time.perf_counter() - began
        ratio = -sum(float(one[-last:].sum()) for one in scores) / math.log(2) / size
        summary[name] = {"bits_per_byte": ratio, "reading_tokens_per_second": len(windows) * context / taken}
        loss = ratio - summary["all"]["bits_per_byte"]
        rows.append([name, f"{median(runs[name], 'read'):,.0f}", spread(runs[name], "tokens_per_second", ".1f"),
                     f"{median(runs[name], 'tokens_per_second') / median(runs['all'], 'tokens_per_second'):.2f}",
                     f"{summary[name]['reading_tokens_per_second']:,.0f}", f"{ratio:.4f}", f"{loss:+.4f}"])  # fmt: skip
    show("share of the past", ["tokens read a step", "decoding, tokens/s", "ratio", "scoring, tokens/s", "bits/byte",
                               "loss"], rows)  # fmt: skip
    print(f"decoding {count} tokens after {len(prompt):,}; bits per byte of the last {last:,} tokens of "
          f"{len(windows)} windows of {context:,}, scored once")  # fmt: skip
    return {"runs": runs, "summary": summary}


def on_recall(options: argparse.Namespace) -> dict:
    model, _ = load(options.recall, device="cpu")
    batch = recall_batch(4, LENGTHS[-1], torch.Generator().manual_seed(1)).numpy()
    runners, summary, rows = {}, {}, []
    for name, share in SHARES.items():
        runner = runners[name] = make_runner(model, model.config.vocab_size, share)
        runner.allocate(batch.shape[1] // PAGE)
        right = [recalled(runner, ids) for ids in batch]
        read, past = runner.pages_read
        summary[name] = {"recall": float(np.mean(right)), "share_read": read / past if past else 1.0}
    count = 4 * PAGE

    def decode_last(runner: Runner, ids: np.ndarray) -> dict[str, float]:
        began = time.perf_counter()
        for position in range(len(ids) - count, len(ids)):
            runner.step(rows_of(ids, position, position + 1, [0]))
        speed = count / (time.perf_counter() - began)
        read, past = runner.pages_read
        return {"tokens_per_second": speed, "read": (read / past if past else 1.0) * (len(ids) - count / 2)}

    variants = {name: lambda runner=runner: decode_last(runner, batch[-1]) for name, runner in runners.items()}
    runs = interleave(variants, options.rounds)
    for name, found in summary.items():
        rows.append([name, f"{median(runs[name], 'read'):,.0f}", f"{found['share_read']:.1%}",
                     spread(runs[name], "tokens_per_second"), f"{found['recall']:.2%}",
                     f"{found['recall'] - summary['all']['recall']:+.2%}"])  # fmt: skip
    show("share of the past", ["tokens read a step", "of all, second half", "decoding, tokens/s", "recall", "loss"],
         rows)  # fmt: skip
    print(f"{len(batch)} sequences of {LENGTHS[-1]} pairs and as many questions, earlier answers given; decoding: the "
          f"last {count} of {batch.shape[1]:,} tokens, one by one")  # fmt: skip
    return {"runs": runs, "summary": summary}


def rows_of(ids: np.ndarray, start: int, end: int, drawn: list[int]) -> Step:
    """Rows start to end of one sequence that has the pool's pages in order; greedy after the rows `drawn`."""
    zeros = np.zeros(len(drawn), np.float32)
    return Step(tokens=ids[start:end], starts=np.array([0, end - start]), positions=np.array([start]),
                pages=np.arange(-(-len(ids) // PAGE), dtype=np.int32)[None], drawn=np.array(drawn, np.int64),
                temperature=zeros, top_p=zeros + 1, keys=np.zeros((len(drawn), 4), np.uint32))  # fmt: skip


def recalled(runner: Runner, ids: np.ndarray, chunk: int = 256) -> float:
    """Share of the values in the second half that are the most likely token after their keys."""
    half, right = len(ids) // 2, 0
    for start in range(0, len(ids), chunk):
        asked = np.arange(max(start, half), start + chunk, 2)
        tokens, _ = runner.step(rows_of(ids, start, start + chunk, list(asked - start)))
        right += int((tokens == ids[asked + 1]).sum())
        if start + chunk == half:
            _ = runner.pages_read  # counts from here
    return right / (half // 2)


if __name__ == "__main__":
    main()
