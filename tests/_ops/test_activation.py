"""Activation names and their codes, which the kernels share."""

from __future__ import annotations

import pytest

from normally import reference
from normally._ops import activation


def test_codes_go_there_and_back() -> None:
    for name in (None, *reference.ACTIVATIONS):
        code, param = activation.encode(name, None, "caller")
        decoded = activation.decode(code, param)
        assert decoded["act"] == name
        assert decoded["act_param"] == reference.DEFAULT_ACT_PARAM.get(name or "")
    assert [activation.encode(n, None, "")[0] for n in activation.NAMES] == list(range(12))


def test_an_explicit_parameter_is_kept() -> None:
    assert activation.encode("leaky_relu", 0.25, "caller")[1] == 0.25
    assert activation.encode("elu", 2, "caller")[1] == 2.0


def test_errors_name_the_caller() -> None:
    with pytest.raises(ValueError, match="BatchNorm2d: act must be None or one of"):
        activation.encode("mish", None, "BatchNorm2d")
    with pytest.raises(ValueError, match=r"act_param must be None unless act is 'leaky_relu'"):
        activation.encode("gelu", 0.1, "BatchNorm2d")


def test_only_piecewise_linear_ones_have_saved_bits() -> None:
    names = {activation.NAMES[code] for code in activation.PIECEWISE_CONSTANT}
    assert names == {"relu", "relu6", "leaky_relu"}
