"""What scaling runs say (scaling.json, made by bench/scaling.py): bits per byte by size and text, and speed by shape.

Bits per byte follow L(N, D) = E + A / N^a + B / D^b (arXiv 2203.15556): N is the size without embedding, head and
memory, D the tokens read. What a vocabulary is behind another at equal tokens, in runs that differ in nothing else, is
added. What the law says wrong of a run, it says wrong of its neighbours, too: they are corrected by it (kriging), which
fades where no run is near. `bench/scaling.py --check` compares law and plain interpolation on runs that are left out.

How fast a shape trains follows from its arithmetic and from the share of the processor's measured speed that runs of
its kind reach.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from twelve.config import ModelConfig
from twelve.errors import InputError
from twelve.files import read_json
from twelve.plan import cost

ROWS = Path(__file__).with_name("scaling.json")
EXPONENTS = np.linspace(0.1, 1.2, 23)  # that are tried for a and b
USUAL, SPREAD, DOUBT = (0.34, 0.28), 0.3, 0.02  # Chinchilla's a and b; how far others may be, in bits per byte of error
SPARSE = (0.0, 0.25, 0.5, 0.75, 1.0)  # tried: the power of all parameters in N, of which the rest is of active ones
PARTS = ((0, 1, 2), (0, 2), (0, 1), (1, 2), (0,))  # of E, A, B: those that are not zero
LEAST_STEPS = 200  # of a mark: in fewer, warm-up and decay are most of a training
UNKNOWN = 0.05  # bits per byte of error, where there are too few runs to tell
NEAR = 1.25  # a factor of tokens beyond a run's marks that it still tells of
REACH = np.log([3.0, 4.0])  # within such factors of size and of tokens a law is wrong alike
WRONG, NOISE = 0.03, 0.01  # bits per byte by which a law is wrong of a shape, and a run of itself

Row = dict[str, Any]  # of scaling.json: one run, with its marks


def load(path: Path = ROWS) -> list[Row]:
    """The scaling runs that ship with the package, or those of another file. InputError for a file without any."""
    found = read_json(path)
    if not isinstance(found, dict) or not found.get("rows"):
        raise InputError(f"{path} holds no scaling runs: make them with bench/scaling.py --export")
    return found["rows"]


# --- bits per byte ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Law:
    """Bits per byte by size and tokens; `error` is the root mean square of what it says wrong of runs left out."""

    floor: float
    size: float
    size_power: float
    data: float
    data_power: float
    sparse: float
    unit: tuple[float, float]  # of N and D, so that `size` and `data` are bits
    error: float = 0.0
    known: tuple[float, float, float, float] = (0.0, np.inf, 0.0, np.inf)  # active from, to; tokens from, to
    vocabularies: dict[int, float] = field(default_factory=dict)  # bits more at equal tokens
    marks: np.ndarray = field(default_factory=lambda: np.empty((0, 2)), compare=False, repr=False)  # as `_place`
    corrections: np.ndarray = field(default_factory=lambda: np.empty(0), compare=False, repr=False)  # of each mark

    def bits(self, active: float, total: float, tokens: float) -> float:
        """active, total: parameters without embedding, head and table."""
        near = _nearness(self._place(active, total, tokens)[None], self.marks)
        return self.trend(active, total, tokens) + float((near @ self.corrections).item())

    def of_vocabulary(self, entries: int) -> float:
        """Bits per byte to add for a vocabulary of so many entries."""
        sizes = sorted(self.vocabularies)
        return float(np.interp(np.log(entries), np.log(sizes), [self.vocabularies[size] for size in sizes]))

    def trend(self, active: float, total: float, tokens: float) -> float:
        """The law itself, which no single run bends."""
        n, d = np.exp(self._place(active, total, tokens) * REACH) / self.unit
        return float(self.floor + self.size * n**-self.size_power + self.data * d**-self.data_power)

    def corrected(self, every: np.ndarray) -> Law:
        """With what the law says wrong at these `points`."""
        marks = np.array([self._place(*point[:3]) for point in every])
        wrong = np.array([point[3] - self.trend(*point[:3]) for point in every])
        spread = _nearness(marks, marks) + (NOISE / WRONG) ** 2 * np.eye(len(marks))
        return replace(self, marks=marks, corrections=np.linalg.solve(spread, wrong))

    def _place(self, active: float, total: float, tokens: float) -> np.ndarray:
        """Logarithms of N and D, in units of REACH."""
        return np.log([active ** (1 - self.sparse) * total**self.sparse, float(tokens)]) / REACH

    def uncertainty(self, active: float, tokens: float) -> float:
        """Standard error of `bits`; larger outside of what was measured, by half for every factor of two."""
        low_n, high_n, low_d, high_d = self.known
        beyond = max(low_n / active, active / high_n, 1.0) * max(low_d / tokens, tokens / high_d, 1.0)
        return self.error * (1 + 0.5 * float(np.log2(beyond)))


def fit_law(rows: Sequence[Row]) -> Law:
    """The law of these runs, with the error that it makes of each run when it is fitted to the others."""
    behind = vocabularies(rows)
    rows = comparable(rows)
    every = points(rows)
    errors = [UNKNOWN]
    if len(rows) >= 3:
        lasting = [row for row in rows if any(_lasts(row, mark) for mark in row["marks"])] or rows
        errors = [error for row in lasting for error in left_out(rows, row)]
    active, tokens = every[:, 0], every[:, 2]
    known = tuple(map(float, (active.min(), active.max(), tokens.min(), tokens.max())))
    error = float(np.sqrt(np.mean(np.square(errors))))
    return replace(_fit(every), error=error, known=known, vocabularies=behind)


def left_out(rows: Sequence[Row], row: Row) -> list[float]:
    """By how many bits per byte a law of the other runs is wrong at each mark of `row`."""
    law = _fit(points(other for other in rows if other is not row))
    return [law.bits(*point[:3]) - point[3] for point in points([row])]


def points(rows: Iterable[Row]) -> np.ndarray:
    """[marks, 4]: active and all parameters without embedding and head, tokens, bits per byte (mean of the languages).
    Those that come too soon to say anything count only where there are no others."""
    found, short = [], []
    for row in rows:
        outside = row["outside"]  # embedding, what else is looked up like it, and head
        for mark in row["marks"]:
            point = (row["active"] - outside, row["total"] - outside, mark["tokens"], mean_bits(mark))
            (found if _lasts(row, mark) else short).append(point)
    return np.array(found or short)


def _lasts(row: Row, mark: dict[str, Any]) -> bool:
    return mark["tokens"] >= LEAST_STEPS * row["batch"] * row["context"]


def mean_bits(mark: dict[str, Any]) -> float:
    return float(np.mean(list(mark["bits"].values())))


def comparable(rows: Sequence[Row]) -> list[Row]:
    """Of runs of the same shape the best, as they would be with the commonest vocabulary."""
    behind = vocabularies(rows)
    return best_settings([
        {**row, "marks": [
            {**mark, "bits": {name: bits - behind[row["vocabulary"]] for name, bits in mark["bits"].items()}}
            for mark in row["marks"]
        ]}
        for row in rows
    ])  # fmt: skip


def vocabularies(rows: Sequence[Row]) -> dict[int, float]:
    """By how many bits per byte each is behind the commonest at equal tokens: the mean over the marks of runs that
    differ in nothing else; 0 where there are none."""
    common = statistics.mode(row["vocabulary"] for row in rows)
    known = {_kind(row): row for row in rows if row["vocabulary"] == common}
    behind: dict[int, list[float]] = {row["vocabulary"]: [] for row in rows}
    for row in rows:
        if (same := known.get(_kind(row))) is not None:
            known_tokens = [mark["tokens"] for mark in same["marks"]]
            least, most = min(known_tokens) / NEAR, max(known_tokens) * NEAR
            behind[row["vocabulary"]] += [
                mean_bits(mark) - read(same, mark["tokens"]) for mark in row["marks"]
                if _lasts(row, mark) and least <= mark["tokens"] <= most
            ]  # fmt: skip
    return {size: float(np.mean(found)) if found else 0.0 for size, found in behind.items()}


def _kind(row: Row) -> tuple:
    return tuple(row.get(key) for key in ("width", "layers", "experts", "batch", "rate", "reading"))


def best_settings(rows: Sequence[Row]) -> list[Row]:
    """Of runs that differ in learning rate or batch only, the one that is lowest at the most tokens that all read."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in ("width", "layers", "experts", "vocabulary")), []).append(row)
    best = []
    for same in groups.values():
        tokens = min(max(mark["tokens"] for mark in row["marks"]) for row in same)
        best.append(min(same, key=lambda row, tokens=tokens: read(row, tokens)))
    return best


