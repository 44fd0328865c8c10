"""Divergences between next-token distributions, in nats a token, mostly against cached log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tunediff import kernels
from tunediff.core.errors import NumericsError
from tunediff.models.network import LanguageModel
from tunediff.models.passes import Start

TILE = 256
"""Rows of logits computed at a time; a whole batch's would be hundreds of megabytes, and slower to read than to make."""


@dataclass(frozen=True, eq=False)
class Said:
    """A model's next-token distributions at N positions (..., N): final states, from which logits are made when needed.

    Only the first ``vocabulary`` tokens count.
    """

    model: LanguageModel
    states_ND: Tensor
    vocabulary: int

    @classmethod
    def at(
        cls, model: LanguageModel, ids_BT: Tensor, chosen_BT: Tensor, vocabulary: int, start: Start | None = None
    ) -> Said:
        """Return the distributions at the chosen positions of a run, in row-major order."""
        return cls(model, model.states(ids_BT, start, chosen_BT)[chosen_BT], vocabulary)

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., N, V)."""
        return *self.states_ND.shape[:-1], self.vocabulary

    def part(self, part: slice) -> Said:
        """Return the distributions at some of the N positions."""
        return replace(self, states_ND=self.states_ND[..., part, :])

    def logits(self) -> Tensor:
        """Return logits (..., N, V)."""
        # Contiguous, or torch multiplies row by row.
        return self.model.logits(self.states_ND.contiguous())[..., : self.vocabulary]

    def logp(self) -> Tensor:
        """Return log-probabilities (..., N, V)."""
        return self.logits().log_softmax(-1)


def blocks(*says: Said) -> Iterator[tuple]:
    """The N tokens in small parts: each a slice, and log-probabilities (..., n, V) there."""
    block = _share(kernels.BLOCK, says)
    for part in parts(*says, block=block):
        found = [said.part(part).logits().split(block, -2) for said in says]
        for at, logits in zip(range(part.start, part.stop, block), zip(*found)):
            yield slice(at, min(at + block, part.stop)), *(rows.log_softmax(-1) for rows in logits)


def _share(rows: int, says: Sequence[Tensor | Said]) -> int:
    """The number of positions that make about that many rows of logits."""
    return max(1, rows * says[0].shape[-2] // max(1, *(math.prod(s.shape[:-1]) for s in says)))


def parts(*says: Tensor | Said, block: int = 1) -> Iterator[slice]:
    """Yield the N positions in parts of `TILE` rows of logits, each of whole blocks but the last."""
    N, tile = says[0].shape[-2], _share(TILE, says)
    tile -= tile % block
    return (slice(start, min(start + tile, N)) for start in range(0, N, tile))


def kl_divergence(p: Tensor | Said, q: Tensor | Said) -> Tensor:
    """Return KL(p || q) in nats at each of N positions (..., N), in float32 and never below 0.

    Either side is a table of log-probabilities (..., N, V) or a `Said`. Leading axes are those of both, or of one alone;
    others raise `NumericsError`.
    """
    few, many = sorted((p.shape, q.shape), key=len)
    if few[:-1] != many[-len(few) : -1]:
        raise NumericsError(
            "a divergence of other tokens",
            expected=f"leading axes {tuple(many[:-1])}, or the last of them",
            got=str(tuple(few[:-1])),
        )
    for said, table, theirs in ((p, q, False), (q, p, True)):
        if isinstance(said, Said) and isinstance(table, Tensor) and table.shape == said.shape[-table.dim() :]:
            kl_R = said.model.divergence(said.states_ND.flatten(0, -2), table.flatten(0, -2), theirs)
            if kl_R is not None:
                return kl_R.view(said.shape[:-1]).clamp_min(0)
    shape, sums, found = many[:-1], (isinstance(p, Said), isinstance(q, Said)), []
    for part in parts(p, q):
        rows = (s.part(part).logits() if isinstance(s, Said) else s[..., part, :] for s in (p, q))
        kl_R = kernels.divergence(*(r.flatten(0, -2).float() for r in rows), *sums)
        found.append(kl_R.view(*shape[:-1], -1).clamp_min(0))
    return torch.cat(found, -1) if found else torch.zeros(shape)


def log_probabilities(
    model: LanguageModel, ids_BT: Tensor, chosen_BT: Tensor, vocabulary: int, start: Start | None = None
) -> Tensor:
    """Return next-token log-probabilities (N, V) at the chosen positions of a run, over the first `vocabulary` tokens."""
    return Said.at(model, ids_BT, chosen_BT, vocabulary, start).logp()


@dataclass(frozen=True)
class Divergence:
    """KL(p || q) in nats summed over each document's chosen tokens, and the number of these."""

    nats: list[float]
    tokens: list[int]

    @property
    def mean(self) -> float:
        """Nats a token."""
        return sum(self.nats) / max(1, sum(self.tokens))


def by_document(kl_N: Tensor, document_N: Tensor, documents: Sequence[int]) -> Divergence:
    """Sum a per-token divergence over documents, in their given order."""
    place = {document: i for i, document in enumerate(documents)}
    index = torch.tensor([place[d] for d in document_N.tolist()])
    nats = torch.zeros(len(documents), dtype=torch.float64).index_add_(0, index, kl_N.double())
    return Divergence(nats.tolist(), torch.bincount(index, minlength=len(documents)).tolist())
