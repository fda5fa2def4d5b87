"""The examples, each as its page says it is run, in tiny form."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from twelve.data.reader import find_files
from twelve.train.sft import sft

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
ALL = sorted(path.name for path in EXAMPLES.glob("*.py"))


def run(folder, name: str, *arguments: str, expect: int = 0) -> str:
    """What an example prints, run in `folder` by the commands that its docstring names."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == expect, ended.stderr
    return ended.stdout if expect == 0 else ended.stderr


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder with a model that the first example trained, and what it printed."""
    folder = tmp_path_factory.mktemp("examples")
    said = run(folder, "train_on_your_text.py", "--steps", "3", "--width", "64", "--out", "mine", "--begin", "The sea")
    return folder, said


def test_every_example_is_run_here():
    assert ALL == ["ask_a_server.py", "evaluate_models.py", "mine.py", "train_on_your_text.py"]  # mine: test_tutorial
    for name in ALL:
        source = (EXAMPLES / name).read_text(encoding="utf-8")
        assert source.startswith('"""') and len(source.splitlines()) < 70


def test_training_on_a_text_leaves_a_model_that_goes_on_writing(room):
    folder, said = room
    assert "The sea" in said and (folder / "mine" / "training" / "report.html").exists()
    assert all(tensor.isfinite().all() for tensor in load_file(folder / "mine" / "model.safetensors").values())


def test_models_are_measured_side_by_side(room):
    said = run(room[0], "evaluate_models.py", "mine", "mine", "--task", "arithmetic", "--problems", "1")
    lines = [line for line in said.splitlines() if line.startswith("mine ")]
    assert len(lines) == 8 and sum("bits a byte" in line for line in lines) == 4 and "nan" not in said
    assert lines[:4] == lines[4:]
    (room[0] / "book.txt").write_text("The sea was grey.\n")
    said = run(room[0], "evaluate_models.py", "mine", "--text", "book.txt")
    assert said.splitlines()[-1].endswith(" bits a byte") and "±" not in said


def test_a_server_is_asked_by_the_openai_client(room):
    folder, _ = room
    torch.set_num_threads(1)
    chats = str(EXAMPLES / "chats.jsonl")
    sft(folder / "mine", [chats], folder / "chatty", steps=2, batch=4, context=64, quiet=True)
    said = run(folder, "ask_a_server.py", "chatty", "Who mends the nets?", "--max-tokens", "8")
    assert said.strip()


def test_the_sample_texts_keep_some_for_measuring():
    files = find_files([EXAMPLES / "texts"])
    assert [path.name for path in files.train] == ["en-train.txt", "ko-train.txt"]
    assert [path.name for path in files.held_out] == ["en-val.jsonl", "ko-val.jsonl"]
