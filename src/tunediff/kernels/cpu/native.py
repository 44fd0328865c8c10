"""Compiled kernels for float32 on the CPU: search for codes, sums over pairs, Adam, and sums over large tensors.

The functions here call `codes.c`, `panels.c` and `adam.c` (see `compiled`).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tunediff.kernels import gates, memory
from tunediff.kernels.cpu.compiled import (
    FINE,
    RANGES,
    address,
    at_most,
    balanced,
    each,
    even,
    int64_array,
    int64s,
    library,
    longs,
    spread,
)

BFLOAT16_FROM = 1 << 28
"""Fewest multiplications for which a first search in bfloat16 is faster (measured)."""
SAMPLE = 1 << 15
"""Codes sampled to estimate a group's threshold; a smaller group starts without a threshold."""
SQUARES = 1 << 7
"""Square blocks of products that form the sample if products are computed in bfloat16."""
MARGIN = 3.0
"""Standard deviations of the estimate that are added to the wanted number of candidates."""
DEEP = 32
"""Depth of the blocks of packed bfloat16 numbers."""
GROUP = 32
"""Rows of the blocks of packed bfloat16 numbers."""
AHEAD = 16
"""Most groups of tokens that a thread processes at once."""
TOKENS = 1 << 12
"""Tokens whose candidates are computed together, limited by the size of a panel."""
BLOCK = 1 << 16
"""Numbers whose squares are summed by one thread at a time."""
TILES = "tiles"
"""Kind of `memory.derived` for rows packed in bfloat16; the number of rows is part of the kind."""
PANELED = "panels"
"""Kind of `memory.derived` for rows stored in panels of columns; the number of rows is part of the kind."""
ENERGY = "energy"
"""Kind of `memory.derived` for partial sums of squares that add up to the whole tensor's."""
LENGTHS = "lengths"
"""Kind of `memory.derived` for sums of squares of rows; the length of a row is part of the kind."""
PANELS = (256, 128)
"""Widths of a panel in bytes; the first whose panel fits `CACHED` is used."""
CACHED = 5 << 18
"""Most bytes of a panel that stays in a core's cache (measured)."""
PER_ROW = 6
"""Fewest pairs for each row for which copying rows into panels is faster (measured)."""
FAR = 1 << 22
"""Fewest bytes of an output for which writing past the caches is faster (measured)."""


def rounds() -> bool:
    """Return whether the processor multiplies bfloat16, which makes a first search in bfloat16 fast."""
    lib = library()
    return bool(lib is not None and lib.squares > 0)


def encode(x_NI: Tensor, encoder_FI: Tensor, bias_F: Tensor, gate: gates.Gate) -> tuple[Tensor, ...]:
    """Return the kept codes like `torch_ops.encode`.

    A product in bfloat16 may find the candidates. Candidates are computed again in float32, and the gate selects among
    these values.
    """
    N, F = len(x_NI), len(encoder_FI)
    if N and rounds() and x_NI.numel() * F >= BFLOAT16_FROM:
        return _encode_by_bfloat16(x_NI.contiguous(), encoder_FI.contiguous(), bias_F, gate)
    pre_NF = torch.addmm(bias_F, x_NI, encoder_FI.T, out=memory.empty(N, F))
    return select(pre_NF, gate.weight_F, gate.parts)


