"""What can be typed: every verb with its options and their help."""

from __future__ import annotations

import argparse
from typing import Any

import twelve
from twelve.config import TABLE_DTYPES
from twelve.errors import InputError
from twelve.options import (
    assignment,
    device,
    natural,
    naturals,
    not_negative,
    numbers,
    port,
    positive,
    positive_float,
    share,
    size,
    switch,
)

DESCRIPTION = """\
Text and checkable tasks into a model folder, and a model folder into a conversation, on the machine you have.

  demo        train a small model for a few minutes, measure it, and show what it can do
  tokenize    text files into token shards
  pretrain    text into a model folder
  sft         a model folder and conversations into a model folder
  rl          a model folder and checkable tasks into a model that solves them better
  distill     a model folder, or an endpoint, and tasks into a smaller model folder
  eval        bits per byte of text, and accuracy on checkable tasks
  chat        talk to a model here
  generate    answer one prompt, or one a line of a file
  serve       an OpenAI-shaped API and a page, on this machine
  convert     any model that can be read into a Hugging Face folder
  quantize    a model into a folder of 8-bit or 4-bit weights

A MODEL is a folder, a .gguf file, or the name of an installed model package (smollm2).
A PATH is a .txt, .md or .jsonl file (.gz and .zst too), a folder of them, or - for standard input."""

