"""Measure one model on text, facts and tasks, a line for each measure as it comes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from twelve import tasks as known_tasks
from twelve.convert import load
from twelve.engine import Engine
from twelve.errors import InputError
from twelve.evaluate.accuracy import task_accuracy
from twelve.evaluate.bits import bits_per_byte
from twelve.evaluate.facts import CHOICES, Fact, as_told, recall
from twelve.evaluate.facts import facts as invented
from twelve.evaluate.facts import without_memory as no_memory

MAX_TOKENS = 256  # of an answer, where the task does not say


def evaluate(
    model: str | Path, texts: Sequence[str | Path] = (), tasks: Sequence[str] = (),
    languages: Sequence[str] = ("en", "ko"), levels: Sequence[int] = (1,), problems: int = 100,
    limit: int | None = None, context: int | None = None, temperature: float = 0.0, seed: int = 0,
    device: str | None = None, facts: int | None = None, without_memory: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Bits per byte of each of `texts`, recall of so many `facts` in each language, and accuracy on every task x
    language x level, with standard errors.

    `tasks` may be ("all",). Facts are those of the seed (`twelve.evaluate.facts`). without_memory: all of it with an
    Engram table of zeros. InputError when nothing was named, before the model is read.
    """
    if not texts and not tasks and not facts:
        raise InputError("nothing to measure: name --text PATH, --task NAME (or --task all), or --facts")
    names = known_tasks.names() if "all" in tasks else list(tasks)
    for name in names:
        known_tasks.get(name)
    network, tokenizer = load(model, device=device)
    if tokenizer is None:
        raise InputError(f"{model} has no tokenizer")
    result: dict[str, Any] = {"model": str(model), "seed": seed, "text": [], "facts": [], "tasks": []}
    with no_memory(network) if without_memory else nullcontext():
        for path in texts:
            bits = bits_per_byte(network, tokenizer, path, context=context, limit=limit)
            result["text"].append({"path": str(path), **bits.to_dict()})
            print(f"{path}: {bits.bits_per_byte:.4f} ± {bits.standard_error:.4f} bits a byte "
                  f"({bits.bytes:,} bytes, {bits.documents:,} documents, windows of {bits.context})")  # fmt: skip
        if facts:
            result["facts"] = _recall(network, tokenizer, invented(seed, facts, languages))
        engine = Engine(network, tokenizer)
        for name in names:
            task = known_tasks.get(name)
            spoken, most = getattr(task, "LANGUAGES", languages), getattr(task, "MAX_TOKENS", MAX_TOKENS)
            for language in [code for code in languages if code in spoken] or languages:
                for level in levels:
                    found = task_accuracy(engine, tokenizer, name, language, level, problems, seed, temperature, most)
                    result["tasks"].append(found.to_dict())
                    print(f"{name} {language} level {level}: {found.accuracy:.1%} ± {found.standard_error:.1%} "
                          f"({found.asked} problems, {found.cut_short} answers cut short)")  # fmt: skip
    result["next"] = f"twelve chat {model}"
    return result


def _recall(network, tokenizer, known: list[Fact]) -> list[dict[str, Any]]:
    """Of facts asked in a new wording, and in one that they are told in."""
    rows = []
    for wording, asked in (("new", known), ("known", as_told(known))):
        for found in recall(network, tokenizer, asked):
            rows.append({"wording": wording, **found.to_dict()})
            chosen, written = (
                f"{rows[-1][f'{how}_share']:.1%} ± {rows[-1][f'{how}_error']:.1%}" for how in ("chosen", "written")
            )
            print(f"facts {found.language}, {wording} wording: {chosen} chosen among {CHOICES}, {written} written "
                  f"({found.asked} facts)")  # fmt: skip
    return rows