def read(row: Row, tokens: float) -> float:
    """Bits per byte of a run after so many tokens, on straight lines between its marks: both are logarithms. Beyond the
    marks, the last line goes on."""
    marks = sorted(row["marks"], key=lambda mark: mark["tokens"])
    known, bits = (np.log(values) for values in ([mark["tokens"] for mark in marks], list(map(mean_bits, marks))))
    if len(known) == 1:
        return float(np.exp(bits[0]))
    at = int(np.clip(np.searchsorted(known, np.log(tokens)), 1, len(known) - 1))
    share = (np.log(tokens) - known[at - 1]) / (known[at] - known[at - 1])
    return float(np.exp(bits[at - 1] + share * (bits[at] - bits[at - 1])))


def _nearness(places: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[a, 2] and [b, 2] -> [a, b], from 0 to 1: how far what is seen at one tells of the other."""
    return np.exp(-0.5 * ((places[:, None] - others) ** 2).sum(-1))


def _fit(every: np.ndarray) -> Law:
    """Least squares: the exponents by trying all, the rest, which is linear and not below zero, by solving."""
    active, total, tokens, bits = every.T
    unit = float(np.exp(np.log(active).mean())), float(np.exp(np.log(tokens).mean()))
    a, b = (grid.ravel() for grid in np.meshgrid(EXPONENTS, EXPONENTS))
    prior = DOUBT**2 * (((a - USUAL[0]) / SPREAD) ** 2 + ((b - USUAL[1]) / SPREAD) ** 2)
    sparsity = np.log(total / active)
    best, least = None, np.inf
    for sparse in SPARSE if np.ptp(sparsity) > 0.1 else SPARSE[:1]:
        n = active ** (1 - sparse) * total**sparse / unit[0]
        terms = np.stack([np.ones((len(a), len(n))), n ** -a[:, None], (tokens / unit[1]) ** -b[:, None]], axis=-1)
        for used in map(list, PARTS):
            part = terms[..., used]  # [exponents, marks, used]
            square = part.mT @ part + 1e-9 * np.eye(len(used))
            found = np.linalg.solve(square, part.mT @ bits[:, None])  # [exponents, used, 1]
            loss = (((part @ found)[..., 0] - bits) ** 2).sum(-1) + prior
            allowed = (found >= 0).all((-2, -1))
            free, loss = int(loss.argmin()), np.where(allowed, loss, np.inf)
            at = int(loss.argmin())
            if loss[at] < least - 1e-12:
                least, values = loss[at], np.zeros(3)
                values[used] = found[at, :, 0]
                floor, size, data = map(float, values)
                best = Law(floor, size, float(a[at]), data, float(b[at]), sparse, unit)
            if at == free:  # with fewer terms it cannot be better
                break
    return best.corrected(every)


# --- speed ------------------------------------------------------------------------------------------------------------


def work(config: ModelConfig, context: int, batch: int) -> float:
    """Operations a token: the model's, but of the head only what is in the loss, and a share of the optimiser's."""
    idle = config.vocab_size - cost.entries(config.vocab_size, batch * context)
    heads = 1 + config.num_nextn_predict_layers
    own = cost.causal_flops(config, context) - 6 * config.hidden_size * idle * heads
    return own + cost.optimizer_flops(config) / (batch * context)


def fit_utilisation(rows: Sequence[Row]) -> Callable[[int, int, bool, int], float]:
    """Share of the processor's measured speed that training reaches, by width, vocabulary, whether there are experts,
    and threads.

    A regression of its logarithm, which keeps to the measured widths and vocabularies, and in which few runs show no
    effect.
    """

    def range_of(name: str) -> tuple[int, int]:
        return min(row[name] for row in rows), max(row[name] for row in rows)

    widths, vocabularies = range_of("width"), range_of("vocabulary")
    features = np.array(
        [_features(row["width"], row["vocabulary"], row["experts"] > 0, row["threads"]) for row in rows]
    )
    reached = np.log([row["work"] * row["tokens_per_second"] / (row["gflops"] * 1e9) for row in rows])
    ridge = np.diag([0.0, 0.01, 0.01, 0.01, 0.01])
    found = np.linalg.solve(features.T @ features + ridge, features.T @ reached)

    def share(width: int, vocabulary: int, routed: bool, threads: int) -> float:
        known = np.clip(width, *widths), np.clip(vocabulary, *vocabularies)
        return float(np.exp(_features(*known, routed, threads) @ found))

    return share


def _features(width: float, vocabulary: float, routed: bool, threads: int) -> np.ndarray:
    return np.array([1.0, np.log(width / 256), np.log(vocabulary / 8192), float(routed), np.log2(threads)])


def bytes_per_token(rows: Sequence[Row], vocabulary: int) -> float:
    """Of the scaling runs' text, by the logarithm of the vocabulary."""
    known = {row["vocabulary"]: row["bytes_per_token"] for row in rows}
    at = sorted(known)
    return float(np.interp(np.log(vocabulary), np.log(at), [known[size] for size in at]))
