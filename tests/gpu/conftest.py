"""What only a GPU can show; run with NORMALLY_TEST_DEVICE=cuda."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.device import DEVICE

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    if DEVICE.type != "cuda" or not torch.cuda.is_available():
        pytest.skip(f"asks for a GPU: NORMALLY_TEST_DEVICE is {DEVICE}")


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """A test's last kernels end with it, and its memory is free for the next."""
    yield
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
