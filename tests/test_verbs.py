"""Every verb once, in the order of the pipeline, on a few kilobytes; and what they say to bad input."""

import io
import json
import pickle
import socket
import sys

import pytest

from twelve import cli, tasks
from twelve.convert import load
from twelve.data.tokenizer import Tokenizer

SHAPE = {"width": 64, "layers": 1, "experts": 4, "experts-per-token": 2, "mtp": 1, "context": 128, "batch": 2}
SMALL = [word for name, value in {**SHAPE, "threads": 1, "device": "cpu"}.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder with texts, conversations, and a model pretrained and fine-tuned on them by the verbs themselves."""
    folder = tmp_path_factory.mktemp("verbs")
    lines = [f"{number}번째 배가 바다로 나갔다. Ship {number} went out to sea." for number in range(300)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    talk = [{"role": "user", "content": "몇 척?"}, {"role": "assistant", "content": "<think>12</think>열두 척."}]
    (folder / "talk.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 50)
    run(folder, "tokenize", "text.jsonl", "--out", "tokens", "--vocab-size", "300")
    run(folder, "pretrain", "tokens", "--out", "base", "--steps", "3", *SMALL)
    run(folder, "sft", "base", "talk.jsonl", "--out", "chatty", "--steps", "3", "--batch", "2", "--context", "64")
    return folder


def run(folder, *arguments, stdin="", expect=0):
    """What a verb prints with --json, as an object; file names are taken from `folder`."""
    named = [str(folder / part) if (folder / part).exists() or part in MADE else part for part in arguments]
    out, err = io.StringIO(), io.StringIO()
    before = sys.stdin, sys.stdout, sys.stderr
    sys.stdin, sys.stdout, sys.stderr = io.TextIOWrapper(io.BytesIO(stdin.encode())), out, err
    try:
        status = cli.main([*named, "--json"])
    finally:
        sys.stdin, sys.stdout, sys.stderr = before
    assert status == expect, err.getvalue()
    if expect == 0:
        return json.loads(out.getvalue())
    assert out.getvalue() == "" and err.getvalue().splitlines()[-1].startswith("twelve: error: ")
    return err.getvalue().splitlines()[-1]


MADE = {"tokens", "base", "chatty", "copy", "new"}


def test_tokens_and_models_are_folders(room):
    assert (room / "tokens" / "meta.json").exists() and Tokenizer.load(room / "tokens").vocab_size == 300
    for name in ("base", "chatty"):
        files = {path.name for path in (room / name).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= files
        assert (room / name / "training" / "report.html").exists() and ".lock" not in files
        model, tokenizer = load(room / name)
        assert model.config.num_nextn_predict_layers == 1 and tokenizer.chat_template


def test_eval_measures_text_and_tasks(room):
    result = run(room, "eval", "chatty", "--text", "text.jsonl", "--limit", "5", "--task", "all", "--problems", "2")
    [text] = result["text"]
    assert text["documents"] == 5 and 0 < text["bits_per_byte"] < 16
    asked = [(row["task"], row["language"]) for row in result["tasks"]]
    assert asked == [(name, language) for name in tasks.names() for language in ("en", "ko")]
    assert all(row["asked"] == 2 and "standard_error" in row for row in result["tasks"])


def test_generate_continues_and_repeats_with_the_seed(room):
    first, again = (run(room, "generate", "base", "Ship", "--max-tokens", "9", "--seed", "5") for _ in range(2))
    assert first == again and first["completion_tokens"] <= 9 and first["seed"] == 5


def test_chat_answers_standard_input(room):
    result = run(room, "chat", "chatty", "--max-tokens", "5", "--temperature", "0", stdin="몇 척?")
    assert result["completion_tokens"] <= 5 and {"content", "reasoning"} <= result.keys()


def test_convert_writes_the_same_model(room):
    result = run(room, "convert", "chatty", "--out", "copy")
    ours, copy = (load(room / name)[0].state_dict() for name in ("chatty", "copy"))
    assert ours.keys() == copy.keys() and all((ours[name] == copy[name]).all() for name in ours)
    assert result["parameters"] == sum(p.numel() for p in load(room / "copy")[0].parameters())


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.txt", None, "none.txt"),
        ("empty.txt", b"", "empty"),
        ("blank.jsonl", b'{"text": ""}\n', "empty"),
        ("noise.txt", bytes(range(256)) * 40, "cannot be read as UTF-8 text"),
        ("types.jsonl", b'{"text": 12}\n', "types.jsonl:1"),
        ("list.jsonl", b'{"text": "a"}\n[1]\n', "list.jsonl:2"),
        ("roles.jsonl", b'{"messages": [{"role": "king", "content": "x"}]}\n', "role"),
        ("cut.jsonl.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00", "damaged or cut short"),
        ("image.png", b"\x89PNG", "not a kind of file"),
    ],
)
@pytest.mark.parametrize("verb", ["tokenize", "pretrain"])
def test_a_bad_corpus_is_one_line_and_nothing_is_left(room, tmp_path, verb, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    line = run(tmp_path, verb, str(tmp_path / name), "--out", str(tmp_path / "out"), expect=2)
    assert words in line
    assert not (tmp_path / "out").exists()


def test_too_small_a_vocabulary_is_told(room, tmp_path):
    line = run(room, "tokenize", "text.jsonl", "--out", str(tmp_path / "out"), "--vocab-size", "256", expect=2)
    assert "vocabulary of 256 is too small" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["chat", "generate", "eval", "serve", "convert", "quantize"])
@pytest.mark.parametrize("kind", ["missing", "empty", "pickle", "cut", "unknown"])
def test_a_bad_model_is_one_line(room, tmp_path, verb, kind):
    folder = tmp_path / "model"
    if kind != "missing":
        folder.mkdir()
    if kind == "pickle":
        (folder / "config.json").write_bytes((room / "base" / "config.json").read_bytes())
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    if kind == "cut":
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
            (folder / name).write_bytes((room / "base" / name).read_bytes())
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    if kind == "unknown":
        (folder / "config.json").write_text('{"model_type": "abacus"}')
    out = ["--out", str(tmp_path / "out")]
    extra = {"convert": out, "quantize": out, "eval": ["--task", "all"], "serve": ["--port", "0"]}
    line = run(tmp_path, verb, str(folder), *extra.get(verb, []), stdin="hi", expect=2)
    assert {"missing": "does not exist", "empty": "not a model folder", "pickle": "pickle", "cut": "model.safetensors",
            "unknown": "abacus"}[kind] in line  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_port_in_use_is_told_before_the_model_is_read(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        line = run(tmp_path, "serve", "no such model", "--port", str(taken.getsockname()[1]), expect=2)
    assert "choose another with --port" in line


def test_a_finished_run_is_not_trained_again(room):
    line = run(room, "pretrain", "tokens", "--out", "base", "--steps", "3", *SMALL, expect=2)
    assert "is complete" in line
    line = run(room, "pretrain", "tokens", "--out", "base", "--steps", "4", *SMALL, expect=2)
    assert "steps=3, not 4" in line
    line = run(room, "sft", "base", "talk.jsonl", "--out", "base", expect=2)
    assert "name another folder" in line


def test_eval_wants_something_to_measure(room):
    assert "nothing to measure" in run(room, "eval", "base", expect=2)
    assert "unknown task 'chess'" in run(room, "eval", "base", "--task", "chess", expect=2)
