"""Files are whole or absent; a folder has one writer."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from twelve import files
from twelve.errors import InputError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "new" / "a.bin"
    for content in (b"one", b"two"):
        with files.atomic_write(target) as temporary:
            temporary.write_bytes(content)
            assert not target.exists() or target.read_bytes() == b"one"
        assert target.read_bytes() == content
    assert names(target.parent) == ["a.bin"]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()])
def test_a_failed_block_keeps_the_old_file(tmp_path, error):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with pytest.raises(type(error)), files.atomic_write(target) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert target.read_bytes() == b"old" and names(tmp_path) == ["a.bin"]


def test_a_killed_writer_leaves_the_old_file_and_the_next_one_sweeps(tmp_path):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    script = f"""
        import os, signal
        from twelve.files import atomic_write
        with atomic_write({str(target)!r}) as temporary:
            temporary.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(script)])
    assert process.returncode == -signal.SIGKILL
    assert target.read_bytes() == b"old" and len(names(tmp_path)) == 2
    (tmp_path / f".a.bin.{os.getpid()}.tmp").write_bytes(b"a living writer's")
    (tmp_path / ".a.bin.notes.tmp").write_bytes(b"a person's")
    with files.atomic_write(tmp_path / "b.bin") as temporary:  # another target: nothing of a.bin's is touched
        temporary.write_bytes(b"b")
    assert len(names(tmp_path)) == 5
    files._sweep(target)
    assert names(tmp_path) == [f".a.bin.{os.getpid()}.tmp", ".a.bin.notes.tmp", "a.bin", "b.bin"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a device that is always full")
def test_a_full_disk_names_the_path_and_the_free_bytes(tmp_path):
    target = tmp_path / "a.bin"
    with pytest.raises(InputError, match=r"no space left to write .*a\.bin \([\d,]+ bytes free\)") as caught:
        with files.atomic_write(target), open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")
    assert "\n" not in str(caught.value) and names(tmp_path) == []


def test_a_full_disk_told_in_words_by_a_library(tmp_path):
    with pytest.raises(InputError, match="no space left"), files.atomic_write(tmp_path / "a.bin"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")


def test_json_round_trip_keeps_hangul_readable(tmp_path):
    value = {"이름": "twelve", "n": [1, 2.5, None]}
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json") == value
    assert "이름" in (tmp_path / "a.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}", b""])
def test_broken_json_is_an_input_error(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match="a.json is not JSON") as caught:
        files.read_json(path)
    assert "\n" not in str(caught.value)


def test_missing_json_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot read .*none.json: No such file"):
        files.read_json(tmp_path / "none.json")


def test_lock_makes_the_folder_and_leaves_none_behind(tmp_path):
    folder = tmp_path / "runs" / "x"
    with files.FolderLock(folder):
        assert (folder / ".lock").read_text().strip() == str(os.getpid())
    assert names(tmp_path) == []
    folder.mkdir(parents=True)
    with files.FolderLock(folder):
        pass
    assert folder.exists()  # it was there before
    with files.FolderLock(folder):
        (folder / "kept").touch()
    assert names(folder) == ["kept"]


def test_second_lock_is_refused_and_names_the_holder(tmp_path):
    with files.FolderLock(tmp_path):
        with pytest.raises(InputError, match=f"in use by process {os.getpid()}"), files.FolderLock(tmp_path):
            pass
    with files.FolderLock(tmp_path):
        pass


def test_lock_dies_with_its_process(tmp_path):
    script = f"""
        import time
        from twelve.files import FolderLock
        with FolderLock({str(tmp_path)!r}):
            print("held", flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"process {process.pid}"), files.FolderLock(tmp_path):
            pass
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    with files.FolderLock(tmp_path):
        assert (tmp_path / ".lock").read_text().strip() == str(os.getpid())


def test_sha256_and_free_bytes(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc" * 100_000)
    assert files.sha256(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()
    assert files.free_bytes(tmp_path / "no" / "such" / "folder") > 0


def test_written_json_is_json(tmp_path):
    files.write_json(tmp_path / "a.json", {"a": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
