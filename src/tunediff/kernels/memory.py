"""Reuse of large memory blocks in a training loop, and a cache of data derived from tensors."""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")
LARGE = 1 << 20
"""Fewest bytes of a tensor whose memory is reused; the system provides new pages at only 2 GB/s."""


@dataclass(eq=False)
class _Memory:
    """Free blocks by size, and derived data of each storage by kind, with the tensor's state when it was derived."""

    free: dict[int, list[mmap.mmap]] = field(default_factory=dict)
    derived: weakref.WeakKeyDictionary[torch.UntypedStorage, dict[Hashable, tuple[Any, Any]]] = field(
        default_factory=weakref.WeakKeyDictionary
    )


_memory: _Memory | None = None


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Reuse memory inside the block: `empty` puts large tensors where earlier, unreferenced ones were.

    Data from `derived` is cached too. The end of the outermost block releases the memory and clears the cache.
    """
    global _memory
    before = _memory
    _memory = before or _Memory()
    try:
        yield
    finally:
        _memory = before


def derived(tensor: Tensor, kind: Hashable, make: Callable[[], T]) -> T:
    """Return the result of `make`, derived from a contiguous tensor; `kept_memory` caches it until the tensor is
    written to.

    Writes through `.data`, numpy or torch's fused optimizers are not noticed, because torch does not count them (see
    `wrote`). `kind` identifies the derived data and, if it matters, how the numbers are grouped.
    """
    found: T | None = known(tensor, kind)
    if found is None:
        found = make()
        know(tensor, kind, found)
    return found


def known(tensor: Tensor, kind: Hashable) -> Any:
    """Return the data of this kind derived from a tensor, or None if there is none or the tensor was written to
    since."""
    if _memory is None or tensor.is_inference():
        return None
    state, value = _memory.derived.get(tensor.untyped_storage(), {}).get(kind, (None, None))
    return value if state == _state(tensor) else None


def know(tensor: Tensor, kind: Hashable, value: Any) -> None:
    """Cache `value` as the data of this kind derived from the tensor's present state."""
    if _memory is not None and not tensor.is_inference():
        _memory.derived.setdefault(tensor.untyped_storage(), {})[kind] = _state(tensor), value


def kinds(tensor: Tensor) -> dict[Hashable, Any]:
    """Return all data derived from this tensor by kind, including outdated data."""
    if _memory is None or tensor.is_inference():
        return {}
    found, (*where, _) = _memory.derived.get(tensor.untyped_storage(), {}), _state(tensor)
    return {kind: value for kind, ((*at, _), value) in found.items() if at == where}


def wrote(*tensors: Tensor) -> None:
    """Record a write to these tensors that torch does not count itself."""
    for tensor in tensors:
        torch.autograd.graph.increment_version(tensor)


def _state(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.data_ptr(), tensor.numel(), tensor._version


def empty(*shape: int) -> Tensor:
    """Return an uninitialized float32 tensor on the CPU, in reused memory if a free block fits."""
    count = math.prod(shape)
    if _memory is None or count * 4 < LARGE:
        return torch.empty(shape, dtype=torch.float32, device="cpu")
    size = -(-count * 4 // LARGE) * LARGE
    places = _memory.free.setdefault(size, [])
    place = places.pop() if places else mmap.mmap(-1, size)
    array = np.frombuffer(place, np.float32, count)
    # torch keeps a reference to the array as long as any tensor uses its memory.
    weakref.finalize(array, places.append, place).atexit = False
    return torch.from_numpy(array).view(shape)
