"""The HTML report of an evaluation: bars with their standard errors, pass@k by k, comparisons, overlaps, answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from twelve import report

Result = Mapping[str, Any]


def write_page(path: str | Path, result: Result) -> None:
    """Write what `evaluate` returned as one HTML file."""
    models = [result, *([result["against"]] if "against" in result else [])] if result["model"] else []
    sections: list[report.Section] = []
    if models:
        drawn = [_bits(models), _choices(models), _tasks(models), _facts(models), *_repeats(result)]
        sections.append(("Measured, ± one standard error", [piece for piece in drawn if piece]))
    if result.get("comparisons"):
        rows = [
            {"measure": row["measure"], "first": row["first"], "second": row["second"],
             "difference": row["difference"], "± s.e.": row["standard_error"], "p": row["p_value"],
             "test": row["test"], "items": row["items"]}
            for row in result["comparisons"]
        ]  # fmt: skip
        caption = f"{result['model']} (first) against {result['against']['model']} (second), on the same items"
        sections.append(("Comparison", [report.table(rows, caption)]))
    if result.get("contamination"):
        sections.append(("Evaluation files in training text", _overlaps(result["contamination"])))
    if models and (samples := [*_answers(result), *_chosen(result)]):
        sections.append(("The first answers of each kind as they came", [report.samples(samples)]))
    run = {"model": result["model"] or "", "seed": result["seed"], "temperature": result["temperature"]}
    sections.append(("Run", [report.facts(run)]))
    report.write_report(path, "Evaluation", sections, result["model"] or "")


def _labels(paths: Iterable[str]) -> dict[str, str]:
    """Each by its last part, if no other has the same."""
    known = list(dict.fromkeys(map(str, paths)))
    short = [Path(path).name for path in known]
    return {path: name if short.count(name) == 1 else path for path, name in zip(known, short, strict=True)}


def _drawn(
    models: Sequence[Result], kind: str, title: str, unit: str, high: float | None,
    told: Callable[[Result, dict[str, str]], Iterable[tuple[str, report.Bar]]],
) -> str:  # fmt: skip
    """Bars of all rows of a kind: what `told` makes of a row and the names of all files."""
    by_model = _labels(model["model"] for model in models)
    by_file = _labels(row[key] for model in models for row in model[kind] for key in ("path", "task") if key in row)
    values = [
        (name if len(models) == 1 else f"{name}, {by_model[model['model']]}", bar)
        for model in models for row in model[kind] for name, bar in told(row, by_file)
    ]  # fmt: skip
    return report.bars(title, values, unit, high) if values else ""


def _bits(models: Sequence[Result]) -> str:
    def told(row, files):
        yield files[row["path"]], (row["bits_per_byte"], row["standard_error"])

    return _drawn(models, "text", "Bits per byte", "less is better", None, told)


def _choices(models: Sequence[Result]) -> str:
    def told(row, files):
        for how in ("", "_by_byte"):
            name = f"{files[row['path']]} {row['language']}{how.replace('_', ' ')}"
            yield name, (row[f"accuracy{how}"], row[f"standard_error{how}"])

    return _drawn(models, "choices", "Right choices", "by likelihood", 1.0, told)


def _tasks(models: Sequence[Result]) -> str:
    def told(row, files):
        yield f"{files[row['task']]} {row['language']} level {row['level']}", (row["accuracy"], row["standard_error"])

    return _drawn(models, "tasks", "Right answers", "", 1.0, told)


def _facts(models: Sequence[Result]) -> str:
    def told(row, files):
        yield f"{row['language']}, {row['wording']} wording", (row["chosen_share"], row["chosen_error"])

    return _drawn(models, "facts", "Facts recalled", "chosen by likelihood", 1.0, told)


def _repeats(result: Result) -> list[str]:
    """A figure for each task and level: pass@k and maj@k by k, each language a line."""
    figures: dict[str, dict[str, report.Points]] = {}
    for row in result["tasks"]:
        for kind in ("pass", "maj"):
            found = {
                int(name.partition("@")[2]): measure["value"]
                for name, measure in row["measures"].items() if name.startswith(f"{kind}@")
            }  # fmt: skip
            if found:
                lines = figures.setdefault(f"{Path(row['task']).name}, level {row['level']}", {})
                lines[f"{kind}@k {row['language']}"] = list(found), list(found.values())
    return [report.curve(title, lines, x_label="k") for title, lines in figures.items()]


def _overlaps(rows: Sequence[Result]) -> list[str]:
    table = [{"file": row["path"], "items": row["items"], "found": row["found"], "share": row["share"]} for row in rows]
    shown = [{"note": each["where"], "text": each["shared"]} for row in rows for each in row["examples"]]
    return [report.table(table), *([report.samples(shown)] if shown else [])]


def _answers(result: Result) -> list[dict[str, Any]]:
    return [
        {"prompt": sample["prompt"], "reasoning": sample["reasoning"], "text": sample["text"],
         "correct": sample["score"] == 1, "note": f"{row['task']}, {row['language']}, level {row['level']}"}
        for row in result["tasks"] for sample in row["samples"][:2]
    ]  # fmt: skip


def _chosen(result: Result) -> list[dict[str, Any]]:
    return [
        {"prompt": sample["prompt"], "correct": sample["right"] == 1, "note": f"{row['path']}, {row['language']}",
         "text": "\n".join(
             f"{nats:9.2f}  {choice}{'  (right)' if number == sample['answer'] else ''}"
             for number, (nats, choice) in enumerate(zip(sample["nats"], sample["choices"], strict=True))
         )}
        for row in result["choices"] for sample in row["samples"][:2]
    ]  # fmt: skip
