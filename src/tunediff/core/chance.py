"""Random streams by name, bootstrap intervals over documents, and p-values against null draws."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Values = Sequence[float] | NDArray[np.float64]


def seed_of(seed: int, *names: object) -> int:
    """Derive a 63-bit seed from `seed` and every name; it is the same on every machine and in every process."""
    text = "\x1f".join([str(int(seed)), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *names: object) -> torch.Generator:
    """Return a CPU torch generator for the random stream called `names`."""
    import torch

    return torch.Generator().manual_seed(seed_of(seed, *names))


def numpy_generator(seed: int, *names: object) -> np.random.Generator:
    """Return a numpy generator for the random stream called `names`."""
    return np.random.default_rng(seed_of(seed, *names))


@dataclass(frozen=True)
class Interval:
    """An estimate with both ends of its interval; ``level`` is its nominal coverage (0..1)."""

    value: float
    low: float
    high: float
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def bootstrap_ratio(
    numerators: Values, denominators: Values, *, seed: int, draws: int = 1000, level: float = 0.95
) -> Interval:
    """The ratio of two sums over documents, with its percentile bootstrap interval.

    `numerators`, `denominators`: one value per document. Documents are resampled, not tokens, because tokens of one
    document are not independent. A resample whose denominator is 0 is left out. With fewer than two documents the
    interval is (-inf, inf), because one document says nothing about the spread.
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


def bootstrap_mean(values: Values, *, seed: int, draws: int = 1000, level: float = 0.95) -> Interval:
    """The mean over documents, with its percentile bootstrap interval."""
    return bootstrap_ratio(values, np.ones(len(values)), seed=seed, draws=draws, level=level)


def proportion(successes: int, trials: int) -> Interval:
    """A share with its 95 % Wilson (1927) interval, whose width stays positive when none or all trials succeed."""
    if not trials:
        return Interval(float("nan"), 0.0, 1.0)
    z, share = 1.959964, successes / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * (share * (1 - share) / trials + z * z / (4 * trials**2)) ** 0.5 / (1 + z * z / trials)
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def p_value(statistic: float, null: Values) -> float:
    """The p-value (1 + #{null >= statistic}) / (1 + R) against R null draws; counting the statistic keeps it above 0."""
    draws = np.asarray(null, np.float64)
    return float((1 + np.sum(draws >= statistic)) / (1 + len(draws)))


def sequential_p(statistic: float, null: Iterable[float], enough: int = 10) -> tuple[float, list[float]]:
    """A p-value and the null draws it used; drawing stops once `enough` are at least as large (Besag & Clifford 1991).

    The p-value is then `enough` / draws, otherwise that of `p_value`. Under the null it falls below any level as often
    as that level says.
    """
    drawn: list[float] = []
    above = 0
    for value in null:
        drawn.append(value)
        above += value >= statistic
        if above == enough:
            return enough / len(drawn), drawn
    return p_value(statistic, drawn), drawn


def quantile(values: Values, q: float) -> float:
    """The `q`-quantile (0..1) of `values`, interpolated linearly."""
    return float(np.quantile(np.asarray(values, np.float64), q))


def prediction_bound(values: Values, level: float) -> float:
    """The bound that one more value exceeds with probability `level`, for positive log-normal `values`; 0 if empty.

    It is exp(mean + t s sqrt(1 + 1 / n)) of the logarithms, with t the upper quantile of Student's distribution with
    n - 1 degrees of freedom (Whitmore 1986). A single value is its own bound, because it says nothing about the spread.
    """
    logs = np.log(np.asarray(values, np.float64))
    n = len(logs)
    if n < 2:
        return float(np.exp(logs.sum())) if n else 0.0
    # Substituting t = sqrt(n - 1) tan(angle) turns the density into a power of a cosine.
    angle = np.linspace(0, np.pi / 2, 100_001)
    mass = np.cumsum(np.cos(angle) ** (n - 2))
    at = angle[np.searchsorted(mass, (1 - 2 * level) * mass[-1])]
    return float(np.exp(logs.mean() + np.sqrt(n - 1) * np.tan(at) * logs.std(ddof=1) * np.sqrt(1 + 1 / n)))
