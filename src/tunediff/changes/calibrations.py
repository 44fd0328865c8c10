"""Calibrations: what pairs of a base with nothing to find give, measured once and kept, and claims judged by it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from tunediff.core.artifacts import read_json, write_json
from tunediff.core.chance import prediction_bound, quantile
from tunediff.core.typed import typed
from tunediff.models.shipped import cache_folder
from tunediff.records.diff import ChangeRecord
from tunediff.records.measure import GAP

SHIPPED = Path(__file__).parent / "assets" / "calibrations"

AS_A_PLACEBO = "real, but training on nothing does as much"
"""How the reason begins where a claim was withdrawn for the placebos' gap."""


@dataclass(frozen=True)
class NullPair:
    """What a run on one pair with nothing to find gave.

    trained  whether anything was trained: a placebo, which does change how a model speaks
    score    its best score, in units of its own random tunes
    gap      the largest gap of its confirmed changes (`ChangeRecord.gap`), nat a token; 0 if none was confirmed
    """

    name: str
    trained: bool
    score: float
    gap: float


@dataclass(frozen=True)
class Calibration:
    """What null pairs of one base gave.

    base     fingerprint of the base's weights
    level    the rate at which a change may be claimed that is none
    """

    base: str
    nulls: list[NullPair]
    level: float

    @cached_property
    def score(self) -> float:
        """The score that a change has to exceed: the quantile, at the level, of the nulls that no one trained.

        Placebos are left out: their scores say how long they were trained, not that anything was taught.
        """
        scores = [null.score for null in self.nulls if not null.trained]
        return max(quantile(scores, 1 - self.level), 0.0) if scores else 0.0

    @cached_property
    def gap(self) -> float:
        """The gap in nat that a change has to exceed: what one more null like those that were claimed would stay under."""
        return prediction_bound([null.gap for null in self.nulls if null.gap > 0], self.level)

    def judged(self, record: ChangeRecord) -> ChangeRecord:
        """A record, its claim withdrawn where nothing does as much: refuted below the score, undecided below the gap.

        A change below the gap is real, but so are a placebo's: nothing shows that it is about what the tune was taught. The gap is
        told with what it is held against.
        """
        if self.gap:
            record = replace(
                record,
                measures=[
                    replace(m, control=self.gap, against="one more placebo of this base stays below")
                    if m.name == GAP
                    else m
                    for m in record.measures
                ],
            )
        if record.decision == "refuted":
            return record
        if not record.score.value > self.score:
            return replace(
                record, decision="refuted", reason=f"null pairs of this base score as much (up to {self.score:.3g})"
            )
        if record.decision == "confirmed" and not record.gap > self.gap:
            return replace(
                record,
                decision="undecided",
                reason=f"{AS_A_PLACEBO}: the models are {record.gap:.2g} nat apart "
                f"where it is on, and where placebos' changes are up to {self.gap:.2g}",
            )
        return record

    def save(self) -> Path:
        """Keep it for this base; an older one is replaced."""
        path = cache_folder() / "calibrations" / f"{self.base}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self)
        return path

    @classmethod
    def of(cls, base: str) -> Calibration | None:
        """That of a base: the user's own, or else the one that ships, if there is one."""
        paths = (folder / f"{base}.json" for folder in (cache_folder() / "calibrations", SHIPPED))
        path = next((path for path in paths if path.is_file()), None)
        return typed(cls, read_json(path), path.name) if path else None
