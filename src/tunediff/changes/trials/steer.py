"""Steering: add the change to base at several strengths of both signs, compared with random directions of equal length."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tunediff.changes.trial_bench import TrialBench
from tunediff.changes.trials.base import Outcome, Trial, VerifySettings
from tunediff.core.axes import BASE
from tunediff.core.errors import within
from tunediff.records.measure import DosePoint, Measure


@dataclass(frozen=True)
class Steer(Trial):
    """Effect of a dose: 1 - KL(tuned || steered base) / KL(tuned || base), which is 1 where steered base equals tuned.

    A genuine change has an effect that rises with the dose to about 1, and a negative effect at negative doses.
    """

    controls: int = 4
    """Number of random directions at each point of the curve; p-values come from patching, which draws many more."""

    def __post_init__(self) -> None:
        within("verify.steer", self, controls=1)

    def run(self, bench: TrialBench, settings: VerifySettings) -> Outcome:
        base_BTD = bench.streams_BTMD[:, :, BASE]
        gap = float(bench.gap_N.mean())
        if gap <= 0:
            return Outcome([], None, "the models do not differ where this change is on")

        curve = []
        for dose in settings.doses:
            written = [bench.written_BTD, *bench.controls(self.controls)]
            kls = bench.from_tuned(bench.pair.base, (base_BTD + dose * added_BTD for added_BTD in written))
            own, *controls = [1 - float(kl_N.mean()) / gap for kl_N in kls]
            controls = torch.tensor(controls)
            low, high = controls.quantile(torch.tensor([0.05, 0.95])).tolist()
            curve.append(DosePoint(dose, own, float(controls.mean()), low, high))
        at = {point.dose: point.effect for point in curve}
        speaks = at[1.0] > 0 > at[-1.0] if {1.0, -1.0} <= set(at) else None
        reason = "the sign turns with the dose" if speaks else "the dose curve does not turn its sign"
        measure = Measure(
            "effect at dose 1 minus dose -1",
            at.get(1.0, 0.0) - at.get(-1.0, 0.0),
            unit="share of KL",
            control=None,
            against=f"{self.controls} random directions, drawn in the curve",
        )
        return Outcome([measure], speaks, reason, curve)


VARIANT = Steer
