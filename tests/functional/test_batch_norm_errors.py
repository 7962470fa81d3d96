"""Bad input: a clear error, and nothing changed by a call that raised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.device.functional import batch_norm
from tests.helpers import assert_same_bits

X = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))

# name: (the arguments that are wrong, the error, words it must contain)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "one value per channel": (
        {"input": X[:1, :, 0]},
        ValueError,
        r"Expected more than 1 value per channel when training, got input size .*\[1, 3\]",
    ),
    "one value per channel of an image": (
        {"input": X[:1, :, :1]},
        ValueError,
        "Expected more than 1 value per channel",
    ),
    "eps of zero": ({"eps": 0.0}, ValueError, "eps must be positive during training, but got 0.0"),
    "negative eps": ({"eps": -1e-5}, ValueError, "eps must be positive during training"),
    "eps of nan": ({"eps": float("nan")}, ValueError, "eps must be positive during training"),
    "integer input": ({"input": torch.ones(4, 3, dtype=torch.long)}, TypeError, "int64"),
    "complex input": ({"input": X.to(torch.complex64)}, TypeError, "complex64"),
    "float8 input": ({"input": X.to(torch.float8_e5m2)}, TypeError, "float8"),
    "one dimension": ({"input": torch.ones(3)}, ValueError, "2 dimensions"),
    "no dimension": ({"input": torch.tensor(1.0)}, ValueError, "2 dimensions"),
    "running_mean of another size": (
        {"running_mean": torch.zeros(2)},
        RuntimeError,
        "running_mean should contain 3 elements not 2",
    ),
    "running_var of another size": (
        {"running_var": torch.zeros(5)},
        RuntimeError,
        "running_var should contain 3 elements not 5",
    ),
    "weight of another size": (
        {"weight": torch.zeros(4)},
        RuntimeError,
        "weight should contain 3 elements not 4",
    ),
    "bias of another size": (
        {"bias": torch.zeros(1)},
        RuntimeError,
        "bias should contain 3 elements not 1",
    ),
    "weight in float64": ({"weight": torch.ones(3).double()}, TypeError, "float64"),
    "bias in half": ({"bias": torch.ones(3).half()}, TypeError, "float16"),
    "integer running_mean": ({"running_mean": torch.zeros(3).long()}, TypeError, "int64"),
    "weight elsewhere": (
        {"weight": torch.ones(3, device="meta")},
        RuntimeError,
        "on the same device",
    ),
    "residual elsewhere": (
        {"residual": X.to("meta")},
        RuntimeError,
        "on the same device",
    ),
    "residual of another shape": ({"residual": torch.ones(7)}, ValueError, "broadcastable"),
    "residual of another shape and dtype": (
        {"residual": torch.ones(7, dtype=torch.float64)},
        ValueError,
        "broadcastable",
    ),
    "residual larger than the input": (
        {"residual": torch.ones(2, 4, 3, 5)},
        ValueError,
        "broadcastable",
    ),
    "residual larger than the input and of another dtype": (
        {"residual": torch.ones(2, 4, 3, 5, dtype=torch.float64)},
        ValueError,
        "broadcastable",
    ),
    "residual of another shape, channels last": (
        {"channel_dim": -1, "input": X.mT, "residual": torch.ones(4, 3, 5)},
        ValueError,
        "broadcastable",
    ),
    "complex residual": ({"residual": X.to(torch.complex64), "act": "relu"}, TypeError, "complex"),
    "unknown activation": ({"act": "swish"}, ValueError, "act must be None or one of 'relu'"),
    "parameter without taker": ({"act": "relu", "act_param": 0.1}, ValueError, "act_param"),
    "parameter without activation": ({"act_param": 0.1}, ValueError, "act_param"),
    "channel_dim too large": ({"channel_dim": 3}, ValueError, "channel_dim"),
    "channel_dim larger still": ({"channel_dim": 4}, ValueError, "channel_dim"),
    "channel_dim too small": ({"channel_dim": -5}, ValueError, "channel_dim"),
    "unknown on_single_value": ({"on_single_value": "skip"}, ValueError, "on_single_value"),
    "negative correction": ({"correction": -1}, ValueError, "correction"),
    "correction of all values": ({"correction": 20}, ValueError, "correction=20"),
    "cumulative average without a count": (
        {"momentum": None, "num_batches_tracked": None},
        ValueError,
        "num_batches_tracked must be given",
    ),
    "mask's shape": ({"mask": torch.ones(4, 3, 5).bool()}, ValueError, "mask must be broadcast"),
    "mask's dtype": ({"mask": torch.ones(4, 1, 5)}, TypeError, "mask must be torch.bool"),
    "number of lengths": ({"lengths": torch.tensor([5, 4])}, ValueError, "one number a sample"),
    "one value kept": ({"lengths": torch.tensor([1, 0, 0, 0])}, ValueError, "more than 1 value"),
    "group": ({"group": object()}, TypeError, "ProcessGroup or None. Got group of type object"),
}


@pytest.mark.parametrize("case", BAD)
def test_error_leaves_every_buffer_alone(case: str) -> None:
    changed, error, words = BAD[case]
    arguments: dict[str, Any] = {
        "input": X,
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
        "weight": torch.ones(3),
        "bias": torch.zeros(3),
        "training": True,
        "num_batches_tracked": torch.tensor(7),
        "skipped_updates": torch.zeros(3, dtype=torch.long),
        **changed,
    }
    buffers = ("running_mean", "running_var", "num_batches_tracked", "skipped_updates")
    before = {
        name: None if arguments[name] is None else arguments[name].clone() for name in buffers
    }
    with pytest.raises(error, match=words):
        batch_norm(**arguments)
    for name in buffers:
        assert_same_bits(arguments[name], before[name], name)


@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
def test_evaluation_needs_running_statistics(missing: str) -> None:
    given = {"running_mean": torch.zeros(3), "running_var": torch.ones(3), missing: None}
    with pytest.raises(RuntimeError, match=f"{missing} must be defined in evaluation mode"):
        F.batch_norm(X, **given)
    with pytest.raises(RuntimeError, match=f"{missing} must be defined in evaluation mode"):
        batch_norm(X, **given)


def test_evaluation_takes_a_zero_eps_as_torch_does() -> None:
    mean, var = torch.zeros(3), torch.full((3,), 4.0)
    torch.testing.assert_close(
        batch_norm(X, mean, var, eps=0.0), F.batch_norm(X, mean, var, eps=0.0)
    )


def test_a_negative_variance_gives_nan_as_torch_does() -> None:
    mean, var = torch.zeros(3), torch.tensor([1.0, -1.0, 1.0])
    y = batch_norm(X, mean, var)
    assert y[:, 1].isnan().all()
    assert y[:, ::2].isfinite().all()
