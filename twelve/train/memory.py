"""The table of a run's memory (Engram): its place in the run's folder, and what is said of it before the first step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from twelve.convert.huggingface import TABLE
from twelve.model import Transformer
from twelve.plan.memory import TablePlan, distinct_ngrams

JOURNAL = Path("training", "engram-journal")
SAMPLED_BATCHES = 64


def own_table(model: Transformer, folder: Path) -> None:
    """Have the model's memory read a table file in the run's `folder`, which training changes in place: the one of an
    interrupted run, else a copy of the model's, or zeros where it has none yet.

    A model of which only adapters are trained keeps the table that it has, as it is. InputError for a table that does
    not fit, or no space for one.
    """
    memory, path = model.memory, folder / TABLE
    if memory is None or not all(parameter.requires_grad for parameter in model.parameters()):
        return
    if memory.table is not None and memory.table.path == path:
        return
    if not (folder / JOURNAL).exists():  # no step was made, whatever lies there
        path.unlink(missing_ok=True)
    if path.exists():
        memory.open(path, writable=True)
    elif memory.table is None:
        memory.create(path)
    else:
        memory.table.save_as(path)
        memory.open(path, writable=True)


def describe_table(model: Transformer, batches: Callable[[int], Any]) -> dict[str, str]:
    """Lines for the plan: what the memory takes, and how many n-grams of a sample of the data must share a row."""
    first = batches(0)
    parts = [first, *map(batches, range(1, SAMPLED_BATCHES))]
    ids = model.memory.compressed[np.concatenate([part.ids.numpy() for part in parts])]
    documents = np.concatenate([part.documents.numpy() for part in parts])
    ngrams = range(2, model.config.engram_max_ngram_size + 1)
    distinct = {n: distinct_ngrams(ids, documents, n) for n in ngrams}
    plan = TablePlan(model.config, model.memory.hash.total_rows)
    return plan.lines(first.ids.numel(), distinct, ids.size)
