"""Group and instance norm's Triton kernels against the float64 reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from normally import reference
from normally._triton import channel_tiles
from tests.device import functional
from tests.helpers import ACTS, DTYPES, assert_same_bits, lay_out, permutations_of, spread, values
from tests.norm_helpers import check_norm, parameter_dtype, ramp

# Of numpy, in the interpreter: what overflows is not used, or taken again in float64.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]

#: (input's shape, groups)
SHAPES = [
    ((1, 1, 2), 1), ((5, 4), 2), ((3, 6, 5, 7), 2), ((2, 8, 3), 4), ((2, 6, 40), 6),
    ((2, 12, 3, 3), 1), ((3, 10, 2, 3, 5), 5),
]  # fmt: skip
LAYOUTS = ("contiguous", "channels_last", "sliced")


@pytest.fixture(autouse=True, params=["whole", "split"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles make small tensors several programs' work."""
    if request.param == "split":
        for name in ("_TILE", "_VECTOR_TILE"):
            monkeypatch.setattr(channel_tiles, name, 64)


@spread("shape groups, dtype, layout", SHAPES, DTYPES, LAYOUTS, keep=3)
def test_every_shape(shape: tuple[int, ...], groups: int, dtype: torch.dtype, layout: str) -> None:
    # Not the sum: it is what `spread` keeps, so that its remainders would be the shape's alone.
    turn = 5 * SHAPES.index((shape, groups)) + 2 * DTYPES.index(dtype) + LAYOUTS.index(layout)
    wide = parameter_dtype(dtype)
    check_norm(
        "group_norm",
        lay_out(values(shape, dtype, seed=turn), layout),
        ramp((shape[1],), -1.5, 2, wide) if turn % 4 else None,
        ramp((shape[1],), 1, -1, wide) if turn % 3 else None,
        num_groups=groups,
        act=ACTS[turn % len(ACTS)],
        gradient=("contiguous", "expanded batch", "channels_last")[turn % 3],
    )


@pytest.mark.parametrize("layout", permutations_of(4))
def test_every_order_of_memory(layout: str) -> None:
    x = lay_out(values((3, 6, 4, 5), torch.float32), layout)
    check_norm(
        "group_norm",
        x,
        ramp((6,), -1, 2, torch.float32),
        ramp((6,), 1, -1, torch.float32),
        num_groups=3,
        act="silu",
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_instance_norm(layout: str) -> None:
    x = lay_out(values((3, 5, 6, 6), torch.float32), layout)
    check_norm(
        "instance_norm",
        x,
        ramp((5,), -1, 2, torch.float32),
        ramp((5,), 1, -1, torch.float32),
        act="leaky_relu",
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_masks(layout: str) -> None:
    """What is hidden is NaN, in the gradient too; a sample is hidden altogether."""
    mask = torch.rand(4, 1, 5, 7) < 0.6
    mask[1] = False
    x = lay_out(torch.where(mask, values((4, 6, 5, 7), torch.float32), torch.nan), layout)
    check_norm(
        "group_norm", x, ramp((6,), -1, 2, torch.float32), ramp((6,), 1, -1, torch.float32),
        num_groups=2, mask=mask, act="silu", hidden_gradient=float("nan"),
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_any_mean_and_any_scale(layout: str) -> None:
    x = values((3, 4, 90), torch.float32)
    for shift, scale, allowed in ((1e6, 1.0, 1e-6), (0.0, 1e30, 1e-5), (0.0, 1e-20, 1e-5)):
        sample = lay_out((x + shift) * scale, layout)
        found = functional.group_norm(sample, 2, eps=1e-5)
        expected = reference.group_norm(sample.double(), 2)
        largest = expected.abs().amax().clamp(max=1)  # of a tiny scale: relative to itself
        assert float((found.double() - expected).abs().max() / largest) <= 5 * allowed
    constant = functional.group_norm(lay_out(torch.full((2, 4, 33), 0.1), layout), 2)
    assert torch.count_nonzero(constant) == 0


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_samples_do_not_meet(layout: str) -> None:
    """A sample alone has the bits that it has in a batch, whatever the others hold."""
    x = values((4, 6, 5, 7), torch.float32)
    x[2] = torch.nan
    together = functional.group_norm(lay_out(x, layout), 3)
    assert together[2].isnan().all()
    for n in (0, 1, 3):
        alone = functional.group_norm(lay_out(x[n : n + 1].clone(), layout), 3)
        assert_same_bits(alone, together[n : n + 1])
