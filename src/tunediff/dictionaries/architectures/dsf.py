"""Crosscoder with designated shared features (Mishra-Sharma et al. 2025, "Insights on Crosscoder Model
Diffing")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tunediff.dictionaries.architectures import base


@dataclass(frozen=True)
class DSFSpec(base.Spec):
    """Settings of the crosscoder with designated shared features."""

    variant: ClassVar[str] = "dsf"

    k: float = 32.0
    """Mean number of latents on a token, over both groups. Too few: rare changes lose to common features. Too many:
    noise is coded."""

    shared_share: float = 0.1
    """Share of the latents in the designated shared group, which comes first. Too small: free latents code common
    features. Too large: few latents are left for differences."""

    shared_density: float = 2.0
    """Firing rate of a designated latent relative to a free one. 1: the groups differ by their decoders alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(
            0 < self.shared_share < 1 and 0 < self.shared < self.latents,
            "shared_share is out of range",
            "above 0, below 1, and a latent in each group",
            self.shared_share,
        )
        base.require(self.shared_density > 0, "shared_density is out of range", "above 0", self.shared_density)
        base.require(
            0 < self.k <= self.latents and self.k_shared <= self.shared and self.k_free <= self.latents - self.shared,
            "k is out of range",
            f"above 0, at most {self.latents}, and in each group at most its latents",
            self.k,
        )

    @property
    def shared(self) -> int:
        """Number of designated latents."""
        return round(self.latents * self.shared_share)

    @property
    def k_shared(self) -> float:
        """Mean number of designated latents on a token."""
        dense = self.shared_density * self.shared
        return self.k * dense / (dense + self.latents - self.shared)

    @property
    def k_free(self) -> float:
        """Mean number of free latents on a token."""
        return self.k - self.k_shared


class DSF(base.Dictionary):
    """Crosscoder with two BatchTopK groups, of which a small one has one decoder vector for both models.

    The designated group fires more often and takes up the shared features, so that free latents need not code them. The
    source ties the decoders of the designated group and lowers its L1 penalty. Here both groups have a BatchTopK gate,
    as in later comparisons (Kassem et al. 2026, 2603.04426), and a higher density replaces the lower penalty. Encoders
    stay free. `k` is the sum over both groups, so L0 is comparable with one-gate dictionaries. Nothing forces a free
    latent to be exclusive to one model.
    """

    Spec = DSFSpec
    spec: DSFSpec

    def groups(self) -> tuple[base.Group, ...]:
        shared, F = self.spec.shared, self.spec.latents
        return (
            base.Group("shared", 0, shared, self.spec.k_shared, (base.Held("shared", 0, shared),)),
            base.Group("free", shared, F, self.spec.k_free),
        )

    def objective(self, run: base.Pass) -> dict[str, Tensor]:
        return {"reconstruction": base.mean_squared_error(run)}


VARIANT = DSF
