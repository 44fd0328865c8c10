"""Sparse autoencoder on the tuned model alone, to be read with Latent Scaling (Minder et al. 2025, 2504.02922)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tunediff.dictionaries.architectures import base


@dataclass(frozen=True)
class TunedSAESpec(base.Spec):
    """Settings of the SAE on tuned's activations."""

    variant: ClassVar[str] = "tuned_sae"
    target: ClassVar[base.Target] = "tuned"

    k: float = 32.0
    """Latents on a token, on average over the batch. Too few: rare features, and so rare changes, get none. Too
    many: noise is coded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(0 < self.k <= self.latents, "k is out of range", f"above 0, at most {self.latents}", self.k)


class TunedSAE(base.Dictionary):
    """A BatchTopK SAE (Bussmann et al. 2024, 2412.06410) on the centered activations of tuned.

    As a change, a latent reads tuned alone and writes d into tuned and beta * d into base, with beta its Latent
    Scaling in base, found for all latents at once by least squares after training
    (`tunediff.dictionaries.calibrating.base_writes`). With 0 instead every feature that both models have would claim to be new,
    and taking it out would take it out of tuned altogether. Base's explained variance is then what tuned's codes
    say of base, and the difference's what those betas leave of it. It is blind to what tuning removed, and a
    feature that was turned reads as weaker.

    Where we part from the source: decoder vectors are not brought to length 1. Codes are selected by f |d|,
    which does not change when length moves from one to the other, so the reconstructions within reach are the
    same.
    """

    Spec = TunedSAESpec
    spec: TunedSAESpec

    def groups(self) -> tuple[base.Group, ...]:
        return (base.Group("all", 0, self.spec.latents, self.spec.k),)

    def objective(self, run: base.Pass) -> dict[str, Tensor]:
        return {"reconstruction": base.mean_squared_error(run)}


VARIANT = TunedSAE
