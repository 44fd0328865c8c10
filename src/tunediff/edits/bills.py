"""Bills: what an edit does and what it costs, on held-out text, beside edits of equal energy and plain scaling."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from tunediff.core.chance import bootstrap_ratio, numpy_generator
from tunediff.edits.edit import Edit, EditSettings, scaling
from tunediff.edits.reverting import Inputs, input_moments, random_directions, reverting
from tunediff.harvests.samples import Sample, batches_of
from tunediff.models.divergences import Said, by_document, kl_divergence, parts
from tunediff.models.network import LanguageModel
from tunediff.models.pair import Pair
from tunediff.models.passes import Start
from tunediff.records.change import Change
from tunediff.records.diff import Bill
from tunediff.records.measure import Measure

ROWS_TOKENS = 800
"""Least number of tokens of each sort of held-out text on which a bill is measured."""

RANDOM, ELSEWHERE = "random directions", "the same edit aimed at random text"
"""Names of the two kinds of control edits."""

LEFT = "left as tuned"
"""Name of the measure of how much of the difference of weights an edit does not touch."""

SCALES = (0.5,)
"""Shares of everything fine-tuning changed that plain scaling takes out, as a further comparison."""


def on_rows(sample: Sample, changes: Sequence[Change], spread: bool) -> dict[int, Tensor]:
    """For each row of a sample, which tokens count as on (0 or 1): where any change fires.

    With `spread`, all tokens that follow in the row count too.
    """
    f_N = sum((sample.strength(c).abs() for c in changes), torch.zeros(len(sample.row_N)))
    out = {}
    for row in sample.rows:
        on = (f_N[sample.row_N == row] > 0).float()
        out[row] = (on.cumsum(0) > 0).float() if spread else on
    return out


def inputs(
    pair: Pair,
    changes: Sequence[Change],
    sample: Sample,
    neutral: Sample | None,
    settings: EditSettings,
    seed: int,
    batch_tokens: int = 1200,
    asked: Sample | None = None,
) -> list[dict[str, Inputs]]:
    """Moments of the inputs of every map that fine-tuning touched, by map: for the edit, then for each control.

    Moments are taken on training text, where `changes` are on and elsewhere. A control counts as on what the edit counts
    as on in another row.

    sample    rows to choose from: a share where the changes are on the most, the rest anywhere
    neutral   rows that are all taken and never count as on, so that the edit costs little on such text
    asked     answers that are all taken and count as on from their first token
    """
    strongest = _by_strength(sample, changes)
    rng = numpy_generator(seed, "edit rows")
    others = [sample.rows[i] for i in rng.permutation(len(sample.rows))]
    third = settings.tokens // 3
    rows = _up_to(strongest, third, sample)
    rows += _up_to([r for r in others if r not in set(rows)], third if neutral else settings.tokens - third, sample)
    rows.sort()
    on = on_rows(sample, changes, settings.spread)
    own = [on[row] for row in rows]
    if asked is not None:
        own += [asked.scored_N[asked.row_N == row].float().cpu() for row in asked.rows]
    masks = [own]
    for draw in range(settings.controls):
        order = numpy_generator(seed, "control rows", draw).permutation(len(own)).tolist()
        masks.append([_fit(own[i], len(mask)) for i, mask in zip(order, own)])
    off = {row: torch.zeros(len(sample.tokens.rows[row])) for row in (neutral.rows if neutral else ())}
    every = sorted({*rows, *off})
    of_row = [{**dict(zip(rows, mask)), **off} for mask in masks]
    on_CR = [[some[row] for row in every] + mask[len(rows) :] for some, mask in zip(of_row, masks)]
    tokens = sample.tokens.only(every)
    if asked is not None:
        tokens = tokens.then(asked.tokens.only(asked.rows))
    return input_moments(pair.tuned, pair.deltas(), tokens, on_CR, batch_tokens)


def removing(
    pair: Pair, ids: Sequence[str], moments: Sequence[dict[str, Inputs]], settings: EditSettings, seed: int
) -> tuple[Edit, list[Edit]]:
    """The edit that takes out the changes with these ids, and its controls of equal energy.

    moments   what `inputs` returned for these changes
    Controls are random directions, then the same edit aimed at random rows.
    """
    edit = reverting(pair, "revert", ids, moments[0], settings)
    controls = [
        random_directions(pair, f"{RANDOM} {draw}", moments[0], edit, seed) for draw in range(settings.controls)
    ]
    controls += [
        reverting(pair, f"{ELSEWHERE} {draw}", edit.changes, other, settings, energy_of=edit)
        for draw, other in enumerate(moments[1:])
    ]
    return edit, controls


def _by_strength(sample: Sample, changes: Sequence[Change]) -> list[int]:
    """Rows on which the changes are on at all, those with the most energy first."""
    f_N = sum(
        (sample.strength(c).double().pow(2) for c in changes), torch.zeros(len(sample.row_N), dtype=torch.float64)
    )
    energy = {row: float(f_N[sample.row_N == row].sum()) for row in sample.rows}
    return [row for row in sorted(sample.rows, key=lambda r: (-energy[r], r)) if energy[row] > 0]


def _up_to(rows: list[int], limit: int, sample: Sample) -> list[int]:
    chosen, count = [], 0
    for row in rows:
        if count >= limit:
            break
        chosen.append(row)
        count += len(sample.tokens.rows[row])
    return chosen


def _fit(mask: Tensor, length: int) -> Tensor:
    return torch.cat([mask, mask[-1:].expand(max(0, length - len(mask)))])[:length]


def bill(
    pair: Pair,
    edit: Edit,
    controls: Sequence[Edit],
    changes: Sequence[Change],
    contrastive: Sample,
    neutral: Sample,
    settings: EditSettings,
    seed: int,
    batch_tokens: int = 1200,
) -> Bill:
    """What the edit does on held-out text, beside its controls and plain scaling.

    removed   share of KL(tuned || base) that is gone, on tokens where the changes are on
    kept      share of KL(tuned || base) that is left, on contrastive rows where the changes are never on
    cost      KL(tuned || edited), nat a token, on neutral text

    Besides, `LEFT` says how much of the difference of weights the edit does not touch. Raises `ArtifactError` where an edit
    belongs to another model.
    """
    on = on_rows(contrastive, changes, settings.spread)
    strongest = _by_strength(contrastive, changes)
    target = {row: on[row].bool() for row in _up_to([r for r in strongest if on[r].any()], ROWS_TOKENS, contrastive)}
    rest = {
        row: torch.ones_like(on[row]).bool()
        for row in _up_to([r for r in contrastive.rows if not on[r].any()], ROWS_TOKENS, contrastive)
    }
    plain = {row: torch.ones(len(neutral.tokens.rows[row]), dtype=torch.bool) for row in neutral.rows}
    sides = {"edit": edit.applied(pair.tuned)}
    sides |= {c.name: c.applied(pair.tuned) for c in controls}
    sides |= {f"scale {s}": scaling(pair, s).applied(pair.tuned) for s in SCALES}
    measures: list[Measure] = []
    table: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for name, sample, masks in (
        ("removed", contrastive, target),
        ("kept", contrastive, rest),
        ("cost", neutral, plain),
    ):
        if masks:
            table[name] = _divergences(pair, sides, sample, masks, name, batch_tokens)
    for name, unit, of in (
        ("removed", "share of KL", max),
        ("kept", "share of KL", fmean),
        ("cost", "nat a token", fmean),
    ):
        if name not in table:
            measures.append(Measure(name, None, unit=unit, against="no such text in the held-out part"))
            continue
        own = bootstrap_ratio(*table[name]["edit"], seed=seed)
        values = {c.name: bootstrap_ratio(*table[name][c.name], seed=seed, draws=2).value for c in controls}
        random, elsewhere = ([v for c, v in values.items() if c.startswith(kind)] for kind in (RANDOM, ELSEWHERE))
        kind = "largest" if of is max else "mean"
        measures.append(
            Measure(
                name,
                own.value,
                own.low,
                own.high,
                unit,
                of(random) if random else None,
                f"{RANDOM} of equal energy, {kind} of {len(random)}",
            )
        )
        if elsewhere:
            measures.append(
                Measure(
                    f"{name}, {ELSEWHERE}",
                    of(elsewhere),
                    unit=unit,
                    against=f"a control of its own, harder than {RANDOM}; equal energy, {kind} of {len(elsewhere)}",
                )
            )
    for share in SCALES:
        for name in table:
            value = bootstrap_ratio(*table[name][f"scale {share}"], seed=seed)
            unit = "nat a token" if name == "cost" else "share of KL"
            measures.append(
                Measure(
                    f"{name}, scaling the whole tune to {1 - share:g}",
                    value.value,
                    value.low,
                    value.high,
                    unit,
                    None,
                    "the edit anybody can make",
                )
            )
    return Bill(edit.name, edit.operation, list(edit.changes), [*measures, left_as_tuned(pair, edit)])


def left_as_tuned(pair: Pair, edit: Edit) -> Measure:
    """The share of the difference of weights that an edit leaves as it is, and in which kinds of parameters that is."""
    edited = edit.parameters(pair.tuned)
    left: dict[str, float] = {}
    for delta in pair.deltas():
        left[delta.kind] = left.get(delta.kind, 0.0) + (0.0 if delta.parameter in edited else delta.relative)
    whole = sum(delta.relative for delta in pair.deltas())
    kinds = ", ".join(f"{kind} {size / whole:.0%}" for kind, size in left.items() if size)
    value = sum(left.values()) / whole if whole else 0.0
    against = (
        f"of no linear map, or of maps whose inputs were not seen: {kinds}" if kinds else "every parameter was edited"
    )
    return Measure(LEFT, value, unit="share of the difference of weights", against=against)


def costs(pair: Pair, edits: Sequence[Edit], neutral: Sample, batch_tokens: int = 1200) -> list[float]:
    """KL(tuned || edited), nat a token, on neutral text, for each edit."""
    masks = {row: torch.ones(len(neutral.tokens.rows[row]), dtype=torch.bool) for row in neutral.rows}
    sides = {str(number): edit.applied(pair.tuned) for number, edit in enumerate(edits)}
    table = _divergences(pair, sides, neutral, masks, "cost", batch_tokens)
    return [sum(nats) / sum(tokens) for nats, tokens in table.values()]


def _divergences(
    pair: Pair, sides: dict[str, LanguageModel], sample: Sample, masks: dict[int, Tensor], name: str, batch_tokens: int
) -> dict[str, tuple[list[float], list[float]]]:
    """For each edited model, numerators and denominators by document of the measure `name`."""
    top: dict[str, dict[int, float]] = {side: {} for side in sides}
    bottom: dict[int, float] = {}
    for batch in batches_of(sample.tokens, sorted(masks), batch_tokens):
        chosen = torch.zeros_like(batch.mask_BT)
        for b, row in enumerate(batch.rows_B.tolist()):
            chosen[b, : len(masks[row])] = masks[row]
        document_N = torch.tensor([sample.tokens.document_R[r] for r in batch.rows_B.tolist()])[:, None].expand_as(
            chosen
        )[chosen]
        documents = sorted(set(document_N.tolist()))

        start = pair.common_start(batch.ids_BT, wanted_BT=chosen)  # edits only touch what tuning touched

        def said(model: LanguageModel, start: Start | None = start) -> Said:
            return Said.at(model, batch.ids_BT, chosen, pair.vocabulary, start)

        base_start, tuned_start = sample.starts(batch)
        base, tuned = said(pair.base, base_start or start), said(pair.tuned, tuned_start or start)
        edited = [said(model) for model in sides.values()]
        whole_N, kl_N = torch.zeros(len(document_N)), {side: torch.zeros(len(document_N)) for side in sides}
        for part in parts(base):
            q, p = base.part(part).logp(), tuned.part(part).logp()
            whole_N[part] = kl_divergence(p, q)
            for side, other in zip(sides, edited):
                kl_N[side][part] = (
                    kl_divergence(other.part(part), q) if name == "removed" else kl_divergence(p, other.part(part))
                )
        whole = by_document(whole_N, document_N, documents)
        for place, document in enumerate(documents):
            bottom[document] = bottom.get(document, 0.0) + (
                whole.tokens[place] if name == "cost" else whole.nats[place]
            )
        for side in sides:
            found = by_document(kl_N[side], document_N, documents)
            for place, document in enumerate(documents):
                value = found.nats[place] if name == "cost" else whole.nats[place] - found.nats[place]
                top[side][document] = top[side].get(document, 0.0) + value
    order = sorted(bottom)
    return {side: ([top[side][d] for d in order], [bottom[d] for d in order]) for side in sides}
