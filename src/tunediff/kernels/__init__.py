"""Kernels: encode, select and decode, the only code that knows how a batch of codes lies in memory.

A dictionary calls `encode(x, W, b, gate)` and gets a code. `pairs` holds one as the kept (token, latent) pairs and adds
up with a module of kernels: `native` (compiled, float32 on the CPU), `triton` (float32 on a GPU) or `torch_ops` (torch's
operations, everywhere); `dense` is the reference that all are tested against. A faster path is one more module here; no
dictionary changes for it. `norm` and `divergence` are sums over much memory that the compiled file takes in one pass, and
`product` is what a model's linear layers spend their time on.
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
from tunediff.kernels.cpu.native import Tiles, tiles
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
    "gated",
    "kept_memory",
    "lengths",
    "norm",
    "path",
    "product",
    "products",
    "rms_norm",
    "rotated",
    "tiles",
    "using",
]


class Code(Protocol):
    """The codes f (N, F) of a batch, however stored; f >= 0."""

    def decode(self, decoder_FI: Tensor, cuts: tuple[int, ...] = ()) -> Tensor:
        """sum_j f_j W_j over the latents before, between and after the cuts, (N, len(cuts) + 1, I); differentiable in
        the codes and in W."""

    def weighted(self, weight_F: Tensor) -> Tensor:
        """sum over tokens and latents of f_j * weight_j, a scalar; differentiable in both."""

    def fired(self) -> Tensor:
        """Which latents (F,) are on at one token at least; bool."""

    def count(self) -> Tensor:
        """How many codes are on in the whole batch; an integer scalar."""

    def dense(self) -> Tensor:
        """The codes as one (N, F) tensor."""

    # Where pairs are held also ``among(weight_F, k)``, see `tunediff.kernels.sparse`.


BLOCK = 16
"""Rows of logits that torch's operations go through at a time: all of a batch's fit no cache."""
PAIRS_LATENTS, PAIRS_SHARE = 256, 0.1
"""From this many latents on, and up to this share of them kept, pairs are faster than a dense tensor
(measured)."""


def path(device: torch.device | str = "cpu") -> KernelPath:
    """Return which kernels add up float32 codes on this device; see `using`."""
    probe = torch.empty(0, device=device)
    if native.serves(probe):
        return "native"
    if paths.on_gpu(probe) is not None:
        return "triton"
    return "torch" if paths.allows("torch") else "dense"


def encode(x_NI: Tensor, encoder_FI: Tensor, bias_F: Tensor, gate: Gate | None) -> Code:
    """ReLU(x @ W.T + b), kept where the gate says (None keeps every positive one); gradients reach W and b through
    kept codes only."""
    (N, _), F = x_NI.shape, len(encoder_FI)
    few = gate is not None and sum(keep for *_, keep in gate.parts) <= PAIRS_SHARE * N * F
    if few and paths.on_gpu(x_NI, encoder_FI) is not None:
        return GpuCode.encode(x_NI, encoder_FI, bias_F, gate)
    if few and F >= PAIRS_LATENTS and paths.allows("torch"):
        return PairCode.encode(x_NI, encoder_FI, bias_F, gate)
    return DenseCode.encode(x_NI, encoder_FI, bias_F, gate)


def product(x: Tensor, weight_OI: Tensor | Tiles, few: bool = False) -> Tensor | None:
    """x (..., I) @ weight.T in float32, without gradients, as exact as torch's and faster; None where torch is to make it: on other
    machines, of other kinds of numbers, of few rows unless asked for. `tiles` of a weight serve many products, with the same bits."""
    if not native.multiplies(x, weight_OI, few):
        return None
    return native.product(x.reshape(-1, x.shape[-1]), weight_OI).view(*x.shape[:-1], weight_OI.shape[0])


def products(device: torch.device | str = "cpu") -> str:
    """Who makes a model's large float32 products on this device: "tiles" (`product`) or "torch"."""
    return "tiles" if native.serves(torch.empty(0, device=device)) and native.on_tiles() else "torch"


def rms_norm(x: Tensor, weight_I: Tensor, epsilon: float) -> Tensor | None:
    """weight * x / sqrt(mean of x * x + epsilon) of each row of x (..., I), without gradients, in one pass; None where that does not
    serve."""
    if not native.passes(x, weight_I) or x.shape[-1:] != weight_I.shape:
        return None
    return native.rms_norm(x.reshape(-1, len(weight_I)), weight_I, epsilon).view(x.shape)


def gated(gate: Tensor, up: Tensor) -> Tensor | None:
    """gate * sigmoid(gate) * up, without gradients, in one pass; None where that does not serve."""
    return native.gated(gate, up) if native.passes(gate, up) and gate.shape == up.shape else None


