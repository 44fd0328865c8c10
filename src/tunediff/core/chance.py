"""Chance: named random streams, bootstrap intervals over documents, and p-values against nulls."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def seed_of(seed: int, *names: object) -> int:
    """A 63-bit seed that depends on `seed` and every name, the same on every machine and in every process."""
    text = "\x1f".join([str(int(seed)), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *names: object) -> torch.Generator:
    """A CPU torch generator of the stream called `names`."""
    import torch

    return torch.Generator().manual_seed(seed_of(seed, *names))


def numpy_generator(seed: int, *names: object) -> np.random.Generator:
    """A numpy generator of the stream called `names`."""
    return np.random.default_rng(seed_of(seed, *names))


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its interval; ``level`` is the coverage aimed at (0..1)."""

    value: float
    low: float
    high: float
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def bootstrap_ratio(
    numerators: Sequence[float], denominators: Sequence[float], *, seed: int, draws: int = 1000, level: float = 0.95
) -> Interval:
    """The ratio of two sums, with a percentile bootstrap interval over the units (documents) they are summed from.

    `numerators`, `denominators`: one value a document. Documents, not tokens, are resampled because tokens of one
    document are not independent. A resample whose denominator is 0 is left out. Fewer than two documents: the
    interval is (-inf, inf), since nothing is known of the spread.
    """
    top, bottom = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    total = bottom.sum()
    value = float(top.sum() / total) if total else float("nan")
    if len(top) < 2 or not total:
        return Interval(value, float("-inf"), float("inf"), level)
    rng = numpy_generator(seed, "bootstrap")
    counts = rng.multinomial(len(top), np.full(len(top), 1 / len(top)), size=draws).astype(np.float64)
    tops, bottoms = counts @ top, counts @ bottom
    ratios = tops[bottoms != 0] / bottoms[bottoms != 0]
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), level)


def bootstrap_mean(values: Sequence[float], *, seed: int, draws: int = 1000, level: float = 0.95) -> Interval:
    """The mean over documents with its percentile bootstrap interval."""
    return bootstrap_ratio(values, np.ones(len(values)), seed=seed, draws=draws, level=level)


def proportion(successes: int, trials: int) -> Interval:
    """A share with its 95 % Wilson (1927) interval, which keeps a width where none or all succeed."""
    if not trials:
        return Interval(float("nan"), 0.0, 1.0)
    z, share = 1.959964, successes / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * (share * (1 - share) / trials + z * z / (4 * trials**2)) ** 0.5 / (1 + z * z / trials)
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def bootstrap(
    statistic: Callable[[np.ndarray], float], documents: int, *, seed: int, draws: int = 1000, level: float = 0.95
) -> Interval:
    """Any statistic of a count vector over documents (how often each was drawn), with its percentile interval."""
    value = float(statistic(np.ones(documents)))
    if documents < 2:
        return Interval(value, float("-inf"), float("inf"), level)
    rng = numpy_generator(seed, "bootstrap")
    counts = rng.multinomial(documents, np.full(documents, 1 / documents), size=draws).astype(np.float64)
    drawn = np.array([statistic(row) for row in counts])
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return Interval(value, float("-inf"), float("inf"), level)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), level)


def p_value(statistic: float, null: Sequence[float]) -> float:
    """The share of null draws at least as large, counting the statistic itself (so never 0): (1 + #>=) / (1 + R)."""
    null = np.asarray(null, np.float64)
    return float((1 + np.sum(null >= statistic)) / (1 + len(null)))


def sequential_p(statistic: float, null: Iterable[float], enough: int = 10) -> tuple[float, list[float]]:
    """A p-value and the draws it took: none are drawn on once `enough` are at least as large (Besag & Clifford 1991).

    Then it is `enough` / draws, else that of `p_value`; without a difference it is below any level as often as the level says.
    """
    drawn, above = [], 0
    for value in null:
        drawn.append(value)
        above += value >= statistic
        if above == enough:
            return enough / len(drawn), drawn
    return p_value(statistic, drawn), drawn


def quantile(values: Sequence[float], q: float) -> float:
    """The `q`-quantile (0..1) of `values`, linear between neighbors."""
    return float(np.quantile(np.asarray(values, np.float64), q))


def prediction_bound(values: Sequence[float], level: float) -> float:
    """What one more positive value like these exceeds at a rate of `level`, if their logarithms are normal; 0 of none.

    mean + t s sqrt(1 + 1 / n) of the logarithms, t the quantile of Student's distribution with n - 1 degrees of freedom
    (Whitmore 1986). A single value is its own bound: nothing is known of its spread.
    """
    logs = np.log(np.asarray(values, np.float64))
    n = len(logs)
    if n < 2:
        return float(np.exp(logs.sum())) if n else 0.0
    # With t = sqrt(n - 1) tan(angle) the density is a power of a cosine.
    angle = np.linspace(0, np.pi / 2, 100_001)
    mass = np.cumsum(np.cos(angle) ** (n - 2))
    at = angle[np.searchsorted(mass, (1 - 2 * level) * mass[-1])]
    return float(np.exp(logs.mean() + np.sqrt(n - 1) * np.tan(at) * logs.std(ddof=1) * np.sqrt(1 + 1 / n)))


def q_values(p: Sequence[float]) -> list[float]:
    """Benjamini-Hochberg (1995) adjusted p-values: the smallest false-discovery rate at which each would be claimed."""
    p = np.asarray(p, np.float64)
    if not len(p):
        return []
    order = np.argsort(p)
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    adjusted = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    out = np.empty_like(adjusted)
    out[order] = adjusted
    return out.tolist()
