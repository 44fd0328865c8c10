"""BatchTopK crosscoder (Minder, Dumas, Juang, Chughtai, Nanda 2025, 2504.02922)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tunediff.dictionaries.architectures import base


@dataclass(frozen=True)
class BatchTopKSpec(base.Spec):
    """Settings of the BatchTopK crosscoder."""

    variant: ClassVar[str] = "batchtopk"

    k: float = 32.0
    """Mean number of latents on a token, over the batch. Too few: rare changes lose to common features. Too many: noise
    is coded, and tuned-only latents still write into base."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(0 < self.k <= self.latents, "k is out of range", f"above 0, at most {self.latents}", self.k)


class BatchTopK(base.Dictionary):
    """Crosscoder trained on the mean squared error, with one BatchTopK gate over all latents.

    The paper minimizes half the squared norm. The mean over elements, used here, differs by a constant factor.
    """

    Spec = BatchTopKSpec
    spec: BatchTopKSpec

    def groups(self) -> tuple[base.Group, ...]:
        return (base.Group("all", 0, self.spec.latents, self.spec.k),)

    def objective(self, run: base.Pass) -> dict[str, Tensor]:
        return {"reconstruction": base.mean_squared_error(run)}


VARIANT = BatchTopK
