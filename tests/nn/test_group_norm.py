"""GroupNorm: torch's class, state dict and words; the options that are ours."""

from __future__ import annotations

import inspect

import pytest
import torch

from normally import nn, reference
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

X = on_device(values((3, 6, 5), torch.float32))


def test_signature_is_torchs_then_ours_by_keyword() -> None:
    check_signature(nn.GroupNorm, torch.nn.GroupNorm, ("act", "act_param"))
    forward = inspect.signature(nn.GroupNorm.forward).parameters
    assert list(forward) == ["self", "input", "mask", "lengths", "act", "act_param"]
    assert isinstance(nn.GroupNorm(2, 6), torch.nn.GroupNorm)


@pytest.mark.parametrize("num_groups", [1, 2, 3, 6])
@pytest.mark.parametrize("affine", [True, False])
def test_same_numbers_repr_and_state_as_torch(num_groups: int, affine: bool) -> None:
    theirs = torch.nn.GroupNorm(num_groups, 6, 1e-3, affine)
    ours = nn.GroupNorm(num_groups, 6, 1e-3, affine)
    assert repr(ours) == repr(theirs)
    check_state_dicts(ours, theirs)
    for x in (X, X[..., None], X[..., None, None]):
        # float32 from both sides, outputs of unit scale
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_without_bias() -> None:
    layer = nn.GroupNorm(2, 6, bias=False)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    torch.nn.init.uniform_(layer.weight)
    torch.testing.assert_close(layer(X), reference.group_norm(X, 2, layer.weight))
    layer.reset_parameters()
    assert torch.equal(layer.weight, torch.ones(6))
    assert list(nn.GroupNorm(2, 6, affine=False).parameters()) == []


def test_repr_adds_what_differs_from_torch() -> None:
    assert repr(nn.GroupNorm(2, 6, act="silu")).endswith(", act='silu')")


def test_options_reach_the_function() -> None:
    layer = nn.GroupNorm(2, 6, act="leaky_relu", act_param=0.2, dtype=torch.float64)
    torch.nn.init.uniform_(layer.weight)
    torch.nn.init.uniform_(layer.bias)
    mask = torch.arange(5) < torch.tensor([[5], [0], [2]])
    expected = reference.group_norm(
        X.double(), 2, layer.weight, layer.bias, act="leaky_relu", act_param=0.2,
        mask=mask[:, None],
    )  # fmt: skip
    torch.testing.assert_close(layer(X.double(), mask), expected)
    torch.testing.assert_close(layer(X.double(), lengths=mask.sum(1)), expected)


def test_copies_tracing_and_meta() -> None:
    check_copies(nn.GroupNorm(2, 6, act="gelu"), X)
    check_symbolic_tracing(nn.GroupNorm(2, 6), X, torch.rand(3, 5) < 0.5)
    check_meta(nn.GroupNorm(2, 6, device="meta"), (3, 6, 5, 4))


def test_refused_with_torchs_words_and_the_path() -> None:
    check_words_of_torch(lambda: nn.GroupNorm(3, 4), lambda: torch.nn.GroupNorm(3, 4), ValueError)
    for groups, x, error in (
        (4, X, RuntimeError), (2, X[0, 0], RuntimeError), (2, X[:1, :2, 0], ValueError),
        (6, X[:1, :, :1], ValueError),
    ):  # fmt: skip
        check_words_of_torch(
            lambda g=groups, x=x: nn.GroupNorm(g, 12, affine=False)(x),
            lambda g=groups, x=x: torch.nn.GroupNorm(g, 12, affine=False)(x),
            error,
        )
    words = "Expected weight to be a vector of size equal to the number of channels in input"
    check_located(lambda: nn.GroupNorm(2, 4), X, ValueError, words)
    check_words_of_torch(lambda: nn.GroupNorm(2, 4)(X), lambda: torch.nn.GroupNorm(2, 4)(X),
                         RuntimeError)  # fmt: skip
    check_located(lambda: nn.GroupNorm(2, 6), X.double(), TypeError, "weight must be torch.float64")
    check_located(lambda: nn.GroupNorm(2, 6), X.long(), TypeError, "input must be one of")
    check_located(lambda: nn.GroupNorm(2, 6, eps=-1.0), X, ValueError, "eps must be non-negative")
    check_located(lambda: nn.GroupNorm(2, 6), X.to("meta"), ValueError, "on the same device")
    lengths = torch.tensor([1, 2, 3])
    with pytest.raises(ValueError, match=r"lengths needs exactly one dimension.*in GroupNorm\]"):
        nn.GroupNorm(2, 6)(X[..., None].expand(3, 6, 5, 2), lengths=lengths)


def test_options_are_checked_at_construction() -> None:
    with pytest.raises(ValueError, match=r"^GroupNorm: act must be None or one of 'relu'"):
        nn.GroupNorm(2, 6, act="swish")
    with pytest.raises(ValueError, match=r"^GroupNorm: num_groups must be 1 or more"):
        nn.GroupNorm(0, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_with_parameters_of_either_dtype(dtype: torch.dtype) -> None:
    for layer in (nn.GroupNorm(2, 6), nn.GroupNorm(2, 6, dtype=dtype)):
        assert layer(X.to(dtype)).dtype is dtype
    assert_same_bits(nn.GroupNorm(2, 6)(X.to(dtype)), nn.GroupNorm(2, 6).to(dtype)(X.to(dtype)))
