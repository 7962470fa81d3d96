"""The shapes at the sizes of a GPU, their order, and the bytes of their floors."""

from __future__ import annotations

from dataclasses import replace

import pytest

from normally.bench.gpu.cases import GPU_SHAPES, MODES, floor_bytes, least_bytes, plan
from normally.bench.main import OPERATORS
from normally.bench.operator import LAYOUTS
from normally.bench.shapes import SHAPES

from .gpu_helpers import DEVICE


def sizes(operator):
    return {shape.label: shape.size for shape in GPU_SHAPES if shape.operator == operator}


def test_images_have_a_batch_of_256():
    found = sizes("batch_norm")
    assert found["1"] == (256, 64, 112, 112)
    assert found["2"] == (256, 256, 56, 56)
    assert found["3"] == (256, 256, 14, 14)
    assert found["4"] == (256, 2048, 7, 7)
    assert found["5a"] == (256, 24, 56, 56)
    assert found["5b"] == (256, 960, 7, 7)


def test_other_shapes_are_those_of_the_cpu():
    of_cpu = {(s.operator, s.label): s.size for s in SHAPES}
    for shape in GPU_SHAPES:
        before = of_cpu.get((shape.operator, shape.label))
        if before != shape.size:
            is_image = shape.operator == "batch_norm" and shape.number <= 5
            assert is_image or shape.label in ("11e", "11f", "11g", "11h")
    assert {shape.number for shape in GPU_SHAPES} == set(range(1, 13))


def test_rms_norm_has_small_widths_and_few_rows_too():
    found = sizes("rms_norm").values()
    assert min(size[-1] for size in found) == 64
    assert min(size[0] for size in found) == 1


def test_every_shape_is_planned_in_its_layouts_and_both_dtypes():
    entries = plan()
    keys = [(o.name, c.shape.label, c.layout, c.dtype) for o, c in entries]
    assert len(set(keys)) == len(keys)
    expected = {
        (shape.operator, shape.label, layout, dtype)
        for shape in GPU_SHAPES
        for layout in OPERATORS[shape.operator].layouts(shape)
        for dtype in ("bfloat16", "float32")
    }
    assert set(keys) == expected
    assert all(case.fused for _, case in entries)


def test_operators_take_turns():
    first = [operator.name for operator, _ in plan()[: len(OPERATORS)]]
    assert first == list(OPERATORS)


def test_a_plan_can_be_a_part():
    entries = plan(["rms_norm", "batch_norm"], ["11a", "12"], ["float32"], ["contiguous"])
    assert [(o.name, c.shape.label) for o, c in entries] == [
        ("batch_norm", "12a"), ("rms_norm", "11a"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "value"),
    [("operators", "norm"), ("shapes", "13"), ("dtypes", "int8"), ("layouts", "nhwc")],
)
def test_an_unknown_name_is_refused(argument, value):
    with pytest.raises(ValueError, match=rf"{argument} must be among .*Got {argument}=\['{value}'"):
        plan(**{argument: [value]})


def tensors(operator, label, dtype="float32"):
    """By mode, the floor in tensors, of one multiprocessor's memory and of the L2."""
    ((_, case),) = plan([operator], [label], [dtype], LAYOUTS[:1])
    found = {}
    for mode in MODES:
        timed = replace(case, mode=mode)
        floors = (
            floor_bytes(OPERATORS[operator], timed, DEVICE),
            least_bytes(OPERATORS[operator], timed, DEVICE.l2_bytes),
        )
        found[mode] = tuple(round(bytes_ / case.tensor_bytes, 6) for bytes_ in floors)
    return found


@pytest.mark.parametrize(
    ("operator", "label", "expected"),
    [
        # A channel of 12.8 MB: the L2 could keep it, a multiprocessor not.
        ("batch_norm", "1", [(3, 2), (5, 3), (8, 5)]),
        # Channels of 49 positions: 50 KB.
        ("batch_norm", "5b", [(2, 2), (3, 3), (5, 5)]),
        # A whole tensor of 8.4 MB.
        ("batch_norm", "8a", [(2, 2), (3, 3), (5, 5)]),
        ("layer_norm", "10b", [(2, 2), (3, 3), (5, 5)]),
        ("rms_norm", "11a", [(2, 2), (3, 3), (5, 5)]),
        ("add_rms_norm", "11a", [(4, 4), (4, 4), (8, 8)]),
        # A group of 4 MB in a tensor of 134 MB.
        ("group_norm", "9c", [(3, 2), (5, 3), (8, 5)]),
    ],
)  # fmt: skip
def test_floors(operator, label, expected):
    assert list(tensors(operator, label).values()) == expected


def test_a_residual_adds_a_tensor_and_a_bit_an_element():
    # 32 bits an element, so a bit is 1/32 of a tensor.
    assert tensors("batch_norm", "2") == {
        "forward": (4, 3),
        "backward": (6.03125, 4.03125),
        "forward_backward": (10.03125, 7.03125),
    }
