"""What scaling runs say (scaling.json, made by bench/scaling.py): bits per byte by size and text, and speed by shape.

Bits per byte follow L(N, D) = E + c N^a D^(b + s ln N): N is the size without embedding, head and memory, D the tokens
read. In trainings this short a larger model gains the more the more it reads (s), which a sum of one term in N and one
in D (arXiv 2203.15556) does not say (docs/lab.md). What a vocabulary is behind another at equal tokens, in runs that
differ in nothing else, is added. What the law says wrong of a run, it says wrong of its neighbours, too: they are
corrected by it (kriging), which fades where no run is near. `bench/scaling.py --check` compares law and plain
interpolation on runs that are left out.

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
FLOORS = np.linspace(0.5, 1.5, 41)  # that are tried for E
SPARSE = (0.0, 0.25, 0.5, 0.75, 1.0)  # tried: the power of all parameters in N, of which the rest is of active ones
# of E, and of ln c, a, b and s around the middle of the runs: what is usual, how far others may be, and what a
# difference of one such step counts as, in bits per byte of error
USUAL_FLOOR, USUAL, DOUBT = (1.0, 0.3), np.array([[0.0, -0.08, -0.25, 0.0], [3.0, 0.08, 0.1, 0.03]]), 0.02
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
    powers: np.ndarray = field(compare=False)  # ln c, a, b, s for N and D in units of `middle`
    sparse: float
    middle: np.ndarray = field(compare=False)  # logarithms of N and D
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
        return float(self.floor + np.exp(_terms(_logs(active, total, tokens, self.sparse) - self.middle) @ self.powers))

    def corrected(self, every: np.ndarray) -> Law:
        """With what the law says wrong at these `points`."""
        marks = np.array([self._place(*point[:3]) for point in every])
        wrong = np.array([point[3] - self.trend(*point[:3]) for point in every])
        spread = _nearness(marks, marks) + (NOISE / WRONG) ** 2 * np.eye(len(marks))
        return replace(self, marks=marks, corrections=np.linalg.solve(spread, wrong))

    def _place(self, active: float, total: float, tokens: float) -> np.ndarray:
        return _logs(active, total, tokens, self.sparse) / REACH

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
    errors = [UNKNOWN] if len(rows) < 3 else [error for row in lasting(rows) for error in left_out(rows, row)]
    active, tokens = every[:, 0], every[:, 2]
    known = tuple(map(float, (active.min(), active.max(), tokens.min(), tokens.max())))
    error = float(np.sqrt(np.mean(np.square(errors))))
    return replace(_fit(every), error=error, known=known, vocabularies=behind)


def lasting(rows: Sequence[Row]) -> list[Row]:
    """Those with a mark that is late enough to say something; all, if there are none."""
    return [row for row in rows if any(_lasts(row, mark) for mark in row["marks"])] or list(rows)


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
    """Of runs that differ in learning rate, batch or the memory's rows only, the one that is lowest at the most tokens
    that all read."""
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


def _logs(active, total, tokens, sparse: float) -> np.ndarray:
    """[..., 2]: logarithms of N and D."""
    n = (1 - sparse) * np.log(active) + sparse * np.log(total)
    return np.stack([n, np.log(np.asarray(tokens, float))], axis=-1)


def _terms(logs: np.ndarray) -> np.ndarray:
    """[..., 2] -> [..., 4]: 1, ln N, ln D and their product."""
    n, d = logs[..., 0], logs[..., 1]
    return np.stack([np.ones_like(n), n, d, n * d], axis=-1)


def _fit(every: np.ndarray) -> Law:
    """Least squares: E and the power of all parameters in N by trying all, the rest, which is linear in logarithms, by
    solving; each is held where it usually is by as much as DOUBT says."""
    active, total, tokens, bits = every.T
    usual, off = USUAL
    best, least = None, np.inf
    for sparse in SPARSE if np.ptp(np.log(total / active)) > 0.1 else SPARSE[:1]:
        logs = _logs(active, total, tokens, sparse)
        middle = logs.mean(0)
        terms = _terms(logs - middle)
        for floor in FLOORS[: np.searchsorted(FLOORS, bits.min())]:
            above = (bits - floor)[:, None] / DOUBT  # an error of the logarithm, as one of bits
            weighted, wanted = np.vstack([terms * above, np.diag(1 / off)]), np.log(bits - floor)
            powers = np.linalg.lstsq(weighted, np.concatenate([wanted * above[:, 0], usual / off]), rcond=None)[0]
            errors = (floor + np.exp(terms @ powers) - bits) / DOUBT, (powers - usual) / off
            loss = sum(float((error**2).sum()) for error in errors) + ((floor - USUAL_FLOOR[0]) / USUAL_FLOOR[1]) ** 2
            if loss < least:
                best, least = Law(float(floor), powers, sparse, middle), loss
    if best is None:
        raise InputError(f"runs of {bits.min():.2f} bits a byte are below what any law here ends at")
    return best.corrected(every)


# --- speed ------------------------------------------------------------------------------------------------------------


def work(config: ModelConfig, context: int, batch: int) -> float:
    """Operations a token: the model's, but of the head only what is in the loss, and a share of the optimiser's."""
    idle = config.vocab_size - cost.entries(config.vocab_size, batch * context)
    heads = 1 + config.num_nextn_predict_layers
    own = cost.causal_flops(config, context) - 6 * config.hidden_size * idle * heads
    return own + cost.optimizer_flops(config) / (batch * context)


def speed(row: Row) -> float:
    """Tokens a second of a run, its slow steps included: its median step is a twentieth faster."""
    last = row["marks"][-1]
    return last["tokens"] / last["seconds"]


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
    reached = np.log([row["work"] * speed(row) / (row["gflops"] * 1e9) for row in rows])
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
