# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
# Kernels are written in Triton's language, whose functions carry no types; triton ships none either.
"""Triton kernels for codes on a GPU: selection, sums over pairs and their gradients, without waits of the host.

All shapes are known before the step. A gate keeps exactly the requested number of pairs, padded with codes of 0 or less
if too few are positive. Sizes that depend on the data (pairs of a latent, dead latents) stay on the device. One program
adds the floats of each output row in an order that depends on the data alone, so the same step gives the same bytes.
Atomic additions are used for integers only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunediff.kernels import gates

LONG = 512
"""Most pairs that one program sums; a longer bag (a latent that fires on most tokens) is split among several."""

_BINS = 2048  # bins of the first digit, 11 bits; no finite float and no infinity falls into the last bin
_LOW = 20  # bits below the first digit; a float >= 0 has 31 bits
_BLOCK = 1024


# -- selection -----------------------------------------------------------------------------------------------


@triton.jit
def _keys(pre_ptr, weight_ptr, row, column, inside):
    """Return relu(pre) * w as integers with the same order as the floats; 0 outside the range and for NaN."""
    value = tl.load(pre_ptr + row + column, mask=inside, other=0.0)
    value = value * tl.load(weight_ptr + column, mask=inside, other=0.0)
    return tl.where(value > 0, value, 0.0).to(tl.int32, bitcast=True)


@triton.jit
def _first_digit(
    pre_ptr, weight_ptr, counts_ptr, F, start, stop, BINS: tl.constexpr, LOW: tl.constexpr, BLOCK: tl.constexpr
):
    """Add to a histogram of the keys' first digits; one program per token, one atomic addition per nonempty bin."""
    row = tl.program_id(0).to(tl.int64) * F
    bins = tl.arange(0, BINS)
    seen = tl.zeros((BINS,), tl.int32)
    for at in range(start, stop, BLOCK):
        column = at + tl.arange(0, BLOCK)
        inside = column < stop
        digit = _keys(pre_ptr, weight_ptr, row, column, inside) >> LOW
        seen += tl.histogram(tl.where(inside, digit, BINS - 1), BINS)
    tl.atomic_add(counts_ptr + bins, seen, mask=(seen > 0) & (bins < BINS - 1), sem="relaxed")


@triton.jit
def _other_digits(pre_ptr, weight_ptr, first_ptr, counts_ptr, F, start, stop, LOW: tl.constexpr, BLOCK: tl.constexpr):
    """Add to a histogram of the low bits of keys in the border's bin; such keys are few, so atomic additions are
    cheap."""
    row = tl.program_id(0).to(tl.int64) * F
    first = tl.load(first_ptr).to(tl.int32)
    for at in range(start, stop, BLOCK):
        column = at + tl.arange(0, BLOCK)
        inside = column < stop
        key = _keys(pre_ptr, weight_ptr, row, column, inside)
        tl.atomic_add(
            counts_ptr + (key & ((1 << LOW) - 1)), 1, mask=inside & ((key >> LOW) == first) & (key > 0), sem="relaxed"
        )


@triton.jit
def _count(pre_ptr, weight_ptr, border_ptr, above_ptr, equal_ptr, F, start, stop, BLOCK: tl.constexpr):
    """Count the keys of a token above the border, and equal to the border."""
    n = tl.program_id(0)
    row = n.to(tl.int64) * F
    border = tl.load(border_ptr).to(tl.int32)
    above, equal = 0, 0
    for at in range(start, stop, BLOCK):
        column = at + tl.arange(0, BLOCK)
        inside = column < stop
        key = _keys(pre_ptr, weight_ptr, row, column, inside)
        above += tl.sum((inside & (key > border)).to(tl.int32))
        equal += tl.sum((inside & (key == border)).to(tl.int32))
    tl.store(above_ptr + n, above)
    tl.store(equal_ptr + n, equal)


