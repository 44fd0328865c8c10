"""BatchTopK crosscoder with a small penalty on the norm-weighted codes, so that fewer than k may stay on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tunediff.dictionaries.architectures import base


@dataclass(frozen=True)
class HybridSpec(base.Spec):
    """Settings of the hybrid crosscoder."""

    variant: ClassVar[str] = "hybrid"

    k: float = 32.0
    """Largest mean number of latents on a token, over the batch; the penalty may leave fewer."""

    norm_penalty: float = 0.05
    """Weight of the penalty sum_j f_j w_j (see `base.weighted_norm`). 0: BatchTopK, whose tuned-only latents still
    write into base. Too large: complete shrinkage, as in the L1 crosscoder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(0 < self.k <= self.latents, "k is out of range", f"above 0, at most {self.latents}", self.k)
        base.require(self.norm_penalty >= 0, "norm_penalty is out of range", "at least 0", self.norm_penalty)


class Hybrid(base.Dictionary):
    """BatchTopK crosscoder (2504.02922) with a small penalty of Lindsey et al. 2024, which corrects decoder norms.

    This combination is not published. It was measured on planted changes only, so test it on your models first.
    """

    Spec = HybridSpec
    spec: HybridSpec

    def groups(self) -> tuple[base.Group, ...]:
        return (base.Group("all", 0, self.spec.latents, self.spec.k),)

    def objective(self, run: base.Pass) -> dict[str, Tensor]:
        return {
            "reconstruction": base.mean_squared_error(run),
            "norm": self.spec.norm_penalty * base.weighted_norm(run, self.weights_F()),
        }


VARIANT = Hybrid
