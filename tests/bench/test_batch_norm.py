"""Batch norm's part of the benchmark: its modules agree, and its floors are counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from normally.bench.accuracy import make_inputs
from normally.bench.batch_norm import BatchNorm
from normally.bench.operator import Case
from normally.bench.shapes import Shape, select

LARGE_CACHE = 32 << 20
OPERATOR = BatchNorm()


def case(label: str, dtype: str = "float32", fused: bool = True, mode: str = "forward") -> Case:
    (shape,) = select("batch_norm", [label])
    return Case(shape, "contiguous", dtype, fused, mode)


@pytest.mark.parametrize(
    ("label", "fused", "mode", "tensors", "mask_bytes"),
    [
        ("1", True, "forward", 2, 0),
        ("1", True, "forward_backward", 2 + 3, 0),
        ("1", False, "forward_backward", 2 + 3, 0),
        ("1", True, "evaluation", 2, 0),
        ("2", True, "forward", 3, 0),
        ("2", True, "forward_backward", 3 + 4, 32 * 256 * 56 * 56 // 8),
        ("2", False, "forward_backward", 2 + 3, 0),
        ("2", True, "evaluation", 3, 0),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_floor_with_the_slab_in_cache(label, fused, mode, tensors, mask_bytes, dtype):
    c = case(label, dtype, fused, mode)
    one = {"1": 32 * 64 * 112 * 112, "2": 32 * 256 * 56 * 56}[label]
    one *= 4 if dtype == "float32" else 2
    assert OPERATOR.floor_bytes(c, LARGE_CACHE) == tensors * one + mask_bytes


def test_floor_when_the_slab_leaves_the_cache():
    # A channel of shape 6 has 2·512·512 values: 2 MiB in float32, which 1 MiB does not hold.
    one = 2 * 64 * 512 * 512 * 4
    floors = {
        mode: OPERATOR.floor_bytes(case("6", mode=mode), 1 << 20)
        for mode in ("forward", "forward_backward", "evaluation")
    }
    assert floors == {"forward": 3 * one, "forward_backward": 8 * one, "evaluation": 2 * one}
    exactly_fits = OPERATOR.floor_bytes(case("6"), 2 << 20)
    assert exactly_fits == 2 * one


@pytest.mark.parametrize("size", [(6, 5), (3, 5, 4, 4), (2, 5, 3, 4, 2)])
@pytest.mark.parametrize("act", ["relu", "hardswish", "leaky_relu"])
@pytest.mark.parametrize("training", [True, False])
def test_ours_theirs_and_the_exact_result_are_the_same_function(size, act, training):
    shape = Shape("1", "batch_norm", size, act, residual=True)
    for fused in (True, False):
        c = Case(shape, "contiguous", "float32", fused)
        inputs = make_inputs(c, torch.Generator().manual_seed(1), mean=3.0)
        for build in (OPERATOR.ours, OPERATOR.theirs):
            module = build(c).train(training)
            OPERATOR.fit(module, inputs[0])
            exact = OPERATOR.exact(module, inputs)
            with torch.no_grad():
                # float32 rounding of values up to 4 and sums of 6 to 48 terms around 3.
                torch.testing.assert_close(
                    module(*inputs), exact.float(), rtol=0, atol=2e-5, msg=str(build)
                )


def test_fit_is_what_evaluation_uses():
    c = replace(case("12a", mode="evaluation"), fused=False)
    inputs = make_inputs(c, torch.Generator().manual_seed(1), mean=100.0)
    module = OPERATOR.theirs(c).eval()
    OPERATOR.fit(module, inputs[0])
    exact = OPERATOR.exact(module, inputs)
    assert abs(exact.mean().item()) < 1e-5  # the mean of 100 is rounded to float32: 4e-6
    assert exact.std().item() == pytest.approx(1.0, abs=0.01)


def test_targets_count_their_cases():
    # Shapes 1 to 7 have eight sizes in batch norm, all with an activation, in two layouts.
    assert [OPERATOR.count(target) for target in OPERATOR.targets] == [16, 8, 8]
