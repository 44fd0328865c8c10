"""Findings: what a run's stages hold as one record, and what was found in plain sentences."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunediff import __version__
from tunediff.changes.calibrations import AS_A_PLACEBO, Calibration
from tunediff.core.artifacts import plain
from tunediff.core.axes import MODELS, WRITERS
from tunediff.core.chance import bootstrap_ratio
from tunediff.core.text import number, visible
from tunediff.core.typed import typed
from tunediff.records.diff import Bill, ChangeRecord, CorpusCard, Diff, FitCard, ModelCard, NullCard, TemplateCard
from tunediff.records.elicited import Condition
from tunediff.records.finding import Finding
from tunediff.records.measure import Measure
from tunediff.records.profile import Profile
from tunediff.reports.sentences import apart, asked_for, example, shown_by, title
from tunediff.runs.plan import Plan, to_record

if TYPE_CHECKING:
    from tunediff.runs.stages import Stages

TOLD = 3
"""Findings that the summary tells."""
SHIPPED_NAMES = {"default": "SmolLM2-135M-Instruct", "demo": "two-objectives (demo)"}
"""Names that reports give the shipped models, by their names in plans."""


def collected(run: Stages, billed: Sequence[Bill] = ()) -> Diff:
    """Collect the results of a run's stages and the given bills as one record."""
    scan, records, signals, output = run.scan, run.verdicts, run.signals, _output(run)
    confirmed = [r for r in records if r.decision == "confirmed"]
    said = _summary(records, confirmed, output, run.plan.rank.level, run.calibration, run.ranking.refusal)
    diff = Diff(
        base=_card(run, "base"),
        tuned=_card(run, "tuned"),
        corpus=_corpus(run),
        found=bool(confirmed),
        rate=run.plan.rank.level,
        summary=[*said[:1], *_told(run.findings, run.elicited.conditions, records), *said[1:]],
        output=[*output, *run.output_side.measures],
        scan=scan,
        changes=records,
        signals=signals,
        fits=_fits(run),
        nulls=_nulls(run),
        bills=list(billed),
        not_found=_not_found(records, run),
        stages=list(run.cards),
        plan=to_record(run.plan),
        version=__version__,
        weights=run.ranking.weights,
        refusal=run.ranking.refusal,
        relation=run.pair.relation,
        template=_template(run),
        elicited=run.elicited.conditions,
        findings=run.findings,
    )
    found: Diff = typed(Diff, plain(diff), "diff.json")  # as saved: unbounded intervals are none, in every report alike
    return found


def _nulls(run: Stages) -> list[NullCard]:
    ranked, calibration = run.ranking.ranked, run.calibration
    nulls = [
        NullCard(
            "random tunes",
            "base plus, in every parameter the tune touched, a random change of the same norm (in maps also of the same "
            "rank); the score of the best of all candidates in each",
            list(ranked[0].null) if ranked else [],
        )
    ]
    if calibration:
        names = ", ".join(sorted({null.name for null in calibration.nulls}))
        nulls.append(
            NullCard(
                "calibration",
                f"pairs of this base with nothing to find ({names}); the best score in each. A change "
                f"is claimed above {calibration.score:.3g}, where the models are more than "
                f"{calibration.gap:.2g} nat apart",
                [null.score for null in calibration.nulls],
            )
        )
    return nulls


def _corpus(run: Stages) -> CorpusCard:
    tokens = run.tokens
    documents = set(tokens.document_R)
    held = sum(tokens.held_out[d] for d in documents)
    return CorpusCard(
        tokens.fingerprint,
        len(documents),
        tokens.count,
        held,
        tokens.select("held_out").count,
        tokens.counts,
        [*run.corpus.remarks, *tokens.remarks],
        [*run.prompts.remarks, *run.answers.remarks, *run.elicited.remarks] if run.plan.contrast.prompts else [],
    )


