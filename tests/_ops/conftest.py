"""Operators are called as they are, with tensors of DEVICE."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def everything_on_device(born_on_device: None) -> None:
    """Every tensor of these tests is born on DEVICE."""