FINER = {  # of --set: what each is read as; what they mean: docs/recipes.md
    "updates": positive, "loss": str, "normalise": str, "kl": not_negative, "off_policy": positive_float,
    "mask_overlong": switch, "format_reward": not_negative, "language_reward": not_negative,
    "length_penalty": not_negative,
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="twelve", description=DESCRIPTION, usage="twelve VERB [options]   (twelve VERB --help)")
    parser.add_argument("--version", action="version", version=f"twelve {twelve.__version__}")
    verbs = parser.add_subparsers(prog="twelve", metavar="VERB", required=True, parser_class=Parser)

    def verb(name: str, arguments: str, description: str, talks: bool = False) -> Parser:
        usage = " ".join(f"twelve {name} {arguments} [options]".split())
        made = verbs.add_parser(name, usage=usage, description=description)
        made.set_defaults(verb=name, talks=talks)
        made.add_argument("--json", action="store_true", help="print the result as JSON")
        return made

    made = verb("demo", "", "Train a small V3-shape model on solved problems, measure it, and write a report.")
    made.add_argument("--minutes", type=positive_float, help="for everything (default: 9)")
    made.add_argument("--out", default="runs/demo", metavar="FOLDER", help="default: runs/demo")
    _computing(made)

    made = verb("tokenize", "PATH...", "Read text, train a tokenizer if none is named, write shards.")
    made.add_argument("paths", nargs="+", metavar="PATH")
    made.add_argument("--out", default="runs/tokens", metavar="FOLDER", help="default: runs/tokens")
    _tokenizer(made)

    made = verb("pretrain", "PATH...", "Train a model on text. The same command again resumes.")
    made.add_argument("paths", nargs="+", metavar="PATH", help="text, or a folder that `twelve tokenize` wrote")
    made.add_argument("--out", default="runs/pretrain", metavar="FOLDER", help="the model (default: runs/pretrain)")
    _training(made)
    _tokenizer(made)
    made.add_argument("--width", type=positive, help="of the residual stream, a multiple of 64")
    made.add_argument("--layers", type=positive, help="decoder layers")
    made.add_argument("--experts", type=natural, help="routed experts a layer; 0 makes a dense model")
    made.add_argument("--experts-per-token", type=positive, help="of them, how many work on a token")
    made.add_argument("--mtp", type=natural, help="multi-token prediction modules")
    made.add_argument("--hc-mult", type=positive, help="residual streams (default: 1, no hyper-connections)")
    made.add_argument("--engram-vocab-size", type=positive, help="rows a head of an n-gram memory (default: none)")
    made.add_argument("--engram-layers", type=naturals, metavar="N,N", help="that read it (default: 1 and the middle)")
    made.add_argument("--engram-dtype", choices=TABLE_DTYPES, metavar="NAME", help="float32 (default), bfloat16, int8")
    _computing(made)

    made = verb("sft", "MODEL PATH...", "Fine-tune on conversations. The same command again resumes.")
    made.add_argument("model", metavar="MODEL")
    made.add_argument("paths", nargs="+", metavar="PATH", help=".jsonl with 'messages'")
    made.add_argument("--out", default="runs/sft", metavar="FOLDER", help="the new model (default: runs/sft)")
    _training(made)
    made.add_argument("--lora", type=positive, metavar="RANK", help="train adapters of this rank only: less memory")
    _computing(made)

    made = verb("rl", "MODEL --task TASK...", "Improve a model on checkable tasks. The same command again resumes.")
    made.add_argument("model", metavar="MODEL")
    made.add_argument("--task", nargs="+", required=True, metavar="TASK", help="names, mine.py, problems.jsonl")
    _code(made)
    made.add_argument("--level", nargs="+", type=positive, help="of the tasks (default: their own, or 1)")
    made.add_argument("--language", nargs="+", choices=("en", "ko"), metavar="CODE", help="en, ko (default: both)")
    made.add_argument("--out", default="runs/rl", metavar="FOLDER", help="the new model (default: runs/rl)")
    _length(made)
    made.add_argument("--recipe", choices=("r1-zero", "r1"), metavar="NAME", help="r1-zero, r1 (docs/recipes.md)")
    made.add_argument("--cold-start", metavar="FILE", help="of r1: conversations (default: worked solutions)")
    made.add_argument("--mix", nargs="+", metavar="FILE", help="of r1: more of them for its third stage")
    made.add_argument("--judge", metavar="URL", help="of r1: an endpoint that scores general answers (default: none)")
    made.add_argument("--judge-model", metavar="NAME", help="its model (default: the first it lists)")
    made.add_argument("--judge-prompts", metavar="FILE", help="general prompts, .jsonl")
    made.add_argument("--memory", type=size, metavar="SIZE", help="that the process stays below, like 8GiB")
    made.add_argument("--lora", type=natural, help="rank of adapters; 0 trains all (default: 16 above 20M parameters)")
    made.add_argument("--prompts", type=positive, help="problems a step (default: 16)")
    made.add_argument("--group", type=positive, help="answers a problem (default: 8)")
    made.add_argument("--max-tokens", type=positive, help="of an answer (default: the task's, or 128)")
    made.add_argument("--temperature", type=positive_float, help="of the answers (default: 1)")
    made.add_argument("--learning-rate", type=positive_float, help="after five steps")
    made.add_argument("--curriculum", choices=("uniform", "curriculum"), metavar="HOW", help="uniform, curriculum")
    made.add_argument("--problems", type=positive, help="held out, answered before and after (default: 200)")
    made.add_argument("--method", choices=("grpo", "rejection"), metavar="HOW", help="grpo, or right answers only")
    made.add_argument("--set", action="append", type=assignment, default=[], metavar="NAME=VALUE",
                      help="finer: " + ", ".join(FINER))  # fmt: skip
    _computing(made)

    made = verb("distill", "TEACHER...", "Pass on what a model can do to smaller ones. Resumes, too.")
    made.add_argument("teachers", nargs="+", metavar="TEACHER", help="a model, or an endpoint: http://HOST/v1[#MODEL]")
    made.add_argument("--out", default="runs/distill", metavar="FOLDER", help="of the stages (default: runs/distill)")
    made.add_argument("--how", choices=("traces", "logits", "on-policy"), metavar="WAY",
                      help="traces (default), logits, on-policy")  # fmt: skip
    made.add_argument("--student", metavar="MODEL", help="that learns; or else:")
    made.add_argument("--layers", type=numbers, metavar="N,N,...", help="of students cut from their teachers, a chain")
    made.add_argument("--width", type=positive, help="makes these students fresh ones of this width")
    made.add_argument("--task", nargs="+", metavar="NAME", help="whose problems are asked (default: arithmetic)")
    _code(made)
    made.add_argument("--level", nargs="+", type=positive, help="of them")
    made.add_argument("--language", nargs="+", choices=("en", "ko"), metavar="XX", help="en, ko (default: both)")
    made.add_argument("--teacher-for", action="append", type=assignment, metavar="TASK=MODEL", default=[],
                      help="of one of them")  # fmt: skip
    made.add_argument("--key-env", metavar="NAME", help="environment variable with the endpoint's key")
    made.add_argument("--traces", type=positive, help="right answers to learn from (default: 1000)")
    made.add_argument("--max-tokens", type=positive, help="of an answer (default: the task's, or 256)")
    made.add_argument("--lora", type=positive, metavar="RANK", help="train adapters only")
    _training(made)
    _computing(made)

    made = verb("eval", "[MODEL]", "Measure a model on text, facts or tasks; or, without one, audit a task.")
    made.add_argument("model", nargs="?", metavar="MODEL")
    made.add_argument("--text", nargs="+", metavar="PATH", default=[], help="bits per byte of each")
    made.add_argument("--task", nargs="+", metavar="TASK", default=[], help="a name, mine.py, .jsonl, gym:NAME, or all")
    made.add_argument("--facts", nargs="?", type=positive, const=100, metavar="N", help="recall of invented ones (100)")
    made.add_argument("--facts-text", metavar="FILE", help="write what teaches them (no MODEL)")
    made.add_argument("--without-memory", action="store_true", help="with a table of zeros in Engram's place")
    made.add_argument("--audit", nargs="+", metavar="TASK", default=[], help="how often its scorer is wrong (no MODEL)")
    made.add_argument("--wrong-answers", type=positive, metavar="N", help="of an audit (default: 10000; code: 200)")
    _code(made)
    made.add_argument("--language", nargs="+", choices=("en", "ko"), default=["en", "ko"],
                      metavar="CODE", help="en, ko (default: both)")
    made.add_argument("--level", nargs="+", type=positive, default=[1], help="of tasks (default: 1)")
    made.add_argument("--problems", type=positive, help="a task, language and level (default: 100)")
    made.add_argument("--limit", type=positive, help="documents of each PATH")
    made.add_argument("--context", type=positive, help="tokens of a window (default: the model's, at most 2048)")
    made.add_argument("--temperature", type=not_negative, help="of answers (default: 0, greedy)")
    _computing(made)

    made = verb("chat", "MODEL", "Talk to a model; text on standard input is one question.", talks=True)
    made.add_argument("model", metavar="MODEL")
    made.add_argument("--system", metavar="TEXT", help="system message")
    _sampling(made)

    made = verb("generate", "MODEL [PROMPT]", "Continue a text as it stands, without a chat.", talks=True)
    made.add_argument("model", metavar="MODEL")
    made.add_argument("prompt", nargs="?", default="-", metavar="PROMPT", help="default: standard input")
    made.add_argument("--n", type=positive, help="continuations (default: 1)")
    made.add_argument("--stop", nargs="+", metavar="TEXT", help="end before the first of these")
    _sampling(made)

    made = verb("serve", "MODEL", "Serve an OpenAI-shaped API and a page from this machine.", talks=True)
    made.add_argument("model", metavar="MODEL")
    made.add_argument("--name", help="of the model in the API (default: the folder's)")
    made.add_argument("--host", default="127.0.0.1", help="to listen on (default: 127.0.0.1, this machine only)")
    made.add_argument("--port", type=port, default=8000, help="default: 8000; 0 takes a free one")
    _engines(made)
    _computing(made, draws=False)

    made = verb("convert", "MODEL --out FOLDER", "Write a model as a Hugging Face folder of safetensors.")
    made.add_argument("model", metavar="MODEL")
    made.add_argument("--out", required=True, metavar="FOLDER", help="to write")
    made.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", metavar="NAME",
                      help="float32 (default), bfloat16 or float16")  # fmt: skip

    made = verb("quantize", "MODEL --out FOLDER", "Pack a model's matrices into 8 or 4 bits a weight.")
    made.add_argument("model", metavar="MODEL")
    made.add_argument("--out", required=True, metavar="FOLDER", help="to write")
    made.add_argument("--bits", type=int, choices=(8, 4), help="of a weight (default: 8)")
    made.add_argument("--group", type=positive, help="columns that share a scale, a multiple of 32 (default: 32)")
    made.add_argument("--text", nargs="+", metavar="PATH", default=[], help="to fit 4 bits to")
    made.add_argument("--limit", type=positive, help="documents of each: text, eval")
    made.add_argument("--eval", nargs="+", metavar="PATH", default=[], help="bits per byte before and after")
    made.add_argument("--embedding-bits", type=int, choices=(8, 4), help="of embedding and head (default: 8)")
    made.add_argument("--threads", type=positive, help="of the CPU (default: one a core)")
    return parser


