"""Measure a model on text, choices, facts and tasks, a line for each measure as it comes; or two, and compare them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from twelve import tasks as known_tasks
from twelve.convert import load, resolve
from twelve.data.reader import STDIN, find_files
from twelve.engine import Engine
from twelve.errors import InputError
from twelve.evaluate.accuracy import Accuracy, task_accuracy
from twelve.evaluate.bits import BitsPerByte, bits_per_byte
from twelve.evaluate.choices import ChoiceAccuracy, choice_accuracy
from twelve.evaluate.compare import differences
from twelve.evaluate.contaminated import overlaps
from twelve.evaluate.facts import CHOICES, Fact, Recall, as_told, recall
from twelve.evaluate.facts import facts as invented
from twelve.evaluate.facts import without_memory as no_memory
from twelve.evaluate.items import Item, read_items
from twelve.evaluate.page import write_page
from twelve.evaluate.repeats import MOST
from twelve.evaluate.statistics import Share
from twelve.files import command, write_json
from twelve.tasks import LANGUAGES

MAX_TOKENS = 256  # of an answer, where the task does not say
TEMPERATURE = 1.0  # of several samples, where none is given

Measure = BitsPerByte | ChoiceAccuracy | Accuracy | Recall


@dataclass(frozen=True)
class Wanted:
    """What a model is measured on, and how."""

    texts: Sequence[str | Path]
    choices: dict[str, list[Item]]  # by file
    tasks: Sequence[str]
    languages: Sequence[str]
    levels: Sequence[int]
    problems: int  # of a task, language and level
    limit: int | None
    context: int | None
    samples: int
    temperature: float
    seed: int
    device: str | None
    facts: list[Fact]
    without_memory: bool


def evaluate(
    model: str | Path | None, texts: Sequence[str | Path] = (), tasks: Sequence[str] = (),
    choices: Sequence[str | Path] = (), languages: Sequence[str] = LANGUAGES, levels: Sequence[int] = (1,),
    problems: int = 100, limit: int | None = None, context: int | None = None, samples: int = 1,
    temperature: float | None = None, seed: int = 0, device: str | None = None, facts: int | None = None,
    without_memory: bool = False, compare: str | Path | None = None, contamination: Sequence[str | Path] = (),
    out: str | Path | None = None, report: str | Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Bits per byte of each of `texts`, accuracy on the items of `choices`, recall of so many `facts` in each language,
    and accuracy on every task x language x level, with standard errors.

    `tasks` may be ("all",). Facts are those of the seed (`twelve.evaluate.facts`). without_memory: all of it with an
    Engram table of zeros. samples: answers to a problem, drawn at `temperature` (default: 1; a single one is greedy).
    compare: another model, measured on the same. contamination: training files in which the evaluation files are looked
    for; that alone needs no model. out: a .json file, report: an .html file, for what is returned.

    InputError before a model is read for what is not there, and for choices that cannot be read.
    """
    names = known_tasks.names() if "all" in tasks else list(tasks)
    if not (texts or names or choices or facts):
        raise InputError("nothing to measure: name --text PATH, --choices FILE, --task NAME (or all), or --facts")
    if temperature is None:
        temperature = TEMPERATURE if samples > 1 else 0.0
    if samples > 1 and not temperature:
        raise InputError(f"{samples} samples at temperature 0 are all the same: leave --temperature out, or raise it")
    if samples > MOST:
        raise InputError(f"{samples} samples: {MOST} of a problem are the most")
    for name in names:
        for language, level in product(_spoken(name, languages), levels):
            next(known_tasks.problems(name, "test", seed, [level], [language]), None)
    for path in (model, compare):
        if path is not None:
            resolve(path)
    if STDIN in map(str, texts) and (compare is not None or contamination):
        raise InputError("--text -: standard input can be read once, and this reads it twice: save it in a file")
    if contamination and STDIN in map(str, [*choices, *contamination]):
        raise InputError("--contamination wants files, whose kind is told by their names: save standard input in one")
    if held_out := find_files(texts).held_out:
        raise InputError(
            f"--text: {held_out[0]} is kept apart from the training part beside it, so a folder does not say which of "
            "the two is meant: name the files"
        )
    _check_out({"--out": out, "--report": report}, [*texts, *choices, *contamination, *_task_files(names)])
    known = invented(seed, facts, languages) if facts else []
    wanted = Wanted(texts, {str(path): _items(path, languages, limit) for path in choices}, names, languages, levels,
                    problems, limit, context, samples, temperature, seed, device, known, without_memory)  # fmt: skip
    result: dict[str, Any] = {"model": model and str(model), "seed": seed, "temperature": temperature}
    if contamination:
        result |= _overlaps(contamination, wanted)
    if model is not None:
        if compare is not None:
            print(model)
        measured = measure(model, wanted)
        result |= _as_dict(measured)
        if compare is not None:
            print(compare)
            other = measure(compare, wanted)
            result |= {"against": {"model": str(compare), **_as_dict(other)}, "comparisons": _compared(measured, other)}
        result["next"] = command("twelve", "chat", model)
    if report is not None:
        write_page(report, result)
    if out is not None:
        write_json(out, result)
    return result


