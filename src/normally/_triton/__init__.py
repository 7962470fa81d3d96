"""GPU kernels in Triton, imported at the first call with a CUDA tensor.

A file is named after its operator and has `forward` and `backward` (or the operator's own name).
Each is called with the operator's outputs, allocated by its shape function, and then with its
arguments, and fills the outputs. An output that was not asked for is empty.

Without a GPU the same kernels run on CPU tensors in Triton's interpreter, for tests: where
`TRITON_INTERPRET=1` and `NORMALLY_DISABLE_NATIVE=1` are both set.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: The type of the tensors that the kernels serve; None where there is no Triton.
device_type: str | None = None
if importlib.util.find_spec("triton") is not None:
    device_type = "cuda"
    if os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("NORMALLY_DISABLE_NATIVE"):
        device_type = "cpu"


def implement(path: str, allocate: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation of an operator by the function at `path`, "file.function".

    Args:
        path: imported at the first call, and Triton with it.
        allocate: gives the outputs from the operator's arguments.
    """
    module, _, function = path.partition(".")
    launch: Callable[..., None] | None = None

    def run(*arguments: Any) -> Any:
        nonlocal launch
        if launch is None:
            launch = getattr(importlib.import_module(f"{__name__}.{module}"), function)
        outputs = allocate(*arguments)
        results = () if outputs is None else (outputs,) if isinstance(outputs, Tensor) else outputs
        device = next(a.device for a in arguments if isinstance(a, Tensor))
        # Triton launches on the current device.
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                launch(*results, *arguments)
        else:
            launch(*results, *arguments)
        return outputs

    return run
