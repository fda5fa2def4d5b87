"""Scheduler and pool under everything that can happen to them, with a model whose answers are known."""

import threading
from contextlib import closing

import numpy as np
import pytest
from hashing import PAGE, HashRunner, check_pool, expected, hash_engine
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from twelve.engine import Request
from twelve.engine.pages import PagePool
from twelve.engine.sequence import Status
from twelve.errors import InputError

PAGES = 6


class DictTiers:
    """Keeps whatever is evicted."""

    identity = b"hash model"

    def __init__(self):
        self.pages = {}

    def seal(self, key, page):
        pass

    def evict(self, key, page):
        self.pages[key] = page.copy()

    def get(self, key, out):
        out[:] = self.pages[key]
        return True

    def __contains__(self, key):
        return key in self.pages

    def touch(self, keys):
        pass

    def clear(self):
        self.pages.clear()


class EngineMachine(RuleBasedStateMachine):
    """Requests come, run, share beginnings, give way, are dropped, fail; every answer is what it would be alone."""

    def __init__(self):
        super().__init__()
        self.engine = self.make()
        self.sequences, self.seed = [], 0

    def make(self):
        return hash_engine(PAGES)

    @rule(beginning=st.integers(0, 2), shared=st.integers(0, 200), own=st.integers(1, 60), count=st.integers(0, 130))
    def ask(self, beginning, shared, own, count):
        self.seed += 1
        prompt = [beginning] * shared + [self.seed % 50] * own
        prompt = prompt[:255]
        sequence = self.engine._sequence(Request(prompt, count, seed=self.seed, memory_gates=True), streamed=False)
        self.engine._submit([sequence])
        self.sequences.append(sequence)

    @rule(steps=st.integers(1, 30))
    def run_steps(self, steps):
        for _ in range(steps):
            self.engine._settle()
            self.engine.stepper.step()

    @rule(index=st.integers(0, 20))
    def drop(self, index):
        if self.sequences:
            self.engine._drop([self.sequences.pop(index % len(self.sequences))])

    @rule()
    def fail(self):
        self.engine._settle()
        waiting = [one for one in self.sequences if one.status is Status.WAITING]
        self.engine.runner.fail = ValueError("broken")
        self.engine.stepper.step()
        self.engine.runner.fail = None
        failed = [one for one in self.sequences if one.error is not None]
        assert all(one.status is Status.DONE for one in failed)
        assert len([one for one in waiting if one.error is None]) >= len(waiting) - PAGES
        self.sequences = [one for one in self.sequences if one.error is None]

    @rule()
    def score(self):
        scores = self.engine.score([list(range(40)) * 6, [1, 2]])
        assert [len(one) for one in scores] == [239, 1] and scores[0][5] == -5.0

    @rule()
    def forget(self):
        self.engine.forget()

    @rule()
    def release(self):
        self.engine.release()

    @invariant()
    def consistent(self):
        check_pool(self.engine)
        for sequence in self.sequences:
            if sequence.status is Status.DONE:
                request = sequence.request
                count = min(request.max_tokens, 256 - sequence.prompt)
                done = sequence.completion()
                assert done.token_ids == expected(request.prompt_ids, request.seed, count)
                assert done.memory_gates == list(range(sequence.prompt, sequence.prompt + count - 1))
        self.sequences = [one for one in self.sequences if one.status is not Status.DONE]

    def teardown(self):
        """Nobody starves: the rest ends in as many steps as all their tokens one by one."""
        self.engine._settle()
        steps = sum(one.limit for one in self.sequences) * 2 + 10
        for _ in range(steps):
            if all(one.status is Status.DONE for one in self.sequences):
                break
            self.engine.stepper.step()
        assert all(one.status is Status.DONE for one in self.sequences)
        self.consistent()
        assert self.engine.pool.available == PAGES


class WithTiers(EngineMachine):
    def make(self):
        return hash_engine(PAGES, tiers=DictTiers())


class WithMTP(EngineMachine):
    def make(self):
        return hash_engine(PAGES, mtp=True)


class WithoutDrafts(EngineMachine):
    def make(self):
        return hash_engine(PAGES, speculation="off")


EngineMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
for machine in (WithTiers, WithMTP, WithoutDrafts):
    machine.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestEngine = EngineMachine.TestCase
TestWithTiers, TestWithMTP, TestWithoutDrafts = WithTiers.TestCase, WithMTP.TestCase, WithoutDrafts.TestCase


