"""Memory that a training loop uses again, and what is derived of tensors that stay the same for a while."""

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
"""Fewest bytes of a tensor whose memory is used again: fresh pages come from the system at 2 GB/s."""


@dataclass(eq=False)
class _Memory:
    """Free blocks by size, and what was derived of each storage, by kind, with the state that its tensor was in."""

    free: dict[int, list[mmap.mmap]] = field(default_factory=dict)
    derived: weakref.WeakKeyDictionary[torch.UntypedStorage, dict[Hashable, tuple[Any, Any]]] = field(
        default_factory=weakref.WeakKeyDictionary
    )


_memory: _Memory | None = None


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Use memory again inside: large tensors made by `empty` take the place of earlier ones that are no longer referred to.

    What is `derived` stays too. At the end of the outermost such block the memory is given back and what was derived is
    forgotten.
    """
    global _memory
    before = _memory
    _memory = before or _Memory()
    try:
        yield
    finally:
        _memory = before


def derived(tensor: Tensor, kind: Hashable, make: Callable[[], T]) -> T:
    """Return what `make` derives of a contiguous tensor; within `kept_memory` it is made once, until the tensor is written to.

    Only writes that torch counts are seen: none through `.data` or numpy, nor by torch's fused optimizers (see `wrote`).
    `kind` names what is derived and, where it matters, how the numbers are grouped.
    """
    found: T | None = known(tensor, kind)
    if found is None:
        found = make()
        know(tensor, kind, found)
    return found


def known(tensor: Tensor, kind: Hashable) -> Any:
    """Return what was derived of this tensor, or None if that is nothing or the tensor was written to since."""
    if _memory is None or tensor.is_inference():
        return None
    state, value = _memory.derived.get(tensor.untyped_storage(), {}).get(kind, (None, None))
    return value if state == _state(tensor) else None


def know(tensor: Tensor, kind: Hashable, value: Any) -> None:
    """Store what is `derived` of this tensor as it is now."""
    if _memory is not None and not tensor.is_inference():
        _memory.derived.setdefault(tensor.untyped_storage(), {})[kind] = _state(tensor), value


def kinds(tensor: Tensor) -> dict[Hashable, Any]:
    """Return all that was derived of this tensor, of its present numbers or of earlier ones."""
    if _memory is None or tensor.is_inference():
        return {}
    found, (*where, _) = _memory.derived.get(tensor.untyped_storage(), {}), _state(tensor)
    return {kind: value for kind, ((*at, _), value) in found.items() if at == where}


def wrote(*tensors: Tensor) -> None:
    """Count a write to these tensors that torch does not count."""
    for tensor in tensors:
        torch.autograd.graph.increment_version(tensor)


def _state(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.data_ptr(), tensor.numel(), tensor._version


def empty(*shape: int) -> Tensor:
    """Return an uninitialized float32 tensor on the CPU, in memory used before where there is some."""
    count = math.prod(shape)
    if _memory is None or count * 4 < LARGE:
        return torch.empty(shape, dtype=torch.float32, device="cpu")
    size = -(-count * 4 // LARGE) * LARGE
    places = _memory.free.setdefault(size, [])
    place = places.pop() if places else mmap.mmap(-1, size)
    array = np.frombuffer(place, np.float32, count)
    # torch holds on to the array as long as any tensor uses its memory.
    weakref.finalize(array, places.append, place).atexit = False
    return torch.from_numpy(array).view(shape)
