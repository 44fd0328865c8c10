"""Which kernel path is in force."""

from __future__ import annotations

import contextlib
import os
import typing
from collections.abc import Iterator
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from tunediff.core.errors import SettingError

KernelPath = Literal["native", "triton", "torch", "dense"]
"""Kernel paths, fastest first: compiled for the CPU, Triton for GPUs, torch's operations, and the dense reference."""

_ORDER: tuple[str, ...] = typing.get_args(KernelPath)
_fastest: str = os.environ.get("TUNEDIFF_KERNELS", _ORDER[0])


def allows(path: KernelPath) -> bool:
    """Whether this path may be taken; whoever allows one path allows those after it.

    Raises SettingError if `TUNEDIFF_KERNELS` or `using` named no path.
    """
    if _fastest not in _ORDER:
        raise SettingError("TUNEDIFF_KERNELS names no path", expected=", ".join(_ORDER), got=_fastest)
    return _ORDER.index(path) >= _ORDER.index(_fastest)


@contextlib.contextmanager
def using(path: KernelPath) -> Iterator[None]:
    """Take no faster path than this one inside; `TUNEDIFF_KERNELS` in the environment does so for a whole process."""
    global _fastest
    before, _fastest = _fastest, path
    try:
        yield
    finally:
        _fastest = before


def on_gpu(*tensors: Tensor) -> Any:
    """Return `tunediff.kernels.gpu.triton` where it is allowed, installed, and serves (float32 tensors on a GPU); else None."""
    return _triton() if allows("triton") and all(t.is_cuda and t.dtype == torch.float32 for t in tensors) else None


@lru_cache(maxsize=1)
def _triton() -> ModuleType | None:
    try:
        from tunediff.kernels.gpu import triton
    except ImportError:
        return None
    return triton