@pytest.fixture(autouse=True, scope="module")
def _identity():
    """The hash model has no weights to hash."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("twelve.engine.engine.model_identity", lambda *_: b"hash model")
        yield


def test_preempted_sequences_end_as_uninterrupted_ones():
    engine = hash_engine(PAGES)
    requests = [Request([index] * 50, 150, seed=index) for index in range(6)]
    done = engine.generate(requests)
    assert engine.stats.preemptions > 0 and engine.stats.pages == 0
    assert [one.token_ids for one in done] == [expected(r.prompt_ids, r.seed, 150) for r in requests]


def test_a_shared_beginning_is_read_once():
    engine = hash_engine(20)
    first, second = [1] * 130 + [2], [1] * 130 + [3, 4]
    assert engine.generate([Request(first, 3, seed=1)])[0].cached_tokens == 0
    rows = engine.stats.rows
    done = engine.generate([Request(second, 3, seed=1)])[0]
    assert done.cached_tokens == 128 and done.token_ids == expected(second, 1, 3)
    assert engine.stats.rows - rows < 20
    assert engine.generate([Request([1] * 128, 1, seed=1)])[0].cached_tokens == 64  # one token must be computed
    engine.forget()
    assert engine.generate([Request(first, 3, seed=1)])[0].cached_tokens == 0


def test_many_answers_to_one_prompt_read_it_once():
    engine = hash_engine(60, max_sequences=20, speculation="off")
    requests = [Request([1] * 150 + [2], 10, seed=seed) for seed in range(8)] + [Request([3] * 30, 10, seed=9)]
    done = engine.generate(requests)
    assert [one.token_ids for one in done] == [expected(r.prompt_ids, r.seed, 10) for r in requests]
    assert [one.cached_tokens for one in done] == [0] + [150] * 7 + [0]  # all but the last token
    assert engine.stats.rows == 151 + 7 + 30 + 9 * 9
    prompts = [[index] * 100 for index in range(6)]  # groups do not wait for one another
    engine.generate([Request(prompt, 10, seed=seed) for prompt in prompts for seed in range(3)])
    assert engine.stats.steps < 60


def test_a_page_that_left_the_pool_comes_back_from_the_tiers():
    engine = hash_engine(4, tiers=DictTiers())
    prompt = [1] * 200
    engine.generate([Request(prompt, 2, seed=1)])
    engine.generate([Request([2] * 200, 2, seed=1)])
    assert len(engine._tiers.pages) == 3
    done = engine.generate([Request(prompt, 2, seed=1)])[0]
    assert done.cached_tokens == 192 and done.token_ids == expected(prompt, 1, 2)


def test_those_under_way_go_on_when_all_memory_is_given_back():
    engine = hash_engine(PAGES, speculation="off")
    deltas = engine.stream(Request([1] * 100, 60, seed=1))
    found = [token for _ in range(12) for token in next(deltas).token_ids]
    engine.release()
    assert engine.stats.pages == 0
    assert found + [token for delta in deltas for token in delta.token_ids] == expected([1] * 100, 1, 60)


def test_what_waits_asks_for_no_page_of_the_old_weights(monkeypatch):
    tiers = DictTiers()
    tiers.clear = lambda: None  # files stay
    engine = hash_engine(4, tiers=tiers)
    engine.generate([Request([1] * 200, 2, seed=1)])
    sequences = [engine._sequence(Request([token] * 200, 9, seed=1), streamed=False) for token in (2, 1)]
    engine._submit(sequences)
    engine._settle()
    engine.stepper.step()
    assert len(tiers.pages) == 3 and len(sequences[1].chain) == 3  # there was no room for it
    monkeypatch.setattr("twelve.engine.engine.model_identity", lambda *_: b"other weights")
    engine.forget()
    while sequences[1].status is not Status.DONE:
        engine.stepper.step()
    assert sequences[1].cached_tokens == 0 and sequences[1].completion().token_ids == expected([1] * 200, 1, 9)


def test_cached_tokens_are_told_once_however_often_a_prompt_is_begun():
    engine = hash_engine(PAGES, prefill_chunk=1, speculation="off")
    engine.generate([Request([2] * 130, 1, seed=1)])
    older = engine.stream(Request([1] * 60, 120, seed=1))
    while not next(older).token_ids:
        pass
    deltas = list(engine.stream(Request([2] * 200, 3, seed=1)))
    assert engine.stats.preemptions == 1
    assert sum(delta.cached_tokens for delta in deltas) == deltas[0].cached_tokens == 128
    older.close()


def test_a_short_prompt_does_not_wait_for_a_long_one():
    engine = hash_engine(200, context=4096, prefill_chunk=64)
    with closing(engine.stream(Request([1] * 4000, 5, seed=1))) as long:
        next(long)
        steps = engine.runner.steps
        engine.generate([Request([2] * 20, 3, seed=2)])
        assert engine.runner.steps - steps < 6


def test_the_oldest_prompt_gets_half_of_the_rows_whatever_comes():
    engine = hash_engine(200, context=4096, prefill_chunk=64, max_sequences=100)
    with closing(engine.stream(Request([1] * 1000, 5, seed=1))) as long:
        next(long)
        for index in range(99):
            engine._submit([engine._sequence(Request([index] * 60, 1, seed=index), streamed=False)])
        steps = engine.runner.steps
        while not next(long).token_ids:
            pass
        assert engine.runner.steps - steps < 1000 / 32 + 2


def test_a_prompt_is_read_in_pieces_beside_decoding():
    engine = hash_engine(100, context=2048, prefill_chunk=64, speculation="off")
    with closing(engine.stream(Request([1] * 10, 100, seed=1))) as short:
        for _ in range(5):
            next(short)
        with closing(engine.stream(Request([2] * 1000, 5, seed=2))) as long:
            next(long)
            for _ in range(5):
                assert len(next(short).token_ids) == 1
                assert len(engine.runner.last.tokens) == 65


def test_a_budget_smaller_than_one_sequence():
    engine = hash_engine(2)
    with pytest.raises(InputError, match=r"200 tokens needs 1,024 bytes.* is 512 bytes"):
        engine.stream(Request([1] * 100, 100))
    with pytest.raises(InputError, match="needs 1,024 bytes"):
        engine.generate([Request([1], 1), Request([1] * 100, 100)])
    assert engine.runner.steps == 0
    with pytest.raises(InputError, match="255 bytes .* do not hold one page of 256 bytes"):
        type(engine)(engine.model, engine.tokenizer, kv_memory=255, runner=HashRunner())
    assert engine.generate([Request([1] * 100, 28, seed=1)])[0].token_ids == expected([1] * 100, 1, 28)


def test_the_pool_refuses_to_count_below_zero():
    pool = PagePool(2, b"")
    page = pool.take()
    pool.release([page])
    with pytest.raises(ValueError, match="held by nobody"):
        pool.release([page])


def test_the_longest_unused_page_goes_first_and_a_head_outlives_its_tail():
    pool = PagePool(3, b"")
    pages = [pool.take() for _ in range(3)]
    for index, page in enumerate(pages):
        pool.seal(page, bytes([index]))
    pool.release(pages)
    assert pool.take() == pages[2] and pool.take() == pages[1]
    assert pool.lookup(lambda index: bytes([index]), 3) == [pages[0]]
    assert pool.take() is None and pool.available == 0


def test_of_two_pages_with_the_same_text_one_is_found():
    pool = PagePool(3, b"")
    first, second = pool.take(), pool.take()
    pool.seal(first, b"text")
    pool.seal(second, b"text")
    pool.release([second])
    assert pool.lookup(lambda index: b"text", 1) == [first] and pool.holders[first] == 2
    assert [pool.take(), pool.take(), pool.take()].count(None) == 1  # the other one is free


def test_an_error_ends_those_in_the_step_and_the_engine_goes_on():
    engine = hash_engine(PAGES)
    first, second = (engine.stream(Request([index] * 5, 50, seed=index)) for index in (1, 2))
    next(first), next(second)
    next(second)
    engine.runner.fail = ValueError("broken")
    for deltas in (first, second):
        with pytest.raises(ValueError, match="broken"):
            list(deltas)
    check_pool(engine)
    assert engine.pool.available == PAGES
    assert engine.generate([Request([1], 9, seed=1)])[0].token_ids == expected([1], 1, 9)


@pytest.mark.parametrize("where", ["evict", "get", "touch", "write_page", "copy"])
def test_what_fails_while_sequences_are_let_in_loses_none(where, monkeypatch):
    tiers = DictTiers()
    engine = hash_engine(8, tiers=tiers)
    for token in (1, 2, 3):
        engine.generate([Request([token] * 250, 2, seed=1)])
    assert len(tiers.pages) == 2  # of the first prompt

    def submit(*prompts):
        sequences = [engine._sequence(Request(prompt, 9, seed=1), streamed=False) for prompt in prompts]
        engine._submit(sequences)
        engine._settle()
        engine.stepper.step()
        return sequences

    def fail(*_):
        raise MemoryError

    sequences = submit([4] * 100)
    if where == "copy":
        engine.stepper.step()  # its prompt is read, which the next one will not wait for
    with monkeypatch.context() as patch:
        patch.setattr({"write_page": engine.runner, "copy": engine.pool}.get(where, tiers), where, fail)
        sequences += submit([4] * 100, [1] * 250)
    assert all(one.status is Status.DONE and isinstance(one.error, MemoryError) for one in sequences)
    check_pool(engine)
    assert engine.pool.available == 8 and not engine.scheduler.waiting
    done = engine.generate([Request([token] * 100, 9, seed=1) for token in (4, 1)])
    assert [one.token_ids for one in done] == [expected([token] * 100, 1, 9) for token in (4, 1)]


def test_one_that_never_arrived_can_be_dropped():
    engine = hash_engine(PAGES)
    engine._drop([engine._sequence(Request([1], 9, seed=1), streamed=False)])
    assert engine.generate([Request([1], 9, seed=1)])[0].token_ids == expected([1], 1, 9)


def test_one_that_is_unwanted_leaves_the_line():
    engine = hash_engine(PAGES, max_sequences=1)
    first, left, found = engine.stream(Request([1], 50, seed=1)), threading.Event(), []
    next(first)
    step, may_step = engine.runner.step, threading.Semaphore(0)
    engine.runner.step = lambda rows: may_step.acquire() and step(rows)
    second = engine.stream(Request([2], 5, seed=2), left)
    waiter = threading.Thread(target=lambda: found.extend(second), daemon=True)
    waiter.start()  # and drives
    left.set()
    may_step.release()
    waiter.join(10)
    assert not waiter.is_alive() and not found
    assert not engine.scheduler.waiting and len(engine.scheduler.running) == 1
    may_step.release(100)
    assert [token for delta in first for token in delta.token_ids][-40:] == expected([1], 1, 50)[-40:]


def test_ctrl_c_in_the_driving_thread_leaves_the_engine_usable():
    engine = hash_engine(PAGES)
    engine.runner.fail = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        engine.generate([Request([1], 9, seed=1), Request([2], 9, seed=2)])
    check_pool(engine)
    assert not engine.scheduler.running and not engine.scheduler.waiting
    assert engine.generate([Request([1], 9, seed=1)])[0].token_ids == expected([1], 1, 9)


def test_closing_frees_the_pages_at_once():
    engine = hash_engine(PAGES)
    deltas = engine.stream(Request([1] * 100, 50, seed=1))
    next(deltas), next(deltas)
    assert engine.stats.pages == 2
    deltas.close()
    assert engine.stats.pages == 0 and not engine.scheduler.running
    engine.stream(Request([1], 5)).close()  # never begun


def test_threads_share_steps_and_a_slow_consumer_holds_nobody_up():
    engine = hash_engine(60, max_sequences=32, speculation="off")
    slow = engine.stream(Request([9], 40, seed=9))
    next(slow)
    answers, barrier = {}, threading.Barrier(12)

    def work(index):
        barrier.wait()
        request = Request([index] * (10 * index + 1), 60, seed=index)
        if index % 2:
            answers[index] = engine.generate([request])[0].token_ids
        else:
            answers[index] = [token for delta in engine.stream(request) for token in delta.token_ids]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == {index: expected([index] * (10 * index + 1), index, 60) for index in range(12)}
    assert [token for delta in slow for token in delta.token_ids] == expected([9], 9, 40)
    assert engine.stats.steps < 12 * 60 / 2  # they ran together
    check_pool(engine)


def test_scores_take_turns_with_running_sequences():
    engine = hash_engine(4)
    deltas = engine.stream(Request([1] * 100, 100, seed=1))
    for _ in range(6):
        next(deltas)
    scores = engine.score([[3] * 200, [4] * 10, [5], []])
    assert [len(one) for one in scores] == [199, 9, 0, 0]
    assert np.array_equal(scores[0], -np.arange(199.0)) and np.array_equal(scores[1], -np.arange(9.0))
    assert engine.stats.preemptions == 1
    rest = [token for delta in deltas for token in delta.token_ids]
    assert rest == expected([1] * 100, 1, 100)[-len(rest) :]
    with pytest.raises(InputError, match="257 tokens exceed the model's context of 256"):
        engine.score([[1] * 257])
    check_pool(engine)


def test_pages_of_hundreds_of_sequences_are_all_given_back():
    engine = hash_engine(64, max_sequences=300)
    requests = [Request([index % 50, *range(index % 80)], 40, seed=index) for index in range(300)]
    done = engine.generate(requests)
    assert [one.token_ids for one in done] == [expected(r.prompt_ids, r.seed, 40) for r in requests]
    check_pool(engine)
    assert engine.pool.available == 64 and PAGE == 64
