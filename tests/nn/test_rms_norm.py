"""RMSNorm: torch's class, state dict and words; the options that are ours."""

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
    check_signature(nn.RMSNorm, torch.nn.RMSNorm, ("casting", "zero_centered_weight"))
    forward = inspect.signature(nn.RMSNorm.forward).parameters
    assert list(forward) == ["self", "input", "residual", "mask", "lengths"]
    assert isinstance(nn.RMSNorm(5), torch.nn.RMSNorm)


@pytest.mark.parametrize("shape", [5, (5,), [6, 5], torch.Size((4, 6, 5))])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("eps", [None, 1e-3])
def test_same_numbers_repr_and_state_as_torch(shape: Any, affine: bool, eps: float | None) -> None:
    theirs = torch.nn.RMSNorm(shape, eps, affine)
    ours = nn.RMSNorm(shape, eps, affine)
    assert repr(ours) == repr(theirs)
    check_state_dicts(ours, theirs)
    # float32 from both sides, outputs of unit scale
    torch.testing.assert_close(ours(X), theirs(X), rtol=1e-5, atol=1e-5)


def test_repr_adds_what_differs_from_torch() -> None:
    text = repr(nn.RMSNorm(5, casting="gemma", zero_centered_weight=True))
    assert text.endswith("casting='gemma', zero_centered_weight=True)")


def test_a_zero_centered_weight_starts_at_zero_and_is_reset_to_it() -> None:
    layer = nn.RMSNorm(5, zero_centered_weight=True)
    assert not layer.weight.any()
    assert_same_bits(layer(X), nn.RMSNorm(5)(X))
    torch.nn.init.uniform_(layer.weight)
    expected = reference.rms_norm(X, (5,), layer.weight, zero_centered_weight=True)
    torch.testing.assert_close(layer(X), expected)
    layer.reset_parameters()
    assert not layer.weight.any()
    nn.RMSNorm(5, elementwise_affine=False, zero_centered_weight=True).reset_parameters()


@pytest.mark.parametrize("casting", reference.CASTINGS)
def test_options_reach_the_function(casting: str) -> None:
    layer = nn.RMSNorm(5, 1e-6, casting=casting)
    torch.nn.init.uniform_(layer.weight)
    x = X.bfloat16()
    mask = torch.arange(6) < torch.tensor([[6], [0], [2], [1]])
    expected = reference.rms_norm(
        x, (5,), layer.weight, 1e-6, casting=casting, mask=mask[..., None]
    )
    # One rounding of the result: the sums before it are float32 or better.
    torch.testing.assert_close(layer(x, mask=mask), expected, rtol=2**-7, atol=0)
    assert_same_bits(layer(x, lengths=mask.sum(1)), layer(x, mask=mask))


def test_a_residual_gives_output_and_sum() -> None:
    layer = nn.RMSNorm(5, casting="llama", zero_centered_weight=True)
    residual = values((4, 6, 5), torch.float32, seed=1)
    mask = torch.rand(4, 6) < 0.5
    output, total = layer(X, residual, mask)
    assert_same_bits(total, torch.where(mask[..., None], X + residual, 0.0))
    assert_same_bits(output, layer(total.detach(), mask=mask))
    expected = functional.add_rms_norm(
        X, residual, 5, layer.weight, casting="llama", zero_centered_weight=True
    )
    for found, wanted in zip(layer(X, residual), expected, strict=True):
        assert_same_bits(found, wanted)


def test_copies_tracing_and_meta() -> None:
    check_copies(nn.RMSNorm(5, casting="llama"), X)
    check_symbolic_tracing(nn.RMSNorm(5), X, torch.rand(4, 6) < 0.5)
    check_meta(nn.RMSNorm((6, 5), device="meta", zero_centered_weight=True), (4, 6, 5))


def test_refused_with_torchs_words_and_the_path() -> None:
    for shape, error in (
        ((4,), RuntimeError), ((4, 5), RuntimeError), ((), RuntimeError),
        ((7, 4, 6, 5), ValueError),
    ):  # fmt: skip
        check_words_of_torch(
            lambda s=shape: nn.RMSNorm(s, elementwise_affine=False)(X),
            lambda s=shape: torch.rms_norm(X, s),
            error,
        )
    words = "expected input with shape [*6], but got input of size[4, 6, 5]"
    check_located(lambda: nn.RMSNorm(6), X, ValueError, words)
    wide = torch.float64
    check_located(lambda: nn.RMSNorm(5, dtype=wide), X, TypeError, "weight must be torch.float32")
    check_located(lambda: nn.RMSNorm(5), X.long(), TypeError, "input must be one of")
    check_located(lambda: nn.RMSNorm(5, eps=-1.0), X, ValueError, "eps must be non-negative")
    check_located(lambda: nn.RMSNorm(5), X.to("meta"), ValueError, "on the same device")


def test_options_are_checked_at_construction() -> None:
    with pytest.raises(ValueError, match=r"^RMSNorm: casting must be one of 'torch', 'llama'"):
        nn.RMSNorm(5, casting="mistral")


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's own
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_another_dtype_as_torch_takes_them(dtype: torch.dtype) -> None:
    for x, weights in ((X.to(dtype), torch.float32), (X, dtype), (X.to(dtype), dtype)):
        theirs, ours = torch.nn.RMSNorm(5, dtype=weights), nn.RMSNorm(5, dtype=weights)
        torch.nn.init.uniform_(theirs.weight)
        ours.load_state_dict(theirs.state_dict())
        found, expected = ours(x), theirs(x)
        assert found.dtype is expected.dtype
        # Two half roundings, one from each side, where the output is half.
        torch.testing.assert_close(
            found, expected, rtol=2 * torch.finfo(found.dtype).eps, atol=1e-6
        )
        found.sum().backward()
        assert ours.weight.grad is not None
        assert ours.weight.grad.dtype is weights
