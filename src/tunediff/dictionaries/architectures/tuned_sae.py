"""Sparse autoencoder on the fine-tuned model alone, for use with Latent Scaling (Minder et al. 2025, 2504.02922)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tunediff.dictionaries.architectures import base


@dataclass(frozen=True)
class TunedSAESpec(base.Spec):
    """Settings of the sparse autoencoder on the fine-tuned model's activations."""

    variant: ClassVar[str] = "tuned_sae"
    target: ClassVar[base.Target] = "tuned"

    k: float = 32.0
    """Mean number of latents on a token, over the batch. Too few: rare features, and so rare changes, get no latent.
    Too many: noise is coded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(0 < self.k <= self.latents, "k is out of range", f"above 0, at most {self.latents}", self.k)


class TunedSAE(base.Dictionary):
    """BatchTopK sparse autoencoder (Bussmann et al. 2024, 2412.06410) on the centered activations of tuned.

    As a change, a latent reads tuned alone and writes d into tuned and beta * d into base. The factors beta are Latent
    Scaling in base, found after training for all latents at once by least squares
    (`tunediff.dictionaries.calibrating.base_writes`). With beta = 0, every feature of both models would count as new,
    and reverting it would remove the feature from tuned. Base's explained variance measures the reconstruction of base
    from tuned's codes. This autoencoder does not see features that fine-tuning removed, and shows a rotated feature as
    weaker.

    Unlike in the source, decoder vectors are not normalized to length 1. Codes are selected by f |d|, which stays the
    same if a factor moves between f and d, so the same reconstructions are possible.
    """

    Spec = TunedSAESpec
    spec: TunedSAESpec

    def groups(self) -> tuple[base.Group, ...]:
        return (base.Group("all", 0, self.spec.latents, self.spec.k),)

    def objective(self, run: base.Pass) -> dict[str, Tensor]:
        return {"reconstruction": base.mean_squared_error(run)}


VARIANT = TunedSAE
