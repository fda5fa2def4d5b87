"""What the verbs say to a table that is damaged, foreign or read-only, and to a disk without room for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import twelve
from twelve.cli import main
from twelve.convert.huggingface import TABLE
from twelve.files import sha256
from twelve.rows import RowFile
from twelve.train import loop

WORDS = "배 열두 척이 새벽에 떠나고 장군은 바다를 본다. The ship sails at dawn, and the captain counts twelve. "
SHAPE = ["--width", "64", "--layers", "2", "--experts", "0", "--context", "32", "--batch", "2", "--vocab-size", "300"]
MEMORY = ["--engram-vocab-size", "197", "--engram-layers", "1", "--hc-mult", "2"]
VERBS = ["chat", "generate", "eval", "convert", "quantize", "sft", "rl"]


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A text, conversations, and a model with a table."""
    place = tmp_path_factory.mktemp("room")
    (place / "text.txt").write_text(WORDS * 40, encoding="utf-8")
    talk = [{"role": "user", "content": "ship?"}, {"role": "assistant", "content": "twelve ships sail"}]
    (place / "chats.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 4, encoding="utf-8")
    assert main(pretraining(place, place / "base")) == 0
    return place


def pretraining(room, out, steps=4):
    return ["pretrain", str(room / "text.txt"), "--out", str(out), "--steps", str(steps), *SHAPE, *MEMORY]


def tuning(room, out, model=None):
    options = ["--out", str(out), "--steps", "2", "--context", "32", "--batch", "2"]
    return ["sft", str(model or room / "base"), str(room / "chats.jsonl"), *options]


def using(verb, room, model, out):
    """A command line of the verb."""
    to = ["--out", str(out)]
    rest = {"generate": ["ship"], "eval": ["--text", str(room / "text.txt")], "convert": to, "quantize": to,
            "rl": [*to, "--task", "arithmetic", "--steps", "1"]}  # fmt: skip
    return tuning(room, out, model) if verb == "sft" else [verb, str(model), *rest.get(verb, [])]


def refused(capsys, arguments):
    """The one line that the verb says."""
    capsys.readouterr()
    assert main(arguments) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("twelve: error: ")
    return line


def resized(path):
    """A table with rows of half the width, and of the same identity."""
    file = RowFile(path)
    rows, ids, metadata = file.rows("rows"), file.rows("compressed_ids"), file.metadata
    path.unlink()
    shapes = {"rows": ("F32", (rows.count, rows.width // 2)), "compressed_ids": ("I32", (ids.count,))}
    RowFile.create(path, shapes, metadata, {"compressed_ids": ids})


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("fault", "told"),
    [("cut", "cut short"), ("longer", "something was added"), ("missing", "cannot open"), ("resized", "rows of 16"),
     ("foreign", "of another model or tokenizer")],
)  # fmt: skip
def test_a_bad_table_is_one_line_and_nothing_is_left(room, tmp_path, capsys, verb, fault, told):
    model = tmp_path / "model"
    model.mkdir()
    for file in (room / "base").iterdir():
        if file.is_file():
            (model / file.name).write_bytes(file.read_bytes())
    path, whole = model / TABLE, (model / TABLE).read_bytes()
    if fault == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif fault == "longer":
        path.write_bytes(whole + bytes(4096))
    elif fault == "missing":
        path.unlink()
    elif fault == "resized":
        resized(path)
    else:
        values = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**values, "engram_seed": 5}))
    before = path.read_bytes() if path.exists() else None
    line = refused(capsys, using(verb, room, model, tmp_path / "out"))
    assert told in line and TABLE in line
    assert (path.read_bytes() if path.exists() else None) == before
    assert not (tmp_path / "out" / "config.json").exists() and not (tmp_path / "out" / TABLE).exists()


