"""Sparse autoencoder on the difference of the models' activations (Aranguri, Drori, Nanda 2025, "SAE on activation
differences"; Dumas, Minder, Nanda 2025, "What We Learned Trying to Diff Base and Chat Models")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tunediff.dictionaries.architectures import base


@dataclass(frozen=True)
class DiffSAESpec(base.Spec):
    """Settings of the sparse autoencoder on tuned minus base."""

    variant: ClassVar[str] = "diff_sae"
    target: ClassVar[base.Target] = "difference"

    k: float = 32.0
    """Mean number of latents on a token, over the batch. Too few: rare changes lose to strong ones. Too many: noise is
    coded, and a difference holds more noise than a stream."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(0 < self.k <= self.latents, "k is out of range", f"above 0, at most {self.latents}", self.k)


class DiffSAE(base.Dictionary):
    """BatchTopK sparse autoencoder (Bussmann et al. 2024, 2412.06410) on the centered difference tuned - base.

    As a change, a latent reads tuned minus base and writes its decoder vector into tuned alone. The difference does not
    show whether a feature is new, amplified or moved, and every latent's share is 1 by construction. The explained
    variances of base and tuned are nan, because only the difference is reconstructed. Latent Scaling then measures how
    much of each model's stream lies along the decoder vector.

    Two things differ from the sources. The constant offset is subtracted first instead of left to the decoder bias.
    Decoder vectors are not normalized to length 1. Codes are selected by f |d|, which stays the same if a factor moves
    between f and d, so the same reconstructions are possible.
    """

    Spec = DiffSAESpec
    spec: DiffSAESpec

    def groups(self) -> tuple[base.Group, ...]:
        return (base.Group("all", 0, self.spec.latents, self.spec.k),)

    def objective(self, run: base.Pass) -> dict[str, Tensor]:
        return {"reconstruction": base.mean_squared_error(run)}


VARIANT = DiffSAE
