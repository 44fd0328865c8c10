"""Logit-difference mining: tokens whose logits tuned raises over base in many contexts (2608.26462)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunediff.changes.signals.base import TOKEN, Signal, Tally, documents_of, label
from tunediff.core.errors import within
from tunediff.records.measure import SignalTable
from tunediff.texts.tokens import Batch, Tokens


@dataclass(frozen=True)
class LogitMining(Signal):
    """Number of contexts in which each token is among those that tuned raises most.

    Within one context, logit(tuned) - logit(base) orders tokens as the difference of log-probabilities does. The first
    position of every row is left out, because its context is always the same.

    The source keeps [samples, positions, V]; here counts are streamed, V numbers for each kind of text. The source
    masks tokens by their frequency in a reference corpus. Here a token's expected count is the largest of three:

    uniform    every token counted equally often
    base       how often base itself has the token among its likeliest
    elsewhere  the token's share of text that tuned did not write
    """

    top: int = 10
    """Number of tokens counted in a context, by descending difference."""
    least: float = 1e-3
    """Smallest rise of a counted token over the context's median token, in nats; below it, differences are rounding."""
    generic: float = 2.0
    """Smallest ratio of a token's count to its expected count; tokens below it are masked as generic."""
    rows: int = 30
    """Largest number of rows in the table."""

    def __post_init__(self) -> None:
        within("find.logit_mining", self, top=1, least=0, generic=0, rows=1)

    def begin(self, tokenizer: Any, vocabulary: int) -> Tally:
        return _Mining(self, tokenizer, vocabulary)


class _Mining(Tally):
    """Running counts of `LogitMining`."""

    def __init__(self, by: LogitMining, tokenizer: Any, vocabulary: int):
        super().__init__(tokenizer, vocabulary)
        self.by = by
        self.top = min(by.top, vocabulary)
        self.named: dict[str, Tensor] = {}
        self.contexts: dict[str, int] = {}
        self.likely_V = torch.zeros(vocabulary, dtype=torch.long)
        self.text_V = torch.zeros(vocabulary, dtype=torch.long)

    def update(
        self, batch: Batch, tokens: Tokens, base_logp_NV: Tensor, tuned_logp_NV: Tensor, chosen_BT: Tensor
    ) -> None:
        b_N, t_N = chosen_BT.nonzero(as_tuple=True)
        documents = [tokens.documents[d] for d in documents_of(batch, tokens, b_N)]
        inner_N = t_N > 0
        ids_N = batch.ids_BT[b_N, t_N]
        others_N = torch.tensor([d.writer in ("", "base") for d in documents], dtype=torch.bool) & inner_N
        self.text_V += _count(ids_N[others_N & (ids_N < self.vocabulary)], self.vocabulary)
        difference_NV = tuned_logp_NV - base_logp_NV
        median_N = difference_NV.median(1).values.cpu()
        rise = difference_NV.topk(self.top, dim=1)
        likely = base_logp_NV.topk(self.top, dim=1).indices
        self.likely_V += _count(likely.cpu()[inner_N].flatten(), self.vocabulary)
        labels = [label(d) for d in documents]
        values, indices = rise.values.cpu() - median_N[:, None], rise.indices.cpu()
        for kind in sorted(set(labels)):
            mine_N = torch.tensor([name == kind for name in labels]) & inner_N
            found = _count(indices[mine_N][values[mine_N] > self.by.least], self.vocabulary)
            self.named[kind] = self.named[kind] + found if kind in self.named else found
            self.contexts[kind] = self.contexts.get(kind, 0) + int(mine_N.sum())

    def table(self) -> SignalTable:
        kinds = sorted(k for k, count in self.contexts.items() if count)
        count_V = sum((self.named[k] for k in kinds), torch.zeros(self.vocabulary, dtype=torch.long))
        contexts = sum(self.contexts[k] for k in kinds)
        slots = contexts * self.top
        uniform_V = torch.full((self.vocabulary,), slots / self.vocabulary, dtype=torch.float64)
        share_V = self.text_V.double() / max(1, int(self.text_V.sum()))
        expected_V = torch.stack([uniform_V, self.likely_V.double(), share_V * slots]).max(0).values.clamp_min(1)
        ratio_V = count_V.double() / expected_V
        order = torch.argsort(count_V, descending=True, stable=True)
        chosen = order[ratio_V[order] >= self.by.generic][: self.by.rows].tolist()
        least = int(count_V[chosen[-1]]) if chosen else 1
        masked = int(((count_V >= least) & (ratio_V < self.by.generic)).sum())
        rows = []
        for token in chosen:
            rates = {k: int(self.named[k][token]) / self.contexts[k] for k in kinds}
            shown = ", ".join(
                f"{k} {rate:.1%}" for k, rate in sorted(rates.items(), key=lambda x: (-x[1], x[0])) if rate
            )
            rows.append(
                [
                    self.text([token], TOKEN),
                    int(count_V[token]),
                    self._share(token, kinds, True),
                    self._share(token, kinds, False),
                    round(float(ratio_V[token]), 2),
                    shown,
                ]
            )
        return SignalTable(
            "logit_mining",
            "Tokens that tuned raises over base in the most contexts",
            f"How often a token is among the {self.top} with the largest logit(tuned) - logit(base) "
            f"(2608.26462), in {contexts:,} contexts. Ratio: against the largest of chance, how often base "
            f"itself has the token among its {self.top} most likely, and its share of text tuned did not "
            f"write; below {self.by.generic:g} a token counts as generic and is masked ({masked} as frequent were). "
            "Says what becomes likelier, not that it is ever said.",
            ["token", "contexts", "share of contrastive text", "share of other text", "ratio", "by kind of text"],
            rows,
        )

    def _share(self, token: int, kinds: list[str], written: bool) -> float | None:
        """Share of contexts in which the token was counted, over text that a model wrote or over other text."""
        mine = [k for k in kinds if (k.endswith((" by base", " by tuned"))) == written]
        total = sum(self.contexts[k] for k in mine)
        return round(sum(int(self.named[k][token]) for k in mine) / total, 4) if total else None


def _count(ids_N: Tensor, vocabulary: int) -> Tensor:
    return torch.bincount(ids_N, minlength=vocabulary)


VARIANT = LogitMining
