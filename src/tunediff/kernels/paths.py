"""Which kernels are in force, which library multiplies matrices, and memory that a training loop uses again."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import typing
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from tunediff.core.errors import SettingError

Path = Literal["native+bf16", "native", "triton", "torch+bf16", "torch", "dense"]
"""From fast to slow; whoever allows one allows those after it."""
T = TypeVar("T")
LARGE = 1 << 20
"""Bytes from which on memory is kept for the next step: the system hands out fresh pages at 2 GB/s."""

_order = typing.get_args(Path)
_path: str = os.environ.get("TUNEDIFF_KERNELS", _order[0])
_rounded: ContextVar[bool] = ContextVar("rounded", default=False)
_free: dict[int, list[mmap.mmap]] | None = None
_derived: weakref.WeakKeyDictionary[torch.UntypedStorage, dict[Hashable, tuple[Any, Any]]] = weakref.WeakKeyDictionary()


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


def rounded() -> bool:
    """Whether this thread allows codes and sums over them to be made of numbers rounded to bfloat16; see `rounding`."""
    return _rounded.get()


@contextlib.contextmanager
def rounding(on: bool = True) -> Iterator[None]:
    """Inside, the compiled kernels may round activations, vectors and gradients to bfloat16 before they multiply them, and the codes
    kept are the largest of those products. Sums stay float32."""
    before = _rounded.set(on)
    try:
        yield
    finally:
        _rounded.reset(before)


def on_gpu(*tensors: Tensor) -> ModuleType | None:
    """`tunediff.kernels.gpu.triton` where it is allowed and serves: float32 tensors on a GPU, and triton is installed."""
    return _triton() if allows("triton") and all(t.is_cuda and t.dtype == torch.float32 for t in tensors) else None


@lru_cache(maxsize=1)
def _triton() -> ModuleType | None:
    try:
        from tunediff.kernels.gpu import triton
    except ImportError:
        return None
    return triton


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Large tensors made by `empty` inside take the place of earlier ones that nothing refers to any more, and what is `derived` stays;
    at the end the places are given back, and what was derived is forgotten."""
    global _free, _derived
    before, _free = _free, {} if _free is None else _free
    try:
        yield
    finally:
        _free = before
        if _free is None:
            _derived = weakref.WeakKeyDictionary()


def derived(tensor: Tensor, kind: Hashable, make: Callable[[], T]) -> T:
    """What `make` makes of the numbers of a tensor whose numbers lie side by side, within `kept_memory` once and not again until somebody
    writes to them. A write that torch counts is seen: not one through `.data` or numpy, nor torch's fused optimizers' (`wrote`). The kind
    says how the numbers are grouped, where that matters."""
    found = known(tensor, kind)
    if found is None:
        found = make()
        know(tensor, kind, found)
    return found


def known(tensor: Tensor, kind: Hashable) -> Any:
    """What was derived of these numbers, if they are still the same; None otherwise."""
    if _free is None or tensor.is_inference():
        return None
    state, value = _derived.get(tensor.untyped_storage(), {}).get(kind, (None, None))
    return value if state == _state(tensor) else None


def know(tensor: Tensor, kind: Hashable, value: Any) -> None:
    """From now on that is what is `derived` of these numbers."""
    if _free is not None and not tensor.is_inference():
        _derived.setdefault(tensor.untyped_storage(), {})[kind] = _state(tensor), value


def kinds(tensor: Tensor) -> dict[Hashable, Any]:
    """All that was derived of this tensor, of its numbers now or of earlier ones."""
    if _free is None or tensor.is_inference():
        return {}
    found, (*where, _) = _derived.get(tensor.untyped_storage(), {}), _state(tensor)
    return {kind: value for kind, ((*at, _), value) in found.items() if at == where}


def wrote(*tensors: Tensor) -> None:
    """Count a write that torch does not."""
    for tensor in tensors:
        torch.autograd.graph.increment_version(tensor)


def _state(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.data_ptr(), tensor.numel(), tensor._version


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
