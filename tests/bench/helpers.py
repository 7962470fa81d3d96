"""A run that takes no time to speak of, and results that were never measured."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from normally.bench.accuracy import make_inputs
from normally.bench.measure import Budget, Spread, make_step
from normally.bench.operator import Case, Operator
from normally.bench.results import CopySpeed, Record, Results, Timing
from normally.bench.shapes import Shape, select

TINY = Budget(
    "tiny",
    rounds=1,
    settle=0.0,
    seconds=0.0,
    fewest_rounds=2,
    sample=0.0,
    error_elements=4096,
    copy_rounds=1,
    copy_piece=1 << 20,
)

OPTIONS: dict[str, Any] = {
    "operators": ["batch_norm"],
    "shapes": None,
    "dtypes": ["float32"],
    "layouts": ["contiguous"],
    "threads": [1],
    "budget": "tiny",
    "compile": False,
    "also": [],
}
MACHINE: dict[str, Any] = {
    "cpu": "a processor",
    "cores": 2,
    "threads": 2,
    "load": 0.1,
    "caches": {"L1": 32 << 10, "L2": 1 << 20},
    "instruction_set": "AVX2",
    "transparent_huge_pages": "madvise",
    "torch_huge_pages": False,
    "system": "a system",
    "python": "3.10.0",
    "torch": "2.10.0",
    "normally": "0.1.0",
    "backends": {"cpu": "compiled (avx2)"},
}


def make_record(case: Case, ratio: float, floor_bytes: int, over_floor: float = 1.5) -> Record:
    """A case that took `over_floor` times its floor at 1 GB/s, torch `ratio` times as long."""
    seconds = over_floor * floor_bytes / 1e9
    error: dict[str, float | None] = {"1": 1e-7, "1e+03": 2e-7, "1e+05": None}
    return Record(
        operator=case.shape.operator,
        label=case.shape.label,
        size=case.shape.size,
        layout=case.layout,
        dtype=case.dtype,
        act=case.act,
        residual=case.has_residual,
        fused=case.fused,
        mode=case.mode,
        threads=case.threads,
        tensor_bytes=case.tensor_bytes,
        floor_bytes=floor_bytes,
        rounds=3,
        timings={
            "normally": Timing(Spread(seconds, seconds * 0.9, seconds * 1.1), error, 100, 200),
            "torch": Timing(Spread(seconds * ratio, seconds, seconds * 2), error),
        },
        speedup={"torch": Spread(ratio, ratio * 0.9, ratio * 1.1)},
    )


def make_results(records: list[Record]) -> Results:
    """A complete run with one thread at 1 GB/s."""
    copy = [CopySpeed(dtype, 1, Spread(1e9, 9e8, 1.1e9)) for dtype in ("float32", "bfloat16")]
    return Results(MACHINE, OPTIONS, "2026-11-21T00:00:00+00:00", True, copy, records)


def check_same_function(operator: Operator, shape: Shape, tolerance: float) -> None:
    """Ours, theirs and the exact result agree in every variant, and a training step runs.

    Inputs have mean 3 and standard deviation 1.
    """
    for group in operator.groups([shape], ["float32", "bfloat16"], ["contiguous", "channels_last"]):
        for case in group:
            inputs = make_inputs(case, torch.Generator().manual_seed(1), mean=3.0)
            # Outputs are below 4, where bfloat16 has steps of 2⁻⁶ at most; two roundings.
            atol = tolerance if case.dtype == "float32" else 2**-6
            gradients = []
            for build in (operator.ours, operator.theirs):
                module = build(case)
                exact = as_tuple(operator.exact(module, inputs))
                outputs = as_tuple(module(*inputs))
                assert len(outputs) == len(exact) == operator.outputs
                for output, right in zip(outputs, exact, strict=True):
                    assert output.dtype is case.torch_dtype
                    assert right.dtype is torch.float64
                    torch.testing.assert_close(
                        output.detach().double(), right.detach(), rtol=2**-8, atol=atol,
                        msg=lambda text, build=build, case=case: f"{build} {case}: {text}",
                    )  # fmt: skip
                leaves = [x.clone().requires_grad_() for x in inputs]
                grads = [torch.randn(shape.size, generator=_seeded(2)).to(x.dtype) for x in exact]
                grads = [grad.to(case.torch_dtype) for grad in grads]
                gradients.append(make_step(module, leaves, "forward_backward", grads)())
            for ours, theirs in zip(*gradients, strict=True):
                # Of bfloat16: sums over hundreds of terms that were rounded to 8 bits each.
                scale = 1e-4 if case.dtype == "float32" else 0.25
                torch.testing.assert_close(ours, theirs, rtol=scale, atol=scale)


def as_tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    """One output or several, as several."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def floors(operator: Operator, label: str, dtype: str, cache_bytes: int) -> dict[str, float]:
    """By mode, the floor of a shape in tensors of its size."""
    (shape,) = select(operator.name, [label])
    found = {}
    for mode in ("forward", "forward_backward", "evaluation"):
        case = Case(shape, "contiguous", dtype, True, mode)
        found[mode] = operator.floor_bytes(case, cache_bytes) / case.tensor_bytes
    return found


def load_script(name: str) -> ModuleType:
    """A file of scripts/, which is no package, as a module."""
    path = Path(__file__).parents[2] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def published() -> list[Path]:
    """The runs that are in the repository."""
    return sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*.json"))


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
