"""Normalization layers of other libraries, recognized by what they compute.

timm, torchvision and Hugging Face have hundreds of classes that are one of six formulas: a layer
norm over dimension 1, a batch norm that applies an activation, the RMS norms of the language
models. None of them is known here by name. A layer is taken for a formula if it agrees with it on
random inputs and parameters, in the dtypes that it takes, to rounding; it then gets a class derived
from its own whose forward is ours.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..nn._location import located
from ..nn._origin import becoming
from ..nn._skipped_updates import CountsSkippedUpdates
from ..nn._tracing import traced
from ._dataflow import activations
from ._derived import Derived, derive

_EPS_NAMES = ("eps", "variance_epsilon", "epsilon")


@dataclass(frozen=True)
class Recipe:
    """Which formula a layer is, and where the layer has what goes into it."""

    #: "batch", "frozen", "group", "layer" or "rms".
    kind: str
    eps_name: str
    #: Layer norm's dimension; None is the last.
    dim: int | None = None
    #: RMS norm's.
    casting: str = "torch"
    zero_centered_weight: bool = False
    #: Whether it is the formula for an input and a weight of two dtypes, too. If not, the layer's
    #: own forward runs for those: Llama's multiplies half by float32 into float32.
    mixed: bool = True
    #: The activation that the layer's child `act` is, and that child's class.
    act: activations.Activation | None = None
    act_class: type | None = None

    def __str__(self) -> str:
        """For a report."""
        words = {
            "batch": "batch norm", "frozen": "frozen batch norm", "group": "group norm",
            "layer": "layer norm", "rms": "RMS norm",
        }[self.kind]  # fmt: skip
        options = [f"dim={self.dim}"] if self.dim is not None else []
        options += [f"casting={self.casting!r}"] if self.casting != "torch" else []
        options += ["zero_centered_weight=True"] if self.zero_centered_weight else []
        options += [f"act={str(self.act)!r}"] if self.act is not None else []
        return f"normally's {words}" + (f" ({', '.join(options)})" if options else "")

    def __call__(
        self,
        layer: Any,
        input: Tensor,
        residual: Tensor | None = None,
        act: str | None = None,
        act_param: float | None = None,
    ) -> Tensor:
        """The layer's output."""
        child = layer._modules.get("act")
        # A child that somebody has replaced since is called as it is.
        fused = self.act is not None and type(child) is self.act_class
        if fused and self.act is not None:
            act, act_param = self.act
        output = self._normalize(layer, input, residual, act, act_param)
        return output if fused or child is None else child(output)

    def _normalize(
        self,
        layer: Any,
        input: Tensor,
        residual: Tensor | None,
        act: str | None,
        act_param: float | None,
    ) -> Tensor:
        weight, bias = layer.weight, getattr(layer, "bias", None)
        if not self.mixed and input.dtype is not weight.dtype:
            own: Tensor = layer._base.forward(layer, input)
            return own
        eps = getattr(layer, self.eps_name)
        if self.kind == "batch":
            training = layer.training
            tracks = layer.track_running_stats or not training
            buffers = layer._buffers if tracks else {}
            mean, var = buffers.get("running_mean"), buffers.get("running_var")
            return functional.batch_norm(
                input, mean, var, weight, bias, training or (mean is None and var is None),
                layer.momentum, eps, act=act, act_param=act_param, residual=residual,
                num_batches_tracked=buffers.get("num_batches_tracked"),
                skipped_updates=buffers.get("_skipped_updates"),
                memory_efficient=getattr(layer, "memory_efficient", False),
            )  # fmt: skip
        if self.kind == "frozen":
            return functional.batch_norm(
                input, layer.running_mean, layer.running_var, weight, bias, False, 0.0, eps,
                act=act, act_param=act_param, residual=residual,
            )  # fmt: skip
        if self.kind == "group":
            return functional.group_norm(
                input, layer.num_groups, weight, bias, eps, act=act, act_param=act_param
            )
        shape = getattr(layer, "normalized_shape", None) or tuple(weight.shape)
        if self.kind == "layer":
            return functional.layer_norm(
                input, shape, weight, bias, eps, act=act, act_param=act_param, dim=self.dim
            )
        return functional.rms_norm(
            input, shape, weight, eps, casting=self.casting,
            zero_centered_weight=self.zero_centered_weight,
        )  # fmt: skip


