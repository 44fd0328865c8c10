"""The compiled kernels of `native.c`, `codes.c`, `panels.c`, `adam.c`, `tiles.c` and `streams.c`, called on as many threads as torch has: float32 on the CPU.

The library knows nothing of Python or torch, so one build serves every version of both. A call gives up the
interpreter's lock; each thread takes ranges of rows that no other writes, so results have the same bits for any number
of threads.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import Parameter

from tunediff.kernels import gates, memory, paths

INTERFACE = 14
"""Which functions of which arguments are expected; `native.c` says the same, and goes up with every change of any file."""
RANGES, FINE = 2, 16
"""Ranges a thread, where Python hands them out and where the compiled file does: more even out rows of unequal cost, and Python
takes its time for each."""
_Work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
SAMPLE, SQUARES = 1 << 15, 1 << 7
"""Codes of a group that its first cut is estimated from, a smaller group having no cut but 0; squares of products of which some are."""
BFLOAT16_FROM = 1 << 28
"""Multiplications of a product from which on searching for codes in bfloat16 first is faster (measured)."""
BEST = 2
"""What the compiled file calls its fastest way to multiply bfloat16 numbers, which it takes where the machine has it."""
DEEP, GROUP, AHEAD = 32, 32, 16
"""Numbers of depth and rows that bfloat16 numbers are packed by; groups of tokens that a thread takes at once."""
BLOCK = 1 << 16
"""Numbers whose squares are added up together."""
SMALL_BLOCK = 1 << 12
"""Numbers that are gated in one turn."""
TILES, PANELED, ENERGY, LENGTHS = "tiles", "panels", "energy", "lengths"
"""What is derived of numbers: so many rows in bfloat16 tiles; in panels, halved or not; sums of squares whose sum is that of all; those of
so many numbers each."""
PANELS, CACHED, PER_ROW, FAR = (256, 128), 5 << 18, 6, 1 << 22
"""Bytes of a row in a panel, the first with which a panel of at most so many fits a core's cache; pairs for each row from which on
copying rows into panels pays, and bytes of sums from which on they go past the caches (measured)."""
TOKENS = 1 << 12
"""Tokens whose candidates are computed together: as many as fit a panel."""
MARGIN = 3.0
"""By how many standard deviations of the estimate more candidates than codes are asked for; too few are noticed."""
HELD = 1 << 26
"""Bytes up to which a thread keeps the room for tiles."""
FEW_ROWS, FEW_WEIGHTS, NARROW = 32, 1 << 16, 192
"""Rows, weights, and rows and columns of weights, from which on tiles are faster (measured): bringing numbers into tiles costs the
same for few sums as for many."""
FEW_NUMBERS = 1 << 14
"""Numbers from which on one pass over them is faster than torch's few (measured)."""
_kept = threading.local()


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled file, or None where tunediff was installed without a compiler."""
    found = importlib.util.find_spec("tunediff.kernels.cpu._native")
    if found is None or found.origin is None:
        return None
    try:
        out = ctypes.CDLL(found.origin)
        if out.interface() != INTERFACE:
            return None
        out.tiles = bool(out.has_tiles())  # which asks the system to let this process use them
        out.squares = out.squares_by(BEST)
        if out.tiles:
            for size in (out.room, out.kept_room, out.bring, out.deepest, out.summed_columns):
                size.restype = ctypes.c_int64
        for counts in (out.scan, out.sample, out.keep):
            counts.restype = ctypes.c_int64
        out.kth.restype = ctypes.c_float
    except (OSError, AttributeError):  # built for another machine, or long ago
        return None
    return out


def serves(*tensors: Tensor) -> bool:
    """Whether these kernels are there, are allowed, and can work on the tensors."""
    return (
        paths.allows("native")
        and library() is not None
        and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
    )


def rounds() -> bool:
    """Whether the processor multiplies bfloat16, so that codes are searched for in it first."""
    lib = library()
    return lib is not None and lib.squares > 0


def encode(x_NI: Tensor, encoder_FI: Tensor, bias_F: Tensor, gate: gates.Gate) -> tuple[Tensor, ...]:
    """What `torch_ops.encode` answers. The product may be made in bfloat16, and only says which codes cannot be kept: all
    others are computed again in float32, and among those the gate decides."""
    N, F = len(x_NI), len(encoder_FI)
    if N and rounds() and x_NI.numel() * F >= BFLOAT16_FROM:
        return _encode_by_bfloat16(x_NI.contiguous(), encoder_FI.contiguous(), bias_F, gate)
    pre_NF = torch.addmm(bias_F, x_NI, encoder_FI.T, out=memory.empty(N, F))
    return select(pre_NF, gate.weight_F, gate.parts)


def select(pre_NF: Tensor, weight_F: Tensor, parts: Sequence[gates.Part]) -> tuple[Tensor, ...]:
    """Of each part the largest positive codes relu(pre) * weight, of equal ones the first; as `torch_ops.select`."""
    lib, (N, F), G = library(), pre_NF.shape, len(parts)
    weight_F = weight_F.contiguous()
    edges, count_N, wanted = _even(N, RANGES), _longs(N), max(1, sum(keep for *_, keep in parts))

    def sample(start: int, stop: int) -> tuple[Tensor, int]:
        value_C = memory.empty(SAMPLE + 16)
        return value_C[: lib.sample(_at(pre_NF), _at(weight_F), *_i(N, F, start, stop, SAMPLE), _at(value_C))], SAMPLE

    def scan(cuts: ctypes.Array, a: int, b: int, room: int) -> tuple[int, Tensor, Tensor]:
        column_C, pre_C = _longs(room), memory.empty(room)
        n = lib.scan(
            _at(pre_NF),
            _at(weight_F),
            *_i(F),
            _bounds(parts),
            cuts,
            *_i(G, room),
            _at(column_C),
            _at(pre_C),
            _at(count_N),
            *_i(a, b),
        )
        return n, column_C[:n], pre_C[:n]

    def above(cuts: ctypes.Array) -> tuple[Tensor, ...]:
        room = 2
        while True:
            ranges = [
                (a, b, min((b - a) * F, room * wanted * (b - a) // max(1, N) + SAMPLE) + 32)
                for a, b in zip(edges, edges[1:])
            ]
            found = _each(lambda part: scan(cuts, *part), ranges)
            if min(n for n, *_ in found) >= 0:
                starts_N = _starts(count_N)
                return starts_N, starts_N[1:], torch.cat([f[1] for f in found]), torch.cat([f[2] for f in found])
            room *= 8

    return _largest(N, weight_F, parts, sample, above)


def _encode_by_bfloat16(x_NI: Tensor, encoder_FI: Tensor, bias_F: Tensor, gate: gates.Gate) -> tuple[Tensor, ...]:
    """By Cauchy and Schwarz x.w and its rounded product differ by at most |x - x'| |w| + |x'| |w - w'|, to which comes what sums
    in float32 lose. E is F and T is N, filled up to whole groups."""
    (N, I), F, parts = x_NI.shape, len(encoder_FI), gate.parts
    weight_F, bias_F = gate.weight_F.contiguous(), bias_F.contiguous()
    (x16_TI, x_T, x_lost_T), (w16_EI, w_E, w_lost_E) = (
        _packed(x_NI, True),
        memory.derived(encoder_FI, (TILES, F), lambda: _packed(encoder_FI, False)),
    )
    E, T, steps, scaled_F = len(w_E), len(x_T), -(-I // DEEP), bias_F * weight_F
    # Of tiny numbers squares are lost, and what is left of them by rounding, so both sides get some more; of infinite lengths, as
    # of numbers whose squares are, all codes are candidates.
    ratio_T = torch.where(x_T > 1e-15, x_lost_T / x_T, 0.0).nan_to_num(0.0)
    off = float(ratio_T.max()) + 2 * I * 2.0**-24 + 1e-5
    margin_E = (w_E * off + 1.01 * w_lost_E + 1e-16).nan_to_num(math.inf, math.inf)
    reach_T = (1.01 * x_T + 1e-12).nan_to_num(math.inf, math.inf)
    reach_T[N:] = -math.inf
    bit_ET, count_T = memory.empty(E * T // GROUP), torch.empty(T, dtype=torch.int32, device="cpu")
    edges = _ranges(T // GROUP, AHEAD)

    def sample(start: int, stop: int) -> tuple[Tensor, int]:
        value_SC = memory.empty(SQUARES, 8 * GROUP)
        _spread(
            "sample_squares",
            [w16_EI, x16_TI, weight_F, scaled_F, N, steps, start, stop, value_SC],
            _even(SQUARES, FINE),
        )
        return value_SC, int((value_SC >= 0).sum())

    def of_cuts(size: int, cuts: ctypes.Array) -> Tensor:
        of_F = torch.zeros(3, size, dtype=torch.float32, device="cpu")
        of_F[0, :F], of_F[1, :F], of_F[2] = bias_F, weight_F, math.inf
        for (start, stop, _), cut in zip(parts, cuts):
            of_F[2, start:stop] = cut
        return of_F

    def above(cuts: ctypes.Array) -> tuple[Tensor, ...]:
        need_E, of_F = torch.full_like(w_E, math.inf), of_cuts(F, cuts)
        for (start, stop, _), cut in zip(parts, cuts):
            need, bias = cut / weight_F[start:stop], bias_F[start:stop]
            need_E[start:stop] = torch.where(need < math.inf, need - bias - 1e-6 * (need + bias.abs()), math.inf)
        _spread("look", [w16_EI, x16_TI, steps, E, need_E, margin_E, reach_T, bit_ET, count_T], edges)
        starts_N = _starts(count_T[:N])
        column_C, pre_C, next_N = _longs(C := int(starts_N[-1])), memory.empty(C), starts_N[:-1].clone()
        for first in range(0, N, TOKENS):
            x, bit = x_NI[first : first + TOKENS], bit_ET[E * first // GROUP :]
            groups, count_E = -(-len(x) // GROUP), _longs(E)
            _spread("count_bits", [bit, groups, E, count_E], _even(E, FINE))
            starts_E = _starts(count_E)
            token_D, next_E = torch.empty(int(starts_E[-1]), dtype=torch.int32, device="cpu"), starts_E[:-1].clone()
            _spread("list_bits", [bit, groups, E, next_E, token_D], _even(E, FINE))
            product_D4 = _dot_panels(starts_E[: F + 1], token_D, x, encoder_FI)
            given = [starts_E, token_D, product_D4, of_F, F, next_N[first:], column_C, pre_C]
            _spread("hand_out", given, _even(len(x), 1))  # each range looks at all
        return starts_N, next_N, column_C, pre_C

    return _largest(N, weight_F, parts, sample, above)


def _starts(count_R: Tensor) -> Tensor:
    """Where each row's begin, and the last one's end."""
    return torch.cat([count_R.new_zeros(1, dtype=torch.long), count_R.cumsum(0)])


def _packed(a_RI: Tensor, turned: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in bfloat16 as `look` takes them, filled up to whole groups; the length of each, and of what rounding took."""
    R, I = a_RI.shape
    groups, steps = -(-R // GROUP), -(-I // DEEP)
    out, length, lost = (
        memory.empty(groups * steps * GROUP * DEEP // 2),
        memory.empty(groups * GROUP),
        memory.empty(groups * GROUP),
    )
    _spread("pack", [a_RI, R, I, turned, not turned and out.nbytes >= FAR, out, length, lost], _even(2 * groups, FINE))
    return out, length, lost


def _largest(
    N: int, weight_F: Tensor, parts: Sequence[gates.Part], sample: Callable, above: Callable
) -> tuple[Tensor, ...]:
    """Estimate a cut for each part from a `sample` of its codes, have all candidates `above` it found, their number for each
    token, columns and values, and keep the largest. If too few exceed the cut, some might have been missed: anew, lower."""
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
            ):  # codes of one square come together: the variance of their number over its mean (Kish 1965)
                at_S = (value > lib.kth(_at(value), *_i(value.numel(), math.ceil(share) + 1))).sum(1).double()
                together = max(1.0, float(at_S.var() / at_S.mean().clamp_min(1e-9)))
            rank = share + margin * (math.sqrt(share * together) + 1)
            cuts[g] = lib.kth(_at(value), *_i(value.numel(), math.ceil(rank)))
        begin_N, end_N, column_C, pre_C = above(cuts)
        token_P, latent_P, pre_P = torch.empty_like(column_C), torch.empty_like(column_C), torch.empty_like(pre_C)
        starts_N, scratch = _longs(N + 1), memory.empty(2, len(pre_C))
        n = lib.keep(
            _at(column_C), _at(pre_C), _at(begin_N), _at(end_N), *_i(N), _at(weight_F), _bounds(parts), _wanted(parts), cuts, *_i(G),
            _at(scratch), _at(token_P), _at(latent_P), _at(pre_P), _at(starts_N),
        )  # fmt: skip
        if n >= 0:
            return token_P[:n], latent_P[:n], pre_P[:n], starts_N
        margin *= 4


def bucket(latent_P: Tensor, F: int) -> tuple[Tensor, Tensor]:
    """The pairs in the order of their latents, and where each latent's begin (F + 1)."""
    order_P, starts_F = torch.empty_like(latent_P), _longs(F + 1)
    library().bucket(_at(latent_P), *_i(len(latent_P), F), _at(order_P), _at(starts_F))
    return order_P, starts_F


def bag(starts_R: Tensor, order_P: Tensor | None, index_P: Tensor, value_P: Tensor, rows: Tensor) -> Tensor:
    """For each r the sum over pairs p in [starts_R[r], starts_R[r + 1]) of value_P[p] * rows[index_P[p]], (R, I);
    pairs are taken in `order_P`, if given."""
    (R, I), rows, value_P = (len(starts_R) - 1, rows.shape[1]), rows.contiguous(), value_P.contiguous()
    out_RI, panels = memory.empty(R, I), _panels(rows, len(index_P))
    if panels is None:
        _spread("bag", [starts_R, order_P, index_P, value_P, rows, I, out_RI], _balanced(starts_R, FINE))
        return out_RI
    squares = memory.empty(panels.count, R)
    given = [*_in_order(order_P, index_P, value_P), panels.space, panels.shape(R), out_RI, squares]
    _spread("bag_panels", [starts_R, *given], _even(panels.count * R, FINE))
    memory.know(out_RI, ENERGY, squares)
    return out_RI


def dot(starts_N: Tensor, latent_P: Tensor, a_NI: Tensor, b_FI: Tensor) -> Tensor:
    """For each pair the product of its token's row of a and its latent's row of b, (P,)."""
    out_P, a_NI, b_FI = memory.empty(len(latent_P)), a_NI.contiguous(), b_FI.contiguous()
    starts_R, order_P, index_P, own, other = starts_N, None, latent_P, a_NI, b_FI
    if len(b_FI) > 2 * len(a_NI):  # one by one through the larger matrix, here and there in the smaller one
        order_P, starts_R = bucket(latent_P, len(b_FI))
        tokens_N = torch.arange(len(a_NI))
        index_P, own, other = torch.repeat_interleave(tokens_N, starts_N.diff()), b_FI, a_NI
    _spread("dot", [starts_R, order_P, index_P, own, other, a_NI.shape[1], out_P], _balanced(starts_R, FINE))
    return out_P


def bag_and_dot(
    starts_R: Tensor, order_P: Tensor, index_P: Tensor, value_P: Tensor, rows: Tensor, own_RI: Tensor
) -> tuple[Tensor, Tensor]:
    """`bag` of rows (R, I), and for each pair the product of its r's row of own and its row of rows (P,)."""
    (R, I), out_P = own_RI.shape, memory.empty(len(index_P))
    out_RI, rows, own_RI, value_P = memory.empty(R, I), rows.contiguous(), own_RI.contiguous(), value_P.contiguous()
    panels = _panels(rows, len(index_P))
    if panels is None:
        given = [starts_R, order_P, index_P, value_P, rows, own_RI, I, out_RI, out_P]
        _spread("bag_and_dot", given, _balanced(starts_R, FINE))
        return out_RI, out_P
    own, shape = panels.beside(own_RI, _panels(own_RI, len(index_P)))
    squares, product_P4 = memory.empty(panels.count, R), memory.empty(len(out_P), 4)
    given = [panels.space, shape, own, out_RI, squares]
    _spread(
        "bag_and_dot_panels",
        [starts_R, *_in_order(order_P, index_P, value_P), *given, product_P4],
        _balanced(starts_R, RANGES),
    )
    _spread("out_of_order", [order_P, product_P4, out_P], _even(len(out_P), FINE))
    memory.know(out_RI, ENERGY, squares)
    return out_RI, out_P


def _in_order(order_P: Tensor | None, index_P: Tensor, value_P: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs as sums by panels take them."""
    index, value = torch.empty(len(index_P), dtype=torch.int32, device="cpu"), memory.empty(len(index_P))
    _spread("in_order", [order_P, index_P, value_P, index, value], _even(len(index_P), FINE))
    return index, value


def _dot_panels(starts_R: Tensor, index_P: Tensor, rows: Tensor, own_RI: Tensor) -> Tensor:
    """For each pair the product of its r's row of own and its row of rows, in four parts to be added up (P, 4)."""
    out_P4, panels = memory.empty(len(index_P), 4), _Panels.of(rows)
    _spread(
        "dot_panels",
        [starts_R, index_P, panels.space, panels.shape(len(own_RI)), own_RI, out_P4],
        _balanced(starts_R, RANGES),
    )
    return out_P4


@dataclass(eq=False)
class _Panels:
    """R rows of I numbers, stored a few columns at a time: panels in `space` hold `wide` bytes of each row."""

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
        _spread(
            "into_panels",
            [rows, self.R, self.I, self.wide, 0, self.space.nbytes >= FAR, self.space],
            _even(self.R, FINE),
        )
        return self

    @property
    def count(self) -> int:
        return -(-self.I * 4 // self.wide)

    def shape(self, sums: int, theirs: int = 0) -> Tensor:
        """As the compiled file takes it, for so many sums; in panels of how many bytes of a row these have their own rows, if in any."""
        away = self.I % 16 == 0 and 4 * sums * self.I >= FAR
        return torch.tensor([self.R, self.I, self.wide, 0, sums, away, theirs], device="cpu")

    def beside(self, own_RI: Tensor, panels: _Panels | None) -> tuple[Tensor, Tensor]:
        """Where own rows are read from, and the shape that says so: from their panels, one line after the other, if they are in some that fit."""
        if panels is None or panels.wide not in (self.wide, self.wide // 2):
            return own_RI, self.shape(len(own_RI))
        return panels.space, self.shape(len(own_RI), panels.wide)


def _panels(rows: Tensor, pairs: int) -> _Panels | None:
    """The rows as sums over so many pairs read them fastest; None where that is as they are. In bfloat16 where that is allowed."""
    R, I = rows.shape
    return _Panels.of(rows) if pairs >= PER_ROW * R and R * PANELS[-1] <= CACHED and PANELS[-1] <= 4 * I else None


def adam(value: Tensor, grad: Tensor, mean: Tensor, square: Tensor, numbers: Sequence[float]) -> None:
    """A step of Adam on rows in place, by the `numbers` that the compiled file asks for; what was derived of them is derived anew."""
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
    given = _array([R, I]), (ctypes.c_float * len(numbers))(*numbers), _array(kept)
    _spread("adam", [value, grad, mean, square, *map(ctypes.addressof, given)], _even(-(-R // GROUP), FINE))
    memory.wrote(value, mean, square)
    for kind, what in renewed.items():
        memory.know(value, kind, what)


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The length of all of them together, of numbers whose squares float32 holds."""
    sums = [torch.zeros(1, dtype=torch.double, device="cpu")]
    for tensor in tensors:
        known = memory.known(tensor, ENERGY) if tensor.is_contiguous() else None
        if known is not None:
            sums.append(known.sum(dtype=torch.double)[None])
            continue
        a = tensor.contiguous()
        blocks = -(-a.numel() // BLOCK)
        sums.append(torch.empty(blocks, dtype=torch.double, device="cpu"))
        _spread("squares_of", [a, a.numel(), BLOCK, sums[-1]], _even(blocks, FINE))
    return torch.cat(sums).sum().sqrt()


def squares(a: Tensor) -> Tensor:
    """The sum of squares over the last axis, without gradients."""

    def make() -> Tensor:
        out = torch.empty(a.shape[:-1], dtype=torch.float32, device="cpu")
        _spread("squares_of_parts", [a, a.shape[-1], out], _even(out.numel(), FINE))
        return out

    return memory.derived(a, (LENGTHS, a.shape[-1]), make)


def passes(x: Tensor, other: Tensor) -> bool:
    """Whether `rms_norm`, `gated` or `rotated` of these serves and pays: torch's operations take as long over a few numbers."""
    return x.numel() >= FEW_NUMBERS and type(x) is Tensor and type(other) in (Tensor, Parameter) and serves(x, other)


def rms_norm(x_NI: Tensor, weight_I: Tensor, epsilon: float) -> Tensor:
    """weight * x / sqrt(mean of x * x + epsilon) of each row."""
    x_NI, weight_I = x_NI.contiguous(), weight_I.contiguous()
    out_NI, epsilon_ = torch.empty_like(x_NI), ctypes.c_double(epsilon)
    N, I = x_NI.shape
    _spread("rms_norm", [x_NI, weight_I, ctypes.addressof(epsilon_), I, out_NI], _even(N, FINE))
    return out_NI


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """gate * sigmoid(gate) * up."""
    gate, up = gate.contiguous(), up.contiguous()
    out, blocks = torch.empty_like(gate), -(-gate.numel() // SMALL_BLOCK)
    _spread("gated", [gate, up, gate.numel(), SMALL_BLOCK, out], _even(blocks, FINE))
    return out


def rotated(x_BHTE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor) -> Tensor:
    """x * cos + (the second half of x negated, then the first) * sin; the angles are those of one batch or of each."""
    if x_BHTE.stride(3) != 1:
        x_BHTE = x_BHTE.contiguous()
    cos_BTE, sin_BTE, (B, H, T, E) = cos_BTE.contiguous(), sin_BTE.contiguous(), x_BHTE.shape
    out_BHTE = torch.empty(B, H, T, E, dtype=torch.float32, device="cpu")
    sizes = _array([H, T, E, *x_BHTE.stride()[:3], T * E * (len(cos_BTE) > 1)])
    _spread("rotated", [x_BHTE, cos_BTE, sin_BTE, ctypes.addressof(sizes), out_BHTE], _even(B * H * T, FINE))
    return out_BHTE


def divergence(p_PV: Tensor, q_QV: Tensor, p_sums: bool, q_sums: bool) -> Tensor:
    """As `kernels.divergence`."""
    p_PV, q_QV = (t if t.stride(1) == 1 else t.contiguous() for t in (p_PV, q_QV))
    (P, V), Q = p_PV.shape, len(q_QV)
    out_R = memory.empty(max(P, Q))
    given = [p_PV, q_QV, V, P, Q, p_PV.stride(0), q_QV.stride(0), p_sums + 2 * q_sums, out_R]
    _spread("divergence", given, _even(len(out_R), FINE))
    return out_R


def on_tiles() -> bool:
    """Whether float32 products may be made on tiles of bfloat16: the machine has them, and they are as exact."""
    return paths.allows("native") and library() is not None and _tiles_are_exact()


@lru_cache(maxsize=1)
def _tiles_are_exact() -> bool:
    if not library().tiles:
        return False
    generator = torch.Generator().manual_seed(0)
    x_NI, w_OI = (torch.randn(n, 300, generator=generator, dtype=torch.float32, device="cpu") for n in (70, 50))
    exact = x_NI.double() @ w_OI.double().T
    return float((product(x_NI, w_OI) - exact).norm() / exact.norm()) <= 1e-6


class Tiles:
    """A product's right side (O, I) in bfloat16 tiles, to be multiplied by again and again: half as many bytes as in float32 where one
    part holds its numbers, as many where two do, half as many more where all three are needed."""

    def __init__(self, w_OI: Tensor, parts: int = 1):
        self.shape, w_OI = w_OI.shape, _rows(w_OI)
        self.space = torch.empty(bytes_of_tiles(w_OI, parts), dtype=torch.uint8, device="cpu")
        sizes, threads = _i(*w_OI.shape, w_OI.stride(0), parts), torch.get_num_threads()
        self.parts, self.needed = parts, library().bring(_at(w_OI), *sizes, _at(self.space), _team(), *_i(threads))

    @property
    def nbytes(self) -> int:
        return self.space.nbytes


def bytes_of_tiles(w_OI: Tensor, parts: int) -> int:
    return library().kept_room(*_i(*w_OI.shape, parts))


def tiles(w_OI: Tensor, room: int) -> Tiles | None:
    """Weights in tiles, where `product` by them can be made and is faster than torch's; None where they take more bytes than that."""
    if not _fits(w_OI):
        return None
    parts = 1  # which is what published weights mostly need, and what it takes to see it
    while bytes_of_tiles(w_OI, parts) <= room:
        made = Tiles(w_OI, parts)
        if made.needed <= parts:
            return made
        parts = made.needed
    return None


def multiplies(x: Tensor, w_OI: Tensor | Tiles, few: bool = False) -> bool:
    """Whether `product` of x (..., I) can be made and is faster than torch's, or, for `few` rows, is asked for."""
    rows = x.numel() // max(1, x.shape[-1])
    if type(x) is not Tensor or x.shape[-1] != w_OI.shape[1] or rows < (1 if few else FEW_ROWS) or not serves(x):
        return False
    return isinstance(w_OI, Tiles) or _fits(w_OI)


def _fits(w_OI: Tensor) -> bool:
    """Whether products by these weights are made on tiles; other classes may hold their numbers elsewhere, or not have any."""
    large = w_OI.numel() >= FEW_WEIGHTS and min(w_OI.shape) >= NARROW
    return large and type(w_OI) in (Tensor, Parameter) and serves(w_OI) and on_tiles()


def product(x_NI: Tensor, w_OI: Tensor | Tiles) -> Tensor:
    """x @ w.T (N, O), as exact as in float32, on a processor's tiles of bfloat16; N, O and I are at least 1."""
    kept = w_OI if isinstance(w_OI, Tiles) else None
    x_NI, w_OI = _rows(x_NI), None if kept else _rows(w_OI)
    lib, (N, I), O, threads = library(), x_NI.shape, (kept or w_OI).shape[0], torch.get_num_threads()
    out_NO, room = (
        torch.empty(N, O, dtype=torch.float32, device="cpu"),
        _room(lib.room(*_i(N, O, I, bool(kept), False, threads))),
    )
    given = (None, _at(kept.space), *_i(kept.parts)) if kept else (_at(w_OI), None, *_i(0))
    lib.multiply(
        _at(x_NI),
        *given,
        _at(out_NO),
        *_i(N, O, I, x_NI.stride(0), 0 if kept else w_OI.stride(0)),
        _at(room),
        _team(),
        *_i(threads),
    )
    return out_NO


def sums_softmax(x_RD: Tensor, kept: Tiles, logp_QV: Tensor) -> bool:
    """Whether `softmax_sums` of these serves."""
    fits = (
        type(logp_QV) is Tensor
        and serves(logp_QV)
        and logp_QV.shape[1] == kept.shape[0]
        and kept.shape[1] <= library().deepest()
    )
    return fits and len(logp_QV) > 0 and len(x_RD) % len(logp_QV) == 0 and multiplies(x_RD, kept, few=True)


def softmax_sums(x_RD: Tensor, kept: Tiles, logp_QV: Tensor, start_R: Tensor, theirs: bool) -> Tensor:
    """Of logits l = x @ w.T, which are never in memory, and p = exp(l - start): the sums (R, 3) over all columns of p, of
    p * (l - start - logp) and of p, or of q * (l - start - logp) and of q = exp(logp) if `theirs`; in float64 over 256 columns each.
    Rows of logp begin anew; what exceeds e^88 counts as infinite."""
    x_RD, logp_QV = _rows(x_RD), _rows(logp_QV)
    lib, (R, D), V, threads = library(), x_RD.shape, kept.shape[0], torch.get_num_threads()
    sums, room = memory.empty(-(-V // lib.summed_columns()), R, 3), _room(lib.room(*_i(R, V, D, True, True, threads)))
    lib.softmax_sums(
        _at(x_RD), _at(kept.space), *_i(kept.parts), _at(logp_QV), *_i(len(logp_QV), logp_QV.stride(0)), _at(start_R), *_i(theirs), _at(sums),
        *_i(R, V, D, x_RD.stride(0)), _at(room), _team(), *_i(threads),
    )  # fmt: skip
    return sums.double().sum(0)


def _rows(x_NI: Tensor) -> Tensor:
    """A matrix whose rows' numbers lie side by side."""
    return x_NI if x_NI.stride(1) == 1 else x_NI.contiguous()


def _room(size: int) -> Tensor:
    """So many bytes, nobody else's until this thread asks again."""
    room = getattr(_kept, "room", None)
    if room is None or len(room) < size:
        room = torch.empty(size, dtype=torch.uint8, device="cpu")
        _kept.room = room if size <= HELD else None
    return room


# -- ranges and threads --------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _team() -> Callable | None:
    """OpenMP's call that runs a function on every thread of torch's own team, where torch's build has one."""
    try:
        return ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return None


@lru_cache(maxsize=1)
def _threads(n: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n, thread_name_prefix="tunediff-kernels")


def _each(run: Callable, parts: Sequence) -> list:
    """`run` on every part, on as many threads as torch has: on torch's own, which after an operation spin for the next one
    and would be in the way of others."""
    n, team = torch.get_num_threads(), _team()
    if len(parts) == 1 or n == 1:
        return [run(part) for part in parts]
    if team is None:
        return list(_threads(n).map(run, parts))
    out, raised, turns = [None] * len(parts), [], iter(enumerate(parts))

    def work(_: int | None) -> None:
        try:
            for at, part in turns:  # whoever is free takes the next
                out[at] = run(part)
        except BaseException as error:  # none may pass through OpenMP's frames
            raised.append(error)

    team(_Work(work), None, ctypes.c_uint(n), ctypes.c_uint(0))
    if raised:
        raise raised[0]
    return out


def _spread(kernel: str, given: Sequence[Tensor | int | None], edges: Sequence[int]) -> None:
    """A kernel on the ranges between these rows, by as many threads as torch has; each takes the next when it is free."""
    lib, threads, team = library(), torch.get_num_threads(), _team()
    numbers = [g.data_ptr() if isinstance(g, Tensor) else g or 0 for g in given]
    if threads > 1 and team is None:
        list(_threads(threads).map(lambda *part: getattr(lib, kernel)(*_i(*numbers, *part)), edges[:-1], edges[1:]))
    else:
        ranges = _array(edges), *_i(len(edges) - 1)
        if not lib.spread(getattr(lib, kernel), _array(numbers), *_i(len(numbers)), *ranges, team, *_i(threads)):
            raise TypeError(f"{kernel} takes {len(numbers)} arguments, which `spread` does not know")


def _even(rows: int, ranges: int) -> list[int]:
    """Where ranges of equally many rows begin and end, so many for each thread."""
    n = torch.get_num_threads()
    n = max(1, min(rows, n * ranges)) if n > 1 else 1
    return [rows * i // n for i in range(n + 1)]


def _ranges(groups: int, most: int) -> list[int]:
    """Where ranges of at most so many groups begin and end, as many for each thread."""
    n = torch.get_num_threads()
    n = min(groups, n * -(-groups // (n * most)))
    return [groups * i // n for i in range(n + 1)]


def _balanced(starts_R: Tensor, ranges: int) -> list[int]:
    """Where ranges of about equally many pairs and rows begin and end, so many for each thread."""
    n, rows = torch.get_num_threads(), len(starts_R) - 1
    if n == 1 or rows < 2:
        return [0, rows]
    cost_R = starts_R + torch.arange(rows + 1)
    at = torch.searchsorted(cost_R, torch.linspace(0, float(cost_R[-1]), n * ranges + 1)[1:-1].long()).tolist()
    return sorted({0, *at, rows})


def _longs(n: int) -> Tensor:
    return torch.empty(n, dtype=torch.long, device="cpu")


def _array(numbers: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _wanted(parts: Sequence[gates.Part]) -> ctypes.Array:
    return _array([keep for *_, keep in parts])


def _bounds(parts: Sequence[gates.Part]) -> ctypes.Array:
    return _array([parts[0][0], *(stop for _, stop, _ in parts)])


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr() if tensor is not None else None)


def _i(*numbers: int) -> tuple[ctypes.c_int64, ...]:
    return tuple(map(ctypes.c_int64, numbers))
