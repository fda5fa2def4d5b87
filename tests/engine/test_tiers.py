"""Pages come back as they went in or not at all, budgets hold, and what happens to the folder stays there."""

import contextlib
import errno
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import twelve
from twelve.engine import cold
from twelve.engine.codec import PageCode
from twelve.engine.tiers import Tiers
from twelve.errors import InputError

SEGMENTS = [(8, 24, 8), (16, 16), (4, 3)]  # latent rows with a rotated key, channels, and an odd one
FLOATS = PageCode(SEGMENTS).floats
FILE = cold.HEADER.size + 4 * FLOATS
WARM = PageCode(SEGMENTS).bytes


def make(folder=None, pages=100, **options):
    cold_bytes = options.pop("cold_bytes", pages * FILE) if folder else 0
    return Tiers(b"model", 4 * FLOATS, SEGMENTS, folder=folder, cold_bytes=cold_bytes, **options)


def key(n):
    return n.to_bytes(16, "little")


def page(n):
    return np.random.default_rng(n).standard_normal(FLOATS).astype(np.float32)


def fetch(tiers, n):
    """The page, or None for a miss."""
    out = np.full(FLOATS, np.nan, np.float32)
    return out if tiers.get(key(n), out) else None


def path(folder, n):
    return folder / key(n).hex()[:2] / f"{key(n).hex()}.page"


def stored(folder):
    """Bytes of pages in the folder, half-written ones included."""
    total = 0
    for name in (*folder.glob("*/*.page"), folder / ".page.tmp"):
        with contextlib.suppress(FileNotFoundError):
            total += name.stat().st_size
    return total


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "pages"


def script(text, *arguments):
    """A process that has the tiers but not torch, which takes seconds to load."""
    prelude = f"""
        import os, sys, types
        import numpy as np
        engine = sys.modules["twelve.engine"] = types.ModuleType("twelve.engine")
        engine.__path__ = [{str(Path(twelve.__file__).parent / "engine")!r}]
        from twelve.engine.tiers import Tiers
        folder, arguments = sys.argv[1], sys.argv[2:]
        floats = {FLOATS}
        def make(pages=100):
            return Tiers(b"model", 4 * floats, {SEGMENTS}, folder=folder, cold_bytes=pages * {FILE})
        def key(n):
            return n.to_bytes(16, "little")
        def page(n):
            return np.random.default_rng(n).standard_normal(floats).astype(np.float32)
    """
    code = textwrap.dedent(prelude) + textwrap.dedent(text)
    environment = dict(os.environ, PYTHONPATH=str(Path(twelve.__file__).parents[1]), OMP_NUM_THREADS="1")
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=environment)  # fmt: skip


# ------------------------------------------------------------------------------------------------ 8 bits

ROWS = st.floats(min_value=-(2.0**100), max_value=2.0**100, width=32)


@given(arrays(np.float32, FLOATS, elements=ROWS, fill=st.nothing() | st.just(np.float32(0))))
@settings(max_examples=60, deadline=None)
def test_8_bits_are_off_by_half_a_scale_at_most(values):
    code, out = PageCode(SEGMENTS), np.empty(FLOATS, np.float32)
    code.decode(code.encode(values), out)
    first = 0
    for count, *lengths in SEGMENTS:
        shape = count, sum(lengths)
        before, after = (x[first : first + np.prod(shape)].reshape(shape).astype(np.float64) for x in (values, out))
        first += int(np.prod(shape))
        for low, high in zip(np.cumsum([0, *lengths[:-1]]), np.cumsum(lengths), strict=True):
            scale = np.abs(before[:, low:high]).max(axis=1, keepdims=True) / 127
            half = 0.5 * np.maximum(scale, np.finfo(np.float32).tiny)
            assert (np.abs(before - after)[:, low:high] <= half * (1 + 1e-4)).all()


def test_8_bits_of_blocks_of_rows_equal_those_of_single_rows():
    rows = np.random.default_rng(0).standard_normal((300, 640)).astype(np.float32)  # more than a block holds
    whole, one, out = PageCode([(300, 512, 128)]), PageCode([(1, 512, 128)]), np.empty(300 * 640, np.float32)
    whole.decode(whole.encode(rows.ravel()), out)
    for row, got in zip(rows, out.reshape(300, 640), strict=True):
        expected = np.empty(640, np.float32)
        one.decode(one.encode(row), expected)
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_page_that_is_not_finite_is_not_kept_in_8_bits(bad):
    tiers, values = make(warm_bytes=10 * WARM), page(1)
    values[5] = bad
    tiers.evict(key(1), values)
    assert key(1) not in tiers and tiers.stats["warm_pages"] == 0


