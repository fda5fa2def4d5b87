"""Pages in 8 bits: int8 codes and one float32 scale a piece of a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_BLOCK = 65_536  # floats coded at a time: the scratch then stays in the second-level cache


class PageCode:
    """How a page of float32 is told in 8 bits.

    `segments` says what lies in a page, one after the other: (count, length, ...) are `count` rows, each cut into
    pieces of these lengths. Each piece has a scale, absmax / 127, so what differs in magnitude should not share one:
        MLA layer   (64, rank, rope)                                       latent and rotated key of each token
        GQA layer   (kv_heads * head_dim, 64), (kv_heads * 64, head_dim)   keys by channel, values by token
    """

    def __init__(self, segments: Sequence[tuple[int, ...]]):
        self.layout = tuple(tuple(int(n) for n in segment) for segment in segments)
        if not self.layout or any(len(segment) < 2 or min(segment) < 1 for segment in self.layout):
            raise ValueError(f"segments are (count, length, ...) of positive numbers, not {segments!r}")
        self.floats = sum(count * sum(lengths) for count, *lengths in self.layout)
        self.scales = sum(count * len(lengths) for count, *lengths in self.layout)
        self.bytes = 4 * self.scales + self.floats  # of a coded page: the scales, then the codes in the page's order

    def encode(self, page: np.ndarray) -> np.ndarray | None:
        """`page` [floats] float32 as uint8 [bytes]: off by at most half a scale; None when it holds inf or NaN."""
        coded = np.empty(self.bytes, np.uint8)
        for rows, scales, codes in self._pieces(page, coded):
            block = max(1, _BLOCK // rows.shape[1])
            scratch = np.empty((min(block, len(rows)), rows.shape[1]), np.float32)
            for first in range(0, len(rows), block):
                part, scale = rows[first : first + block], scales[first : first + block]
                buffer = np.abs(part, out=scratch[: len(part)])
                # a row of zeros, or of subnormals whose inverse would overflow, has the smallest normal scale
                np.maximum(buffer.max(axis=1) / np.float32(127), np.finfo(np.float32).tiny, out=scale)
                if not np.isfinite(scale).all():
                    return None
                np.rint(np.multiply(part, (1 / scale)[:, None], out=buffer), out=buffer)
                codes[first : first + block] = buffer
        return coded

    def decode(self, coded: np.ndarray, out: np.ndarray) -> None:
        """Fill `out` [floats] float32 from `coded` uint8 [bytes]."""
        for rows, scales, codes in self._pieces(out, coded):
            np.multiply(codes, scales[:, None], out=rows)

    def _pieces(self, page: np.ndarray, coded: np.ndarray):
        """Views of a page and of its coded form: (floats [count, length], scales [count], codes [count, length])."""
        scales, codes = coded[: 4 * self.scales].view(np.float32), coded[4 * self.scales :].view(np.int8)
        row = scale = 0
        for count, *lengths in self.layout:
            width = sum(lengths)
            floats, integers = (x[row : row + count * width].reshape(count, width) for x in (page, codes))
            row, column = row + count * width, 0
            for length in lengths:
                piece = slice(column, column + length)
                yield floats[:, piece], scales[scale : scale + count], integers[:, piece]
                scale, column = scale + count, column + length
