"""Gates: which latents of a batch are kept (BatchTopK, threshold), and the help that dead ones get (AuxK)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Part = tuple[int, int, int]
"""Latents [start, stop), and how many codes among them a batch keeps."""


@dataclass(frozen=True, eq=False)
class Gate:
    """What a batch keeps: of each part the largest scaled codes relu(pre) * weight_F. Parts cover the latents in
    order."""

    weight_F: Tensor
    parts: tuple[Part, ...]


_STRIDE = 61  # a prime, so that the sample below never lines up with a latent


def keep(pre_NF: Tensor, weight_F: Tensor, parts: Sequence[Part]) -> Tensor:
    """Flat ascending indices of the codes that a `Gate` keeps; see `largest`."""
    value_NF = torch.relu(pre_NF).mul_(weight_F)
    if len(parts) == 1:
        return largest(value_NF, parts[0][2])
    F, kept = weight_F.numel(), []
    for start, stop, count in parts:
        at, size = largest(value_NF[:, start:stop], count), stop - start
        kept.append(at.div(size, rounding_mode="floor") * F + at % size + start)
    return torch.cat(kept).sort().values


def batch_topk(value_NF: Tensor, k: float) -> Tensor:
    """Flat indices, ascending, of the round(N*k) largest positive values of the whole batch (Bussmann et al.
    2024); `k`, the mean kept a token, may be fractional. See `largest`."""
    return largest(value_NF, round(value_NF.shape[0] * k))


def largest(value_NF: Tensor, keep: int) -> Tensor:
    """Flat indices, ascending, of the `keep` largest positive values.

    `value_NF`: the scaled codes v = f*w (>= 0). Fewer are returned only if fewer are positive. Of equal values
    at the border the earlier in flat order is kept, so the answer does not depend on how it was computed. A
    strided sample proposes a cut, everything above it
    is a candidate, and the exact cut is made among the candidates; if the proposal was too high it falls
    back to all positive values.
    """
    flat_P = value_NF.detach().reshape(-1)
    keep = min(keep, flat_P.numel())
    if keep <= 0:
        return flat_P.new_zeros(0, dtype=torch.long)
    at_P = None
    if flat_P.numel() > 1 << 15:
        sample = flat_P[::_STRIDE]
        rank = int(sample.numel() * keep / flat_P.numel() * 1.25) + 16
        if rank < sample.numel() // 2:
            cut = torch.topk(sample, rank, sorted=True).values[-1].clamp_min(0)
            at_P = (flat_P > cut).nonzero().squeeze(1)
            if at_P.numel() < keep and cut > 0:
                at_P = None
    if at_P is None:
        at_P = (flat_P > 0).nonzero().squeeze(1)
    if at_P.numel() <= keep:
        return at_P
    found_P = flat_P[at_P]
    border = torch.topk(found_P, keep, sorted=True).values[-1]
    above, equal = found_P > border, found_P == border
    wanted = keep - int(above.sum())
    return at_P[above | (equal & (equal.cumsum(0) <= wanted))]


def threshold_gate(pre_NF: Tensor, threshold_F: Tensor) -> Tensor:
    """Codes at inference: f = pre where pre exceeds its latent's threshold (>= 0), else 0."""
    return torch.where(pre_NF > threshold_F, pre_NF, torch.zeros_like(pre_NF))


def calibrate(values: list[Tensor], keep: int) -> float:
    """The threshold above which exactly `keep` of the pooled positive values lie; 0 if there are no more
    than that."""
    pool = torch.cat([v[v > 0] for v in values]) if values else torch.zeros(0)
    if keep >= pool.numel():
        return 0.0
    if keep <= 0:
        return float("inf")
    both = torch.topk(pool, keep + 1, sorted=True).values[-2:].double()
    middle = float(both.mean())
    return middle if float(both[1]) < middle else float(both[1])


class _AuxK(torch.autograd.Function):
    """`auxk` and its gradient, over rows of the dead alone. That is added to the parameters' own at those rows, where autograd would
    write and add tensors of the parameters' size."""

    @staticmethod
    def forward(ctx, x_NI, error_NI, encoder, bias_F, decoder, norm_F, dead_D, k):  # noqa: D102
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
    def backward(ctx, grad):  # noqa: D102
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
    """AuxK (Gao et al. 2024, 2406.04093): how badly the best `k` dead latents a token explain what is left
    over.

    Only rows of dead latents enter, so live ones get no gradient and the cost follows the number of dead
    ones. The target (the error) is detached and the decoder bias stays out. In units of the error's variance
    over the batch; 0 where nothing is left over, and a non-finite value counts as 0. Selected on f*w, as everywhere in a
    crosscoder. `encoder` and `decoder` are parameters, latents first: `backward` adds to their gradients, and
    `torch.autograd.grad` does not see them.
    """
    dead_D = dead_F.nonzero().squeeze(1)
    if not len(dead_D):
        return x_NI.new_zeros(())
    return _AuxK.apply(x_NI, error_NI.detach(), encoder, bias_F, decoder, norm_F, dead_D, k)


def unexplained(error_NI: Tensor, explained_NI: Tensor) -> Tensor:
    """Mean square of what is left of the error, in units of its variance over the batch; see `auxk`."""
    target = error_NI.detach()
    return torch.nan_to_num(
        (target - explained_NI).square().mean() / variance_of(target), nan=0.0, posinf=0.0, neginf=0.0
    )


def variance_of(error_NI: Tensor) -> Tensor:
    """The variance over the batch; infinite where there is none, before anybody divides: a 0/0 would reach the gradient."""
    variance = (error_NI - error_NI.mean(0)).square_().mean()
    return variance.masked_fill(~(variance > 0), torch.inf)
