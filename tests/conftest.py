"""For all tests: seeds, threads, and uninitialised memory that cannot be mistaken for a result."""

from __future__ import annotations

import os
import random

import pytest
import torch

# With pytest-xdist two processes share two cores; more threads than cores make both slower.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory() -> None:
    """`torch.empty` gives NaN: a result read from memory nobody wrote is seen. CUDA has its own, far slower, checks."""
    if not torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))
