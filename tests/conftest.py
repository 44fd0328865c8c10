"""Settings of all tests: one thread, no network, and longest files first, so that parallel processes end together."""

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


def pytest_addoption(parser):
    parser.addoption(
        "--plain", action="store_true", help="Run every network as transformers and PEFT do, unaccelerated."
    )


def pytest_configure(config):
    """Files are dealt to processes in the order of their tests, not by how many these are."""
    if config.getoption("--plain"):
        os.environ["TUNEDIFF_FAST"] = "0"  # read when tunediff is imported, by the processes that tests start too
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    longest = ["test_realmodel_bench.py", "test_realmodel.py", "test_planted.py"]
    if os.environ.get("TUNEDIFF_FAST") == "0":
        for item in items:
            if item.path.parent.name == "fast":
                item.add_marker(pytest.mark.skip(reason="what is tested is turned off"))
    for item in items:
        if any(item.get_closest_marker(mark) for mark in ("slow", "realmodel", "browser", "dist")):
            # Not yet known to be free of other libraries' warnings: shown, not errors.
            item.add_marker(pytest.mark.filterwarnings("default"))
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))
