"""`make gpu-compile`, on kernels whose registers and accesses are known."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from tests.device import cpu_only

pytestmark = cpu_only("it compiles for a GPU that need not be there")

ROOT = Path(__file__).resolve().parents[2]

MODULE = '''
import triton
import triton.language as tl


@triton.jit
def _copy_kernel(x_ptr, y_ptr, rows, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


@triton.jit
def _many_live_values_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """All of x stays in registers between its sum and its use: BLOCK / 32 values a thread."""
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, x / tl.sum(x, 0))


@triton.jit
def _wrong_kernel(x_ptr):
    tl.store(x_ptr, no_such_name)


COPY = {"x_ptr": "*fp32", "y_ptr": "*fp32", "rows": "i32", "stride": "i32"}


def compile_cases():
    return [
        ("copy unaligned", _copy_kernel, COPY, {"BLOCK": 512}, 4),
        ("copy aligned", _copy_kernel, COPY, {"BLOCK": 512}, 4, ["stride"]),
        ("copy half", _copy_kernel, {**COPY, "x_ptr": "*bf16", "y_ptr": "*bf16"},
         {"BLOCK": 512}, 2, ["stride"]),
        ("many", _many_live_values_kernel, {"x_ptr": "*fp32", "y_ptr": "*fp32"},
         {"BLOCK": 32 * 512}, 1),
        ("wrong", _wrong_kernel, {"x_ptr": "*fp32"}, {}, 4),
    ]
'''

COLUMNS = ("dtype", "capability", "warps", "registers", "spilled", "stack", "shared", "access")


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    (tmp_path / "planted_kernels.py").write_text(MODULE)
    return tmp_path


def _run(folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Exit status and what was printed, in one process beside the first."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(folder), str(ROOT / "src"), inherited.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, ROOT / "scripts" / "gpu_compile.py", *arguments, "--processes", "1"],
        env={**inherited, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return ended.returncode, ended.stdout


def _table(printed: str) -> dict[tuple[str, int], dict[str, int | str]]:
    """The lines by kernel and compute capability."""
    pattern = r"^(.+?) +(\w+) (\d\d)" + r" +(\d+)" * (len(COLUMNS) - 2) + "$"
    lines = {}
    for name, dtype, *numbers in re.findall(pattern, printed, re.MULTILINE):
        cells = (dtype, *map(int, numbers))
        lines[name, cells[1]] = dict(zip(COLUMNS, cells, strict=True))
    return lines


def test_the_table_has_what_a_kernel_takes(planted: Path) -> None:
    status, printed = _run(planted, "planted_kernels", "--only", "copy")
    assert status == 0, printed
    lines = _table(printed)
    names = ("copy unaligned", "copy aligned", "copy half")
    assert list(lines) == [(name, capability) for name in names for capability in (90, 80)]
    for (name, _), line in lines.items():
        assert 8 <= line["registers"] <= 64
        assert line["spilled"] == line["stack"] == line["shared"] == 0
        assert line["warps"] == (2 if name == "copy half" else 4)
        assert line["dtype"] == ("bf16" if name == "copy half" else "fp32")
        # Only a stride known to be divisible lets a thread take four neighbours at a time.
        assert line["access"] == (4 if name == "copy unaligned" else 16)


def test_a_kernel_that_spills_is_named(planted: Path) -> None:
    arguments = ("planted_kernels", "--only", "many", "--capability", "90", "--spills", "0")
    status, printed = _run(planted, *arguments)
    assert status == 1, printed
    spilled = _table(printed)["many", 90]["spilled"]
    assert spilled
    assert f"many, 90: spills {spilled} bytes, more than 0" in printed
    status, printed = _run(planted, *arguments, "--spills", "100000")
    assert status == 0, printed


def test_a_kernel_that_does_not_compile_is_named(planted: Path) -> None:
    status, printed = _run(planted, "planted_kernels", "--only", "wrong", "--capability", "80")
    assert status == 1, printed
    assert "wrong, 80: CompilationError" in printed
    assert "no_such_name is not defined" in printed


def test_the_package_has_cases(planted: Path) -> None:
    # One of them, compiled: that modules are found by themselves.
    arguments = ("--only", "local response any power", "--capability", "90")
    status, printed = _run(planted, *arguments)
    assert status == 0, printed
    assert ("local response any power", 90) in _table(printed)


def test_nothing_is_compiled_in_the_interpreter(planted: Path) -> None:
    status, printed = _run(planted, "planted_kernels", TRITON_INTERPRET="1")
    assert status == 2
    assert "TRITON_INTERPRET is set" in printed
