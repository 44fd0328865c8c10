"""The kernels in torch's own operations: any device and type, no compiler. `native` and its like answer the same."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Sequence

import torch
from torch import Tensor

from tunediff import gates


def encode(x_NI: Tensor, encoder_FI: Tensor, bias_F: Tensor, gate: gates.Gate) -> tuple[Tensor, ...]:
    """The codes of relu(x @ encoder.T + bias) that the gate keeps, as `select` tells them."""
    return select(torch.addmm(bias_F, x_NI, encoder_FI.T), gate.weight_F, gate.parts)


def select(pre_NF: Tensor, weight_F: Tensor, parts: Sequence[gates.Part]) -> tuple[Tensor, ...]:
    """The codes that a gate keeps: token_P, latent_P and pre_P, ordered by token and then latent, and where each
    token's begin (N + 1). See `gates.keep`."""
    N, F = pre_NF.shape
    flat_P = gates.keep(pre_NF, weight_F, parts)
    token_P = flat_P.div(F, rounding_mode="floor")
    return token_P, flat_P - token_P * F, pre_NF.view(-1)[flat_P], edges(token_P, N)


def edges(row_P: Tensor, R: int) -> Tensor:
    """Where each row's pairs begin among pairs ordered by row, (R + 1)."""
    return torch.searchsorted(row_P, torch.arange(R + 1, device=row_P.device))


def bucket(latent_P: Tensor, F: int) -> tuple[Tensor, Tensor]:
    """The pairs in the order of their latents, and where each latent's begin (F + 1)."""
    order_P = torch.argsort(latent_P.int(), stable=True)
    return order_P, edges(latent_P[order_P], F)


def bag(starts_R: Tensor, order_P: Tensor | None, index_P: Tensor, value_P: Tensor, rows: Tensor) -> Tensor:
    """For each r the sum over pairs p in [starts_R[r], starts_R[r + 1]) of value_P[p] * rows[index_P[p]], (R, I);
    pairs are taken in `order_P`, if given."""
    if order_P is not None:
        index_P, value_P = index_P[order_P], value_P[order_P]
    return torch.nn.functional.embedding_bag(
        index_P, rows, starts_R, mode="sum", per_sample_weights=value_P.to(rows.dtype), include_last_offset=True
    )


def dot(starts_N: Tensor, latent_P: Tensor, a_NI: Tensor, b_FI: Tensor) -> Tensor:
    """For each pair the product of its token's row of a and its latent's row of b, (P,)."""
    if not latent_P.numel():
        return a_NI.new_zeros(0)
    _quiet()
    try:
        zero_P = torch.zeros(latent_P.numel(), dtype=a_NI.dtype, device=a_NI.device)
        shape = (len(a_NI), len(b_FI))
        at = torch.sparse_csr_tensor(starts_N, latent_P, zero_P, shape, check_invariants=False)
        return torch.sparse.sampled_addmm(at, a_NI, b_FI.T).values()
    except (RuntimeError, NotImplementedError):  # not built for this device or type: the same, more slowly
        token_P = torch.repeat_interleave(torch.arange(len(a_NI), device=a_NI.device), starts_N.diff())
        parts = zip(token_P.split(4096), latent_P.split(4096))
        return torch.cat([(a_NI[n] * b_FI[j]).sum(1) for n, j in parts])


@lru_cache(maxsize=1)
def _quiet() -> None:
    """torch says once in a process that its CSR tensors are new; say it here, where nobody hears."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1))