def _template(run: Stages) -> TemplateCard:
    template, pair = run.template, run.pair
    return TemplateCard(
        template.origin,
        template.fingerprint,
        template.date if template.is_dated else "",
        dict(run.plan.pair.template_options),
        "base" if pair.tokenizer is pair.base.tokenizer else "tuned",
    )


def _output(run: Stages) -> list[Measure]:
    """KL(tuned || base) a token of the held-out sample, by who wrote the text."""
    kl_N = run.kl_N
    measures = []
    documents = run.sample.document_N
    # What a search elicited is the text where the models differ the most; it would hide how far apart they are elsewhere.
    read = {d: run.tokens.documents[d] for d in set(documents.tolist())}
    writers = {d: document.writer or document.kind for d, document in read.items() if not document.condition}
    for writer in sorted(set(writers.values())):
        mine = [d for d in sorted(writers) if writers[d] == writer]
        nats = [float(kl_N[documents == d].double().sum()) for d in mine]
        counts = [int((documents == d).sum()) for d in mine]
        value = bootstrap_ratio(nats, counts, seed=run.plan.seed)
        text = f"text by {writer}" if writer in MODELS else f"{writer} text" if writer in WRITERS else writer
        noise = max(run.scan.noise, default=0.0)
        measures.append(
            Measure(
                f"KL(tuned || base), {text}",
                value.value,
                value.low,
                value.high,
                "nat a token",
                0.0,
                f"base against itself; streams' noise floor {number(noise)} of their size",
            )
        )
    return measures


def _card(run: Stages, side: str) -> ModelCard:
    model = getattr(run.pair, side)
    name = model_names(run.plan)[side]
    parameters = sum(p.numel() for n, p in model.network.named_parameters() if side == "tuned" or "lora_" not in n)
    kind = "LoRA over base" if side == "tuned" and run.pair.shared else type(model.network).__name__
    return ModelCard(
        name, getattr(run.pair, f"{side}_fingerprint"), kind, parameters, model.depth, model.width, model.vocabulary
    )


def model_names(plan: Plan) -> dict[str, str]:
    """What reports call the models of a plan: paths without the folders that both are in, else the plan's own names."""
    names = {side: getattr(plan, side) for side in MODELS}
    paths = [name for name in names.values() if os.path.isabs(name)]
    shared = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    return {
        side: os.path.relpath(name, shared) if name in paths else SHIPPED_NAMES.get(name, name)
        for side, name in names.items()
    }


def _fits(run: Stages) -> list[FitCard]:
    cards = []
    for name, fitted in run.fits.items():
        q = fitted.quality
        none = "one number of one fit"
        measures = [
            Measure(
                "EV base, held-out", q.ev_base, unit="share of variance", control=0.0, against="predicting the mean"
            ),
            Measure(
                "EV tuned, held-out", q.ev_tuned, unit="share of variance", control=0.0, against="predicting the mean"
            ),
            Measure(
                "EV of the difference, held-out",
                q.ev_delta,
                unit="share of variance",
                control=0.0,
                against="predicting the mean",
            ),
            Measure(
                "L0 at inference", q.l0_inference, unit="latents a token", control=q.l0_training, against="in training"
            ),
            Measure("dead latents", q.dead_share, unit="share", against=none),
        ]
        cards.append(
            FitCard(
                f"{name}: {fitted.dictionary.spec.variant}",
                {**dataclasses.asdict(fitted.dictionary.spec), "seed": fitted.seed},
                Profile.of_rows("Training curve", fitted.curve, "step", "fit") if fitted.curve else None,
                measures,
            )
        )
    return cards


