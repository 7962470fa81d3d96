"""torch's own samples of BatchNorm1d, 2d, 3d and their lazy forms, ours beside torch's."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch

from normally import nn
from tests.helpers import assert_same_bits

with warnings.catch_warnings():
    # torch's test machinery scripts functions and asks for packages that are not there.
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_modules import module_db

INFOS = {
    info.module_cls.__name__: info for info in module_db if "BatchNorm" in info.module_cls.__name__
}


def samples(name: str, dtype: torch.dtype, training: bool) -> list[Any]:
    info = INFOS[name]
    return list(
        info.module_inputs_func(
            info, device="cpu", dtype=dtype, requires_grad=False, training=training
        )
    )


def test_torch_has_samples_for_the_three_layers() -> None:
    assert set(INFOS) == {"BatchNorm1d", "BatchNorm2d", "BatchNorm3d"}
    assert all(len(samples(name, torch.float32, True)) >= 5 for name in INFOS)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
def test_samples(name: str, dtype: torch.dtype, training: bool) -> None:
    for sample in samples(name, dtype, training):
        arguments, options = sample.constructor_input.args, sample.constructor_input.kwargs
        theirs = getattr(torch.nn, name)(*arguments, **options).to(dtype).train(training)
        if theirs.affine:
            torch.nn.init.uniform_(theirs.weight)
            if theirs.bias is not None:
                torch.nn.init.uniform_(theirs.bias)
        ours = getattr(nn, name)(*arguments, **options).to(dtype).train(training)
        lazy_options = dict(zip(("eps", "momentum", "affine", "track_running_stats"),
                                arguments[1:], strict=False))  # fmt: skip
        lazy = getattr(nn, f"Lazy{name}")(**{**lazy_options, **options}).to(dtype).train(training)
        x = sample.forward_input.args[0]
        lazy(torch.zeros_like(x))  # any batch gives it its size
        ours.load_state_dict(theirs.state_dict())
        lazy.load_state_dict(theirs.state_dict())
        for _ in range(2):
            compare(theirs, ours, x)
        lazy_theirs = copy.deepcopy(theirs)
        lazy_theirs.load_state_dict(theirs.state_dict())
        lazy.load_state_dict(theirs.state_dict())
        compare(lazy_theirs, lazy, x)


def compare(theirs: torch.nn.Module, ours: torch.nn.Module, x: torch.Tensor) -> None:
    results = []
    for module in (theirs, ours):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        g = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        gradients = torch.autograd.grad(y, [leaf, *module.parameters()], g)
        results.append([y, *gradients])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for key, value in theirs.state_dict().items():
        if key == "num_batches_tracked" and not x.numel():
            continue  # ours does not count an empty batch: it changes no buffer
        torch.testing.assert_close(ours.state_dict()[key], value, msg=key)


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
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
        assert next(layer.to("meta").buffers(), torch.empty(0, device="meta")).is_meta
        doubled = getattr(nn, name)(*arguments, **options).double()
        assert all(p.dtype is torch.float64 for p in doubled.parameters())
        with torch.device("meta"):
            assert all(p.is_meta for p in getattr(nn, name)(*arguments, **options).parameters())


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
def test_error_inputs(name: str) -> None:
    info = INFOS[name]
    inputs = list(
        info.module_error_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
        )
    )
    assert inputs
    for error in inputs:
        constructor = error.module_error_input.constructor_input
        forward = error.module_error_input.forward_input
        for family in (torch.nn, nn):
            layer = getattr(family, name)(*constructor.args, **constructor.kwargs)
            with pytest.raises(error.error_type, match=error.error_regex):
                layer(*forward.args, **forward.kwargs)
