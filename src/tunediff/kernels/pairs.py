"""Codes as (token, latent, value) triples: after the encoder's GEMM every cost follows the pairs kept, not
N*F.

Forward and backward are four sums over pairs. Decoding and both weight gradients are weighted sums of rows,
one owner a row, so no two threads write one place and the answer does not depend on their number; the
gradient of the values is a product sampled at the pairs.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Callable

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pairs:
    """Which (token, latent) pairs are kept, ordered by token and then latent; N tokens, F latents, P
    pairs."""

    token_P: Tensor
    latent_P: Tensor
    N: int
    F: int

    @classmethod
    def of(cls, flat_P: Tensor, N: int, F: int) -> "Pairs":
        """From ascending flat indices token * F + latent."""
        token_P = flat_P.div(F, rounding_mode="floor")
        return cls(token_P, flat_P - token_P * F, N, F)

    @cached_property
    def by_token(self) -> Tensor:
        """(N,), where each token's pairs begin."""
        return torch.searchsorted(self.token_P, torch.arange(self.N, device=self.token_P.device))

    @cached_property
    def order_P(self) -> Tensor:
        """The pairs ordered by latent and then token."""
        return torch.argsort(self.latent_P, stable=True)

    @cached_property
    def by_latent(self) -> Tensor:
        """(F,), where each latent's pairs begin in `order_P`."""
        counts = torch.bincount(self.latent_P, minlength=self.F)
        return counts.cumsum(0) - counts

    def gather_tokens(self, value_P: Tensor, rows_FI: Tensor) -> Tensor:
        """For each token, sum over its pairs of value * row of the latent, (N, I)."""
        return _bag(self.latent_P, rows_FI, self.by_token, value_P)

    def gather_latents(self, value_P: Tensor, rows_NI: Tensor) -> Tensor:
        """For each latent, sum over its pairs of value * row of the token, (F, I)."""
        return _bag(self.token_P[self.order_P], rows_NI, self.by_latent, value_P[self.order_P])

    def sum_latents(self, value_P: Tensor) -> Tensor:
        """For each latent, sum over its pairs of value, (F,)."""
        return torch.zeros(self.F, dtype=value_P.dtype, device=value_P.device).index_add_(
            0, self.latent_P, value_P
        )

    def dot(self, a_NI: Tensor, b_FI: Tensor) -> Tensor:
        """For each pair the product of its token's row and its latent's row, (P,)."""
        if not self.token_P.numel():
            return a_NI.new_zeros(0)
        _quiet()
        try:
            crow = torch.cat([self.by_token, self.by_token.new_tensor([self.token_P.numel()])])
            zero = torch.zeros(self.token_P.numel(), dtype=a_NI.dtype, device=a_NI.device)
            at = torch.sparse_csr_tensor(crow, self.latent_P, zero, (self.N, self.F), check_invariants=False)
            return torch.sparse.sampled_addmm(at, a_NI, b_FI.T).values()
        except (
            RuntimeError,
            NotImplementedError,
        ):  # not built for this device or type: the same sums, more slowly
            parts = zip(self.token_P.split(4096), self.latent_P.split(4096))
            return torch.cat([(a_NI[n] * b_FI[j]).sum(1) for n, j in parts])


def _bag(index_P: Tensor, rows: Tensor, starts: Tensor, value_P: Tensor) -> Tensor:
    return torch.nn.functional.embedding_bag(
        index_P, rows, starts, mode="sum", per_sample_weights=value_P.to(rows.dtype)
    )


@lru_cache(maxsize=1)
def _quiet() -> None:
    """torch says once in a process that its CSR tensors are new; say it here, where nobody hears."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1))


class _Encode(torch.autograd.Function):
    """Pre-activations at the pairs, already computed in `pre_P`; the gradient is what this is for."""

    @staticmethod
    def forward(ctx, x_NI, encoder_FI, bias_F, pre_P, pairs):  # noqa: D102
        ctx.save_for_backward(x_NI, encoder_FI)
        ctx.pairs = pairs
        return pre_P

    @staticmethod
    def backward(ctx, grad_P):  # noqa: D102
        x_NI, encoder_FI = ctx.saved_tensors
        pairs, need = ctx.pairs, ctx.needs_input_grad
        return (
            pairs.gather_tokens(grad_P, encoder_FI) if need[0] else None,
            pairs.gather_latents(grad_P, x_NI) if need[1] else None,
            pairs.sum_latents(grad_P) if need[2] else None,
            None,
            None,
        )


class _Decode(torch.autograd.Function):
    """sum over a token's pairs of value * decoder row."""

    @staticmethod
    def forward(ctx, value_P, decoder_FI, pairs):  # noqa: D102
        ctx.save_for_backward(value_P, decoder_FI)
        ctx.pairs = pairs
        return pairs.gather_tokens(value_P, decoder_FI)

    @staticmethod
    def backward(ctx, grad_NI):  # noqa: D102
        value_P, decoder_FI = ctx.saved_tensors
        pairs, need, grad_NI = ctx.pairs, ctx.needs_input_grad, grad_NI.contiguous()
        return (
            pairs.dot(grad_NI, decoder_FI) if need[0] else None,
            pairs.gather_latents(value_P, grad_NI) if need[1] else None,
            None,
        )


class PairCode:
    """Codes stored as one value a kept pair; see `tunediff.kernels.Code`."""

    def __init__(self, pairs: Pairs, value_P: Tensor):
        self.pairs, self.value_P = pairs, value_P

    @classmethod
    def encode(
        cls, x_NI: Tensor, encoder_FI: Tensor, bias_F: Tensor, choose: Callable[[Tensor], Tensor]
    ) -> "PairCode":
        """One GEMM without a gradient, a selection (positive codes only), and gradients through the pairs
        kept."""
        with torch.no_grad():
            pre_NF = torch.addmm(bias_F, x_NI, encoder_FI.T)
            flat_P = choose(pre_NF)
            pairs, pre_P = Pairs.of(flat_P, *pre_NF.shape), pre_NF.view(-1)[flat_P]
        return cls(pairs, _Encode.apply(x_NI, encoder_FI, bias_F, pre_P, pairs))

    def decode(self, decoder_FI: Tensor) -> Tensor:
        """sum_j f_j W_j."""
        return _Decode.apply(self.value_P, decoder_FI, self.pairs)

    def only(self, start: int, stop: int) -> "PairCode":
        """Zero outside [start, stop)."""
        inside_P = (self.pairs.latent_P >= start) & (self.pairs.latent_P < stop)
        return PairCode(self.pairs, self.value_P * inside_P)

    def weighted(self, weight_F: Tensor) -> Tensor:
        """sum f_j * weight_j."""
        return (self.value_P * weight_F.index_select(0, self.pairs.latent_P)).sum()

    def fired(self) -> Tensor:
        """Latents on at one token at least."""
        return self.pairs.sum_latents((self.value_P.detach() > 0).float()) > 0

    def count(self) -> Tensor:
        """Codes on in the whole batch."""
        return (self.value_P > 0).sum()

    def dense(self) -> Tensor:
        """f_NF."""
        flat = torch.zeros(self.pairs.N * self.pairs.F, dtype=self.value_P.dtype, device=self.value_P.device)
        return flat.index_put((self.pairs.token_P * self.pairs.F + self.pairs.latent_P,), self.value_P).view(
            self.pairs.N, self.pairs.F
        )
