"""Which library multiplies float32 matrices: the faster one, where a probe shows that it is as exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


@contextmanager
def precision(name: str) -> Iterator[None]:
    """While inside, torch's setting for float32 products is `name`; then what it was before."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def fast_matmul(device: torch.device | str = "cpu") -> Iterator[str]:
    """Let torch pick its faster fp32 matmul inside, if a probe shows that it stays as exact as the default.

    On some CPUs the "medium" setting selects a library up to twice as fast at full fp32 precision; on others
    it rounds the inputs to bf16, and on GPUs to TF32, which the probe on `device` refuses (relative error over
    2e-6 against fp64). Yields the setting in force.
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
