"""The compiled kernels of `native.c`, called on as many threads as torch has: float32 on the CPU.

The library knows nothing of Python or torch, so one build serves every version of both. A call gives up the
interpreter's lock; each thread takes ranges of rows that no other writes, so results have the same bits for any number
of threads.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Callable, Sequence

import torch
from torch import Tensor

from tunediff import gates
from tunediff.kernels import paths

RANGES = 4
"""Ranges a thread: more even out rows of unequal cost."""
SAMPLE = 1 << 16
"""Codes of a group that its first cut is estimated from; a smaller group has no cut but 0."""
SLACK = 1.25
"""How many times as many candidates as codes are asked of the estimate; too few are noticed, and asked for again."""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled file, or None where tunediff was installed without a compiler."""
    found = importlib.util.find_spec("tunediff.kernels._native")
    if found is None or found.origin is None:
        return None
    try:
        out = ctypes.CDLL(found.origin)
        out.scan.restype = out.sample.restype = out.keep.restype = ctypes.c_int64
        out.kth.restype = ctypes.c_float
    except (OSError, AttributeError):  # built for another machine, or of another version
        return None
    return out


def serves(*tensors: Tensor) -> bool:
    """Whether these kernels are there and can work on the tensors."""
    return library() is not None and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)


def select(pre_NF: Tensor, weight_F: Tensor, parts: Sequence[gates.Part]) -> tuple[Tensor, ...]:
    """For each part (start, stop, keep) of the latents the `keep` largest positive codes relu(pre) * weight, of equal
    ones the first in flat order; parts cover the latents in order.

    Returns token_P, latent_P, pre_P, ordered by token and then latent, and where each token's begin (N + 1).
    """
    lib, (N, F), G = library(), pre_NF.shape, len(parts)
    bounds, wanted = _longs([parts[0][0], *[stop for _, stop, _ in parts]]), _longs([keep for *_, keep in parts])
    ranges = _even(N)
    count_N, samples = torch.empty(N, dtype=torch.long), {}
    slack, room = SLACK, 2.0
    while True:
        cuts = (ctypes.c_float * G)()
        for g, (start, stop, keep) in enumerate(parts):
            codes = N * (stop - start)
            if codes <= SAMPLE:
                continue
            if g not in samples:
                values = torch.empty(SAMPLE)
                n = lib.sample(_at(pre_NF), _at(weight_F), *_i(N, F, start, stop, SAMPLE), _at(values))
                samples[g] = values, n
            values, n = samples[g]
            rank = math.ceil(slack * keep / codes * n) + 16
            cuts[g] = lib.kth(_at(values), *_i(n, rank)) if rank < n else 0.0
        size = [
            min((b - a) * F, int(room * sum(keep for *_, keep in parts) * (b - a) / N) + (1 << 16)) + 32 for a, b in ranges
        ]
        columns = [torch.empty(n, dtype=torch.int32) for n in size]
        values = [torch.empty(n) for n in size]

        def scan(at: int) -> int:
            return lib.scan(
                _at(pre_NF), _at(weight_F), *_i(F), bounds, cuts, *_i(G, size[at]), _at(columns[at]), _at(values[at]),
                _at(count_N), *_i(*ranges[at]),
            )  # fmt: skip

        found = _each(scan, range(len(ranges)))
        if min(found) < 0:
            room *= 8
            continue
        column_C = torch.cat([c[:n] for c, n in zip(columns, found)])
        value_C = torch.cat([v[:n] for v, n in zip(values, found)])
        if any(cuts) and any(cut and _within(column_C, part) < part[2] for cut, part in zip(cuts, parts)):
            slack *= 4
            continue
        break
    token_P, latent_P = (torch.empty(len(value_C), dtype=torch.long) for _ in range(2))
    pre_P, scratch_C, starts_N = torch.empty(len(value_C)), torch.empty_like(value_C), torch.empty(N + 1, dtype=torch.long)
    n = lib.keep(
        _at(column_C), _at(value_C), _at(count_N), *_i(N), _at(weight_F), bounds, wanted, *_i(G),
        _at(scratch_C), _at(token_P), _at(latent_P), _at(pre_P), _at(starts_N),
    )  # fmt: skip
    return token_P[:n], latent_P[:n], pre_P[:n], starts_N


def bucket(latent_P: Tensor, F: int) -> tuple[Tensor, Tensor]:
    """The pairs in the order of their latents, and where each latent's begin (F + 1)."""
    order_P, starts_F = torch.empty_like(latent_P), torch.empty(F + 1, dtype=torch.long)
    library().bucket(_at(latent_P), *_i(len(latent_P), F), _at(order_P), _at(starts_F))
    return order_P, starts_F


def bag(starts_R: Tensor, order_P: Tensor | None, index_P: Tensor, value_P: Tensor, rows: Tensor) -> Tensor:
    """For each r the sum over pairs p in [starts_R[r], starts_R[r + 1]) of value_P[p] * rows[index_P[p]], (R, I);
    pairs are taken in `order_P`, if given."""
    out_RI = paths.empty(len(starts_R) - 1, rows.shape[1])
    lib, I, rows, value_P = library(), rows.shape[1], rows.contiguous(), value_P.contiguous()
    order = None if order_P is None else _at(order_P)

    def run(part: tuple[int, int]) -> None:
        lib.bag(_at(starts_R), order, _at(index_P), _at(value_P), _at(rows), *_i(I), _at(out_RI), *_i(*part))

    _each(run, _balanced(starts_R))
    return out_RI


def dot(starts_N: Tensor, latent_P: Tensor, a_NI: Tensor, b_FI: Tensor) -> Tensor:
    """For each pair the product of its token's row of a and its latent's row of b, (P,)."""
    lib, out_P, a_NI, b_FI = library(), torch.empty(len(latent_P)), a_NI.contiguous(), b_FI.contiguous()

    def run(part: tuple[int, int]) -> None:
        lib.dot(_at(starts_N), _at(latent_P), _at(a_NI), _at(b_FI), *_i(a_NI.shape[1]), _at(out_P), *_i(*part))

    _each(run, _balanced(starts_N))
    return out_P


# -- ranges and threads --------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _threads(n: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n, thread_name_prefix="tunediff-kernels")


def _each(run: Callable, parts: Sequence) -> list:
    """`run` on every part, on torch's number of threads, this one among them."""
    if len(parts) == 1:
        return [run(parts[0])]
    return list(_threads(torch.get_num_threads()).map(run, parts))


def _even(rows: int) -> list[tuple[int, int]]:
    """Ranges of equally many rows."""
    n = torch.get_num_threads()
    n = min(rows, n * RANGES) if n > 1 else 1
    return [(rows * i // n, rows * (i + 1) // n) for i in range(n)]


def _balanced(starts_R: Tensor) -> list[tuple[int, int]]:
    """Ranges of about equally many pairs and rows."""
    n, rows = torch.get_num_threads(), len(starts_R) - 1
    if n == 1 or rows < 2:
        return [(0, rows)]
    cost_R = starts_R + torch.arange(rows + 1)
    at = torch.searchsorted(cost_R, torch.linspace(0, float(cost_R[-1]), n * RANGES + 1)[1:-1].long()).tolist()
    edges = sorted({0, *at, rows})
    return list(zip(edges, edges[1:]))


def _within(column_C: Tensor, part: gates.Part) -> int:
    return int(((column_C >= part[0]) & (column_C < part[1])).sum())


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _i(*numbers: int) -> tuple[ctypes.c_int64, ...]:
    return tuple(map(ctypes.c_int64, numbers))


def _longs(numbers: list[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(numbers))(*numbers)
