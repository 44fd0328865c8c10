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
    """Latents on a token, on average over the batch, of the whole dictionary."""

    prefixes: int = 5
    """Nested dictionaries, each about twice the one before: 1/32, 3/32, 7/32, 15/32 and all of the latents for 5
    (the source's sizes). 1: BatchTopK. More: early latents are more general, later ones fewer and weaker."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(0 < self.k <= self.latents, "k is out of range", f"above 0, at most {self.latents}", self.k)
        base.require(1 <= self.prefixes <= 16, "prefixes is out of range", "1 to 16", self.prefixes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many latents each prefix has, ascending; in a small dictionary those that coincide count once."""
        parts = 1 << self.prefixes
        inner = {round(self.latents * ((1 << i) - 1) / parts) for i in range(1, self.prefixes)}
        return (*sorted(inner - {0, self.latents}), self.latents)

    @property
    def cuts(self) -> tuple[int, ...]:
        """Where a prefix ends."""
        return self.sizes[:-1]


class Matryoshka(base.Dictionary):
    """One BatchTopK gate over all latents; every prefix of them must reconstruct both models by itself.

    The source is about one model; this is the same loss with a decoder vector for each. It sums over prefixes,
    ours is the mean, so that AuxK keeps its weight; sizes are fixed and not drawn anew for every batch.
    """

    Spec = MatryoshkaSpec
    spec: MatryoshkaSpec

    def groups(self) -> tuple[base.Group, ...]:
        return (base.Group("all", 0, self.spec.latents, self.spec.k),)

    def objective(self, run: base.Pass) -> dict[str, Tensor]:
        errors = [(run.x_NSMD - xhat).square().mean() for xhat in self.prefixes(run)]
        return {"reconstruction": torch.stack(errors).mean()}

    def prefixes(self, run: base.Pass) -> list[Tensor]:
        """xhat_NSMD of each prefix, the whole dictionary's last: every block is decoded once and added up."""
        sums = itertools.accumulate(run.parts[:-1], initial=self.decoder_bias_SMD)
        return [*itertools.islice(sums, 1, None), run.xhat_NSMD]


VARIANT = Matryoshka
