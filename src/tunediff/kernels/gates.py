"""Gates that select the codes of a batch (BatchTopK, threshold), and the AuxK loss that revives dead latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Part = tuple[int, int, int]
"""(start, stop, count): a batch keeps `count` codes among latents [start, stop)."""


@dataclass(frozen=True, eq=False)
class Gate:
    """Selection of a batch's largest scaled codes relu(pre) * weight_F in each part; parts cover the latents in
    order."""

    weight_F: Tensor
    parts: tuple[Part, ...]


SAMPLE = 1 << 18
"""Codes sampled to propose a threshold; of an eighth as many codes or fewer, no sample is taken."""


def keep(pre_NF: Tensor, weight_F: Tensor, parts: Sequence[Part]) -> Tensor:
    """Return flat ascending indices of the codes that a `Gate` keeps: each part's largest positive v = relu(pre) * w.

    Fewer codes are kept only if fewer are positive. Of equal values at the border, the earlier in flat order is kept,
    so every kernel gives the same answer. A sample proposes a threshold, and the exact selection is made among the
    codes above it. If the proposed threshold was too high, all positive codes are candidates.
    """
    F, kept = pre_NF.shape[1], []
    for start, stop, count in parts:
        token_P, latent_P = _largest(pre_NF.detach()[:, start:stop], weight_F[start:stop], count)
        kept.append(token_P * F + latent_P + start)
    return kept[0] if len(kept) == 1 else torch.cat(kept).sort().values


def batch_topk(value_NF: Tensor, k: float) -> Tensor:
    """Return flat ascending indices of the round(N*k) largest positive values of the batch (Bussmann et al. 2024).

    `k` is the mean number kept on a token and may be fractional. See `keep`.
    """
    N, F = value_NF.shape
    return keep(value_NF, value_NF.new_ones(F), ((0, F, round(N * k)),))


def _largest(pre_NF: Tensor, weight_F: Tensor, count: int) -> tuple[Tensor, Tensor]:
    cut, count = proposed(pre_NF, weight_F, count), min(count, pre_NF.numel())
    while True:
        flat_P = (pre_NF > needed(cut, weight_F)).view(-1).nonzero()[:, 0]  # `best` removes what rounding let in
        token_P, latent_P = places(flat_P, pre_NF.shape[1])
        value_P = pre_NF[token_P, latent_P] * weight_F[latent_P]
        kept_P = best(value_P, cut, count)
        if kept_P is not None:
            return token_P[kept_P], latent_P[kept_P]
        cut = 0.0


def proposed(pre_NF: Tensor, weight_F: Tensor, count: int) -> float:
    """Estimate from a sample a threshold that slightly more than `count` scaled codes exceed; 0 for few codes or large
    counts."""
    total = pre_NF.numel()
    stride = max(61, total // SAMPLE)  # a prime: a divisor of the number of columns would always sample the same ones
    while math.gcd(stride, pre_NF.shape[1]) > 1:
        stride += 1
    share = -(-total // stride) * count / max(1, total)
    rank = int(share + 5 * math.sqrt(share)) + 16
    if total <= SAMPLE // 8 or rank >= total // stride // 2:
        return 0.0
    token_S, latent_S = places(torch.arange(0, total, stride, device=pre_NF.device), pre_NF.shape[1])
    value_S = pre_NF[token_S, latent_S].to(weight_F) * weight_F[latent_S]
    return max(0.0, float(torch.topk(value_S, rank, sorted=True).values[-1]))


def needed(cut: float, weight_F: Tensor) -> Tensor:
    """Return the threshold (F,) on unscaled codes for which scaled codes exceed the cut, lowered by the rounding
    error."""
    return torch.where(weight_F > 0, cut / weight_F * (1 - 8 * torch.finfo(weight_F.dtype).eps), torch.inf)


def places(flat_P: Tensor, F: int) -> tuple[Tensor, Tensor]:
    """Return the rows and columns of flat indices."""
    row_P = flat_P.div(F, rounding_mode="floor")
    return row_P, flat_P - row_P * F


def best(value_P: Tensor, cut: float, count: int) -> Tensor | None:
    """Return the indices, ascending, of the `count` largest values above the cut; of equal values the first.

    If fewer values exceed the cut, return all of them for cut = 0, else None.
    """
    above_P = (value_P > cut).nonzero()[:, 0]
    if len(above_P) <= count:
        return above_P if len(above_P) == count or cut == 0 else None
    if count <= 0:
        return above_P[:0]
    value_P = value_P[above_P]
    border = torch.topk(value_P, count, sorted=False).values.min()
    above, equal = value_P > border, value_P == border
    wanted = count - int(above.sum())
    return above_P[above | (equal & (equal.cumsum(0) <= wanted))]


def threshold_gate(pre_NF: Tensor, threshold_F: Tensor) -> Tensor:
    """Return the codes at inference: f = pre if pre exceeds its latent's threshold (>= 0), else 0."""
    return torch.where(pre_NF > threshold_F, pre_NF, torch.zeros_like(pre_NF))


