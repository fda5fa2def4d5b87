"""The table: against a dense embedding, whatever holds its rows, and whatever moment the process is killed at."""

import json
import os
import resource
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from twelve import journal, rows
from twelve.config import small_v3
from twelve.errors import InputError
from twelve.files import atomic_write
from twelve.model import Transformer
from twelve.rows import RowFile, Rows
from twelve.table import Table
from twelve.train import loop
from twelve.train.loop import Supervised
from twelve.train.plan import Plan

IDENTITY = {"primes": [[5, 7]], "seed": 0}
IDS = np.arange(5, dtype=np.int32)
COUNT, WIDTH, LR = 300, 12, 0.05
DTYPES = ("float32", "bfloat16", "int8")


def make(path, dtype="float32", count=COUNT, width=WIDTH) -> Table:
    """In memory without a path, else in a file and ready to be trained."""
    table = Table.create(path, count, width, dtype, IDENTITY, IDS)
    if path is not None:
        table.begin(path.parent / "training" / "journal")
    return table


def drawn(step: int) -> np.ndarray:
    """Row numbers [4, 9, 2], some of them often."""
    generator = np.random.default_rng(step)
    return np.minimum(generator.zipf(1.3, (4, 9, 2)) - 1, generator.integers(0, COUNT, (4, 9, 2)))


def learn(table: Table, step: int, pieces: int = 1) -> None:
    """One update, from a loss that depends on what the rows are."""
    for numbers in np.split(drawn(step), pieces):
        leaf = torch.from_numpy(table.read(numbers)).requires_grad_()
        loss_of(leaf, numbers).backward()
        table.pending.append((numbers, leaf))
    table.update(LR)


def loss_of(values: torch.Tensor, numbers: np.ndarray) -> torch.Tensor:
    target = torch.sin(torch.from_numpy(numbers)[..., None] * torch.arange(1.0, values.shape[-1] + 1))
    return ((values - target) ** 4).sum()


def everything(table: Table) -> np.ndarray:
    return table.read(np.arange(table.count))


# --- the rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pieces", [1, 4])
def test_fifty_steps_equal_a_dense_embedding_bit_for_bit(tmp_path, dtype, pieces):
    """The twin computes all rows and all gradients, and rounds as torch does."""
    table = make(tmp_path / "table", dtype)
    dense, squares = torch.zeros(COUNT, WIDTH, requires_grad=True), torch.zeros(COUNT)
    for step in range(50):
        learn(table, step, pieces)
        dense.grad = None
        numbers = drawn(step)
        loss_of(torch.nn.functional.embedding(torch.from_numpy(numbers), dense), numbers).backward()
        with torch.no_grad():
            squares += dense.grad.square().mean(-1)
            dense -= LR * dense.grad / (squares + 1e-10).sqrt()[:, None]
            dense.copy_(dense.to(getattr(torch, dtype)))
    assert np.array_equal(everything(table), dense.detach().numpy())
    assert np.array_equal(table._squares.take(np.arange(COUNT))[:, 0], squares.numpy())
    assert (everything(table) != 0).any(-1).sum() > COUNT // 4


def test_int8_rows_keep_a_scale_each():
    values = torch.randn(20, WIDTH) * torch.logspace(-6, 6, 20)[:, None]
    values[3] = 0
    raw, scales = rows.encode(values, "int8")
    back = torch.from_numpy(rows.decode(raw, scales))
    assert raw.dtype == np.int8 and (abs(raw).max(-1) == np.where(np.arange(20) == 3, 0, 127)).all()
    assert ((back - values).abs() <= torch.from_numpy(scales) * 0.5001).all()


def test_int8_rows_learn_nearly_as_float_ones():
    wanted, table = make(None), make(None, "int8")
    for step in range(30):
        learn(wanted, step)
        learn(table, step)
    assert abs(everything(table) - everything(wanted)).max() < 0.1 < everything(wanted).max()


def test_a_look_up_without_gradient_changes_nothing(tmp_path):
    table = make(tmp_path / "table")
    table.pending.append((drawn(0), torch.zeros(*drawn(0).shape, WIDTH, requires_grad=True)))
    table.update(LR)
    assert not table.pending and not everything(table).any()


