"""Lifting: remove a change from tuned or add it to base, and see what its tokens' logits gain, against random directions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tunediff.changes.gains import rises
from tunediff.changes.outputs import group_of
from tunediff.changes.trial_bench import TrialBench
from tunediff.changes.trials.base import Outcome, Trial, VerifySettings
from tunediff.changes.trials.patch import CONTROLS, beyond, decide, patched
from tunediff.core.axes import BASE, TUNED
from tunediff.core.chance import bootstrap_ratio
from tunediff.core.errors import within
from tunediff.models.divergences import Divergence
from tunediff.models.network import LanguageModel
from tunediff.records.measure import Measure

UNIT = "share of gain"

SAID = "taking it out closes {need:.0%} of what its tokens gain, putting it into base makes {enough:.0%} of it"


@dataclass(frozen=True)
class Lift(Trial):
    """Recovered gain G = 1 - gain left / gain, on scored tokens of held-out documents.

    The gain is that of the change's tokens (`changes.gains`), averaged over those that are plausible: how much tuned raises
    their logits (lowers, for a group that is lowered), whether or not they are said. Which tokens are plausible is decided
    once, by tuned and base without an intervention.

    necessity     the gain that is left when the change is taken out of tuned
    sufficiency   the gain that is missing when the change is put into base
    ceiling       the whole true difference at the site put into base

    Controls, p and decision are those of `patch`.
    """

    at_output = True
    decides = True

    ceiling: float = 0.1
    """Smallest share of the gain (0..1) that the whole difference must restore for changes at the site to be judged."""

    def __post_init__(self) -> None:
        within("verify.lift", self, ceiling=(0, 1))

    def run(self, bench: TrialBench, settings: VerifySettings) -> Outcome:
        pair, group = bench.pair, group_of(bench.change)
        numbers = list(group.numbers)
        _, plausible_NV = rises(bench.tuned_logp.cpu(), bench.base_logp.cpu())
        mine_NV = torch.zeros_like(plausible_NV)
        mine_NV[:, numbers] = plausible_NV[:, numbers]
        weight_NV = group.sign * (_mean(mine_NV) - _mean(plausible_NV) * mine_NV.any(1, keepdim=True))
        base_BTD, tuned_BTD = bench.streams_BTMD[:, :, BASE], bench.streams_BTMD[:, :, TUNED]

        def pulled(model: LanguageModel, streams: Iterable[Tensor]) -> Iterator[Tensor]:
            return bench.weighed(model, streams, weight_NV)

        (base_N,), (tuned_N,) = pulled(pair.base, [base_BTD]), pulled(pair.tuned, [tuned_BTD])
        # Only tokens of text count at which an entry of the change is plausible.
        tokens = list(map(int, bench.by_document(mine_NV.any(1).float()).nats))

        def gained(gain_N: Tensor) -> Divergence:
            return Divergence(bench.by_document(gain_N).nats, tokens)

        gap = gained(tuned_N - base_N)
        if gap.mean <= 0:
            return Outcome([], None, "its tokens gain nothing on held-out text")

        def without(streams: Iterable[Tensor]) -> Iterator[Divergence]:
            return (gained(x_N - base_N) for x_N in pulled(pair.tuned, streams))

        def given(streams: Iterable[Tensor]) -> Iterator[Divergence]:
            return (gained(tuned_N - x_N) for x_N in pulled(pair.base, streams))

        measures, ceiling = patched(bench, without, given, gap, UNIT)
        mean = bootstrap_ratio(gap.nats, gap.tokens, seed=bench.seed)
        measures.append(
            Measure("gain of its tokens here", mean.value, mean.low, mean.high, "nat", 0.0, "a model against itself")
        )
        measures.append(self._said(bench, numbers))
        if ceiling < self.ceiling:
            return Outcome(measures, None, beyond(bench, ceiling, "the gain"))
        return Outcome(measures, *decide(measures, settings.level, SAID, CONTROLS))

    def _said(self, bench: TrialBench, numbers: list[int]) -> Measure:
        """The probability that tuned gives to the change's tokens, and base as the control."""
        tuned, base = (
            bench.by_document(logp.cpu()[:, numbers].exp().sum(1)) for logp in (bench.tuned_logp, bench.base_logp)
        )
        own = bootstrap_ratio(tuned.nats, tuned.tokens, seed=bench.seed)
        told = "base's, at these tokens of text"
        return Measure("probability of its tokens", own.value, own.low, own.high, "share", base.mean, told)


def _mean(chosen_NV: Tensor) -> Tensor:
    """Weights that average over chosen entries."""
    return chosen_NV.float() / chosen_NV.sum(1, keepdim=True).clamp_min(1)


VARIANT = Lift
