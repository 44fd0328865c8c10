"""Kernels that encode, select and decode; only kernels know how the codes of a batch are stored.

A dictionary calls `encode(x, W, b, gate)` and gets a code. `sparse` stores a code as (token, latent) pairs and sums
over pairs with one of three modules: `native` (compiled, float32 on the CPU), `triton` (float32 on a GPU) or
`torch_ops` (torch's operations, everywhere). `dense` is the reference in tests. A faster path is one more module here,
and needs no change in a dictionary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tunediff.core.axes import check
from tunediff.kernels import memory, paths
from tunediff.kernels.cpu import native
from tunediff.kernels.cpu import products as tiled
from tunediff.kernels.cpu.compiled import serves
from tunediff.kernels.cpu.products import Tiles, tiles
from tunediff.kernels.dense import DenseCode
from tunediff.kernels.gates import Gate
from tunediff.kernels.gpu.code import GpuCode
from tunediff.kernels.matmuls import fast_matmul
from tunediff.kernels.memory import kept_memory
from tunediff.kernels.paths import KernelPath, using
from tunediff.kernels.sparse import PairCode

__all__ = [
    "Adam",
    "Code",
    "Tiles",
    "divergence",
    "divergence_of",
    "encode",
    "fast_matmul",
    "kept_memory",
    "lengths",
    "norm",
    "path",
    "product",
    "products",
    "tiles",
    "using",
]


class Code(Protocol):
    """Codes f (N, F) of a batch, f >= 0, in any storage."""

    def decode(self, decoder_FI: Tensor, cuts: tuple[int, ...] = ()) -> Tensor:
        """Return sum_j f_j W_j over the latents before, between and after the cuts, (N, len(cuts) + 1, I).

        Differentiable in the codes and in W.
        """
        ...

    def weighted(self, weight_F: Tensor) -> Tensor:
        """Return the sum over tokens and latents of f_j * weight_j, a scalar; differentiable in both."""
        ...

    def fired(self) -> Tensor:
        """Return which latents (F,) are on at one token at least; bool."""
        ...

    def count(self) -> Tensor:
        """Return the number of codes that are on in the whole batch, an integer scalar."""
        ...

    def dense(self) -> Tensor:
        """Return the codes as one (N, F) tensor."""
        ...

    # `tunediff.kernels.sparse.PairCode` also has ``among(weight_F, k)``.


BLOCK = 16
"""Rows of logits that torch's operations process at a time, so that they fit the processor's caches."""
PAIRS_LATENTS = 256
"""Fewest latents for which pairs are faster than a dense tensor (measured)."""
PAIRS_SHARE = 0.1
"""Largest share of codes kept for which pairs are faster than a dense tensor (measured)."""


def path(device: torch.device | str = "cpu") -> KernelPath:
    """Return the kernel path for float32 codes on this device; see `using`."""
    probe = torch.empty(0, device=device)
    if serves(probe):
        return "native"
    if paths.on_gpu(probe) is not None:
        return "triton"
    return "torch" if paths.allows("torch") else "dense"


def encode(x_NI: Tensor, encoder_FI: Tensor, bias_F: Tensor, gate: Gate | None) -> Code:
    """Return the codes ReLU(x @ W.T + b) that the gate keeps (every positive one for None).

    Gradients reach W and b through kept codes only.
    """
    (N, _), F = x_NI.shape, len(encoder_FI)
    if gate is not None and sum(keep for *_, keep in gate.parts) <= PAIRS_SHARE * N * F:
        if paths.on_gpu(x_NI, encoder_FI) is not None:
            return GpuCode.encode(x_NI, encoder_FI, bias_F, gate)
        if F >= PAIRS_LATENTS and paths.allows("torch"):
            return PairCode.encode(x_NI, encoder_FI, bias_F, gate)
    return DenseCode.encode(x_NI, encoder_FI, bias_F, gate)


def product(x: Tensor, weight_OI: Tensor | Tiles, few: bool = False) -> Tensor | None:
    """Return x (..., I) @ weight.T in float32, without gradients, as exact as torch's and faster.

    Returns None on processors and for number formats without this product, and for few rows unless `few` is set; use
    torch's product then. Pass `tiles` of a weight to convert it once for many products, which have the same bits.
    """
    if not tiled.multiplies(x, weight_OI, few):
        return None
    return tiled.product(x.reshape(-1, x.shape[-1]), weight_OI).view(*x.shape[:-1], weight_OI.shape[0])


def products(device: torch.device | str = "cpu") -> str:
    """Return the method of large float32 products on this device: "tiles" (see `product`) or "torch"."""
    return "tiles" if serves(torch.empty(0, device=device)) and tiled.on_tiles() else "torch"


class Adam(torch.optim.Adam):
    """Adam (Kingma & Ba 2015, 1412.6980): torch's fused optimizer, or one pass of the compiled kernels.

    The compiled kernels also update data derived from the parameters (see `memory.derived`). `grad_scale`, if set,
    divides the gradients.
    """

    grad_scale: Tensor | None = None

    def __init__(self, parameters: Iterable[Tensor], rate: float, betas: tuple[float, float] = (0.9, 0.999)):
        super().__init__(parameters, lr=rate, betas=betas, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no caller passes a closure
        """Take one step of every parameter that has a gradient."""
        having = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p in having:
            if p.grad.stride() != p.stride():  # torch's fused step ignores strides
                p.grad = torch.empty_like(p).copy_(p.grad)
        if not all(p.is_contiguous() and serves(p, p.grad) for p in having):
            super().step()
            return memory.wrote(*having, *(p.grad for p in having))
        scale = 1.0 if self.grad_scale is None else float(self.grad_scale)
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None and p.numel()):
                state = self.state[p]
                if not state:
                    step = torch.zeros((), dtype=torch.float32, device="cpu")
                    state.update(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["step"] += 1
                t = int(state["step"])
                step, root = group["lr"] / (1 - beta1**t), 1 / math.sqrt(1 - beta2**t)
                numbers = (1 / scale, 1 - beta1, beta2, 1 - beta2, step, root, group["eps"])
                native.adam(p, p.grad, state["exp_avg"], state["exp_avg_sq"], numbers)


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the length of all tensors together, a scalar on their device."""
    if serves(*tensors):
        return native.norm(tensors)
    rows = [tensor.flatten() for tensor in tensors]  # torch's `dot` takes half the time of its `norm`
    return torch.stack([row.dot(row) for row in rows]).sum().sqrt()


