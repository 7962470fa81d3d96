"""Activations fused into layer norm equal torch's: in the tails, at kinks, NaN and infinity."""

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
from tests.device.functional import layer_norm
from tests.helpers import ACTS, DTYPES, KINKS


def function(
    x: Tensor, weight: Tensor, bias: Tensor, act: str | None, act_param: float | None
) -> Tensor:
    if x.shape[-1] == weight.shape[0]:
        return layer_norm(x, weight.shape, weight, bias, act=act, act_param=act_param)
    return layer_norm(x, weight.shape, weight, bias, act=act, act_param=act_param, dim=1)


@pytest.mark.parametrize("last", [True, False], ids=["rows", "channels first"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_nan_and_infinity_pass_as_in_torch(act: str | None, dtype: torch.dtype, last: bool) -> None:
    for layout in ("contiguous", "channels_last"):
        check_special_values(function, act, dtype, layout, last=last)


@pytest.mark.parametrize("last", [True, False], ids=["rows", "channels first"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_large_arguments(act: str | None, dtype: torch.dtype, last: bool) -> None:
    check_large_arguments(function, act, dtype, last=last)


@pytest.mark.parametrize("last", [True, False], ids=["rows", "channels first"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", KINKS)
def test_at_the_kink_the_derivative_is_torchs(act: str, dtype: torch.dtype, last: bool) -> None:
    for layout in ("contiguous", "channels_last"):
        check_kink(function, act, dtype, layout, last=last)


@pytest.mark.parametrize("last", [True, False], ids=["rows", "channels first"])
@pytest.mark.parametrize("act", ["leaky_relu", "elu"])
def test_parameters(act: str, last: bool) -> None:
    for layout in ("contiguous", "channels_last"):
        check_parameters(function, act, layout, last=last)
