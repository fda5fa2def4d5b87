"""Compiling once: what a power cut tore is made again, and what cannot be made is told in a line."""

import os
import shutil
from pathlib import Path

import pytest

from twelve import compiler

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None or os.environ.get("TWELVE_NATIVE") == "0",
    reason="no C++ compiler on this machine",
)


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Compile a text, in a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "FLAGS", ("-shared", "-fPIC"))
    source = tmp_path / "source.cpp"

    def compiled(text):
        source.write_text(text)
        return compiler.compile_library("thing", source, [], "compiling")

    return compiled


TWELVE = 'extern "C" int twelve() { return 12; }'


@pytest.fixture
def target(make, monkeypatch, capsys):
    """The file of the compiled text, which this process has not loaded."""
    with monkeypatch.context() as patch:
        patch.setattr(compiler.ctypes, "CDLL", Path)
        path = make(TWELVE)
    assert capsys.readouterr().err == "twelve: compiling\n"
    return path


def test_a_library_is_compiled_once(make, target, capsys):
    assert make(TWELVE).twelve() == 12 and capsys.readouterr().err == ""
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("torn", [lambda data: b"", lambda data: data[:100], lambda data: bytes(len(data))])
def test_a_torn_library_is_compiled_again(make, target, capsys, torn):
    target.write_bytes(torn(target.read_bytes()))
    assert make(TWELVE).twelve() == 12 and capsys.readouterr().err == "twelve: compiling\n"
    assert list(target.parent.iterdir()) == [target]


def test_a_folder_in_which_nothing_may_run_is_no_reason_to_compile_again(make, target, capsys):
    target.write_bytes(b"")
    target.chmod(0o644)
    assert make(TWELVE) is None
    told = capsys.readouterr().err
    assert told.startswith("twelve: going on without that, more slowly: ") and told.count("\n") == 1


def test_the_compiler_may_have_arguments(make, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "'g++' -DSHIPS=12")
    assert make('extern "C" int twelve() { return SHIPS; }').twelve() == 12
    assert compiler.cxx() == [shutil.which("g++"), "-DSHIPS=12"]
    for wrong in ("no-such-compiler -O2", "'g++"):
        monkeypatch.setenv("CXX", wrong)
        assert compiler.cxx() is None and make(TWELVE) is None


def test_a_library_is_on_the_disk_before_it_has_its_name(make, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *of, name=name, real=real: done.append(name) or real(*of))
    assert make(TWELVE).twelve() == 12 and done == ["fsync", "replace"]


def test_what_the_compiler_says_is_told(make, capsys):
    assert make("int twelve() { return ships; }") is None
    [_, told] = capsys.readouterr().err.splitlines()
    assert told.startswith("twelve: going on without that, more slowly: ") and "error: " in told and "ships" in told