def lengths(a: Tensor) -> Tensor:
    """Return the length of each row along the last axis, without gradients; within `kept_memory` lengths are cached."""
    a = a.detach()
    return native.squares(a).sqrt() if serves(a) and a.is_contiguous() else a.norm(dim=-1)


def divergence(p_PV: Tensor, q_QV: Tensor, p_sums: bool = True, q_sums: bool = True) -> Tensor:
    """Return KL(softmax of p || softmax of q) in nat for each row of logits, (R,).

    The operand with fewer rows is repeated a whole number of times; raises NumericsError if that does not fit. Set
    `p_sums` or `q_sums` to False if p or q holds log-probabilities, which need no softmax.
    """
    few, many = sorted((p_PV, q_QV), key=len)
    check(
        many, "RV", R=len(many) // max(1, len(few)) * len(few), V=few.shape[1]
    )  # compiled code would read past the end of the rows
    if serves(p_PV, q_QV):
        return native.divergence(p_PV, q_QV, p_sums, q_sums)
    parts = []
    for at_R in torch.arange(len(many), device=many.device).split(BLOCK):
        p_RV, q_RV = p_PV[at_R % len(p_PV)], q_QV[at_R % len(q_QV)]
        logp_RV, logq_RV = (p_RV.log_softmax(1) if p_sums else p_RV), (q_RV.log_softmax(1) if q_sums else q_RV)
        parts.append((logp_RV - logq_RV).mul_(logp_RV.exp()).sum(1))
    return torch.cat(parts) if parts else p_PV.new_zeros(0)


STARTS = 16
"""Columns from which `divergence_of` estimates the logarithm of a row's softmax sum."""
LEAST = 1e-26
"""Smallest softmax sum, relative to that estimate, for which `divergence_of` trusts its result."""


def divergence_of(x_RD: Tensor, weight_VD: Tensor, kept: Tiles, logp_QV: Tensor, theirs: bool) -> Tensor | None:
    """Return KL(softmax of x @ weight.T || p) in nat for each row (R,), or KL(p || softmax) if `theirs`.

    p is given as log-probabilities, whose rows are repeated, and `kept` is the weight in tiles. The logits are never
    stored. Returns None on processors without tiles, for weights with more than 1,024 columns, and if a row's
    divergence exceeds the range of float32.
    """
    if not tiled.sums_softmax(x_RD, kept, logp_QV):
        return None
    # With l' = l - start, KL(softmax || p) = E[l' - logp] - log(sum of exp(l')) for any start. A start near the
    # logarithm of the sum of exp(l) keeps the summands small, so rounding loses little. The start does not depend on
    # the number of threads.
    some_QS = logp_QV[:, :STARTS]
    start_R = (tiled.product(x_RD, weight_VD[:STARTS]).unflatten(0, (-1, len(some_QS))) - some_QS).mean(2).flatten()
    mass_R, apart_R, whole_R = tiled.softmax_sums(x_RD, kept, logp_QV, start_R, theirs).unbind(1)
    kl_R = whole_R * mass_R.log() - apart_R if theirs else apart_R / mass_R - mass_R.log()
    return kl_R.float() if bool((kl_R.isfinite() & (mass_R > LEAST)).all()) else None
