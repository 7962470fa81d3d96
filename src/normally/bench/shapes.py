"""The twelve shapes that every speed is quoted for: sizes of real networks, and two tiny ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Shape:
    """One input size of one operator, with the activation and the residual it meets in practice."""

    label: str  # number and, where a number has several sizes, a letter: "5b"
    operator: str
    size: tuple[int, ...]
    act: str | None = None
    residual: bool = False
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def number(self) -> int:
        """The shape's number, 1 to 12."""
        return int(self.label.rstrip("abcdefgh"))

    @property
    def fusion(self) -> str:
        """What is fused into the norm, as in "+add+relu"; empty for nothing."""
        return ("+add" if self.residual else "") + (f"+{self.act}" if self.act else "")

    @property
    def title(self) -> str:
        """Label, fusion and size on one line."""
        return " ".join(filter(None, (self.label, "×".join(map(str, self.size)), self.fusion)))


def _batch_norms() -> list[Shape]:
    # 7, 8 and 12 have no activation of their own; ReLU is what follows most of them.
    return [
        Shape("1", "batch_norm", (32, 64, 112, 112), "relu"),
        Shape("2", "batch_norm", (32, 256, 56, 56), "relu", residual=True),
        Shape("3", "batch_norm", (32, 256, 14, 14), "relu"),
        Shape("4", "batch_norm", (32, 2048, 7, 7), "relu", residual=True),
        Shape("5a", "batch_norm", (128, 24, 56, 56), "hardswish"),
        Shape("5b", "batch_norm", (128, 960, 7, 7), "hardswish"),
        Shape("6", "batch_norm", (2, 64, 512, 512), "leaky_relu"),
        Shape("7a", "batch_norm", (8, 64, 16, 56, 56), "relu"),
        Shape("8a", "batch_norm", (4096, 512), "relu"),
        Shape("8b", "batch_norm", (125000, 50), "relu"),
        Shape("12a", "batch_norm", (2, 16, 8, 8), "relu"),
    ]


def _group_norms() -> list[Shape]:
    sizes = {"9a": (2, 320, 64, 64), "9b": (2, 1280, 16, 16), "9c": (1, 128, 512, 512)}
    return [
        Shape(label, "group_norm", size, "silu", options={"num_groups": 32})
        for label, size in sizes.items()
    ]


def _rms_norms() -> list[Shape]:
    sizes = {"11a": (8192, 4096), "11b": (2048, 8192), "11c": (262144, 128), "11d": (32, 4096)}
    return [
        Shape(label, operator, size, residual=operator == "add_rms_norm")
        for operator in ("rms_norm", "add_rms_norm")
        for label, size in sizes.items()
    ]


#: All of them; an operator's benchmark takes those that carry its name.
SHAPES: tuple[Shape, ...] = (
    *_batch_norms(),
    Shape("7b", "instance_norm", (2, 32, 64, 64, 64)),
    *_group_norms(),
    Shape("10a", "layer_norm", (12608, 768)),
    Shape("10b", "layer_norm", (1048576, 128)),
    *_rms_norms(),
    Shape("12b", "layer_norm", (1, 768)),
)


def select(operator: str, wanted: Sequence[str | int] | None = None) -> list[Shape]:
    """The operator's shapes, or those of them whose number or label is wanted.

    >>> [shape.label for shape in select("batch_norm", ["5", "12"])]
    ['5a', '5b', '12a']
    """
    shapes = [shape for shape in SHAPES if shape.operator == operator]
    if wanted is None:
        return shapes
    names = {str(name) for name in wanted}
    known = {label for shape in SHAPES for label in (shape.label, str(shape.number))}
    if unknown := sorted(names - known):
        raise ValueError(
            f"bench: shapes must be numbers 1 to 12 or labels such as '5a'. Got shapes={unknown}."
        )
    return [shape for shape in shapes if names & {shape.label, str(shape.number)}]
