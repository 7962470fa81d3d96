"""What `make gpu-compile` compiles of layer norm and RMS norm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .row_backward import row_sums_kernel
from .row_forward import row_norm_forward_kernel, row_norm_forward_long_kernel
from .row_gradient import (
    row_norm_backward_kernel,
    row_norm_backward_long_kernel,
    row_norm_means_kernel,
)
from .row_tiles import Settings, Tile, stages_of, tile_of

Case = tuple[str, Any, dict[str, str], dict[str, Any], int]

_ITEMSIZE = {"fp32": 4, "bf16": 2, "fp64": 8}
_LAYER, _RMS = Settings(1, 2, True, 1e-5), Settings(1, 2, False, 1e-6)
#: (n, inner): short rows, odd ones, those of language models, beyond the registers, and columns.
_SIZES = (
    (3, 1), (128, 1), (1000, 1), (4096, 1), (8192, 1), (16384, 1), (50257, 1), (96, 3136), (768, 49)
)  # fmt: skip
_FEW = ((768, 1), (16384, 1), (96, 3136))
#: Which optional tensors there are, beside the settings; sizes and dtypes.
_CALLS = (
    ("layer norm", _LAYER, "weight bias", _SIZES, "fp32 bf16"),
    ("rms norm+add, llama", _RMS._replace(llama=True), "weight residual", _SIZES, "fp32 bf16"),
    (
        "layer norm+add+gelu, mask",
        _LAYER._replace(act=6),
        "weight bias residual mask",
        _FEW,
        "bf16",
    ),
    ("layer norm", _LAYER, "weight bias", _FEW, "fp64"),
)
_ABSENT = {
    "residual": ("residual_ptr", "sum_ptr", "dsum_ptr"),
    "weight": ("weight_ptr", "dweight_ptr"),
    "bias": ("bias_ptr", "dbias_ptr"),
    "mask": ("kept_ptr",),
}


def compile_cases() -> list[Case]:
    """(name, kernel, signature, constants, warps)."""
    cases = [
        _case(f"{name} {n}x{inner}", kernel, dtype, tile, settings, present.split())
        for name, settings, present, sizes, dtypes in _CALLS
        for n, inner in sizes
        for dtype in dtypes.split()
        for direction in ("forward", "backward")
        for tile in [tile_of(direction, n, inner, _ITEMSIZE[dtype])]
        for kernel in _kernels(direction, tile.whole)
    ]
    sums = {"first_ptr": "*fp32", "first_target_ptr": "*fp32", "second_ptr": "*fp32",
            "second_target_ptr": "*fp32", "parts": "i32", "n": "i32"}  # fmt: skip
    return [*cases, ("sums", row_sums_kernel, sums, {"ROWS": 128, "BLOCK_N": 32}, 8)]


def _kernels(direction: str, whole: bool) -> Iterator[Any]:
    if direction == "forward":
        yield row_norm_forward_kernel if whole else row_norm_forward_long_kernel
    elif whole:
        yield row_norm_backward_kernel
    else:
        yield row_norm_means_kernel
        yield row_norm_backward_long_kernel


def _case(
    name: str, kernel: Any, dtype: str, tile: Tile, settings: Settings, present: list[str]
) -> Case:
    wide = "*fp64" if dtype == "fp64" else "*fp32"
    types = {"stats_ptr": "*fp64", "kept_ptr": "*i1", **dict.fromkeys(
        ("weight_ptr", "bias_ptr", "dweight_ptr", "dbias_ptr", "means_ptr"), wide
    )}  # fmt: skip
    tensors = 3 if "residual" in present else 2
    absent = [p for tensor, names in _ABSENT.items() if tensor not in present for p in names]
    constants = {
        "CENTRED": settings.centred, "EPS": settings.eps, "ACT": settings.act,
        "ACT_PARAM": settings.act_param, "LLAMA": settings.llama, "PLUS_ONE": settings.plus_one,
        **tile.constants, "STAGES": stages_of(tile, _ITEMSIZE[dtype], tensors),
        **dict.fromkeys(absent),
    }  # fmt: skip
    names = kernel.arg_names
    short = kernel.__name__.removeprefix("row_norm_").removesuffix("_kernel")
    return (
        f"{name} {short}",
        kernel,
        {p: types.get(p, f"*{dtype}") if p.endswith("_ptr") else "i32" for p in names},
        {p: value for p, value in constants.items() if p in names},
        tile.warps,
    )
