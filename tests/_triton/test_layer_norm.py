"""Layer norm's Triton kernels against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from normally import reference
from normally._ops.layer_norm import layer_norm as operator
from normally._triton import row_tiles
from tests._triton.rows import QUIET
from tests._triton.rows import exact_bfloat16 as exact_bfloat16
from tests.device import functional, on_device
from tests.helpers import ACTS, DTYPES, assert_same_bits, lay_out, permutations_of, spread, values
from tests.norm_helpers import check_norm, parameter_dtype, ramp

pytestmark = QUIET

# One value, odd and even ones, one block or a part of it, several rows a tile or a tile a row.
SHAPES = [(5, 1), (3, 7), (2, 3, 64), (5, 129), (2, 1000)]
# (input, dim): rows of several widths, so that a tile is full or not; n beyond the registers.
COLUMNS = [((2, 7, 5), 1), ((3, 64, 7, 7), 1), ((2, 129, 4, 3), 1), ((2, 600, 9), 1), ((9, 4), 0)]


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors become several tiles each of a few programs."""
    monkeypatch.setattr(row_tiles, "_PROGRAMS", 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Activations, absent tensors, residuals and layouts take turns."""
    wide, size = parameter_dtype(dtype), shape[-1:]
    turn = 3 * SHAPES.index(shape) + DTYPES.index(dtype)
    for index, layout in enumerate(("contiguous", "sliced", "order 10", "strided"), start=turn):
        layout = "order 201" if layout == "order 10" and len(shape) == 3 else layout
        check_norm(
            "layer_norm",
            lay_out(values(shape, dtype, seed=index), layout),
            ramp(size, -1.5, 1.6, wide) if index % 4 else None,
            ramp(size, 0.7, -0.9, wide) if index % 3 else None,
            values(shape, dtype, seed=9) if index % 2 else None,
            act=ACTS[index % len(ACTS)],
            gradient=("contiguous", "expanded batch", layout)[index % 3],
        )


@spread("act, dtype, dim", ACTS[1:], (torch.float64, torch.float32), (None, 1))
def test_every_activation(act: str, dtype: torch.dtype, dim: int | None) -> None:
    x = values((3, 17, 33) if dim is None else (3, 33, 17), dtype)
    weight, bias = ramp((33,), -1.5, 2, dtype), ramp((33,), 0.25, -3, dtype)
    check_norm("layer_norm", x, weight, bias, act=act, dim=dim)


@spread("shape dim, dtype, adds", COLUMNS, DTYPES, (False, True))
def test_columns(shape: tuple[int, ...], dim: int, dtype: torch.dtype, adds: bool) -> None:
    wide, size = parameter_dtype(dtype), shape[dim : dim + 1]
    weight, bias = ramp(size, -1.5, 2, wide), ramp(size, 1, -1, wide)
    residual = values(shape, dtype, seed=1) if adds else None
    act = ACTS[(COLUMNS.index((shape, dim)) + adds) % len(ACTS)]
    check_norm("layer_norm", values(shape, dtype), weight, bias, residual, dim=dim, act=act)


@pytest.mark.parametrize("layout", permutations_of(4))
def test_every_order_of_memory(layout: str) -> None:
    """Rows, columns, and where the values of a sample lie otherwise: those are copied."""
    x = lay_out(values((3, 6, 4, 5), torch.float32), layout)
    for size in ((5,), (4, 5), (6, 4, 5)):
        weight, bias = ramp(size, -1, 2, torch.float32), ramp(size, 1, -1, torch.float32)
        check_norm("layer_norm", x, weight, bias, act="silu", normalized_shape=size)
    weight, bias = ramp((6,), -1, 2, torch.float32), ramp((6,), 1, -1, torch.float32)
    check_norm("layer_norm", x, weight, bias, x.flip(0), dim=1, gradient=layout)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_longer_than_the_registers(dtype: torch.dtype) -> None:
    wide = parameter_dtype(dtype)
    mask = torch.tensor([True, False, True]).view(3, 1)
    for n, kept, act in ((8200, None, None), (16400, mask, "silu")):
        x, residual = values((3, n), dtype), values((3, n), dtype, seed=1)
        weight, bias = ramp((n,), -1.5, 2, wide), ramp((n,), 1, -1, wide)
        check_norm(
            "layer_norm", x, weight, bias, None if act is None else residual, mask=kept, act=act
        )


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(("shape", "dim"), [((22, 600), None), ((7, 8200), None), ((5, 70, 9), 1)])
def test_several_tiles_a_program(shape: tuple[int, ...], dim: int | None) -> None:
    """The parameters' gradients are sums over tiles and programs."""
    size = shape[-1:] if dim is None else shape[dim : dim + 1]
    weight, bias = ramp(size, -1.5, 2, torch.float32), ramp(size, 1, -1, torch.float32)
    for given in ((weight, bias), (weight, None), (None, bias)):
        check_norm("layer_norm", values(shape, torch.float32), *given, dim=dim)


@pytest.mark.parametrize("dim", [None, 1])
def test_masks(dim: int | None) -> None:
    """What is hidden is NaN, in the gradients too; with a residual the sum is 0 there."""
    shape = (4, 6, 5, 9)
    kept = torch.rand((4, 6, 5, 1) if dim is None else (4, 1, 5, 9)) < 0.6
    kept[1] = False
    size = (9,) if dim is None else (6,)
    for dtype, act, layout in (
        (torch.float32, "sigmoid", "contiguous"), (torch.bfloat16, None, "order 1023"),
    ):  # fmt: skip
        wide = parameter_dtype(dtype)
        weight, bias = ramp(size, -1, 2, wide), ramp(size, 1, -1, wide)
        x = lay_out(torch.where(kept, values(shape, dtype), torch.nan), layout)
        residual = torch.where(kept, values(shape, dtype, seed=1), torch.inf)
        for added in (None, residual):
            check_norm(
                "layer_norm", x, weight, bias, added, mask=kept, dim=dim, act=act,
                hidden_gradient=float("nan"),
            )  # fmt: skip


@pytest.mark.parametrize(("shape", "dim"), [((4, 90), None), ((2, 90, 6), 1), ((2, 17000), None)])
def test_any_mean(shape: tuple[int, ...], dim: int | None) -> None:
    """Promise 1, its outliers included: 1e-6 of unit scale, or of the output where it is larger."""
    base = torch.randn(shape)
    outlier, drifting = base.clone(), base + 1e6
    outlier.select(1 if dim is None else dim, 0).fill_(-1e7)
    steps = torch.linspace(-1e4, 1e4, shape[1])
    drifting += steps if dim is None else steps.view(-1, 1)
    for x in (base + 1e3, base - 1e6, outlier, outlier + 1e5, drifting):
        found = functional.layer_norm(x, (shape[1],), dim=dim)
        expected = reference.layer_norm(x.double(), (shape[1],), dim=dim)
        error = (found - expected).abs() / expected.abs().clamp(min=1)
        assert float(error.max()) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), [((4, 90), None), ((2, 90, 6), 1), ((1, 17000), None)])
