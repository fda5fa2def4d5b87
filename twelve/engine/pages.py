"""Pages of the pool: who holds them, and which ones hold a text that others may begin with too.

A full page is found by a chain of hashes over the model and all tokens up to its end, so that a hit means the same
text from the first token on. Pages that nobody holds stay findable until their room is needed, the longest unused
first; then they move to the tiers, if there are any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np

from twelve.engine.runner import Runner

# Large pages are read several at a time: what takes the time is the disk, and the kernel handing out fresh memory.
READERS, LARGE = 4, 2**20


def chain_key(previous: bytes, tokens: Sequence[int]) -> bytes:
    """The key of the page that holds `tokens` [PAGE] and follows the page of key `previous`: 16 bytes."""
    return blake2b(previous + np.asarray(tokens, dtype="<i4").tobytes(), digest_size=16).digest()


class PagePool:
    """`count` pages; `memory` reads and writes them."""

    def __init__(self, count: int, identity: bytes, tiers=None, memory: Runner | None = None) -> None:
        self.count, self.identity, self.tiers, self._memory = count, identity, tiers, memory
        self.holders = [0] * count  # sequences that hold each page
        self._free = list(range(count - 1, -1, -1))  # hold nothing worth keeping; low numbers go first
        self._idle: dict[int, None] = {}  # findable and held by nobody, the longest unused first
        self._index: dict[bytes, int] = {}
        self._keys: list[bytes | None] = [None] * count  # the other way round

    @property
    def available(self) -> int:
        """Pages that can be taken now."""
        return len(self._free) + len(self._idle)

    def __contains__(self, key: bytes) -> bool:
        """Whether a lookup would find this page."""
        return key in self._index or (self.tiers is not None and key in self.tiers)

    def take(self) -> int | None:
        """A page to write to, held once; None when all are held."""
        if self._free:
            page = self._free.pop()
        elif self._idle:
            page = next(iter(self._idle))
            if self.tiers is not None:
                self.tiers.evict(self._keys[page], self._memory.page(page))
            del self._idle[page]
            self._unlist(page)
        else:
            return None
        self.holders[page] = 1
        return page

    def release(self, pages: Sequence[int]) -> None:
        """Give up one hold on each; of a sequence's pages the last one is forgotten first."""
        for page in reversed(pages):
            if self.holders[page] <= 0:
                raise ValueError(f"page {page} is held by nobody")
            self.holders[page] -= 1
            if not self.holders[page]:
                if self._keys[page] is None:
                    self._free.append(page)
                else:
                    self._idle[page] = None

    @contextmanager
    def holding(self) -> Iterator[list[int]]:
        """A list for pages that are held now, which are given up if the block fails."""
        pages: list[int] = []
        try:
            yield pages
        except BaseException:
            self.release(pages)
            raise

    def copy(self, source: int, target: int) -> None:
        """What one page holds, into another that is held."""
        self._memory.write_page(target, self._memory.page(source))

    def seal(self, page: int, key: bytes) -> None:
        """Make a full page findable. Of two pages with the same text the first stays the one that is found."""
        if key in self._index:
            return
        self._index[key], self._keys[page] = page, key
        if self.tiers is not None:
            self.tiers.seal(key, self._memory.page(page))

    def lookup(self, key_of: Callable[[int], bytes], limit: int) -> list[int]:
        """The pages, now held, of the longest known beginning of a text, at most `limit`; key_of(i) is page i's key."""
        with self.holding() as found:
            while len(found) < limit:
                page = self._index.get(key_of(len(found)))
                if page is not None:
                    self.holders[page] += 1
                    self._idle.pop(page, None)
                    found.append(page)
                    continue
                fetched = self._fetch([key_of(index) for index in range(len(found), limit)])
                found += fetched
                if not fetched:
                    break
            if found and self.tiers is not None:
                self.tiers.touch([self._keys[page] for page in found])  # its copies are as lately used as the page
        return found

    def _fetch(self, keys: list[bytes]) -> list[int]:
        """Pages, now held, for as many of the first keys as the tiers have, several read at a time."""
        if self.tiers is None:
            return []
        with self.holding() as pages:
            wanted = []
            for key in keys:
                if key in self._index or key not in self.tiers or (page := self.take()) is None:
                    break
                wanted.append(key)
                pages.append(page)
            if not pages:
                return []
            places = [self._memory.page(page) for page in pages]  # the pages' own memory, where that is float32
            if places[0].nbytes < LARGE:  # threads that wait for each other would cost more than the reading
                there = list(map(self.tiers.get, wanted, places))
            else:
                with ThreadPoolExecutor(READERS) as readers:
                    there = list(readers.map(self.tiers.get, wanted, places))
            count = there.index(False) if False in there else len(there)
            for key, page, data in zip(wanted[:count], pages, places, strict=False):
                self._memory.write_page(page, data)
                self._index[key], self._keys[page] = page, key
        self.release(pages[count:])
        return pages[:count]

    def forget(self, identity: bytes) -> None:
        """No page is findable any more: the model is another one."""
        self.identity = identity
        self._free += self._idle
        self._idle.clear()
        self._index.clear()
        self._keys = [None] * self.count

    def _unlist(self, page: int) -> None:
        del self._index[self._keys[page]]
        self._keys[page] = None
