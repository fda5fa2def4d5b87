"""The verb: two models measured on the same, compared, in JSON and as a page; evaluation files in training text."""

import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout

import pytest

from twelve import cli
from twelve.config import small_v3
from twelve.convert import save
from twelve.data.tokenizer import Tokenizer
from twelve.errors import InputError
from twelve.evaluate.evaluate import evaluate
from twelve.model import Transformer

LINES = [f"Ship number {number} went out to sea. {number}번째 배가 바다로 나갔다." for number in range(30)]


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """Two models of random weights, a text, choices, and a task, each a file."""
    folder = tmp_path_factory.mktemp("room")
    tokenizer = Tokenizer.train(LINES * 5, 320)
    for seed, name in enumerate(("one", "two")):
        model = Transformer(small_v3(tokenizer.vocab_size, width=64, layers=1, experts=0, context=128))
        save(model.init_weights(seed), tokenizer, folder / name)
    write(folder / "text.jsonl", [{"text": line} for line in LINES])
    questions = [("Ship number {} went out to", ["sea.", "bed."]), ("{}번째 배가", ["바다로", "산으로"])]
    write(folder / "choices.jsonl", [
        {"prompt": form.format(number), "choices": choices, "answer": 0}
        for number in range(12) for form, choices in questions
    ])  # fmt: skip
    (folder / "split").mkdir()
    for name in ("x-train.jsonl", "x-val.jsonl"):
        write(folder / "split" / name, [{"text": line} for line in LINES])
    write(folder / "task.jsonl", [{"question": f"{a} + {a}?", "answer": str(2 * a)} for a in range(6)])
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def run(*arguments, expect=0):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = cli.main(["eval", *map(str, arguments), "--json"])
    assert status == expect, err.getvalue()
    return json.loads(out.getvalue(), parse_constant=pytest.fail) if expect == 0 else err.getvalue().splitlines()[-1]


