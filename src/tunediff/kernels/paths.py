"""Choice of the kernel path: compiled, Triton, torch or dense."""

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
    """Return whether this kernel path may be used; allowing one path allows all slower ones.

    Raises SettingError if `TUNEDIFF_KERNELS` or `using` names an unknown path.
    """
    if _fastest not in _ORDER:
        raise SettingError("TUNEDIFF_KERNELS names no path", expected=", ".join(_ORDER), got=_fastest)
    return _ORDER.index(path) >= _ORDER.index(_fastest)


@contextlib.contextmanager
def using(path: KernelPath) -> Iterator[None]:
    """Use no path faster than `path` inside the block; the environment variable `TUNEDIFF_KERNELS` does so for a
    process."""
    global _fastest
    before, _fastest = _fastest, path
    try:
        yield
    finally:
        _fastest = before


def on_gpu(*tensors: Tensor) -> Any:
    """Return the Triton kernels if they are allowed, installed and apply to these tensors (float32 on a GPU), else
    None."""
    return _triton() if allows("triton") and all(t.is_cuda and t.dtype == torch.float32 for t in tensors) else None


@lru_cache(maxsize=1)
def _triton() -> ModuleType | None:
    try:
        from tunediff.kernels.gpu import triton
    except ImportError:
        return None
    return triton
