"""The choice of a shape: a law that is known comes out again, limits hold, and what cannot be met says so."""

from dataclasses import replace

import numpy as np
import pytest
from scaled import REACHED, SPEED, made_up, true_bits

from twelve.config import small_v3, with_memory
from twelve.errors import InputError
from twelve.plan import cost, law
from twelve.plan.fit import EPOCHS, Request, choose

GIB = 2**30


ROWS = made_up()


def asked(minutes=10.0, memory=8 * GIB, **more):
    return Request(lambda config: 60 * minutes, memory, SPEED, 1, **more)


def test_a_known_law_comes_out_again():
    found = law.fit_law(ROWS)
    for active, total, tokens in ((9e5, 9e5, 4e6), (2e6, 6e6, 8e6), (5e6, 5e6, 4e6)):
        assert found.bits(active, total, tokens) == pytest.approx(true_bits(active, total, tokens), rel=0.01)
    assert found.error < 0.015 and found.sparse == 0.25
    noisy = law.fit_law(made_up(noise=0.02))
    assert 0.01 < noisy.error < 0.04


def test_what_no_law_says_counts_where_it_was_seen():
    better = [  # than the law of the others
        {**row, "marks": [{**mark, "bits": {"ko": law.mean_bits(mark) - 0.04}} for mark in row["marks"]]}
        if row["width"] == 256 else row for row in ROWS
    ]  # fmt: skip
    found, points = law.fit_law(better), law.points(row for row in better if row["width"] == 256)
    by_trend, by_all = (
        np.array([said(*point[:3]) - point[3] for point in points]) for said in (found.trend, found.bits)
    )
    assert np.sqrt(np.mean(by_all**2)) < 0.5 * np.sqrt(np.mean(by_trend**2))
    far = 1e9, 1e9, 1e10
    assert found.bits(*far) == pytest.approx(found.trend(*far), abs=1e-6)


def test_what_a_vocabulary_is_behind_is_told_from_what_size_and_text_do():
    """Small ones are faster, so that without this one that is worse at equal tokens would be taken."""
    behind = {4096: 0.05, 8192: 0.0}
    rows = [
        {**row, "marks": [{**mark, "bits": {"ko": law.mean_bits(mark) + behind[row["vocabulary"]]}}
                          for mark in row["marks"]]}
        for row in ROWS
    ]  # fmt: skip
    rows += made_up(widths=(192,), experts=(8,), vocabularies=(8192,), seconds=(60, 240))  # so that it is the commonest
    found = law.fit_law(rows)
    assert found.vocabularies == pytest.approx(behind, abs=0.003) and found.error < 0.015
    assert found.of_vocabulary(5793) == pytest.approx(0.025, abs=0.003)
    assert found.bits(2e6, 6e6, 8e6) == pytest.approx(true_bits(2e6, 6e6, 8e6), rel=0.01)
    assert choose(asked(), rows)[0].config.vocab_size == 8192 and choose(asked(), ROWS)[0].config.vocab_size == 4096


def test_few_runs_are_enough_to_go_on():
    for rows in (ROWS[:1], ROWS[:2], made_up(widths=(128, 256), experts=(8,), vocabularies=(8192,), seconds=(30,))):
        found = law.fit_law(rows)
        assert np.isfinite(found.bits(1e6, 2e6, 1e7)) and found.error > 0
        assert choose(asked(), rows)[0].steps > 0
    assert law.fit_law(ROWS).uncertainty(1e12, 1e7) > law.fit_law(ROWS).uncertainty(1e6, 1e7)


def test_a_memory_has_the_rows_that_there_is_room_for():
    def rows(**more):
        best = choose(asked(600, **more), ROWS)[0]
        table = best.memory["table"]
        assert sum(best.memory.values()) <= more["memory"] and table >= 8 * best.config.engram_vocab_size * 32 * 4
        return best.config.engram_vocab_size

    roomy, tight = rows(memory=8 * GIB), rows(memory=GIB)
    assert 65536 <= tight < roomy == with_memory(reading=choose(asked(600), ROWS)[0].tokens)["engram_vocab_size"]


def test_speed_follows_from_arithmetic_and_the_machine():
    best = choose(asked(), ROWS)[0]
    assert best.tokens_per_second == pytest.approx(REACHED * SPEED * 1e9 / law.work(best.config, 512, 8), rel=0.02)
    twice = choose(Request(lambda config: 600, 8 * GIB, 2 * SPEED, 1), ROWS)
    same = next(c for c in twice if replace(c.config, engram_vocab_size=1) == replace(best.config, engram_vocab_size=1))
    assert same.tokens == pytest.approx(2 * best.tokens, rel=0.01)