def rotated(x_BHTE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor) -> Tensor | None:
    """x * cos + (the second half of x negated, then the first) * sin, without gradients, in one pass; the angles are those of one batch
    or of each. None where that does not serve."""
    (B, _, T, E), angles = x_BHTE.shape, cos_BTE.shape
    if (
        not native.passes(x_BHTE, cos_BTE)
        or not native.serves(sin_BTE)
        or E % 2
        or angles not in ((1, T, E), (B, T, E))
        or sin_BTE.shape != angles
    ):
        return None
    return native.rotated(x_BHTE, cos_BTE, sin_BTE)


class Adam(torch.optim.Adam):
    """Adam (Kingma & Ba 2015, 1412.6980): torch's fused one, or one pass of the compiled kernels, which also bring up to date what they have
    derived of the parameters. `grad_scale`, if set, divides the gradients."""

    grad_scale: Tensor | None = None

    def __init__(self, parameters: Iterable[Tensor], rate: float, betas: tuple[float, float] = (0.9, 0.999)):
        super().__init__(parameters, lr=rate, betas=betas, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of every parameter that has a gradient."""
        having = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p in having:
            if p.grad.stride() != p.stride():  # torch's fused step takes numbers as they lie
                p.grad = torch.empty_like(p).copy_(p.grad)
        if not all(p.is_contiguous() and native.serves(p, p.grad) for p in having):
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
    """The length of all of them together, a scalar where they lie."""
    if native.serves(*tensors):
        return native.norm(tensors)
    rows = [
        tensor.flatten() for tensor in tensors
    ]  # whose products with themselves torch takes in half the time of their norms
    return torch.stack([row.dot(row) for row in rows]).sum().sqrt()


def lengths(a: Tensor) -> Tensor:
    """The length of each row along the last axis, without gradients; for no row in a training loop twice, if it does not change."""
    a = a.detach()
    return native.squares(a).sqrt() if native.serves(a) and a.is_contiguous() else a.norm(dim=-1)


def divergence(p_PV: Tensor, q_QV: Tensor, p_sums: bool = True, q_sums: bool = True) -> Tensor:
    """KL(softmax of p || softmax of q) in nat for each row of logits, (R,); the rows of the one that has fewer are taken over
    again, a whole number of times (`NumericsError` otherwise). Of log-probabilities no sum need be made."""
    few, many = sorted((p_PV, q_QV), key=len)
    check(
        many, "RV", R=len(many) // max(1, len(few)) * len(few), V=few.shape[1]
    )  # compiled code would read past the end
    if native.serves(p_PV, q_QV):
        return native.divergence(p_PV, q_QV, p_sums, q_sums)
    parts = []
    for at_R in torch.arange(len(many), device=many.device).split(BLOCK):
        p_RV, q_RV = p_PV[at_R % len(p_PV)], q_QV[at_R % len(q_QV)]
        logp_RV, logq_RV = (p_RV.log_softmax(1) if p_sums else p_RV), (q_RV.log_softmax(1) if q_sums else q_RV)
        parts.append((logp_RV - logq_RV).mul_(logp_RV.exp()).sum(1))
    return torch.cat(parts) if parts else p_PV.new_zeros(0)


STARTS, LEAST = 16, 1e-26
"""Columns by which `divergence_of` puts rows to about the length of the table's, and what is left of a row's sum where that was no
use."""


def divergence_of(x_RD: Tensor, weight_VD: Tensor, kept: Tiles, logp_QV: Tensor, theirs: bool) -> Tensor | None:
    """KL(softmax of x @ weight.T || p), or KL(p || softmax) if `theirs`, in nat for each row (R,), where p are log-probabilities whose
    rows begin anew; the logits are never in memory. `kept` is the weight in tiles. None where that does not serve: on other
    machines, of weights of more than 1,024 columns, and where a row differs beyond float32's range."""
    if not native.sums_softmax(x_RD, kept, logp_QV):
        return None
    # With l' = l - start, KL(softmax || p) = E[l' - logp] - log(sum of exp(l')): any start will do that is near the logarithm of the
    # sum of exp(l), as then small numbers are added up and little is lost to rounding. It has the same bits for any threads, too.
    some_QS = logp_QV[:, :STARTS]
    start_R = (native.product(x_RD, weight_VD[:STARTS]).unflatten(0, (-1, len(some_QS))) - some_QS).mean(2).flatten()
    mass_R, apart_R, whole_R = native.softmax_sums(x_RD, kept, logp_QV, start_R, theirs).unbind(1)
    kl_R = whole_R * mass_R.log() - apart_R if theirs else apart_R / mass_R - mass_R.log()
    return kl_R.float() if bool((kl_R.isfinite() & (mass_R > LEAST)).all()) else None
