"""Measures of what a model says: divergences per token, in nat, against cached log-probabilities."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Iterator, Sequence

import torch
from torch import Tensor

from tunediff.models import LanguageModel, Start


TILE = 128
"""Tokens whose log-probabilities over the vocabulary are held at a time. A tile stays near the processor; those of a whole
batch are hundreds of megabytes that take longer to go through than to compute."""


@dataclass(frozen=True, eq=False)
class Said:
    """What a model says at tokens (..., N): their final states, and log-probabilities over the first ``vocabulary`` tokens
    made where they are looked at."""

    model: LanguageModel
    states_ND: Tensor
    vocabulary: int

    @classmethod
    def at(cls, model: LanguageModel, ids_BT: Tensor, chosen_BT: Tensor, vocabulary: int, start: Start | None = None) -> "Said":
        """What it says at the chosen positions of a run, in row-major order."""
        return cls(model, model.states(ids_BT, start, chosen_BT)[chosen_BT], vocabulary)

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., N, V)."""
        return *self.states_ND.shape[:-1], self.vocabulary

    def logp(self, part: slice = slice(None)) -> Tensor:
        """Log-probabilities (..., n, V) of some of the N tokens."""
        # Whole, or torch multiplies row by row.
        return self.model.logits(self.states_ND[..., part, :].contiguous())[..., : self.vocabulary].log_softmax(-1)


def logp_of(says: Tensor | Said, part: slice) -> Tensor:
    """Some tokens' log-probabilities, from a table of all or from what makes them."""
    return says.logp(part) if isinstance(says, Said) else says[..., part, :]


def tiles(*says: Tensor | Said) -> Iterator[slice]:
    """The N tokens of these in parts of about `TILE` log-probability rows each, leading axes counted."""
    N, most = says[0].shape[-2], max(math.prod(s.shape[:-1]) for s in says)
    size = max(1, TILE * N // max(1, most))
    return (slice(i, i + size) for i in range(0, N, size))


def kl_divergence(p: Tensor | Said, q: Tensor | Said) -> Tensor:
    """KL(p || q) in nat for each of N tokens (..., N), from log-probabilities (..., N, V); float32, never below 0. Leading
    axes are broadcast."""
    parts = [_kl(logp_of(p, part), logp_of(q, part)) for part in tiles(p, q)]
    return torch.cat(parts, -1) if parts else torch.zeros(0)


def _kl(logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
    return (logp_NV - logq_NV).mul_(logp_NV.exp()).sum(-1).clamp_min(0)


def log_probabilities(
    model: LanguageModel, ids_BT: Tensor, chosen_BT: Tensor, vocabulary: int, start: Start | None = None
) -> Tensor:
    """Next-token log-probabilities (N, V) at the chosen positions of a run, over the first `vocabulary` tokens."""
    return Said.at(model, ids_BT, chosen_BT, vocabulary, start).logp()


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
