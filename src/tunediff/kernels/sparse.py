"""Sparse codes as (token, latent, value) triples; after the encoder's product, costs follow the number of pairs, not
N*F.

Forward and backward passes are four sums over pairs. Decoding and both weight gradients are weighted sums of rows. One
thread computes each output row, so results do not depend on the number of threads. The gradient of the values is a
matrix product sampled at the pairs. Each call uses the fastest kernel module for its tensors: `native`, `triton` or
`torch_ops`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tunediff.kernels import gates, paths, torch_ops
from tunediff.kernels.cpu import native
from tunediff.kernels.cpu.compiled import serves


def kernels_for(*tensors: Tensor) -> Any:
    """Return the fastest kernel module that is allowed and supports these tensors."""
    return native if serves(*tensors) else paths.on_gpu(*tensors) or torch_ops


@dataclass(frozen=True, eq=False)
class Pairs:
    """Kept (token, latent) pairs, ordered by token, then latent, for N tokens, F latents and P pairs.

    token_P, latent_P   token and latent of each pair
    starts_N            index of each token's first pair, and P at the end (N + 1)
    """

    token_P: Tensor
    latent_P: Tensor
    starts_N: Tensor
    N: int
    F: int

    @classmethod
    def of(cls, flat_P: Tensor, N: int, F: int) -> Pairs:
        """Make pairs from ascending flat indices token * F + latent."""
        token_P, latent_P = gates.places(flat_P, F)
        return cls(token_P, latent_P, torch_ops.edges(token_P, N), N, F)

    def cut(self, cuts: tuple[int, ...]) -> Pairs:
        """Split each token into len(cuts) + 1 rows, with its pairs before, between and after the cuts between
        latents."""
        if not cuts:
            return self
        block_P = sum(
            self.latent_P >= cut for cut in cuts
        )  # a loop, because copying a tensor of cuts to a GPU would make the host wait
        B = len(cuts) + 1
        row_P = self.token_P * B + block_P
        return Pairs(row_P, self.latent_P, torch_ops.edges(row_P, self.N * B), self.N * B, self.F)

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor]:
        """Order of the pairs by latent, then token (P,), and each latent's first place in that order (F + 1)."""
        module = native if serves() and self.latent_P.device.type == "cpu" else torch_ops
        order_P, starts_F = module.bucket(self.latent_P, self.F)
        return order_P, starts_F

    def gather_tokens(self, value_P: Tensor, rows_FI: Tensor) -> Tensor:
        """Return for each token the sum over its pairs of value times the latent's row, (N, I)."""
        out: Tensor = kernels_for(value_P, rows_FI).bag(self.starts_N, None, self.latent_P, value_P, rows_FI)
        return out

    def gather_latents(self, value_P: Tensor, rows_NI: Tensor) -> Tensor:
        """Return for each latent the sum over its pairs of value times the token's row, (F, I)."""
        order_P, starts_F = self.by_latent
        out: Tensor = kernels_for(value_P, rows_NI).bag(starts_F, order_P, self.token_P, value_P, rows_NI)
        return out

    def sum_latents(self, value_P: Tensor) -> Tensor:
        """Return for each latent the sum of its pairs' values, (F,)."""
        if paths.on_gpu(value_P) is not None:  # torch would use atomic additions, whose order varies
            return self.gather_latents(value_P, value_P.new_ones(self.N, 1))[:, 0]
        return torch.zeros(self.F, dtype=value_P.dtype, device=value_P.device).index_add_(0, self.latent_P, value_P)

    def dot(self, a_NI: Tensor, b_FI: Tensor) -> Tensor:
        """Return for each pair the dot product of its token's row and its latent's row, (P,)."""
        out: Tensor = kernels_for(a_NI, b_FI).dot(self.starts_N, self.latent_P, a_NI, b_FI)
        return out

    def gather_and_dot(self, value_P: Tensor, a_NI: Tensor, b_FI: Tensor) -> tuple[Tensor, Tensor]:
        """Return `gather_latents(value, a)` and `dot(a, b)`; compiled kernels read each row of a only once."""
        if kernels_for(value_P, a_NI, b_FI) is native:
            order_P, starts_F = self.by_latent
            return native.bag_and_dot(starts_F, order_P, self.token_P, value_P, a_NI, b_FI)
        return self.gather_latents(value_P, a_NI), self.dot(a_NI, b_FI)


