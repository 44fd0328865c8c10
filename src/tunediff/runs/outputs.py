"""The output side of a run: changes that claim tokens, found, ranked, tried and told in a stage of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from tunediff.changes.examples import contexts, kind_rates
from tunediff.changes.output_bench import OutputBench, output_bench
from tunediff.changes.outputs import Outputs, gained, rank_outputs
from tunediff.changes.rankings import Ranked
from tunediff.changes.trials.base import Trial
from tunediff.changes.verdicts import decision_of
from tunediff.core.artifacts import read_json, write_json
from tunediff.core.chance import Interval, bootstrap_ratio, quantile
from tunediff.core.typed import typed
from tunediff.models.divergences import by_document
from tunediff.records.change import Change, save_changes
from tunediff.records.diff import OUTPUT, ChangeRecord, load_records
from tunediff.records.measure import Measure, TokenWeight

if TYPE_CHECKING:
    from tunediff.runs.stages import Stages


@dataclass(frozen=True)
class OutputSide:
    """What a run found at the output.

    records    changes that claim tokens, with their trials; their ranks are not given yet
    measures   how much probability lies on tokens that only one model has
    """

    records: list[ChangeRecord]
    measures: list[Measure]


def output_side(run: Stages) -> OutputSide:
    """What is found at the output of a pair whose vocabularies differ, or whose streams are equal; else nothing."""
    plan, vocabularies = run.plan, run.pair.vocabularies
    if not (vocabularies.differ or run.scan.equal):
        return OutputSide([], [])
    finders, trials = plan.output_finders(), plan.output_trials()

    def make(folder: Path) -> list[str]:
        train, held = (Outputs(run.pair, sample, plan.rank.batch_tokens) for sample in (run.train, run.sample))
        view = run.view(folder, "find", train)
        changes = [change for finder in finders.values() for change in finder.find(view).changes]
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
        records += [_silent(run, held, changes[k]) for k in range(len(changes)) if k not in on]
        write_json(folder / "records.json", records)
        write_json(folder / "measures.json", _outside(held, plan.seed))
        return ["records.json", "measures.json", *save_changes(folder, changes)]

    def read(folder: Path) -> OutputSide:
        measures = typed(list[Measure], read_json(folder / "measures.json"), "measures.json")
        return OutputSide(load_records(folder / "records.json"), measures)

    named = [plan.find.output_finders, plan.rank, plan.verify, plan.seed, vocabularies.notes]
    place = run.keeper.at(
        "outputs", run.harvest.fingerprint, run.written, *named, *run._code([*finders.values(), *trials.values()])
    )
    return run.keeper.kept(place, make, read, lambda side: f"{len(side.records)} changes at the output")


def in_one_ranking(outputs: Sequence[ChangeRecord], streams: Sequence[ChangeRecord]) -> list[ChangeRecord]:
    """All changes with their ranks: confirmed ones at the output, those of streams in their order, the other ones.

    Effects at the output and in streams are on two scales, so there is no common order by size.
    """
    first = [record for record in outputs if record.decision == "confirmed"]
    last = [record for record in outputs if record.decision != "confirmed"]
    return [replace(record, rank=number + 1) for number, record in enumerate([*first, *streams, *last])]


def _record(run: Stages, held: Outputs, ranked: Ranked, f_N: Tensor, trials: Mapping[str, Trial]) -> ChangeRecord:
    """One change at the output that is on somewhere, with its trials."""
    plan, change = run.plan, ranked.change
    bench = output_bench(held, change, f_N, plan.verify, plan.seed)
    stands = ranked.p <= plan.rank.level
    outcomes = {name: trial.run(bench, plan.verify) for name, trial in trials.items() if bench and stands}
    decision, reason = decision_of(trials, outcomes)
    if not stands:
        decision, reason = "refuted", f"random tunes move as much probability (p = {ranked.p:.2g})"
    elif run.ranking.refusal:
        decision, reason = "undecided", run.ranking.refusal
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
    return _told(run, change, decision, reason, told, measured, bench, f_N)


def _silent(run: Stages, held: Outputs, change: Change) -> ChangeRecord:
    """A change at the output that is on nowhere in held-out text."""
    group = change.group
    assert group is not None
    most = max((float(gained(p, q, group).sum(1).max()) for _, p, q in held.parts()), default=0.0)
    who = "tuned" if group.raised else "base"
    reason = f"{who} never says its tokens more: at most {max(most, 0.0):.2g} of the probability at any held-out token"
    score = Measure("probability moved", 0.0, unit="x random tunes", against="it is on nowhere, so nothing was drawn")
    return _told(run, change, "refuted", reason, score, [], None, held.sample.scored_N.new_zeros(()).float())


def _told(
    run: Stages,
    change: Change,
    decision: str,
    reason: str,
    score: Measure,
    measures: list[Measure],
    bench: OutputBench | None,
    f_N: Tensor,
) -> ChangeRecord:
    """The record of a change at the output; without a bench it is on nowhere."""
    words: list[TokenWeight] = []
    share = float("nan")
    if bench is not None:
        on_N = bench.strength_N != 0
        tuned_NU, base_NU = bench.tuned_NU[on_N], bench.base_NU[on_N]
        gain_G = gained(tuned_NU, base_NU, bench.group).mean(0)
        tuned, base = (float(x_NU[:, list(bench.group.numbers)].sum()) for x_NU in (tuned_NU, base_NU))
        share = tuned / (tuned + base) if tuned + base else 0.5
        order = [i for i in gain_G.argsort(descending=True, stable=True).tolist() if gain_G[i] > 0]
        sign = 1 if bench.group.raised else -1
        words = [TokenWeight(bench.group.names[i], sign * float(gain_G[i])) for i in order[:20]]
    raised = change.group is not None and change.group.raised
    tokenizer, sample = run.pair.tokenizer, run.sample
    return ChangeRecord(
        rank=0,
        id=change.id,
        finder=change.finder,
        sites=[OUTPUT],
        share=share,
        decision=decision,
        reason=reason,
        score=score,
        measures=measures,
        promoted=words if raised else [],
        suppressed=[] if raised else words,
        read_by="probability that the token gains from base to tuned, where the change is on" if words else "",
        contexts=contexts(tokenizer, sample, f_N, run.kl_N) if bench else [],
        depth=None,
        kinds=kind_rates(sample, f_N) if bench else {},
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