# ------------------------------------------------------------------------------------------------ what a tier keeps


def test_a_cold_page_comes_back_bit_for_bit_before_and_after_a_restart(folder):
    tiers = make(folder)
    for n in range(20):
        values = page(n)
        tiers.seal(key(n), values)
        values[:] = 0  # the pool uses the room again at once
        np.testing.assert_array_equal(fetch(tiers, n), page(n))
    tiers.close()
    assert tiers.stats["cold_written"] == tiers.stats["cold_pages"] == 20 and stored(folder) == 20 * FILE
    tiers.seal(key(99), page(99))
    assert key(99) not in tiers  # closed
    again = make(folder)
    for n in range(20):
        assert key(n) in again
        np.testing.assert_array_equal(fetch(again, n), page(n))
    assert fetch(again, 99) is None
    assert (again.stats["cold_hits"], again.stats["misses"], again.stats["cold_bytes"]) == (20, 1, 20 * FILE)


def test_a_warm_hit_moves_up_and_comes_before_cold(folder):
    tiers = make(folder, warm_bytes=3 * WARM)
    tiers.evict(key(1), page(1))
    tiers.flush()
    rough, exact = fetch(tiers, 1), fetch(tiers, 1)
    assert 0 < np.abs(rough - page(1)).max() < 0.05
    np.testing.assert_array_equal(exact, page(1))
    assert tiers.stats["warm_hits"] == tiers.stats["cold_hits"] == 1 and tiers.stats["warm_pages"] == 0
    tiers.evict(key(2), page(2))
    tiers.clear()
    assert tiers.stats["warm_bytes"] == 0 and key(2) in tiers


def test_exact_means_bit_equal_copies_only(folder):
    rough = make(folder, compact=True)
    rough.seal(key(1), page(1))
    rough.close()
    assert 0 < np.abs(fetch(rough, 1) - page(1)).max() < 0.05 and stored(folder) == cold.HEADER.size + WARM
    exact = make(folder, exact=True, warm_bytes=10 * WARM)
    assert key(1) not in exact and fetch(exact, 1) is None and exact.stats["damaged"] == 0
    exact.evict(key(1), page(1))  # writes a better copy over it
    exact.close()
    assert exact.stats["warm_pages"] == 0
    np.testing.assert_array_equal(fetch(exact, 1), page(1))
    np.testing.assert_array_equal(fetch(rough, 1), page(1))


def test_the_head_of_a_touched_prefix_outlives_its_tail(folder):
    tiers = make(folder, pages=4, warm_bytes=4 * WARM)
    for n in range(4):
        tiers.evict(key(n), page(n))
    tiers.flush()
    tiers.touch([key(n) for n in range(4)])
    for n in (8, 9):
        tiers.evict(key(n), page(n))
    tiers.close()
    tiers.clear()
    assert [n for n in range(10) if key(n) in tiers] == [0, 1, 8, 9]


def test_a_full_queue_passes_pages_over_and_eviction_offers_them_again(folder, monkeypatch):
    gate = threading.Event()
    write = cold.ColdFolder.write
    monkeypatch.setattr(cold.ColdFolder, "write", lambda *a: gate.wait(10) and write(*a))
    monkeypatch.setattr("twelve.engine.tiers._QUEUE_BYTES", 3 * FILE)
    tiers = make(folder)
    for n in range(5):
        tiers.seal(key(n), page(n))
    assert tiers.stats["pending"] == 3 and tiers.stats["skipped"] == 2 and key(4) not in tiers
    gate.set()
    tiers.flush()
    tiers.evict(key(4), page(4))
    tiers.close()
    assert [n for n in range(5) if key(n) in tiers] == [0, 1, 2, 4]


# ------------------------------------------------------------------------------------------------ budgets and order

OPERATIONS = st.lists(st.tuples(st.sampled_from(["evict", "evict", "get", "touch"]), st.integers(0, 9)), max_size=40)


