"""Both READMEs say the same, and what they say can be typed."""

import re
import shlex
from pathlib import Path

import pytest

from twelve import cli, parser

ROOT = Path(__file__).resolve().parents[1]
READMES = [ROOT / "README.md", ROOT / "README.ko.md"]
VERBS = re.findall(r"^  (\w+) ", parser.DESCRIPTION, flags=re.MULTILINE)


def blocks(path: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def commands(path: Path) -> list[list[str]]:
    """Every `twelve ...` line, without its remark."""
    lines = [line for block in blocks(path, "sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("twelve ")]


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_every_command_can_be_typed(path):
    assert len(commands(path)) >= 6
    for command in commands(path):
        cli.build_parser().parse_args(command)


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_every_verb_is_told(path):
    text = path.read_text(encoding="utf-8")
    assert [verb for verb in VERBS if f"`{verb}`" not in text] == []


@pytest.mark.parametrize("path", [*READMES, *(ROOT / "docs").glob("*.md")], ids=lambda path: path.name)
def test_every_link_leads_somewhere(path):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_both_languages_have_the_same_parts():
    english, korean = READMES

    def shape(path):
        marks = (r"^## ", r"^- ", r"^\| ", r"^```", r"\]\(")
        return [len(re.findall(mark, path.read_text(encoding="utf-8"), flags=re.MULTILINE)) for mark in marks]

    assert shape(english) == shape(korean)
    assert commands(english) == commands(korean)


def test_the_front_page_is_short():
    first = READMES[0].read_text(encoding="utf-8").split("\n## ")[0]
    assert "pip install ." in first and "twelve demo" in first and "What it is not" in first
    assert len(first.splitlines()) <= 50