def test_a_read_only_model_can_be_fine_tuned(room, tmp_path):
    before = sha256(room / "base" / TABLE)
    (room / "base" / TABLE).chmod(0o444)
    try:
        for name in ("one", "two"):
            assert main(tuning(room, tmp_path / name)) == 0
        assert main([*tuning(room, tmp_path / "adapted"), "--lora", "2"]) == 0
    finally:
        (room / "base" / TABLE).chmod(0o644)
    assert sha256(room / "base" / TABLE) == before == sha256(tmp_path / "adapted" / TABLE)
    assert sha256(tmp_path / "one" / TABLE) == sha256(tmp_path / "two" / TABLE) != before


def test_an_interrupted_run_with_a_read_only_table_says_so_and_can_go_on(room, tmp_path, capsys, monkeypatch):
    step = loop.Supervised.train_step

    def killed(self):
        if self.step == 2:
            raise RuntimeError("killed")
        return step(self)

    monkeypatch.setattr(loop.Supervised, "train_step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        main(pretraining(room, tmp_path / "run"))
    monkeypatch.setattr(loop.Supervised, "train_step", step)
    path = tmp_path / "run" / TABLE
    path.chmod(0o444)
    assert "read-only" in refused(capsys, pretraining(room, tmp_path / "run"))
    path.chmod(0o644)
    assert main(pretraining(room, tmp_path / "run")) == 0
    assert sha256(path) == sha256(room / "base" / TABLE)


FULL = """
import os, sys
from pathlib import Path
import torch
from twelve.cli import main
from twelve.errors import InputError
from twelve.journal import Journal
from twelve.train import loop
torch.set_num_threads({threads})
disk, base, text, chats, table = map(Path, sys.argv[1:6])
command, ballast = sys.argv[6:], disk / "ballast"

def fill(left=0):
    with open(ballast, "wb") as file:
        size = os.statvfs(disk)
        os.posix_fallocate(file.fileno(), 0, size.f_bavail * size.f_bsize - left)

def run(arguments):
    status = main(arguments)
    ballast.unlink(missing_ok=True)
    print("status", status, flush=True)

fill(table.stat().st_size // 2)
run(command)
print("left", [file.name for file in disk.rglob("*engram*")])

stops = {{"train_step": 3, "save": 4}}

def filling(name):
    real = getattr(loop.Supervised, name)
    def method(self, *arguments):
        if self.step == stops.get(name):
            del stops[name]
            fill()
        return real(self, *arguments)
    setattr(loop.Supervised, name, method)

def add(self, records, real=Journal.add):
    try:
        real(self, records)
    except InputError:
        print("left", self.path.name)
        raise

Journal.add = add
filling("train_step")
filling("save")
run(command)
run(command)
run(command)
fill(table.stat().st_size // 2)
run(["sft", str(base), str(chats), "--out", str(disk / "tuned"), "--steps", "2", "--context", "32", "--batch", "2"])
"""


def test_a_disk_that_fills_up_loses_nothing(room, tmp_path):
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs -o size=24m none "$0" && exec "$@"']
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    try:
        allowed = subprocess.run([*mount, disk, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("mounting a small file system is not allowed here")
    threads = json.loads((room / "base" / "training" / "plan.json").read_text())["threads"]
    code = FULL.format(threads=threads) + f"\nimport shutil\nshutil.copytree(disk / 'run', {str(kept)!r})\n"
    files = [disk, room / "base", room / "text.txt", room / "chats.jsonl", room / "base" / TABLE]
    done = subprocess.run(
        [*mount, disk, sys.executable, "-c", code, *files, *pretraining(room, disk / "run")], capture_output=True,
        text=True, env={**os.environ, "PYTHONPATH": str(Path(twelve.__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("twelve: error: ")]
    shown = [line for line in done.stdout.splitlines() if line.startswith(("status", "left"))]
    assert shown == ["status 2", "left []", "left engram-journal", *["status 2"] * 2, "status 0", "status 2"]
    assert all("no space" in line and f"{disk}/" in line for line in told) and len(told) == 4
    assert TABLE in told[0] and TABLE in told[3]
    assert sha256(kept / TABLE) == sha256(room / "base" / TABLE)
    assert sha256(kept / "model.safetensors") == sha256(room / "base" / "model.safetensors")
