"""Which activation a module or a function is."""

from __future__ import annotations

import math
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normally.reference import ACTIVATIONS
from normally.surgery._dataflow.activations import Activation, of_function, of_module


class Spelled(nn.Module):
    """As many repositories spell it."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(x.sigmoid())


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)  # nearly gelu, and is not


class Learnt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, x * self.slope)  # relu now, and not for long


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.ReLU(inplace=True), Activation("relu")),
        (nn.ReLU6(), Activation("relu6")),
        (nn.LeakyReLU(0.3), Activation("leaky_relu", 0.3)),
        (nn.ELU(0.5), Activation("elu", 0.5)),
        (nn.SiLU(), Activation("silu")),
        (nn.GELU(), Activation("gelu")),
        (nn.GELU(approximate="tanh"), Activation("gelu_tanh")),
        (nn.Hardswish(), Activation("hardswish")),
        (nn.Hardsigmoid(), Activation("hardsigmoid")),
        (nn.Sigmoid(), Activation("sigmoid")),
        (nn.Tanh(), Activation("tanh")),
        (Spelled(), Activation("gelu_tanh")),
        (Swish(), Activation("silu")),
    ],
    ids=str,
)
def test_modules(module: nn.Module, expected: Activation) -> None:
    assert of_module(module) == expected


@pytest.mark.parametrize(
    "module",
    [
        nn.Softmax(1), nn.PReLU(), nn.Mish(), nn.RReLU(), nn.Dropout(), nn.Identity(),
        nn.Softplus(), nn.Hardtanh(-1, 1), nn.Linear(2, 2), Scaled(), Learnt(),
        nn.Sequential(nn.ReLU()),
    ],
    ids=str,
)  # fmt: skip
def test_others_are_none(module: nn.Module) -> None:
    assert of_module(module) is None


def test_every_fused_activation_is_recognized() -> None:
    modules = [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(), nn.ELU(), nn.SiLU(), nn.GELU(),
               nn.GELU(approximate="tanh"), nn.Hardswish(), nn.Hardsigmoid(), nn.Sigmoid(),
               nn.Tanh()]  # fmt: skip
    assert [of_module(m).act for m in modules] == list(ACTIVATIONS)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "expected"),
    [
        (F.relu, (), {"inplace": True}, Activation("relu")),
        ("relu_", (), {}, Activation("relu")),
        (F.leaky_relu, (0.2,), {}, Activation("leaky_relu", 0.2)),
        (F.leaky_relu, (0.2, True), {}, Activation("leaky_relu", 0.2)),
        (F.elu, (), {"alpha": 2.0}, Activation("elu", 2.0)),
        (F.gelu, (), {}, Activation("gelu")),
        (F.gelu, (), {"approximate": "tanh"}, Activation("gelu_tanh")),
        ("clamp", (0, 6), {}, Activation("relu6")),
        (torch.clamp, (), {"min": 0}, Activation("relu")),
        ("clamp", (), {"max": 6}, None),
        ("clamp", (-1, 1), {}, None),
        (F.hardtanh, (0.0, 6.0), {}, Activation("relu6")),
        (F.hardtanh, (), {}, None),
        (operator.mul, (2,), {}, None),
        (F.softmax, (1,), {}, None),
    ],
)
def test_functions(
    target: object, args: tuple[object, ...], kwargs: dict[str, object], expected: object
) -> None:
    assert of_function(target, args, kwargs) == expected
