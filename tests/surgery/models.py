"""Small models in the forms in which people write them, and what tests ask of a change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: float64 models: a change of the wiring is of order 1, rounding of order 1e-16 times the depth.
ROUNDING = 1e-11


class Functional(nn.Module):
    """Norm and activation in a forward of their own, by the function that is given."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Block(nn.Module):
    """torchvision's BasicBlock: one ReLU for both places, an addition in place."""

    def __init__(self, channels: int = 6, add: str = "+=") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out = ADDITIONS[self.add](out, identity)
        return self.relu(out)


def _iadd(out: Tensor, identity: Tensor) -> Tensor:
    out += identity
    return out


ADDITIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "+=": _iadd,
    "out + identity": lambda out, identity: out + identity,
    "identity + out": lambda out, identity: identity + out,
    "torch.add": torch.add,
    "torch.add other": lambda out, identity: torch.add(identity, other=out),
    "add_": lambda out, identity: out.add_(identity),
    "method": lambda out, identity: identity.add(out),
}


class Residual(nn.Module):
    """Two blocks, the first with a downsample branch, and a head."""

    def __init__(self, add: str = "+=") -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.blocks = nn.Sequential(Block(add=add), Block(add=add))
        self.blocks[0].downsample = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """float64, with parameters and statistics that all show."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or not tensor.is_floating_point():
                continue
            values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            is_scale = name == "running_var" or (name == "weight" and tensor.dim() == 1)
            tensor.data = values + 0.5 if is_scale else values - 0.5
    return model


def outcome(model: nn.Module, *args: Tensor) -> list[Tensor]:
    """Output, gradients of inputs and parameters, buffers."""
    args = tuple(a.detach().clone().requires_grad_(a.is_floating_point()) for a in args)
    torch.manual_seed(0)
    output = model(*(a.clone() for a in args))
    wanted = [t for t in (*args, *model.parameters()) if t.requires_grad]
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)
    gradients = torch.autograd.grad(output, wanted, weights, allow_unused=True)
    present = [torch.zeros(()) if g is None else g for g in gradients]
    # torch's instance norm has a counter and never counts; ours does.
    uncounted: tuple[str, ...] = ("_skipped_updates",)
    if any(isinstance(m, nn.modules.instancenorm._InstanceNorm) for m in model.modules()):
        uncounted += ("num_batches_tracked",)
    buffers = [b.clone() for name, b in model.named_buffers() if not name.endswith(uncounted)]
    return [output.detach(), *present, *buffers]


def assert_same_function(
    model: nn.Module, other: nn.Module, *args: Tensor, tolerance: float = ROUNDING
) -> None:
    """Both give the same in training and in evaluation; they are left as they are."""
    for training in (True, False):
        found = outcome(copy.deepcopy(model).train(training), *args)
        expected = outcome(copy.deepcopy(other).train(training), *args)
        largest = max(float(t.abs().max()) for t in expected if t.numel())
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * largest)


def classes(model: nn.Module) -> list[tuple[str, type]]:
    return [(path, type(module)) for path, module in model.named_modules()]


def snapshot(model: nn.Module) -> dict[str, dict[str, Any]]:
    """All that a model is, by identity where it is an object."""
    found = {}
    for path, module in model.named_modules():
        state: dict[str, Any] = {"class": type(module)}
        for name, value in vars(module).items():
            if isinstance(value, dict):
                state[name] = {key: id(item) for key, item in value.items()}
            else:
                state[name] = copy.copy(value) if isinstance(value, set) else value
        found[path] = state
    return found


#: Activations as people write them, by what they are.
WRITTEN: dict[str, list[Callable[[Tensor], Tensor]]] = {
    "relu": [
        F.relu, torch.relu, lambda x: x.relu(), lambda x: x.relu_(),
        lambda x: F.relu(x, inplace=True), lambda x: x.clamp(min=0), lambda x: F.relu_(x),
    ],
    "relu6": [F.relu6, lambda x: F.hardtanh(x, 0.0, 6.0), lambda x: x.clamp(0, 6)],
    "leaky_relu": [
        F.leaky_relu, lambda x: F.leaky_relu(x, 0.2),
        lambda x: F.leaky_relu(x, negative_slope=0.3, inplace=True),
    ],
    "elu": [F.elu, lambda x: F.elu(x, alpha=0.5)],
    "silu": [F.silu, lambda x: F.silu(x, inplace=True)],
    "gelu": [F.gelu, lambda x: F.gelu(x, approximate="none")],
    "gelu_tanh": [lambda x: F.gelu(x, approximate="tanh")],
    "hardswish": [F.hardswish],
    "hardsigmoid": [F.hardsigmoid],
    "sigmoid": [torch.sigmoid, lambda x: x.sigmoid()],
    "tanh": [torch.tanh, lambda x: x.tanh()],
}  # fmt: skip
