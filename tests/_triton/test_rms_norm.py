"""RMS norm's Triton kernels against the float64 reference; layer norm's tests ask for the rest."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from normally import reference
from normally._ops.rms_norm import rms_norm as operator
from normally._triton import row_tiles
from normally.reference import CASTINGS
from tests._triton.rows import QUIET
from tests._triton.rows import exact_bfloat16 as exact_bfloat16
from tests.device import functional, on_device
from tests.helpers import DTYPES, assert_same_bits, lay_out, permutations_of, values
from tests.norm_helpers import check_norm, parameter_dtype, ramp

pytestmark = QUIET

SHAPES = [(5, 1), (3, 7), (2, 3, 64), (5, 129), (2, 1000)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Castings, weights, eps, residuals and layouts take turns."""
    wide, size = parameter_dtype(dtype), shape[-1:]
    turn = SHAPES.index(shape) + DTYPES.index(dtype)
    for index, layout in enumerate(("contiguous", "sliced", "order 10", "strided"), start=turn):
        layout = "order 201" if layout == "order 10" and len(shape) == 3 else layout
        check_norm(
            "rms_norm",
            lay_out(values(shape, dtype, seed=index), layout),
            ramp(size, -1.5, 1.6, wide) if index % 4 else None,
            None,
            values(shape, dtype, seed=9) if index % 2 else None,
            gradient=("contiguous", "expanded batch", layout)[index % 3],
            casting=CASTINGS[index % 3],
            zero_centered_weight=index % 5 < 2,
            eps=(None, 1e-6, 0.5)[index % 3],
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_llama_rounds_before_the_weight(dtype: torch.dtype) -> None:
    """3 times x̂ shows whether x̂ was rounded itself."""
    x, weight = values((9, 65), dtype), torch.full((65,), 3.0)
    found = functional.rms_norm(x, (65,), weight, 1e-6, casting="llama")
    wide = x.float()
    normalized = (wide * (wide.square().mean(1, keepdim=True) + 1e-6).rsqrt()).to(dtype)
    # Of near ties, few, the float32 roundings may decide.
    assert float((found == (normalized.float() * 3).to(dtype)).float().mean()) > 0.99


@pytest.mark.parametrize("layout", permutations_of(4))
def test_every_order_of_memory(layout: str) -> None:
    x = lay_out(values((3, 6, 4, 5), torch.float32), layout)
    for size in ((5,), (4, 5), (6, 4, 5)):
        weight = ramp(size, -1, 2, torch.float32)
        check_norm("rms_norm", x, weight, None, x.flip(0), normalized_shape=size)


def test_longer_than_the_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.tensor([True, False, True]).view(3, 1)
    for dtype, n, kept in ((torch.float32, 8200, mask), (torch.bfloat16, 16400, None)):
        monkeypatch.setattr(row_tiles, "_PROGRAMS", 1 if kept is None else 264)
        x, residual = values((3, n), dtype), values((3, n), dtype, seed=1)
        weight = ramp((n,), -1.5, 2, torch.float32)
        check_norm("rms_norm", x, weight, None, residual, mask=kept)


def test_several_tiles_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_tiles, "_PROGRAMS", 3)
    weight = ramp((600,), -1.5, 2, torch.float32)
    check_norm("rms_norm", values((33, 600), torch.float32), weight)


def test_masks() -> None:
    """What is hidden is NaN, in the gradients too; with a residual the sum is 0 there."""
    kept = torch.rand(4, 6, 1) < 0.6
    kept[1] = False
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.where(kept, values((4, 6, 9), dtype), torch.nan)
        weight, residual = ramp((9,), -1, 2, parameter_dtype(dtype)), values((4, 6, 9), dtype, 1)
        for added in (None, torch.where(kept, residual, torch.inf)):
            check_norm("rms_norm", x, weight, None, added, mask=kept, hidden_gradient=float("nan"))


@pytest.mark.parametrize("n", [90, 17000])
def test_any_mean_and_any_scale(n: int) -> None:
    """The error is relative: nothing is subtracted."""
    base, g = torch.randn(1, n), torch.randn(1, n)
    both = torch.where(torch.rand(1, n) < 0.5, -1.0, 1.0)
    cases = [(base + 1e6, 1e-6), (base * 1e37, 1e-6), (base * 1e-20, 1e-6), (base * 1e-38, 1e-6)]
    cases += [(base * 1e-30, 0.0), (both * torch.finfo(torch.float32).max, 1e-6)]
    for x, eps in cases:
        leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
        found = functional.rms_norm(leaf, (n,), None, eps)
        expected = reference.rms_norm(wide, (n,), None, eps)
        error = (found - expected).detach().abs() - 1e-6 * expected.detach().abs()
        tiniest = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps
        assert float(error.max()) <= tiniest
        (actual,) = torch.autograd.grad(found, leaf, g)
        (wanted,) = torch.autograd.grad(expected, wide, g.double())
        # 16 times 1e-6, for sums of terms of both signs.
        assert float((actual - wanted).abs().max()) <= 1.6e-5 * float(wanted.abs().max()) + tiniest


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constants(dtype: torch.dtype) -> None:
    """Before the root roundings count half: four units in all, and the result's own."""
    unit = 1e-13 if dtype is torch.float64 else 2 * torch.finfo(torch.float32).eps
    for n, constant in ((1, 0.1), (33, 3.14159), (1000, 65503.9), (4099, 1e30), (17000, 0.3)):
        if constant > torch.finfo(dtype).max:
            continue
        x = torch.full((2, n), constant, dtype=dtype)
        weight = ramp((n,), -1.5, 2, parameter_dtype(dtype))
        found = functional.rms_norm(x, (n,), weight, 1e-6)
        expected = reference.rms_norm(x.double(), (n,), weight, 1e-6)
        bound = (unit + torch.finfo(dtype).eps / 2) * expected.abs()
        assert bool(((found - expected).abs() <= bound).all()), n


@pytest.mark.parametrize("shape", [(9, 1), (70, 33), (9, 512), (3, 17000)], ids=str)
def test_samples_do_not_meet(shape: tuple[int, int]) -> None:
    x, g = values(shape, torch.float32), values(shape, torch.float32, seed=1)
    x[2] = torch.nan

    def run(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = x[part].detach().requires_grad_()
        y = functional.rms_norm(leaf, shape[1:])
        return y.detach(), torch.autograd.grad(y, leaf, g[part])[0]

    together = run(slice(None))
    for part in (slice(None), slice(1, 2), slice(0, 2)):
        for found, whole in zip(run(part), together, strict=True):
            assert_same_bits(found, whole[part], f"{part}")


def test_statistics() -> None:
    x = on_device(values((6, 40), torch.float32))
    _, _, stats = operator.forward(x, None, None, None, None, 1, 1e-6, 0, False)
    expected = (x.double().square().mean(1) + 1e-6).rsqrt()
    torch.testing.assert_close(stats, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=str)
def test_empty(shape: tuple[int, int]) -> None:
    x, weight = torch.empty(shape, requires_grad=True), torch.ones(shape[1:], requires_grad=True)
    y = functional.rms_norm(x, shape[1:], weight)
    assert y.shape == shape
    for gradient in torch.autograd.grad(y.sum(), [x, weight]):
        assert torch.count_nonzero(gradient) == 0
