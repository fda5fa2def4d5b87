"""Benchmarks are run once in months: what they take from `twelve`, and how they call it, must be there meanwhile."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(ROOT.glob("bench/*.py")) + sorted(ROOT.glob("examples/*.py"))


def imported(name: str) -> Any:
    """The module; None where an extra that it needs is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if "not installed" in str(error):
            return None
        raise


def taken(tree: ast.AST) -> dict[str, Any]:
    """What the names stand for that a script imports from `twelve` and bench/runs.py, anywhere in it."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            ours = [alias.name for alias in node.names if alias.name.partition(".")[0] in ("twelve", "runs")]
            names |= {name.partition(".")[0]: imported(name.partition(".")[0]) for name in ours}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("twelve", "runs"):
            module = imported(node.module)
            for alias in node.names if module else ():
                found = getattr(module, alias.name, None) or imported(f"{node.module}.{alias.name}")
                names[alias.asname or alias.name] = found
    return names


def meant(node: ast.AST, names: dict[str, Any]) -> Any:
    """What an expression stands for, of names and of attributes of modules and classes; else None."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = meant(node.value, names)
        if inspect.ismodule(owner):
            return getattr(owner, node.attr)  # AttributeError: it has gone
        return getattr(owner, node.attr, None) if inspect.isclass(owner) else None
    return None


def faults(tree: ast.AST) -> Iterator[str]:
    names = taken(tree)
    for node in ast.walk(tree):
        try:
            if isinstance(node, ast.Call):
                fit(node, meant(node.func, names))
            elif isinstance(node, ast.Attribute):
                meant(node, names)
        except (AttributeError, TypeError) as error:
            yield f"line {node.lineno}: {ast.unparse(node)[:60]}: {error}"


def fit(call: ast.Call, called: Any) -> None:
    """TypeError if what is called does not take these arguments."""
    given = [None for argument in call.args if not isinstance(argument, ast.Starred)]
    named = {keyword.arg: None for keyword in call.keywords if keyword.arg}
    whole = len(given) == len(call.args) and len(named) == len(call.keywords)
    try:
        signature = inspect.signature(called)
    except (TypeError, ValueError):  # nothing that we know, or built in
        return
    (signature.bind if whole else signature.bind_partial)(*given, **named)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_what_it_calls_is_there(script, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    assert [*faults(ast.parse(script.read_text(encoding="utf-8")))] == []


def test_a_call_that_no_longer_fits_is_found(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    source = "import runs\nfrom twelve.data.shards import Shards\nShards(1, 'text', 'uint16', [])\nruns.gone()\n"
    assert [fault.partition(":")[0] for fault in faults(ast.parse(source))] == ["line 3", "line 4", "line 4"]