def select(pre_NF: Tensor, weight_F: Tensor, parts: Sequence[gates.Part]) -> tuple[Tensor, ...]:
    """Return each part's largest positive codes relu(pre) * weight, of equal ones the first, like
    `torch_ops.select`."""
    lib, (N, F), G = library(), pre_NF.shape, len(parts)
    weight_F = weight_F.contiguous()
    edges, count_N, wanted = even(N, RANGES), longs(N), max(1, sum(keep for *_, keep in parts))

    def sample(start: int, stop: int) -> tuple[Tensor, int]:
        value_C = memory.empty(SAMPLE + 16)
        return value_C[
            : lib.sample(address(pre_NF), address(weight_F), *int64s(N, F, start, stop, SAMPLE), address(value_C))
        ], SAMPLE

    def scan(cuts: ctypes.Array[Any], a: int, b: int, room: int) -> tuple[int, Tensor, Tensor]:
        column_C, pre_C = longs(room), memory.empty(room)
        n = lib.scan(
            address(pre_NF),
            address(weight_F),
            *int64s(F),
            _bounds(parts),
            cuts,
            *int64s(G, room),
            address(column_C),
            address(pre_C),
            address(count_N),
            *int64s(a, b),
        )
        return n, column_C[:n], pre_C[:n]

    def above(cuts: ctypes.Array[Any]) -> tuple[Tensor, ...]:
        room = 2
        while True:
            ranges = [
                (a, b, min((b - a) * F, room * wanted * (b - a) // max(1, N) + SAMPLE) + 32)
                for a, b in zip(edges, edges[1:])
            ]
            found = each(lambda part: scan(cuts, *part), ranges)
            if min(n for n, *_ in found) >= 0:
                starts_N = _starts(count_N)
                return starts_N, starts_N[1:], torch.cat([f[1] for f in found]), torch.cat([f[2] for f in found])
            room *= 8

    return _largest(N, weight_F, parts, sample, above)


def _encode_by_bfloat16(x_NI: Tensor, encoder_FI: Tensor, bias_F: Tensor, gate: gates.Gate) -> tuple[Tensor, ...]:
    """Encode by a first search in bfloat16, whose error is bounded by the Cauchy-Schwarz inequality.

    x.w and the product of rounded vectors x'.w' differ by at most |x - x'| |w| + |x'| |w - w'|, plus the rounding error
    of float32 sums. E and T are F and N, padded to whole groups.
    """
    (N, I), F, parts = x_NI.shape, len(encoder_FI), gate.parts
    weight_F, bias_F = gate.weight_F.contiguous(), bias_F.contiguous()
    (x16_TI, x_T, x_lost_T), (w16_EI, w_E, w_lost_E) = (
        _packed(x_NI, True),
        memory.derived(encoder_FI, (TILES, F), lambda: _packed(encoder_FI, False)),
    )
    E, T, steps, scaled_F = len(w_E), len(x_T), -(-I // DEEP), bias_F * weight_F
    # Squares of tiny numbers underflow, so both bounds get small constants. If a length is infinite or its square
    # overflows, all codes are candidates.
    ratio_T = torch.where(x_T > 1e-15, x_lost_T / x_T, 0.0).nan_to_num(0.0)
    off = float(ratio_T.max()) + 2 * I * 2.0**-24 + 1e-5
    margin_E = (w_E * off + 1.01 * w_lost_E + 1e-16).nan_to_num(math.inf, math.inf)
    reach_T = (1.01 * x_T + 1e-12).nan_to_num(math.inf, math.inf)
    reach_T[N:] = -math.inf
    bit_ET, count_T = memory.empty(E * T // GROUP), torch.empty(T, dtype=torch.int32, device="cpu")
    edges = at_most(T // GROUP, AHEAD)

    def sample(start: int, stop: int) -> tuple[Tensor, int]:
        value_SC = memory.empty(SQUARES, 8 * GROUP)
        spread(
            "sample_squares", [w16_EI, x16_TI, weight_F, scaled_F, N, steps, start, stop, value_SC], even(SQUARES, FINE)
        )
        return value_SC, int((value_SC >= 0).sum())

    def of_cuts(size: int, cuts: ctypes.Array[Any]) -> Tensor:
        of_F = torch.zeros(3, size, dtype=torch.float32, device="cpu")
        of_F[0, :F], of_F[1, :F], of_F[2] = bias_F, weight_F, math.inf
        for (start, stop, _), cut in zip(parts, cuts):
            of_F[2, start:stop] = cut
        return of_F

    def above(cuts: ctypes.Array[Any]) -> tuple[Tensor, ...]:
        need_E, of_F = torch.full_like(w_E, math.inf), of_cuts(F, cuts)
        for (start, stop, _), cut in zip(parts, cuts):
            need, bias = cut / weight_F[start:stop], bias_F[start:stop]
            need_E[start:stop] = torch.where(need < math.inf, need - bias - 1e-6 * (need + bias.abs()), math.inf)
        spread("look", [w16_EI, x16_TI, steps, E, need_E, margin_E, reach_T, bit_ET, count_T], edges)
        starts_N = _starts(count_T[:N])
        column_C, pre_C, next_N = longs(C := int(starts_N[-1])), memory.empty(C), starts_N[:-1].clone()
        for first in range(0, N, TOKENS):
            x, bit = x_NI[first : first + TOKENS], bit_ET[E * first // GROUP :]
            groups, count_E = -(-len(x) // GROUP), longs(E)
            spread("count_bits", [bit, groups, E, count_E], even(E, FINE))
            starts_E = _starts(count_E)
            token_D, next_E = torch.empty(int(starts_E[-1]), dtype=torch.int32, device="cpu"), starts_E[:-1].clone()
            spread("list_bits", [bit, groups, E, next_E, token_D], even(E, FINE))
            product_D4 = _dot_panels(starts_E[: F + 1], token_D, x, encoder_FI)
            given = [starts_E, token_D, product_D4, of_F, F, next_N[first:], column_C, pre_C]
            spread("hand_out", given, even(len(x), 1))  # each range reads all pairs
        return starts_N, next_N, column_C, pre_C

    return _largest(N, weight_F, parts, sample, above)


def _starts(count_R: Tensor) -> Tensor:
    """Return the index of each row's first entry, and the total at the end, from counts."""
    return torch.cat([count_R.new_zeros(1, dtype=torch.long), count_R.cumsum(0)])


def _packed(a_RI: Tensor, turned: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows in bfloat16, packed for `look` and padded to whole groups; each row's length and rounding error."""
    R, I = a_RI.shape
    groups, steps = -(-R // GROUP), -(-I // DEEP)
    out, length, lost = (
        memory.empty(groups * steps * GROUP * DEEP // 2),
        memory.empty(groups * GROUP),
        memory.empty(groups * GROUP),
    )
    spread("pack", [a_RI, R, I, turned, not turned and out.nbytes >= FAR, out, length, lost], even(2 * groups, FINE))
    return out, length, lost


def _largest(
    N: int,
    weight_F: Tensor,
    parts: Sequence[gates.Part],
    sample: Callable[[int, int], tuple[Tensor, int]],
    above: Callable[[ctypes.Array[Any]], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """Select each part's largest codes among candidates above a threshold that is estimated from a sample.

    sample   returns sampled codes of the latents [start, stop), and their number
    above    returns the candidates above given thresholds: each token's first and last place, columns and values

    If too few codes exceed the thresholds, the selection is repeated with lower ones.
    """
    lib, G, samples, margin = library(), len(parts), {}, MARGIN
    while True:
        cuts = (ctypes.c_float * G)()
        for g, (start, stop, keep) in enumerate(parts):
            codes = N * (stop - start)
            if codes <= SAMPLE:
                continue
            if g not in samples:
                samples[g] = sample(start, stop)
            value, seen = samples[g]
            share, together = keep / codes * seen, 1.0
            if (
                value.dim() == 2
            ):  # codes of one square are correlated: the design effect is variance over mean (Kish 1965)
                at_S = (value > lib.kth(address(value), *int64s(value.numel(), math.ceil(share) + 1))).sum(1).double()
                together = max(1.0, float(at_S.var() / at_S.mean().clamp_min(1e-9)))
            rank = share + margin * (math.sqrt(share * together) + 1)
            cuts[g] = lib.kth(address(value), *int64s(value.numel(), math.ceil(rank)))
        begin_N, end_N, column_C, pre_C = above(cuts)
        token_P, latent_P, pre_P = torch.empty_like(column_C), torch.empty_like(column_C), torch.empty_like(pre_C)
        starts_N, scratch = longs(N + 1), memory.empty(2, len(pre_C))
        n = lib.keep(
            address(column_C), address(pre_C), address(begin_N), address(end_N), *int64s(N), address(weight_F), _bounds(parts), _wanted(parts), cuts, *int64s(G),
            address(scratch), address(token_P), address(latent_P), address(pre_P), address(starts_N),
        )  # fmt: skip
        if n >= 0:
            return token_P[:n], latent_P[:n], pre_P[:n], starts_N
        margin *= 4


def bucket(latent_P: Tensor, F: int) -> tuple[Tensor, Tensor]:
    """Return the order of the pairs by latent, and each latent's first place in that order (F + 1)."""
    order_P, starts_F = torch.empty_like(latent_P), longs(F + 1)
    library().bucket(address(latent_P), *int64s(len(latent_P), F), address(order_P), address(starts_F))
    return order_P, starts_F


def bag(starts_R: Tensor, order_P: Tensor | None, index_P: Tensor, value_P: Tensor, rows: Tensor) -> Tensor:
    """Return for each r the sum over pairs p in [starts_R[r], starts_R[r + 1]) of value_P[p] * rows[index_P[p]],
    as (R, I).

    `order_P`, if given, is the order in which pairs are summed.
    """
    (R, I), rows, value_P = (len(starts_R) - 1, rows.shape[1]), rows.contiguous(), value_P.contiguous()
    out_RI, panels = memory.empty(R, I), _panels(rows, len(index_P))
    if panels is None:
        spread("bag", [starts_R, order_P, index_P, value_P, rows, I, out_RI], balanced(starts_R, FINE))
        return out_RI
    squares = memory.empty(panels.count, R)
    given = [*_in_order(order_P, index_P, value_P), panels.space, panels.shape(R), out_RI, squares]
    spread("bag_panels", [starts_R, *given], even(panels.count * R, FINE))
    memory.know(out_RI, ENERGY, squares)
    return out_RI


def dot(starts_N: Tensor, latent_P: Tensor, a_NI: Tensor, b_FI: Tensor) -> Tensor:
    """Return for each pair the dot product of its token's row of a and its latent's row of b, (P,)."""
    out_P, a_NI, b_FI = memory.empty(len(latent_P)), a_NI.contiguous(), b_FI.contiguous()
    starts_R, order_P, index_P, own, other = starts_N, None, latent_P, a_NI, b_FI
    if len(b_FI) > 2 * len(a_NI):  # read the larger matrix in order, and the smaller one at random
        order_P, starts_R = bucket(latent_P, len(b_FI))
        tokens_N = torch.arange(len(a_NI))
        index_P, own, other = torch.repeat_interleave(tokens_N, starts_N.diff()), b_FI, a_NI
    spread("dot", [starts_R, order_P, index_P, own, other, a_NI.shape[1], out_P], balanced(starts_R, FINE))
    return out_P


def bag_and_dot(
    starts_R: Tensor, order_P: Tensor, index_P: Tensor, value_P: Tensor, rows: Tensor, own_RI: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `bag` of rows (R, I), and for each pair the dot product of row r of own and its row of rows (P,)."""
    (R, I), out_P = own_RI.shape, memory.empty(len(index_P))
    out_RI, rows, own_RI, value_P = memory.empty(R, I), rows.contiguous(), own_RI.contiguous(), value_P.contiguous()
    panels = _panels(rows, len(index_P))
    if panels is None:
        given = [starts_R, order_P, index_P, value_P, rows, own_RI, I, out_RI, out_P]
        spread("bag_and_dot", given, balanced(starts_R, FINE))
        return out_RI, out_P
    own, shape = panels.beside(own_RI, _panels(own_RI, len(index_P)))
    squares, product_P4 = memory.empty(panels.count, R), memory.empty(len(out_P), 4)
    given = [panels.space, shape, own, out_RI, squares]
    spread(
        "bag_and_dot_panels",
        [starts_R, *_in_order(order_P, index_P, value_P), *given, product_P4],
        balanced(starts_R, RANGES),
    )
    spread("out_of_order", [order_P, product_P4, out_P], even(len(out_P), FINE))
    memory.know(out_RI, ENERGY, squares)
    return out_RI, out_P


def _in_order(order_P: Tensor | None, index_P: Tensor, value_P: Tensor) -> tuple[Tensor, Tensor]:
    """Return latents or tokens and values of pairs in the order and format of sums by panels."""
    index, value = torch.empty(len(index_P), dtype=torch.int32, device="cpu"), memory.empty(len(index_P))
    spread("in_order", [order_P, index_P, value_P, index, value], even(len(index_P), FINE))
    return index, value


def _dot_panels(starts_R: Tensor, index_P: Tensor, rows: Tensor, own_RI: Tensor) -> Tensor:
    """Return for each pair the dot product of row r of own and its row of rows, as four summands (P, 4)."""
    out_P4, panels = memory.empty(len(index_P), 4), _Panels.of(rows)
    spread(
        "dot_panels",
        [starts_R, index_P, panels.space, panels.shape(len(own_RI)), own_RI, out_P4],
        balanced(starts_R, RANGES),
    )
    return out_P4


@dataclass(eq=False)
class _Panels:
    """R rows of I numbers, stored in panels of columns: each panel in `space` holds `wide` bytes of every row."""

    R: int
    I: int
    wide: int
    space: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.space = memory.empty(self.count * self.R * self.wide // 4)

    @classmethod
    def of(cls, rows: Tensor) -> _Panels:
        R, I = rows.shape
        wide = next((wide for wide in PANELS if R * wide <= CACHED), PANELS[-1])
        return memory.derived(rows, (PANELED, R), lambda: cls(R, I, wide).fill(rows))

    def fill(self, rows: Tensor) -> _Panels:
        spread(
            "into_panels",
            [rows, self.R, self.I, self.wide, 0, self.space.nbytes >= FAR, self.space],
            even(self.R, FINE),
        )
        return self

    @property
    def count(self) -> int:
        return -(-self.I * 4 // self.wide)

    def shape(self, sums: int, theirs: int = 0) -> Tensor:
        """Return the shape in the compiled file's format; `theirs` is the panel width of the sums' own rows, 0 for
        none."""
        away = self.I % 16 == 0 and 4 * sums * self.I >= FAR
        return torch.tensor([self.R, self.I, self.wide, 0, sums, away, theirs], device="cpu")

    def beside(self, own_RI: Tensor, panels: _Panels | None) -> tuple[Tensor, Tensor]:
        """Return the storage of own rows, and the matching shape: their panels if the widths fit, else the rows
        themselves."""
        if panels is None or panels.wide not in (self.wide, self.wide // 2):
            return own_RI, self.shape(len(own_RI))
        return panels.space, self.shape(len(own_RI), panels.wide)


def _panels(rows: Tensor, pairs: int) -> _Panels | None:
    """Return the rows in panels if sums over this many pairs read them faster from panels, else None."""
    R, I = rows.shape
    return _Panels.of(rows) if pairs >= PER_ROW * R and R * PANELS[-1] <= CACHED and PANELS[-1] <= 4 * I else None


def adam(value: Tensor, grad: Tensor, mean: Tensor, square: Tensor, numbers: Sequence[float]) -> None:
    """Take one step of Adam in place with the compiled file's `numbers`, and update data derived from the parameter."""
    R = len(value) if value.dim() > 1 else 1
    I = value.numel() // R
    kept, renewed = [0] * 8, {}
    for kind, what in memory.kinds(value).items():
        if kind == (TILES, R):
            kept[:3] = (t.data_ptr() for t in what)
        elif kind == (PANELED, R):
            kept[3:6] = what.space.data_ptr(), what.wide, 0
        elif value.dim() > 1 and kind == (LENGTHS, value.shape[-1]):
            kept[6:] = what.data_ptr(), I // value.shape[-1]
        else:
            continue
        renewed[kind] = what
    given: tuple[Any, ...] = int64_array([R, I]), (ctypes.c_float * len(numbers))(*numbers), int64_array(kept)
    spread("adam", [value, grad, mean, square, *map(ctypes.addressof, given)], even(-(-R // GROUP), FINE))
    memory.wrote(value, mean, square)
    for kind, what in renewed.items():
        memory.know(value, kind, what)


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the length of all tensors together; the squares of their numbers must fit float32."""
    sums = [torch.zeros(1, dtype=torch.double, device="cpu")]
    for tensor in tensors:
        known = memory.known(tensor, ENERGY) if tensor.is_contiguous() else None
        if known is not None:
            sums.append(known.sum(dtype=torch.double)[None])
            continue
        a = tensor.contiguous()
        blocks = -(-a.numel() // BLOCK)
        sums.append(torch.empty(blocks, dtype=torch.double, device="cpu"))
        spread("squares_of", [a, a.numel(), BLOCK, sums[-1]], even(blocks, FINE))
    return torch.cat(sums).sum().sqrt()


def squares(a: Tensor) -> Tensor:
    """Return the sum of squares over the last axis, without gradients."""

    def make() -> Tensor:
        out = torch.empty(a.shape[:-1], dtype=torch.float32, device="cpu")
        spread("squares_of_parts", [a, a.shape[-1], out], even(out.numel(), FINE))
        return out

    return memory.derived(a, (LENGTHS, a.shape[-1]), make)


def divergence(p_PV: Tensor, q_QV: Tensor, p_sums: bool, q_sums: bool) -> Tensor:
    """Return KL(softmax of p || softmax of q) in nat for each row; see `kernels.divergence`."""
    p_PV, q_QV = (t if t.stride(1) == 1 else t.contiguous() for t in (p_PV, q_QV))
    (P, V), Q = p_PV.shape, len(q_QV)
    out_R = memory.empty(max(P, Q))
    given = [p_PV, q_QV, V, P, Q, p_PV.stride(0), q_QV.stride(0), p_sums + 2 * q_sums, out_R]
    spread("divergence", given, even(len(out_R), FINE))
    return out_R


def _wanted(parts: Sequence[gates.Part]) -> ctypes.Array[Any]:
    return int64_array([keep for *_, keep in parts])


def _bounds(parts: Sequence[gates.Part]) -> ctypes.Array[Any]:
    return int64_array([parts[0][0], *(stop for _, stop, _ in parts)])
