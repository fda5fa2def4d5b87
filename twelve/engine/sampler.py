"""Draw the next token: Gumbel-max with a counter-based generator, so that a draw depends on nothing but its place.

The coin of a token is a function of the seed, the position it would take and its id: a sequence that is interrupted,
resumed, drafted or drawn in a batch with others gets the same tokens. Adding a Gumbel coin to every logit and taking
the largest draws from the softmax (Gumbel 1954; Maddison et al., arXiv 1411.0030). Two models that share the coins
agree as often as they can without talking, which is what makes drafts drawn like this worth checking.
"""

import secrets

import numpy as np

from twelve.errors import InputError

# Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011)
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
HALF, LOW = np.uint64(32), np.uint64(0xFFFFFFFF)
NOT_FINITE = "the model's output is not a number: its weights are damaged, or its training diverged"
LARGEST_GUMBEL = -np.log(-np.log1p(-(2.0**-33)))  # of a coin with 32 bits: 22.87


def seed_key(seed: int | None) -> np.ndarray:
    """A sequence's row of `Step.keys`, [4] uint32: two words of key, two of counter. None draws fresh entropy."""
    bits = secrets.randbits(128) if seed is None else seed % 2**128
    return np.frombuffer(bits.to_bytes(16, "little"), dtype="<u4").astype(np.uint32)


def draw(
    logits: np.ndarray, positions: np.ndarray, temperature: np.ndarray, top_p: np.ndarray, keys: np.ndarray
) -> np.ndarray:
    """One token for each row of logits [K, V], to be put at `positions` [K]: [K] int64.

    Temperature 0 takes the most likely token, the lowest id of equal ones. `keys` [K, 4] are `seed_key`s.
    """
    tokens = logits.argmax(axis=1)
    rows = np.flatnonzero(temperature)
    if not len(rows):
        return tokens
    with np.errstate(over="ignore"):
        scores = logits[rows].astype(np.float64) / temperature[rows, None].astype(np.float64)
    keys, positions = keys[rows], positions[rows]
    # No coin is larger than LARGEST_GUMBEL, so that a token further than that below a sum already seen cannot win.
    top = scores.max(axis=1)
    reached = top + gumbel(keys, positions, tokens[rows])
    possible = scores >= (np.minimum(reached, top + LARGEST_GUMBEL) - LARGEST_GUMBEL)[:, None]
    for row in np.flatnonzero(top_p[rows] < 1):
        p = np.exp(scores[row] - top[row])
        kept = np.zeros_like(possible[row])
        kept[nucleus(p / p.sum(), float(top_p[rows[row]]))] = True
        possible[row] &= kept
    row, token = np.nonzero(possible)
    sums = scores[row, token] + gumbel(keys[row], positions[row], token)
    starts = np.searchsorted(row, np.arange(len(rows)))
    winners = np.flatnonzero(sums == np.maximum.reduceat(sums, starts)[row])
    tokens[rows] = token[winners[np.searchsorted(winners, starts)]]
    return tokens


def gumbel(keys: np.ndarray, positions: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The coins of tokens [N] at positions [N] of sequences with keys [N, 4]: [N] float64.

    64 tokens share sixteen counters of four words: token 64 b + 16 w + i has word w of counter 16 b + i.
    """
    counter, word = tokens >> 6 << 4 | tokens & 15, tokens >> 4 & 3
    words = philox((counter, positions, keys[:, 2], keys[:, 3]), (keys[:, 0], keys[:, 1]))
    # from the small end, where a float is fine enough to tell the rare large coins apart
    return -np.log(-np.log1p(-(np.choose(word, words) + 0.5) * 2.0**-32))


def philox(counter, key) -> list[np.ndarray]:
    """Philox4x32-10: four words of counter and two of key, scalars or arrays of one shape -> four uint32 words."""
    a, b, c, d = (np.atleast_1d(word).astype(np.uint64) for word in counter)
    key0, key1 = (np.atleast_1d(word).astype(np.uint32) for word in key)
    for _ in range(10):
        first, second = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = (second >> HALF) ^ b ^ key0, second & LOW, (first >> HALF) ^ d ^ key1, first & LOW
        key0, key1 = key0 + WEYL[0], key1 + WEYL[1]
    return [word.astype(np.uint32) for word in (a, b, c, d)]


def nucleus(p: np.ndarray, top_p: float) -> np.ndarray:
    """Ids of the smallest set of tokens that holds at least `top_p` of the probabilities `p` [V], most likely first."""
    # Tokens below (1 - top_p) / V hold less than 1 - top_p together, so the nucleus lies among the rest, and only few
    # are left to sort. The half is for rounding.
    ids = np.flatnonzero(p >= (1 - top_p) / (2 * len(p)))
    ids = ids[np.argsort(-p[ids], kind="stable")]
    return ids[: np.searchsorted(np.cumsum(p[ids]), top_p) + 1]


def log_probabilities(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """log softmax(logits [K, V]) of tokens [K]: [K] float64."""
    top = logits.max(axis=1).astype(np.float64)
    total = np.exp(logits - top[:, None]).sum(axis=1)
    return logits[np.arange(len(tokens)), tokens] - top - np.log(total)


def check_finite(logits: np.ndarray) -> None:
    """InputError if a row of logits [K, V] has no largest number."""
    if not np.isfinite(logits.max(axis=1)).all():
        raise InputError(NOT_FINITE)
