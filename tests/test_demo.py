"""The demo with steps in the place of minutes: what it writes, says, and does when it is asked again."""

import json
from random import Random

import pytest

from twelve import demo, tasks
from twelve.errors import InputError
from twelve.posttrain.rl import rl
from twelve.train.pretrain import pretrain


@pytest.fixture
def small(monkeypatch):
    """A few steps instead of minutes, a tiny model, one answer a cell."""
    sizes = {"vocab_size": 300, "width": 64, "layers": 1, "experts": 4, "context": 256, "batch": 2}
    monkeypatch.setattr(demo, "MODEL", demo.MODEL | sizes)
    monkeypatch.setattr(demo, "STEP", {"prompts": 4, "group": 2, "max_tokens": 16, "problems": 8})
    monkeypatch.setattr(demo, "ASKED", 1)
    monkeypatch.setattr(demo, "ASKED_BELOW", 1)
    monkeypatch.setattr(demo, "SOLVED", 2_000)
    calls = []

    def few_steps(stage):
        def run(*arguments, minutes, **settings):
            calls.append((stage.__name__, minutes))
            return stage(*arguments, steps=3, **settings)

        return run

    monkeypatch.setattr(demo, "pretrain", few_steps(pretrain))
    monkeypatch.setattr(demo, "rl", few_steps(rl))
    return calls


def test_the_demo_leaves_models_a_report_and_a_summary(small, tmp_path, capsys):
    result = demo.demo(tmp_path / "demo", minutes=1, device="cpu")
    said = capsys.readouterr().out
    assert "problems of 8 steps" in said and "control" in said and "(right: " in said
    assert [name for name, _ in small] == ["pretrain", "rl", "rl"] and small[1][1] == small[2][1]  # the same seconds
    assert result["next"].startswith(f"twelve chat {tmp_path}/demo/model")
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text(encoding="utf-8"))
    assert set(summary["accuracy"]) == {"cold_start", "rl", "control"}
    assert "rejection" in summary["accuracy"]["control"]["method"]
    for found in summary["accuracy"].values():
        assert {"greedy", "sampled", "standard_error", "seconds"} <= set(found)
        assert 0 <= found["greedy"] <= 1 and found["seconds"] > 0
    assert summary["seconds"] > sum(found["seconds"] for found in summary["accuracy"].values())
    assert len(summary["cells"]["rl"]) == 36
    page = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    assert "Right answers at level 8" in page and "Tokens of an answer" in page
    assert summary["cells"]["rl"][0]["samples"][0]["prompt"] in page

    again = demo.demo(tmp_path / "demo", minutes=1, device="cpu")
    assert "is trained already" in capsys.readouterr().out and len(small) == 3
    assert again["accuracy"]["rl"] == result["accuracy"]["rl"] and again["steps"] == 3
    with pytest.raises(InputError, match="holds a demo with other options"):
        demo.demo(tmp_path / "demo", minutes=2, device="cpu")


def test_files_of_others_stay(small, tmp_path):
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(InputError, match="holds a report.html that is no demo's"):
        demo.demo(tmp_path, minutes=1, device="cpu")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"] and not small


def test_the_corpus_holds_both_languages_and_no_test_problem(tmp_path):
    demo.write_problems(tmp_path / "a.jsonl", 2_000, seed=0)
    rows = [json.loads(line)["messages"] for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    questions = {question["content"] for question, _ in rows}
    assert len(rows) == 2_000
    korean = sum(any("가" <= letter <= "힣" for letter in question["content"]) for question, _ in rows)
    assert korean == 1_000
    asked = [
        problem.question
        for name in demo.TASKS
        for level in (*demo.LEVELS, *demo.HARD)
        for problem, _ in zip(tasks.problems(name, "test", 0, [level]), range(50), strict=False)
    ]
    assert not questions & set(asked)


def test_a_trace_that_is_broken_off_says_where_it_got():
    problem = next(tasks.problems("arithmetic", "train", 0, [8]))
    lengths = set()
    for seed in range(60):
        _, said = demo.broken_off(problem, Random(seed))
        steps = said["content"].removeprefix("<think>").partition("</think>")[0].splitlines()
        assert problem.steps.startswith("\n".join(steps))
        assert said["content"].endswith(f"<answer>{steps[-1].partition('=')[2]}</answer>")
        lengths.add(len(steps))
    assert lengths == set(range(1, 9))