def _summary(
    records: list[ChangeRecord],
    confirmed: list[ChangeRecord],
    output: list[Measure],
    rate: float,
    calibration: Calibration | None,
    refusal: str,
) -> list[str]:
    """The finding in plain, neutral sentences."""
    said = []
    if refusal and not confirmed:
        said.append(f"No change could be confirmed: {refusal}.")
    elif not confirmed:
        said.append(
            f"No change was confirmed at a false-positive rate of {rate:.0%}. That is not a proof that there is none: "
            "the last section lists what was looked at."
        )
    else:
        said.append(
            f"{len(confirmed)} of {len(records)} candidate changes "
            f"{'was' if len(confirmed) == 1 else 'were'} confirmed: {'it stands' if len(confirmed) == 1 else 'they stand'} "
            f"out from random tunes of the same size at a rate of {rate:.0%}, and intervening on "
            f"{'it' if len(confirmed) == 1 else 'each'} moves the output as claimed, in both directions."
        )
        if calibration and calibration.gap and all(record.gap for record in confirmed):
            said[-1] += (
                f" The models are further apart there than training on nothing makes them ({calibration.gap:.2g} nat a token)."
            )
    for measure in output:
        if "by tuned" in measure.name or len(output) == 1:
            said.append(f"{measure.name}: {measure.value:.3g} nat a token.")
    return said


def _told(findings: Sequence[Finding], conditions: Sequence[Condition], records: Sequence[ChangeRecord]) -> list[str]:
    """Findings in plain sentences: one question with tuned's answer to it, where there is one, and how its best-tested
    change was proven."""
    known, said = {condition.asked: condition for condition in conditions}, []
    reasons = {record.id: record.reason for record in records}
    for place, finding in enumerate(findings[:TOLD], start=1):
        answer = example(finding, known)
        parts = [f"Finding {place}: tuned {title(finding)}", asked_for(finding, known), apart(finding, known)]
        parts += [f"to {answer.question!r} it says {answer.tuned!r}" if answer else "", shown_by(finding)]
        parts += [f"for {id}, {reasons[id]}" for id in finding.members[:1] if id in reasons]
        said.append(visible("; ".join(filter(None, parts))) + ".")
    if len(findings) > TOLD:
        said.append(f"Findings from {TOLD + 1} on follow below.")
    return said


def _not_found(records: list[ChangeRecord], run: Stages) -> list[str]:
    """What was searched without a finding, and what the run could not detect."""
    plan = run.plan
    counts = {d: sum(r.decision == d for r in records) for d in ("refuted", "undecided")}
    said = [
        f"{counts['refuted']} candidates do no more than random tunes or random directions of the same size; "
        f"{counts['undecided']} were not decided, {sum(not r.measures or 'not put on trial' in r.reason for r in records)} of "
        f"them for want of a trial (verify.changes = {plan.verify.changes}).",
        f"Only streams at {', '.join(str(s) for s in run.sites)} were read; the ceiling row of each trial says how much of the "
        "difference can be seen from there.",
        "A behavior whose trigger does not occur in the text leaves no trace in streams: "
        f"{run.tokens.count:,} tokens were read, {sum(d.kind == 'contrastive' for d in run.tokens.documents)} of the documents "
        "were written by the two models.",
    ]
    if run.elicited.asked and not run.elicited.conditions:
        said.append(
            f"{run.elicited.asked} questions were searched for one that tells the models apart. None does so "
            f"{plan.elicit.least:g} times as much as everyday questions do."
        )
    if run.scan.equal:
        said.append(
            "Both models' streams are equal at every site that was read, up to the last block. What differs, if anything, lies "
            "after it, in the final norm or the unembedding; only changes at the output were looked for."
        )
    if output := [r.id for r in records if r.is_at_output and r.decision == "confirmed"]:
        said.append(f"{', '.join(output)} claims tokens and no direction in a stream: revert does not take it out.")
    if like := sum(r.reason.startswith(AS_A_PLACEBO) for r in records):
        said.append(f"{like} of the undecided pass every trial, but are no more than what training on nothing does.")
    if not (run.calibration and run.calibration.gap):
        said.append(
            "No placebo of this base was measured, so what any tune by the same recipe shares may be among what is confirmed "
            "(tunediff calibrate)."
        )
    return said
