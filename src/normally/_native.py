"""Pick and load the compiled CPU kernels, once, when the package is imported.

There is one library per instruction set. The choice follows torch's own
(`torch.backends.cpu.get_cpu_capability()`, which `ATEN_CPU_CAPABILITY` overrides), so a machine
on which torch uses AVX2 never meets our AVX-512 code. Without a library the operators run on
`normally.reference`; one warning says so.
"""

from __future__ import annotations

import importlib.util
import os
import warnings

import torch

# From the widest instruction set down: the first that the machine allows and the build has.
_BY_CAPABILITY = {
    "AVX512": ("avx512", "avx2", "default"),
    "AVX2": ("avx2", "default"),
}


def _load() -> str | None:
    if os.environ.get("NORMALLY_DISABLE_NATIVE"):
        return None
    reason = "the compiled kernels were not built"
    capability = torch.backends.cpu.get_cpu_capability()
    for instruction_set in _BY_CAPABILITY.get(capability, ("default",)):
        spec = importlib.util.find_spec(f"normally._C_{instruction_set}")
        if spec is None or spec.origin is None:
            continue
        try:
            torch.ops.load_library(spec.origin)
        except OSError as error:
            reason = f"the compiled kernels could not be loaded ({error})"
            continue
        return instruction_set
    warnings.warn(
        f"normally: {reason}; the layers run on the slow reference implementation instead. "
        "Reinstall with a C++ compiler at hand: pip install --no-build-isolation normally",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


#: The instruction set of the loaded library, or None without one.
loaded: str | None = None


def load() -> str | None:
    """Load the library on the first call; the operators' schemas must exist by then."""
    global loaded
    loaded = _load()
    return loaded


def backends() -> dict[str, str]:
    """What serves each device of this machine: kernels or the reference implementation.

    >>> sorted(backends())[0]
    'cpu'
    """
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    served = {"cpu": f"compiled ({loaded})" if loaded else "reference"}
    if not loaded and has_kernel("normally::batch_norm", "CPU"):
        served["cpu"] = "Triton's interpreter"
    if torch.cuda.is_available():
        served["cuda"] = "Triton" if has_kernel("normally::batch_norm", "CUDA") else "reference"
    return served