def test_only_touched_rows_change(tmp_path):
    table = make(tmp_path / "table", "int8")
    learn(table, 0)
    before = everything(table)
    learn(table, 1)
    changed = (everything(table) != before).any(-1)
    assert changed.any() and not changed[np.setdiff1d(np.arange(COUNT), drawn(1))].any()


# --- where rows are held ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_a_map_a_copy_of_the_file_and_plain_reads_give_the_same_bits(tmp_path, dtype, monkeypatch):
    tables = [make(None, dtype), make(tmp_path / "a" / "table", dtype)]
    monkeypatch.setattr("twelve.table.memory", lambda: (0, 0))
    tables.append(make(tmp_path / "b" / "table", dtype))
    monkeypatch.setattr(rows, "_map", lambda *_: None)
    tables.append(make(tmp_path / "c" / "table", dtype))
    assert [table.address is None for table in tables] == [False, False, False, True]
    assert [table._rows.is_held for table in tables] == [False, True, False, False]
    for step in range(5):
        for table in tables:
            table.prefetch(drawn(step))
            learn(table, step)
    for number, table in enumerate(tables):
        saved = tmp_path / str(number)
        table.save_as(saved)
        assert saved.stat().st_nlink == 1
        assert saved.read_bytes() == (tmp_path / "0").read_bytes() == (table.path or saved).read_bytes()
        table.close()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_file_is_safetensors_with_rows_on_a_page(tmp_path, dtype):
    table = make(tmp_path / "t.safetensors", dtype)
    learn(table, 0)
    table.flush()
    tensors = load_file(tmp_path / "t.safetensors")
    names = {"rows", "scales", "compressed_ids"} if dtype == "int8" else {"rows", "compressed_ids"}
    assert set(tensors) == names and np.array_equal(tensors["compressed_ids"], IDS)
    held = tensors["rows"].float() * (tensors["scales"][:, None] if dtype == "int8" else 1)
    assert np.array_equal(held, everything(table)) and held.any()
    assert table.address % 4096 == 0
    assert table.nbytes == sum(tensors[name].nbytes for name in names - {"compressed_ids"})


def test_few_addresses_are_enough(tmp_path):
    """In a process that may not map the file (RLIMIT_AS), results are the same."""
    table = make(tmp_path / "table", count=2_000_000, width=32)
    learn(table, 0)
    table.flush()
    table.commit(0)
    wanted = table.read(drawn(0))

    def limited() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * resource.getpagesize() + (100 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        other = Table.open(tmp_path / "table", IDENTITY, writable=True)
        other.begin(tmp_path / "training" / "journal")
        other.rollback(0)
        assert other.address is None and np.array_equal(other.read(drawn(0)), wanted)
        learn(other, 1)
        other.flush()

    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc")
    assert in_child(limited) == 0
    reference = make(None, width=32)
    learn(reference, 0)
    learn(reference, 1)
    assert np.array_equal(everything(reference), Table.open(tmp_path / "table", IDENTITY).read(np.arange(COUNT)))


def test_a_table_that_is_not_trained_is_linked_and_one_that_is_shared_is_copied(tmp_path):
    make(tmp_path / "table").close()
    Table.open(tmp_path / "table", IDENTITY).save_as(tmp_path / "link")
    assert (tmp_path / "link").samefile(tmp_path / "table")
    Table.open(tmp_path / "table", IDENTITY).save_as(tmp_path / "link")  # again: nothing to do
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "table", "training"]
    table = Table.open(tmp_path / "link", IDENTITY, writable=True)
    table.begin(tmp_path / "other" / "journal")
    learn(table, 0)
    assert everything(table).any() and not everything(Table.open(tmp_path / "table", IDENTITY)).any()


