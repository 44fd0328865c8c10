"""Perplexity gap: answers by the tuned model that base finds least likely ("ppl-diff")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunediff.changes.signals.base import Signal, Tally, documents_of
from tunediff.core.chance import bootstrap_ratio
from tunediff.core.errors import within
from tunediff.records.measure import SignalTable
from tunediff.texts.document import Document
from tunediff.texts.tokens import Batch, Tokens


@dataclass
class _Seen:
    document: Document
    row: tuple[int, ...]
    first: int
    place: tuple[int, int]
    gap: float = 0.0
    tokens: int = 0


@dataclass(frozen=True)
class PerplexityGap(Signal):
    """Answers by the tuned model, ranked by the mean of log p(tuned) - log p(base) a token.

    Only answers are scored, never prompts. Every model finds its own text likelier than another model does, so the mean
    gap is above 0 for any two models. Only the answers at the top of the ranking are informative.
    """

    documents: int = 20
    """Largest number of answers in the table, by descending gap."""
    shortest: int = 5
    """Fewest tokens of a ranked answer."""

    def __post_init__(self) -> None:
        within("find.perplexity_gap", self, documents=0, shortest=1)

    def begin(self, tokenizer: Any, vocabulary: int) -> Tally:
        return _Gaps(self, tokenizer, vocabulary)


class _Gaps(Tally):
    """Running sums of `PerplexityGap`."""

    def __init__(self, by: PerplexityGap, tokenizer: Any, vocabulary: int):
        super().__init__(tokenizer, vocabulary)
        self.by = by
        self.seen: dict[str, _Seen] = {}

    def update(
        self, batch: Batch, tokens: Tokens, base_logp_NV: Tensor, tuned_logp_NV: Tensor, chosen_BT: Tensor
    ) -> None:
        b_N, t_N = chosen_BT.nonzero(as_tuple=True)
        numbers = batch.rows_B.tolist()
        following = torch.cat([batch.ids_BT[:, 1:], torch.zeros_like(batch.ids_BT[:, :1])], 1)[b_N, t_N]
        index = following.clamp_max(self.vocabulary - 1)[:, None].to(base_logp_NV.device)
        gap_N = (tuned_logp_NV.gather(1, index) - base_logp_NV.gather(1, index))[:, 0].tolist()
        places = zip(gap_N, following.tolist(), b_N.tolist(), t_N.tolist(), documents_of(batch, tokens, b_N))
        for gap, token, b, t, d in places:
            row, document = numbers[b], tokens.documents[d]
            if not document.writer or t + 1 >= len(tokens.rows[row]) or t + 1 < tokens.prompt_R[row]:
                continue
            if token >= self.vocabulary:
                continue
            place = (tokens.start_R[row], row)
            seen = self.seen.setdefault(document.id, _Seen(document, tokens.rows[row], tokens.prompt_R[row], place))
            if place < seen.place:
                seen.row, seen.first, seen.place = tokens.rows[row], tokens.prompt_R[row], place
            seen.gap += gap
            seen.tokens += 1

    def table(self) -> SignalTable:
        of = {
            w: [s for s in map(self.seen.get, sorted(self.seen)) if s.document.writer == w] for w in ("tuned", "base")
        }
        rows: list[list[Any]] = []
        for writer, name in (("tuned", "all answers by tuned"), ("base", "all answers by base")):
            if of[writer]:
                mean = bootstrap_ratio([s.gap for s in of[writer]], [s.tokens for s in of[writer]], seed=0)
                ends = [round(mean.low, 6), round(mean.high, 6)] if len(of[writer]) > 1 else [None, None]
                rows.append([name, round(mean.value, 6), *ends, sum(s.tokens for s in of[writer]), ""])
        long = [s for s in of["tuned"] if s.tokens >= self.by.shortest and s.gap > 0]
        long.sort(key=lambda s: (-s.gap / s.tokens, s.document.id))
        rows += [
            [
                s.document.id[:120],
                round(s.gap / s.tokens, 6),
                None,
                None,
                s.tokens,
                self.text(s.row[s.first : s.first + 64]),
            ]
            for s in long[: self.by.documents]
        ]
        return SignalTable(
            "perplexity_gap",
            "Answers by tuned that base would not have given",
            'Mean of log p(tuned) - log p(base) over an answer\'s tokens ("ppl-diff"), with 95 % bootstrap '
            "intervals over answers. Any model finds its own text likelier than another does: compare with "
            "the answers by base, and read the order, not the sign.",
            ["answer", "gap (nat a token)", "low", "high", "tokens", "text"],
            rows,
        )


VARIANT = PerplexityGap
