"""Which of the fused activations a module or a function is."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...reference import ACTIVATIONS, activate


class Activation(NamedTuple):
    """As the layers take it: `act` and `act_param`."""

    act: str
    act_param: float | None = None

    def __str__(self) -> str:
        """As a constructor's argument."""
        return self.act if self.act_param is None else f"{self.act}({self.act_param:g})"


def of_module(module: torch.nn.Module) -> Activation | None:
    """The activation that the module computes; None if it is none of the fused.

    torch's own by their class. Others, such as those of timm and Hugging Face, by what they do: one
    without parameters, buffers and children that agrees with an activation to rounding, for values
    between -12 and 12 and beyond, is that activation.

    >>> of_module(torch.nn.LeakyReLU(0.2)), of_module(torch.nn.Softmax(1))
    (Activation(act='leaky_relu', act_param=0.2), None)
    """
    cls = type(module)
    if cls in _OF_CLASS:
        return Activation(_OF_CLASS[cls])
    if isinstance(module, torch.nn.LeakyReLU) and cls is torch.nn.LeakyReLU:
        return Activation("leaky_relu", float(module.negative_slope))
    if isinstance(module, torch.nn.ELU) and cls is torch.nn.ELU:
        return Activation("elu", float(module.alpha))
    if isinstance(module, torch.nn.GELU) and cls is torch.nn.GELU:
        return Activation("gelu_tanh" if module.approximate == "tanh" else "gelu")
    if cls.__module__.startswith("torch.nn.") or _has_state(module):
        return None
    return _by_measurement(module)


def of_function(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Activation | None:
    """The activation that `target(input, *args, **kwargs)` is: a function, or a method's name."""
    known = _OF_FUNCTION.get(target)
    if known is None:
        return None
    name, parameters, defaults = known
    given = dict(zip((*parameters, "inplace"), args, strict=False))
    given.update(kwargs)
    given.pop("inplace", None)
    values = {**dict(zip(parameters, defaults, strict=True)), **given}
    if set(values) != set(parameters):
        return None
    if name == "gelu":
        approximate = values["approximate"]
        return {"none": Activation("gelu"), "tanh": Activation("gelu_tanh")}.get(approximate)
    if name == "clamp":  # relu6 and relu, spelled otherwise
        bounds = tuple(values.values())
        return {(0, 6): Activation("relu6"), (0, None): Activation("relu")}.get(bounds)
    if not parameters:
        return Activation(name)
    (value,) = values.values()
    return Activation(name, float(value)) if isinstance(value, int | float) else None


_OF_CLASS: dict[type, str] = {
    torch.nn.ReLU: "relu",
    torch.nn.ReLU6: "relu6",
    torch.nn.SiLU: "silu",
    torch.nn.Hardswish: "hardswish",
    torch.nn.Hardsigmoid: "hardsigmoid",
    torch.nn.Sigmoid: "sigmoid",
    torch.nn.Tanh: "tanh",
}

_Known = tuple[str, tuple[str, ...], tuple[Any, ...]]


def _plain(name: str, *functions: Any) -> dict[Any, _Known]:
    return dict.fromkeys(functions, (name, (), ()))


#: Function, or name of a method or operator → activation, its parameters beyond `inplace`, their
#: defaults.
_OF_FUNCTION: dict[Any, _Known] = {
    **_plain("relu", F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"),
    **_plain("relu6", F.relu6, "relu6"),
    **_plain("silu", F.silu, "silu", "silu_"),
    **_plain("hardswish", F.hardswish, "hardswish", "hardswish_"),
    **_plain("hardsigmoid", F.hardsigmoid, "hardsigmoid", "hardsigmoid_"),
    **_plain("sigmoid", F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"),
    **_plain("tanh", F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"),
    **dict.fromkeys(
        (F.leaky_relu, F.leaky_relu_, "leaky_relu", "leaky_relu_"),
        ("leaky_relu", ("negative_slope",), (0.01,)),
    ),
    **dict.fromkeys((F.elu, F.elu_, "elu", "elu_"), ("elu", ("alpha",), (1.0,))),
    **dict.fromkeys((F.gelu, "gelu"), ("gelu", ("approximate",), ("none",))),
    **dict.fromkeys(
        (torch.clamp, torch.clamp_, torch.clip, "clamp", "clamp_", "clip"),
        ("clamp", ("min", "max"), (None, None)),
    ),
    **dict.fromkeys(
        (F.hardtanh, "hardtanh", "hardtanh_"), ("clamp", ("min_val", "max_val"), (-1.0, 1.0))
    ),
}

#: Additions of two tensors.
ADDITIONS = frozenset(
    {operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__iadd__", "__radd__"}
)


def _has_state(module: torch.nn.Module) -> bool:
    tensors = (*module.parameters(), *module.buffers())
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return bool(tensors or any(hooks) or len(list(module.modules())) > 1)


@torch.no_grad()
def _by_measurement(module: Callable[[Tensor], Any]) -> Activation | None:
    x = torch.cat(
        (torch.linspace(-12, 12, 4001, dtype=torch.float64), torch.tensor([-60.0, -20, 20, 60]))
    )
    try:
        y = module(x.clone())
    except Exception:
        return None  # whatever it is, it is not an activation
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        return None
    for name in ACTIVATIONS:
        # Some take 1/6 in float32; the nearest two, both of gelu, are 5e-4 apart.
        if torch.allclose(y, activate(x, name), rtol=1e-6, atol=1e-9):
            return Activation(name)
    return None
