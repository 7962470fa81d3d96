"""Compile every GPU kernel on a machine without a GPU, and fail where one spills registers.

    python scripts/gpu_compile.py [MODULE ...] [--only TEXT] [--capability 90 80] [--spills 64]

A module of `normally._triton` with kernels has `compile_cases()`, a list of

    (name, kernel, signature, constants, warps[, divisible])

`signature` gives the types of the arguments, `constants` the values of the others, among them the
arguments that are None. All pointers are divisible by 16, as those of torch's allocations are;
`divisible` names the integers that are. The table has a line for every case and compute capability:
registers, spilled bytes and stack of a thread, shared memory of a program, and the bytes of its
widest access to global memory. Exit status 1: a kernel does not compile, or spills more than the
limit. 2: nothing could be compiled here.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import multiprocessing
import os
import pkgutil
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

PACKAGE = "normally._triton"
_NOTHING_COMPILED = 2


class Job(NamedTuple):
    """A case and what to compile it for; a kernel itself does not pass between processes."""

    module: str
    number: int
    name: str
    capability: int


class Line(NamedTuple):
    """A line of the table, or the error in its place."""

    dtype: str = ""
    warps: int = 0
    registers: int = 0
    spilled: int = 0
    stack: int = 0
    shared: int = 0
    access: int = 0
    error: str = ""


def with_kernels(package: str) -> list[str]:
    """The package's modules that have `compile_cases`."""
    path = importlib.import_module(package).__path__
    names = [f"{package}.{module.name}" for module in pkgutil.iter_modules(path)]
    return [name for name in names if hasattr(importlib.import_module(name), "compile_cases")]


def compile_job(job: Job) -> Line:
    """Compile a case here."""
    import triton
    from triton.backends.compiler import GPUTarget

    case = importlib.import_module(job.module).compile_cases()[job.number]
    _, kernel, given, constants, warps, *marks = case
    signature = {
        name: "constexpr" if name in constants else given[name] for name in kernel.arg_names
    }
    divisible = set(*marks) | {name for name, kind in signature.items() if kind.startswith("*")}
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in divisible
    }
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    # Said aloud: from 3.9 on Triton warns where it is left to the default.
    options = {"num_warps": warps, "enable_fp_fusion": True}
    triton.knobs.nvidia.dump_ptxas_log = True
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(
                source, target=GPUTarget("cuda", job.capability, 32), options=options
            )
    except Exception as error:  # of Triton, its passes and ptxas: whatever stops it is the answer
        return Line(error=explained(error))
    types = [kind for name, kind in given.items() if kind.startswith("*") and name not in constants]
    return Line(
        signature.get("x_ptr", types[0] if types else "").lstrip("*"),
        warps,
        max(numbers(r"Used (\d+) registers", log)),
        sum(numbers(r"(\d+) bytes spill (?:stores|loads)", log)),
        max(numbers(r"(\d+) bytes stack frame", log)),
        compiled.metadata.shared,
        widest_access(compiled.asm["ptx"]),
    )


def explained(error: BaseException) -> str:
    """What went wrong in the innermost function, with the end of its source."""
    while error.__cause__ is not None:
        error = error.__cause__
    return "\n".join([f"{type(error).__name__}:", *str(error).splitlines()[-6:]])


def numbers(pattern: str, log: io.StringIO) -> list[int]:
    """All that the pattern finds; it is an error if there is none."""
    found = re.findall(pattern, log.getvalue())
    if not found:
        raise RuntimeError(f"ptxas does not say {pattern!r}: {log.getvalue()!r}")
    return [int(number) for number in found]


def widest_access(ptx: str) -> int:
    """Bytes of the widest load or store of global memory by one thread."""
    accesses = re.findall(r"\b(?:ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
    return max((int(width or 1) * int(bits) // 8 for width, bits in accesses), default=0)


def lines_of(jobs: list[Job], processes: int) -> Iterator[tuple[Job, Line]]:
    """Every job's line, in their order."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn) as pool:
        for job, future in [(job, pool.submit(compile_job, job)) for job in jobs]:
            try:
                line = future.result()
            except BrokenProcessPool:
                # A compiler's crash ends all that were under way: by itself it shows whose it was.
                line = alone(job)
            yield job, line


def alone(job: Job) -> Line:
    """The line of a job in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(compile_job, job).result()
        except BrokenProcessPool:
            return Line(error="the compiler crashed")


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("modules", nargs="*", help=f"all of {PACKAGE} by default")
    p.add_argument("--only", default="", help="cases that have this in their name")
    p.add_argument("--capability", type=int, nargs="+", default=[90, 80])
    # The assembler itself gives up some bytes where that lets more warps run: not worth a failure.
    p.add_argument("--spills", type=int, default=64, help="bytes allowed, 64 by default")
    p.add_argument("--processes", type=int, default=os.cpu_count())
    return p


def main() -> int:
    """Compile, print the table, say what failed."""
    options = parser().parse_args()
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y"):
        print("gpu_compile: TRITON_INTERPRET is set, so no kernel would be compiled. Unset it.")
        return _NOTHING_COMPILED
    if importlib.util.find_spec("triton") is None:
        print("gpu_compile: Triton is not installed. Install it: pip install triton.")
        return _NOTHING_COMPILED
    start = time.monotonic()
    jobs = [
        Job(module, number, case[0], capability)
        for module in options.modules or with_kernels(PACKAGE)
        for number, case in enumerate(importlib.import_module(module).compile_cases())
        if options.only in case[0]
        for capability in options.capability
    ]
    if not jobs:
        print(f"gpu_compile: no case has {options.only!r} in its name.")
        return _NOTHING_COMPILED
    width = max(len(job.name) for job in jobs)
    print(f"{'kernel':{width}} dtype cc warps registers spilled stack shared access")
    bad = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # what is read from a cache is not compiled
        for job, line in lines_of(jobs, options.processes):
            head = f"{job.name:{width}} {line.dtype:>5} {job.capability}"
            if line.error:
                print(f"{head} failed", flush=True)
                bad.append(f"{job.name}, {job.capability}: {line.error}")
                continue
            print(
                f"{head} {line.warps:5} {line.registers:9} {line.spilled:7} {line.stack:5} "
                f"{line.shared:6} {line.access:6}",
                flush=True,
            )
            if line.spilled > options.spills:
                bad.append(
                    f"{job.name}, {job.capability}: spills {line.spilled} bytes, "
                    f"more than {options.spills}"
                )
    print(f"{len(jobs)} compiled in {time.monotonic() - start:.0f} s, {len(bad)} of them badly")
    for text in bad:
        print(f"gpu_compile: {text}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
