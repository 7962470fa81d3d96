"""What every test starts from: the same random numbers, and torch's settings put back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from normally import _triton
from tests import torchvision_operators
from tests.device import DEVICE, IS_CPU, BornOnDevice, backend

# One shared machine may stall for seconds: a deadline would fail a correct kernel.
settings.register_profile("normally", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("normally")

torchvision_operators.declare()  # before anything imports timm

TESTS = Path(__file__).parent
#: What is asked of every device. The rest is about none, or about the CPU's own arithmetic.
OF_EVERY_DEVICE = {"_ops", "_triton", "conformance", "functional", "gpu", "nn", "promises"}


def pytest_report_header() -> str:
    without = (
        "; without Triton, and so without tests/_triton" if _triton.device_type is None else ""
    )
    return f"normally: on {DEVICE}, by {backend()}{without}"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: asks for a GPU (NORMALLY_TEST_DEVICE=cuda)")
    if not IS_CPU:
        # A convolution's default; with 11 bits what is beside our layers would differ by itself.
        torch.backends.cudnn.allow_tf32 = False


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    inside = item.path.relative_to(TESTS).parts[0]
    if not IS_CPU and inside not in OF_EVERY_DEVICE:
        pytest.skip("not about a device: runs where NORMALLY_TEST_DEVICE is cpu")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(20261121)


@pytest.fixture
def born_on_device() -> Iterator[None]:
    """For tests whose layers and tensors are all on DEVICE."""
    if IS_CPU:
        yield
    else:
        with BornOnDevice():
            yield


@pytest.fixture
def threads() -> Iterator[None]:
    """For tests that call torch.set_num_threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    assert torch.get_num_threads() == before
