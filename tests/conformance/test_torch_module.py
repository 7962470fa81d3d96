"""torch's own samples of its normalization layers and their lazy forms, ours beside torch's."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from normally import nn
from tests.conformance.agreement import assert_as_good
from tests.helpers import assert_same_bits, on_device

with warnings.catch_warnings():
    # torch's test machinery scripts functions and asks for packages that are not there.
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_modules import module_db

pytestmark = pytest.mark.usefixtures("born_on_device")

INFOS = {info.module_cls.__name__: info for info in module_db if "Norm" in info.module_cls.__name__}
NAMES = sorted(INFOS)
LAZY = [name for name in NAMES if hasattr(nn, f"Lazy{name}")]
WITH_ERRORS = [name for name in NAMES if INFOS[name].module_error_inputs_func is not None]


def samples(name: str, dtype: torch.dtype, training: bool) -> list[Any]:
    info = INFOS[name]
    found = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=False, training=training
    )
    return [moved(sample) for sample in found]


def moved(sample: Any) -> Any:
    """The sample with its tensors on the device of the test."""
    for given in (sample.constructor_input, sample.forward_input):
        given.args, given.kwargs = tree_map_only(Tensor, on_device, (given.args, given.kwargs))
    return sample


def test_torch_has_samples_for_every_layer() -> None:
    assert set(INFOS) == {
        "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "GroupNorm", "InstanceNorm1d",
        "InstanceNorm2d", "InstanceNorm3d", "LayerNorm", "LocalResponseNorm", "RMSNorm",
    }  # fmt: skip
    assert set(LAZY) == {name for name in NAMES if name.startswith(("BatchNorm", "InstanceNorm"))}
    assert set(WITH_ERRORS) >= {"BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "GroupNorm"}
    assert all(len(samples(name, torch.float32, True)) >= 3 for name in NAMES)


def pair(
    name: str, sample: Any, dtype: torch.dtype, training: bool
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """torch's layer with random parameters, and ours with the same state."""
    arguments, options = sample.constructor_input.args, sample.constructor_input.kwargs
    theirs, ours = (
        getattr(family, name)(*arguments, **options).to(dtype).train(training)
        for family in (torch.nn, nn)
    )
    for parameter in theirs.parameters():
        torch.nn.init.uniform_(parameter)
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, type(theirs))
    return theirs, ours


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_samples(name: str, dtype: torch.dtype, training: bool) -> None:
    for sample in samples(name, dtype, training):
        theirs, ours = pair(name, sample, dtype, training)
        x = sample.forward_input.args[0]
        for _ in range(2):
            compare(theirs, ours, x)
        if sample.reference_fn is not None:
            # torch's own reference, where it has one, takes ours for its layer as well.
            torch.testing.assert_close(ours(x), sample.reference_fn(ours, x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAZY)
def test_samples_of_the_lazy_layers(name: str, training: bool) -> None:
    for sample in samples(name, torch.float32, training):
        theirs, _ = pair(name, sample, torch.float32, training)
        arguments, options = sample.constructor_input.args, sample.constructor_input.kwargs
        bound = inspect.signature(getattr(torch.nn, name)).bind(*arguments, **options)
        bound.apply_defaults()  # the lazy instance norms have others
        del bound.arguments["num_features"]
        lazy = getattr(nn, f"Lazy{name}")(**bound.arguments).train(training)
        x = sample.forward_input.args[0]
        lazy(torch.zeros_like(x))  # any batch gives it its size
        lazy.load_state_dict(theirs.state_dict())
        assert isinstance(lazy, type(theirs))
        compare(theirs, lazy, x)


def compare(theirs: torch.nn.Module, ours: torch.nn.Module, x: Tensor) -> None:
    """Outputs, gradients and buffers; where they differ the float64 layer says who is right."""
    exact = copy.deepcopy(theirs).double()
    counted = getattr(ours, "num_batches_tracked", None)
    counted = None if counted is None else counted.item() + (ours.training and x.numel() > 0)
    results = []
    for module in (theirs, ours, exact):
        leaf = x.to(torch.float64 if module is exact else x.dtype, copy=True).requires_grad_()
        y = module(leaf)
        g = torch.linspace(-1, 1, y.numel(), dtype=x.dtype).view(y.shape).to(y.dtype)
        gradients = torch.autograd.grad(y, [leaf, *module.parameters()], g)
        results.append([y, *gradients])
    for a, b, c in zip(*results, strict=True):
        assert_as_good(b, a, c)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for key, value in theirs.state_dict().items():
        if key == "num_batches_tracked":
            # Ours does not count an empty batch, which changes no buffer; torch's instance norm
            # never counts, so that its momentum=None cannot average.
            assert ours.num_batches_tracked.item() == counted
            theirs.num_batches_tracked.fill_(counted)
        else:
            torch.testing.assert_close(ours.state_dict()[key], value, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_what_torch_checks_of_every_module(name: str) -> None:
    """repr, copies, pickling, memory format and device moves, as torch's test_modules.py does."""
    for sample in samples(name, torch.float32, True):
        arguments, options = sample.constructor_input.args, sample.constructor_input.kwargs
        layer = getattr(nn, name)(*arguments, **options)
        theirs = getattr(torch.nn, name)(*arguments, **options)
        assert repr(layer) == repr(theirs)
        x = sample.forward_input.args[0]
        for other in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
            assert_same_bits(other.eval()(x), layer.eval()(x))
        moved = getattr(nn, name)(*arguments, **options).to("meta")
        assert all(t.is_meta for t in (*moved.parameters(), *moved.buffers()))
        doubled = getattr(nn, name)(*arguments, **options).double()
        assert all(p.dtype is torch.float64 for p in doubled.parameters())
        with torch.device("meta"):
            assert all(p.is_meta for p in getattr(nn, name)(*arguments, **options).parameters())
        if x.dim() in (4, 5) and name != "LayerNorm" and name != "RMSNorm":
            memory_format = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
            y = layer(x.contiguous(memory_format=memory_format))
            torch.testing.assert_close(y, layer(x))
            assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("name", NAMES)
def test_factory_arguments(name: str) -> None:
    """device= and dtype=, for every layer that torch gives them to."""
    sample = samples(name, torch.float32, True)[0]
    arguments, options = sample.constructor_input.args, sample.constructor_input.kwargs
    if "dtype" not in inspect.signature(getattr(torch.nn, name)).parameters:
        assert name == "LocalResponseNorm"  # nothing in it has a dtype
        return
    layer = getattr(nn, name)(*arguments, **options, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype is torch.bfloat16 for p in layer.parameters())


@pytest.mark.parametrize("name", WITH_ERRORS)
def test_error_inputs(name: str) -> None:
    info = INFOS[name]
    inputs = list(
        info.module_error_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
        )
    )
    assert inputs
    for error in inputs:
        for family in (torch.nn, nn):
            with pytest.raises(error.error_type, match=error.error_regex):
                construct_and_call(getattr(family, name), moved(error.module_error_input))


def construct_and_call(kind: type[torch.nn.Module], sample: Any) -> None:
    constructor, forward = sample.constructor_input, sample.forward_input
    kind(*constructor.args, **constructor.kwargs)(*forward.args, **forward.kwargs)
