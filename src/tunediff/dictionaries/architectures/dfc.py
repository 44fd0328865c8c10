"""Dedicated Feature Crosscoder (Jiralerspong & Bricken 2026, 2602.11729)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tunediff.dictionaries.architectures import base


@dataclass(frozen=True)
class DFCSpec(base.Spec):
    """Settings of the Dedicated Feature Crosscoder."""

    variant: ClassVar[str] = "dfc"

    k: float = 32.0
    """Mean number of latents on a token, over the batch and all groups together."""

    exclusive_share: float = 0.05
    """Share of the latents that are exclusive to each model (the source: .01, .03, .05). Too small: changes get no
    latent. Too large: features of both models are learned twice, and look like changes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(0 < self.k <= self.latents, "k is out of range", f"above 0, at most {self.latents}", self.k)
        base.require(
            0 <= self.exclusive_share < 0.5 and 2 * self.exclusive < self.latents,
            "exclusive_share is out of range",
            "0 to below .5, and a latent left for both",
            self.exclusive_share,
        )

    @property
    def exclusive(self) -> int:
        """Number of latents that are exclusive to each model."""
        return round(self.latents * self.exclusive_share)


class DFC(base.Dictionary):
    """BatchTopK crosscoder with latents that are exclusive to one model: the first to base, the next to tuned.

    The other model's encoder rows and decoder vectors of an exclusive latent are exactly 0, in AuxK too. One gate
    covers all three groups, as in the source. The source anneals k from 5 times its final value; set `fit.anneal_from`
    for that. A share of 0 or 1 holds by construction, so it is no evidence of a change: run Latent Scaling.
    """

    Spec = DFCSpec
    spec: DFCSpec

    def groups(self) -> tuple[base.Group, ...]:
        own = self.spec.exclusive
        held = (base.Held("base", 0, own), base.Held("tuned", own, 2 * own))
        return (base.Group("both", 0, self.spec.latents, self.spec.k, held),)

    def objective(self, run: base.Pass) -> dict[str, Tensor]:
        return {"reconstruction": base.mean_squared_error(run)}


VARIANT = DFC
