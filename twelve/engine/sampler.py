"""Draw the next token: temperature, nucleus (top-p), and a coin that depends on the seed and the position alone."""

import secrets
from collections.abc import Callable

import numpy as np

Sampler = Callable[[np.ndarray, int], int]


def make_sampler(temperature: float = 1.0, top_p: float = 1.0, seed: int | None = None) -> Sampler:
    """A function (logits [V] float64, position in the sequence) -> token id.

    Temperature 0 takes the most likely token (the lowest id of equal ones). `seed` counts modulo 2**128; None draws a
    fresh one. The coin comes from a counter-based generator, so that a draw does not depend on the draws before it:
    a sequence that is interrupted and resumed, or drawn in a batch with others, gets the same tokens.
    """
    if temperature == 0:
        return lambda logits, position: int(np.argmax(logits))
    key = secrets.randbits(64) if seed is None else seed % 2**128

    def sample(logits: np.ndarray, position: int) -> int:
        p = np.exp((logits - logits.max()) / temperature)
        p /= p.sum()
        ids = nucleus(p, top_p) if top_p < 1 else None
        cumulative = np.cumsum(p if ids is None else p[ids])
        index = np.searchsorted(cumulative, coin(key, position) * cumulative[-1], side="right")
        index = min(index, np.searchsorted(cumulative, cumulative[-1]))  # the product may round up to the total
        return int(index if ids is None else ids[index])

    return sample


def coin(key: int, position: int) -> float:
    """A uniform float64 in [0, 1): the raw stream, because numpy promises that one never changes."""
    raw = int(np.random.Philox(key=key, counter=position).random_raw())
    return (raw >> 11) * 2.0**-53


def nucleus(p: np.ndarray, top_p: float) -> np.ndarray:
    """Ids of the smallest set of tokens that holds at least `top_p` of the probabilities `p` [V], most likely first."""
    # Tokens below (1 - top_p) / V hold less than 1 - top_p together, so the nucleus lies among the rest, and only few
    # are left to sort. The half is for rounding.
    ids = np.flatnonzero(p >= (1 - top_p) / (2 * len(p)))
    ids = ids[np.argsort(-p[ids], kind="stable")]
    return ids[: np.searchsorted(np.cumsum(p[ids]), top_p) + 1]


def log_probability(logits: np.ndarray, token: int) -> float:
    """log softmax(logits [V])[token] in float64."""
    top = logits.max()
    return float(logits[token] - top - np.log(np.exp(logits - top).sum()))
