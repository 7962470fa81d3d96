"""One table of the norms: what the promises are asked of.

Each norm is a function of input, weight and bias here, whatever the rest of its signature, beside
its float64 formula and torch's function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from normally import reference
from tests.device import functional
from tests.helpers import layouts_of

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Norm:
    """What a norm computes, and which values it normalizes together."""

    name: str
    operator: str
    #: (input, weight, bias, **options) -> output
    ours: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    #: How many groups of values an input of this shape has, once the dimensions are moved.
    groups: Callable[[Shape], int]
    shapes: tuple[Shape, ...]
    moved: tuple[int, int] = (0, 0)
    num_dims: int | None = None  # of the parameters, at the end; None is one a channel
    channel_dim: int = 1
    has_weight: bool = True
    has_bias: bool = True
    has_act: bool = True
    #: (input, residual, weight, bias, **options) -> (output, input + residual)
    adds: Callable[..., tuple[Tensor, Tensor]] | None = None

    def __str__(self) -> str:
        return self.name

    def rows(self, x: Tensor) -> Tensor:
        """The values that are normalized together as rows: (groups, values)."""
        return x.movedim(*self.moved).reshape(self.groups(tuple(x.shape)), -1)

    def from_rows(self, rows: Tensor, shape: Shape) -> Tensor:
        """The input of this shape that has these rows."""
        moved = torch.empty(shape, device="meta").movedim(*self.moved).shape
        return rows.reshape(moved).movedim(*reversed(self.moved)).contiguous()

    def parameter_shape(self, shape: Shape) -> Shape:
        return (shape[1],) if self.num_dims is None else shape[-self.num_dims :]

    def parameters(
        self, shape: Shape, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias of both signs, or None where the norm has none; float32 for halves."""
        size = self.parameter_shape(shape)
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        count = math.prod(size)
        weight = torch.linspace(-1.5, 2, count, dtype=wide).reshape(size)
        bias = torch.linspace(1, -1, count, dtype=wide).reshape(size)
        return weight if self.has_weight else None, bias if self.has_bias else None

    def mask(self, shape: Shape, *, whole_rows: bool = False) -> Tensor:
        """Two thirds kept at random, the very first among them and the very last not.

        With `whole_rows` it does not vary within normalized_shape of several dimensions, where
        masks that do are left to the formula.
        """
        size = list(shape)
        size[self.channel_dim] = 1
        if whole_rows and self.num_dims is not None:
            size[-self.num_dims :] = [1] * self.num_dims
        kept = torch.rand(size, generator=torch.Generator().manual_seed(3)) < 2 / 3
        kept.view(-1)[-1] = False
        kept.view(-1)[0] = True
        return kept


def _layer(num_dims: int, dim: int | None, shapes: tuple[Shape, ...]) -> Norm:
    def normalized(x: Tensor) -> Shape:
        return tuple(x.shape[-num_dims:] if dim is None else x.shape[dim : dim + 1])

    def theirs(x: Tensor, weight: Any, bias: Any, eps: float = 1e-5) -> Tensor:
        if dim is None:
            return F.layer_norm(x, normalized(x), weight, bias, eps)
        y = F.layer_norm(x.movedim(dim, -1), normalized(x), weight, bias, eps)
        return y.movedim(-1, dim)

    name = "layer_norm" + ("" if num_dims == 1 else f" of {num_dims} dims")
    return Norm(
        name if dim is None else f"layer_norm dim={dim}",
        "layer_norm",
        lambda x, w, b, **o: functional.layer_norm(x, normalized(x), w, b, dim=dim, **o),
        lambda x, w=None, b=None, **o: reference.layer_norm(x, normalized(x), w, b, dim=dim, **o),
        theirs,
        lambda shape: math.prod(shape[:-num_dims] if dim is None else shape[:1] + shape[2:]),
        shapes,
        moved=(0, 0) if dim is None else (dim, -1),
        num_dims=num_dims if dim is None else None,
        channel_dim=-1 if dim is None else dim,
        adds=lambda x, r, w, b, **o: functional.add_layer_norm(
            x, r, normalized(x), w, b, dim=dim, **o
        ),
    )  # fmt: skip