@triton.jit
def _write(
    pre_ptr, weight_ptr, border_ptr, quota_ptr, passed_ptr, to_ptr, flat_ptr, F, start, stop, BLOCK: tl.constexpr
):
    """Write a token's kept flat indices, ascending.

    `passed` is the number of keys equal to the border in earlier tokens, and `to` the first place to write to.
    """
    n = tl.program_id(0)
    row = n.to(tl.int64) * F
    border, quota = tl.load(border_ptr).to(tl.int32), tl.load(quota_ptr)
    passed, to = tl.load(passed_ptr + n), tl.load(to_ptr + n)
    for at in range(start, stop, BLOCK):
        column = at + tl.arange(0, BLOCK)
        inside = column < stop
        key = _keys(pre_ptr, weight_ptr, row, column, inside)
        equal = (inside & (key == border)).to(tl.int32)
        kept = inside & ((key > border) | ((equal > 0) & (passed + tl.cumsum(equal, 0) <= quota)))
        count = kept.to(tl.int32)
        tl.store(flat_ptr + to + tl.cumsum(count, 0) - 1, row + column, mask=kept)
        passed += tl.sum(equal)
        to += tl.sum(count)


def _border(counts: Tensor, wanted: int | Tensor) -> tuple[Tensor, Tensor]:
    """Return the bin that holds the `wanted`-th largest key, and the key's rank in the bin; both (1,), on the
    device."""
    down = counts.flip(0)
    reached = down.cumsum(0)
    at = (reached < wanted).sum(0, keepdim=True).clamp_max(len(counts) - 1)
    return len(counts) - 1 - at, wanted - (reached - down).gather(0, at)


def select(pre_NF: Tensor, weight_F: Tensor, parts: Sequence[gates.Part]) -> tuple[Tensor, ...]:
    """Return the codes that a gate keeps by relu(pre) * w: token_P, latent_P, pre_P, and each token's first pair
    (N + 1).

    Pairs are ordered by token, then latent. The number of pairs is always the requested one: codes that are 0 fill up
    if fewer are positive, and relu(pre_P) is correct for them. Of equal codes at the border, the earlier in flat order
    is kept. The method is a radix selection with two digits.
    """
    N, F = pre_NF.shape
    pre_NF, weight_F = pre_NF.contiguous(), weight_F.contiguous()
    parts = [(start, stop, min(keep, N * (stop - start))) for start, stop, keep in parts]
    found = []
    for start, stop, keep in parts:
        span = (F, start, stop)
        first_B, low_B = (pre_NF.new_zeros(size, dtype=torch.int32) for size in (_BINS, 1 << _LOW))
        _first_digit[(N,)](pre_NF, weight_F, first_B, *span, BINS=_BINS, LOW=_LOW, BLOCK=_BLOCK)
        first, left = _border(first_B, keep)
        _other_digits[(N,)](pre_NF, weight_F, first, low_B, *span, LOW=_LOW, BLOCK=_BLOCK)
        low, quota = _border(low_B, left)
        border = (first << _LOW) | low
        above_N, equal_N = pre_NF.new_empty(2, N, dtype=torch.int32)
        _count[(N,)](pre_NF, weight_F, border, above_N, equal_N, *span, BLOCK=_BLOCK)
        passed_N = equal_N.cumsum(0) - equal_N
        kept_N = above_N + torch.minimum((quota - passed_N).clamp_min(0), equal_N)
        found.append((span, border, quota, passed_N, kept_N))
    kept_NG = torch.stack([kept_N for *_, kept_N in found], 1)
    to_NG = kept_NG.view(-1).cumsum(0).view_as(kept_NG) - kept_NG
    flat_P = pre_NF.new_empty(sum(keep for *_, keep in parts), dtype=torch.long)
    for (span, border, quota, passed_N, _), to_N in zip(found, to_NG.T.contiguous()):
        _write[(N,)](pre_NF, weight_F, border, quota, passed_N, to_N, flat_P, *span, BLOCK=_BLOCK)
    token_P, latent_P = gates.places(flat_P, F)
    starts_N = torch.cat([to_NG[:, 0], torch.full_like(to_NG[:1, 0], len(flat_P))])
    return token_P, latent_P, pre_NF.view(-1)[flat_P], starts_N


