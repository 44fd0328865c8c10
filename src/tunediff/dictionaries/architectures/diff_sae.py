"""Sparse autoencoder on the difference of the models' activations (Aranguri, Drori, Nanda 2025, "SAE on activation
differences"; Dumas, Minder, Nanda 2025, "What We Learned Trying to Diff Base and Chat Models")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tunediff.dictionaries.architectures import base


@dataclass(frozen=True)
class DiffSAESpec(base.Spec):
    """Settings of the SAE on tuned - base."""

    variant: ClassVar[str] = "diff_sae"
    target: ClassVar[base.Target] = "difference"

    k: float = 32.0
    """Latents on a token, on average over the batch. Too few: rare changes lose to strong ones. Too many: noise
    is coded, and a difference has more of it than a stream."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(0 < self.k <= self.latents, "k is out of range", f"above 0, at most {self.latents}", self.k)


class DiffSAE(base.Dictionary):
    """A BatchTopK SAE (Bussmann et al. 2024, 2412.06410) on the centered difference tuned - base.

    As a change, a latent reads tuned minus base and writes its decoder vector into tuned alone: the difference is
    all it knows, so it cannot say whether a feature is new, amplified or moved. Its share is 1 by construction.
    Only the difference is reconstructed: the streams' own explained variances are not defined (nan). Latent
    Scaling then asks how much of either stream itself lies along the vector.

    Where we part from the sources: the constant offset is taken off before and not left to the decoder bias,
    and decoder vectors are not brought to length 1. Codes are selected by f |d|, which does not change when
    length moves from one to the other, so the reconstructions within reach are the same.
    """

    Spec = DiffSAESpec
    spec: DiffSAESpec

    def groups(self) -> tuple[base.Group, ...]:
        return (base.Group("all", 0, self.spec.latents, self.spec.k),)

    def objective(self, run: base.Pass) -> dict[str, Tensor]:
        return {"reconstruction": base.mean_squared_error(run)}


VARIANT = DiffSAE