def test_constants_become_the_bias(
    shape: tuple[int, ...], dim: int | None, dtype: torch.dtype
) -> None:
    wide, size = parameter_dtype(dtype), (shape[1],)
    weight, bias = ramp(size, -1e3, 2e3, wide), ramp(size, 1, -1, wide)
    expected = (bias if dim is None else bias.view(-1, 1)).to(dtype).expand(shape)
    largest = torch.finfo(dtype).max
    for constant in (0.0, 0.1, -3.14159, 65503.9, 1e15, -1e30, 3e38):
        if abs(constant) <= largest:
            x = torch.full(shape, constant, dtype=dtype)
            assert torch.equal(functional.layer_norm(x, size, weight, bias, dim=dim), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "dim"), [((4, 90), None), ((2, 90, 6), 1), ((1, 17000), None)])
def test_extreme_scales(shape: tuple[int, ...], dim: int | None, dtype: torch.dtype) -> None:
    """Promise 12: output and gradients are right up to the largest float32, and down to nothing."""
    size, g = (shape[1],), torch.randn(shape).to(dtype)
    both = torch.where(torch.rand(shape) < 0.5, -1.0, 1.0)
    cases = [(torch.randn(shape) * scale, 1e-5) for scale in (1e37, 1e19, 1e-20, 1e-38)]
    cases += [(torch.randn(shape) * 1e-30, 0.0), (both * torch.finfo(dtype).max, 1e-5)]
    for x, eps in cases:
        leaf = x.to(dtype).requires_grad_()
        wide = leaf.detach().double().requires_grad_()
        found = functional.layer_norm(leaf, size, eps=eps, dim=dim)
        expected = reference.layer_norm(wide, size, eps=eps, dim=dim)
        pairs = [
            (found, expected),
            (torch.autograd.grad(found, leaf, g)[0],
             torch.autograd.grad(expected, wide, g.double())[0]),
        ]  # fmt: skip
        for actual, wanted in pairs:
            # 16 times 1e-6, for sums of terms of both signs, and the rounding of the result.
            bound = 1.6e-5 * wanted.abs().max() + torch.finfo(dtype).eps * wanted.abs()
            bound += torch.finfo(torch.float32).smallest_normal * torch.finfo(dtype).eps
            assert bool(((actual.double() - wanted).abs() <= bound).all()), float(x.abs().max())


