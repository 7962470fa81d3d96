"""LayerNorm: torch's class, state dict and words; the options that are ours."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from normally import functional, nn, reference
from tests.helpers import assert_same_bits, on_device, values
from tests.nn.layer_checks import (
    check_copies,
    check_located,
    check_meta,
    check_signature,
    check_state_dicts,
    check_symbolic_tracing,
    check_words_of_torch,
)

X = on_device(values((4, 6, 5), torch.float32))


def test_signature_is_torchs_then_ours_by_keyword() -> None:
    check_signature(nn.LayerNorm, torch.nn.LayerNorm, ("act", "act_param", "dim"))
    forward = inspect.signature(nn.LayerNorm.forward).parameters
    assert list(forward) == ["self", "input", "residual", "mask", "lengths", "act", "act_param"]
    assert isinstance(nn.LayerNorm(5), torch.nn.LayerNorm)


@pytest.mark.parametrize("shape", [5, (5,), [6, 5], torch.Size((4, 6, 5))])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_same_numbers_repr_and_state_as_torch(shape: Any, affine: bool, bias: bool) -> None:
    theirs = torch.nn.LayerNorm(shape, 1e-3, affine, bias)
    ours = nn.LayerNorm(shape, 1e-3, affine, bias)
    assert repr(ours) == repr(theirs)
    check_state_dicts(ours, theirs)
    # float32 from both sides, outputs of unit scale
    torch.testing.assert_close(ours(X), theirs(X), rtol=1e-5, atol=1e-5)


def test_repr_adds_what_differs_from_torch() -> None:
    text = repr(nn.LayerNorm(6, act="elu", act_param=0.5, dim=1))
    assert text.endswith("act='elu', act_param=0.5, dim=1)")


def test_options_reach_the_function() -> None:
    layer = nn.LayerNorm(6, act="leaky_relu", act_param=0.2, dim=1, dtype=torch.float64)
    torch.nn.init.uniform_(layer.weight)
    torch.nn.init.uniform_(layer.bias)
    mask = torch.arange(5) < torch.tensor([[5], [0], [2], [1]])
    x = X.double()
    expected = reference.layer_norm(
        x, (6,), layer.weight, layer.bias, dim=1, act="leaky_relu", act_param=0.2,
        mask=mask[:, None],
    )  # fmt: skip
    torch.testing.assert_close(layer(x, mask=mask), expected)
    torch.testing.assert_close(layer(x, lengths=mask.sum(1)), expected)


def test_a_residual_gives_output_and_sum() -> None:
    layer = nn.LayerNorm(5, act="silu")
    residual = values((4, 6, 5), torch.float32, seed=1)
    mask = torch.rand(4, 6) < 0.5
    output, total = layer(X, residual, mask)
    assert_same_bits(total, torch.where(mask[..., None], X + residual, 0.0))
    assert_same_bits(output, layer(total.detach(), mask=mask))
    expected = functional.add_layer_norm(X, residual, 5, layer.weight, layer.bias, act="silu")
    for found, wanted in zip(layer(X, residual), expected, strict=True):
        assert_same_bits(found, wanted)


def test_copies_tracing_and_meta() -> None:
    check_copies(nn.LayerNorm(5, act="gelu"), X)
    check_symbolic_tracing(nn.LayerNorm(5), X, torch.rand(4, 6) < 0.5)
    check_meta(nn.LayerNorm((6, 5), device="meta"), (4, 6, 5))


def test_symbolic_tracing_with_a_residual() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(5)

        def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            output, total = self.norm(x, residual)
            return output + total

    model = Net()
    residual = values((4, 6, 5), torch.float32, seed=1)
    assert_same_bits(torch.fx.symbolic_trace(model)(X, residual), model(X, residual))


def test_refused_with_torchs_words_and_the_path() -> None:
    for shape, x in ((4, X), ((4, 5), X), ((7, 4, 6, 5), X), ([], X)):
        check_words_of_torch(
            lambda s=shape, x=x: nn.LayerNorm(s, elementwise_affine=False)(x),
            lambda s=shape, x=x: torch.nn.LayerNorm(s, elementwise_affine=False)(x),
            RuntimeError,
        )
    words = "expected input with shape [*, 6], but got input of size[4, 6, 5]; for channels first, "
    check_located(lambda: nn.LayerNorm(6), X, ValueError, words + "pass dim=1")
    check_located(lambda: nn.LayerNorm(5), X.double(), TypeError, "weight must be torch.float64")
    check_located(lambda: nn.LayerNorm(5), X.long(), TypeError, "input must be one of")
    check_located(lambda: nn.LayerNorm(5, eps=-1.0), X, ValueError, "eps must be non-negative")
    check_located(lambda: nn.LayerNorm(5), X.to("meta"), ValueError, "on the same device")
    check_located(lambda: nn.LayerNorm(5, dim=1), X, ValueError, "normalized_shape=[5] and dim=1")
    check_located(lambda: nn.LayerNorm(5, dim=3), X, ValueError, "dim must be a dimension of")


def test_options_are_checked_at_construction() -> None:
    with pytest.raises(ValueError, match=r"^LayerNorm: act must be None or one of 'relu'"):
        nn.LayerNorm(5, act="swish")
    with pytest.raises(ValueError, match=r"^LayerNorm: normalized_shape must be one size where"):
        nn.LayerNorm((6, 5), dim=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_with_parameters_of_either_dtype(dtype: torch.dtype) -> None:
    x = X.to(dtype)
    for layer in (nn.LayerNorm(5), nn.LayerNorm(5, dtype=dtype)):
        assert layer(x).dtype is dtype
        output, total = layer(x, x)
        assert output.dtype is total.dtype is dtype
    output, total = nn.LayerNorm(5)(x, X)  # as torch adds them
    assert output.dtype is total.dtype is torch.float32
