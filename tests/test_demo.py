"""The demo, made small: what it writes, that it is not trained twice, and that its test problems are unseen."""

import json

import pytest

from twelve import demo, tasks
from twelve.errors import InputError
from twelve.train.pretrain import pretrain


@pytest.fixture
def small(monkeypatch):
    """A demo of seconds: few steps instead of minutes, a tiny model, one answer a cell."""
    sizes = {"vocab_size": 300, "width": 64, "layers": 1, "experts": 4, "context": 128, "batch": 2}
    monkeypatch.setattr(demo, "MODEL", demo.MODEL | sizes)
    monkeypatch.setattr(demo, "ASKED", 1)
    monkeypatch.setattr(demo, "SOLVED", 2_000)
    calls = []

    def few_steps(*arguments, minutes, **settings):
        calls.append(minutes)
        return pretrain(*arguments, steps=3, **settings)

    monkeypatch.setattr(demo, "pretrain", few_steps)
    return calls


def test_the_demo_leaves_a_model_a_report_and_a_summary(small, tmp_path, capsys):
    result = demo.demo(tmp_path / "demo", minutes=1, device="cpu")
    said = capsys.readouterr().out
    assert "level 4" in said and "Korean" in said and "(right: " in said
    assert result["next"].startswith(f"twelve chat {tmp_path}/demo/model")
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text(encoding="utf-8"))
    assert summary["accuracy"]["asked"] == 16 and set(summary["accuracy_by_language"]) == {"en", "ko"}
    assert summary["steps"] == 3 and len(summary["cells"]) == 16
    page = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    assert "Accuracy on held-out problems" in page and summary["cells"][-1]["samples"][0]["prompt"] in page

    again = demo.demo(tmp_path / "demo", minutes=1, device="cpu")
    assert "is trained already" in capsys.readouterr().out and small == [1]
    assert again["accuracy"] == result["accuracy"] and again["steps"] == 3
    with pytest.raises(InputError, match="holds a demo with other options"):
        demo.demo(tmp_path / "demo", minutes=2, device="cpu")


def test_the_corpus_holds_both_languages_and_no_test_problem(tmp_path):
    demo.write_problems(tmp_path / "a.jsonl", 2_000, seed=0)
    rows = [json.loads(line)["messages"] for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    questions = {question["content"] for question, _ in rows}
    assert len(rows) == 2_000
    korean = sum(any("가" <= letter <= "힣" for letter in question["content"]) for question, _ in rows)
    assert korean == 1_000
    asked = [
        problem.question
        for name in tasks.names()
        for level in demo.LEVELS
        for problem, _ in zip(tasks.problems(name, "test", 0, [level]), range(50), strict=False)
    ]
    assert not questions & set(asked)
