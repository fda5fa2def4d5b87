"""The guide: both languages say the same, and its way can be gone, here with less of everything."""

import json
import re
import shutil
from pathlib import Path

import pytest
from test_readme import blocks, commands

from twelve import cli

HERE = Path(__file__).resolve().parent
GUIDES = [HERE.parent / "docs" / "guide.md", HERE.parent / "docs" / "guide.ko.md"]
ELSEWHERE = {"doctor", "pull", "chat", "serve", "rl", "distill"}  # run by their own tests


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_every_command_can_be_typed(path):
    assert {command[0] for command in commands(path)} == ELSEWHERE | {
        "plan", "pretrain", "generate", "sft", "filter", "eval", "quantize", "convert",
    }  # fmt: skip
    for command in commands(path):
        cli.build_parser().parse_args(command)


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_commands_within_the_text_can_be_typed(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    typed = re.findall(r"`twelve ([a-z][^`]*)`", text)
    assert typed
    for command in typed:
        cli.build_parser().parse_args(command.split())


def test_both_languages_go_the_same_way():
    english, korean = GUIDES
    assert blocks(english, "sh") == blocks(korean, "sh")
    marks = (r"^## ", r"^\*\*", r"^```", r"\]\(")
    shapes = [[len(re.findall(mark, path.read_text(encoding="utf-8"), re.MULTILINE)) for mark in marks]
              for path in GUIDES]  # fmt: skip
    assert shapes[0] == shapes[1]
    options = [set(re.findall(r"--[a-z]+", path.read_text(encoding="utf-8"))) for path in GUIDES]
    assert options[0] == options[1]


def test_the_way_from_a_text_to_models_of_other_sizes(tmp_path, monkeypatch, capsys):
    """Every command in its order, but for those that other tests run: a few steps in place of minutes."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(HERE.parent / "examples", "examples")
    shutil.copytree("examples/texts", "my-texts")
    for command in commands(GUIDES[0]):
        if command[0] in ELSEWHERE:
            continue
        capsys.readouterr()
        status = cli.main([*_smaller(command), "--json"])
        said = capsys.readouterr()
        assert status == 0, (command, said.err)
        assert isinstance(json.loads(said.out.splitlines()[-1]), dict)
    for made in ("mine", "harbour", "mine-4bit", "smaller", "deeper", "smaller-trained"):
        assert Path("runs", made, "config.json").exists()
    assert Path("mine.gguf").exists() and Path("clean.html").exists() and Path("best.jsonl").exists()
    layers = [json.loads(Path("runs", made, "config.json").read_text())["num_hidden_layers"]
              for made in ("smaller", "deeper", "smaller-trained")]  # fmt: skip
    assert layers == [1, 8, 1]


def _smaller(command: list[str]) -> list[str]:
    command = list(command)
    if "--minutes" in command and command[0] != "plan":
        at = command.index("--minutes")
        command[at : at + 2] = ["--steps", "2"]
    if command[0] in ("pretrain", "sft"):
        command += ["--batch", "2", "--context", "128"]
    if command[0] == "pretrain" and "--from" not in command:
        command += ["--width", "64", "--layers", "3", "--vocab-size", "400"]
    if "--problems" in command:
        command[command.index("--problems") + 1] = "2"
    if "--audit" in command:
        command += ["--wrong-answers", "100"]
    return command
