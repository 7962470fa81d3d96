"""A layer of each kind with an input for it, and one step of training."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from normally import nn
from tests.device import DEVICE
from tests.helpers import assert_same_bits, values

#: A layer, and the shape of its input.
LAYERS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "BatchNorm2d": (lambda: nn.BatchNorm2d(64, act="relu"), (16, 64, 28, 28)),
    "BatchNorm2d of few rows": (lambda: nn.BatchNorm2d(512), (4, 512, 7, 7)),
    "BatchNorm1d, cumulative": (lambda: nn.BatchNorm1d(48, momentum=None), (1000, 48)),
    "BatchNorm2d, evaluation": (lambda: nn.BatchNorm2d(64).eval(), (16, 64, 28, 28)),
    "LayerNorm": (lambda: nn.LayerNorm(768), (512, 768)),
    "LayerNorm dim=1": (lambda: nn.LayerNorm(96, dim=1, act="gelu"), (8, 96, 14, 14)),
    "RMSNorm": (lambda: nn.RMSNorm(1024, casting="llama"), (4, 128, 1024)),
    "RMSNorm of long rows": (lambda: nn.RMSNorm(50_000), (5, 50_000)),
    "GroupNorm": (lambda: nn.GroupNorm(32, 128, act="silu"), (8, 128, 28, 28)),
    "GroupNorm of 1": (lambda: nn.GroupNorm(1, 32), (2, 32, 128, 128)),
    "InstanceNorm2d": (
        lambda: nn.InstanceNorm2d(32, affine=True, track_running_stats=True), (8, 32, 28, 28),
    ),
    "FrozenBatchNorm": (lambda: nn.FrozenBatchNorm(64), (8, 64, 28, 28)),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(5), (8, 64, 14, 14)),
}  # fmt: skip


def make(name: str, device: torch.device = DEVICE) -> torch.nn.Module:
    """The layer with parameters that are not 1 and 0."""
    layer = LAYERS[name][0]()
    for parameter in layer.parameters():
        torch.nn.init.uniform_(parameter, -1.0, 2.0)
    return layer.to(device)


def sample(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """An input on the device, a leaf that wants its gradient."""
    return values(LAYERS[name][1], dtype, seed=seed).to(DEVICE).requires_grad_()


def cotangent(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return values(LAYERS[name][1], dtype, seed=1000).to(DEVICE)


def step(layer: torch.nn.Module, x: Tensor, g: Tensor) -> list[Tensor]:
    """Output and gradients of one forward and backward."""
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], g)]


def assert_same_step(found: list[Tensor], expected: list[Tensor], what: str = "") -> None:
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert_same_bits(a, b, f"{what} result {index}")


def assert_same_buffers(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    for (name, a), b in zip(found.named_buffers(), expected.buffers(), strict=True):
        assert_same_bits(a, b, name)


def warmed_up(layer: torch.nn.Module, x: Tensor, g: Tensor) -> None:
    """Everything that happens once, such as compiling, has happened; the layer did not change."""
    twin = copy.deepcopy(layer)
    step(twin, x.detach().clone().requires_grad_(), g)
    torch.cuda.synchronize()