@given(OPERATIONS, st.integers(1, 5), st.integers(0, WARM - 1))
@settings(max_examples=60, deadline=None)
def test_warm_is_an_lru_within_its_budget(operations, pages, rest):
    tiers, twin = make(warm_bytes=pages * WARM + rest), OrderedDict()
    for operation, n in operations:
        if operation == "evict":
            tiers.evict(key(n), page(n))
            twin[n] = None
            twin.move_to_end(n)
            if len(twin) > pages:
                twin.popitem(last=False)
        elif operation == "touch":
            tiers.touch([key(n)])
            if n in twin:
                twin.move_to_end(n)
        else:
            got = fetch(tiers, n)
            assert (got is not None) == (n in twin)
            assert got is None or np.abs(got - page(n)).max() < 0.05
            twin.pop(n, None)
        assert tiers.stats["warm_bytes"] == len(twin) * WARM <= pages * WARM + rest
    assert [n for n in range(10) if key(n) in tiers] == sorted(twin)


@given(OPERATIONS, st.integers(1, 5), st.integers(0, FILE - 1), st.integers(0, 40))
@settings(max_examples=30, deadline=None)
def test_cold_is_an_lru_within_its_budget_through_restarts(operations, pages, rest, restart):
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder, budget, twin, replace = Path(name), pages * FILE + rest, OrderedDict(), os.replace

        def watched(source, target):
            assert stored(folder) <= budget  # the whole temporary file is there
            replace(source, target)

        tiers = make(folder, cold_bytes=budget)
        patch.setattr(cold.os, "replace", watched)
        for step, (operation, n) in enumerate(operations):
            if step == restart:
                tiers.close()
                for age, known in enumerate(reversed(twin)):  # files written in one tick of the kernel's clock
                    os.utime(path(folder, known), ns=(0, 10**15 - age))
                tiers = make(folder, cold_bytes=budget)
            if operation == "evict":
                tiers.evict(key(n), page(n))
                tiers.flush()
                twin.setdefault(n)  # to be offered what one has is no use of it
                if len(twin) > pages:
                    twin.popitem(last=False)
            elif operation == "touch":
                tiers.touch([key(n)])
                if n in twin:
                    twin.move_to_end(n)
            else:
                got = fetch(tiers, n)
                assert (got is not None) == (n in twin)
                if got is not None:
                    np.testing.assert_array_equal(got, page(n))
                    twin.move_to_end(n)
            assert stored(folder) == tiers.stats["cold_bytes"] == len(twin) * FILE
            assert [n for n in range(10) if key(n) in tiers] == sorted(twin)
        assert tiers.stats["damaged"] == 0 and tiers._cold.writes


def test_a_read_page_is_young_for_the_next_process_too(folder):
    tiers = make(folder)
    for n in range(4):
        tiers.seal(key(n), page(n))
        tiers.flush()
        os.utime(path(folder, n), ns=(n, n))
    assert fetch(tiers, 1) is not None
    small = make(folder, pages=2)
    assert [n for n in range(4) if key(n) in small] == [1, 3]


def test_a_smaller_budget_holds_from_the_start(folder):
    tiers = make(folder)
    for n in range(10):
        tiers.seal(key(n), page(n))
        tiers.flush()
        os.utime(path(folder, n), ns=(n, n))
    small = make(folder, pages=3)
    assert stored(folder) == small.stats["cold_bytes"] == 3 * FILE
    assert [n for n in range(10) if key(n) in small] == [7, 8, 9]


def test_processes_share_a_folder_and_its_budget(folder):
    writer = f"""
        import pathlib
        from twelve.engine import cold
        replace = os.replace
        def watched(source, target):  # under the lock: nobody else adds anything now
            files = [*pathlib.Path(folder).glob("*/*.page"), pathlib.Path(folder, ".page.tmp")]
            assert sum(file.stat().st_size for file in files) <= 6 * {FILE}
            replace(source, target)
        tiers, first = make(pages=6), int(arguments[0])
        cold.os.replace = watched
        out = np.empty(floats, np.float32)
        for n in range(first, first + 60):
            tiers.seal(key(n), page(n))
            if n % 5 == 0:
                tiers.flush()
            for m in range(0, n, 7):
                assert not tiers.get(key(m), out) or (out == page(m)).all()
        tiers.close()
        assert tiers._cold.writes and tiers._cold.written > 20 and not tiers.stats["damaged"], tiers.stats
    """
    processes = [script(writer, folder, first) for first in (0, 40, 80)]
    for process in processes:
        output = process.communicate(timeout=20)
        assert process.returncode == 0, output
    tiers = make(folder, pages=6)
    assert tiers.stats["cold_bytes"] == stored(folder) == 6 * FILE


