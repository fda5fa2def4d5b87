"""The front door: help is quick and short, bad input is one line and status 2, --json is one object."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from twelve import cli
from twelve.errors import InputError

VERBS = [
    "demo", "doctor", "pull", "plan", "filter", "tokenize", "pretrain", "sft", "rl", "distill", "eval", "chat",
    "generate", "serve", "convert", "quantize",
]  # fmt: skip


def run(*arguments, **settings):
    return subprocess.run(
        [sys.executable, "-m", "twelve", *arguments], capture_output=True, text=True, timeout=60, **settings
    )


@pytest.fixture
def verb(monkeypatch):
    """Replace what `twelve convert` does."""

    def replace(function):
        monkeypatch.setattr(cli, "convert", function)
        return ["convert", "model", "--out", "folder"]

    return replace


def test_help_takes_less_than_a_second_and_imports_no_torch():
    code = "import sys, twelve.cli; twelve.cli.build_parser().format_help(); print('torch' in sys.modules)"
    took = []
    for _ in range(3):  # the quickest of them, on a busy machine
        began = time.monotonic()
        assert run("--help").returncode == 0
        took.append(time.monotonic() - began)
    assert min(took) < 1
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("name", VERBS)
def test_help_of_a_verb_fits_a_screen(name, capsys):
    with pytest.raises(SystemExit) as leave:
        cli.main([name, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert leave.value.code == 0 and max(map(len, lines)) <= 110
    assert len(lines) <= {"rl": 40, "pretrain": 34}.get(name, 32)
    assert any("--json" in line for line in lines)


def test_the_overview_names_every_verb(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert [name for name in listed if name in VERBS] == VERBS and len(lines) <= 32


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "arguments are required: VERB"),
        (["fly"], "invalid choice: 'fly'"),
        (["pretrain", "a.txt", "--steps", "-3"], "--steps: '-3' is not a whole number from 1 on"),
        (["pretrain", "a.txt", "--steps", "1.5"], "'1.5' is not a whole number"),
        (["pretrain", "a.txt", "--minutes", "nan"], "'nan' is not a number above 0"),
        (["pretrain", "a.txt", "--minutes", "1", "--steps", "1"], "not allowed with"),
        (["sft", "m", "a.jsonl", "--learning-rate", "0"], "'0' is not a number above 0"),
        (["chat", "m", "--top-p", "1.1"], "'1.1' is not a number above 0, at most 1"),
        (["chat", "m", "--temperature", "-1"], "'-1' is not a number from 0 on"),
        (["chat", "m", "--device", "abacus"], "'abacus' is not a device of this machine"),
        (["serve", "m", "--port", "65536"], "'65536' is not a port"),
        (["plan", "--minutes", "0"], "'0' is not a number above 0"),
        (["plan", "--minutes", "1e308"], "'1e308' is too large a number"),
        (["plan", "--threads", "9" * 400], "too large a number"),
        (["quantize", "m", "--out", ""], "--out names nothing"),
        (["plan", "--parameters", "7 billion"], "'7 billion' is not a number like 350M, 7B or 14.8T"),
        (["plan", "--memory", "9" * 400], "is not a size"),
        (["plan", "--parameters", "9" * 400], "is not a number like"),
        (["eval", "m", "--language", "fr", "--task", "all"], "invalid choice: 'fr'"),
        (["convert", "m"], "--out"),
        (["pretrain", "a.txt", "--step", "3"], "unrecognized arguments: --step"),
    ],
)
def test_bad_options_are_one_line_and_status_2(arguments, words, capsys):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("twelve: error: ") and err.count("\n") == 1 and words in err


def test_bad_input_is_one_line_and_status_2(verb, capsys):
    def fail(options):
        raise InputError("the file is\nbroken")

    assert cli.main(verb(fail)) == 2
    assert capsys.readouterr().err == "twelve: error: the file is broken\n"


def test_an_operating_system_error_names_its_path(verb, capsys, tmp_path):
    assert cli.main(verb(lambda options: (tmp_path / "none").read_text())) == 2
    assert capsys.readouterr().err == f"twelve: error: {tmp_path}/none: No such file or directory\n"


def test_a_bug_keeps_its_traceback(verb):
    with pytest.raises(ZeroDivisionError):
        cli.main(verb(lambda options: 1 / 0))


def test_ctrl_c_says_how_to_go_on_if_the_verb_did(verb, capsys):
    def stop(options):
        raise KeyboardInterrupt("saved at step 7; run the same command again to go on")

    assert cli.main(verb(stop)) == 130
    assert capsys.readouterr().err == "twelve: stopped: saved at step 7; run the same command again to go on\n"


def test_a_result_ends_with_what_to_do_next(verb, capsys):
    result = {"accuracy": 0.123456789, "model": "runs/x", "tasks": [1, 2], "next": "twelve chat runs/x"}
    assert cli.main(verb(lambda options: result)) == 0
    assert capsys.readouterr().out == "accuracy  0.123457\nmodel     runs/x\nnext: twelve chat runs/x\n"


def test_control_characters_in_what_others_wrote_do_not_reach_the_terminal(verb, capsys):
    assert cli.main(verb(lambda options: {"licence": "\x1b[31m붉은\x9b2J 배\u00a0", "next": "twelve chat \x07"})) == 0
    assert capsys.readouterr().out == "licence  \\x1b[31m붉은\\x9b2J 배\u00a0\nnext: twelve chat \\x07\n"


def test_json_is_the_one_thing_on_standard_output(verb, capsys):
    def work(options):
        print("reading")
        return {"이름": 1, "parts": [1.5, None]}

    assert cli.main([*verb(work), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"이름": 1, "parts": [1.5, None]} and "이름" in out and err == "reading\n"


def test_a_reader_that_leaves_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "twelve", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    process.wait()


def test_every_option_says_what_it_is():
    parser = cli.build_parser()
    [verbs] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    assert list(verbs.choices) == VERBS
    for made in verbs.choices.values():
        assert all(action.help for action in made._actions if action.option_strings)


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("twelve 0.")


def test_ctrl_c_in_a_process_is_status_130():
    # a test run in the background of a shell has Ctrl-C ignored, and would pass that on
    code = "import signal, time, twelve.cli as c; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "c.convert = lambda o: (print('on', flush=True), time.sleep(30)); "
    code += "raise SystemExit(c.main(['convert', 'a', '--out', 'b']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "on\n"
    os.kill(process.pid, signal.SIGINT)
    assert process.communicate(timeout=10)[1] == "twelve: stopped: interrupted\n" and process.returncode == 130


@pytest.mark.parametrize("given, said", [
    ("colour=red", "--set colour: there is no such setting, only updates, loss, "),
    ("kl=-1", "--set kl: '-1' is not a number from 0 on"),
    ("mask_overlong=yes", "--set mask_overlong: 'yes' is neither on nor off"),
    ("kl", "'kl' is not of the form NAME=VALUE"),
])  # fmt: skip
def test_a_finer_setting_that_is_wrong_is_said(given, said, capsys):
    assert cli.main(["rl", "model", "--task", "arithmetic", "--set", given]) == 2
    assert said in capsys.readouterr().err
