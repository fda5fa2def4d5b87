"""Turn tokens into text as they come: whole characters only, and nothing of a stop string."""

import codecs
from collections.abc import Callable, Sequence


class TextStream:
    """Feed token ids, get text. Costs per token what the token is long, however long the text has become.

    `piece(id)` gives the bytes of one token. A character whose bytes are spread over tokens comes out with its last
    one; bytes that are no UTF-8 come out as U+FFFD. Text that may turn out to begin a stop string is held back.
    """

    def __init__(self, piece: Callable[[int], bytes], stop: Sequence[str] = ()):
        self.piece = piece
        self.stop = tuple(stop)
        self.stopped = False  # a stop string was met: the text is complete
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def feed(self, token: int) -> str:
        """The text that is certain after `token`."""
        return self._release(self._decoder.decode(self.piece(token)))

    def flush(self) -> str:
        """The rest, when no more tokens come."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _release(self, new: str) -> str:
        text = self._held + new
        # the match that ends first, then the longest: the same whatever pieces the text comes in
        found = [(text.index(stop) + len(stop), -len(stop)) for stop in self.stop if stop in text]
        if found:
            self.stopped, self._held = True, ""
            return text[: sum(min(found))]
        keep = max((overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