class Converted(Derived):
    """Mixed into the class of a layer that is one of the formulas."""

    _recipe: Recipe

    def forward(
        self, input: Tensor, *, act: str | None = None, act_param: float | None = None
    ) -> Tensor:
        """The layer's formula; `act` is the activation of this call, for a layer without one."""
        return _forward(self, input, act=act, act_param=act_param)


class ConvertedBatchNorm(Derived, CountsSkippedUpdates):
    """The same for layers with running statistics, which are protected as ours are."""

    _recipe: Recipe

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        act: str | None = None,
        act_param: float | None = None,
    ) -> Tensor:
        """The layer's formula; `residual` and `act` as in `normally.nn.BatchNorm2d`."""
        return _forward(self, input, residual=residual, act=act, act_param=act_param)


def _forward(layer: Any, input: Tensor, **options: Any) -> Tensor:
    if isinstance(input, torch.fx.Proxy):
        traced_output: Tensor = traced(layer, input, **options)
        return traced_output
    try:
        output: Tensor = layer._recipe(layer, input, **options)
    except (ValueError, TypeError) as error:
        raise located(error, layer) from None
    return output


def convert(layer: Any, verb: str, known: dict[Any, Recipe]) -> str:
    """Make a foreign layer one of ours, in place, if it is one of the formulas.

    Args:
        layer: it.
        verb: who asks.
        known: what was recognized before; layers of one class and setting are tried once.

    Returns:
        What it became, in words.

    Raises:
        ValueError: if it is none of them; the message says why.
    """
    act = _activation(layer)
    key = (type(layer), act, _settings(layer))
    if key not in known:
        known[key] = recognize(layer, act)
    recipe = known[key]
    counts = recipe.kind == "batch"
    with becoming(layer, derive(ConvertedBatchNorm if counts else Converted, type(layer)), verb):
        layer._recipe = recipe
        if counts:
            layer._start_count()
    return str(recipe)


def _settings(layer: torch.nn.Module) -> tuple[Any, ...]:
    """What may decide what a layer of one class computes; its sizes do not."""
    sizes = {"num_features", "num_channels", "normalized_shape", "num_groups", "training"}
    plain = {
        name: value
        for name, value in vars(layer).items()
        if name not in sizes and (value is None or isinstance(value, bool | int | float | str))
    }
    tensors = {name: t is None for name, t in (*layer._parameters.items(), *layer._buffers.items())}
    return (*sorted(plain.items(), key=str), *sorted(tensors.items()))


def recognize(layer: torch.nn.Module, act: tuple[Any, type] | None) -> Recipe:
    """The formula that the layer computes, with that activation (and its class) at the end.

    Raises:
        ValueError: if there is none; the message says why.
    """
    twins: list[tuple[torch.dtype, torch.nn.Module]] = []
    for inputs, parameters in _DTYPES:
        twin = copy.deepcopy(layer)
        _forget_hooks(twin)
        twins.append((inputs, _randomized(twin, parameters)))
    tried = False
    *alike, (mixed_dtype, mixed) = twins
    of_one_dtype: list[Recipe] = []
    for recipe in _candidates(layer, act):
        tried = True
        if all(_agree(recipe, twin, dtype) for dtype, twin in alike):
            if _agree(recipe, mixed, mixed_dtype):
                return recipe
            if recipe.kind in ("rms", "layer") and act is None:
                of_one_dtype.append(replace(recipe, mixed=False))
    if of_one_dtype:  # orders of casting differ by one unit of half precision, in some values
        half, twin = alike[-1]
        return min(of_one_dtype, key=lambda recipe: _differences(recipe, twin, half))
    raise ValueError(
        "it agrees with none of normally's formulas" if tried else "no formula has its parameters"
    )


#: Of the input and of parameters and buffers; the two of the last differ.
_DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
)


def _activation(layer: torch.nn.Module) -> tuple[Any, type] | None:
    """The activation at the end and its class, None without one that is fused.

    Raises:
        ValueError: for children that do something else.
    """
    children = dict(layer.named_children())
    drop, act = children.pop("drop", None), children.pop("act", None)
    if children:
        raise ValueError(f"it has children of its own ({', '.join(children)})")
    if drop is not None and type(drop) is not torch.nn.Identity:
        raise ValueError("it drops values before its activation")
    if act is None or type(act) is torch.nn.Identity:
        return None
    known = activations.of_module(act)
    if known is None:  # called after the norm
        return None
    if act._forward_hooks or act._forward_pre_hooks or act._backward_hooks:
        raise ValueError("its activation has hooks, which would not be called")
    return known, type(act)


