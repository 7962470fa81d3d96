"""What the tests of layer norm's and RMS norm's kernels share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from normally import _triton

#: Of numpy, in the interpreter: what is beyond float32 is not used, or has no other result.
QUIET = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def exact_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts float32 off to bfloat16 and errs in subnormal numbers; hardware rounds.

    By torch it is quicker, too.
    """
    if _triton.device_type != "cpu":
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
        kinds = source.dtype.scalar, dtype.scalar
        if kinds == (tl.bfloat16, tl.float32):
            data = (source.data.astype(np.uint32) << 16).view(np.float32)
        elif kinds == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            data = rounded.view(torch.int16).numpy().view(np.uint16)
        else:
            return cast(self, source, dtype)
        return interpreter.TensorHandle(data, dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast_impl)
