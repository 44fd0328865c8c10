"""The compiled file of kernels: loading it, and running its functions on torch's threads.

The file knows nothing of Python or torch, so one build serves every version of both. A call releases the interpreter's
lock; each thread takes ranges of rows that no other writes, so results have the same bits for any number of threads.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from tunediff.kernels import paths

A = TypeVar("A")
B = TypeVar("B")
INTERFACE = 14
"""Version of the functions and arguments in the compiled file; goes up with every change of a C file, there and here."""
RANGES = 2
"""Ranges a thread where Python hands them out: more even out rows of unequal cost, but each takes Python time."""
FINE = 16
"""Ranges a thread where the compiled file hands them out."""
BEST = 2
"""Number in the compiled file of the fastest way to multiply bfloat16, taken where the processor has it."""
_WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@lru_cache(maxsize=1)
def library() -> Any:
    """Return the compiled file, or None where tunediff was installed without a compiler."""
    found = importlib.util.find_spec("tunediff.kernels.cpu._native")
    if found is None or found.origin is None:
        return None
    try:
        out: Any = ctypes.CDLL(found.origin)
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
    """Whether the compiled kernels are installed, allowed, and serve these tensors: float32 on the CPU."""
    return (
        paths.allows("native")
        and library() is not None
        and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
    )


@lru_cache(maxsize=1)
def team() -> Any:
    """Return OpenMP's function that runs a callback on every thread of torch's team, or None where torch has none."""
    try:
        return ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return None


@lru_cache(maxsize=1)
def _threads(n: int) -> ThreadPoolExecutor:
    """Threads of our own, where torch's cannot be called."""
    return ThreadPoolExecutor(n, thread_name_prefix="tunediff-kernels")


def each(run: Callable[[A], B], parts: Sequence[A]) -> list[B]:
    """Return `run` of every part, run on as many threads as torch has.

    They are torch's own where possible: those spin after an operation, and would be in the way of other threads.
    """
    n, run_team = torch.get_num_threads(), team()
    if len(parts) == 1 or n == 1:
        return [run(part) for part in parts]
    if run_team is None:
        return list(_threads(n).map(run, parts))
    out: dict[int, B] = {}
    raised: list[BaseException] = []
    turns = iter(enumerate(parts))

    def work(_: int | None) -> None:
        try:
            for at, part in turns:  # a thread that is free takes the next
                out[at] = run(part)
        except BaseException as error:  # no exception may pass through OpenMP's frames
            raised.append(error)

    run_team(_WORK(work), None, ctypes.c_uint(n), ctypes.c_uint(0))
    if raised:
        raise raised[0]
    return [out[at] for at in range(len(parts))]


def spread(kernel: str, given: Sequence[Any], edges: Sequence[int]) -> None:
    """Run a kernel on the ranges between `edges`, on as many threads as torch has; a thread that is free takes the next.

    `given` are its other arguments: tensors, numbers, and None for a null pointer.
    """
    lib, threads, run_team = library(), torch.get_num_threads(), team()
    numbers = [g.data_ptr() if isinstance(g, Tensor) else g or 0 for g in given]
    if threads > 1 and run_team is None:
        list(_threads(threads).map(lambda *part: getattr(lib, kernel)(*int64s(*numbers, *part)), edges[:-1], edges[1:]))
    else:
        ranges = int64_array(edges), *int64s(len(edges) - 1)
        if not lib.spread(
            getattr(lib, kernel), int64_array(numbers), *int64s(len(numbers)), *ranges, run_team, *int64s(threads)
        ):
            raise TypeError(f"{kernel} takes {len(numbers)} arguments, which `spread` does not know")


def even(rows: int, ranges: int) -> list[int]:
    """Return the edges of equal ranges of rows, `ranges` for each thread."""
    n = torch.get_num_threads()
    n = max(1, min(rows, n * ranges)) if n > 1 else 1
    return [rows * i // n for i in range(n + 1)]


def at_most(groups: int, most: int) -> list[int]:
    """Return the edges of equal ranges of at most `most` groups, equally many for each thread."""
    n = torch.get_num_threads()
    n = min(groups, n * -(-groups // (n * most)))
    return [groups * i // n for i in range(n + 1)]


def balanced(starts_R: Tensor, ranges: int) -> list[int]:
    """Return the edges of ranges with about equally many pairs and rows, `ranges` for each thread."""
    n, rows = torch.get_num_threads(), len(starts_R) - 1
    if n == 1 or rows < 2:
        return [0, rows]
    cost_R = starts_R + torch.arange(rows + 1)
    at = torch.searchsorted(cost_R, torch.linspace(0, float(cost_R[-1]), n * ranges + 1)[1:-1].long()).tolist()
    return sorted({0, *at, rows})


def longs(n: int) -> Tensor:
    """Return an uninitialized int64 tensor (n,)."""
    return torch.empty(n, dtype=torch.long, device="cpu")


def int64_array(numbers: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """Return these numbers as an array for the compiled file."""
    return (ctypes.c_int64 * len(numbers))(*numbers)


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    """Return where a tensor's numbers lie; null for None."""
    return ctypes.c_void_p(tensor.data_ptr() if tensor is not None else None)


def int64s(*numbers: int) -> tuple[ctypes.c_int64, ...]:
    """Return these numbers as arguments for the compiled file."""
    return tuple(map(ctypes.c_int64, numbers))
