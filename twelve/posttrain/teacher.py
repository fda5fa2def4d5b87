"""Teachers: a model that the engine runs here, or an OpenAI-compatible endpoint. Both answer problems; only the first
can also be asked for probabilities."""

from __future__ import annotations

import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPException
from itertools import islice
from random import Random
from typing import Any, NamedTuple

from twelve import convert
from twelve.data.reasoning import CLOSE, OPEN
from twelve.data.tokenizer import Tokenizer
from twelve.engine import Engine, Request, sub_seed
from twelve.errors import InputError
from twelve.evaluate.accuracy import asked, generate_what_fits, prompt_ids
from twelve.tasks import Problem

RETRIES = (0.5, 2.0, 6.0)  # seconds before each further try
AGAIN = {408, 425, 429, 500, 502, 503, 504}  # of HTTP: the same request may succeed later
TIMEOUT = 300.0  # seconds without a byte of an answer
AT_ONCE = 8  # requests to an endpoint


class EndpointError(InputError):
    """An endpoint did not answer, or answered with an error."""


class _Unavailable(EndpointError):
    """The same request may succeed later."""


class Answer(NamedTuple):
    text: str  # with its reasoning in <think>
    complete: bool  # it ended by itself, rather than at the limit


class LocalTeacher:
    """A model of this machine."""

    def __init__(self, model, tokenizer: Tokenizer, name: str = "teacher") -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name

    @cached_property
    def engine(self) -> Engine:
        return Engine(self.model, self.tokenizer)

    def answers(
        self, problems: Sequence[Problem], n: int, max_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> Iterator[tuple[int, list[Answer]]]:
        """`n` answers to each problem, with its place, as they come. A problem's seed gives the same ones again."""
        requests = [
            Request(prompt_ids(self.tokenizer, problem), max_tokens, temperature, seed=sub_seed(seed, one))
            for problem, seed in zip(problems, seeds, strict=True)
            for one in range(n)
        ]
        completions = iter(generate_what_fits(self.engine, self.tokenizer, requests))
        for index in range(len(problems)):
            yield index, [Answer(one.text, one.finish_reason == "stop") for one in islice(completions, n)]


@dataclass
class Endpoint:
    """An OpenAI-compatible endpoint, asked for one answer a request so that any of them will do.

    `url` ends before /chat/completions. The key is sent in the header and shown nowhere; a redirect is refused, since
    it would carry the key to another place.
    """

    url: str
    model: str | None = None  # None: the first that the endpoint lists
    key: str | None = None

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        self.opener = urllib.request.build_opener(_NoRedirect)
        if self.model is None:
            listed = self._ask("/models")
            try:
                self.model = listed["data"][0]["id"]
            except (KeyError, IndexError, TypeError):
                raise EndpointError(f"{self.url} lists no model: name one, as in {self.url}#NAME") from None
        self.name = f"{self.model} at {self.url}"

    def answers(
        self, problems: Sequence[Problem], n: int, max_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> Iterator[tuple[int, list[Answer]]]:
        """As LocalTeacher's. EndpointError when it stops answering, once all that did arrive was given out."""
        return self.replies([asked(problem) for problem in problems], n, max_tokens, temperature, seeds)

    def replies(
        self, conversations: Sequence[list[dict[str, Any]]], n: int, max_tokens: int, temperature: float,
        seeds: Sequence[int],
    ) -> Iterator[tuple[int, list[Answer]]]:  # fmt: skip
        """As `answers`, to conversations."""
        stopped = threading.Event()

        def ask(messages: list[dict[str, Any]], seed: int, one: int) -> Answer | None:
            return None if stopped.is_set() else self._answer({
                "model": self.model, "messages": messages,
                "max_tokens": max_tokens, "temperature": temperature, "seed": Random(f"{seed} {one}").getrandbits(31),
            })  # fmt: skip

        with ThreadPoolExecutor(AT_ONCE) as pool:
            pending = {
                pool.submit(ask, messages, seed, one): index
                for index, (messages, seed) in enumerate(zip(conversations, seeds, strict=True))
                for one in range(n)
            }
            arrived: dict[int, list[Answer]] = {}
            failure = None
            try:
                for future in as_completed(pending):
                    index = pending[future]
                    try:
                        answer = future.result()
                    except EndpointError as error:
                        failure = failure or error
                        stopped.set()
                        continue
                    if answer is not None:
                        arrived.setdefault(index, []).append(answer)
                        if len(arrived[index]) == n:
                            yield index, arrived.pop(index)
            finally:
                stopped.set()
        if failure:
            raise failure

    def _answer(self, body: dict[str, Any]) -> Answer:
        answer = self._ask("/chat/completions", body)
        try:
            [choice, *_] = answer["choices"]
            message = choice["message"]
            text = message.get("content") or ""
            reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
            if reasoning:
                text = f"{OPEN}{reasoning}{CLOSE}{text}"
            return Answer(text, choice.get("finish_reason") == "stop")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EndpointError(f"{self.url} did not answer in OpenAI's form: {str(answer)[:80]}") from error

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that a request gives. EndpointError after a few tries, or at once where trying again is no use."""
        for pause in RETRIES:
            try:
                return self._request(path, body)
            except _Unavailable:
                time.sleep(pause)
        return self._request(path, body)

    def _request(self, path: str, body: dict[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with self.opener.open(request, timeout=TIMEOUT) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            kind = _Unavailable if error.code in AGAIN else EndpointError
            reason = f"{error.code} {_message(error.read(2000).decode(errors='replace'))}"
        except (OSError, HTTPException, ValueError) as error:  # also a timeout, half an answer, and one that is no JSON
            kind, reason = _Unavailable, str(getattr(error, "reason", error) or type(error).__name__)
        raise kind(f"the endpoint {self.url}{path} does not answer: {reason}")


Teacher = LocalTeacher | Endpoint


def is_endpoint(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def open_teacher(name: str, key_variable: str | None = None, device: str | None = None) -> Teacher:
    """The teacher meant by the address of an endpoint, URL or URL#MODEL, or by what `convert.resolve` takes.

    `key_variable` is the environment variable that holds the endpoint's key. InputError for a model that cannot be read
    or has no tokenizer, a variable that is not set, an endpoint that does not answer.
    """
    if is_endpoint(name):
        key = os.environ.get(key_variable) if key_variable else None
        if key_variable and not key:
            raise InputError(f"the environment variable {key_variable} is not set: put the endpoint's key there")
        url, _, model = name.partition("#")
        return Endpoint(url, model or None, key)
    network, tokenizer = convert.load(name, device=device, packed=True)
    if tokenizer is None:
        raise InputError(f"{name} has no tokenizer, so it cannot teach")
    return LocalTeacher(network, tokenizer, name)


def require_one_vocabulary(teacher: Tokenizer, student: Tokenizer, name: str) -> None:
    """InputError unless every token has the same id in both: a distribution over one is none over the other."""
    theirs, mine = teacher.vocabulary, student.vocabulary
    if theirs == mine:
        return
    apart = len(theirs.items() ^ mine.items())
    raise InputError(
        f"the tokenizers of {name} and the student differ ({len(theirs):,} and {len(mine):,} entries, {apart:,} not "
        "shared), so probabilities cannot be passed on: use --how traces, which passes text"
    )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _message(detail: str) -> str:
    """What an error says, in OpenAI's form or any other."""
    try:
        error = json.loads(detail)["error"]
        detail = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(detail.split())[:200]
