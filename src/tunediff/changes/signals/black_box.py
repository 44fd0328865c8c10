"""Black box: tokens that the tuned model writes more often than base, from text alone (Monroe, Colaresi & Quinn 2008)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from tunediff.changes.signals.base import TOKEN, Signal, Tally, documents_of
from tunediff.core.chance import numpy_generator, p_value
from tunediff.core.errors import within
from tunediff.records.measure import SignalTable
from tunediff.texts.document import Document
from tunediff.texts.tokens import Batch, Tokens


@dataclass(frozen=True)
class BlackBox(Signal):
    """Log-odds of tokens between answers by tuned and by base, with an informative Dirichlet prior, as z-scores.

    This signal is the baseline for methods that use probabilities or activations: it reads only both models' answers to
    the same prompts. The prior is a token's frequency in all text read.

    z treats tokens as independent, which tokens of one answer are not. Therefore p comes from permutations, an addition
    to the source: the two answers to a prompt swap authors at random. Each token is compared with the largest |z| of
    all tokens (max-T), so p accounts for the number of tokens.
    """

    prior: float = 500.0
    """Weight of the prior, in tokens of text; less lets rare tokens lead, more pulls every log-odds toward 0."""
    least: float = 1.0
    """Smallest |z| of a token in the table."""
    draws: int = 199
    """Number of permutations of the authors; the smallest p is 1 / (draws + 1)."""
    by_tuned: int = 20
    """Largest number of tokens in the table that the tuned model writes more often."""
    by_base: int = 10
    """Largest number of tokens in the table that base writes more often."""

    def __post_init__(self) -> None:
        within("find.black_box", self, prior=1e-9, least=0, draws=1, by_tuned=0, by_base=0)

    def begin(self, tokenizer: Any, vocabulary: int) -> Tally:
        return _Counts(self, tokenizer, vocabulary)


class _Counts(Tally):
    """Running counts of `BlackBox`."""

    def __init__(self, by: BlackBox, tokenizer: Any, vocabulary: int):
        super().__init__(tokenizer, vocabulary)
        self.by = by
        self.documents: dict[str, Document] = {}
        self.counts: dict[str, Counter[int]] = {}

    def update(
        self, batch: Batch, tokens: Tokens, base_logp_NV: Tensor, tuned_logp_NV: Tensor, chosen_BT: Tensor
    ) -> None:
        b_N, t_N = chosen_BT.nonzero(as_tuple=True)
        rows = batch.rows_B[b_N].tolist()
        places = zip(batch.ids_BT[b_N, t_N].tolist(), rows, t_N.tolist(), documents_of(batch, tokens, b_N))
        for token, row, t, d in places:
            document = tokens.documents[d]
            if document.writer == "amplified":
                continue  # no text sampled from either model
            if token < self.vocabulary and not (document.writer and t < tokens.prompt_R[row]):
                self.documents[document.id] = document
                self.counts.setdefault(document.id, Counter())[token] += 1

    def table(self) -> SignalTable:
        ids = sorted(id for id, document in self.documents.items() if document.writer)
        tuned_D = np.array([self.documents[id].writer == "tuned" for id in ids], bool)
        rows = self._rows(ids, tuned_D) if 0 < tuned_D.sum() < len(ids) else []
        return SignalTable(
            "black_box",
            "Tokens that one model writes more often than the other",
            "Log-odds of a token in answers by tuned against answers by base, with its frequency in all text as a "
            "Dirichlet prior, and z-scores (Monroe et al. 2008); no probabilities or activations are looked at. p: "
            f"share of {self.by.draws} swaps of who wrote what, within prompts, whose most extreme token has as large a |z|.",
            [
                "token",
                "more by",
                "log-odds",
                "z",
                "p",
                "times by tuned",
                "times by base",
                "answers by tuned",
                "answers by base",
            ],
            rows,
        )

    def _rows(self, ids: list[str], tuned_D: np.ndarray) -> list[list[Any]]:
        all_text: Counter[int] = sum((self.counts[id] for id in sorted(self.counts)), Counter())
        words = sorted(set().union(*(self.counts[id] for id in ids)))
        prior_V = self.by.prior * np.array([all_text[word] for word in words]) / sum(all_text.values())
        counts_DV = np.array([[self.counts[id][word] for word in words] for id in ids], np.float64)
        odds_V, z_V = (part[0] for part in _log_odds(tuned_D[None], counts_DV, prior_V, self.by.prior))
        _, null_RV = _log_odds(self._swapped(ids, tuned_D), counts_DV, prior_V, self.by.prior)
        most_R = np.abs(null_RV).max(1)
        order = np.argsort(-z_V, kind="stable").tolist()
        chosen = [v for v in order if z_V[v] >= self.by.least][: self.by.by_tuned]
        chosen += [v for v in order[::-1] if z_V[v] <= -self.by.least][: self.by.by_base]
        return [
            [
                self.text([words[v]], TOKEN),
                "tuned" if z_V[v] > 0 else "base",
                round(float(odds_V[v]), 4),
                round(float(z_V[v]), 4),
                p_value(abs(z_V[v]), most_R),
                *(int(counts_DV[mine, v].sum()) for mine in (tuned_D, ~tuned_D)),
                *(int((counts_DV[mine, v] > 0).sum()) for mine in (tuned_D, ~tuned_D)),
            ]
            for v in chosen
        ]

    def _swapped(self, ids: list[str], tuned_D: np.ndarray) -> np.ndarray:
        """Random authors (self.by.draws, D): the two answers to a prompt swap authors, or keep them."""
        groups = [self.documents[id].group or id for id in ids]
        group, of_D = np.unique(groups, return_inverse=True)
        both = [len(set(tuned_D[of_D == g])) == 2 for g in range(len(group))]
        swap_RG = numpy_generator(0, "black box").random((self.by.draws, len(group))) < 0.5
        return tuned_D ^ (swap_RG & both)[:, of_D]


def _log_odds(
    tuned_RD: np.ndarray, counts_DV: np.ndarray, prior_V: np.ndarray, prior: float
) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds (R, V) of each token between documents by tuned and all others, and their z-scores."""
    ours_RV, theirs_RV = (of_RD.astype(np.float64) @ counts_DV for of_RD in (tuned_RD, ~tuned_RD))

    def logit(times_RV: np.ndarray) -> np.ndarray:
        return np.log((times_RV + prior_V) / (times_RV.sum(1, keepdims=True) + prior - times_RV - prior_V))

    odds_RV = logit(ours_RV) - logit(theirs_RV)
    return odds_RV, odds_RV / np.sqrt(1 / (ours_RV + prior_V) + 1 / (theirs_RV + prior_V))


VARIANT = BlackBox
