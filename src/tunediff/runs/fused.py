"""The findings of a run: its confirmed changes and the questions that its search found, put together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunediff.changes.carrying import carried
from tunediff.changes.fusing import fused
from tunediff.changes.trial_bench import spreads
from tunediff.harvests.harvest import harvest
from tunediff.harvests.samples import Sample
from tunediff.records.change import Change
from tunediff.records.finding import Finding
from tunediff.records.measure import Measure

if TYPE_CHECKING:
    from tunediff.runs.stages import Stages


def findings(run: Stages) -> list[Finding]:
    """What was found, told once: `Diff.findings`."""
    confirmed = [record for record in run.verdicts if record.decision == "confirmed"]
    conditions = run.elicited.conditions

    def make(_: object) -> list[Finding]:
        if not confirmed and not conditions:
            return []
        sample = run.sample
        ids = {record.id for record in confirmed}
        mine = [change for change in run.in_streams.values() if change.id in ids]
        strengths = {change.id: (sample.strength(change).abs() * sample.scored_N).cpu() for change in mine}
        shares = _carried(run, mine)
        return fused(
            confirmed,
            strengths,
            sample.tokens.documents,
            sample.document_N.cpu(),
            conditions,
            run.elicited.documents,
            shares,
            [d.text or d.messages[-1][1] for d in run.tokens.documents if d.writer in ("", "base")],
        )

    told = [(record.id, [token.token for token in record.promoted]) for record in confirmed]
    place = run.keeper.at("findings", run.harvest.fingerprint, run.found_key, told, run.elicited_key, run.plan.seed)
    kept: list[Finding] = run.keeper.kept_json(
        place, list[Finding], "findings.json", make, lambda found: f"{len(found)} findings"
    )
    return kept


def asked(run: Stages) -> Sample | None:
    """Tuned's answers to the questions that the search found, with both models' streams; None where it found none."""
    answers = [document for document in run.elicited.documents if document.writer == "tuned"]
    if not answers:
        return None
    tokens = run.answer_rows(answers)
    place = run.keeper.at("asked", run._models, tokens.fingerprint, list(map(str, run.sites)), run.plan.harvest)
    streams = harvest(run.pair, tokens, run.sites, place.folder, run.plan.harvest)
    return Sample.of(streams, tokens, range(len(tokens.rows)))


def _carried(run: Stages, changes: list[Change]) -> dict[str, dict[str, Measure]]:
    """What each change carries of each condition, on tuned's answers to questions that chose nothing."""
    if not changes or run.asked is None:
        return {}
    tokens = run.asked.tokens
    held_out = run.asked.only([row for row in run.asked.rows if tokens.held_out[tokens.document_R[row]]])
    return carried(run.pair, changes, held_out, spreads(run.harvest), run.plan.seed)