def measure(model: str | Path, wanted: Wanted) -> list[tuple[str, Measure]]:
    """Every measure with its name, in an order that depends on `wanted` alone."""
    network, tokenizer = load(model, device=wanted.device)
    if tokenizer is None:
        raise InputError(f"{model} has no tokenizer")
    found: list[tuple[str, Measure]] = []
    with no_memory(network) if wanted.without_memory else nullcontext():
        for path in wanted.texts:
            bits = bits_per_byte(network, tokenizer, path, context=wanted.context, limit=wanted.limit)
            found.append((str(path), bits))
            print(f"{path}: {bits}")
        for path, items in wanted.choices.items():
            for chosen in choice_accuracy(network, tokenizer, path, items):
                found.append((f"{path} {chosen.language}", chosen))
                print(f"{path} {chosen.language}: {chosen}")
        if wanted.facts:
            found += _recall(network, tokenizer, wanted.facts)
        engine = Engine(network, tokenizer) if wanted.tasks else None
        for name in wanted.tasks:
            most = getattr(known_tasks.get(name), "MAX_TOKENS", MAX_TOKENS)
            for language in _spoken(name, wanted.languages):
                for level in wanted.levels:
                    solved = task_accuracy(engine, tokenizer, name, language, level, wanted.problems, wanted.seed,
                                           wanted.temperature, most, wanted.samples)  # fmt: skip
                    found.append((f"{name} {language} level {level}", solved))
                    print(f"{name} {language} level {level}: {solved}")
    return found


def _spoken(task: str, languages: Sequence[str]) -> Sequence[str]:
    """Those that the task has; all, where it has none of them, so that it says so."""
    spoken = getattr(known_tasks.get(task), "LANGUAGES", languages)
    return [code for code in languages if code in spoken] or languages


def _check_out(written: Mapping[str, str | Path | None], read: Sequence[str | Path]) -> None:
    """InputError for an option whose file cannot be written, or is needed."""
    files = find_files(read)
    taken = {path.resolve() for path in (*files.train, *files.held_out)}
    for option, name in written.items():
        if name is None:
            continue
        path = Path(name)
        if path.is_dir():
            raise InputError(f"{path} is a folder: name a file in it")
        for folder in path.parents:
            if folder.exists() and not folder.is_dir():
                raise InputError(f"{path} cannot be written: {folder} is a file")
        if path.resolve() in taken:
            raise InputError(f"{option} {path} is read, or written, by this, too: name another file")
        taken.add(path.resolve())


def _task_files(names: Sequence[str]) -> list[str]:
    """Of tasks, those that are rows in a file."""
    return [path for name in names if (path := name.partition("#")[0]).endswith(".jsonl")]


def _items(path: str | Path, languages: Sequence[str], limit: int | None) -> list[Item]:
    """Those of a file that are in one of the languages, or in one that is not ours."""
    items = [item for item in read_items(path) if item.language in languages or item.language not in LANGUAGES]
    if not items:
        raise InputError(f"{path} has no rows in {' or '.join(languages)}")
    return items[:limit]


def _recall(network, tokenizer, known: list[Fact]) -> list[tuple[str, Recall]]:
    """Of facts asked in a new wording, and in one that they are told in."""
    rows = []
    for wording, asked in (("new", known), ("known", as_told(known))):
        for found in recall(network, tokenizer, asked):
            name, row = f"facts {found.language}, {wording} wording", found.to_dict()
            rows.append((name, replace(found, wording=wording)))
            chosen, written = (Share(row[f"{how}_share"], row[f"{how}_error"]) for how in ("chosen", "written"))
            print(f"{name}: {chosen} chosen among {CHOICES}, {written} written ({row['asked']} facts)")
    return rows


def _as_dict(measured: Sequence[tuple[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The measures of each kind, as JSON has them."""
    found: dict[str, list[dict[str, Any]]] = {"text": [], "choices": [], "facts": [], "tasks": []}
    for name, one in measured:
        if isinstance(one, BitsPerByte):
            found["text"].append({"path": name, **one.to_dict()})
        elif isinstance(one, Recall):
            found["facts"].append({"wording": one.wording, **one.to_dict()})
        else:
            found["tasks" if isinstance(one, Accuracy) else "choices"].append(one.to_dict())
    return found


def _compared(first: Sequence[tuple[str, Any]], second: Sequence[tuple[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for (name, one), (_, other) in zip(first, second, strict=True):
        for difference in differences(name, one, other):
            rows.append(difference.to_dict())
            print(difference)
    return rows


def _overlaps(train: Sequence[str | Path], wanted: Wanted) -> dict[str, Any]:
    """Of the evaluation files; tasks that draw their problems have none, and keep what they test out of training."""
    files = [*wanted.texts, *wanted.choices, *_task_files(wanted.tasks)]
    if not files:
        raise InputError("--contamination looks for evaluation files: name some with --text, --choices or --task")
    found, short = overlaps(train, files)
    for one in found:
        print(one)
    if short:
        print(f"{short:,} of all items are too short to be looked for")
    return {"contamination": [one.to_dict() for one in found], "contamination_short": short}