def test_a_page_of_another_process_is_found_at_once_and_a_vanished_one_is_a_miss(folder):
    one, two = make(folder), make(folder)
    one.seal(key(1), page(1))
    one.flush()
    assert key(1) in two
    np.testing.assert_array_equal(fetch(two, 1), page(1))
    path(folder, 1).unlink()
    assert key(1) not in one and fetch(one, 1) is None and one.stats["damaged"] == 0
    one.seal(key(1), page(1))  # known to be gone: written again
    one.flush()
    np.testing.assert_array_equal(fetch(two, 1), page(1))


def test_threads_share_tiers(folder):
    tiers, wrong = make(folder, pages=8, warm_bytes=4 * WARM), []

    def work(seed):
        draw = random.Random(seed)
        for _ in range(150):
            n = draw.randrange(20)
            if draw.random() < 0.5:
                tiers.evict(key(n), page(n))
            else:
                got = fetch(tiers, n)
                if got is not None and np.abs(got - page(n)).max() > 0.05:
                    wrong.append(n)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tiers.close()
    assert not wrong and stored(folder) <= 8 * FILE and tiers.stats["warm_bytes"] <= 4 * WARM
    assert tiers.stats["damaged"] == 0 and tiers._cold.writes


# ------------------------------------------------------------------------------------------------ damage

