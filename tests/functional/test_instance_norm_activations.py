"""Activations fused into instance norm equal torch's: in the tails, at kinks, NaN and infinity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.activation_checks import (
    check_kink,
    check_large_arguments,
    check_parameters,
    check_special_values,
)
from tests.device.functional import instance_norm
from tests.helpers import ACTS, DTYPES, KINKS


def function(
    x: Tensor, weight: Tensor, bias: Tensor, act: str | None, act_param: float | None
) -> Tensor:
    return instance_norm(x, None, None, weight, bias, act=act, act_param=act_param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_nan_and_infinity_pass_as_in_torch(act: str | None, dtype: torch.dtype) -> None:
    for layout in ("contiguous", "channels_last"):
        check_special_values(function, act, dtype, layout, last=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_large_arguments(act: str | None, dtype: torch.dtype) -> None:
    check_large_arguments(function, act, dtype, last=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", KINKS)
def test_at_the_kink_the_derivative_is_torchs(act: str, dtype: torch.dtype) -> None:
    for layout in ("contiguous", "channels_last"):
        check_kink(function, act, dtype, layout, last=False)


@pytest.mark.parametrize("act", ["leaky_relu", "elu"])
def test_parameters(act: str) -> None:
    for layout in ("contiguous", "channels_last"):
        check_parameters(function, act, layout, last=False)