def _length(made: argparse.ArgumentParser) -> None:
    length = made.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=positive_float, help="for everything, from start to end (default: 10)")
    length.add_argument("--steps", type=positive, help="optimiser steps, instead of --minutes")


def _training(made: argparse.ArgumentParser) -> None:
    _length(made)
    made.add_argument("--batch", type=positive, help="sequences a step")
    made.add_argument("--context", type=positive, help="tokens a sequence")
    made.add_argument("--learning-rate", type=positive_float, help="at the peak of the schedule")


def _tokenizer(made: argparse.ArgumentParser) -> None:
    which = made.add_mutually_exclusive_group()
    which.add_argument("--tokenizer", metavar="FOLDER", help="one that exists")
    which.add_argument("--vocab-size", type=positive, help="of one trained on PATH (default: by its size)")


def _code(made: argparse.ArgumentParser) -> None:
    made.add_argument("--unsafe-code", action="store_true", help="run a model's code even where it cannot be isolated")


def _sampling(made: argparse.ArgumentParser) -> None:
    made.add_argument("--temperature", type=not_negative, help="0 always takes the most likely token")
    made.add_argument("--top-p", type=share, help="draw from the smallest set that holds this share of probability")
    made.add_argument("--max-tokens", type=positive, help="of an answer")
    _engines(made)
    _computing(made)


