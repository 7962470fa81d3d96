"""What tests of whole models start from."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def one_thread(threads: None) -> None:
    """For many forwards of tiny models: on a busy machine threads wait longer than they work."""
    torch.set_num_threads(1)
