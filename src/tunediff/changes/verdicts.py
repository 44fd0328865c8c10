"""Verdicts: ranked changes are tested in trials, and all results on a change become one record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isfinite
from typing import Any

from torch import Tensor

from tunediff.changes.examples import caused_tokens, contexts, kind_rates, lens_tokens
from tunediff.changes.rankings import Ranked, Ranking
from tunediff.changes.trial_bench import Spread, TrialBench, spreads, trial_bench
from tunediff.changes.trials.base import Outcome, Trial, VerifySettings
from tunediff.core.chance import quantile
from tunediff.dictionaries.fitted import Fitted
from tunediff.dictionaries.latent_scaling import latent_scaling
from tunediff.harvests.harvest import Harvest
from tunediff.harvests.lenses import Lens
from tunediff.harvests.samples import Sample
from tunediff.models.pair import Pair
from tunediff.records.change import Change
from tunediff.records.diff import ChangeRecord
from tunediff.records.measure import Measure, TokenWeight
from tunediff.records.site import Site

READ_DOCUMENTS = 24
"""Largest number of held-out documents from which a change's words are computed."""

READ_SCORED = 400
"""Largest number of held-out tokens from which a change's words are computed."""

SHOWN = 3
"""Changes shown with contexts and words, as a multiple of the number of tested changes."""


@dataclass(frozen=True, eq=False)
class Proposals:
    """The changes that one finder of a run proposed.

    name      the finder's name in the plan
    changes   the proposed changes, in the finder's order
    fitted    the dictionary that the finder fitted, if any
    offset    whether these changes are the constant offset, which other finders leave out of their changes
    """

    name: str
    changes: list[Change]
    fitted: Fitted | None = None
    offset: bool = False


@dataclass(eq=False)
class Verifier:
    """Tests the changes of one ranking on a held-out sample.

    level   largest p at which a change stands out from random fine-tunes
    kl_N    KL(tuned || base) in nats at the sample's tokens
    """

    pair: Pair
    harvest: Harvest
    sample: Sample
    lens: Lens
    ranking: Ranking
    proposals: Sequence[Proposals]
    trials: Mapping[str, Trial]
    settings: VerifySettings
    level: float
    seed: int
    kl_N: Tensor = field(repr=False)

    def stands_out(self, ranked: Ranked) -> bool:
        """Whether the change has more effect than random fine-tunes of the same size."""
        return ranked.p <= self.level

    @cached_property
    def tried(self) -> list[Ranked]:
        """The changes to test: the first of the ranking, without those that random fine-tunes refute.

        None where the ranking says why no change may be confirmed.
        """
        if self.ranking.refusal:
            return []
        return [r for r in self.ranking.ranked[: self.settings.changes] if self.stands_out(r)]

    @cached_property
    def _spread(self) -> dict[Site, Spread]:
        return spreads(self.harvest)

    @cached_property
    def _scales(self) -> dict[str, list[Measure]]:
        """Latent Scaling on held-out text, by change, for changes that are latents of a dictionary."""
        out: dict[str, list[Measure]] = {}
        for proposals in self.proposals:
            if proposals.fitted is not None:
                of = {c.origin["latent"]: c.id for c in proposals.changes if "latent" in c.origin}
                out |= scale_measures(proposals.fitted, self.harvest, of, self.seed)
        return out

    def record(self, number: int) -> ChangeRecord:
        """Run the trials of the change at this place of the ranking, and return all results as one record."""
        ranked = self.ranking.ranked[number]
        change, site = ranked.change, ranked.change.sites[-1]
        outcomes: dict[str, Outcome] = {}
        promoted: list[TokenWeight] = []
        suppressed: list[TokenWeight] = []
        read_by = ""
        bench = self._bench(change, self._others(change), self.settings) if ranked in self.tried else None
        if bench is not None:
            outcomes = {name: trial.run(bench, self.settings) for name, trial in self.trials.items()}
            # Words come from more text than trials use: words cost one run, trials one run for every control.
            wide = replace(self.settings, documents=READ_DOCUMENTS, scored=READ_SCORED)
            if (reading := self._bench(change, [], wide)) is not None:
                promoted, suppressed = caused_tokens(self.pair.tokenizer, reading)
            read_by = (
                "what tuned says more and less of because of it (keyness of what is expected on held-out text, nat)"
            )
        decision, reason = self._decision(ranked, outcomes)
        shown, f_N = number < SHOWN * self.settings.changes, self.sample.strength(change)
        if not promoted and not suppressed and shown:
            promoted, suppressed = lens_tokens(self.pair.tokenizer, self.pair.base, self.lens, change)
            read_by = f"tuned lens at {site} (cosine)"
        return ChangeRecord(
            rank=number + 1,
            id=change.id,
            finder=change.finder,
            sites=[str(s) for s in change.sites],
            share=change.share,
            decision=decision,
            reason=reason,
            score=_score(ranked),
            measures=_measures(ranked)
            + [m for o in outcomes.values() for m in o.measures]
            + self._scales.get(change.id, []),
            promoted=promoted,
            suppressed=suppressed,
            read_by=read_by,
            contexts=contexts(self.pair.tokenizer, self.sample, f_N, self.kl_N) if shown else [],
            depth=ranked.depth,
            kinds=kind_rates(self.sample, f_N),
            dose=[point for o in outcomes.values() for point in o.dose],
            origin=change.origin,
        )

    def _others(self, change: Change) -> list[Change]:
        """The changes that together should make up the whole difference: those of the same finder, and the offset."""
        own = {c.id for p in self.proposals if p.offset or change.id in {c.id for c in p.changes} for c in p.changes}
        return [r.change for r in self.ranking.ranked if r.change.id in own]

    def _bench(self, change: Change, others: list[Change], settings: VerifySettings) -> TrialBench | None:
        return trial_bench(self.pair, change, others, self.sample, self._spread[change.sites[-1]], settings, self.seed)

    def _decision(self, ranked: Ranked, outcomes: Mapping[str, Outcome]) -> tuple[str, str]:
        """The decision and its reason. A change is confirmed only if every trial that decides supports the change."""
        if not self.stands_out(ranked):
            return "refuted", f"random tunes of the same size do as much (p = {ranked.p:.2g})"
        if self.ranking.refusal:
            return "undecided", self.ranking.refusal
        return decision_of(self.trials, outcomes)