def _engines(made: argparse.ArgumentParser) -> None:
    made.add_argument("--kv-memory", type=size, metavar="SIZE", help="for keys and values (default: a quarter of free)")
    made.add_argument("--warm-memory", type=size, metavar="SIZE", help="for more of them in 8 bits, which is inexact")
    made.add_argument("--cache", metavar="FOLDER", help="keep them in files: a known prompt is not read again")
    made.add_argument("--cache-disk", type=size, metavar="SIZE", help="for these files, at most (default: 4GiB)")
    made.add_argument("--selection", type=share, metavar="SHARE", help="of a long past that is read (default: all)")
    made.add_argument("--speculation", choices=("auto", "off", "ngram", "mtp"), metavar="MODE",
                      help="guessing ahead: auto (default), off, ngram, mtp")  # fmt: skip


def _computing(made: argparse.ArgumentParser, draws: bool = True) -> None:
    if draws:
        made.add_argument("--seed", type=natural, help="of everything that is drawn")
    made.add_argument("--device", type=device, metavar="NAME", help="cpu, cuda, ... (default: what there is)")
    made.add_argument("--threads", type=positive, help="of the CPU (default: one a core)")


class Help(argparse.RawDescriptionHelpFormatter):
    """Descriptions keep their lines, values are called N, and a verb's help fits a screen."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28, width=110)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "N"


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def __init__(self, **settings: Any):
        super().__init__(formatter_class=Help, allow_abbrev=False, **settings)

    def error(self, message: str) -> None:
        raise InputError(f"{message} (see {self.prog} --help)")
