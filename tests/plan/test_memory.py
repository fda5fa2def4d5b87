"""What the plan says of a table, against the table itself and against counting."""

import numpy as np
import pytest

from twelve.config import small_v3
from twelve.model.engram import EngramMemory
from twelve.plan.memory import TablePlan, distinct_ngrams, share_of_collisions


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_sizes_are_the_tables_own(dtype):
    config = small_v3(503, width=64, layers=3, experts=0, engram_vocab_size=97, engram_dtype=dtype, engram_head_dim=6)
    memory = EngramMemory(config)
    memory.create()
    plan = TablePlan(config, memory.hash.total_rows)
    assert (plan.table_bytes, plan.row_bytes) == (memory.table.nbytes, memory.table.row_bytes)
    assert plan.heads == memory.hash.primes.size
    tokens = 10  # a step of 10 tokens changes 10 rows a head at most, a very long one all
    assert plan.journal_bytes(tokens) == 10 * plan.heads * (plan.row_bytes + 4 + 8)
    assert plan.journal_bytes(10**9) == plan.rows * (plan.row_bytes + 4 + 8)


@pytest.mark.parametrize("distinct, rows", [(50, 97), (97, 97), (300, 101), (1, 7), (2, 10_007), (2000, 10_007)])
def test_expected_collisions_are_those_of_a_good_hash(distinct, rows):
    draw = np.random.default_rng(0)
    shares = []
    for _ in range(300):
        where = draw.integers(rows, size=distinct)
        shares.append((np.bincount(where, minlength=rows)[where] > 1).mean())
    assert share_of_collisions(distinct, rows) == pytest.approx(np.mean(shares), abs=0.01)


def test_expected_collisions_are_those_of_our_hash():
    config = small_v3(503, width=64, layers=2, experts=0, engram_layer_ids=[1], engram_vocab_size=4001)
    memory, draw = EngramMemory(config), np.random.default_rng(0)
    pairs = np.unique(draw.integers(503, size=(3000, 2)), axis=0)
    rows = memory.hash.rows([pairs[:, 1], pairs[:, 0], np.zeros(len(pairs), np.int64)])[0, :, 0]  # [pairs, heads]
    for head in rows.T:
        _, where, counts = np.unique(head, return_inverse=True, return_counts=True)
        assert (counts[where] > 1).mean() == pytest.approx(share_of_collisions(len(pairs), 4001), abs=0.04)


def test_ngrams_are_counted_inside_documents():
    ids = np.array([[1, 2, 1, 2, 3], [1, 2, 9, 9, 9]])
    documents = np.array([[0, 0, 0, 0, 1], [0, 0, 1, 1, 1]])
    assert distinct_ngrams(ids, documents, 2) == 3  # 1 2, 2 1, 9 9
    assert distinct_ngrams(ids, documents, 3) == 3  # 1 2 1, 2 1 2, 9 9 9


def test_lines_say_what_a_user_asks():
    config = small_v3(503, width=64, layers=4, experts=0, engram_vocab_size=97)
    lines = TablePlan(config, 1600).lines(4096, {2: 1000, 3: 5000}, 10_000)
    assert "1,600 rows of 32 float32: 205 KB" in lines["memory"] and "16 rows (2.05 KB)" in lines["memory"]
    assert "100% of 1,000 distinct 2-grams" in lines["sharing"]
