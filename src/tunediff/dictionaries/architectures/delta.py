"""Delta-Crosscoder (Kassem, Jiralerspong, Rostamzadeh, Farnadi 2026, 2603.04426)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from tunediff.core.axes import BASE, TUNED
from tunediff.dictionaries.architectures import base


@dataclass(frozen=True)
class DeltaSpec(base.Spec):
    """Settings of the Delta-Crosscoder."""

    variant: ClassVar[str] = "delta"

    shared_share: float = 0.2
    """Share of the latents (0 to 1) in the shared group, which comes first. 0 or 1 leaves one group."""

    k_shared: float = 8.0
    """Mean number of shared latents on a token: an absolute number, not a multiplier."""

    k_delta: float = 16.0
    """Mean number of delta latents on a token. Too few: rare changes lose to common ones."""

    lambda_delta: float = 0.05
    """Weight of the delta loss, which is divided by the variance of delta. 0: plain two-group BatchTopK (the first
    ablation). Too large: latents explain delta alone, and both models are reconstructed badly."""

    masked: bool = True
    """Whether the delta loss uses the delta latents alone. Without the mask (an ablation) the loss is
    |e^tuned - e^base|^2, which only rewards correlated errors."""

    single_k: bool = False
    """Whether both groups share one gate of k_shared + k_delta (an ablation). Delta latents then compete with shared
    ones."""

    from_differences: bool = True
    """Whether delta latents are initialized from differences of training activations. Random vectors read what both
    models share, and a few hundred steps hardly turn them to a difference of some percent of the stream."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base.require(0 <= self.shared_share <= 1, "shared_share is out of range", "0 to 1", self.shared_share)
        shared, both = self.shared, self.latents
        if shared:
            base.require(
                0 < self.k_shared <= shared, "k_shared is out of range", f"above 0, at most {shared}", self.k_shared
            )
        if both - shared:
            base.require(
                0 < self.k_delta <= both - shared,
                "k_delta is out of range",
                f"above 0, at most {both - shared}",
                self.k_delta,
            )
        base.require(self.lambda_delta >= 0, "lambda_delta is out of range", "at least 0", self.lambda_delta)

    @property
    def shared(self) -> int:
        """Number of latents in the shared group."""
        return round(self.latents * self.shared_share)

    @property
    def cuts(self) -> tuple[int, ...]:
        """Border between the groups if the delta loss is used; see `base.Spec.cuts`."""
        return (self.shared,) if self.lambda_delta and 0 < self.shared < self.latents else ()


class Delta(base.Dictionary):
    """Crosscoder with two BatchTopK groups and a second loss: the delta latents alone must explain tuned minus base.

    With a for base and b for tuned, and z the code with shared entries set to 0, the loss is
    (MSE_a + MSE_b)/2 + lambda_delta * |delta - (W^b - W^a) z|^2 / Var(delta).
    Shared latents get no gradient from the second term.

    Four things differ from the source. Each group has an absolute k. The second term is divided by the variance of
    delta over the training tokens; undivided, it is about .001 of the loss for narrow fine-tuning. The difference of
    the decoder biases is subtracted from delta, so without the mask the term is exactly |e^b - e^a|^2. Each delta
    latent is initialized from the centered difference at one training token (see `base.Dictionary.begin`).
    """

    Spec = DeltaSpec
    spec: DeltaSpec

    def groups(self) -> tuple[base.Group, ...]:
        shared, F = self.spec.shared, self.spec.latents
        both = (base.Group("shared", 0, shared, self.spec.k_shared), base.Group("delta", shared, F, self.spec.k_delta))
        some = tuple(group for group in both if group.stop > group.start)
        first = shared if self.spec.from_differences and len(some) == 2 else None
        if self.spec.single_k:
            return (base.Group("single", 0, F, sum(group.k or 0.0 for group in some), differences=first),)
        return (*some[:-1], replace(some[-1], differences=first))

    def objective(self, run: base.Pass) -> dict[str, Tensor]:
        parts = {"reconstruction": base.mean_squared_error(run)}
        if self.spec.lambda_delta:
            term = self.delta_error(run, self.spec.shared if self.spec.masked else 0)
            parts["delta"] = self.spec.lambda_delta * term / self.delta_variance.clamp_min(1e-12)
        return parts

    def delta_error(self, run: base.Pass, start: int) -> Tensor:
        """Return the mean squared error of delta as explained by latents from `start` on: the delta group, or all for
        0."""
        parts_NSMD = sum(run.parts[:-1], run.parts[-1]) if start == 0 else run.parts[-1]
        bias_SD = self.decoder_bias_SMD[:, TUNED] - self.decoder_bias_SMD[:, BASE]
        return (base.delta_of(run.x_NSMD - parts_NSMD) - bias_SD).square().mean()


VARIANT = Delta
