"""Calibrations: how high changes score in pairs with nothing to find, measured on a user's own base and kept for `diff`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tunediff.artifacts import read_json, write_json
from tunediff.chance import quantile
from tunediff.embedded import cache_folder
from tunediff.results import typed


@dataclass(frozen=True)
class Calibration:
    """What null pairs of one base gave.

    base     fingerprint of the base's weights
    nulls    what each null was
    scores   the best score of each, in units of its own random tunes
    claimed  how many of them `diff` would have found something in
    level    the rate at which a change may stand out
    """

    base: str
    nulls: list[str]
    scores: list[float]
    claimed: int
    level: float

    @property
    def threshold(self) -> float:
        """The score that a change has to exceed: the nulls' quantile at the level, 0 where there were none."""
        return max(quantile(self.scores, 1 - self.level), 0.0) if self.scores else 0.0

    def save(self) -> Path:
        """Keep it for this base; an older one is replaced."""
        path = _path(self.base)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self)
        return path

    @classmethod
    def of(cls, base: str) -> "Calibration | None":
        """That of a base, if there is one."""
        path = _path(base)
        return typed(cls, read_json(path), path.name) if path.is_file() else None


def _path(base: str) -> Path:
    return cache_folder() / "calibrations" / f"{base}.json"
