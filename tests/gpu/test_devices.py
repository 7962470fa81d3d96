"""More than one device: each layer runs where its tensors are, and says so where they are not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from normally import functional, nn
from tests.device import DEVICE
from tests.gpu.layers import (
    LAYERS,
    assert_same_buffers,
    assert_same_step,
    cotangent,
    make,
    sample,
    step,
)
from tests.helpers import values

needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU here")


@needs_two
@pytest.mark.parametrize("name", LAYERS)
def test_on_the_second_gpu(name: str) -> None:
    """The same bits where both are of one kind, and the current device stays the first."""
    if torch.cuda.get_device_name(0) != torch.cuda.get_device_name(1):
        pytest.skip("the two GPUs are not of one kind")
    second = torch.device("cuda:1")
    torch.manual_seed(3)
    layer = make(name)
    torch.manual_seed(3)
    other = make(name, second)
    x, g = sample(name), cotangent(name)
    expected = step(layer, x, g)
    found = step(other, x.detach().to(second).requires_grad_(), g.to(second))
    assert all(t.device == second for t in found)
    assert torch.cuda.current_device() == 0
    assert_same_step([t.cpu() for t in found], [t.cpu() for t in expected])
    assert_same_buffers(other.cpu(), layer.cpu())


X = torch.ones(6, 4, 8)
#: The arguments of a call with a tensor that stayed on the CPU.
MIXED: dict[str, tuple[Any, dict[str, Any]]] = {
    "batch_norm": (functional.batch_norm, {"running_mean": None, "running_var": None,
                                           "training": True, "weight": torch.ones(4)}),
    "batch_norm's buffers": (functional.batch_norm, {"running_mean": torch.zeros(4),
                                                     "running_var": torch.ones(4)}),
    "batch_norm's residual": (functional.batch_norm, {"running_mean": None, "running_var": None,
                                                      "training": True, "residual": X}),
    "layer_norm": (functional.layer_norm, {"normalized_shape": (8,), "bias": torch.ones(8)}),
    "rms_norm": (functional.rms_norm, {"normalized_shape": (8,), "weight": torch.ones(8)}),
    "add_rms_norm": (functional.add_rms_norm, {"residual": X, "normalized_shape": (8,)}),
    "group_norm": (functional.group_norm, {"num_groups": 2, "weight": torch.ones(4)}),
    "instance_norm": (functional.instance_norm, {"bias": torch.ones(4)}),
    "a mask": (functional.layer_norm, {"normalized_shape": (8,),
                                       "mask": torch.ones(6, 4, dtype=torch.bool)}),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_tensors_of_two_devices_are_refused(name: str) -> None:
    function, options = MIXED[name]
    for kind in (ValueError, RuntimeError):  # ours, and torch's
        with pytest.raises(kind, match="Expected all tensors to be on the same device"):
            function(X.to(DEVICE), **options)


def test_a_layer_that_was_not_moved_is_refused_with_its_path() -> None:
    model = torch.nn.Sequential(torch.nn.Identity(), nn.LayerNorm(8))
    with pytest.raises(RuntimeError, match=r"on the same device.*cuda.*weight on cpu.*at 1 of"):
        model(X.to(DEVICE))


def test_there_and_back() -> None:
    """A layer that moves takes its statistics along; the devices differ by rounding alone."""
    x = values((6, 4, 8), torch.float32)
    stayed = nn.BatchNorm1d(4, act="silu")
    moved = copy.deepcopy(stayed).to(DEVICE)
    torch.testing.assert_close(moved(x.to(DEVICE)).cpu(), stayed(x), rtol=1e-6, atol=1e-6)
    assert all(t.device.type == DEVICE.type for t in moved.buffers())
    moved.cpu()
    torch.testing.assert_close(moved(x), stayed(x), rtol=1e-6, atol=1e-6)
    for (name, a), b in zip(moved.named_buffers(), stayed.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)
