"""Reweighing: give the tokens of a change the other model's probabilities, against random groups of tokens."""

from __future__ import annotations

from dataclasses import dataclass

from tunediff.changes.output_bench import OutputBench
from tunediff.changes.outputs import js_divergence, reweighed
from tunediff.changes.trials.base import Outcome, Trial, VerifySettings
from tunediff.changes.trials.patch import both_ways, decide
from tunediff.core.chance import bootstrap_ratio
from tunediff.models.divergences import Divergence
from tunediff.records.measure import Measure

UNIT = "share of JS"


@dataclass(frozen=True)
class Reweigh(Trial):
    """Recovered gap G = 1 - JS after / JS before, on scored tokens of held-out documents.

    JS is the Jensen-Shannon divergence of the models' distributions over all tokens that either has.

    necessity     tuned, its tokens of the group given base's probabilities, against base; new tokens are then never said,
                  and what they had goes to all others in proportion
    sufficiency   base, its tokens of the group given tuned's probabilities, against tuned

    Controls are random groups of as many tokens, each about as likely as the one that it stands for. A p is the
    share of controls that do as well; drawing stops once the mean of both of ten does. `patch.decide` decides by them.
    """

    at_output = True
    decides = True
    bench = "output"

    def run(self, bench: OutputBench, settings: VerifySettings) -> Outcome:
        tuned_NU, base_NU = bench.tuned_NU, bench.base_NU
        gap = bench.by_document(bench.gap_N)
        if gap.mean <= 0:
            return Outcome([], None, "the outputs do not differ where this change is on")

        def after(numbers: list[int]) -> tuple[Divergence, Divergence]:
            without, given = reweighed(tuned_NU, base_NU, numbers), reweighed(base_NU, tuned_NU, numbers)
            return bench.by_document(js_divergence(without, base_NU)), bench.by_document(js_divergence(given, tuned_NU))

        numbers, counts = list(bench.group.numbers), gap.tokens
        against = "random groups of as many tokens, about as likely"
        measures = both_ways(after(numbers), map(after, bench.controls()), gap, UNIT, against, bench.seed)
        mass = {
            side: bootstrap_ratio(bench.by_document(x_NU[:, numbers].sum(1)).nats, counts, seed=bench.seed)
            for side, x_NU in (("tuned", tuned_NU), ("base", base_NU))
        }
        own, base = mass["tuned"], mass["base"].value
        measures += [
            Measure(
                "probability of its tokens", own.value, own.low, own.high, "share", base, "base's, at these tokens"
            ),
            Measure("JS(tuned, base) here", gap.mean, unit="nat a token", against="the gap that is to be recovered"),
        ]
        said = (
            "giving its tokens base's probabilities closes {need:.0%} of the gap where it is on, giving base's tokens "
            "tuned's makes {enough:.0%} of it"
        )
        return Outcome(measures, *decide(measures, settings.level, said, "random groups of tokens that are as likely"))


VARIANT = Reweigh
