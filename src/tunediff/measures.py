"""Measures of what a model says: divergences per token, in nat, against cached log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import torch
from torch import Tensor

from tunediff.models import LanguageModel, Start


def kl_divergence(logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
    """KL(p || q) in nat for each of N tokens, from log-probabilities; float32, never below 0."""
    return (logp_NV.exp() * (logp_NV - logq_NV)).sum(-1).clamp_min(0)


def log_probabilities(
    model: LanguageModel, ids_BT: Tensor, chosen_BT: Tensor, vocabulary: int, start: Start | None = None
) -> Tensor:
    """Next-token log-probabilities (N, V) at the chosen positions of a run, over the first `vocabulary` tokens."""
    states_BTD = model.states(ids_BT, start, chosen_BT)
    return model.logits(states_BTD[chosen_BT])[..., :vocabulary].log_softmax(-1)


@dataclass(frozen=True)
class Divergence:
    """KL(p || q) summed over each document's chosen tokens, and how many these are; ratios of sums are token means."""

    nats: list[float]
    tokens: list[int]

    @property
    def mean(self) -> float:
        """Nat a token."""
        return sum(self.nats) / max(1, sum(self.tokens))


def by_document(kl_N: Tensor, document_N: Tensor, documents: Sequence[int]) -> Divergence:
    """Sum a per-token divergence over documents, in their given order."""
    place = {document: i for i, document in enumerate(documents)}
    index = torch.tensor([place[d] for d in document_N.tolist()])
    nats = torch.zeros(len(documents), dtype=torch.float64).index_add_(0, index, kl_N.double())
    return Divergence(nats.tolist(), torch.bincount(index, minlength=len(documents)).tolist())
