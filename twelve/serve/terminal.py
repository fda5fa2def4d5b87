"""The model in a terminal: a conversation, or a text continued."""

import io
import json
import os
import secrets
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

from twelve.engine import Engine, Request, sub_seed
from twelve.errors import InputError
from twelve.serve.conversation import plain_prompt, read_prompt

DIM, RESET = "\033[2m", "\033[0m"
Say = Callable[[str, str], None]  # (kind, text), kind "reasoning" or "content"


@dataclass
class Reply:
    """What a model said to a conversation."""

    content: str = ""
    reasoning: str = ""
    finish_reason: str = "stopped"  # "stop", "length", or "stopped" by Ctrl-C
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = field(default=0.0, repr=False)  # of decoding, from the first token on


def chat(
    engine: Engine, *, system: str | None = None, max_tokens: int | None = 2048, temperature: float = 0.3,
    top_p: float = 0.9, seed: int | None = None, as_json: bool = False,
) -> None:  # fmt: skip
    """Talk until /exit or Ctrl-D. Without a terminal on standard input, its text is one question: answer and end.

    With `as_json` every answer is one line with a JSON object. The reasoning is dimmed; where standard output is no
    terminal it goes to standard error, so that a pipe gets the answer. A model without a chat template continues text.
    """
    write_anything()
    options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    start = [{"role": "system", "content": system}] if system else []
    if not sys.stdin.isatty():
        question = read_stdin()
        if answer(engine, [*start, {"role": "user", "content": question}], options, as_json).finish_reason == "stopped":
            raise KeyboardInterrupt
        return
    try:
        import readline  # noqa: F401  line editing and history for input(); absent on Windows
    except ImportError:
        pass
    note("/new starts over, /exit or Ctrl-D ends, Ctrl-C stops an answer")
    if engine.tokenizer.chat_template is None:
        note("this model has no chat template: it was not taught to answer, and continues your text instead")
    messages = list(start)
    while True:
        try:
            line = input("" if as_json else "> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        text = line.encode(errors="surrogateescape").decode(errors="replace").strip()
        if text == "/exit":
            return
        if text == "/new":
            messages = list(start)
            note("a new conversation")
        elif text:
            question = {"role": "user", "content": text}
            try:
                reply = answer(engine, [*messages, question], options, as_json)
            except InputError as error:  # most likely the context is full
                note(f"{error}; /new starts over")
                continue
            # the reasoning stays out of the history, as R1's own template has it: it would fill the context
            messages += [question, {"role": "assistant", "content": reply.content}]
            if not as_json:
                speed = f", {(reply.completion_tokens - 1) / reply.seconds:.1f} a second" if reply.seconds else ""
                cut = " (cut off: --max-tokens or the context)" if reply.finish_reason == "length" else ""
                note(f"{reply.completion_tokens} tokens{speed}{cut}")


def generate(
    engine: Engine, prompt: str, *, n: int = 1, max_tokens: int | None = 256, temperature: float = 0.6,
    top_p: float = 0.95, seed: int | None = None, stop: tuple[str, ...] = (), as_json: bool = False,
) -> None:  # fmt: skip
    """Continue a text n times and print what was added; "-" reads the text from standard input.

    With `as_json` every sample is one line with a JSON object, and names the seed that gives it again.
    """
    write_anything()
    if "" in stop:
        raise InputError("--stop '': an empty text is found everywhere: name one, or leave it out")
    text = read_stdin() if prompt == "-" else prompt
    seed = secrets.randbits(32) if seed is None else seed
    ids = plain_prompt(engine.tokenizer, text)
    for index in range(n):
        request = Request(ids, max_tokens, temperature, top_p, sub_seed(seed, index), stop)
        if as_json:
            done = engine.generate([request])[0]
            print_json(
                sample=index, text=done.text, seed=seed, finish_reason=done.finish_reason,
                prompt_tokens=done.prompt_tokens, completion_tokens=done.completion_tokens,
            )  # fmt: skip
            continue
        if index:
            print("\n---")
        with closing(engine.stream(request)) as deltas:
            for delta in deltas:
                write(delta.text)
        print()


def answer(engine: Engine, messages: list[dict], options: dict, as_json: bool) -> Reply:
    """Answer a conversation on standard output as it comes; Ctrl-C ends the answer, and what was said stays."""
    if options["seed"] is None:
        options = options | {"seed": secrets.randbits(32)}
    if as_json:
        reply = reply_to(engine, messages, options, lambda kind, text: None)
        print_json(
            content=reply.content, reasoning=reply.reasoning, finish_reason=reply.finish_reason, seed=options["seed"],
            prompt_tokens=reply.prompt_tokens, completion_tokens=reply.completion_tokens,
        )  # fmt: skip
        return reply
    printer = Printer()
    try:
        return reply_to(engine, messages, options, printer.say)
    finally:
        printer.end()


def reply_to(engine: Engine, messages: list[dict], options: dict, say: Say) -> Reply:
    """Ask the engine and pass on what it says, until it ends or Ctrl-C."""
    prompt = read_prompt(engine, messages)
    options = options | {"max_tokens": engine.fitting(prompt.ids, options["max_tokens"])}
    splitter, reply = prompt.splitter(), Reply(prompt_tokens=len(prompt.ids))
    first: float | None = None

    def take(parts: list[tuple[str, str]]) -> None:
        for kind, text in parts:
            setattr(reply, kind, getattr(reply, kind) + text)
            say(kind, text)

    with closing(engine.stream(Request(prompt.ids, **options))) as deltas:
        try:
            for delta in deltas:
                if delta.token_ids:
                    first = first or time.perf_counter()
                    reply.seconds = time.perf_counter() - first
                    reply.completion_tokens += len(delta.token_ids)
                take(splitter.feed(delta.text))
                reply.finish_reason = delta.finish_reason or reply.finish_reason
        except KeyboardInterrupt:
            pass
    take(splitter.flush())
    return reply


class Printer:
    """Prints parts of an answer, the reasoning apart from it."""

    def __init__(self):
        self.terminal = sys.stdout.isatty()
        self.dim, self.reset = (DIM, RESET) if has_colour(sys.stdout) else ("[thinking] ", "")
        self.kind = None

    def say(self, kind: str, text: str) -> None:
        if kind == "reasoning" and not self.terminal:
            print(text, end="", file=sys.stderr, flush=True)
            return
        if kind != self.kind:
            if kind == "reasoning":
                write(self.dim)
            elif self.kind == "reasoning":
                write(f"{self.reset}\n\n")
                text = text.lstrip("\n")
            self.kind = kind
        write(text)

    def end(self) -> None:
        write(f"{self.reset if self.kind == 'reasoning' else ''}\n")


def read_stdin() -> str:
    """Standard input as text; InputError if there is none."""
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8 (byte {error.start}): convert it first") from None
    if not text.strip():
        raise InputError("standard input is empty: give a text, for example  echo question | twelve chat FOLDER")
    return text.strip("\n")


def has_colour(stream) -> bool:
    """See no-color.org."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def write_anything() -> None:
    """From now on a character that the terminal's encoding lacks is a question mark, and no answer is lost for it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def write(text: str) -> None:
    print(text, end="", flush=True)


def note(text: str) -> None:
    """Something the program says, not the model."""
    print(f"{DIM}{text}{RESET}" if has_colour(sys.stderr) else text, file=sys.stderr, flush=True)


def print_json(**fields) -> None:
    print(json.dumps(fields, ensure_ascii=False), flush=True)
