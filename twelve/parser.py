"""What can be typed: every verb with its options and their help."""

from __future__ import annotations

import argparse
from typing import Any

import twelve
from twelve.config import TABLE_DTYPES
from twelve.errors import InputError
from twelve.options import (
    amount,
    assignment,
    budget,
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
    weight,
)

DESCRIPTION = """\
Text and checkable tasks into a model folder, and a model folder into a conversation, on the machine you have.

  demo        train a small model for a few minutes, measure it, and show what it can do
  doctor      what this machine can do, what will be slow on it, and why
  pull        a model of a Hugging Face repository into a folder here
  plan        what a training will take and give, before it begins
  filter      text into the part of it that is worth learning from
  tokenize    text files into token shards
  pretrain    text into a model folder
  sft         a model folder and conversations into a model folder
  rl          a model folder and checkable tasks into a model that solves them better
  distill     a model folder, or an endpoint, and tasks into a smaller model folder
  eval        bits per byte of text, and accuracy on checkable tasks
  chat        talk to a model here
  generate    continue a text as it stands
  serve       an OpenAI-shaped API and a page, on this machine
  convert     any model that can be read into a Hugging Face folder, or one .gguf file
  quantize    a model into a folder of 8-bit or 4-bit weights

A MODEL is a folder, a .gguf file, or a name: of an installed package (smollm2), or of what `twelve pull` fetched.
A PATH is a .txt, .md, .jsonl (.gz and .zst too) or .parquet file, a folder of them, or - for standard input."""

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

    verb("doctor", "", "Say what this machine can do, what will be slow on it, and what to do about that.", talks=True)

    made = verb("pull", "NAME", "Fetch a model of a Hugging Face repository, and check it. Resumes.")
    made.add_argument("name", metavar="NAME", help="like OWNER/MODEL; HF_TOKEN opens what is not open to all")
    made.add_argument("--out", metavar="FOLDER", help="default: where every verb finds it by its NAME")
    made.add_argument("--revision", default="main", metavar="NAME", help="branch, tag or commit (default: main)")
    made.add_argument("--file", metavar="NAME", help="the one .gguf file to fetch")
    made.add_argument("--endpoint", metavar="URL", help="of another hub than https://huggingface.co")

    made = verb("plan", "[PATH...]", "Say what a training will take and give. Nothing is trained or written.")
    made.add_argument("paths", nargs="*", metavar="PATH", help="text, or a folder that `twelve tokenize` wrote")
    made.add_argument("--minutes", type=positive_float, help="for everything (default: 10)")
    made.add_argument("--memory", type=size, metavar="SIZE", help="to stay below, like 8GiB (default: what is free)")
    _tokenizer(made)
    made.add_argument("--filter", action="store_true", help="drop bad, foreign and repeated text first")
    made.add_argument("--batch", type=positive, help="sequences a step")
    made.add_argument("--context", type=positive, help="tokens a sequence")
    made.add_argument("--mtp", type=natural, help="multi-token prediction modules")
    made.add_argument("--hc-mult", type=positive, help="residual streams")
    made.add_argument("--engram-vocab-size", type=natural, help="rows a head of the memory; 0: none")
    made.add_argument("--watts", type=positive_float, help="of this machine at work (65), or of each device (its own)")
    made.add_argument("--price", type=not_negative, help="of a kilowatt-hour")
    made.add_argument("--currency", metavar="TEXT", help="of prices")
    made.add_argument("--model", metavar="MODEL", help="to be told of instead: a folder, config.json, deepseek_v3, ...")
    made.add_argument("--gpus", metavar="8xH100", help="plan for these instead of this machine, with MODEL or:")
    made.add_argument("--parameters", type=amount, metavar="7B", help="of a dense model")
    made.add_argument("--tokens", type=amount, metavar="140B", help="to train on (default: 20 a parameter)")
    made.add_argument("--utilisation", type=share, metavar="SHARE", help="of the devices' peak (default: 0.4)")
    made.add_argument("--rent", type=not_negative, help="of a device and hour")
    _computing(made, draws=False)

    made = verb("filter", "PATH... --out FILE", "Drop bad, foreign and repeated text; choose the best of the rest.")
    made.add_argument("paths", nargs="+", metavar="PATH")
    made.add_argument("--out", required=True, metavar="FILE", help="to write: .jsonl or .jsonl.gz")
    made.add_argument("--against", nargs="+", metavar="PATH", help="evaluation files: drop text that has parts of them")
    made.add_argument("--languages", nargs="+", choices=("ko", "en", "other"), metavar="CODE",
                      help="to keep: ko, en, other (default: ko en)")  # fmt: skip
    made.add_argument("--budget", type=budget, metavar="SIZE", help="choose this much of the rest: 25%%, 200MB")
    made.add_argument("--weight", action="append", type=weight, default=[], metavar="PATH=N",
                      help="of one PATH in the mixture (default: 1)")  # fmt: skip
    made.add_argument("--temperature", type=positive_float, help="above 1, small PATHs get more than their share")
    made.add_argument("--report", metavar="FILE", help="an HTML page with examples of what was kept and dropped")

    made = verb("tokenize", "PATH...", "Read text, train a tokenizer if none is named, write shards.")
    made.add_argument("paths", nargs="+", metavar="PATH")
    made.add_argument("--out", default="runs/tokens", metavar="FOLDER", help="default: runs/tokens")
    _tokenizer(made)
    made.add_argument("--filter", action="store_true", help="drop bad, foreign and repeated text first")

    made = verb("pretrain", "PATH...", "Train a model on text or on what `twelve tokenize` wrote, of your sizes "
                "or a plan's. The same again resumes.")  # fmt: skip
    made.add_argument("paths", nargs="+", metavar="PATH", help=argparse.SUPPRESS)
    made.add_argument("--out", default="runs/pretrain", metavar="FOLDER", help="the model (default: runs/pretrain)")
    _training(made)
    made.add_argument("--memory", type=size, metavar="SIZE", help="to stay below (a plan: what is free)")
    _tokenizer(made)
    made.add_argument("--filter", action="store_true", help="drop bad, foreign and repeated text first")
    made.add_argument("--width", type=positive, help="of the residual stream, a multiple of 64")
    made.add_argument("--layers", type=positive, help="decoder layers")
    made.add_argument("--experts", type=natural, help="routed experts a layer; 0 makes a dense model")
    made.add_argument("--experts-per-token", type=positive, help="of them, how many work on a token")
    made.add_argument("--mtp", type=natural, help="multi-token prediction modules")
    made.add_argument("--from", dest="start", metavar="MODEL", help="go on from its weights, sizes and tokenizer")
    made.add_argument("--hc-mult", type=positive, help="residual streams (default: 1, no hyper-connections)")
    made.add_argument("--engram-vocab-size", type=natural, help="rows a head of the memory (65536 or more); 0: none")
    made.add_argument("--engram-layers", type=naturals, metavar="N,N", help="that read it (default: 1 and the middle)")
    made.add_argument("--engram-dtype", choices=TABLE_DTYPES, metavar="NAME", help="float32 (default), bfloat16, int8")
    _computing(made)

    made = verb("sft", "MODEL PATH...", "Fine-tune on conversations. The same command again resumes.")
    made.add_argument("model", metavar="MODEL")
    made.add_argument("paths", nargs="+", metavar="PATH", help=".jsonl with 'messages'")
    made.add_argument("--out", default="runs/sft", metavar="FOLDER", help="the new model (default: runs/sft)")
    _training(made, unset="three passes over PATH")
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

    made = verb("eval", "[MODEL]", "Measure a model on text, choices, facts or tasks; or, without one, audit a task.")
    made.add_argument("model", nargs="?", metavar="MODEL", help=argparse.SUPPRESS)
    made.add_argument("--text", nargs="+", metavar="PATH", default=[], help="bits per byte of each")
    made.add_argument("--choices", nargs="+", metavar="FILE", default=[], help="right ones by likelihood, of .jsonl")
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
    made.add_argument("--limit", type=positive, help="documents of each PATH, rows of each FILE")
    made.add_argument("--context", type=positive, help="tokens of a window (default: the model's, at most 2048)")
    made.add_argument("--samples", type=positive, help="answers to a problem, for pass@k and maj@k (default: 1)")
    made.add_argument("--temperature", type=not_negative, help="of answers (default: 0, greedy; of several samples 1)")
    made.add_argument("--compare", metavar="MODEL", help="another one on the same, with a paired test")
    made.add_argument("--contamination", nargs="+", metavar="PATH", default=[],
                      help="training text: is what is named here in it? (MODEL may be left out)")
    made.add_argument("--out", metavar="FILE", help="the results as .json")
    made.add_argument("--report", metavar="FILE", help="the results as .html, with bars")
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

    made = verb("convert", "MODEL --out FOLDER", "Write a model as a Hugging Face folder, or as FILE.gguf (llama.cpp).")
    made.add_argument("model", metavar="MODEL")
    made.add_argument("--out", required=True, metavar="FOLDER", help="to write; a name that ends in .gguf: that file")
    made.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "q8_0", "q4_0"), default="float32",
                      metavar="NAME", help="float32 (default), bfloat16, float16; .gguf also q8_0, q4_0")  # fmt: skip
    made.add_argument("--layers", type=positive, help="resize it to so many, as a start of more training")
    made.add_argument("--width", type=positive, help="of the residual; heads and feed-forward layers in proportion")
    made.add_argument("--experts", type=natural, help="routed ones a layer; 0 makes it dense")
    made.add_argument("--text", nargs="+", metavar="PATH", default=[], help="that shows what a smaller one must keep")

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


def _length(made: argparse.ArgumentParser, unset: str = "10") -> None:
    length = made.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=positive_float, help=f"for everything, from start to end (default: {unset})")
    length.add_argument("--steps", type=positive, help="optimiser steps, instead of --minutes")


def _training(made: argparse.ArgumentParser, unset: str = "10") -> None:
    _length(made, unset)
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

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        shown = super()._format_args(action, default_metavar)
        return f"{shown.split()[0]}..." if action.nargs == "+" else shown


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def __init__(self, **settings: Any):
        super().__init__(formatter_class=Help, allow_abbrev=False, **settings)

    def error(self, message: str) -> None:
        raise InputError(f"{message} (see {self.prog} --help)")
