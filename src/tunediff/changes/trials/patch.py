"""Patching: remove the change from tuned (necessity) or add it to base (sufficiency), against random directions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from tunediff.changes.trial_bench import TrialBench
from tunediff.changes.trials.base import Outcome, Trial, VerifySettings
from tunediff.core.axes import BASE, TUNED
from tunediff.core.chance import Interval, bootstrap_ratio, quantile, sequential_p
from tunediff.core.errors import within
from tunediff.models.divergences import Divergence
from tunediff.records.measure import GAP, Measure

SAID = (
    "taking it out closes {need:.0%} of the gap where it is on (p = {need_p:.2g}), putting it into base makes "
    "{enough:.0%} of it (p = {enough_p:.2g})"
)


@dataclass(frozen=True)
class Patch(Trial):
    """Recovered gap G = 1 - KL after / KL before, on scored tokens of held-out documents.

    necessity    KL(tuned without the change || base) against KL(tuned || base), with tuned's upper blocks
    sufficiency  KL(tuned || base with the change) against KL(tuned || base), with base's and with tuned's upper blocks
    ceiling      the whole true difference at the site added to base: the most that any change at the site restores
    error term   the difference without all candidate changes, added to base: what the candidates miss

    Controls are directions drawn from the difference's own covariance, with the change's energy at every token. p is
    the share of controls that do as well as the change. Drawing stops once ten do. The trial does not show that a
    change has one meaning.
    """

    decides = True

    ceiling: float = 0.1
    """Smallest share of the gap (0..1) that the whole difference must restore for changes at the site to be judged."""

    def __post_init__(self) -> None:
        within("verify.patch", self, ceiling=(0, 1))

    def run(self, bench: TrialBench, settings: VerifySettings) -> Outcome:
        pair, base_BTD, tuned_BTD = bench.pair, bench.streams_BTMD[:, :, BASE], bench.streams_BTMD[:, :, TUNED]
        gap = bench.by_document(bench.gap_N)
        if gap.mean <= 0:
            return Outcome([], None, "the models do not differ where this change is on")

        def necessity(written: Iterable[Tensor]) -> Iterator[Divergence]:
            return map(bench.by_document, bench.to_base(pair.tuned, (tuned_BTD - added_BTD for added_BTD in written)))

        def sufficiency(written: Iterable[Tensor], model=pair.base) -> Iterator[Divergence]:
            return map(bench.by_document, bench.from_tuned(model, (base_BTD + added_BTD for added_BTD in written)))

        measures, speaks = [], []
        for name, trial in (("necessity", necessity), ("sufficiency", sufficiency)):
            own = recovered(next(trial([bench.written_BTD])), gap, bench.seed)
            p, null = sequential_p(own.value, (1 - after.mean / gap.mean for after in trial(bench.controls())))
            measures.append(
                Measure(
                    name,
                    own.value,
                    own.low,
                    own.high,
                    "share of KL",
                    quantile(null, 0.95),
                    f"95th percentile of {len(null)} random directions of equal energy",
                    p,
                )
            )
            speaks.append((own, p))
        whole = tuned_BTD - base_BTD
        (after,) = sufficiency([bench.written_BTD], pair.tuned)
        above = recovered(after, gap, bench.seed)
        ceiling, missed = (
            recovered(after, gap, bench.seed) for after in sufficiency([whole, whole - bench.everything_BTD])
        )
        measures += [
            _row("sufficiency in tuned's upper blocks", above, "no control: beside the one in base's"),
            _row("ceiling", ceiling, "the true difference at this site put into base"),
            _row("error term", missed, "what all candidates leave of the difference, put into base"),
            Measure(GAP, gap.mean, unit="nat a token", against="the gap that is to be recovered"),
        ]
        if ceiling.value < self.ceiling:
            return Outcome(
                measures,
                None,
                f"the whole difference at {bench.site} restores only {ceiling.value:.0%} of "
                "the gap, so this site cannot be judged",
            )
        return Outcome(measures, *decide(speaks, settings.level, SAID, "random directions of equal energy do as much"))


def recovered(after: Divergence, before: Divergence, seed: int) -> Interval:
    """The recovered gap 1 - after / before, with its interval over documents."""
    kept = bootstrap_ratio(after.nats, before.nats, seed=seed)
    return Interval(1 - kept.value, 1 - kept.high, 1 - kept.low, kept.level)


def _row(name: str, value: Interval, against: str) -> Measure:
    return Measure(name, value.value, value.low, value.high, "share of KL", None, against)


def decide(speaks: list[tuple[Interval, float]], level: float, said: str, refuted: str) -> tuple[bool | None, str]:
    """Whether necessity and sufficiency, each with its p, support a change, and the reason.

    said      the reason of a support, with places for ``need``, ``need_p``, ``enough`` and ``enough_p``
    refuted   the reason of a refutation, which names the controls
    """
    (need, need_p), (enough, enough_p) = speaks
    if all(i.low > 0 and p <= level for i, p in speaks):
        return True, said.format(need=need.value, need_p=need_p, enough=enough.value, enough_p=enough_p)
    if need.high <= 0 or (need_p > 0.5 and enough_p > 0.5):
        return False, refuted
    return None, f"not both necessity and sufficiency stand out from {refuted.partition(' do ')[0]}"


VARIANT = Patch
