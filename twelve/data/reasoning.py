"""Telling reasoning from answer in what a model writes."""

from __future__ import annotations

from collections.abc import Iterator

OPEN, CLOSE = "<think>", "</think>"


class StreamSplitter:
    """Tells reasoning from answer in text that arrives in pieces.

    Reasoning opens with <think> at the very beginning and ends with the next </think>; a later <think> is part of the
    answer. The tags, blanks before the first one and line breaks after either are dropped. With `inside=True` the text
    begins within the reasoning, because the prompt itself opened it (see `opens_reasoning`).
    """

    def __init__(self, inside: bool = False):
        self._state = "reasoning" if inside else "start"
        self._fresh = True  # nothing given out since the last tag: line breaks are dropped
        self._held = ""  # may be the beginning of a tag

    def feed(self, text: str) -> list[tuple[str, str]]:
        """The pieces (kind, text), kind "reasoning" or "content", that are certain by now."""
        return list(self._advance(self._held + text))

    def flush(self) -> list[tuple[str, str]]:
        """The rest, when no more text comes."""
        held, self._held = self._held, ""
        self._fresh &= self._state != "start"
        return list(self._emit("reasoning" if self._state == "reasoning" else "content", held))

    def _advance(self, text: str) -> Iterator[tuple[str, str]]:
        self._held = ""
        if self._state == "start":
            begin = text.lstrip()
            if begin != OPEN and OPEN.startswith(begin):  # nothing yet but blanks and a part of the tag
                self._held = text
                return
            if begin.startswith(OPEN):
                self._state, text = "reasoning", begin[len(OPEN) :]
            else:
                self._state, self._fresh = "content", False
        if self._state == "reasoning":
            before, tag, after = text.partition(CLOSE)
            if not tag:
                size = len(text) - _overlap(text, CLOSE)
                self._held = text[size:]
                yield from self._emit("reasoning", text[:size])
                return
            yield from self._emit("reasoning", before)
            self._state, self._fresh, text = "content", True, after
        yield from self._emit("content", text)

    def _emit(self, kind: str, text: str) -> Iterator[tuple[str, str]]:
        if self._fresh:
            text = text.lstrip("\n")
        if text:
            self._fresh = False
            yield kind, text


def split_reasoning(text: str, inside: bool = False) -> tuple[str, str]:
    """(reasoning, answer) of a whole text, as StreamSplitter tells them. Without </think> all of it is reasoning, if
    it began with <think>."""
    splitter = StreamSplitter(inside)
    parts = splitter.feed(text) + splitter.flush()
    reasoning, answer = ("".join(part for kind, part in parts if kind == wanted) for wanted in ("reasoning", "content"))
    return reasoning, answer


def opens_reasoning(prompt: str) -> bool:
    """Whether a rendered prompt ends inside the reasoning, as those of R1's distillations do."""
    return prompt.rstrip().endswith(OPEN)


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` with which `tag` begins, without being all of it."""
    return max(size for size in range(min(len(tag), len(text) + 1)) if text.endswith(tag[:size]))
