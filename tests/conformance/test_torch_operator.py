"""torch's own samples of the norms in `nn.functional`, through ours and through torch's."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conformance.agreement import assert_as_good
from tests.device import functional
from tests.device.functional import batch_norm
from tests.helpers import DTYPES

with warnings.catch_warnings():
    # torch's test machinery scripts functions and asks for packages that are not there.
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db

NAMES = (
    "batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm", "local_response_norm",
)  # fmt: skip
INFOS = {
    name: next(o for o in op_db if o.name == f"nn.functional.{name}" and not o.variant_test_name)
    for name in NAMES
}


def samples(name: str, dtype: torch.dtype) -> list[Any]:
    return list(INFOS[name].sample_inputs("cpu", dtype, requires_grad=True))


def widened(sample: Any) -> Any:
    """The same numbers in float64."""

    def wide(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().double().requires_grad_(value.requires_grad)

    other = copy.copy(sample)
    other.input = wide(sample.input)
    other.args = tuple(wide(a) for a in sample.args)
    other.kwargs = {key: wide(value) for key, value in sample.kwargs.items()}
    return other


def run(function: Any, sample: Any) -> list[Tensor | None]:
    """Output, gradients of a fixed cotangent, and the running statistics afterwards."""
    given = copy.deepcopy([sample.input, *sample.args])
    kwargs = copy.deepcopy(sample.kwargs)
    y = function(*given, **kwargs)
    tensors = [t for t in (*given, *kwargs.values()) if isinstance(t, Tensor)]
    leaves = [t for t in tensors if t.requires_grad]
    # Steps of 1/128 are numbers of every dtype.
    g = ((torch.arange(y.numel()) * 37 % 257 - 128) / 128).to(y.dtype).view(y.shape)
    gradients = torch.autograd.grad(y, leaves, g, allow_unused=True)
    buffers = [t for t in tensors if not t.requires_grad]
    return [y.detach(), *gradients, *buffers]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_samples(name: str, dtype: torch.dtype) -> None:
    found = samples(name, dtype)
    assert len(found) >= 6
    for sample in found:
        if sample.kwargs.get("eps", 1.0) < 0:
            # torch takes the root of what may be negative; ours says so. The rest of the sample
            # is as good with a positive one.
            with pytest.raises(ValueError, match="eps must be"):
                run(getattr(functional, name), sample)
            sample.kwargs["eps"] *= -1
        ours, theirs = (run(getattr(m, name), sample) for m in (functional, F))
        exact = run(getattr(F, name), widened(sample))
        for a, b, c in zip(ours, theirs, exact, strict=True):
            if a is None or b is None or c is None:
                assert a is b is c
                continue
            assert a.dtype is b.dtype
            assert a.shape == b.shape
            assert_as_good(a, b, c)


@pytest.mark.parametrize("name", NAMES)
def test_samples_of_other_layouts(name: str) -> None:
    """The same samples made non-contiguous, as torch's `test_noncontiguous_samples` does."""
    function = getattr(functional, name)
    for sample in samples(name, torch.float64):
        sample.kwargs = {k: abs(v) if k == "eps" else v for k, v in sample.kwargs.items()}
        plain = run(function, sample)
        for a, b in zip(run(function, sample.noncontiguous()), plain, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_reference_samples(name: str) -> None:
    """torch's larger samples, and its numpy reference where it has one."""
    info = INFOS[name]
    for sample in info.reference_inputs("cpu", torch.float64):
        if sample.kwargs.get("eps", 1.0) < 0:
            continue
        y = getattr(functional, name)(
            *copy.deepcopy([sample.input, *sample.args]), **copy.deepcopy(sample.kwargs)
        )
        plain = getattr(F, name)(
            *copy.deepcopy([sample.input, *sample.args]), **copy.deepcopy(sample.kwargs)
        )
        torch.testing.assert_close(y, plain)


#: How many error samples torch has; where it has none, those below are its words.
ERRORS = {"batch_norm": 0, "layer_norm": 0, "rms_norm": 3, "group_norm": 2, "instance_norm": 0,
          "local_response_norm": 0}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_errors(name: str) -> None:
    """Where torch's operator has error samples, ours raises them too."""
    inputs = INFOS[name].error_inputs_func
    found = [] if inputs is None else list(inputs(INFOS[name], "cpu"))
    assert len(found) == ERRORS[name]
    for error in found:
        sample = error.sample_input
        for function in (getattr(F, name), getattr(functional, name)):
            with pytest.raises(error.error_type, match=error.error_regex):
                function(sample.input, *sample.args, **sample.kwargs)


X = torch.ones(2, 6, 4)
#: What torch raises besides, found by trying: function, arguments, and its words.
WRONG: list[tuple[str, tuple[Any, ...], type[Exception], str]] = [
    ("layer_norm", (X, (5,)), RuntimeError, r"Given normalized_shape=\[5\], expected input with"),
    ("layer_norm", (X, ()), RuntimeError, "Expected normalized_shape to be at least 1-dimensional"),
    ("layer_norm", (X, (4,), torch.ones(5)), RuntimeError, "Expected weight to be of same shape"),
    ("layer_norm", (X, (4,), None, torch.ones(5)), RuntimeError, "Expected bias to be of same sha"),
    ("rms_norm", (X, (3, 4)), RuntimeError, r"Given normalized_shape=\[3, 4\], expected input wit"),
    ("group_norm", (X, 4), RuntimeError, "Expected number of channels in input to be divisible by"),
    ("group_norm", (X, 2, torch.ones(4)), RuntimeError, "Expected weight to be a vector of size e"),
    ("group_norm", (X, 2, None, torch.ones(4)), RuntimeError, "Expected bias to be a vector of si"),
    ("group_norm", (X[:1, :, :1], 6), ValueError, "Expected more than 1 value per channel when tr"),
    ("instance_norm", (X[:, :, :1],), ValueError, "Expected more than 1 spatial element when trai"),
    ("instance_norm", (X, torch.ones(5), torch.ones(5)), RuntimeError, "running_mean should conta"),
    ("instance_norm", (X, None, None, torch.ones(5)), RuntimeError, "weight should contain"),
    ("instance_norm", (X, None, None, None, None, False), RuntimeError, "Expected running_mean an"),
    ("local_response_norm", (X[0], 2), ValueError, "Expected 3D or higher dimensionality +input"),
]


@pytest.mark.parametrize(
    ("name", "arguments", "kind", "words"), WRONG, ids=[f"{w[0]}-{w[3][:30]}" for w in WRONG]
)
def test_torchs_words(
    name: str, arguments: tuple[Any, ...], kind: type[Exception], words: str
) -> None:
    for function in (getattr(F, name), getattr(functional, name)):
        with pytest.raises(kind, match=words):
            function(*arguments)


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
