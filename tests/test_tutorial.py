"""The tutorial: both languages say the same, its file is the file, and its way can be gone, here with a tiny model."""

import json
import re
import shutil
import sys
from itertools import islice
from pathlib import Path

import pytest
from test_readme import blocks, commands

from twelve import cli, convert, tasks
from twelve.data.tokenizer import Tokenizer
from twelve.engine import Engine, Request
from twelve.evaluate.accuracy import asked, prompt_ids
from twelve.train.sft import sft

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE / "posttrain"), str(HERE / "serve")]
from scripted import serving  # noqa: E402
from small import folder, llama  # noqa: E402

TUTORIALS = [HERE.parent / "docs" / "tutorial.md", HERE.parent / "docs" / "tutorial.ko.md"]
EXAMPLE = HERE.parent / "examples" / "mine.py"
TALKS = ("chat", "serve")
TINY = ["--steps", "2", "--prompts", "4", "--group", "4"]  # instead of minutes


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.name)
def test_every_command_can_be_typed(path):
    assert {command[0] for command in commands(path)} == {"eval", "rl", "chat", "serve", "quantize"}
    for command in commands(path):
        cli.build_parser().parse_args(command)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.name)
def test_options_in_the_text_exist(path, capsys):
    for option in set(re.findall(r"`(--[^`]+)`", path.read_text(encoding="utf-8"))):
        if " " in option:
            cli.build_parser().parse_args(["rl", "model", "--task", "mine.py", *option.split()])
            continue
        with pytest.raises(SystemExit):
            cli.main(["rl", "--help"])
        assert re.search(rf"^  {option} ", capsys.readouterr().out, re.MULTILINE), option


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.name)
def test_the_task_file_shown_is_the_file(path):
    assert blocks(path, "python")[0] == EXAMPLE.read_text(encoding="utf-8")
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 32


def test_both_languages_go_the_same_way():
    english, korean = TUTORIALS
    for kind in ("sh", "python"):
        assert blocks(english, kind) == blocks(korean, kind)
    marks = (r"^## ", r"^- ", r"^\| ", r"^```", r"\]\(", r"^<!-- figures")
    shapes = [[len(re.findall(mark, path.read_text(encoding="utf-8"), re.MULTILINE)) for mark in marks]
              for path in TUTORIALS]  # fmt: skip
    assert shapes[0] == shapes[1]


def test_the_first_idea_for_the_checker_fails_the_audit_as_the_tutorial_says(tmp_path, capsys):
    texts = [path.read_text(encoding="utf-8") for path in TUTORIALS]
    naive = re.search(r"^    (return problem.*)$", texts[0], re.MULTILINE)[1]
    source = EXAMPLE.read_text(encoding="utf-8")
    path = tmp_path / "naive.py"
    path.write_text(source[: source.index("    return is_equal")] + f"    {naive}\n")
    assert cli.main(["eval", "--audit", str(path), str(EXAMPLE), "--json"]) == 0
    first, now = json.loads(capsys.readouterr().out)["tasks"]
    assert now["passed"] and not first["passed"] and first["false_accepts"]["kinds"]["several answers"]["failed"]
    assert all(f"{first['false_accepts']['failed']:,}" in text for text in texts)


