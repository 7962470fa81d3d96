"""The Triton kernels by themselves: in the interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch

from normally import _triton
from tests.device import DEVICE

# Without Triton its test files cannot even be imported; the head of the report says so.
collect_ignore_glob = ["test_*.py"] if _triton.device_type is None else []


#: These compile kernels in processes of their own and launch none.
ANYWHERE = ("test_gpu_compile.py",)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.path.name in ANYWHERE:
        return
    is_interpreted = _triton.device_type == "cpu"
    if not is_interpreted and not (DEVICE.type == "cuda" and torch.cuda.is_available()):
        pytest.skip(
            "Triton kernels run in its interpreter (TRITON_INTERPRET=1 NORMALLY_DISABLE_NATIVE=1) "
            "or on a GPU (NORMALLY_TEST_DEVICE=cuda)"
        )
