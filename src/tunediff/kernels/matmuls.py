"""Choice of the library for float32 matrix products: the faster one if a test shows that it is as exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Set torch's precision for float32 products to `name` inside the block, and restore it after."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def fast_matmul(device: torch.device | str = "cpu") -> Iterator[str]:
    """Use torch's faster float32 products inside the block, if a test on `device` finds them as exact as the default.

    On some CPUs the "medium" setting selects a library that is up to twice as fast at full float32 precision. On
    others, "medium" rounds inputs to bfloat16, and on GPUs to TF32. The test refuses a relative error over 2e-6 against
    float64. Yields the name of the setting.
    """
    name = "medium" if _is_exact(str(device)) else torch.get_float32_matmul_precision()
    with precision(name):
        yield name


@cache
def _is_exact(device: str) -> bool:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(64, 256, generator=generator), torch.randn(256, 64, generator=generator)
    exact = a.double() @ b.double()
    with precision("medium"):
        found = (a.to(device) @ b.to(device)).double().cpu()
    return float((found - exact).norm() / exact.norm()) <= 2e-6