def test_the_way_from_the_idea_to_an_answer_over_http(tmp_path, monkeypatch, capsys):
    """Every command of the tutorial in its order, but for the chat; with a tiny model and two orders."""
    (tmp_path / "examples").mkdir()
    drawn = "number = draw.randint(1000, 9999)"
    source = EXAMPLE.read_text(encoding="utf-8")
    assert drawn in source
    (tmp_path / "examples" / "mine.py").write_text(source.replace(drawn, "number = draw.choice((2047, 5518))"))
    monkeypatch.chdir(tmp_path)
    task = "examples/mine.py"
    base = _beginner(tmp_path / "base", task)
    typed = [command for command in commands(TUTORIALS[0]) if command[0] not in TALKS]
    found = [_run(_smaller(command, base), capsys) for command in typed]
    before, audited, rl, control, *later = found
    assert audited["passed"] and audited["tasks"][0]["false_accepts"]["tried"] == 300
    assert 0 < before["tasks"][0]["accuracy"] < 1 and rl["accuracy_before"] == before["tasks"][0]["accuracy"]
    assert rl["steps"] == control["steps"] == 2 and len(later) == 3
    rows = (tmp_path / "runs/order/training/metrics.jsonl").read_text().splitlines()
    assert any(json.loads(row)["kept"] > 0 for row in rows)  # there was something to learn from
    for name in ("order", "order-control"):
        page = (tmp_path / "runs" / name / "training" / "report.html").read_text(encoding="utf-8")
        assert "Groups that taught something" in page and "Largest difference between sampler and trainer" in page

    model, tokenizer = convert.load("runs/order", packed=True)
    engine = Engine(model, tokenizer)
    problem = next(tasks.problems(task, "test", 0, [1], ["en"]))
    [alone] = engine.generate([Request(prompt_ids(tokenizer, problem), 10, 0.0)])
    assert tasks.score_all([problem], [alone.text])[0] in (0.0, 1.0)
    with serving(engine, "order") as url:
        said = _client(url, problem.question, monkeypatch)
    assert said == alone.text  # the client asks as training asked


def test_a_file_of_real_messages_is_a_task(tmp_path):
    shutil.copy(EXAMPLE, tmp_path)
    (tmp_path / "real.py").write_text(blocks(TUTORIALS[0], "python")[2])
    rows = [{"question": f"Parcel {number} is lost.", "answer": str(number)} for number in range(2000, 2060)]
    (tmp_path / "real.jsonl").write_text("\n".join(map(json.dumps, rows)))
    name = str(tmp_path / "real.py")
    held_out = list(tasks.problems(name, "test", 0, [1], ["en"]))
    assert 0 < len(held_out) < 20
    assert tasks.score_all(held_out[:1], [f"{held_out[0].answer}."]) == [1.0]
    assert asked(held_out[0])[0]["content"].startswith("Which order")


def _beginner(path: Path, task: str) -> str:
    """A folder of a tiny model that has seen what an answer looks like."""
    some = list(islice(tasks.problems(task, "train", 0, [1], ["en"]), 96))
    words = [f"{message['content']} {problem.answer}" for problem in some for message in asked(problem)]
    tokenizer = Tokenizer.train(words, vocab_size=512)
    fresh = folder(path / "fresh", tokenizer, llama(tokenizer, layers=1, initializer_range=0.05))
    solved = path / "solved.jsonl"
    rows = [{"messages": [*asked(one), {"role": "assistant", "content": one.answer}]} for one in some]
    solved.write_text("\n".join(map(json.dumps, rows)))
    sft(fresh, [str(solved)], path / "model", steps=40, batch=8, context=128, learning_rate=0.02, quiet=True)
    return str(path / "model")


def _smaller(command: list[str], base: str) -> list[str]:
    command = [base if word == "smollm2" else word for word in command]
    if "--minutes" in command:
        at = command.index("--minutes")
        command[at : at + 2] = [*TINY, "--problems", "8"]
    if "--memory" in command:  # the process of all tests is not the tutorial's
        command[command.index("--memory") + 1] = "64GiB"
    if "--problems" in command:
        command[command.index("--problems") + 1] = "8"
    return command + (["--wrong-answers", "300"] if "--audit" in command else [])


def _run(command: list[str], capsys) -> dict:
    capsys.readouterr()
    assert cli.main([*command, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def _client(url: str, question: str, monkeypatch) -> str:
    """What the tutorial's program gets from a server."""
    monkeypatch.syspath_prepend("examples")
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    source = blocks(TUTORIALS[0], "python")[1].replace("http://127.0.0.1:8000", url)
    names: dict = {}
    exec(source, names)
    monkeypatch.delitem(sys.modules, "mine")
    return names["order"](question)
