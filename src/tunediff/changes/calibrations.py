"""Calibrations: results of null pairs of a base model, measured once and saved, and claims judged by them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from tunediff.core.artifacts import read_json, sealed, write_json
from tunediff.core.chance import prediction_bound, quantile
from tunediff.core.typed import typed
from tunediff.models.shipped import cache_folder
from tunediff.records.diff import ChangeRecord
from tunediff.records.measure import GAP, STANDING

SHIPPED = Path(__file__).parent / "assets" / "calibrations"

AS_A_PLACEBO = "real, but training on nothing does as much"
"""First words of the reason when a claim is withdrawn because placebos show as large a gap."""


@dataclass(frozen=True)
class NullPair:
    """Result of a run on one null pair, whose tuned model was taught nothing.

    trained  whether the tuned model is a placebo, trained on text that teaches nothing; training changes how it speaks
    score    the best score, relative to the pair's own random fine-tunes
    gap      the largest `ChangeRecord.gap` of the confirmed changes, nat a token; 0 if none was confirmed
    standing   the largest `ChangeRecord.standing` of the confirmed changes, nat; 0 if none was confirmed, or not measured
    """

    name: str
    trained: bool
    score: float
    gap: float
    standing: float = 0.0


@dataclass(frozen=True)
class Calibration:
    """Results of the null pairs of one base model, and the thresholds computed from them.

    base     fingerprint of the base's weights
    level    false-positive rate at which changes are claimed
    """

    base: str
    nulls: list[NullPair]
    level: float

    @cached_property
    def score(self) -> float:
        """Threshold of the score: the quantile, at the level, over the null pairs that were not trained.

        Placebos are left out, because their scores grow with training time even if nothing was taught.
        """
        scores = [null.score for null in self.nulls if not null.trained]
        return max(quantile(scores, 1 - self.level), 0.0) if scores else 0.0

    @cached_property
    def gap(self) -> float:
        """Threshold of the gap, nat a token: the prediction bound for one more null pair with confirmed changes."""
        return prediction_bound([null.gap for null in self.nulls if null.gap > 0], self.level)

    @cached_property
    def standing(self) -> float:
        """Threshold of the standing, nat: the prediction bound for one more null pair with confirmed groups of tokens."""
        return prediction_bound([null.standing for null in self.nulls if null.standing > 0], self.level)

    def judged(self, record: ChangeRecord) -> ChangeRecord:
        """The record, its claim withdrawn below a threshold: refuted below that of the score, undecided below that of
        the gap, or of the standing for a change that claims tokens.

        A change below the gap's or the standing's threshold is real, but placebos have such changes too, so it need not be
        what was taught. The threshold becomes the control of its measure.
        """
        limits = {GAP: self.gap, STANDING: self.standing}
        measures = [
            replace(m, control=limits[m.name], against="one more placebo of this base stays below")
            if limits.get(m.name)
            else m
            for m in record.measures
        ]
        record = replace(record, measures=measures)
        if record.standing:
            if record.decision == "confirmed" and not record.standing > self.standing:
                reason = f"{AS_A_PLACEBO}: its tokens stand at {record.standing:.2g} nat, placebos' at up to {self.standing:.2g}"
                return replace(record, decision="undecided", reason=reason)
            return record
        if record.decision == "refuted" or record.is_at_output:
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
        """Save the calibration for its base, replacing an older one; return the file."""
        path = cache_folder() / "calibrations" / f"{self.base}.json"
        write_json(path, sealed(self))
        return path

    @classmethod
    def of(cls, base: str) -> Calibration | None:
        """The calibration of a base: the user's own, otherwise the shipped one, otherwise None."""
        paths = (folder / f"{base}.json" for folder in (cache_folder() / "calibrations", SHIPPED))
        path = next((path for path in paths if path.is_file()), None)
        return typed(cls, read_json(path), path.name) if path else None
