"""Kernels made of torch's own operations, for any device and number format, without a compiler."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from tunediff.kernels import gates, memory

BFLOAT16_FROM = 1 << 30
"""Fewest multiplications for which a first search in bfloat16 is faster (measured)."""
ROWS = 32
"""Tokens that share one error bound, that of the longest activation among them."""
MOST_CANDIDATES = 4
"""Most candidates for each kept code; with more, the search in bfloat16 is given up."""
MOST_SHARE = 0.02
"""Largest share of candidates among all codes; with more, the search in bfloat16 is given up."""


def rounds() -> bool:
    """Return whether the processor multiplies bfloat16, which makes a first search in bfloat16 fast."""
    # Some versions of torch lack these two functions.
    has = (getattr(torch.cpu, f"_is_{name}_supported", bool) for name in ("amx_tile", "avx512_bf16"))
    return any(asked() for asked in has)


def encode(x_NI: Tensor, encoder_FI: Tensor, bias_F: Tensor, gate: gates.Gate) -> tuple[Tensor, ...]:
    """Return the codes of relu(x @ encoder.T + bias) that the gate keeps, as `select` does."""
    plain = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in (x_NI, encoder_FI))
    if plain and x_NI.numel() * len(encoder_FI) >= BFLOAT16_FROM and rounds():
        found = _encode_by_bfloat16(x_NI, encoder_FI, bias_F, gate)
        if found is not None:
            return found
    return select(torch.addmm(bias_F, x_NI, encoder_FI.T), gate.weight_F, gate.parts)


def _encode_by_bfloat16(
    x_NI: Tensor, encoder_FI: Tensor, bias_F: Tensor, gate: gates.Gate
) -> tuple[Tensor, ...] | None:
    """Encode by a first search in bfloat16 for candidates, whose codes are then computed in float32 and selected.

    Rounding changes each number by at most 2^-9 of it, which bounds the error of a product. Returns None if there are
    too many candidates or too few.
    """
    (N, I), F = x_NI.shape, len(encoder_FI)
    out = memory.empty(-(-N * F // 2)).view(torch.bfloat16)[: N * F].view(N, F)
    product_NF = torch.mm(x_NI.bfloat16(), encoder_FI.bfloat16().T, out=out)
    off = 1.01 * (2.0**-8 + 2.0**-17 + 2 * I * 2.0**-24)
    reach_N, margin_F = (
        x_NI.norm(dim=1) + 1e-12,
        off * encoder_FI.norm(dim=1) + 1e-16,
    )  # squares of tiny numbers are lost
    if not (torch.isfinite(reach_N).all() and torch.isfinite(margin_F).all()):
        return None
    kept = []
    for start, stop, count in gate.parts:
        weight_F, bias, size = gate.weight_F[start:stop], bias_F[start:stop], stop - start
        cut = gates.proposed(product_NF[:, start:stop], weight_F, count)
        need_F = gates.needed(cut, weight_F) - bias - 1e-6 * bias.abs()
        # Positive floats are ordered like their bits as integers, which torch compares twice as fast.
        kind = torch.int16 if bool((need_F > reach_N.max() * margin_F[start:stop]).all()) else torch.bfloat16
        found = []
        for first in range(0, N, ROWS):
            least_F = need_F - reach_N[first : first + ROWS].max() * margin_F[start:stop]
            least_F = (least_F - least_F.abs().clamp_max(1e38) / 128).bfloat16()  # infinite ones stay so
            above_NF = product_NF[first : first + ROWS, start:stop].view(kind) > least_F.view(kind)
            found.append(above_NF.view(-1).nonzero()[:, 0] + first * size)
        token_P, latent_P = gates.places(torch.cat(found), size)
        if len(token_P) > max(MOST_CANDIDATES * count, MOST_SHARE * N * F):
            return None
        pre_P = dot(edges(token_P, N), latent_P + start, x_NI, encoder_FI) + bias[latent_P]
        best_P = gates.best(pre_P * weight_F[latent_P], cut, count)
        if best_P is None:
            return None
        kept.append((token_P[best_P] * F + latent_P[best_P] + start, pre_P[best_P]))
    flat_P, pre_P = kept[0]
    if len(kept) > 1:
        flat_P, order_P = torch.cat([flat_P for flat_P, _ in kept]).sort()
        pre_P = torch.cat([pre_P for _, pre_P in kept])[order_P]
    token_P, latent_P = gates.places(flat_P, F)
    return token_P, latent_P, pre_P, edges(token_P, N)


def select(pre_NF: Tensor, weight_F: Tensor, parts: Sequence[gates.Part]) -> tuple[Tensor, ...]:
    """Return the codes that a gate keeps: token_P, latent_P, pre_P, and where each token's pairs start (N + 1).

    Pairs are ordered by token, then latent. See `gates.keep`.
    """
    flat_P = gates.keep(pre_NF, weight_F, parts)
    token_P, latent_P = gates.places(flat_P, pre_NF.shape[1])
    return token_P, latent_P, pre_NF.view(-1)[flat_P], edges(token_P, len(pre_NF))


def edges(row_P: Tensor, R: int) -> Tensor:
    """Return the index of each row's first pair, for pairs ordered by row, (R + 1)."""
    return torch.searchsorted(row_P, torch.arange(R + 1, device=row_P.device))


