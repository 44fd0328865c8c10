"""What every test shares: one thread, no network, the embedded model only where a test is marked for it."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which any test may be the first to do


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Two OpenMP threads on two busy cores are slower than one, and one is what makes timings and bytes repeatable."""
    torch.set_num_threads(1)
