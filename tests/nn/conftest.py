"""Layers are tested where their users have them: on DEVICE, and all that is beside them."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def everything_on_device(born_on_device: None) -> None:
    """Every tensor of these tests is born on DEVICE."""