def bucket(latent_P: Tensor, F: int) -> tuple[Tensor, Tensor]:
    """Return the order of the pairs by latent, and each latent's first place in that order (F + 1)."""
    order_P = torch.argsort(latent_P.int(), stable=True)
    return order_P, edges(latent_P[order_P], F)


def bag(starts_R: Tensor, order_P: Tensor | None, index_P: Tensor, value_P: Tensor, rows: Tensor) -> Tensor:
    """Return for each r the sum over pairs p in [starts_R[r], starts_R[r + 1]) of value_P[p] * rows[index_P[p]],
    as (R, I).

    `order_P`, if given, is the order in which pairs are summed.
    """
    if order_P is not None:
        index_P, value_P = index_P[order_P], value_P[order_P]
    value_P = value_P.to(rows.dtype)
    if rows.device.type == "cpu" and rows.dtype == torch.float32:
        with contextlib.suppress(RuntimeError):  # torch lacks this kernel on the processor, or gradients are needed
            out = memory.empty(len(starts_R) - 1, rows.shape[1])
            return torch.addmm(out, _sparse(starts_R, index_P, value_P, len(rows)), rows, beta=0, out=out)
    return torch.nn.functional.embedding_bag(
        index_P, rows, starts_R, mode="sum", per_sample_weights=value_P, include_last_offset=True
    )


def dot(starts_N: Tensor, latent_P: Tensor, a_NI: Tensor, b_FI: Tensor) -> Tensor:
    """Return for each pair the dot product of its token's row of a and its latent's row of b, (P,)."""
    if not latent_P.numel():
        return a_NI.new_zeros(0)
    try:
        zero_P = torch.zeros(latent_P.numel(), dtype=a_NI.dtype, device=a_NI.device)
        sampled: Tensor = torch.sparse.sampled_addmm(_sparse(starts_N, latent_P, zero_P, len(b_FI)), a_NI, b_FI.T)
        return sampled.values()
    except RuntimeError:  # torch lacks this kernel for the device or format; the loop is slower
        token_P = torch.repeat_interleave(torch.arange(len(a_NI), device=a_NI.device), starts_N.diff())
        parts = zip(token_P.split(4096), latent_P.split(4096))
        return torch.cat([(a_NI[n] * b_FI[j]).sum(1) for n, j in parts])


def _sparse(starts_R: Tensor, index_P: Tensor, value_P: Tensor, size: int) -> Tensor:
    """Return the pairs as a sparse matrix (R, size)."""
    _quiet()
    return torch.sparse_csr_tensor(starts_R, index_P, value_P, (len(starts_R) - 1, size), check_invariants=False)


@lru_cache(maxsize=1)
def _quiet() -> None:
    """Trigger and suppress torch's warning that CSR tensors are in beta, which is given once per process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1))