def _rms(num_dims: int, casting: str, zero_centered: bool, shapes: tuple[Shape, ...]) -> Norm:
    options: dict[str, Any] = {"casting": casting, "zero_centered_weight": zero_centered}

    def normalized(x: Tensor) -> Shape:
        return tuple(x.shape[-num_dims:])

    # One eps for all dtypes: None would be float64's own in the formula.
    def ours(x: Tensor, w: Any, b: None, eps: float = 1e-6, **o: Any) -> Tensor:
        return functional.rms_norm(x, normalized(x), w, eps, **options, **o)

    def formula(x: Tensor, w: Any = None, b: None = None, eps: float = 1e-6, **o: Any) -> Tensor:
        return reference.rms_norm(x, normalized(x), w, eps, **options, **o)

    def theirs(x: Tensor, weight: Any, bias: None, eps: float = 1e-6) -> Tensor:
        if weight is not None and zero_centered:
            weight = 1 + weight
        return F.rms_norm(x, normalized(x), weight, eps)

    def adds(
        x: Tensor, r: Tensor, w: Any, b: None, eps: float = 1e-6, **o: Any
    ) -> tuple[Tensor, Tensor]:
        return functional.add_rms_norm(x, r, normalized(x), w, eps, **options, **o)

    words = ["rms_norm", f"of {num_dims} dims" if num_dims > 1 else "", casting]
    return Norm(
        " ".join(word for word in (*words, "zero-centred" if zero_centered else "") if word),
        "rms_norm",
        ours,
        formula,
        theirs,
        lambda shape: math.prod(shape[:-num_dims]),
        shapes, num_dims=num_dims, channel_dim=-1, has_bias=False, has_act=False, adds=adds,
    )  # fmt: skip


def _group(num_groups: int, shapes: tuple[Shape, ...]) -> Norm:
    return Norm(
        f"group_norm of {num_groups}",
        "group_norm",
        lambda x, w, b, **o: functional.group_norm(x, num_groups, w, b, **o),
        lambda x, w=None, b=None, **o: reference.group_norm(x, num_groups, w, b, **o),
        lambda x, w, b, eps=1e-5: F.group_norm(x, num_groups, w, b, eps),
        lambda shape: shape[0] * num_groups,
        shapes,
    )


LAYER = _layer(1, None, ((7, 33), (64, 130), (3, 5, 257), (1, 4099), (2, 3, 4, 64), (40, 1)))
LAYER_2 = _layer(2, None, ((5, 7, 19), (3, 2, 65, 9), (2, 3, 31, 133)))
LAYER_3 = _layer(3, None, ((5, 3, 7, 9), (2, 4, 5, 3, 11)))
LAYER_FIRST = _layer(1, 1, ((8, 33, 7, 5), (4, 130, 49), (2, 257, 3, 2, 5), (1, 4099, 3), (9, 64)))
RMS = _rms(1, "torch", False, LAYER.shapes)
RMS_2 = _rms(2, "torch", False, LAYER_2.shapes)
RMS_LLAMA = _rms(1, "llama", False, ((7, 33), (3, 5, 257), (2, 4099)))
RMS_GEMMA = _rms(1, "gemma", True, ((7, 33), (3, 5, 257), (2, 4099)))
GROUP = _group(4, ((3, 8, 49), (2, 64, 7, 7), (5, 12, 17), (2, 8, 3, 5, 7), (3, 132)))
GROUP_1 = _group(1, ((3, 7, 31), (2, 33, 9, 11), (2, 3, 5, 7, 6), (5, 130)))
INSTANCE = Norm(
    "instance_norm",
    "group_norm",
    lambda x, w, b, **o: functional.instance_norm(x, None, None, w, b, **o),
    lambda x, w=None, b=None, **o: reference.group_norm(x, x.shape[1], w, b, **o),
    lambda x, w, b, eps=1e-5: F.instance_norm(x, None, None, w, b, eps=eps),
    lambda shape: shape[0] * shape[1],
    ((3, 5, 33), (2, 17, 7, 7), (2, 3, 4, 5, 6), (1, 2, 4099), (2, 33, 9, 31)),
)
RESPONSE = Norm(
    "local_response_norm",
    "local_response_norm",
    lambda x, w, b, **o: functional.local_response_norm(x, 5, 0.3, 0.75, 1.5, **o),
    lambda x, w=None, b=None, mask=None: reference.local_response_norm(
        reference.hide(x, mask), 5, 0.3, 0.75, 1.5
    ),
    lambda x, w, b: F.local_response_norm(x, 5, 0.3, 0.75, 1.5),
    lambda shape: 1,
    ((3, 9, 7), (2, 33, 5, 5), (2, 4, 3, 5, 2), (1, 130, 17)),
    has_weight=False,
    has_bias=False,
    has_act=False,
)