def decision_of(trials: Mapping[str, Trial], outcomes: Mapping[str, Outcome]) -> tuple[str, str]:
    """What the trials of a change that stands out from random tunes decide, and the reason."""
    if not outcomes:
        return "undecided", "stands out from random tunes, but was not put on trial"
    decide = [outcomes[name] for name, trial in trials.items() if trial.decides]
    if not decide:
        return "undecided", f"none of the trials decides ({', '.join(outcomes)})"
    against = [o for o in decide if o.speaks is False]
    silent = [o for o in decide if o.speaks is None]
    decision = "refuted" if against else "undecided" if silent else "confirmed"
    return decision, "; ".join(o.reason for o in against or silent or decide)


def scale_measures(fitted: Fitted, harvest: Harvest, ids: Mapping[int, str], seed: int) -> dict[str, list[Measure]]:
    """Latent Scaling of some latents on held-out text, by change id; `ids` maps latents to change ids."""
    scales = latent_scaling(fitted, harvest, doc_N=harvest.documents("held_out"), latents=sorted(ids), seed=seed)
    return {
        ids[scale.latent]: [
            Measure(
                f"Latent Scaling, {part}",
                nu.value if isfinite(nu.value) else None,
                nu.low,
                nu.high,
                "need in base / in tuned",
                1.0,
                f"a latent that base needs as much; verdict: {scale.kind}",
            )
            for part, nu in (("error", scale.nu_error), ("reconstruction", scale.nu_reconstruction))
        ]
        for scale in scales
    }


def _score(ranked: Ranked) -> Measure:
    score, null = ranked.score, ranked.null
    against = f"95th percentile of the best candidate in {len(null)} random tunes"
    return Measure(
        "energy along the change",
        score.value,
        score.low,
        score.high,
        "x random tunes",
        quantile(null, 0.95),
        against,
        ranked.p,
    )


def _measures(ranked: Ranked) -> list[Measure]:
    effect: Any = ranked.effect
    return [
        Measure(
            "effect on the output",
            effect.value,
            effect.low,
            effect.high,
            "nat a token",
            None,
            "taken out alone on training text; no control of its own: orders the changes that stand out",
        ),
        Measure("tokens on", ranked.share_of_tokens, unit="share", against=f"{ranked.firings} held-out tokens"),
    ]