def test_two_models_on_everything(room, tmp_path):
    result = run(
        room / "one", "--text", room / "text.jsonl", "--choices", room / "choices.jsonl", "--task",
        f"{room / 'task.jsonl'}#test", "arithmetic", "--problems", 3, "--samples", 2, "--compare", room / "two",
        "--out", tmp_path / "new" / "results.json", "--report", tmp_path / "report.html", "--device", "cpu",
    )  # fmt: skip
    assert result == json.loads((tmp_path / "new" / "results.json").read_text(encoding="utf-8"))
    assert [row["language"] for row in result["choices"]] == ["en", "ko"] and result["temperature"] == 1
    assert [(row["language"], row["repeats"]) for row in result["tasks"]] == [("en", 2), ("en", 2), ("ko", 2)]
    assert {"pass@1", "pass@2", "maj@2", "agreement"} == result["tasks"][0]["measures"].keys()
    assert [row["items"] for row in result["comparisons"]] == [30, 12, 12, 12, 12, 3, 3, 3]
    for row in result["comparisons"]:
        assert row["difference"] == pytest.approx(row["first"] - row["second"]) and 0 <= row["p_value"] <= 1
        assert row["measure"].startswith((str(room), "arithmetic"))
    assert result["against"]["text"][0]["bits_per_byte"] == result["comparisons"][0]["second"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for words in ("Bits per byte", "Right choices", "Comparison", "McNemar", "pass@k en", "choices.jsonl ko"):
        assert words in page


def test_a_model_compared_with_itself_does_not_differ(room):
    wanted = {"texts": [room / "text.jsonl"], "choices": [room / "choices.jsonl"], "languages": ["ko"]}
    result = evaluate(room / "one", **wanted, compare=room / "one")
    assert [(row["difference"], row["p_value"]) for row in result["comparisons"]] == [(0, 1)] * 3
    assert [row["language"] for row in result["choices"]] == ["ko"]


def test_the_page_shows_all_that_was_measured(room, tmp_path):
    """Models and files of equal names, as in runs/a/model and runs/b/model."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").symlink_to(room / name)
        write(tmp_path / name / "text.jsonl", [{"text": LINES[0]}])
    texts = [tmp_path / name / "text.jsonl" for name in ("one", "two")]
    evaluate(tmp_path / "one" / "model", texts=texts, compare=tmp_path / "two" / "model", report=tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    bars = [f"<span>{text}, {tmp_path / model / 'model'}</span>" for model in ("one", "two") for text in texts]
    assert all(page.count(bar) == 1 for bar in bars)
    assert "<small> ±" not in page  # of a single document nothing is known


def test_text_that_a_tokenizer_alters_is_told(room, tmp_path):
    shutil.copytree(room / "one", tmp_path / "one")
    values = json.loads((tmp_path / "one" / "tokenizer.json").read_text(encoding="utf-8"))
    values["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "one" / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    lower = write(tmp_path / "lower.jsonl", [{"text": "a ship"}, {"text": "배"}, {"text": "A Ship"}])
    result = run(tmp_path / "one", "--text", room / "text.jsonl", lower)
    assert [row["altered"] for row in result["text"]] == [30, 1]
    assert [row["altered"] for row in run(room / "one", "--text", lower)["text"]] == [0]
    assert "the tokenizer cannot write" in run(tmp_path / "one", "--facts", "--language", "en", expect=2)


def test_a_single_document_has_no_standard_error(room, tmp_path, capsys):
    (tmp_path / "book.txt").write_text(" ".join(LINES), encoding="utf-8")
    result = evaluate(room / "one", texts=[tmp_path / "book.txt"], compare=room / "two")
    assert result["text"][0]["standard_error"] is result["comparisons"][0]["p_value"] is None
    said = capsys.readouterr().out
    assert "1 document, so no standard error" in said and "a single item, so no test" in said and "nan" not in said


def test_planted_overlaps_are_found_and_nothing_else(room, tmp_path):
    """Training text with two of the evaluation's rows in it, and training text without."""
    asked = [f"Question {n}: what did sailor {n} bring home from island {n * 7} in {1590 + n}?" for n in range(20)]
    write(tmp_path / "choices.jsonl", [{"prompt": q, "choices": ["fish", "rice"], "answer": 0} for q in asked])
    disjoint = [f"Harbour {n} has {n * 3} lamps, {n * 5} boats and a wall that is {n} steps long." for n in range(99)]
    planted = [f"It said: {asked[3]} Fish!", asked[11].upper()]
    write(tmp_path / "clean.jsonl", [{"text": text} for text in disjoint])
    write(tmp_path / "dirty.jsonl", [{"text": text} for text in [*disjoint, *planted]])
    found = run("--choices", tmp_path / "choices.jsonl", "--contamination", tmp_path / "clean.jsonl", "--report",
                tmp_path / "report.html")  # fmt: skip
    [row] = found["contamination"]
    assert (row["items"], row["found"], row["share"], row["examples"]) == (20, 0, 0, [])
    [row] = run("--choices", tmp_path / "choices.jsonl", "--contamination", tmp_path / "dirty.jsonl")["contamination"]
    assert (row["items"], row["found"]) == (20, 2)
    assert [each["where"].rpartition(":")[2] for each in row["examples"]] == ["4", "12"]
    assert "sailor 3" in row["examples"][0]["shared"]
    assert "Evaluation files in training text" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_every_row_that_says_the_same_is_found(tmp_path):
    asked = "What did the captain of the twelve ships write to the king before the battle?"
    rows = [{"prompt": f"{asked} {end}", "choices": ["a", "b"], "answer": 0} for end in ("Say it.", "Why?", "When?")]
    path = write(tmp_path / "choices.jsonl", rows)
    train = write(tmp_path / "train.jsonl", [{"text": f"He was asked: {asked.lower()}"}])
    [row] = run("--choices", path, "--contamination", train)["contamination"]
    assert (row["items"], row["found"]) == (3, 3) and len(row["examples"]) == 3


def test_what_a_folder_holds_out_was_not_trained_on(tmp_path):
    rows = [{"text": f"{line} {line[::-1]} and what the sailors of that ship told us later"} for line in LINES]
    (tmp_path / "texts").mkdir()
    held_out = write(tmp_path / "texts" / "sea-val.jsonl", rows[:10])
    write(tmp_path / "texts" / "sea-train.jsonl", [{"text": f"Harbour {n}: lamps and stones."} for n in range(50)])
    for path, found in ((tmp_path / "texts", 0), (held_out, 10)):
        [row] = run("--text", held_out, "--contamination", path)["contamination"]
        assert (row["items"], row["found"]) == (10, found)


def test_items_too_short_to_look_for_are_counted(tmp_path):
    prompts = ["2 + 2 ="] * 3 + ["How many ships did the admiral have left when all the others were lost?"]
    path = write(tmp_path / "a.jsonl", [{"prompt": one, "choices": ["4", "12"], "answer": 0} for one in prompts])
    train = write(tmp_path / "train.jsonl", [{"messages": [{"role": "user", "content": "2 + 2 = 4"}]}])
    found = run("--choices", path, "--contamination", train)
    assert found["contamination_short"] == 3 and found["contamination"][0]["found"] == 0


def test_texts_and_task_files_are_looked_for_too(room, tmp_path):
    clean = write(tmp_path / "clean.jsonl", [{"text": "Nothing of all this. " * 9}])
    found = run("--text", room / "text.jsonl", "--task", f"{room / 'task.jsonl'}#test", "arithmetic", "--contamination",
                clean, room / "text.jsonl")["contamination"]  # fmt: skip
    assert [(row["items"], row["found"]) for row in found if row["path"].endswith("text.jsonl")] == [(30, 30)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to measure"),
        (["--contamination", "text.jsonl"], "nothing to measure"),
        (["--task", "arithmetic", "--contamination", "text.jsonl"], "looks for evaluation files"),
        (["--text", "none.jsonl"], "none.jsonl"),
        (["--choices", "none.jsonl"], "none.jsonl"),
        (["--choices", "text.jsonl"], "text.jsonl:1: neither"),
        (["--task", "arithmetic", "--samples", "2", "--temperature", "0"], "are all the same"),
        (["--text", "text.jsonl", "--out", "."], "is a folder"),
        (["--choices", "choices.jsonl", "--compare", "nowhere"], "nowhere"),
        (["--text", "-", "--compare", "two"], "standard input can be read once"),
        (["--text", "text.jsonl", "--facts", "10"], "10 facts are too few"),
        (["--task", "arithmetic", "--level", "99"], "level 99 must lie between"),
        (["--task", "arithmetic", "--samples", "2000"], "2000 samples: 1000 of a problem are the most"),
        (["--text", "text.jsonl", "--out", "text.jsonl/x.json"], "cannot be written: text.jsonl is a file"),
        (["--text", "text.jsonl", "--report", "text.jsonl"], "--report text.jsonl is read"),
        (["--choices", "choices.jsonl", "--out", "choices.jsonl"], "--out choices.jsonl is read"),
        (["--text", "text.jsonl", "--out", "x", "--report", "x"], "--report x is read, or written"),
        (["--choices", "choices.jsonl", "--contamination", "-"], "save standard input in one"),
        (["--choices", "-", "--contamination", "text.jsonl"], "save standard input in one"),
        (["--text", "split"], "x-val.jsonl is kept apart"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_measured(room, monkeypatch, arguments, words):
    monkeypatch.chdir(room)
    monkeypatch.setattr("twelve.evaluate.evaluate.load", lambda *given, **more: pytest.fail("a model was read"))
    assert words in run("one", *arguments, expect=2)


def test_what_needs_a_model_says_so(room):
    assert "name a MODEL" in run("--text", room / "text.jsonl", expect=2)
    assert "name a MODEL" in run("--compare", room / "two", "--contamination", room / "text.jsonl", expect=2)


def test_a_language_that_no_row_has(room, tmp_path):
    path = write(tmp_path / "en.jsonl", [{"prompt": "a", "choices": ["b", "c"], "answer": 0}])
    with pytest.raises(InputError, match="has no rows in ko"):
        evaluate(room / "one", choices=[path], languages=["ko"])
