"""Which kernels are in force, which library multiplies matrices, and memory that a training loop uses again."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import typing
import weakref
from functools import lru_cache
from types import ModuleType
from typing import Iterator, Literal

import numpy as np
import torch
from torch import Tensor

from tunediff.errors import SettingError

Path = Literal["native+bf16", "native", "triton", "torch+bf16", "torch", "dense"]
"""From fast to slow; whoever allows one allows those after it."""
LARGE = 1 << 20
"""Bytes from which on memory is kept for the next step: the system hands out fresh pages at 2 GB/s."""

_order = typing.get_args(Path)
_path: str = os.environ.get("TUNEDIFF_KERNELS", _order[0])
_free: dict[int, list[mmap.mmap]] | None = None


def allows(path: Path) -> bool:
    """Whether this path may be taken."""
    if _path not in _order:
        raise SettingError("TUNEDIFF_KERNELS names no path", expected=", ".join(_order), got=_path)
    return _order.index(path) >= _order.index(_path)


@contextlib.contextmanager
def using(path: Path) -> Iterator[None]:
    """Take no faster path than this one inside. "native" is compiled, "native+bf16" also looks for codes with bfloat16 products first
    and makes a model's float32 products of bfloat16 parts, "triton" is a GPU's, "torch" needs no compiled file, "torch+bf16" also looks
    for codes in bfloat16, "dense" is the reference. `TUNEDIFF_KERNELS` in the environment does so for a whole process."""
    global _path
    before, _path = _path, path
    try:
        yield
    finally:
        _path = before


def on_gpu(*tensors: Tensor) -> ModuleType | None:
    """`tunediff.kernels.triton` where it is allowed and serves: float32 tensors on a GPU, and triton is installed."""
    return _triton() if allows("triton") and all(t.is_cuda and t.dtype == torch.float32 for t in tensors) else None


@lru_cache(maxsize=1)
def _triton() -> ModuleType | None:
    try:
        from tunediff.kernels import triton
    except ImportError:
        return None
    return triton


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Large tensors made by `empty` inside take the place of earlier ones that nothing refers to any more; at the end
    the places are given back."""
    global _free
    before, _free = _free, {} if _free is None else _free
    try:
        yield
    finally:
        _free = before


def empty(*shape: int) -> Tensor:
    """An uninitialized float32 tensor on the CPU."""
    count = math.prod(shape)
    if _free is None or count * 4 < LARGE:
        return torch.empty(shape, dtype=torch.float32, device="cpu")
    size = -(-count * 4 // LARGE) * LARGE
    places = _free.setdefault(size, [])
    place = places.pop() if places else mmap.mmap(-1, size)
    array = np.frombuffer(place, np.float32, count)
    # torch holds on to the array as long as any tensor uses its memory.
    weakref.finalize(array, places.append, place).atexit = False
    return torch.from_numpy(array).view(shape)
