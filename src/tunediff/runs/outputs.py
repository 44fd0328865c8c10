"""The output side of a run: changes that claim tokens, found, ranked, tried and told in a stage of their own.

Some of them live at the output alone. Others write into a stream, and raise or lower the logits of their tokens by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tunediff.changes.examples import contexts, kind_rates
from tunediff.changes.gains import chance, rank_gains, standing
from tunediff.changes.output_bench import output_bench
from tunediff.changes.outputs import Outputs, gained, group_of, rank_outputs
from tunediff.changes.rankings import Ranked
from tunediff.changes.trial_bench import spreads, trial_bench
from tunediff.changes.trials.base import Outcome, Trial, VerifySettings
from tunediff.changes.verdicts import decision_of
from tunediff.core.artifacts import read_json, write_json
from tunediff.core.chance import Interval, bootstrap_ratio, quantile
from tunediff.core.typed import typed
from tunediff.models.divergences import by_document
from tunediff.records.change import Change, load_changes, save_changes
from tunediff.records.diff import OUTPUT, ChangeRecord, load_records
from tunediff.records.measure import STANDING, Measure, TokenWeight

if TYPE_CHECKING:
    from tunediff.runs.stages import Stages


@dataclass(frozen=True)
class OutputSide:
    """What a run found at the output.

    records    changes that claim tokens, with their trials; their ranks are not given yet
    measures   how much probability lies on tokens that only one model has
    changes    those of these changes that write into a stream, which edits can take out
    """

    records: list[ChangeRecord]
    measures: list[Measure]
    changes: list[Change]


def output_side(run: Stages) -> OutputSide:
    """What finders of changes that claim tokens find, each change on trial."""
    plan, vocabularies = run.plan, run.pair.vocabularies
    finders, trials = plan.output_finders(), plan.output_trials()

    def make(folder: Path) -> list[str]:
        train, held = (Outputs(run.pair, sample, plan.rank.batch_tokens) for sample in (run.train, run.sample))
        view = run.view(folder, "find", train)
        changes = [change for finder in finders.values() for change in finder.find(view).changes]
        records = _at_the_output(run, held, [c for c in changes if c.is_at_output], trials)
        records += _in_streams(run, held, [c for c in changes if not c.is_at_output], trials)
        write_json(folder / "records.json", records)
        write_json(folder / "measures.json", _outside(held, plan.seed))
        return ["records.json", "measures.json", *save_changes(folder, changes)]

    def read(folder: Path) -> OutputSide:
        measures = typed(list[Measure], read_json(folder / "measures.json"), "measures.json")
        changes = [change for change in load_changes(folder) if not change.is_at_output]
        return OutputSide(load_records(folder / "records.json"), measures, changes)

    named = [plan.find.output_finders, plan.rank, plan.verify, plan.seed, vocabularies.notes]
    place = run.keeper.at(
        "outputs", run.harvest.fingerprint, run.written, *named, *run._code([*finders.values(), *trials.values()])
    )
    return run.keeper.kept(place, make, read, lambda side: f"{len(side.records)} changes that claim tokens")


def _at_the_output(
    run: Stages, held: Outputs, changes: Sequence[Change], trials: Mapping[str, Trial]
) -> list[ChangeRecord]:
    """Records of changes that live at the output alone."""
    if not changes:
        return []
    plan = run.plan
    f_NK = held.strengths(changes)
    on = [k for k in range(len(changes)) if f_NK[:, k].any()]
    strength_of = {change.id: f_NK[:, k] for k, change in enumerate(changes)}
    ranked = rank_outputs(
        run.pair,
        [changes[k] for k in on],
        held,
        f_NK[:, on],
        plan.rank,
        plan.seed,
        lambda d, t: run.progress("outputs", d, t),
    )
    records = [_record(run, held, r, strength_of[r.change.id], trials) for r in ranked]
    return records + [_silent(run, held, changes[k]) for k in range(len(changes)) if k not in on]


def _in_streams(
    run: Stages, held: Outputs, changes: Sequence[Change], trials: Mapping[str, Trial]
) -> list[ChangeRecord]:
    """Records of changes that raise or lower the logits of their tokens by what they write into a stream."""
    if not changes:
        return []
    plan = run.plan
    ranked = rank_gains(run.pair, changes, held, plan.rank, plan.seed, lambda d, t: run.progress("rank tokens", d, t))
    found, spread, records = standing(held).score_V, spreads(run.harvest), []
    for number, r in enumerate(ranked):
        change, bench, by_chance = r.change, None, chance(r, plan.rank.level)
        if number < plan.verify.changes and not by_chance and not run.ranking.refusal:
            bench = trial_bench(
                run.pair, change, [change], run.sample, spread[change.sites[-1]], plan.verify, plan.seed
            )
        outcomes = _outcomes(trials, bench, "streams", plan.verify)
        decision, reason = _decision(run, by_chance, outcomes, trials)
        against = f"95th percentile of the best group of as many tokens in {len(r.null)} random tunes"
        stands = r.effect
        score = Measure(
            "standing of its tokens, relative",
            r.score.value,
            r.score.low,
            r.score.high,
            "x random tunes",
            quantile(r.null, 0.95),
            against,
            r.p,
        )
        measures = [
            Measure(
                STANDING,
                stands.value,
                stands.low,
                stands.high,
                "nat",
                against="mean gain where it is plausible x root of the share of text where it is; random tunes: the score",
            ),
            Measure("plausible", r.share_of_tokens, unit="share", against=f"{r.firings} held-out tokens"),
            *(m for outcome in outcomes.values() for m in outcome.measures),
        ]
        group = group_of(change)
        words = [
            TokenWeight(name, float(found[n]))
            for name, n in zip(group.names, group.numbers)
            if found[n] * group.sign > 0
        ]
        words.sort(key=lambda word: -abs(word.weight))
        told = _told(run, change, decision, reason, score, measures, words, run.sample.strength(change).clamp_min(0))
        records.append(replace(told, share=change.share, read_by="its tokens by their standing on held-out text, nat"))
        run.progress("try tokens", number + 1, len(ranked))
    return records


def _outcomes(trials: Mapping[str, Trial], bench: Any, where: str, settings: VerifySettings) -> dict[str, Outcome]:
    """The outcomes of the trials that intervene where a bench lets them."""
    if bench is None:
        return {}
    return {name: trial.run(bench, settings) for name, trial in trials.items() if trial.bench == where}


def _decision(
    run: Stages, by_chance: tuple[str, str] | None, outcomes: Mapping[str, Outcome], trials: Mapping[str, Trial]
) -> tuple[str, str]:
    """The decision on a change that claims tokens, and its reason. `by_chance` is both, where random tunes do as much."""
    if by_chance:
        return by_chance
    if run.ranking.refusal:
        return "undecided", run.ranking.refusal
    return decision_of({name: trials[name] for name in outcomes}, outcomes)


def in_one_ranking(outputs: Sequence[ChangeRecord], streams: Sequence[ChangeRecord]) -> list[ChangeRecord]:
    """All changes with their ranks: confirmed ones at the output alone; those of streams in their order, and after the last
    confirmed one of them the confirmed ones that raise or lower tokens; the other ones.

    Their effects are on three scales, so there is no common order by size.
    """
    confirmed = [record for record in outputs if record.decision == "confirmed"]
    last = max((n for n, record in enumerate(streams, 1) if record.decision == "confirmed"), default=0)
    order = [
        *(record for record in confirmed if record.is_at_output),
        *streams[:last],
        *(record for record in confirmed if not record.is_at_output),
        *streams[last:],
        *(record for record in outputs if record.decision != "confirmed"),
    ]
    return [replace(record, rank=number + 1) for number, record in enumerate(order)]


def _record(run: Stages, held: Outputs, ranked: Ranked, f_N: Tensor, trials: Mapping[str, Trial]) -> ChangeRecord:
    """One change at the output alone that is on somewhere, with its trials."""
    plan, change = run.plan, ranked.change
    bench = output_bench(held, change, f_N, plan.verify, plan.seed)
    by_chance = None
    if ranked.p > plan.rank.level:
        by_chance = "refuted", f"random tunes move as much probability (p = {ranked.p:.2g})"
    outcomes = _outcomes(trials, None if by_chance else bench, "output", plan.verify)
    decision, reason = _decision(run, by_chance, outcomes, trials)
    against = f"95th percentile of the best group of as many tokens in {len(ranked.null)} random tunes"
    score = ranked.score
    measured = [
        Measure(
            "effect on the output",
            ranked.effect.value,
            ranked.effect.low,
            ranked.effect.high,
            "JS nat a token",
            against="what giving its tokens base's probabilities takes away, on held-out text; no control of its own",
        ),
        Measure("tokens on", ranked.share_of_tokens, unit="share", against=f"{ranked.firings} held-out tokens"),
        *(m for outcome in outcomes.values() for m in outcome.measures),
    ]
    null = quantile(ranked.null, 0.95)
    told = Measure("probability moved", score.value, score.low, score.high, "x random tunes", null, against, ranked.p)
    if bench is None:
        return _told(run, change, decision, reason, told, measured, [], f_N)
    on_N = bench.strength_N != 0
    tuned_NU, base_NU = bench.tuned_NU[on_N], bench.base_NU[on_N]
    gain_G = gained(tuned_NU, base_NU, bench.group).mean(0)
    tuned, base = (float(x_NU[:, list(bench.group.numbers)].sum()) for x_NU in (tuned_NU, base_NU))
    order = [i for i in gain_G.argsort(descending=True, stable=True).tolist() if gain_G[i] > 0]
    words = [TokenWeight(bench.group.names[i], bench.group.sign * float(gain_G[i])) for i in order[:20]]
    record = _told(run, change, decision, reason, told, measured, words, f_N)
    return replace(
        record,
        share=tuned / (tuned + base) if tuned + base else 0.5,
        read_by="probability that the token gains from base to tuned, where the change is on" if words else "",
    )


def _silent(run: Stages, held: Outputs, change: Change) -> ChangeRecord:
    """A change at the output alone that is on nowhere in held-out text."""
    group = group_of(change)
    most = max((float(gained(p, q, group).sum(1).max()) for _, p, q in held.parts()), default=0.0)
    who = "tuned" if group.raised else "base"
    reason = f"{who} never says its tokens more: at most {max(most, 0.0):.2g} of the probability at any held-out token"
    score = Measure("probability moved", 0.0, unit="x random tunes", against="it is on nowhere, so nothing was drawn")
    return _told(run, change, "refuted", reason, score, [], [], None)


def _told(
    run: Stages,
    change: Change,
    decision: str,
    reason: str,
    score: Measure,
    measures: list[Measure],
    words: list[TokenWeight],
    f_N: Tensor | None,
) -> ChangeRecord:
    """The record of a change that claims tokens, of this strength at the held-out sample's tokens, if it is on anywhere."""
    raised = group_of(change).raised
    tokenizer, sample = run.pair.tokenizer, run.sample
    return ChangeRecord(
        rank=0,
        id=change.id,
        finder=change.finder,
        sites=[str(site) for site in change.sites] or [OUTPUT],
        share=float("nan"),
        decision=decision,
        reason=reason,
        score=score,
        measures=measures,
        promoted=words if raised else [],
        suppressed=[] if raised else words,
        read_by="",
        contexts=[] if f_N is None else contexts(tokenizer, sample, f_N, run.kl_N),
        depth=None,
        kinds={} if f_N is None else kind_rates(sample, f_N),
        dose=[],
        origin=change.origin,
    )


def _outside(held: Outputs, seed: int) -> list[Measure]:
    """How much probability each model gives to tokens that the other lacks, on held-out text."""
    measures = []
    for own, one, other in ((held.tuned_only, "tuned", "base"), (held.base_only, "base", "tuned")):
        if own.stop == own.start:
            continue
        mass_N = held.sample.scored_N.float() * 0
        for where_N, p_NU, q_NU in held.parts():
            mass_N[where_N] = (p_NU if one == "tuned" else q_NU)[:, own].sum(1)
        scored = held.sample.scored_N
        document_N = held.sample.document_N[scored]
        sums = by_document(mass_N[scored], document_N, sorted(set(document_N.tolist())))
        value: Interval = bootstrap_ratio(sums.nats, sums.tokens, seed=seed)
        measures.append(
            Measure(
                f"probability that {one} gives to tokens that {other} lacks",
                value.value if isfinite(value.value) else None,
                value.low,
                value.high,
                "share a token",
                0.0,
                f"{other}, which has no such tokens; KL is measured on the tokens that both have",
            )
        )
    return measures
