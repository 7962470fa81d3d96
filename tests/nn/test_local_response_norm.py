"""LocalResponseNorm: torch's class and words, and masks."""

from __future__ import annotations

import inspect

import pytest
import torch

from normally import nn, reference
from tests.helpers import on_device, values
from tests.nn.layer_checks import (
    check_copies,
    check_located,
    check_signature,
    check_symbolic_tracing,
)

X = on_device(values((3, 6, 5), torch.float32))


def test_signature_is_torchs() -> None:
    check_signature(nn.LocalResponseNorm, torch.nn.LocalResponseNorm, ())
    forward = inspect.signature(nn.LocalResponseNorm.forward).parameters
    assert list(forward) == ["self", "input", "mask", "lengths"]
    assert isinstance(nn.LocalResponseNorm(2), torch.nn.LocalResponseNorm)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 13])
def test_same_numbers_and_repr_as_torch(size: int) -> None:
    theirs = torch.nn.LocalResponseNorm(size, 0.5, 0.6, 0.7)
    ours = nn.LocalResponseNorm(size, 0.5, 0.6, 0.7)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == []
    for x in (X, X[..., None], X[..., None, None], X[:, :0], X[:0]):
        # float32 from both sides, outputs of unit scale
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_a_mask_and_lengths() -> None:
    layer = nn.LocalResponseNorm(3, 1.0)
    mask = torch.arange(5) < torch.tensor([[5], [0], [2]])
    expected = reference.local_response_norm(X, 3, 1.0).where(mask[:, None], 0.0)
    padded = X.where(mask[:, None], torch.nan)
    torch.testing.assert_close(layer(padded, mask), expected)
    torch.testing.assert_close(layer(padded, lengths=mask.sum(1)), expected)


def test_copies_tracing_and_meta() -> None:
    check_copies(nn.LocalResponseNorm(2), X)
    check_symbolic_tracing(nn.LocalResponseNorm(2), X, torch.rand(3, 5) < 0.5)
    assert nn.LocalResponseNorm(2)(X.to("meta")).shape == X.shape


def test_refused_with_the_path() -> None:
    words = "Expected 3D or higher dimensionality input (got 2 dimensions)"
    check_located(lambda: nn.LocalResponseNorm(2), X[0], ValueError, words)
    with pytest.raises(ValueError, match="Expected 3D or higher dimensionality") as error:
        torch.nn.LocalResponseNorm(2)(X[0])
    assert " ".join(str(error.value).split()) == words  # torch's has a run of blanks inside
    for size in (0, -2):
        words = f"size must be 1 or more. Got size={size}"
        check_located(lambda s=size: nn.LocalResponseNorm(s), X, ValueError, words)
        with pytest.raises(RuntimeError):
            torch.nn.LocalResponseNorm(size)(X)
        with pytest.raises(RuntimeError):
            nn.LocalResponseNorm(size)(X)
    check_located(lambda: nn.LocalResponseNorm(2), X.long(), TypeError, "input must be one of")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_keep_their_dtype(dtype: torch.dtype) -> None:
    assert nn.LocalResponseNorm(2)(X.to(dtype)).dtype is dtype
