"""Float32 products on a processor's bfloat16 tile units, as exact as torch's and faster."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from tunediff.kernels import memory, paths
from tunediff.kernels.cpu import compiled
from tunediff.kernels.cpu.compiled import address, int64s, library, serves

FEW_ROWS = 32
"""Fewest rows of a product for which tiles are faster (measured)."""
FEW_WEIGHTS = 1 << 16
"""Fewest weights for which tiles are faster (measured), because conversion to tiles has a fixed cost."""
NARROW = 192
"""Fewest rows and fewest columns of a weight for which tiles are faster (measured)."""
HELD_BYTES = 1 << 26
"""Most bytes of working memory that a thread keeps for its next product."""
_held = threading.local()


def on_tiles() -> bool:
    """Return whether bfloat16 tiles may be used for float32 products: allowed, available and found to be as exact."""
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
    """A weight (O, I) converted to bfloat16 tiles for many products.

    Each number is the sum of one to three bfloat16 parts, so tiles take 0.5, 1 or 1.5 times the bytes of float32.
    """

    def __init__(self, w_OI: Tensor, parts: int = 1):
        self.shape, w_OI = w_OI.shape, _rows(w_OI)
        self.space = torch.empty(bytes_of_tiles(w_OI, parts), dtype=torch.uint8, device="cpu")
        sizes, threads = int64s(*w_OI.shape, w_OI.stride(0), parts), torch.get_num_threads()
        self.parts, self.needed = (
            parts,
            library().bring(address(w_OI), *sizes, address(self.space), compiled.team(), *int64s(threads)),
        )

    @property
    def nbytes(self) -> int:
        return self.space.nbytes


def bytes_of_tiles(w_OI: Tensor, parts: int) -> int:
    return int(library().kept_room(*int64s(*w_OI.shape, parts)))


def tiles(w_OI: Tensor, room: int) -> Tiles | None:
    """Return a weight in tiles, or None if `product` with it is not faster than torch's or tiles exceed `room`
    bytes."""
    if not _fits(w_OI):
        return None
    parts = 1  # enough for most published weights; the conversion reports how many parts are needed
    while bytes_of_tiles(w_OI, parts) <= room:
        made = Tiles(w_OI, parts)
        if made.needed <= parts:
            return made
        parts = made.needed
    return None


def multiplies(x: Tensor, w_OI: Tensor | Tiles, few: bool = False) -> bool:
    """Return whether `product` of x (..., I) is possible and faster than torch's; `few` allows it for few rows too."""
    rows = x.numel() // max(1, x.shape[-1])
    if type(x) is not Tensor or x.shape[-1] != w_OI.shape[1] or rows < (1 if few else FEW_ROWS) or not serves(x):
        return False
    return isinstance(w_OI, Tiles) or _fits(w_OI)


def _fits(w_OI: Tensor) -> bool:
    """Return whether tiles are used for this weight: large enough and a plain tensor, because subclasses may hold no
    numbers."""
    large = w_OI.numel() >= FEW_WEIGHTS and min(w_OI.shape) >= NARROW
    return large and type(w_OI) in (Tensor, Parameter) and serves(w_OI) and on_tiles()


def product(x_NI: Tensor, w_OI: Tensor | Tiles) -> Tensor:
    """Return x @ w.T (N, O), as exact as in float32, from bfloat16 tiles; N, O and I are at least 1."""
    x_NI = _rows(x_NI)
    given: tuple[Any, ...]
    if isinstance(w_OI, Tiles):
        given, stride = (None, address(w_OI.space), *int64s(w_OI.parts)), 0
    else:
        w_OI = _rows(w_OI)
        given, stride = (address(w_OI), None, *int64s(0)), w_OI.stride(0)
    lib, (N, I), O, threads = library(), x_NI.shape, w_OI.shape[0], torch.get_num_threads()
    out_NO = torch.empty(N, O, dtype=torch.float32, device="cpu")
    room = _room(lib.room(*int64s(N, O, I, isinstance(w_OI, Tiles), False, threads)))
    lib.multiply(
        address(x_NI),
        *given,
        address(out_NO),
        *int64s(N, O, I, x_NI.stride(0), stride),
        address(room),
        compiled.team(),
        *int64s(threads),
    )
    return out_NO


def sums_softmax(x_RD: Tensor, kept: Tiles, logp_QV: Tensor) -> bool:
    """Return whether `softmax_sums` supports these operands."""
    fits = (
        type(logp_QV) is Tensor
        and serves(logp_QV)
        and logp_QV.shape[1] == kept.shape[0]
        and kept.shape[1] <= library().deepest()
    )
    return fits and len(logp_QV) > 0 and len(x_RD) % len(logp_QV) == 0 and multiplies(x_RD, kept, few=True)


def softmax_sums(x_RD: Tensor, kept: Tiles, logp_QV: Tensor, start_R: Tensor, theirs: bool) -> Tensor:
    """Return three sums over the columns of each row (R, 3), from logits l = x @ w.T that are never stored.

    With p = exp(l - start), the sums are of p, of p * (l - start - logp), and of p. If `theirs`, the second and third
    sums are of q * (l - start - logp) and of q = exp(logp). Blocks of 256 columns are added in float64. Rows of logp
    are repeated, and values above e^88 count as infinite.
    """
    x_RD, logp_QV = _rows(x_RD), _rows(logp_QV)
    lib, (R, D), V, threads = library(), x_RD.shape, kept.shape[0], torch.get_num_threads()
    sums, room = (
        memory.empty(-(-V // lib.summed_columns()), R, 3),
        _room(lib.room(*int64s(R, V, D, True, True, threads))),
    )
    lib.softmax_sums(
        address(x_RD), address(kept.space), *int64s(kept.parts), address(logp_QV), *int64s(len(logp_QV), logp_QV.stride(0)), address(start_R), *int64s(theirs), address(sums),
        *int64s(R, V, D, x_RD.stride(0)), address(room), compiled.team(), *int64s(threads),
    )  # fmt: skip
    return sums.double().sum(0)


def _rows(x_NI: Tensor) -> Tensor:
    """Return the matrix with each row contiguous in memory."""
    return x_NI if x_NI.stride(1) == 1 else x_NI.contiguous()


def _room(size: int) -> Tensor:
    """Return `size` bytes of working memory, valid until this thread calls again."""
    room = getattr(_held, "room", None)
    if room is None or len(room) < size:
        room = torch.empty(size, dtype=torch.uint8, device="cpu")
        _held.room = room if size <= HELD_BYTES else None
    return room