@triton.jit
def _best(pre_ptr, weight_ptr, latent_ptr, count_ptr, out_ptr, F, K, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """Write the K largest keys of one token among the first `count` listed latents, by radix selection with three
    digits."""
    n = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr).to(tl.int32)
    bins = tl.arange(0, BINS)
    wanted = tl.minimum(count, K)
    border = 0
    for level in tl.static_range(3):
        shift = 20 - 10 * level
        known = 31 if level == 0 else 30 - 10 * level
        seen = tl.zeros((BINS,), tl.int32)
        for at in range(0, count, BLOCK):
            i = at + tl.arange(0, BLOCK)
            inside = i < count
            column = tl.load(latent_ptr + i, mask=inside, other=0)
            key = _keys(pre_ptr, weight_ptr, n * F, column, inside)
            match = inside & ((key >> known) == (border >> known))
            digit = (key >> shift) & ((1 << (known - shift)) - 1)
            seen += tl.histogram(tl.where(match, digit, BINS - 1), BINS)
        seen = tl.where(bins < BINS - 1, seen, 0)
        found = tl.sum((tl.cumsum(seen, 0, reverse=True) >= wanted).to(tl.int32)) - 1
        wanted -= tl.sum(tl.where(bins > found, seen, 0))
        border = border | (found << shift)
    passed, to = 0, 0
    for at in range(0, count, BLOCK):
        i = at + tl.arange(0, BLOCK)
        inside = i < count
        column = tl.load(latent_ptr + i, mask=inside, other=0)
        key = _keys(pre_ptr, weight_ptr, n * F, column, inside)
        equal = (inside & (key == border)).to(tl.int32)
        kept = (key > 0) & ((key > border) | ((equal > 0) & (passed + tl.cumsum(equal, 0) <= wanted)))
        number = kept.to(tl.int32)
        tl.store(out_ptr + n * K + to + tl.cumsum(number, 0) - 1, column, mask=kept)
        passed += tl.sum(equal)
        to += tl.sum(number)


def best(pre_NF: Tensor, weight_F: Tensor, k: int) -> Tensor:
    """Return for each token the latents of its k largest positive relu(pre) * w, (N, k); unused places hold F.

    Latents of weight 0 are skipped, so the cost follows the number of other latents, which only the device knows.
    """
    N, F = pre_NF.shape
    listed_F = torch.argsort(weight_F == 0, stable=True)
    count = (weight_F != 0).sum(0, keepdim=True)
    out_NK = torch.full((N, k), F, dtype=torch.long, device=pre_NF.device)
    _best[(N,)](pre_NF.contiguous(), weight_F.contiguous(), listed_F, count, out_NK, F, k, BINS=_BINS, BLOCK=_BLOCK)
    return out_NK


# -- sums over pairs -----------------------------------------------------------------------------------------


@triton.jit
def _add(acc, index_ptr, value_ptr, rows_ptr, begin, end, I, column, inside, TILE: tl.constexpr):
    """Return acc plus the sum over pairs [begin, end) of value * row; rows of pairs with value 0 are not read."""
    for p in range(begin, end, TILE):
        at = p + tl.arange(0, TILE)
        value = tl.load(value_ptr + at, mask=at < end, other=0.0)
        on = value != 0
        row = tl.load(index_ptr + at, mask=on, other=0)
        rows = tl.load(rows_ptr + row[:, None] * I + column[None, :], mask=on[:, None] & inside[None, :], other=0.0)
        acc += tl.sum(value[:, None] * rows, 0)
    return acc