def _running(x: Tensor) -> tuple[Tensor, Tensor]:
    """Some mean and variance a channel, float32 for half inputs."""
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    mean = torch.linspace(-1, 1, x.shape[1], dtype=wide)
    return mean, mean.exp()


def _frozen_formula(x: Tensor, w: Any = None, b: Any = None, **o: Any) -> Tensor:
    return reference.batch_norm(x, *_running(x), w, b, **o)


_BATCHES = ((40, 5), (9, 7, 33), (3, 17, 7, 7), (2, 3, 4, 5, 6))
BATCH = Norm(
    "batch_norm",
    "batch_norm",
    lambda x, w, b, **o: functional.batch_norm(x, None, None, w, b, True, **o),
    lambda x, w=None, b=None, **o: reference.batch_norm(x, None, None, w, b, **o),
    lambda x, w, b, eps=1e-5: F.batch_norm(x, None, None, w, b, True, eps=eps),
    lambda shape: shape[1],
    _BATCHES,
    moved=(1, 0),
)
FROZEN = Norm(
    "frozen_batch_norm",
    "batch_norm",
    lambda x, w, b, **o: functional.frozen_batch_norm(x, *_running(x), w, b, **o),
    _frozen_formula,
    lambda x, w, b, eps=1e-5: F.batch_norm(x, *_running(x), w, b, eps=eps),
    lambda shape: shape[1],
    _BATCHES,
    moved=(1, 0),
    has_act=False,
)
#: Instance norm in evaluation is batch norm in evaluation.
EVALUATION = Norm(
    "instance_norm in evaluation",
    "batch_norm",
    lambda x, w, b, **o: functional.instance_norm(
        x, *_running(x), w, b, use_input_stats=False, **o
    ),
    _frozen_formula,
    FROZEN.theirs,
    lambda shape: shape[1],
    _BATCHES,
    moved=(1, 0),
)

#: Without running statistics.
ALL = (
    LAYER, LAYER_2, LAYER_3, LAYER_FIRST, RMS, RMS_2, RMS_LLAMA, RMS_GEMMA, GROUP, GROUP_1,
    INSTANCE, RESPONSE,
)  # fmt: skip
#: Those that subtract a mean of their own.
CENTRED = (LAYER, LAYER_2, LAYER_3, LAYER_FIRST, GROUP, GROUP_1, INSTANCE)
WITH_RESIDUAL = tuple(norm for norm in ALL if norm.adds is not None)


def cases(norms: tuple[Norm, ...]) -> list[Any]:
    """Every norm with each of its shapes, for pytest.mark.parametrize("norm, shape", …)."""
    return [
        pytest.param(norm, shape, id=f"{norm}-{'x'.join(map(str, shape))}")
        for norm in norms
        for shape in norm.shapes
    ]


def dense_and_not(ndim: int) -> list[str]:
    """Every layout that keeps the values of a tensor."""
    return [name for name in layouts_of(ndim) if not name.startswith("expanded")]
