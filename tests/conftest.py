"""What every test starts from: the same random numbers, and torch's settings put back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# One shared machine may stall for seconds: a deadline would fail a correct kernel.
settings.register_profile("normally", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("normally")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(20261121)


@pytest.fixture
def threads() -> Iterator[None]:
    """For tests that call torch.set_num_threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    assert torch.get_num_threads() == before
