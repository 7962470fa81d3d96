"""The twelve shapes at the sizes of a GPU, in the order of measuring."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, zip_longest

from ..main import OPERATORS
from ..operator import DTYPES, LAYOUTS, Case, Operator
from ..shapes import SHAPES, Shape
from .device import Device

#: A training step's two halves by themselves, and the whole.
MODES = ("forward", "backward", "forward_backward")
#: The batch of images, where the CPU has 32 or 128.
BATCH = 256
# Small widths and few rows, where the call is what counts: heads of an attention, one token.
_NARROW = {"11e": (65536, 64), "11f": (4096, 256), "11g": (1, 4096), "11h": (32, 128)}

Entry = tuple[Operator, Case]


def _at_gpu_size(shape: Shape) -> Shape:
    first, *rest = shape.size
    if shape.operator == "batch_norm" and len(rest) == 3 and first in (32, 128):
        return replace(shape, size=(BATCH, *rest))
    return shape


#: All of them.
GPU_SHAPES: tuple[Shape, ...] = (
    *(_at_gpu_size(shape) for shape in SHAPES),
    *(Shape(label, "rms_norm", size) for label, size in _NARROW.items()),
)


def plan(
    operators: Iterable[str] | None = None,
    shapes: Sequence[str] | None = None,
    dtypes: Sequence[str] = ("bfloat16", "float32"),
    layouts: Sequence[str] = LAYOUTS,
) -> list[Entry]:
    """What is measured, as in the networks: operators take turns, so a cut spares none of them.

    >>> [(operator.name, case.shape.label) for operator, case in plan(shapes=["12"])[:2]]
    [('batch_norm', '12a'), ('layer_norm', '12b')]

    Raises:
        ValueError: for a name that does not exist.
    """
    labels = {name for shape in GPU_SHAPES for name in (shape.label, str(shape.number))}
    _check("operators", operators, OPERATORS)
    _check("shapes", shapes, labels)
    _check("dtypes", dtypes, DTYPES)
    _check("layouts", layouts, LAYOUTS)
    lists: list[list[Entry]] = []
    for name, operator in OPERATORS.items():
        if operators is not None and name not in operators:
            continue
        chosen = [
            shape
            for shape in GPU_SHAPES
            if shape.operator == name
            and (shapes is None or {shape.label, str(shape.number)} & set(shapes))
        ]
        groups = operator.groups(chosen, dtypes, layouts)
        lists.append([(operator, replace(group[0], threads=0)) for group in groups])
    return [entry for entry in chain(*zip_longest(*lists)) if entry is not None]


def _check(argument: str, given: Iterable[str] | None, allowed: Iterable[str]) -> None:
    if unknown := sorted(set(given or ()) - set(allowed)):
        raise ValueError(
            f"bench.gpu: {argument} must be among {sorted(allowed)}. Got {argument}={unknown}."
        )


def name_of(operator: Operator, case: Case) -> str:
    """As in "batch_norm 1 256×64×112×112 channels_last bfloat16 +relu"."""
    size = "×".join(map(str, case.shape.size))
    fusion = f" {case.shape.fusion}" if case.shape.fusion else ""
    return f"{operator.name} {case.shape.label} {size} {case.layout} {case.dtype}{fusion}"


def least_bytes(operator: Operator, case: Case, cache_bytes: int) -> int:
    """The operator's floor; a backward's is what forward+backward has beyond the forward."""
    if case.mode != "backward":
        return operator.floor_bytes(case, cache_bytes)
    both, forward = (
        operator.floor_bytes(replace(case, mode=mode), cache_bytes)
        for mode in ("forward_backward", "forward")
    )
    return both - forward


def floor_bytes(operator: Operator, case: Case, device: Device) -> int:
    """What must move if only one multiprocessor's memory keeps a tensor between two sweeps.

    The L2 keeps it as well where it holds the whole tensor. In larger ones a channel may fit the
    L2, but all channels are under way at once.
    """
    whole = case.tensor_bytes <= device.l2_bytes
    return least_bytes(operator, case, device.l2_bytes if whole else device.sm_bytes)
