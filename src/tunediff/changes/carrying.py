"""Carrying: how much of the divergence of elicited answers each change accounts for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from tunediff.changes.trial_bench import Spread, trial_bench
from tunediff.changes.trials.base import VerifySettings
from tunediff.core.axes import TUNED
from tunediff.core.chance import bootstrap_ratio
from tunediff.harvests.samples import Sample
from tunediff.models.divergences import Said, by_document, kl_divergence
from tunediff.models.pair import Pair
from tunediff.records.change import Change
from tunediff.records.measure import Measure
from tunediff.records.site import Site

CONTROLS = 4
"""Number of random directions that each change is held against."""
BATCH_TOKENS = 2048


def carried(
    pair: Pair, changes: Sequence[Change], sample: Sample, spread: Mapping[Site, Spread], seed: int
) -> dict[str, dict[str, Measure]]:
    """Share of the divergence of answers that taking each change out of tuned closes, by condition and change.

    sample   tuned's answers to elicited questions that chose nothing, `Document.condition` naming each one's condition
    spread   of the difference at the changes' sites, from which random directions are drawn

    The share is 1 - KL(tuned without the change || base) / KL(tuned || base), over all tokens of a condition's answers; 0
    where the change is on nowhere. Changes without sites are left out: nothing of theirs can be taken out of a stream.
    """
    of: dict[str, list[int]] = {}
    for document in sorted(set(sample.document_N.tolist())):
        of.setdefault(sample.tokens.documents[document].condition, []).append(document)
    gaps = _gaps(pair, sample)
    settings = VerifySettings(documents=len(gaps), tokens=len(sample.row_N), scored=len(sample.row_N), draws=CONTROLS)
    found: dict[str, dict[str, Measure]] = {condition: {} for condition in of}
    for change in (c for c in changes if c.sites):
        bench = trial_bench(pair, change, [], sample, spread[change.sites[-1]], settings, seed)
        closed: list[dict[int, float]] = [{}]
        if bench is not None:
            tuned_BTD = bench.streams_BTMD[:, :, TUNED]
            streams = (tuned_BTD - added_BTD for added_BTD in (bench.written_BTD, *bench.controls()))
            closed = []
            for after_N in bench.to_base(pair.tuned, streams):
                sums = by_document(bench.gap_N - after_N, bench.document_N, bench.documents)
                closed.append(dict(zip(bench.documents, sums.nats)))
        for condition, mine in of.items():
            gap = [gaps[d] for d in mine]
            own, *others = (bootstrap_ratio([one.get(d, 0.0) for d in mine], gap, seed=seed) for one in closed)
            found[condition][change.id] = Measure(
                "share of the divergence that it carries",
                own.value,
                own.low,
                own.high,
                "share of KL",
                max((other.value for other in others), default=0.0),
                f"random directions of equal energy, largest of {CONTROLS}" if others else "it is on nowhere there",
            )
    return found


def _gaps(pair: Pair, sample: Sample) -> dict[int, float]:
    """KL(tuned || base) in nat, summed over each document's answer."""
    gaps: dict[int, float] = {}
    for batch in sample.batches(BATCH_TOKENS):
        wanted_BT = sample.scored_N[sample.places(batch).clamp_min(0)] & batch.mask_BT
        sides = zip((pair.base, pair.tuned), sample.starts(batch))
        base, tuned = (Said.at(model, batch.ids_BT, wanted_BT, pair.vocabulary, start) for model, start in sides)
        kl_BT = torch.zeros(wanted_BT.shape)
        kl_BT[wanted_BT] = kl_divergence(tuned, base).cpu()
        for row, nats in zip(batch.rows_B.tolist(), kl_BT.sum(1).tolist()):
            document = sample.tokens.document_R[row]
            gaps[document] = gaps.get(document, 0.0) + nats
    return gaps