class EncodeAtPairs(torch.autograd.Function):
    """Gradient of pre-activations at the pairs, whose values `pre_P` are already known."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, encoder_FI: Tensor, bias_F: Tensor, pre_P: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(x_NI, encoder_FI)
        ctx.pairs = pairs
        return pre_P

    @staticmethod
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, encoder_FI = ctx.saved_tensors
        pairs, need = ctx.pairs, ctx.needs_input_grad
        return (
            pairs.gather_tokens(grad_P, encoder_FI) if need[0] else None,
            pairs.gather_latents(grad_P, x_NI) if need[1] else None,
            pairs.sum_latents(grad_P) if need[2] else None,
            None,
            None,
        )


class DecodePairs(torch.autograd.Function):
    """Decoding: for each token the sum over its pairs of value times decoder row."""

    @staticmethod
    def forward(ctx: Any, value_P: Tensor, decoder_FI: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(value_P, decoder_FI)
        ctx.pairs = pairs
        return pairs.gather_tokens(value_P, decoder_FI)

    @staticmethod
    def backward(ctx: Any, grad_NI: Tensor) -> tuple[Tensor | None, ...]:
        value_P, decoder_FI = ctx.saved_tensors
        pairs, need, grad_NI = ctx.pairs, ctx.needs_input_grad, grad_NI.contiguous()
        if need[0] and need[1]:
            of_decoder_FI, of_value_P = pairs.gather_and_dot(value_P, grad_NI, decoder_FI)
            return of_value_P, of_decoder_FI, None
        return (
            pairs.dot(grad_NI, decoder_FI) if need[0] else None,
            pairs.gather_latents(value_P, grad_NI) if need[1] else None,
            None,
        )


class PairCode:
    """Codes stored as one value for each kept pair; see `tunediff.kernels.Code`."""

    host_waits = True
    """Whether sizes depend on the data, so that the host must wait for the device to learn them."""

    def __init__(self, pairs: Pairs, value_P: Tensor, origin: tuple[Tensor, ...] = ()):
        self.pairs, self.value_P, self._origin = pairs, value_P, origin

    @classmethod
    def encode(cls, x_NI: Tensor, encoder_FI: Tensor, bias_F: Tensor, gate: gates.Gate) -> PairCode:
        """Encode by one product without gradients and a selection; gradients flow through the kept pairs."""
        with torch.no_grad():
            module = kernels_for(x_NI, encoder_FI, bias_F, gate.weight_F)
            token_P, latent_P, pre_P, starts_N = module.encode(x_NI, encoder_FI, bias_F, gate)
            pairs = Pairs(token_P, latent_P, starts_N, len(x_NI), len(encoder_FI))
        origin = (x_NI, encoder_FI, bias_F)
        return cls(pairs, EncodeAtPairs.apply(*origin, pre_P, pairs), origin)  # type: ignore[no-untyped-call]

    def among(self, weight_F: Tensor, k: int) -> PairCode:
        """Return the code that keeps on each token the k largest f * w among latents with w > 0."""
        x_NI, encoder_FI, bias_F = self._origin
        with torch.no_grad():
            latent_D = weight_F.nonzero()[:, 0]
            pre_ND = torch.addmm(bias_F[latent_D], x_NI, encoder_FI[latent_D].T)
            best_NK = torch.topk(torch.relu(pre_ND) * weight_F[latent_D], k, dim=1, sorted=False).indices.sort(1).values
            row_P, column_P = (pre_ND.gather(1, best_NK) > 0).nonzero(as_tuple=True)
            at_P = best_NK[row_P, column_P]
            N, F = len(x_NI), len(encoder_FI)
            pairs = Pairs(row_P, latent_D[at_P], torch_ops.edges(row_P, N), N, F)
            pre_P = pre_ND[row_P, at_P]
        return PairCode(pairs, EncodeAtPairs.apply(*self._origin, pre_P, pairs), self._origin)  # type: ignore[no-untyped-call]

    def decode(self, decoder_FI: Tensor, cuts: tuple[int, ...] = ()) -> Tensor:
        """Return sum_j f_j W_j over the latents before, between and after the cuts, (N, len(cuts) + 1, I)."""
        pairs = self.pairs.cut(cuts)
        out: Tensor = DecodePairs.apply(self.value_P, decoder_FI, pairs)  # type: ignore[no-untyped-call]
        return out.view(self.pairs.N, len(cuts) + 1, -1)

    def weighted(self, weight_F: Tensor) -> Tensor:
        """Return the sum over tokens and latents of f_j * weight_j, a scalar."""
        return self.decode(weight_F[:, None]).sum()

    def fired(self) -> Tensor:
        """Return which latents (F,) are on at one token at least."""
        return self.pairs.sum_latents((self.value_P.detach() > 0).float()) > 0

    def count(self) -> Tensor:
        """Return the number of codes that are on in the whole batch."""
        return (self.value_P > 0).sum()

    def dense(self) -> Tensor:
        """Return the codes as one (N, F) tensor."""
        flat = torch.zeros(self.pairs.N * self.pairs.F, dtype=self.value_P.dtype, device=self.value_P.device)
        return flat.index_put((self.pairs.token_P * self.pairs.F + self.pairs.latent_P,), self.value_P).view(
            self.pairs.N, self.pairs.F
        )