@triton.jit
def _pieces(
    index_ptr, value_ptr, rows_ptr, part_ptr, begin_ptr, end_ptr, owner_ptr, first_ptr, R, I,
    LONG: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum one piece of a long bag; programs without a piece return at once, as only an upper bound is known."""
    s = tl.program_id(0)
    owner = tl.load(owner_ptr + s)
    if owner < R:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        begin = tl.load(begin_ptr + owner) + (s - tl.load(first_ptr + owner)) * LONG
        end = tl.minimum(begin + LONG, tl.load(end_ptr + owner))
        acc = tl.zeros((BLOCK,), tl.float32)
        acc = _add(acc, index_ptr, value_ptr, rows_ptr, begin, end, I, column, column < I, TILE)
        tl.store(part_ptr + s.to(tl.int64) * I + column, acc, mask=column < I)


@triton.jit
def _bags(
    index_ptr, value_ptr, rows_ptr, part_ptr, begin_ptr, end_ptr, pieces_ptr, first_ptr, out_ptr, I,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write one output row as the sum of its pairs, or of its pieces in order; no other program writes this row."""
    r = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < I
    pieces, first = tl.load(pieces_ptr + r), tl.load(first_ptr + r)
    begin, end = tl.load(begin_ptr + r), tl.load(end_ptr + r)
    acc = tl.zeros((BLOCK,), tl.float32)
    acc = _add(acc, index_ptr, value_ptr, rows_ptr, begin, tl.where(pieces > 0, begin, end), I, column, inside, TILE)
    for s in range(first, first + pieces):
        acc += tl.load(part_ptr + s * I + column, mask=inside, other=0.0)
    tl.store(out_ptr + r * I + column, acc, mask=inside)


@triton.jit
def _dots(token_ptr, latent_ptr, a_ptr, b_ptr, out_ptr, P, F, I, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Write dot products of the token's row and the latent's row for some pairs; 0 for an unused place."""
    p = tl.program_id(0) * TILE + tl.arange(0, TILE)
    latent = tl.load(latent_ptr + p, mask=p < P, other=F)
    on = latent < F
    token = tl.load(token_ptr + p, mask=on, other=0)
    acc = tl.zeros((TILE,), tl.float32)
    for at in range(0, I, BLOCK):
        column = at + tl.arange(0, BLOCK)
        mask = on[:, None] & (column < I)[None, :]
        a = tl.load(a_ptr + token[:, None] * I + column[None, :], mask=mask, other=0.0)
        b = tl.load(b_ptr + latent[:, None] * I + column[None, :], mask=mask, other=0.0)
        acc += tl.sum(a * b, 1)
    tl.store(out_ptr + p, acc, mask=p < P)


def bag(starts_R: Tensor, order_P: Tensor | None, index_P: Tensor, value_P: Tensor, rows: Tensor) -> Tensor:
    """Return for each r the sum over pairs p in [starts_R[r], starts_R[r + 1]) of value_P[p] * rows[index_P[p]],
    as (R, I).

    `order_P`, if given, is the order in which pairs are summed. No bag may hold a row twice.
    """
    if order_P is not None:
        index_P, value_P = index_P[order_P], value_P[order_P]
    value_P, rows = value_P.contiguous(), rows.contiguous()
    R, (X, I) = len(starts_R) - 1, rows.shape
    begin_R, length_R = starts_R[:-1], starts_R.diff()
    pieces_R = (length_R + LONG - 1) // LONG * (length_R > LONG)
    last_R = pieces_R.cumsum(0)
    # No bag is longer than X, and n > LONG pairs make fewer than 2 n / LONG pieces.
    most = 2 * len(index_P) // LONG if X > LONG else 0
    out_RI, part_SI = rows.new_empty(R, I), rows.new_empty(most, I)
    block = min(max(16, triton.next_power_of_2(I)), 512)
    of = (index_P, value_P, rows, part_SI, begin_R, starts_R[1:])
    first_R, tiles = last_R - pieces_R, {"TILE": 8, "BLOCK": block}
    if most:
        owner_S = torch.searchsorted(last_R, torch.arange(most, device=rows.device), right=True)
        _pieces[(most, triton.cdiv(I, block))](*of, owner_S, first_R, R, I, LONG=LONG, **tiles)
    if R:
        _bags[(R, triton.cdiv(I, block))](*of, pieces_R, first_R, out_RI, I, **tiles)
    return out_RI


def dot(starts_N: Tensor, latent_P: Tensor, a_NI: Tensor, b_FI: Tensor) -> Tensor:
    """Return for each pair the dot product of its token's row of a and its latent's row of b, (P,); 0 for latent F."""
    P, (F, I) = len(latent_P), b_FI.shape
    place_P = torch.arange(P, device=latent_P.device)
    token_P = torch.searchsorted(starts_N, place_P, right=True) - 1
    out_P, tile = a_NI.new_empty(P), 16
    if P:
        block = min(max(16, triton.next_power_of_2(I)), 128)
        _dots[(triton.cdiv(P, tile),)](
            token_P, latent_P, a_NI.contiguous(), b_FI.contiguous(), out_P, P, F, I, TILE=tile, BLOCK=block
        )
    return out_P
