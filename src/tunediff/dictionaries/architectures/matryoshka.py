"""Matryoshka BatchTopK crosscoder (Bussmann, Nabeshima, Karvonen, Nanda 2025, 2503.17547)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tunediff.dictionaries.architectures import base


@dataclass(frozen=True)
class MatryoshkaSpec(base.Spec):
    """Settings of the Matryoshka crosscoder."""

    variant: ClassVar[str] = "matryoshka"

    k: float = 32.0
    """Mean number of latents on a token, over the batch, of the whole dictionary."""

    prefixes: int = 5
    """Number of nested dictionaries, each about twice as large as the one before. 5 gives 1/32, 3/32, 7/32, 15/32 and
    all of the latents, as in the source. 1: BatchTopK. More: early latents are more general, later ones fewer and
    weaker."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(0 < self.k <= self.latents, "k is out of range", f"above 0, at most {self.latents}", self.k)
        base.require(1 <= self.prefixes <= 16, "prefixes is out of range", "1 to 16", self.prefixes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of latents of each prefix, ascending; in a small dictionary equal sizes count once."""
        parts = 1 << self.prefixes
        inner = {round(self.latents * ((1 << i) - 1) / parts) for i in range(1, self.prefixes)}
        return (*sorted(inner - {0, self.latents}), self.latents)

    @property
    def cuts(self) -> tuple[int, ...]:
        """Ends of all prefixes but the last; see `base.Spec.cuts`."""
        return self.sizes[:-1]


class Matryoshka(base.Dictionary):
    """BatchTopK crosscoder of which every prefix of the latents must reconstruct both models by itself.

    The source trains an autoencoder of one model; here each latent has a decoder vector for each model. The source sums
    the loss over prefixes. Here it is the mean, so that AuxK keeps its relative weight. Prefix sizes are fixed instead
    of drawn for every batch.
    """

    Spec = MatryoshkaSpec
    spec: MatryoshkaSpec

    def groups(self) -> tuple[base.Group, ...]:
        return (base.Group("all", 0, self.spec.latents, self.spec.k),)

    def objective(self, run: base.Pass) -> dict[str, Tensor]:
        errors = [(run.x_NSMD - xhat).square().mean() for xhat in self.prefixes(run)]
        return {"reconstruction": torch.stack(errors).mean()}

    def prefixes(self, run: base.Pass) -> list[Tensor]:
        """Return xhat_NSMD of each prefix, the whole dictionary last, as running sums of blocks that are decoded
        once."""
        sums = itertools.accumulate(run.parts[:-1], initial=self.decoder_bias_SMD)
        return [*itertools.islice(sums, 1, None), run.xhat_NSMD]


VARIANT = Matryoshka
