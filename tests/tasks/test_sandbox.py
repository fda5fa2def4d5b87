"""The sandbox: right code passes, harmful code is contained and fails, and no code passes by fraud."""

import os
import socket
import sys
import time
from pathlib import Path

import pytest

from twelve.errors import InputError
from twelve.tasks import sandbox
from twelve.tasks.sandbox import judge, run_tests

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or bool(sandbox.isolation_faults()), reason="this machine cannot isolate"
)
TESTS = "assert double(2) == 4\nassert double(-1) == -2"
RIGHT = "def double(x): return 2 * x"
LIMITS = {"seconds": 1, "memory": 256 << 20}


def test_right_code_passes_and_wrong_code_does_not():
    assert run_tests(RIGHT, TESTS)
    assert not run_tests("def double(x): return x + 2", TESTS)
    assert judge("def double(x): return x + 2", TESTS).reason == "test line 2: AssertionError"
    for broken in ("", "def double(x)", "double = 3", "def double(): return 4", "1 / 0", "\0", "x" * 200_000):
        assert not run_tests(broken, TESTS)


def test_what_a_test_may_say():
    source = """
import math, collections
def parts(text): return dict(collections.Counter(text))
def root(x):
    if x < 0: raise ValueError("negative")
    return math.sqrt(x)
def every(*values, start=0): return [*values], {start}, (None, True, 1.5, "한\\n글", b"x")
"""
    tests = """
import math
def check(function):
    for n in range(3):
        assert math.isclose(function(n * n), n)
check(root)
assert parts("abba") == {"a": 2, "b": 2}
assert every(1, [2], start=3) == ([1, [2]], {3}, (None, True, 1.5, "한\\n글", b"x"))
try:
    root(-1)
except ValueError as error:
    assert "negative" in str(error)
else:
    raise AssertionError
"""
    assert judge(source, tests).reason == ""
    assert judge(source, "assert 1 + 1 == 2").reason == "the tests call nothing of the code"
    with pytest.raises(InputError, match="the tests are not Python"):
        run_tests(source, "assert (")


# --- harm -------------------------------------------------------------------------------------------------------------

HARM = {
    "fork bomb": "import os\nwhile True: os.fork()",
    "threads": "import threading\nwhile True: threading.Thread(target=input).start()",
    "programs": "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'true'])",
    "memory bomb": "hold = []\nwhile True: hold.append(bytearray(1 << 24))",
    "endless loop": "while True: pass",
    "endless loop, deaf": "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
    "recursion": "def f(): f()\nf()",
    "large file": "f = open('large', 'wb')\nwhile True: f.write(bytes(1 << 20))",
    "many files": "import itertools\nfor n in itertools.count(): open(str(n), 'wb').write(bytes(1 << 20))",
    "exit": "import os\nos._exit(0)",
    "system exit": "raise SystemExit(0)",
    "abort": "import os\nos.abort()",
    "crash": "import ctypes\nctypes.string_at(0)",
}


@pytest.mark.parametrize("harm", HARM)
def test_harm_is_contained_and_is_a_failed_answer(harm):
    begun = time.monotonic()
    assert not run_tests(f"{HARM[harm]}\n{RIGHT}", TESTS, **LIMITS)
    in_call = "\n".join("    " + line for line in HARM[harm].splitlines())
    assert not run_tests(f"def double(x):\n{in_call}\n    return 2 * x", TESTS, **LIMITS)
    assert time.monotonic() - begun < 2 * 4.5
    assert run_tests(RIGHT, TESTS)


def test_sleeping_ends_by_the_clock():
    assert "still running" in judge("import time\ntime.sleep(1000)", TESTS, seconds=0.1).reason


