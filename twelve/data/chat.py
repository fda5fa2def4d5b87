"""Conversations: the chat template, and which tokens are the assistant's."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from twelve.data.reasoning import CLOSE, OPEN, StreamSplitter, opens_reasoning, split_reasoning
from twelve.errors import InputError

if TYPE_CHECKING:
    from twelve.data.tokenizer import Tokenizer

Message = dict[str, Any]

__all__ = [
    "StreamSplitter", "check_messages", "encode_messages", "encode_prompt", "opens_reasoning", "render", "render_own",
    "segments", "split_reasoning",
]  # fmt: skip

ROLES = ("system", "user", "assistant", "tool", "developer")

# ChatML. Reasoning stands before the answer it led to, and only until the user speaks again.
TEMPLATE = """\
{%- set last = namespace(question=-1) %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{% set last.question = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message['content'] or '' %}
    {%- set reasoning = message['reasoning_content'] or message['reasoning'] or '' %}
    {%- if message['role'] == 'assistant' %}
        {%- if content.startswith('<think>') and '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0][7:] %}
            {%- set content = content[7 + reasoning|length + 8:] %}
        {%- endif %}
        {%- if reasoning and loop.index0 > last.question %}
            {%- set content = '<think>' + reasoning + '</think>' + content %}
        {%- elif reasoning %}
            {%- set content = content.lstrip() %}
        {%- endif %}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

GUARD = "\ufdd0"  # a noncharacter, which no text holds: it splits the control tokens that a message spells out


def render(tokenizer: Tokenizer, messages: list[Message], add_generation_prompt: bool = True, **variables: Any) -> str:
    """The conversation as the tokenizer's template writes it; `variables` (tools, enable_thinking, ...) go to it.

    InputError for messages that are not well formed, and for a template that is missing or fails on them.
    """
    return _render(tokenizer, check_messages(messages), add_generation_prompt, variables)


def render_own(messages: list[Message]) -> str:
    """The conversation as TEMPLATE writes it, when there is no tokenizer yet."""
    return _compiled(TEMPLATE).render(messages=check_messages(messages), add_generation_prompt=False)


def encode_prompt(
    tokenizer: Tokenizer, messages: list[Message], check: Callable[[str], None] = lambda text: None, **variables: Any
) -> list[int]:  # fmt: skip
    """Token ids that ask for the next answer. Control tokens spelled out in a message stay plain text: a user cannot
    forge the end of a turn. `check` sees the whole text first, and may refuse it."""
    text = _render(tokenizer, _guarded(tokenizer, check_messages(messages)), True, variables)
    check(text)
    return [token for part in text.split(GUARD) for token in tokenizer.encode(part)]


def encode_messages(tokenizer: Tokenizer, messages: list[Message]) -> tuple[list[int], list[int]]:
    """Token ids [T] of a whole conversation, and a mask [T] that is 1 on what the assistant says, the end of its turn
    included. Splits as generation does: what the model is given is encoded apart from what it has to say."""
    ids: list[int] = []
    mask: list[int] = []
    for text, spoken in segments(tokenizer, messages):
        part = tokenizer.encode(text)
        ids += part
        mask += [spoken] * len(part)
    return ids, mask


def segments(tokenizer: Tokenizer, messages: list[Message]) -> list[tuple[str, int]]:
    """A conversation as pieces of text to encode one by one, each with 1 if the assistant says it, else 0.

    A turn whose reasoning or calls of tools the template left out counts as 0: the answer alone would teach not to
    reason, or to say nothing. InputError for a template that does not write a conversation turn by turn.
    """
    messages = _guarded(tokenizer, check_messages(messages))
    whole = _render(tokenizer, messages, False, {})
    pieces: list[tuple[str, int]] = []
    done = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(tokenizer, messages[:index], True, {})
        if not whole.startswith(prompt):  # it may leave out what was thought before a later question
            prompt = _render(tokenizer, [_answer_alone(one) for one in messages[:index]], True, {})
        if (begin := len(prompt)) < done or not whole.startswith(prompt):
            raise InputError(f"messages[{index}]: the chat template does not write this answer after its own prompt")
        closing = tokenizer.stop_pattern.search(whole, begin)  # an answer itself holds none: they are guarded
        if closing is None:
            raise InputError(f"messages[{index}]: the chat template does not end this answer with a stop token")
        spoken = whole[begin : closing.end()]
        pieces += [(whole[done:begin], 0), (spoken, int(_is_whole(message, spoken)))]
        done = closing.end()
    pieces.append((whole[done:], 0))
    return [(part, spoken) for text, spoken in pieces for part in text.split(GUARD) if part]


def check_messages(messages: Any, where: str = "messages") -> list[Message]:
    """Copies of the messages in one form: `content` is text, `reasoning` is called reasoning_content, a developer is a
    system. InputError, naming the message and the field, for anything else than messages."""
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where} must be a list with at least one message")
    return [_checked(message, f"{where}[{index}]") for index, message in enumerate(messages)]


def _checked(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise InputError(f"{where} must be an object with role and content, not {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise InputError(f"{where}.role must be one of {', '.join(ROLES)}, not {str(role)[:40]!r}")
    checked = {key: value for key, value in message.items() if key not in ("reasoning", "reasoning_content")}
    for key in ("reasoning", "reasoning_content"):
        reasoning = message.get(key)
        if not isinstance(reasoning, str | None):
            raise InputError(f"{where}.{key} must be text, not {type(reasoning).__name__}")
        if reasoning:
            checked["reasoning_content"] = reasoning
    if isinstance(content, list):  # OpenAI's parts
        content = "".join(_part(part, f"{where}.content[{index}]") for index, part in enumerate(content))
    if content is None and role == "assistant" and (message.get("tool_calls") or "reasoning_content" in checked):
        content = ""
    if not isinstance(content, str):
        raise InputError(f"{where}.content must be text, not {type(content).__name__}")
    return checked | {"role": "system" if role == "developer" else role, "content": content}


def _part(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise InputError(f"{where} must be a part of type text")
    return text


# --- the template -----------------------------------------------------------------------------------------------------


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for transformers; here the text itself is all that counts."""

    tags = frozenset({"generation"})

    def parse(self, parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    # the sandbox and these names are what transformers gives to a template; our own needs no sandbox, which costs half
    # as much again
    kind = jinja2.Environment if template == TEMPLATE else ImmutableSandboxedEnvironment
    environment = kind(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(template)


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _render(tokenizer: Tokenizer, messages: list[Message], add_generation_prompt: bool, variables: dict) -> str:
    template = tokenizer.chat_template
    if template is None:
        raise InputError("this model has no chat template: it was not taught to answer messages")
    if "reasoning_content" not in template:
        messages = [_folded(message) for message in messages]
    given = {"tools": None, "documents": None, **tokenizer.special_tokens_map, **variables}
    try:
        return _compiled(template).render(messages=messages, add_generation_prompt=add_generation_prompt, **given)
    except Exception as error:  # a template is a program that someone else wrote: it can fail in any way
        raise InputError(f"the chat template cannot write these messages: {str(error).splitlines()[0]}") from error


def _folded(message: Message) -> Message:
    """For templates that know of no reasoning_content: the reasoning inside the content."""
    if "reasoning_content" not in message:
        return message
    rest = {key: value for key, value in message.items() if key != "reasoning_content"}
    return rest | {"content": f"{OPEN}{message['reasoning_content']}{CLOSE}{message['content']}"}


def _reasoning(message: Message) -> str:
    return message.get("reasoning_content") or split_reasoning(message["content"])[0]


def _answer_alone(message: Message) -> Message:
    if message["role"] != "assistant" or not _reasoning(message):
        return message
    rest = {key: value for key, value in message.items() if key != "reasoning_content"}
    said = message["content"] if "reasoning_content" in message else split_reasoning(message["content"])[1]
    return rest | {"content": said.lstrip()}


def _is_whole(message: Message, spoken: str) -> bool:
    """Whether a turn, as a template wrote it, has the message's reasoning before its answer, and the tools it calls."""
    said = _answer_alone(message)["content"].strip()
    before = spoken[: spoken.rindex(said)] if said and said in spoken else spoken
    calls = [call.get("function", call) for call in message.get("tool_calls") or () if isinstance(call, dict)]
    names = [str(call["name"]) for call in calls if isinstance(call, dict) and "name" in call]
    return _reasoning(message).strip() in before and all(name in spoken for name in names)


def _guarded(tokenizer: Tokenizer, value: Any) -> Any:
    """The same messages with GUARD inside every control token that they spell out."""
    if isinstance(value, str):
        return tokenizer.control_pattern.sub(
            lambda found: found[0][:1] + GUARD + found[0][1:], value.replace(GUARD, "")
        )
    if isinstance(value, list):
        return [_guarded(tokenizer, item) for item in value]
    if isinstance(value, dict):
        return {_guarded(tokenizer, key): _guarded(tokenizer, item) for key, item in value.items()}
    return value
