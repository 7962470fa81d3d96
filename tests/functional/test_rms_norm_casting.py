"""The three orders of casting, written out as the models that use them do.

LLaMA (transformers' `LlamaRMSNorm`) rounds to the input's dtype before it multiplies by the weight;
Gemma (`GemmaRMSNorm`) multiplies by 1 + weight first, and torch by the weight, and round once.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.device.functional import rms_norm
from tests.helpers import DTYPES, assert_same_bits, needs_kernels, values

HALVES = (torch.bfloat16, torch.float16)
EPS = 1e-6


def llama(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def gemma(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (wide * (1.0 + weight.float())).type_as(x)


def ours(x: Tensor, weight: Tensor, casting: str) -> Tensor:
    return rms_norm(
        x, (x.shape[-1],), weight, EPS, casting=casting, zero_centered_weight=casting == "gemma"
    )


THEIRS = {"llama": llama, "gemma": gemma}


def units_apart(a: Tensor, b: Tensor) -> Tensor:
    """How many numbers of their dtype lie between two tensors of equal signs."""
    integer = {4: torch.int32, 2: torch.int16}[a.element_size()]
    return (a.contiguous().view(integer).long() - b.contiguous().view(integer).long()).abs()


@needs_kernels  # the reference rounds once, from float64
@pytest.mark.parametrize("casting", THEIRS)
@pytest.mark.parametrize("size", [1, 7, 16, 17, 64, 257, 4096])
def test_float32_equals_the_models(size: int, casting: str) -> None:
    """Bit for bit in every row in which 1/√(mean(x²) + eps) is the same float32 number.

    Its last bits depend on the order of a float32 sum, in theirs on torch's build. So every row
    must be theirs for a root within 2 units of the exact one, and most for their very root.
    """
    x, weight = values((100, size), torch.float32), torch.randn(size)
    y, theirs = ours(x, weight, casting), THEIRS[casting](x, weight)
    root = (x.double().square().mean(-1) + EPS).rsqrt().float().unsqueeze(-1)
    scale = 1.0 + weight if casting == "gemma" else weight
    is_theirs = torch.zeros(100, dtype=torch.bool)
    for units in range(-2, 3):
        near = (root.view(torch.int32) + units).view(torch.float32)
        is_theirs |= (y == (x * near) * scale).all(-1)
    assert is_theirs.all()
    assert int((y == theirs).all(-1).sum()) >= 50
    # A root 2 units away, and two products that double it.
    assert int(units_apart(y, theirs).max()) <= 4


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("casting", THEIRS)
@pytest.mark.parametrize("shape", [(64, 7), (3, 40, 33), (20, 4096)], ids=str)
def test_half_equals_the_models_to_one_rounding(
    shape: tuple[int, ...], casting: str, dtype: torch.dtype
) -> None:
    """A near tie of float32 may round either way: by one unit, and hardly ever."""
    x, weight = values(shape, dtype), torch.randn(shape[-1]).to(dtype)
    apart = units_apart(ours(x, weight, casting), THEIRS[casting](x, weight))
    if casting == "llama":
        # A unit before the weight is up to two after it.
        assert int(apart.max()) <= 2
    else:
        assert int(apart.max()) <= 1
    # A tie is nearer than 4 float32 units in 2 * 4 of the 2^16 (bfloat16) or 2^13 (float16) of a
    # unit: below one in a thousand. The other order of casting differs in a quarter of them.
    assert int((apart > 0).sum()) <= max(2, apart.numel() // 500)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_order_of_casting_is_seen(dtype: torch.dtype) -> None:
    x, weight = values((50, 64), dtype), torch.randn(64).to(dtype)
    once = rms_norm(x, (64,), weight, EPS)
    twice = rms_norm(x, (64,), weight, EPS, casting="llama")
    assert int((once != twice).sum()) > x.numel() // 10
    # Without a weight, or with one of float32's ones, there is nothing to round twice for.
    plain = rms_norm(x, (64,), None, EPS)
    assert_same_bits(rms_norm(x, (64,), None, EPS, casting="llama"), plain)
    assert_same_bits(rms_norm(x, (64,), torch.ones(64), EPS, casting="llama"), plain)
    assert_same_bits(rms_norm(x, (64,), torch.ones(64), EPS, casting="gemma"), plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_order_does_not_matter_without_narrowing(dtype: torch.dtype) -> None:
    """float64 and float32 are computed in themselves, so at most the last units differ."""
    x, weight = values((9, 33), dtype), torch.randn(33, dtype=dtype)
    once = rms_norm(x, (33,), weight)
    for casting in ("llama", "gemma"):
        twice = rms_norm(x, (33,), weight, casting=casting)
        torch.testing.assert_close(twice, once, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("casting", ["torch", "llama", "gemma"])
def test_zero_centred_weights(casting: str, dtype: torch.dtype) -> None:
    """A weight w about 0 is the weight 1 + w: exactly, where that sum is."""
    x = values((9, 16), dtype)
    weight = torch.linspace(-0.5, 0.4375, 16, dtype=torch.promote_types(dtype, torch.float32))
    centred = rms_norm(x, (16,), weight, casting=casting, zero_centered_weight=True)
    assert_same_bits(centred, rms_norm(x, (16,), 1 + weight, casting=casting))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_zero_centred_weight_is_widened_before_1_is_added(dtype: torch.dtype) -> None:
    """1 + 2^-9 is 1 in bfloat16: such a weight would do nothing."""
    x = torch.ones(1, 8, dtype=dtype) * 3
    small = torch.full((8,), 2.0**-9 if dtype is torch.bfloat16 else 2.0**-12, dtype=dtype)
    wide = 1 + small.float()
    for casting in ("torch", "gemma"):
        y = rms_norm(x * 1.001, (8,), small, casting=casting, zero_centered_weight=True)
        assert_same_bits(y, rms_norm(x * 1.001, (8,), wide, casting=casting))


@pytest.mark.parametrize("casting", ["torch", "llama", "gemma"])
def test_the_result_has_the_inputs_dtype(casting: str) -> None:
    """LLaMA's own product with a float32 weight would be float32: ours narrows it."""
    for dtype in HALVES:
        y = rms_norm(values((3, 8), dtype), (8,), torch.ones(8), casting=casting)
        assert y.dtype is dtype
