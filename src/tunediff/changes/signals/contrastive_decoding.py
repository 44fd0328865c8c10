"""Contrastive decoding: tokens favored once tuned's preferences over base are amplified (Li et al. 2023, 2210.15097)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunediff.changes.signals.base import TOKEN, Signal, Tally, documents_of
from tunediff.core.errors import within
from tunediff.records.measure import SignalTable
from tunediff.texts.tokens import Batch, Tokens

WRITERS = (("tuned", "text by tuned"), ("base", "text by base"), ("", "other text"))
"""Authors of text, and their labels; tokens are ranked on text by the first of these authors that is present."""


@dataclass(frozen=True)
class ContrastiveDecoding(Signal):
    """Tokens to which the amplified distribution gives more probability than base does, on average over contexts.

    In each context, the amplified distribution is softmax((1 + a) log p(tuned) - a log p(base)) over the tokens that
    tuned finds plausible. Base's own distribution, over the tokens that base finds plausible, is subtracted. The result
    is 0 everywhere for a model against itself.

    Tokens are ranked by the mean over text that tuned wrote. The table also shows the mean over text by base and over
    other text. A token that rises in all three is favored everywhere; a token that rises only in tuned's text belongs
    to what tuned wrote there.

    The source decodes whole texts and subtracts a smaller model; 2605.25902 subtracts base from a fine-tuned model.
    Here contexts are given: answers without prompts, and without the first position of a row. Sums over contexts are
    streamed, V numbers for each author.
    """

    amplification: float = 1.0
    """a in (1 + a) log p(tuned) - a log p(base); 0 gives tuned itself, and large values favor the rarest plausible
    tokens.
    """
    plausible: float = 0.1
    """Smallest probability of a plausible token, relative to the likeliest token (0..1); less admits the distribution's
    tail.
    """
    least: float = 1e-3
    """Smallest mean rise in probability of a token in the table; below it, a few barely plausible tokens decide."""
    rows: int = 30
    """Largest number of rows in the table."""
    before: int = 12
    """Number of tokens shown before the position where a token rises most."""

    def __post_init__(self) -> None:
        within("find.contrastive_decoding", self, amplification=0, plausible=(1e-9, 1), least=0, rows=1, before=0)

    def begin(self, tokenizer: Any, vocabulary: int) -> Tally:
        return _Amplified(self, tokenizer, vocabulary)


class _Amplified(Tally):
    """Running sums of `ContrastiveDecoding`."""

    def __init__(self, by: ContrastiveDecoding, tokenizer: Any, vocabulary: int):
        super().__init__(tokenizer, vocabulary)
        self.by = by
        self.rise: dict[str, Tensor] = {}
        self.chosen: dict[str, Tensor] = {}
        self.contexts: dict[str, int] = {}
        self.most_V = torch.zeros(vocabulary)
        self.place_V2 = torch.zeros(vocabulary, 2, dtype=torch.long)
        self.rows: dict[int, tuple[int, ...]] = {}

    def update(
        self, batch: Batch, tokens: Tokens, base_logp_NV: Tensor, tuned_logp_NV: Tensor, chosen_BT: Tensor
    ) -> None:
        b_N, t_N = chosen_BT.nonzero(as_tuple=True)
        row_N = batch.rows_B[b_N]
        for row in row_N.unique().tolist():
            self.rows[row] = tokens.rows[row]
        inside = [
            0 < t < len(self.rows[row]) - 1 and t + 1 >= tokens.prompt_R[row]
            for row, t in zip(row_N.tolist(), t_N.tolist())
        ]
        keep = torch.tensor(inside).nonzero()[:, 0]
        if not len(keep):
            return
        writers = [tokens.documents[d].writer for d in documents_of(batch, tokens, b_N[keep])]
        base_NV, tuned_NV = base_logp_NV[keep], tuned_logp_NV[keep]
        amplified_NV = _said(
            (1 + self.by.amplification) * tuned_NV - self.by.amplification * base_NV, tuned_NV, self.by.plausible
        )
        first_N, base_first_N = amplified_NV.argmax(1).cpu(), base_NV.argmax(1).cpu()
        rise_NV = (amplified_NV - _said(base_NV, base_NV, self.by.plausible)).cpu()
        for writer in sorted(set(writers)):
            mine = torch.tensor([name == writer for name in writers])
            changed = first_N[mine & (first_N != base_first_N)]
            nothing = torch.zeros(self.vocabulary, dtype=torch.float64)
            self.rise[writer] = self.rise.get(writer, nothing) + rise_NV[mine].double().sum(0)
            self.chosen[writer] = self.chosen.get(writer, 0) + torch.bincount(changed, minlength=self.vocabulary)
            self.contexts[writer] = self.contexts.get(writer, 0) + int(mine.sum())
        most_V, at_V = rise_NV.max(0)
        better = most_V > self.most_V
        self.most_V[better] = most_V[better]
        self.place_V2[better] = torch.stack([row_N[keep], t_N[keep]], 1)[at_V[better]]

    def table(self) -> SignalTable:
        main = next((writer for writer, _ in WRITERS if writer in self.contexts), None)
        rows: list[list[Any]] = []
        if main is not None:
            mean_V = self.rise[main] / self.contexts[main]
            order = torch.argsort(mean_V, descending=True, stable=True)[: self.by.rows]
            for token in order[mean_V[order] >= self.by.least].tolist():
                row, t = self.place_V2[token].tolist()
                rows.append(
                    [
                        self.text([token], TOKEN),
                        *(self._mean(writer, token) for writer, _ in WRITERS),
                        round(int(self.chosen[main][token]) / self.contexts[main], 4),
                        self.text(self.rows[row][max(0, t + 1 - self.by.before) : t + 1]),
                    ]
                )
        counts = ", ".join(f"{self.contexts.get(writer, 0):,} in {name}" for writer, name in WRITERS)
        return SignalTable(
            "contrastive_decoding",
            "What tuned says if its preferences over base are amplified",
            "Mean rise in probability over base under "
            f"{1 + self.by.amplification:g} log p(tuned) - {self.by.amplification:g} log p(base), among tokens at least "
            f"{self.by.plausible:.0%} as likely as the likeliest (Li et al. 2023), over contexts ({counts}); ranked by "
            f"{dict(WRITERS)[main or 'tuned']}, the rest is the reference. First choice: share of these contexts in "
            "which amplified decoding would say the token and base would not. Only sums are kept, so there are no "
            "intervals.",
            ["token", *(f"rise, {name}" for _, name in WRITERS), "first choice", "most after"],
            rows,
        )

    def _mean(self, writer: str, token: int) -> float | None:
        if writer not in self.contexts:
            return None
        return round(float(self.rise[writer][token]) / self.contexts[writer], 6)


def _said(score_NV: Tensor, logp_NV: Tensor, plausible: float) -> Tensor:
    """Probabilities from scores, over the tokens that a model with these log-probabilities finds plausible."""
    least_N1 = logp_NV.max(1, keepdim=True).values + math.log(plausible)
    return score_NV.masked_fill(logp_NV < least_N1, float("-inf")).softmax(-1)


VARIANT = ContrastiveDecoding
