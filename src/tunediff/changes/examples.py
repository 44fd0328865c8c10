"""Examples for reports: contexts in which a change is on, and the tokens that it makes more or less likely."""

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
"""Number of tokens in a context, around the change's largest strength."""

RARE = 0.05
"""Pseudo-count added to both expected counts of a token before they are compared."""


def contexts(tokenizer, sample: Sample, f_N: Tensor, kl_N: Tensor, count: int = 6) -> list[Context]:
    """Excerpts of the rows with a change's largest strengths, one a document, strongest first, centered on the peak."""
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
    """Tokens that the change makes more and less likely, by keyness in nat (Dunning 1993, G^2/2).

    O is a token's expected count at the scored positions; E is the same with the change removed at its site. Keyness is
    O log(O / E) - (O - E). It ranks a word that goes from almost never to sometimes above a common word that becomes a
    little more frequent; O - E alone does not. `RARE` is added to both counts, so tokens that stay improbable rank low.
    """
    taken = bench.logp(bench.pair.tuned, bench.streams_BTMD[:, :, TUNED] - bench.written_BTD)
    with_V, without_V = (logp_NV.double().exp().sum(0) + RARE for logp_NV in (bench.tuned_logp, taken))
    more_V = with_V - without_V
    gained_V = ((with_V * (with_V / without_V).log() - more_V) * more_V.sign()).float()
    return _named(tokenizer, gained_V, count)


def lens_tokens(
    tokenizer, model: LanguageModel, lens: Lens, change: Change, count: int = 20
) -> tuple[list[TokenWeight], list[TokenWeight]]:
    """Tokens that the change's write direction promotes and suppresses, decoded by the tuned lens (cosines)."""
    site = change.sites[-1]
    top, bottom = lens.read(model, site, change.difference_SD[-1], count)
    return tuple([TokenWeight(tokenizer.decode([i]), w) for i, w in side] for side in (top, bottom))


def kind_rates(sample: Sample, f_N: Tensor) -> dict[str, float]:
    """Share of tokens on which a change of these strengths is on, for each kind of text.

    Contrastive text counts by its author. What a search elicited counts by its condition, which says when the change shows.
    """
    seen: dict[str, list[int]] = {}
    for document, on in zip(sample.document_N.tolist(), (f_N != 0).tolist()):
        d = sample.tokens.documents[document]
        kind = f"{d.kind} by {d.writer}" if d.writer else d.kind
        tally = seen.setdefault(f"asked {d.condition!r}, {d.writer}'s answer" if d.condition else kind, [0, 0])
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
