"""OpenAI's chat protocol: reading a request, writing answers and errors. Knows no engine and no HTTP library.

The reference is the API that the official `openai` client speaks; reasoning goes into both fields in use for it,
`reasoning_content` (DeepSeek) and `reasoning` (OpenRouter, vLLM).
"""

import json
import math
from dataclasses import dataclass

from twelve.data.chat import check_messages
from twelve.errors import InputError

MAX_STOPS = 16
MAX_SAMPLES = 128
# Nothing in the answer depends on these, so that ignoring them is what the caller wants.
IGNORED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
}  # fmt: skip
# Values of what we do not have that ask for nothing, or are the API's own defaults; null, zero and empty ones need no
# mention.
NEUTRAL = {
    "response_format": [{"type": "text"}], "tool_choice": ["none", "auto"], "modalities": [["text"]],
    "reasoning_effort": ["medium"], "verbosity": ["medium"],
}  # fmt: skip


class ApiError(Exception):
    """An answer in OpenAI's error shape."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        retry_after: int | None = None,
    ):  # fmt: skip
        """retry_after: seconds."""
        super().__init__(message)
        self.status = status
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        kind = "requests" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class ChatRequest:
    messages: list[dict]
    model: str | None = None
    stream: bool = False
    include_usage: bool = False
    n: int = 1
    max_tokens: int | None = None  # None: as the context allows
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    memory_gates: bool = False  # ours: how far the model's memory (Engram) opened at each token


def parse(body: bytes) -> ChatRequest:
    """Read the body of POST /v1/chat/completions. Raises ApiError (400) naming the parameter that is wrong.

    A parameter that would change the answer and that we do not have is refused: dropping it silently would give the
    caller something else than was asked for.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ApiError(400, "the body must be a JSON object")
    fields = _Fields(data)
    options = fields.take("stream_options", dict, {}, "an object")
    old_max_tokens = fields.integer("max_tokens", 1, math.inf, None)
    chat = ChatRequest(
        messages=_messages(data.pop("messages", None)),
        model=fields.take("model", str, None, "a string"),
        stream=fields.take("stream", bool, False, "a boolean"),
        include_usage=_Fields(options).take("include_usage", bool, False, "a boolean"),
        n=fields.integer("n", 1, MAX_SAMPLES, 1),
        max_tokens=fields.integer("max_completion_tokens", 1, math.inf, old_max_tokens),
        temperature=fields.number("temperature", 0, 2, 1.0),
        top_p=fields.number("top_p", 0, 1, 1.0),
        seed=fields.integer("seed", -(2**63), 2**63 - 1, None),
        stop=_stop(data.pop("stop", None)),
        logprobs=fields.take("logprobs", bool, False, "a boolean"),
        memory_gates=fields.take("memory_gates", bool, False, "a boolean"),
    )
    for name, value in data.items():
        if name not in IGNORED and value and value not in NEUTRAL.get(name, []):
            name = name[:64].encode(errors="replace").decode()  # JSON can spell half a character
            raise ApiError(400, f"parameter {name!r} is not supported here", name, "unsupported_parameter")
    return chat


def message(content: str, reasoning: str) -> dict:
    """The whole answer, for `choices[].message`."""
    thoughts = reasoning or None
    return {"role": "assistant", "content": content, "reasoning_content": thoughts, "reasoning": thoughts}


def delta(kind: str, text: str) -> dict:
    """A part of it, for `choices[].delta`; kind is "reasoning" or "content"."""
    return {"content": text} if kind == "content" else {"reasoning_content": text, "reasoning": text}


def by_token(logprobs: list[dict], gates: list[dict]) -> dict:
    """What `choices[]` tell of each token; `memory_gates` only where there are some."""
    return {"logprobs": {"content": logprobs} if logprobs else None} | ({"memory_gates": gates} if gates else {})


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict:
    """`cached_tokens` are those of the prompt that did not have to be read again."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def event(body: dict | str) -> str:
    """One server-sent event."""
    return f"data: {body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)}\n\n"


class _Fields:
    """Takes parameters out of a request and checks them; null counts as absent."""

    def __init__(self, data: dict):
        self.data = data

    def take(self, name: str, kind, default, what: str):
        value = self.data.pop(name, None)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise _wrong(name, f"must be {what}, not {_type(value)}")
        return value

    def number(self, name: str, low: float, high: float, default: float) -> float:
        value = self.take(name, (int, float), default, "a number")
        if not low <= value <= high:
            raise _wrong(name, f"must lie between {low} and {high}")
        return float(value)

    def integer(self, name: str, low: int, high: float, default: int | None) -> int | None:
        value = self.take(name, int, default, "an integer")
        if value is not None and not low <= value <= high:
            raise _wrong(name, f"must be at least {low}" if high == math.inf else f"must lie between {low} and {high}")
        return value


def _messages(value) -> list[dict]:
    try:
        return check_messages(value)
    except InputError as error:  # its first word is the field
        raise ApiError(400, str(error), str(error).split()[0], "invalid_value") from None


def _stop(value) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise _wrong("stop", "must be a string or a list of strings, none of them empty")
    if len(stops) > MAX_STOPS:
        raise _wrong("stop", f"must have at most {MAX_STOPS} strings")
    return tuple(stops)


def _wrong(name: str, message: str) -> ApiError:
    return ApiError(400, f"{name} {message}", name, "invalid_value")


def _type(value) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "null")
