"""What comes next, and what tells a run that falls apart."""

from collections import Counter

import pytest

from twelve.engine import Completion
from twelve.errors import InputError
from twelve.posttrain import health, memory
from twelve.posttrain.curriculum import Cell, Curriculum

CELLS = [Cell("arithmetic", level, language) for level in (1, 2, 3) for language in ("ko", "en")]


def test_uniform_draws_all_cells_alike():
    curriculum = Curriculum(CELLS)
    assert Counter(curriculum.draw(18, "a")) == dict.fromkeys(CELLS, 3)
    assert curriculum.draw(7, "a") == curriculum.draw(7, "a") != curriculum.draw(7, "b")
    drawn = Counter(cell for step in range(300) for cell in curriculum.draw(4, step))
    assert set(drawn) == set(CELLS) and max(drawn.values()) < 1.3 * min(drawn.values())


def test_levels_open_one_after_the_other():
    curriculum = Curriculum(CELLS, "curriculum")
    assert {cell.level for cell in curriculum.open()} == {1}
    curriculum.record(CELLS[0], 0.5)
    assert {(cell.level, cell.language) for cell in curriculum.open()} == {(1, "ko"), (2, "ko"), (1, "en")}
    for _ in range(20):
        curriculum.record(CELLS[0], 0.0)  # and closes again
    assert {cell.level for cell in curriculum.open()} == {1}


def test_what_is_solved_sometimes_comes_most_often():
    curriculum = Curriculum(CELLS, "curriculum", {cell.key: 1.0 for cell in CELLS} | {"arithmetic 2 en": 0.5})
    drawn = Counter(cell.key for step in range(100) for cell in curriculum.draw(8, step))
    assert drawn["arithmetic 2 en"] > 2 * drawn["arithmetic 1 en"] > 0
    assert len(drawn) == len(CELLS)  # nothing is forgotten


def test_the_memory_is_a_dictionary_that_survives():
    rates = {}
    Curriculum(CELLS, "curriculum", rates).record(CELLS[0], 0.7)
    again = Curriculum(CELLS, "curriculum", rates)
    assert again.rates == {"arithmetic 1 ko": 0.7} and len(again.open()) == 3
    with pytest.raises(InputError, match="unknown curriculum 'hard'"):
        Curriculum(CELLS, "hard")


def answer(ids, finish="stop", text="<answer>1</answer>"):
    return Completion(text, ids, [], finish, 3)


def test_the_figures_of_a_step():
    found = health.figures([answer([1, 2, 3]), answer([5] * 9, "length", "no"), answer([1, 2] * 4), answer([1, 1, 1])])
    assert found == {"length": 5.75, "cut": 0.25, "unparsed": 0.25, "repeating": 0.5}


def healthy(**changes):
    return dict(zip(health.NAMES, (0.5, 40.0, 0.4, 0.1, 0.1, 0.0), strict=True)) | changes


@pytest.mark.parametrize("bad, said", [
    ({"entropy": 0.001}, "entropy fell from 0.5 to 0.001"),
    ({"length": 3.0, "accuracy": 0.2}, "shrank from 40 to 3 tokens"),
    ({"cut": 0.95}, "95% of its answers run into the limit of tokens, at first 10%"),
    ({"unparsed": 0.9}, "90% of its answers hold no final answer"),
    ({"repeating": 0.9}, "90% of its answers end in a loop"),
    ({"accuracy": 0.05}, "fell from 40.0% to 5.0%"),
])  # fmt: skip
def test_each_kind_of_collapse_is_told(bad, said):
    good = [healthy()] * health.WINDOW
    assert health.collapse(good + [healthy(**bad)] * (health.WINDOW - 1)) is None  # not long enough
    assert said in health.collapse(good + [healthy(**bad)] * health.WINDOW)
    assert health.collapse(good + [healthy(accuracy=0.99, entropy=0.001)] * health.WINDOW) is None  # solved
    assert health.collapse(good + [healthy(accuracy=0.9, unparsed=0.95)] * health.WINDOW) is None  # wants no marks


def test_memory_is_divided_and_a_limit_is_kept_or_refused(tokenizer):
    from small import llama

    config, page, gib = llama(tokenizer), 2**20, 2**30
    free = memory.fit(None, gib, page, 100, config, 200)
    assert (free.kv_memory, free.apart) == (100 * page, False)
    each = memory.activation_bytes(config)
    enough = memory.fit(free.bytes, gib, page, 100, config, 200)
    assert enough == free
    tight = memory.fit(free.bytes - 1, gib, page, 100, config, 200)
    assert tight.apart and tight.bytes <= free.bytes - 1 and tight.tokens >= 200
    with pytest.raises(InputError, match="GiB do not hold this run, which needs"):
        memory.fit(gib + memory.SPARE + 100 * each, gib, page, 100, config, 200)
    assert memory.peak() >= memory.resident() > 50 * 2**20