def test_more_minutes_never_make_it_worse_or_smaller():
    found = [choose(asked(minutes), ROWS)[0] for minutes in (1, 3, 10, 30, 100)]
    bits = [choice.bits for choice in found]
    assert bits == sorted(bits, reverse=True) and bits[-1] < bits[0] - 0.1
    sizes = [cost.parameters(choice.config).active for choice in found]
    assert sizes == sorted(sizes) and sizes[-1] > sizes[0]


def test_memory_is_kept_by_smaller_parts_and_then_by_smaller_models():
    free = choose(asked(minutes=60), ROWS)[0]
    needed = sum(free.memory.values())
    tight = choose(asked(minutes=60, memory=int(0.8 * needed)), ROWS)
    assert all(sum(choice.memory.values()) <= 0.8 * needed for choice in tight)
    same = [choice for choice in tight if choice.config.hidden_size == free.config.hidden_size]  # with fewer rows
    assert same and all(choice.micro_batch < choice.batch for choice in same if choice.experts == free.experts)
    small = choose(asked(minutes=60, memory=GIB // 2), ROWS)[0]
    assert cost.parameters(small.config).total < cost.parameters(free.config).total


def test_a_text_is_read_four_times_at_most():
    choices = choose(asked(minutes=600, text_bytes=3_000_000), ROWS)
    assert all(choice.epochs <= EPOCHS + 0.01 for choice in choices) and choices[0].epochs > 3.9
    assert all(choice.config.vocab_size == 4096 for choice in choices)  # 8192 entries want more text
    assert choices[0].seconds < 600 * 60


def test_what_is_given_is_kept():
    given = {"vocabulary": 777, "context": 128, "batch": 3, "learning_rate": 1e-3, "mtp": 1, "switches": {"hc_mult": 4}}
    choice = choose(asked(**given), ROWS)[0]
    config = choice.config
    assert (config.vocab_size, choice.context, choice.batch, choice.learning_rate) == (777, 128, 3, 1e-3)
    assert config.num_nextn_predict_layers == 1 and config.hc_mult == 4 and choice.memory["streams"] > 0


def test_a_model_without_a_memory_is_expected_to_know_less():
    plain = choose(asked(switches={"engram_vocab_size": 0}), ROWS)[0]
    with_it = next(choice for choice in choose(asked(), ROWS) if choice.config.engram_layer_ids
                   and choice.config.hidden_size == plain.config.hidden_size and choice.experts == plain.experts
                   and choice.config.vocab_size == plain.config.vocab_size)  # fmt: skip
    assert not plain.config.engram_layer_ids and plain.tokens > with_it.tokens
    assert 0.05 < plain.bits - with_it.bits < 0.12


def test_of_learning_rates_and_batches_the_best_counts():
    rows = [{**row, "rate": rate, "marks": [
        {**mark, "bits": {"ko": mark["bits"]["ko"] + worse}} for mark in row["marks"]
    ]} for row in ROWS for rate, worse in ((1e-2, 0.3), (2e-3, 0.0))]  # fmt: skip
    assert len(law.best_settings(rows)) == len(ROWS)
    assert choose(asked(), rows)[0].learning_rate == 2e-3
    longer = [{**row, "marks": row["marks"][-1:]} if row["rate"] == 1e-2 else row for row in rows]  # fewer marks, later
    assert {row["rate"] for row in law.best_settings(longer)} == {2e-3}


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (asked(memory=100 << 20), "0.10 GiB are too little to train any model: the smallest needs"),
        (asked(minutes=0.001), "0 s are left for training once everything else is done"),
        (Request(lambda config: -30.0, 8 * GIB, SPEED, 1), "ask for more minutes"),
        (asked(text_bytes=20_000, batch=64), "20,000 bytes of text, read 4 times, are too few for 20 steps"),
    ],
)
def test_what_cannot_be_met_says_why_in_one_line(request_, words):
    with pytest.raises(InputError, match=words) as told:
        choose(request_, ROWS)
    assert "\n" not in str(told.value)


def test_the_runs_that_ship_can_be_used():
    rows = law.load()
    best = choose(Request(lambda config: 300, 8 * GIB, rows[0]["gflops"], rows[0]["threads"]), rows)[0]
    assert 0.5 < best.bits < 5 and best.tokens > 0
    for row in rows:
        shape = (row["vocabulary"], row["width"], row["layers"], row["experts"], 2, row["context"])
        config = small_v3(*shape, **with_memory())
        counts = cost.parameters(config)
        assert (row["active"], row["total"]) == (counts.active, counts.total - counts.table)
        assert row["outside"] == counts.embedding + counts.head
        assert row["work"] == pytest.approx(law.work(config, row["context"], row["batch"]))


def test_a_file_without_runs_is_named(tmp_path):
    (tmp_path / "empty.json").write_text('{"rows": []}')
    with pytest.raises(InputError, match="empty.json holds no scaling runs"):
        law.load(tmp_path / "empty.json")