DAMAGE = {
    "empty": lambda data: b"",
    "half a header": lambda data: data[:30],
    "a header only": lambda data: data[: cold.HEADER.size],
    "torn": lambda data: data[:-100],
    "a hole": lambda data: data[:512] + bytes(len(data) - 512),
    "too long": lambda data: data + b"x",
    "a bit of the payload": lambda data: data[:700] + bytes([data[700] ^ 4]) + data[701:],
    "a bit of the coding": lambda data: data[:10] + bytes([data[10] ^ 1]) + data[11:],
    "another format": lambda data: b"GGUF" * (len(data) // 4),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("compact", [False, True])
def test_a_damaged_page_is_dropped(folder, how, compact):
    tiers = make(folder, compact=compact)
    tiers.seal(key(1), page(1))
    tiers.flush()
    path(folder, 1).write_bytes(DAMAGE[how](path(folder, 1).read_bytes()))
    assert fetch(tiers, 1) is None and tiers.stats["damaged"] == 1 and not path(folder, 1).exists()
    tiers.seal(key(1), page(1))
    tiers.close()
    assert np.abs(fetch(tiers, 1) - page(1)).max() < 0.05


def test_any_flipped_bit_is_found(folder):
    tiers = make(folder)
    tiers.seal(key(1), page(1))
    tiers.close()
    whole = path(folder, 1).read_bytes()
    bits = [*range(8 * cold.HEADER.size), *random.Random(0).sample(range(8 * FILE), 300)]
    for count, bit in enumerate(bits, 1):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path(folder, 1).write_bytes(data)
        assert fetch(tiers, 1) is None and tiers.stats["damaged"] == count


def test_a_page_of_another_model_layout_or_key_is_never_used(folder, caplog):
    tiers = make(folder)
    others = [Tiers(b"another", 4 * FLOATS, SEGMENTS, folder=folder, cold_bytes=100 * FILE),
              Tiers(b"model", 4 * FLOATS, [(1, FLOATS)], folder=folder, cold_bytes=100 * FILE)]  # fmt: skip
    for n, other in enumerate(others, 1):
        other.seal(key(n), page(n))
        other.close()
    tiers.seal(key(3), page(3))
    tiers.close()
    path(folder, 4).parent.mkdir()
    path(folder, 3).rename(path(folder, 4))
    assert all(fetch(tiers, n) is None for n in (1, 2, 4)) and tiers.stats["damaged"] == 3 and stored(folder) == 0
    told = [record.getMessage() for record in caplog.records]
    assert ["another model" in line for line in told] == [True, True, False] and "damaged" in told[2]


def test_a_kill_while_pages_are_written_tears_none_that_is_found(folder):
    layout = 4 << 18, [(512, 512)]  # 1 MB: much of the time goes into writing
    writer = f"""
        tiers = Tiers(b"model", *{layout}, folder=folder, cold_bytes=80 << 20)
        print("ready", flush=True)
        for n in range(int(arguments[0]), 10**9):
            tiers.seal(key(n), np.arange(n, n + (1 << 18), dtype=np.float32))
            tiers.flush()
    """
    draw, torn = random.Random(0), 0
    for turn, first in enumerate(range(0, 80_000, 10_000)):
        process = script(writer, folder, first)
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        time.sleep(draw.uniform(0.01, 0.1))
        limit = time.monotonic() + 2
        while turn % 2 and not (folder / ".page.tmp").exists() and time.monotonic() < limit:
            pass  # every second kill aims at the moment of writing
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        torn += (folder / ".page.tmp").exists()
    print(torn, "of 8 kills met a page half-written")  # where none did there is one to sweep all the same:
    (folder / ".page.tmp").write_bytes(b"half a page")
    tiers, out = Tiers(b"model", *layout, folder=folder, cold_bytes=80 << 20), np.empty(1 << 18, np.float32)
    assert not (folder / ".page.tmp").exists() and stored(folder) == tiers.stats["cold_bytes"] <= 80 << 20
    found = [int.from_bytes(bytes.fromhex(file.stem), "little") for file in folder.glob("*/*.page")]
    assert len(found) > 5
    for n in found:
        assert tiers.get(key(n), out)
        np.testing.assert_array_equal(out, np.arange(n, n + (1 << 18), dtype=np.float32))
    assert tiers.stats["damaged"] == 0


def test_an_engine_that_nobody_closes_ends_and_loses_nothing(folder):
    process = script("tiers = make()\nfor n in range(30): tiers.seal(key(n), page(n))", folder)
    output = process.communicate(timeout=20)
    assert process.returncode == 0, output
    tiers = make(folder)
    for n in range(30):
        np.testing.assert_array_equal(fetch(tiers, n), page(n))


# ------------------------------------------------------------------------------------------------ a folder that fails


def one_warning(caplog):
    records = [record for record in caplog.records if record.name == "twelve.engine"]
    assert [record.levelno for record in records] == [logging.WARNING] and "\n" not in records[0].getMessage()
    return records[0].getMessage()


@pytest.mark.parametrize("at", ["open", "first byte", "in the middle", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_failing_disk_stops_the_writing_only(folder, monkeypatch, caplog, at, number):
    tiers = make(folder, warm_bytes=5 * WARM)
    tiers.seal(key(0), page(0))
    tiers.flush()

    class Failing:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.file.close()

        def write(self, data):
            if at == "in the middle" and len(data) == 4 * FLOATS:
                return self.file.write(data[:1000])
            if at == "first byte" or cold.HEADER.size < len(data) < 4 * FLOATS:
                raise OSError(number, os.strerror(number))
            return self.file.write(data)

    def opened(name, mode="r", **options):
        if mode != "wb" or at == "replace":
            return open(name, mode, **options)
        if at == "open":
            raise OSError(number, os.strerror(number))
        return Failing(open(name, mode, **options))

    def refused(*arguments):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(cold, "open", opened, raising=False)
        if at == "replace":
            patch.setattr(cold.os, "replace", refused)
        for n in range(1, 5):
            tiers.evict(key(n), page(n))
        tiers.flush()
    assert os.strerror(number) in one_warning(caplog)
    assert stored(folder) == FILE and tiers.stats["pending"] == 0
    np.testing.assert_array_equal(fetch(tiers, 0), page(0))  # what was there is read, and the other tier goes on
    assert fetch(tiers, 1) is not None and tiers.stats["warm_hits"] == 1
    tiers.evict(key(9), page(9))
    tiers.close()
    assert len(list(folder.glob("*/*.page"))) == 1


FULL = """
    import logging
    logging.basicConfig(format="%(message)s")
    tiers = make(1000)
    for n in range(1000):
        tiers.seal(key(n), page(n))
    tiers.close()
    out = np.empty(floats, np.float32)
    found = [n for n in range(1000) if tiers.get(key(n), out)]
    for n in found:
        assert tiers.get(key(n), out) and (out == page(n)).all()
    assert not tiers.stats["damaged"] and not os.path.exists(folder + "/.page.tmp")
    print(len(found))
"""


def test_a_small_disk_that_fills_up(tmp_path):
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs -o size=200k none "$0" && exec "$@"']
    try:
        allowed = subprocess.run([*mount, tmp_path, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("mounting a small file system is not allowed here")
    process = script(FULL, tmp_path / "pages")
    arguments = process.args
    process.kill()
    process.communicate()
    environment = dict(os.environ, PYTHONPATH=str(Path(twelve.__file__).parents[1]))
    done = subprocess.run([*mount, tmp_path, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert 10 < int(done.stdout) < 200 * 1024 // FILE
    assert done.stderr.count("\n") == 1 and "No space left on device" in done.stderr


def test_a_limit_on_file_size_cuts_a_real_write(folder):
    process = script(f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({FILE // 2},) * 2)\n"
                     + textwrap.dedent(FULL), folder)  # fmt: skip
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 0 and output == "0\n", errors
    assert errors.count("\n") == 1 and "File too large" in errors and stored(folder) == 0


def test_a_vanished_folder(folder, caplog):
    tiers = make(folder)
    tiers.seal(key(1), page(1))
    tiers.flush()
    folder.rename(folder.with_name("elsewhere"))
    assert key(1) not in tiers and fetch(tiers, 1) is None
    for n in range(4):
        tiers.evict(key(n), page(n))
    tiers.close()
    assert "No such file" in one_warning(caplog) and not folder.exists()


def test_a_folder_that_cannot_be_written(folder, monkeypatch, caplog):
    tiers = make(folder)
    tiers.seal(key(1), page(1))
    tiers.close()

    def read_only(name, flags, mode=0o777):
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(name, flags, mode)

    opened = os.open
    monkeypatch.setattr(cold.os, "open", read_only)
    reader = make(folder)
    reader.evict(key(2), page(2))
    reader.close()
    assert "Read-only" in one_warning(caplog) and reader.stats["cold_pages"] == 1
    np.testing.assert_array_equal(fetch(reader, 1), page(1))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place where nobody can make a folder")
def test_a_folder_that_cannot_be_made(caplog):
    tiers = make(Path("/proc/twelve/pages"), warm_bytes=WARM)
    tiers.evict(key(1), page(1))
    tiers.close()
    assert "/proc/twelve" in one_warning(caplog) and fetch(tiers, 1) is not None


def test_a_lock_that_is_never_given_back_ends_the_waiting(folder, monkeypatch, caplog):
    tries, write = [], cold.ColdFolder.write
    monkeypatch.setattr(cold.ColdFolder, "write", lambda *a: tries.append(a) or write(*a))
    monkeypatch.setattr(cold, "_LOCK_SECONDS", 0.05)
    tiers, other = make(folder), make(folder)
    with other._cold._locked():
        for n in range(5):
            tiers.seal(key(n), page(n))
        tiers.close()
    assert "another process" in one_warning(caplog) and tiers.stats["pending"] == 0 and len(tries) == 1


# ------------------------------------------------------------------------------------------------ bad input


def test_bad_input_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("x")
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "CACHEDIR.TAG").write_text(cold._TAG_TEXT.replace(", 1", ", 2"))
    for options, message in (
        ({"folder": tmp_path / "file"}, "file is not a folder"),
        ({"folder": tmp_path / "file" / "below"}, "is not a folder"),
        ({"folder": tmp_path / "photos"}, r"holds other files \(cat.jpg\)"),
        ({"folder": tmp_path / "newer"}, "in another format"),
        ({"folder": tmp_path / "a", "cold_bytes": FILE - 1}, "cold pages do not hold one page"),
        ({"warm_bytes": WARM - 1}, "warm pages do not hold one page"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            make(**options)
        assert "\n" not in str(caught.value)
    assert sorted(name.name for name in tmp_path.iterdir()) == ["file", "newer", "photos"]


def test_no_budget_no_tier(folder):
    tiers = Tiers(b"model", 4 * FLOATS, SEGMENTS, folder=folder)
    tiers.evict(key(1), page(1))
    tiers.close()
    assert key(1) not in tiers and fetch(tiers, 1) is None and not folder.exists()
    for segments in ([], [(1,)], [(0, 4)], [(1, FLOATS - 1)]):
        with pytest.raises(ValueError):
            Tiers(b"model", 4 * FLOATS, segments)
