"""Model cards: the README.md of a model folder, in the form of Hugging Face's hub, a YAML head and a text after it."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import twelve
from twelve.config import ModelConfig
from twelve.convert.folder import pulled_name, resolve
from twelve.convert.gguf import GGUFFile
from twelve.errors import InputError

HUB_NAMES = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # of models that come in packages
RELATIONS = {"sft": "finetune", "rl": "finetune", "distill": "finetune", "quantize": "quantized"}  # the hub's words
LIMITS = "It repeats the mistakes and prejudices of its data, knows little, and states falsehoods fluently."


def render(
    folder: str | Path, made: str, *, verb: str, config: ModelConfig, parents: Sequence[str | Path] = (),
    data: Sequence[str] = (), seed: int | None = None, languages: Iterable[str] = (),
    measured: Mapping[str, Any] | Sequence[Mapping[str, Any]] = (), options: Mapping[str, Any] | None = None,
    limits: str = "", packed: bool = False, chats: bool = True,
) -> str:  # fmt: skip
    """The card of the model in `folder`, which `made` describes in a sentence or two.

    parents: models that it was made from, the first of which hands its licence and languages on. data: lines, as
    `sources` has them. seed: None where nothing was drawn. measured: name -> value, or the rows of a table. options:
    what the verb was asked for. packed: its weights are not floats. chats: whether it answers conversations.
    """
    name = Path(folder).resolve().name
    known = origin(parents[0]) if parents else {}
    others_read = config.is_plain and not packed
    head: dict[str, Any] = {
        "library_name": "transformers" if others_read else "twelve", "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys(["twelve", verb, config.model_type])),
        "language": sorted(languages) or known.get("language"),
        "license": next(iter(known.get("license", ())), None), "base_model": known.get("base_model"),
    }  # fmt: skip
    if head["base_model"]:
        head["base_model_relation"] = RELATIONS.get(verb)
    if parents:
        head["parent"] = str(parents[0])
    yaml = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items() if value)
    run = f"twelve chat {name}" if chats else f'twelve generate {name} "..."'
    readers = "Only twelve reads this folder: another loader refuses it."
    if others_read:
        readers = f"transformers reads it, too: `AutoModelForCausalLM.from_pretrained('{name}')`."
    parts = [
        f"---\n{yaml}\n---", f"# {name}", f"{made} Made with twelve {version()}.",
        "## Run it", f"```sh\n{run}\n```", readers,
        "## Origin",
        _pairs({"parent": ", ".join(f"`{parent}`" for parent in parents) or "none: it began at random",
                "seed": "none: nothing was drawn" if seed is None else seed}),
    ]  # fmt: skip
    if data:
        parts += ["Data:", "\n".join(f"- {line}" for line in data)]
    if measured:
        parts += ["## Measurements", _pairs(measured) if isinstance(measured, Mapping) else _table(measured)]
    if options:
        given = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in options.items()
                          if value is not None)  # fmt: skip
        parts += [f"## Options of `twelve {verb}`", f"```yaml\n{given}\n```"]
    return "\n\n".join([*parts, "## Limits", limits or LIMITS]) + "\n"


def _pairs(values: Mapping[str, Any]) -> str:
    return _lines([["", ""], ["---", "---"], *([_cell(name), _cell(value)] for name, value in values.items())])


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    return _lines([list(rows[0]), ["---"] * len(rows[0]), *(map(_cell, row.values()) for row in rows)])


def _lines(rows: Iterable[Iterable[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if type(value) is int and value >= 10_000 else str(value).replace("|", "\\|")


def sources(paths: Iterable[str | Path], data: Mapping[str, Any]) -> list[str]:
    """Lines on the files of a run's data, with the licence that is stated beside them, and on what they came to: bytes,
    documents, tokens, and the SHA-256 of these."""
    lines = [f"`{path}`: {_licence(Path(path))}" for path in paths]
    counts = f"{data['bytes']:,} bytes of text, {data['documents']:,} documents, {data['tokens']:,} tokens"
    return [*lines, f"together {counts}; SHA-256 of the tokens `{data['sha256']}`"]


def _licence(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    names = sorted(file.name for file in folder.glob("*") if re.match("licen[cs]e|copying", file.name, re.IGNORECASE))
    if str(path) != "-" and (stated := front_matter(folder).get("license")):
        return f"licence {', '.join(stated)}, as the card beside it says"
    if str(path) != "-" and names:
        return f"`{names[0]}` lies beside it"
    return "no licence is stated beside it; it is its owner's"


def origin(model: str | Path) -> dict[str, list[str]]:
    """What is known of a parent: `license`, `language` and `base_model`, its name on the hub or that of its own."""
    try:
        path = resolve(model)
        said = {} if path.is_dir() else GGUFFile(path).metadata
    except InputError:  # it has gone since
        return {}
    home = path if path.is_dir() else path.parent
    found = front_matter(path) if path.is_dir() else {}
    licence, languages = said.get("general.license"), said.get("general.languages")
    found |= {"license": [licence]} if isinstance(licence, str) else {}
    found |= {"language": [str(word) for word in languages]} if isinstance(languages, list) else {}
    name = pulled_name(home) or HUB_NAMES.get(str(model))
    return found | ({"base_model": [name]} if name else {})


def front_matter(folder: Path) -> dict[str, list[str]]:
    """The keys and values at the head of a folder's README.md, as far as they are words or lists of words."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    head = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    values: dict[str, list[str]] = {}
    key = ""
    for line in head[1].splitlines() if head else ():
        if found := re.match(r"(\w+):\s*(.*)", line):
            key, line = found[1], found[2].strip("[]")
            values[key] = [word for part in line.split(",") if (word := part.strip(" \"'"))]
        elif found := re.match(r"\s*- ([^:]+)$", line):
            values.setdefault(key, []).append(found[1].strip(" \"'"))
    return {key: words for key, words in values.items() if words}


def version() -> str:
    """Of twelve, with the commit where it runs from a repository."""
    root = Path(twelve.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return twelve.__version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return twelve.__version__
    return f"{twelve.__version__} (commit {said})"
