"""only= and skip=: the one way in which all verbs choose."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normally import convert
from normally.surgery._walk import walk
from tests.surgery.models import Residual


def paths(**selection: object) -> list[str]:
    found = walk(Residual(), selection.get("only"), selection.get("skip"), "verb")  # type: ignore[arg-type]
    return [path for path, module in found if isinstance(module, nn.BatchNorm2d)]


ALL = [
    "stem.1", "blocks.0.bn1", "blocks.0.bn2", "blocks.0.downsample.1", "blocks.1.bn1",
    "blocks.1.bn2",
]  # fmt: skip


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({}, ALL),
        ({"only": "stem"}, ["stem.1"]),
        ({"only": "stem.1"}, ["stem.1"]),
        ({"only": ["*.bn2", "stem"]}, ["stem.1", "blocks.0.bn2", "blocks.1.bn2"]),
        ({"only": "blocks.0"}, ALL[1:4]),
        ({"only": "BatchNorm*"}, ALL),
        ({"skip": "blocks"}, ["stem.1"]),
        ({"only": "blocks", "skip": ("*.bn1", "*.downsample")}, ["blocks.0.bn2", "blocks.1.bn2"]),
        ({"only": lambda path, module: path.endswith("bn1")}, ["blocks.0.bn1", "blocks.1.bn1"]),
        ({"skip": lambda path, module: isinstance(module, nn.BatchNorm2d)}, []),
    ],
)
def test_selection(selection: dict[str, object], expected: list[str]) -> None:
    assert paths(**selection) == expected


def test_a_name_that_there_is_not_is_no_silent_nothing() -> None:
    with pytest.raises(ValueError, match=r"only must name modules.*'layer9', which is none"):
        paths(only=["stem", "layer9"])
    assert paths(skip="layer9") == ALL  # to leave what is not there is no mistake


@pytest.mark.parametrize("bad", [3, [torch.nn.ReLU], None])
def test_refusals(bad: object) -> None:
    with pytest.raises(TypeError, match="convert: model must be"):
        convert(bad)  # type: ignore[call-overload]
    if bad is not None:
        with pytest.raises(TypeError):
            convert(Residual(), only=bad)  # type: ignore[call-overload]
