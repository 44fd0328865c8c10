"""Examples: where a change is on, and which tokens it makes more and less likely, as a report shows them."""

from __future__ import annotations

from torch import Tensor

from tunediff.changes.trial_bench import TrialBench
from tunediff.core.axes import TUNED
from tunediff.harvests.lenses import Lens
from tunediff.harvests.samples import Sample
from tunediff.models.network import LanguageModel
from tunediff.records.change import Change
from tunediff.records.measure import Context, TokenWeight

WINDOW = 48
"""Tokens of a context: those up to and after the strongest firing."""

RARE = 0.05
"""Expected occurrences, in all, that are added to both counts of a token before they are compared."""


def contexts(tokenizer, sample: Sample, change: Change, kl_N: Tensor, count: int = 6) -> list[Context]:
    """The rows on which the change is on the most, one a document, strongest first; a window around the peak."""
    f_N = sample.strength(change)
    best: dict[int, tuple[float, int]] = {}
    for row in sample.rows:
        where = sample.row_N == row
        value = float(f_N[where].abs().sum())
        document = sample.tokens.document_R[row]
        if value > best.get(document, (0.0, 0))[0]:
            best[document] = (value, row)
    shown = []
    for _, row in sorted(best.values(), reverse=True)[:count]:
        where = (sample.row_N == row).nonzero()[:, 0]
        peak = int(f_N[where].abs().argmax())
        start = max(0, min(peak - WINDOW // 2, len(where) - WINDOW))
        window = where[start : start + WINDOW]
        ids = sample.tokens.rows[row][start : start + WINDOW]
        document = sample.tokens.documents[sample.tokens.document_R[row]]
        shown.append(
            Context(
                document.id,
                document.kind,
                document.writer,
                [tokenizer.decode([i]) for i in ids],
                [round(v, 4) for v in f_N[window].tolist()],
                [round(v, 4) for v in kl_N[window].tolist()],
            )
        )
    return shown


def caused_tokens(tokenizer, bench: TrialBench, count: int = 20) -> tuple[list[TokenWeight], list[TokenWeight]]:
    """Tokens that tuned says more and less of because of the change, by their keyness (Dunning 1993, G^2 / 2) in nat: how
    often each is to be expected at the scored tokens with the change, O, against without it, E, taken out at its site.

    O log(O / E) - (O - E) puts a word that goes from almost never to sometimes before a filler that goes from often to a
    little more often, which O - E alone does not. Both have `RARE` occurrences added, so that what is never said stays out.
    """
    taken = bench.logp(bench.pair.tuned, bench.streams_BTMD[:, :, TUNED] - bench.written_BTD)
    with_V, without_V = (logp_NV.double().exp().sum(0) + RARE for logp_NV in (bench.tuned_logp, taken))
    more_V = with_V - without_V
    gained_V = ((with_V * (with_V / without_V).log() - more_V) * more_V.sign()).float()
    return _named(tokenizer, gained_V, count)


def lens_tokens(
    tokenizer, model: LanguageModel, lens: Lens, change: Change, count: int = 20
) -> tuple[list[TokenWeight], list[TokenWeight]]:
    """Tokens that the change's write direction promotes and suppresses by the tuned lens (cosines)."""
    site = change.sites[-1]
    top, bottom = lens.read(model, site, change.difference_SD[-1], count)
    return tuple([TokenWeight(tokenizer.decode([i]), w) for i, w in side] for side in (top, bottom))


def kind_rates(sample: Sample, change: Change) -> dict[str, float]:
    """For each kind of text, with contrastive text apart by writer, the share of its tokens on which the change is on."""
    f_N = sample.strength(change) != 0
    seen: dict[str, list[int]] = {}
    for document, on in zip(sample.document_N.tolist(), f_N.tolist()):
        d = sample.tokens.documents[document]
        tally = seen.setdefault(f"{d.kind} by {d.writer}" if d.writer else d.kind, [0, 0])
        tally[0] += on
        tally[1] += 1
    return {kind: on / count for kind, (on, count) in sorted(seen.items())}


def _named(tokenizer, weight_V: Tensor, count: int) -> tuple[list[TokenWeight], list[TokenWeight]]:
    sides = []
    for sign in (1, -1):
        top = (sign * weight_V).topk(count)
        sides.append(
            [
                TokenWeight(tokenizer.decode([i]), sign * w)
                for i, w in zip(top.indices.tolist(), top.values.tolist())
                if w > 1e-4
            ]
        )
    return sides[0], sides[1]