def calibrate(values: list[Tensor], keep: int) -> float:
    """Return the threshold that exactly `keep` of the pooled positive values exceed; 0 if no more values are
    positive."""
    pool = torch.cat([v[v > 0] for v in values]) if values else torch.zeros(0)
    if keep >= pool.numel():
        return 0.0
    if keep <= 0:
        return float("inf")
    both = torch.topk(pool, keep + 1, sorted=True).values[-2:].double()
    middle = float(both.mean())
    return middle if float(both[1]) < middle else float(both[1])


class _AuxK(torch.autograd.Function):
    """`auxk` with a gradient for the rows of dead latents only.

    `backward` adds to the parameters' gradients at those rows, because autograd would allocate and add tensors of the
    parameters' full size.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        error_NI: Tensor,
        encoder: Tensor,
        bias_F: Tensor,
        decoder: Tensor,
        norm_F: Tensor,
        dead_D: Tensor,
        k: int,
    ) -> Tensor:
        read_DI, write_DI = (whole.view(len(whole), -1)[dead_D] for whole in (encoder, decoder))
        f_ND = torch.addmm(bias_F[dead_D], x_NI, read_DI.T).relu_()
        if k < len(dead_D):
            top = torch.topk(f_ND * norm_F[dead_D], k, dim=1).indices
            f_ND = torch.zeros_like(f_ND).scatter_(1, top, f_ND.gather(1, top))
        left_NI, variance = torch.addmm(error_NI, f_ND, write_DI, alpha=-1), variance_of(error_NI)
        ctx.save_for_backward(x_NI, f_ND, write_DI, left_NI, variance)
        ctx.parameters, ctx.dead_D = (encoder, bias_F, decoder), dead_D
        return torch.nan_to_num(left_NI.square().mean() / variance, nan=0.0, posinf=0.0, neginf=0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        x_NI, f_ND, write_DI, left_NI, variance = ctx.saved_tensors
        of_explained_NI = left_NI * (grad * -2 / (variance * left_NI.numel()))
        of_f_ND = (of_explained_NI @ write_DI.T).masked_fill_(f_ND == 0, 0.0)
        for whole, part in zip(ctx.parameters, (of_f_ND.T @ x_NI, of_f_ND.sum(0)[:, None], f_ND.T @ of_explained_NI)):
            if whole.grad is None:
                whole.grad = torch.zeros_like(whole)
            whole.grad.view(len(whole), -1).index_add_(0, ctx.dead_D, part)
        return (None,) * 8


def auxk(
    x_NI: Tensor,
    error_NI: Tensor,
    encoder: Tensor,
    bias_F: Tensor,
    decoder: Tensor,
    norm_F: Tensor,
    dead_F: Tensor,
    k: int,
) -> Tensor:
    """Return the AuxK loss (Gao et al. 2024, 2406.04093): error left after each token's best `k` dead latents
    reconstruct it.

    The loss is in units of the error's variance over the batch, and 0 if the error is 0 or the loss is not finite. Dead
    latents are selected by f*w. Live latents get no gradient, and the cost follows the number of dead ones. The error
    is detached, and the decoder bias is not used. `encoder` and `decoder` are parameters with latents along the first
    axis. `backward` adds to their gradients directly, so `torch.autograd.grad` does not see these gradients.
    """
    dead_D = dead_F.nonzero().squeeze(1)
    if not len(dead_D):
        return x_NI.new_zeros(())
    loss: Tensor = _AuxK.apply(x_NI, error_NI.detach(), encoder, bias_F, decoder, norm_F, dead_D, k)  # type: ignore[no-untyped-call]
    return loss


def unexplained(error_NI: Tensor, explained_NI: Tensor) -> Tensor:
    """Return the mean square of the unexplained error, in units of the error's variance over the batch; see `auxk`."""
    target = error_NI.detach()
    return torch.nan_to_num(
        (target - explained_NI).square().mean() / variance_of(target), nan=0.0, posinf=0.0, neginf=0.0
    )


def variance_of(error_NI: Tensor) -> Tensor:
    """Return the variance over the batch, or infinity for 0, because 0/0 would put nan into gradients."""
    variance = (error_NI - error_NI.mean(0)).square_().mean()
    return variance.masked_fill(~(variance > 0), torch.inf)
