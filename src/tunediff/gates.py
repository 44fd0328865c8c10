"""Gates: which latents of a batch are kept (BatchTopK, threshold), and the help that dead ones get (AuxK)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import torch
from torch import Tensor

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


class _Rows(torch.autograd.Function):
    """Rows of a parameter, flat. Their gradient is added to the parameter's own at those rows alone, where autograd would
    write and add a tensor of the parameter's size."""

    @staticmethod
    def forward(ctx, whole, at):  # noqa: D102
        ctx.whole, ctx.at = whole, at
        return whole.detach().view(len(whole), -1)[at]

    @staticmethod
    def backward(ctx, grad):  # noqa: D102
        if ctx.whole.grad is None:
            ctx.whole.grad = torch.zeros_like(ctx.whole)
        ctx.whole.grad.view(len(ctx.whole), -1).index_add_(0, ctx.at, grad)
        return None, None


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
    dead = dead_F.nonzero().squeeze(1)
    if not len(dead):
        return x_NI.new_zeros(())
    f = torch.relu(x_NI @ _Rows.apply(encoder, dead).T + bias_F[dead])
    if k < len(dead):
        top = torch.topk((f * norm_F[dead]).detach(), k, dim=1).indices
        f = torch.zeros_like(f).scatter(1, top, f.gather(1, top))
    return unexplained(error_NI, f @ _Rows.apply(decoder, dead))


def unexplained(error_NI: Tensor, explained_NI: Tensor) -> Tensor:
    """Mean square of what is left of the error, in units of its variance over the batch; see `auxk`."""
    target = error_NI.detach()
    variance = (target - target.mean(0)).square().mean()
    variance = variance.masked_fill(~(variance > 0), torch.inf)  # before dividing: a 0/0 would reach the gradient
    return torch.nan_to_num(
        (target - explained_NI).square().mean() / variance, nan=0.0, posinf=0.0, neginf=0.0
    )
