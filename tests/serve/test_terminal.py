"""The terminal: a piped question, a conversation with its commands, and a text continued."""

import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scripted import ScriptedEngine

from twelve.errors import InputError
from twelve.serve import terminal

TEXT = "<think>배를 센다.</think>\n\n열두 척입니다."


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Piped(io.TextIOWrapper):
    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data), encoding="utf-8")


@pytest.fixture
def engine(tokenizer):
    return ScriptedEngine(tokenizer, TEXT)


@pytest.fixture
def asked(monkeypatch):
    """What each prompt was made of."""
    seen = []
    real = terminal.read_prompt

    def remember(tokenizer, messages):
        seen.append(messages)
        return real(tokenizer, messages)

    monkeypatch.setattr(terminal, "read_prompt", remember)
    return seen


def talk(monkeypatch, lines, engine, **options):
    """Run a chat in which a person types `lines`; an exception among them is raised where it stands."""
    waiting = iter([*lines, EOFError])

    def typed(prompt):
        line = next(waiting)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", typed)
    terminal.chat(engine, **options)


def test_a_piped_question_is_answered_and_the_thoughts_go_elsewhere(engine, monkeypatch, capsys, asked):
    monkeypatch.setattr("sys.stdin", Piped("배가 몇 척인가?\n".encode()))
    terminal.chat(engine, system="짧게")
    out, err = capsys.readouterr()
    assert out == "열두 척입니다.\n" and "배를 센다." in err
    assert asked == [[{"role": "system", "content": "짧게"}, {"role": "user", "content": "배가 몇 척인가?"}]]


def test_a_piped_question_as_json(engine, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", Piped(b"how many?"))
    terminal.chat(engine, as_json=True, seed=5)
    said = json.loads(capsys.readouterr().out)
    assert said["content"] == "열두 척입니다." and said["reasoning"] == "배를 센다."
    assert said["finish_reason"] == "stop" and said["seed"] == 5
    assert said["completion_tokens"] == len(engine.model.script)


@pytest.mark.parametrize(("data", "message"), [(b"\n", "empty"), (b"\xff\xfe", "not UTF-8")])
def test_a_useless_pipe_is_bad_input(engine, monkeypatch, data, message):
    monkeypatch.setattr("sys.stdin", Piped(data))
    with pytest.raises(InputError, match=message):
        terminal.chat(engine)


def test_a_conversation_keeps_answers_without_thoughts(engine, monkeypatch, capsys, asked):
    talk(monkeypatch, ["몇 척?", "  ", "정말?", "/new", "몇 척?", "/exit", "never read"], engine)
    assert [[message["content"] for message in messages] for messages in asked] == [
        ["몇 척?"],
        ["몇 척?", "열두 척입니다.", "정말?"],
        ["몇 척?"],
    ]
    assert "tokens" in capsys.readouterr().err


def test_thoughts_are_dimmed_on_a_terminal(engine, monkeypatch):
    out = Terminal()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    talk(monkeypatch, ["몇 척?"], engine)
    assert out.getvalue() == f"{terminal.DIM}배를 센다.{terminal.RESET}\n\n열두 척입니다.\n\n"
    monkeypatch.setattr("sys.stdout", plain := Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    talk(monkeypatch, ["몇 척?"], engine)
    assert plain.getvalue() == "[thinking] 배를 센다.\n\n열두 척입니다.\n\n"


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(engine, monkeypatch, capsys, asked):
    compute = engine.model.step

    def interrupted(step):
        if engine.model.passes == len(engine.model.script) - 3 and len(asked) == 1:
            raise KeyboardInterrupt
        return compute(step)

    monkeypatch.setattr(engine.model, "step", interrupted)
    talk(monkeypatch, ["몇 척?", KeyboardInterrupt, "그래서?"], engine)
    assert "열두".startswith(asked[1][1]["content"][:2]) and asked[1][1]["content"] != "열두 척입니다."
    assert capsys.readouterr().out.count("열두 척입니다.") == 1


def test_a_full_context_is_told_and_the_chat_goes_on(tokenizer, monkeypatch, capsys, asked):
    engine = ScriptedEngine(tokenizer, "ok", context=120)
    talk(monkeypatch, ["x" * 500, "short"], engine)
    assert "context of 120" in capsys.readouterr().err
    assert [message["content"] for message in asked[1]] == ["short"]


def test_a_model_without_a_template_says_so_and_continues(engine, monkeypatch, capsys):
    monkeypatch.setattr(engine.tokenizer, "chat_template", None)
    talk(monkeypatch, ["The ship"], engine)
    out, err = capsys.readouterr()
    assert "no chat template" in err and "열두 척입니다." in out


def test_generate_prints_the_continuation(engine, capsys, monkeypatch):
    terminal.generate(engine, "The ship", stop=["입니다"])
    assert capsys.readouterr().out == "<think>배를 센다.</think>\n\n열두 척\n"
    monkeypatch.setattr("sys.stdin", Piped(b"The ship"))
    with pytest.raises(InputError, match="--stop '': an empty text"):
        terminal.generate(engine, "The ship", stop=[""])
    terminal.generate(engine, "-", n=2)
    assert capsys.readouterr().out == f"{TEXT}\n\n---\n{TEXT}\n"


def test_generate_as_json_names_the_seed(engine, capsys):
    terminal.generate(engine, "The ship", n=2, max_tokens=4, as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["sample"] for line in lines] == [0, 1] and lines[0]["seed"] == lines[1]["seed"] >= 0
    assert all(line["finish_reason"] == "length" and line["completion_tokens"] == 4 for line in lines)


CHAT = """
import sys
sys.path[:0] = {paths}
from scripted import ScriptedEngine
from twelve.data.tokenizer import Tokenizer
from twelve.serve.terminal import chat
chat(ScriptedEngine(Tokenizer.train(["a few words"], vocab_size=300), "말씀 잘 들었습니다."))
"""


def test_korean_can_be_typed_and_corrected_in_a_real_terminal():
    here = Path(__file__).parent
    code = CHAT.format(paths=[str(here), str(here.parents[1])])
    main, side = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "LC_ALL": "C.UTF-8"}
    program = subprocess.Popen([sys.executable, "-c", code], stdin=side, stdout=side, stderr=side, env=environment)
    os.close(side)
    seen = b""

    def read_until(text):
        nonlocal seen
        deadline = time.monotonic() + 30
        while text.encode() not in seen:
            assert select.select([main], [], [], max(0, deadline - time.monotonic()))[0], seen.decode(errors="replace")
            seen += os.read(main, 4096)
        seen = seen.split(text.encode(), 1)[1]

    try:
        read_until("> ")
        os.write(main, "안녕핫\x7f하세요\r".encode())
        read_until("말씀 잘 들었습니다.")
        read_until("> ")
        os.write(main, b"\x04")
        assert program.wait(10) == 0
    finally:
        program.kill()
        os.close(main)