def _candidates(layer: torch.nn.Module, act: tuple[Any, type] | None) -> Iterator[Recipe]:
    eps_names = [name for name in _EPS_NAMES if isinstance(getattr(layer, name, None), float)]
    if len(eps_names) != 1 or not hasattr(layer, "weight"):
        return
    fused, act_class = (None, None) if act is None else act
    base = Recipe("layer", eps_names[0], act=fused, act_class=act_class)
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
        if not isinstance(layer, torch.nn.SyncBatchNorm):
            yield replace(base, kind="batch")
    elif {"running_mean", "running_var", "weight", "bias"} <= layer._buffers.keys():
        yield replace(base, kind="frozen")
    elif isinstance(layer, torch.nn.GroupNorm):
        yield replace(base, kind="group")
    elif isinstance(layer, torch.nn.LayerNorm) or (weight is not None and bias is not None):
        yield base
        yield replace(base, dim=1)
    elif weight is not None and act is None and set(layer._parameters) <= {"weight", "bias"}:
        for zero_centered in (False, True):
            for casting in ("torch", "llama", "gemma"):
                yield replace(base, kind="rms", casting=casting, zero_centered_weight=zero_centered)


def _forget_hooks(layer: torch.nn.Module) -> None:
    for module in layer.modules():
        for name, hooks in vars(module).items():
            if name.endswith("_hooks") and isinstance(hooks, dict):
                hooks.clear()


@torch.no_grad()
def _randomized(layer: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Parameters and running statistics of order 1, so that each of them shows."""
    generator = torch.Generator().manual_seed(0)
    layer = layer.to("cpu", dtype)
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return layer


def _agree(recipe: Recipe, layer: torch.nn.Module, dtype: torch.dtype) -> bool:
    """Whether both give the same, in training and in evaluation; so does what both refuse."""
    for training in (False, True):
        for shape in _shapes(recipe, layer):
            generator = torch.Generator().manual_seed(1)
            x = torch.randn(shape, generator=generator).to(dtype)
            ours, theirs = copy.deepcopy(layer).train(training), layer.train(training)
            try:
                expected = theirs(x.clone())
            except (RuntimeError, TypeError):
                if dtype is torch.float32:
                    return False
                continue  # mixed dtypes are not for every layer
            with torch.no_grad():
                found = recipe(ours, x)
            if not isinstance(expected, Tensor) or not _close(found, expected):
                return False
            if not all(map(_close, ours.buffers(), theirs.buffers())):
                return False
    return True


@torch.no_grad()
def _differences(recipe: Recipe, layer: torch.nn.Module, dtype: torch.dtype) -> int:
    """How many values are not the same."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn((64, *_shapes(recipe, layer)[0]), generator=generator).to(dtype)
    return int((recipe(layer, x) != layer(x)).sum())


def _close(found: Tensor, expected: Tensor) -> bool:
    """Equal to rounding: values are of order 1 and sums have few terms."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    if not found.is_floating_point():
        return torch.equal(found, expected)
    # Two units in the last place of the largest values, which are below 8.
    allowed = 16 * torch.finfo(found.dtype).eps
    return bool(((found - expected).abs() <= allowed).all())


def _shapes(recipe: Recipe, layer: Any) -> list[tuple[int, ...]]:
    """Inputs that tell the formulas apart."""
    weight = layer.weight
    shape = tuple(getattr(layer, "normalized_shape", ())) or tuple(weight.shape)
    if recipe.kind in ("layer", "rms") and recipe.dim is None:
        return [(2, 5, *shape), (2, 3, 5, *shape)]
    channels = getattr(layer, "num_channels", None) or shape[0]
    spatial = {"BatchNorm1d": (6,), "BatchNorm3d": (2, 3, 2)}
    names = {base.__name__ for base in type(layer).__mro__}
    of = next((size for name, size in spatial.items() if name in names), (4, 3))
    return [(3, channels, *of)]
