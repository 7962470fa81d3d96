"""What the kernels are compiled for ahead of time, by `make gpu-compile` and without a GPU."""

from __future__ import annotations

from typing import Any

#: (name, kernel, signature, constants, warps, integers that are multiples of 16)
Case = tuple[str, Any, dict[str, str], dict[str, Any], int, set[str]]

_STATISTICS = ("stats", "partials", "means", "mean", "var", "count")
_COUNTERS = ("num_batches_tracked", "skipped_updates")
_PARAMETERS = (
    "weight", "bias", "grad_weight", "grad_bias", "running_mean", "running_var",
)  # fmt: skip
_LARGE = ("x", "residual", "grad", "output", "grad_input", "grad_residual")


def pointer_kinds(dtype: str) -> dict[str, str | None]:
    """What the channel kernels' pointers point to, for tensors of `dtype` and without a mask."""
    return {
        **dict.fromkeys(_LARGE, dtype),
        **dict.fromkeys(_PARAMETERS, "*fp64" if dtype == "*fp64" else "*fp32"),
        **dict.fromkeys(_STATISTICS, "*fp64"),
        **dict.fromkeys(_COUNTERS, "*i64"),
        "bits": "*u8",
        "mask": None,
    }


def case(
    name: str,
    kernel: Any,
    pointers: dict[str, str | None],
    constants: dict[str, Any],
    divisible: set[str] | None = None,
) -> Case:
    """A variant of a kernel.

    Args:
        name: for the table.
        kernel: the function.
        pointers: the types of its pointers by their names without `_ptr`; None is an argument that
            is not there.
        constants: the values of its constexprs, and `num_warps`.
        divisible: the integers that are multiples of 16, which a launch sees for itself.
    """
    options = {"num_warps", "enable_fp_fusion"}
    values = {key: value for key, value in constants.items() if key not in options}
    signature: dict[str, str] = {}
    for argument in kernel.arg_names:
        if argument in values:
            continue
        if argument.endswith("_ptr"):
            kind = pointers[argument.removesuffix("_ptr")]
            if kind is None:
                values[argument] = None
            else:
                signature[argument] = kind
        else:
            signature[argument] = "fp32" if argument.startswith("factor") else "i32"
    marks = {name for name in divisible or () if name in signature}
    return name, kernel, signature, values, constants["num_warps"], marks
