"""L1 crosscoder (Lindsey, Templeton, Marcus, Conerly, Batson, Olah 2024, "Sparse Crosscoders")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tunediff.dictionaries.architectures import base


@dataclass(frozen=True)
class L1Spec(base.Spec):
    """Settings of the L1 crosscoder."""

    variant: ClassVar[str] = "l1"

    init_norm: float = 0.08
    """Initial length of each model's decoder vector; the source uses .05 to .08."""

    sparsity: float = 0.1
    """Weight of the penalty sum_j f_j w_j (see `base.weighted_norm`). Too small: dense codes. Too large: complete
    shrinkage, which gives false tuned-only latents."""

    ramp: float = 0.05
    """Share of training over which `sparsity` grows from 0. Too short: latents die at the start."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(self.sparsity >= 0, "sparsity is out of range", "at least 0", self.sparsity)
        base.require(0 <= self.ramp <= 1, "ramp is out of range", "0 to 1", self.ramp)


class L1(base.Dictionary):
    """Crosscoder with a ReLU gate, trained on the mean squared error plus the decoder-norm-weighted L1 norm of the
    codes.

    Known fault: complete shrinkage and latent decoupling give false tuned-only latents (Minder et al. 2025,
    2504.02922). The L1 crosscoder serves as the baseline for the other architectures.
    """

    Spec = L1Spec
    spec: L1Spec

    def groups(self) -> tuple[base.Group, ...]:
        return (base.Group("all", 0, self.spec.latents, None),)

    def objective(self, run: base.Pass) -> dict[str, Tensor]:
        ramp = min(1.0, run.progress / self.spec.ramp) if self.spec.ramp else 1.0
        penalty = base.weighted_norm(run, self.weights_F())
        return {"reconstruction": base.mean_squared_error(run), "sparsity": self.spec.sparsity * ramp * penalty}


VARIANT = L1
