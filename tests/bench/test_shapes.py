"""The twelve shapes, and the cases that they unfold into."""

from __future__ import annotations

import pytest
import torch

from normally.bench.batch_norm import BatchNorm
from normally.bench.operator import Case
from normally.bench.shapes import SHAPES, Shape, select

DTYPES = ("float32", "bfloat16")
LAYOUTS = ("contiguous", "channels_last")


def test_there_are_twelve_numbers():
    assert {shape.number for shape in SHAPES} == set(range(1, 13))
    labels = [(shape.operator, shape.label) for shape in SHAPES]
    assert len(set(labels)) == len(labels)


def test_batch_norm_has_shapes_1_to_8_and_12():
    assert {shape.number for shape in select("batch_norm")} == {*range(1, 9), 12}
    sizes = {shape.label: shape.size for shape in select("batch_norm")}
    assert sizes["5b"] == (128, 960, 7, 7)
    assert sizes["7a"] == (8, 64, 16, 56, 56)


def test_fusions_are_those_of_the_networks():
    fusions = {shape.label: shape.fusion for shape in select("batch_norm")}
    assert fusions["1"] == "+relu"
    assert fusions["2"] == fusions["4"] == "+add+relu"
    assert fusions["5a"] == "+hardswish"
    assert fusions["6"] == "+leaky_relu"


def test_select_by_number_or_label():
    assert [shape.label for shape in select("batch_norm", [5])] == ["5a", "5b"]
    assert [shape.label for shape in select("batch_norm", ["5b"])] == ["5b"]
    assert select("batch_norm", ["9"]) == []


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match=r"labels such as '5a'. Got shapes=\['13'\]"):
        select("batch_norm", ["13", "1"])


def test_cases_have_both_layouts_where_the_rank_has_them():
    groups = list(BatchNorm().groups(select("batch_norm"), DTYPES, LAYOUTS))
    # 8a and 8b are matrices; the other nine have two layouts. Each in two dtypes.
    assert len(groups) == 2 * (2 + 9 * 2)
    assert all([case.fused for case in group] == [True, False] for group in groups)
    assert {g[0].layout for g in groups if g[0].shape.number == 8} == {"contiguous"}


def test_a_norm_without_fusion_has_one_variant():
    plain = Shape("10a", "layer_norm", (8, 16))
    groups = list(BatchNorm().groups([plain], ["float32"], LAYOUTS))
    # It is whole as it is: targets and figures are of whole cases.
    assert groups == [[Case(plain, "contiguous", "float32", fused=True)]]


def test_the_layout_follows_the_rank():
    image, volume = select("batch_norm", ["1"])[0], select("batch_norm", ["7a"])[0]
    formats = [
        Case(image, "contiguous", "float32", True).memory_format,
        Case(image, "channels_last", "float32", True).memory_format,
        Case(volume, "channels_last", "float32", True).memory_format,
    ]
    assert formats == [torch.contiguous_format, torch.channels_last, torch.channels_last_3d]