def test_prefetched_rows_come_into_memory(tmp_path):
    table = make(tmp_path / "table", count=1 << 16)
    table._rows.array[:] = 1
    table.flush()
    table.close()
    del table  # and with it the map, whose pages stay in memory
    descriptor = os.open(tmp_path / "table", os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    table = Table.open(tmp_path / "table", IDENTITY)
    numbers = np.random.default_rng(0).integers(1 << 14, 1 << 16, 40)
    places = [table._rows.offset + int(row) * table.row_bytes for row in numbers]
    if all(table._rows._is_in_memory(place) for place in places):
        pytest.skip("this file system keeps its files in memory, or does not forget them")
    table.prefetch(numbers)
    end = time.monotonic() + 10
    while not all(table._rows._is_in_memory(place) for place in places):
        assert time.monotonic() < end
        time.sleep(0.01)
    table.close()


def test_threads_end_with_the_table(tmp_path):
    table = make(tmp_path / "table")
    for _ in range(20):
        table.prefetch(np.arange(COUNT))
    assert any(thread.name.startswith("table") for thread in threading.enumerate())
    table.close()
    assert not any(thread.name.startswith("table") for thread in threading.enumerate())


def test_asynchronous_updates_are_one_step_late_and_never_more(tmp_path, monkeypatch):
    """Every step reads what the table was, as a whole, after the last update or after the one before."""
    table, reference = make(tmp_path / "table"), make(None)
    table.asynchronous = True
    put = Rows.put
    monkeypatch.setattr(Rows, "put", lambda *values: (time.sleep(0.005), put(*values)))
    numbers, ones = np.arange(COUNT), torch.ones(COUNT, WIDTH)
    seen = [everything(reference)]
    for _ in range(8):
        for one in (table, reference):
            leaf = torch.zeros(COUNT, WIDTH, requires_grad=True)
            leaf.grad = ones
            one.pending.append((numbers, leaf))
            one.update(LR)
        seen.append(everything(reference))
        now = everything(table)
        assert any(np.array_equal(now, one) for one in seen[-2:])
    table.flush()
    assert np.array_equal(everything(table), seen[-1])


# --- a kill at any moment ---------------------------------------------------------------------------------------------


def in_child(work) -> int:
    """The exit status of a process that does this, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Moments:
    """Counts the moments at which a file has just changed, or is half changed, and kills the process at one of them."""

    def __init__(self, last: int) -> None:
        self.count, self.last = 0, last
        put, pwrite, replace = Rows.put, os.pwrite, os.replace

        def slow_put(held, numbers, values):
            for part in (slice(0, 1), slice(1, None)):
                put(held, numbers[part], values[part])
                self.pass_by()

        def slow_pwrite(descriptor, data, offset):
            half = pwrite(descriptor, data[: (len(data) + 1) // 2], offset)
            self.pass_by()
            return half

        def slow_replace(*paths):
            self.pass_by()
            replace(*paths)
            self.pass_by()

        Rows.put, os.pwrite, os.replace = slow_put, slow_pwrite, slow_replace
        os.fsync = os.fdatasync = RowFile.flush = lambda *_: None  # what a kill does not need, and takes long

    def pass_by(self) -> None:
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


def train_in(folder: Path, dtype: str, last: int) -> int:
    """Steps with a checkpoint after every other, on from where the folder stands; how many moments there were."""
    moments = Moments(last)
    if (folder / "table").exists():
        table = Table.open(folder / "table", IDENTITY, writable=True)
    else:
        table = Table.create(folder / "table", COUNT, WIDTH, dtype, IDENTITY, IDS)
    table.begin(folder / "journal")
    checkpoint = folder / "checkpoint"
    step = int(checkpoint.read_text()) if checkpoint.exists() else 0
    table.rollback(step)
    while step < 6:
        learn(table, step)
        step += 1
        if step % 2 == 0:
            table.flush()
            with atomic_write(checkpoint) as temporary:
                temporary.write_text(str(step))
            table.commit(step)
    return moments.count


@pytest.mark.parametrize("dtype, held", [(dtype, True) for dtype in DTYPES] + [("bfloat16", False)])
def test_a_kill_at_any_moment_resumes_to_the_same_bits(tmp_path, dtype, held, monkeypatch):
    if not held:
        monkeypatch.setattr("twelve.table.memory", lambda: (0, 0))
    whole = tmp_path / "whole"
    whole.mkdir()
    assert in_child(lambda: (whole / "moments").write_text(str(train_in(whole, dtype, 0)))) == 0
    table, state = ((whole / name).read_bytes() for name in ("table", "engram-state.safetensors"))
    moments = int((whole / "moments").read_text())
    assert moments > 60
    # each dtype takes other ones of them, and some get a second kill while the first is made good
    for moment in range(1 + DTYPES.index(dtype), moments + 1, 11):
        folder = tmp_path / str(moment)
        folder.mkdir()
        assert in_child(lambda: train_in(folder, dtype, moment)) == -signal.SIGKILL  # noqa: B023
        if moment % 3 == 0:
            assert in_child(lambda: train_in(folder, dtype, 1 + moment % 11)) in (-signal.SIGKILL, 0)  # noqa: B023
        assert in_child(lambda: train_in(folder, dtype, 0)) == 0  # noqa: B023
        assert (folder / "table").read_bytes() == table, moment
        assert (folder / "engram-state.safetensors").read_bytes() == state, moment


def trainer_in(folder: Path) -> Supervised:
    """A small model with a memory, on random tokens; its table is in the folder."""
    switches = {"engram_layer_ids": [0], "engram_vocab_size": 97, "engram_head_dim": 8, "engram_n_heads": 2}
    config = small_v3(64, width=64, layers=1, experts=0, context=16, **switches)
    model = Transformer(config)
    if (folder / "engram.safetensors").exists():
        model.memory.open(folder / "engram.safetensors", writable=True)
    else:
        model.memory.create(folder / "engram.safetensors")
    model.init_weights(0)

    def batches(step: int):
        ids = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(step))
        zeros = torch.zeros(2, 16, dtype=torch.int64)
        batch = type("Batch", (), {})()
        batch.ids, batch.targets, batch.documents = ids[:, :-1], ids[:, 1:], zeros
        batch.positions = torch.arange(16).expand(2, 16)
        return batch

    plan = Plan(
        stage="pretrain", options={}, config=config.to_dict(), data={}, context=16, batch_size=2, micro_batch_size=1,
        learning_rate=0.01, seed=0, threads=1, precision="float32", muon=True, compile=False, revisions=[(0, 12)],
    )  # fmt: skip
    (folder / "training").mkdir(parents=True, exist_ok=True)
    return Supervised(model, batches, plan, folder)


def test_a_trainer_killed_again_and_again_ends_with_the_same_table(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(loop, "SAVE_SHARE", 0.5)
    files = ("engram.safetensors", "training/engram-state.safetensors", "training/checkpoint.safetensors")
    assert in_child(lambda: trainer_in(tmp_path / "whole").run(quiet=True)) == 0
    generator, killed, status = np.random.default_rng(0), 0, None
    while status != 0:
        child = os.fork()
        if child == 0:
            trainer = trainer_in(tmp_path / "killed")
            step = trainer.train_step
            trainer.train_step = lambda step=step: (time.sleep(0.05), step())[1]  # so that it is killed at work
            trainer.run(quiet=True)
            os._exit(0)
        if killed < 4:
            time.sleep(generator.uniform(0.02, 0.3))
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        killed += status != 0
        assert status in (0, -signal.SIGKILL)
    assert killed > 2
    tables = [load_file(tmp_path / run / files[0]) for run in ("whole", "killed")]
    assert tables[0]["rows"].any()
    for name in files[:2]:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    weights, others = (load_file(tmp_path / run / files[2]) for run in ("whole", "killed"))
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_trial_steps_leave_no_trace(tmp_path):
    """As a timed run does: steps with one trainer, then the run with another."""
    trainer_in(tmp_path / "plain").run(quiet=True)
    trial = trainer_in(tmp_path / "tried")
    trial.train_step()
    trial.train_step()
    trainer_in(tmp_path / "tried").run(quiet=True)
    names = ("engram.safetensors", "training/engram-state.safetensors")
    assert all((tmp_path / "plain" / n).read_bytes() == (tmp_path / "tried" / n).read_bytes() for n in names)


# --- what can be wrong ------------------------------------------------------------------------------------------------


def test_damaged_files_are_told_in_a_line(tmp_path):
    make(tmp_path / "table", "int8").close()
    good = (tmp_path / "table").read_bytes()
    other = json.loads(good[8 : 8 + int.from_bytes(good[:8], "little")])
    other["rows"]["shape"] = []
    text = json.dumps(other).encode()
    for content, told in (
        (b"", "cut short in its header"), (good[:1000], "cut short in its header"), (good[:-1], "it is cut short"),
        (good + b"\0", "something was added"), (good.replace(b'"I8"', b'"U8"', 1), "damaged"),
        (len(text).to_bytes(8, "little") + text, "damaged"), (good.replace(b'"rows"', b'"rose"', 1), "no tensor"),
        (good.replace(b'{"identity"', b'{"identify"', 1), "is no table"), (b"\2" + bytes(7) + b"[]", "damaged"),
        (good.replace(b'"F32"', b'"I32"', 1), "scales .* in I32"),
    ):  # fmt: skip
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(InputError, match=told) as caught:
            Table.open(tmp_path / "bad", IDENTITY, writable=True)
        assert "\n" not in str(caught.value) and str(tmp_path / "bad") in str(caught.value)
        assert (tmp_path / "bad").read_bytes() == content
    with pytest.raises(InputError, match="cannot open"):
        Table.open(tmp_path / "none", IDENTITY)


def test_another_identity_is_refused_and_what_differs_is_named(tmp_path):
    make(tmp_path / "table").close()
    with pytest.raises(InputError, match=r"another model or tokenizer \(seed differ"):
        Table.open(tmp_path / "table", {**IDENTITY, "seed": 1})


def test_a_read_only_file_is_read_and_not_trained(tmp_path):
    make(tmp_path / "table").close()
    (tmp_path / "table").chmod(0o444)
    assert not Table.open(tmp_path / "table", IDENTITY).trainable
    with pytest.raises(InputError, match="read-only"):
        Table.open(tmp_path / "table", IDENTITY, writable=True)


def test_a_table_is_not_made_over_another(tmp_path):
    make(tmp_path / "table").close()
    with pytest.raises(InputError, match="there already"):
        make(tmp_path / "table")


@pytest.fixture
def largest():
    """A function that sets the size at which the disk is full, as a file sees it; None takes that back."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size or before[0], before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_too_small_for_the_table_is_seen_before_it_is_trained(tmp_path, largest):
    largest(1 << 20)
    with pytest.raises(InputError, match="it takes .* bytes; free some"):
        make(tmp_path / "table", count=1 << 16)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_while_the_journal_grows_loses_nothing(tmp_path, largest):
    table, reference = make(tmp_path / "table"), make(None)
    learn(table, 0)
    learn(reference, 0)
    before = table.path.read_bytes()
    largest((tmp_path / "training" / "journal").stat().st_size + 100)
    with pytest.raises(InputError, match="no space left to write .*journal"):
        learn(table, 1)
    assert table.path.read_bytes() == before
    largest(None)
    learn(table, 1)  # after some space was freed: on, with a whole journal
    learn(reference, 1)
    assert np.array_equal(everything(table), everything(reference))
    table.rollback(0)
    assert not everything(table).any()


def test_what_is_no_way_back_is_said(tmp_path):
    table = make(tmp_path / "table")
    learn(table, 0)
    table.commit(4)
    learn(table, 1)
    for step, there in ((3, True), (4, False), (5, False)):  # an older checkpoint; a lost journal
        if not there:
            (tmp_path / "training" / "journal").unlink(missing_ok=True)
        again = Table.open(tmp_path / "table", IDENTITY, writable=True)
        again.begin(tmp_path / "training" / "journal")
        with pytest.raises(InputError, match="cannot go back"):
            again.rollback(step)
    memory = make(None)
    memory.rollback(0)
    learn(memory, 0)
    with pytest.raises(InputError, match="in memory"):
        memory.rollback(0)


def test_a_damaged_journal_is_refused(tmp_path):
    table = make(tmp_path / "table")
    for step in range(3):
        learn(table, step)
    path = tmp_path / "training" / "journal"
    whole = path.read_bytes()
    for at, told in ((2, "damaged"), (journal.HEAD.size + journal.BATCH.size + 5, "damaged")):
        content = bytearray(whole)
        content[at] ^= 1
        path.write_bytes(content)
        again = Table.open(tmp_path / "table", IDENTITY, writable=True)
        with pytest.raises(InputError, match=told):
            again.begin(path)
            again.rollback(0)
    path.write_bytes(whole)
    other = Table.create(tmp_path / "other", COUNT, WIDTH + 1, "float32", IDENTITY, IDS)
    with pytest.raises(InputError, match="another table"):
        other.begin(path)


def test_changes_without_a_way_back_are_a_bug(tmp_path):
    table = Table.create(tmp_path / "table", COUNT, WIDTH, "float32", IDENTITY, IDS)
    with pytest.raises(RuntimeError, match="begin"):
        learn(table, 0)
    table.begin(tmp_path / "journal")
    learn(table, 0)
    again = Table.open(tmp_path / "table", IDENTITY, writable=True)
    again.begin(tmp_path / "journal")
    with pytest.raises(RuntimeError, match="rollback"):
        learn(again, 1)
    again.rollback(0)
    learn(again, 0)
    again.end()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table"] and not again.trainable