def _gradients(x: Tensor, g: Tensor, dim: int | None) -> tuple[Tensor, Tensor]:
    n = x.shape[-1 if dim is None else dim]
    leaf = x.detach().requires_grad_()
    weight, bias = ramp((n,), -1.5, 2, x.dtype), ramp((n,), 1, -1, x.dtype)
    y = functional.layer_norm(leaf, (n,), weight, bias, dim=dim, act="silu")
    return y.detach(), torch.autograd.grad(y, leaf, g)[0]


@pytest.mark.parametrize(
    ("shape", "dim"), [((9, 1), None), ((70, 33), None), ((9, 512), None), ((3, 17000), None),
                       ((5, 33, 7), 1), ((4, 600, 4), 1)]
)  # fmt: skip
def test_samples_do_not_meet(shape: tuple[int, ...], dim: int | None) -> None:
    """A sample has the bits that it has in a batch, whatever the others hold, at any address."""
    x, g = values(shape, torch.float32), values(shape, torch.float32, seed=1)
    x[2] = torch.nan
    together = _gradients(x, g, dim)
    assert_same_bits(_gradients(x, g, dim)[1], together[1], "once more")
    assert together[0][2].isnan().all()
    for part in (slice(1, 2), slice(shape[0] - 1, None), slice(0, 2)):
        alone = x[part].clone() if part.start == 0 else x[part]
        found = _gradients(alone, g[part], dim)
        assert_same_bits(found[0], together[0][part], f"output, {part}")
        assert_same_bits(found[1], together[1][part], f"gradient, {part}")


def test_statistics_and_what_is_needed() -> None:
    """`stats` is mean and rstd in float64; what `need` leaves out is empty."""
    x = (values((6, 40), torch.float32) + 1e6).requires_grad_(False)
    weight, bias = ramp((40,), -1, 2, torch.float32), ramp((40,), 1, -1, torch.float32)
    there = [on_device(t) for t in (x, weight, bias)]
    settings = (1, 1, 1e-5, 0, 0.0)
    _, _, stats = operator.forward(there[0], None, *there[1:], None, *settings)
    mean, var = reference.moments(x.double(), (1,))
    # The sums are float32's, of differences from the mean.
    torch.testing.assert_close(stats[0].cpu(), mean[:, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(stats[1].cpu(), (var[:, 0] + 1e-5).rsqrt(), rtol=1e-6, atol=0)
    g = on_device(values((6, 40), torch.float32, seed=1))
    full = operator.backward(g, None, *there, None, stats, *settings, 3)
    for need in (1, 2):
        part = operator.backward(g, None, *there, None, stats, *settings, need)
        for index, (found, whole) in enumerate(zip(part, full, strict=True)):
            if (need == 1) == (index == 0):
                assert_same_bits(found.cpu(), whole.cpu())
            else:
                assert found.numel() == 0


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 5)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    size = shape[-1:]
    leaves = [t.requires_grad_() for t in (torch.empty(shape), torch.ones(size), torch.ones(size))]
    y = functional.layer_norm(leaves[0], size, *leaves[1:])
    assert y.shape == shape
    for gradient, leaf in zip(torch.autograd.grad(y.sum(), leaves), leaves, strict=True):
        assert gradient.shape == leaf.shape
        assert torch.count_nonzero(gradient) == 0


def test_parameters_in_any_layout() -> None:
    weight = ramp((5, 7), -1, 2, torch.float32).t().contiguous().t()
    bias = torch.ones(()).expand(5, 7)
    check_norm(
        "layer_norm", values((40, 5, 7), torch.float32), weight, bias, normalized_shape=(5, 7)
    )