def test_nothing_outside_of_the_folder_is_written(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("old")
    source = f"""
import os, shutil
from pathlib import Path
def attempt(what):
    try:
        eval(what)
    except OSError:
        return "refused"
kept, new = Path({str(kept)!r}), Path({str(tmp_path / "new")!r})
"""
    attempts = (
        "kept.write_text('new')", "kept.open('a')", "kept.unlink()", "kept.chmod(0)", "kept.rename(new)", "new.mkdir()",
        "os.truncate(kept, 0)", "os.utime(kept)", "os.link(kept, new)", "os.symlink(kept, new)", "os.mkfifo(new)",
        "os.open(kept, os.O_TRUNC)", "shutil.rmtree(kept.parent)", "os.chroot('.')", "os.setxattr(kept, 'user.x', b'')",
        "kept.read_text()", "Path('/proc/self/environ').read_bytes()", "os.listdir('/')", "os.rename('.', new)",
        "os.memfd_create('x')", "open('/dev/shm/twelve-new', 'w')", "open('/etc/passwd').read()",
    )  # fmt: skip
    for what in attempts:
        assert judge(source, f"assert attempt({what!r}) == 'refused'").reason == "", what
    assert list(tmp_path.iterdir()) == [kept]
    assert kept.read_text() == "old"
    assert run_tests(source, "assert attempt(\"open('mine', 'w').write('x')\") is None")


def test_no_network():
    with socket.socket() as listener, socket.socket(socket.AF_UNIX) as hidden:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        hidden.bind("\0twelve-test")  # an abstract name is no file
        hidden.listen()
        for family, address in (("AF_INET", listener.getsockname()), ("AF_UNIX", "\0twelve-test")):
            source = f"""
import socket
def reach():
    try:
        socket.socket(socket.{family}).connect({address!r})
    except OSError:
        return "refused"
"""
            assert run_tests(source, "assert reach() == 'refused'")
        for end in (listener, hidden):
            end.settimeout(0)
            with pytest.raises(BlockingIOError):
                end.accept()


def test_no_environment_no_descriptors(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "hidden")
    inherited = os.open(__file__, os.O_RDONLY)
    os.set_inheritable(inherited, True)
    source = """
import os
def environment(): return sorted(os.environ)
def open_descriptors():
    found = []
    for n in range(64):
        try:
            os.fstat(n)
            found.append(n)
        except OSError: pass
    return found
"""
    assert judge(source, "assert not set(environment()) - {'LC_CTYPE'}").reason == ""
    assert judge(source, "assert len(open_descriptors()) <= 5").reason == ""  # 0 to 2 are nothing, two are its pipes
    os.close(inherited)


def test_the_parent_and_its_folder_survive():
    source = f"""
import os, signal, shutil
for process in ({os.getpid()}, os.getppid(), 1, 0, -1):
    try: os.kill(process, signal.SIGKILL)
    except OSError: pass
shutil.rmtree(os.getcwd(), ignore_errors=True)
try: os.rmdir(os.getcwd())
except OSError: pass
"""
    assert run_tests(source + RIGHT, TESTS)  # nothing happened
    assert not list(Path(sandbox.tempfile.gettempdir()).glob("twelve-*/own"))


# --- fraud ------------------------------------------------------------------------------------------------------------

FRAUD = {
    "equal to all": "class Yes:\n    __eq__ = lambda *_: True\n    __hash__ = None\ndef double(x): return Yes()",
    "equal number": "class Yes(int):\n    __eq__ = lambda *_: True\ndef double(x): return Yes(x)",
    "own assertion": "import builtins\nbuiltins.AssertionError = Warning\ndef double(x): return 3",
    "own equality": "import builtins\nbuiltins.int = str\ndef double(x): return 3",
    "prints success": "import os\nfor n in range(64):\n    try: os.write(n, b'\"\"')\n    except OSError: pass\n"
    "os._exit(0)",
    "exits in a call": "import os\ndef double(x): os._exit(0)",
    "raises in a call": "def double(x): raise SystemExit(0)",
    "assertion in a call": "def double(x): raise AssertionError",
    "looks at frames": "import sys, gc\ndef double(x):\n    frame = sys._getframe()\n    while frame:\n"
    "        if 'tests' in frame.f_locals: return 2 * x\n        frame = frame.f_back\n    return 3",
    "looks at memory": "import gc\ndef double(x):\n"
    "    seen = [o for o in gc.get_objects() if '4 == )2(elbuod'[::-1] in repr(o)[:99]]\n"
    "    return 2 * x if seen else 3",
    "shadows a builtin": "abs = all = lambda *_: True\ndef double(x): return 3",
    "long value": "def double(x): return 'x' * 10_000_000",
    "deep value": "def double(x):\n    for _ in range(90): x = [x]\n    return x",
    "deep text": "class Deep(list):\n    __repr__ = lambda self: '(' * 100_000\ndef double(x): return Deep()",
    "two lines": "class Two(int):\n    __repr__ = lambda self: '3)\\n(\"value\", 4)'\ndef double(x): return Two()",
}  # fmt: skip


@pytest.mark.parametrize("fraud", FRAUD)
def test_fraud_is_a_failed_answer(fraud):
    assert not run_tests(FRAUD[fraud], TESTS + "\nassert all([double(5) == 10])", **LIMITS)


# --- where it cannot be contained -------------------------------------------------------------------------------------


def test_it_refuses_where_it_cannot_isolate(monkeypatch):
    monkeypatch.setattr(sandbox, "_faults", ["could use the network"])
    with pytest.raises(InputError, match="cannot isolate a model's code: it could use the network; .* --unsafe-code"):
        run_tests(RIGHT, TESTS)
    assert run_tests(RIGHT, TESTS, unsafe=True)
    assert not run_tests("while True: pass", TESTS, seconds=0.5, unsafe=True)
    monkeypatch.setattr(sandbox, "UNSAFE", True)
    assert run_tests(RIGHT, TESTS)


@pytest.mark.parametrize(
    ("without", "faults"),
    [
        ((), set()),
        (("_restrict_files",), set()),  # namespaces hold the files, too
        (("_enter_namespaces", "_restrict_files"), {"could write outside of its folder"}),
        (("_restrict_calls", "_enter_namespaces"), {
            "could use the network", "could write outside of its folder", "could signal or start processes"}),
    ],
)  # fmt: skip
def test_it_measures_what_holds(monkeypatch, tmp_path, without, faults):
    """The burglar gets through where a layer is taken away, so that its failure means something."""
    script = sandbox.SCRIPT.read_text()
    for layer in without:
        call = next(line for line in script.splitlines() if line.startswith(f"        {layer}("))
        script = script.replace(call, "")
    jail = tmp_path / "jail.py"
    jail.write_text(script)
    monkeypatch.setattr(sandbox, "SCRIPT", jail)
    assert set(sandbox._break_out()) == faults
