"""torch's own samples of `nn.functional.batch_norm`, through ours and through torch's."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from normally.functional import batch_norm

with warnings.catch_warnings():
    # torch's test machinery scripts functions and asks for packages that are not there.
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db

OPINFO = next(o for o in op_db if o.name == "nn.functional.batch_norm" and not o.variant_test_name)


def run(function: Any, sample: Any, dtype: torch.dtype) -> list[Tensor | None]:
    """Output, gradients of a fixed cotangent, and the running statistics afterwards."""
    given = copy.deepcopy([sample.input, *sample.args])
    kwargs = copy.deepcopy(sample.kwargs)
    y = function(*given, **kwargs)
    tensors = [t for t in (*given, *kwargs.values()) if isinstance(t, Tensor)]
    leaves = [t for t in tensors if t.requires_grad]
    g = torch.linspace(-1, 1, max(1, y.numel())).to(dtype)[: y.numel()].view(y.shape)
    gradients = torch.autograd.grad(y, leaves, g, allow_unused=True)
    buffers = [t for t in tensors if not t.requires_grad]
    return [y.detach(), *gradients, *buffers]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_samples(dtype: torch.dtype) -> None:
    samples = list(OPINFO.sample_inputs("cpu", dtype, requires_grad=True))
    assert len(samples) >= 10
    for sample in samples:
        ours, theirs = run(batch_norm, sample, dtype), run(F.batch_norm, sample, dtype)
        for a, b in zip(ours, theirs, strict=True):
            if a is None or b is None:
                assert a is b
                continue
            # Half inputs: both round once; their weight gradients are sums over the batch of
            # terms up to 100, rounded to the parameter's half dtype.
            half = dtype.itemsize == 2
            torch.testing.assert_close(
                a, b, atol=0.15 if half else None, rtol=0.02 if half else None
            )


def test_reference_samples_of_other_layouts() -> None:
    """The same samples made non-contiguous, as torch's `test_noncontiguous_samples` does."""
    for sample in OPINFO.sample_inputs("cpu", torch.float64, requires_grad=True):
        plain = run(batch_norm, sample, torch.float64)
        for a, b in zip(run(batch_norm, sample.noncontiguous(), torch.float64), plain, strict=True):
            torch.testing.assert_close(a, b)


def test_errors() -> None:
    """Where torch's operator has error samples, ours raises them too."""
    inputs = OPINFO.error_inputs_func
    samples = [] if inputs is None else list(inputs(OPINFO, "cpu"))
    for error in samples:
        with pytest.raises(error.error_type, match=error.error_regex):
            batch_norm(
                error.sample_input.input, *error.sample_input.args, **error.sample_input.kwargs
            )


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1)])
def test_torchs_words_for_one_value_per_channel(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="Expected more than 1") as theirs:
        F.batch_norm(torch.ones(shape), None, None, training=True)
    with pytest.raises(ValueError, match="Expected more than 1") as ours:
        batch_norm(torch.ones(shape), None, None, training=True)
    assert str(ours.value).startswith(str(theirs.value))


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
def test_torchs_words_for_a_wrong_size(name: str) -> None:
    given = {"running_mean": torch.zeros(3), "running_var": torch.ones(3), name: torch.ones(4)}
    for function in (F.batch_norm, batch_norm):
        with pytest.raises(RuntimeError, match=f"{name} should contain 3 elements not 4"):
            function(torch.ones(2, 3), **given)
