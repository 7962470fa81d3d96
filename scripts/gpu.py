"""Tests and benchmarks on this machine's GPU, one table at the end, within eight minutes.

    python scripts/gpu.py [--seconds 480] [--tests-seconds 220] [-- options of the benchmark]

The device and the versions come first, then the tests with CUDA tensors, then the benchmark, and
its table last. While the tests run, other processes compile what the benchmark needs. It takes the
Python that has torch and makes no environment. Where `normally` is not installed it takes src/,
without the kernels of the CPU, or a wheel (`--wheel`).

Everything goes to build/gpu/ and, if `OUT` names a folder, there as well; the results of a whole
run also go to benchmarks/results/gpu/, from where docs/performance.md has them. The exit status is
0, 1 where a test failed or the benchmark did not come to its end, and 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "benchmarks" / "results" / "gpu"
# What is about the GPU alone comes first: time may be up before the end.
TESTS = (
    "tests/gpu",
    "tests/_triton",
    "tests/functional",
    "tests/promises",
    "tests/conformance",
    "tests/nn",
    "tests/_ops",
    "tests/models",
)
_BENCH = [sys.executable, "-m", "normally.bench.gpu"]
_START = 15.0  # seconds in which torch is imported and the device wakes
_LAST = 25.0  # for the figures and the table
_GRACE = 20.0  # in which pytest's own end comes after that of its time
_FEW = 20  # lines of a list


class Clock:
    """Seconds since the start, of a number that there are."""

    def __init__(self, seconds: float) -> None:
        self._start = time.monotonic()
        self._seconds = seconds

    @property
    def left(self) -> float:
        """How many there still are."""
        return self._seconds - (time.monotonic() - self._start)


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--seconds", type=float, default=480.0, help="for everything")
    p.add_argument("--tests-seconds", type=float, default=220.0, help="of these, for the tests")
    p.add_argument("--no-tests", action="store_true")
    p.add_argument("--wheel", type=Path, help="what is tested, in place of src/")
    p.add_argument("--folder", type=Path, default=ROOT / "build" / "gpu", help="for logs and plots")
    p.add_argument("bench", nargs="*", help="options of python -m normally.bench.gpu, after --")
    return p


def environment(wheel: Path | None, folder: Path) -> dict[str, str]:
    """The variables of all that is run: they say which `normally` it is."""
    variables = dict(os.environ, PYTHONUNBUFFERED="1")
    # Several processes compile; each of them with a pool of its own would be too many.
    variables.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    path = [str(ROOT / "scripts")]
    if wheel is not None:
        site = folder / "site"
        shutil.rmtree(site, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
        subprocess.run([*pip, "--target", str(site), str(wheel.resolve())], check=True)
        path.insert(0, str(site))
    elif importlib.util.find_spec("normally") is None:
        path.insert(0, str(ROOT / "src"))
        variables["NORMALLY_DISABLE_NATIVE"] = "1"
    if before := os.environ.get("PYTHONPATH"):
        path.append(before)
    variables["PYTHONPATH"] = os.pathsep.join(path)
    return variables


def pytest_command(cores: int) -> list[str]:
    """In several processes where pytest-xdist is there; a part of the cores compiles meanwhile."""
    command = [sys.executable, "-m", "pytest", "-p", "gpu_time_budget", "-m", "not slow", "-q"]
    command += ["--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    processes = min(8, cores // 2)
    if processes > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(processes)]
    return [*command, *(path for path in TESTS if (ROOT / path).exists())]


def run_tests(variables: dict[str, str], folder: Path, seconds: float) -> bool:
    """Until the time is up; prints what came of them. Whether nothing failed."""
    for name in ("collected.txt", "results.jsonl"):
        (folder / name).unlink(missing_ok=True)
    variables = dict(
        variables,
        NORMALLY_TEST_DEVICE="cuda",
        GPU_TESTS_FOLDER=str(folder),
        GPU_TESTS_END=str(time.time() + seconds),
    )
    command = pytest_command(os.cpu_count() or 1)
    status = run(command, variables, folder / "tests.log", seconds + _GRACE)
    lines, good = report_tests(folder, status)
    print(*lines, sep="\n", flush=True)
    return good


def report_tests(folder: Path, status: int | None) -> tuple[list[str], bool]:
    """What is said of the tests, and whether they are good: what did not run is named."""
    collected = _lines(folder / "collected.txt")
    entries = [json.loads(line) for line in _lines(folder / "results.jsonl")]
    outcomes: dict[str, str] = {}
    for entry in entries:
        if outcomes.get(entry["id"]) != "failed":  # a teardown's comes after its call's
            outcomes[entry["id"]] = entry["outcome"]
    counts = Counter(outcomes.values())
    missing = [name for name in collected if outcomes.get(name, "not run") == "not run"]
    failed = [name for name, outcome in outcomes.items() if outcome == "failed"]
    lines = [
        f"tests: {counts['passed']} passed, {len(failed)} failed, {counts['skipped']} skipped, "
        f"{len(missing)} not run for want of time"
    ]
    lines += [f"tests: there is no {path}" for path in TESTS if not (ROOT / path).exists()]
    lines += _short("FAILED", failed)
    of_file = Counter(name.partition("::")[0] for name in collected)
    for path, count in Counter(name.partition("::")[0] for name in missing).items():
        lines.append(f"not run: {count} of {of_file[path]} in {path}")
    if status is None:
        lines.append("tests: ended from outside, because one of them did not end")
    elif status > 1:
        lines.append(f"tests: pytest ended with status {status}, see {folder / 'tests.log'}")
    if not collected:
        lines.append(f"tests: none were collected, see {folder / 'tests.log'}")
    return lines, bool(collected) and not failed and status == 0


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _short(what: str, names: Sequence[str]) -> list[str]:
    lines = [f"{what}: {name}" for name in names[:_FEW]]
    return lines + ([f"{what}: {len(names) - _FEW} more"] if len(names) > _FEW else [])


def run(command: Sequence[str], variables: dict[str, str], log: Path, seconds: float) -> int | None:
    """The exit status of a program that writes to a log; None if it had to be ended."""
    process = start(command, variables, log)
    try:
        return process.wait(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return None
    finally:
        end(process)


def start(command: Sequence[str], variables: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """A program with a process group of its own, so that its children end with it."""
    with log.open("wb") as file:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=variables,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """One that we started, if it still runs, with its children."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)
    # A worker may outlive its parent: it waits for a kernel.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def start_compilers(
    variables: dict[str, str], folder: Path, seconds: float, options: Sequence[str]
) -> list[subprocess.Popen[bytes]]:
    """Processes that fill the compilers' caches on disk while the tests run."""
    count = min(6, max(1, (os.cpu_count() or 1) // 3))
    return [
        start(
            [*_BENCH, *options, "--warm", f"{part}/{count}", "--seconds", f"{seconds:.0f}"],
            variables,
            folder / f"compile-{part}.log",
        )
        for part in range(count)
    ]


def finish_compilers(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    """Wait for them until the time is up: the benchmark needs the device for itself."""
    clock = Clock(seconds)
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(0.1, clock.left))
        end(process)


def publish(folder: Path, json_path: Path, whole: bool) -> list[str]:
    """Copy what a reader wants to where it is looked for; returns what is said of it."""
    lines = []
    found = [folder / name for name in ("tests.log", "bench.log", "table.txt")]
    found = [*sorted(folder.glob("*.svg")), *(path for path in found if path.exists())]
    if json_path.exists():
        data = json.loads(json_path.read_text(encoding="utf-8"))
        named = folder / f"{data['machine']['gpu']['slug']}.json"
        os.replace(json_path, named)
        found.insert(0, named)
        if whole and data["complete"]:
            PUBLISHED.mkdir(parents=True, exist_ok=True)
            shutil.copy(named, PUBLISHED)
            lines.append(f"JSON: {PUBLISHED / named.name}")
    if out := os.environ.get("OUT"):
        for path in found:
            shutil.copy(path, out)
        lines.append(f"copied to {out}: {', '.join(path.name for path in found)}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Everything, in its order."""
    given = parser().parse_args(argv)
    clock = Clock(given.seconds)
    folder: Path = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    variables = environment(given.wheel, folder)
    described = subprocess.run([*_BENCH, *given.bench, "--describe"], cwd=ROOT, env=variables)
    if described.returncode:
        return described.returncode
    for_tests = 0.0 if given.no_tests else min(given.tests_seconds, clock.left - 2 * _LAST)
    seconds = max(for_tests, min(60.0, clock.left / 6))
    compilers = start_compilers(variables, folder, seconds, given.bench)
    to_compile = Clock(seconds)
    try:
        good = given.no_tests or run_tests(variables, folder, for_tests)
    except BaseException:
        finish_compilers(compilers, 0.0)
        raise
    finish_compilers(compilers, to_compile.left)
    json_path = folder / "results.json"
    json_path.unlink(missing_ok=True)
    for path in folder.glob("*.svg"):
        path.unlink()
    left = clock.left - _LAST
    options = ["--json", str(json_path), "--seconds", f"{max(1.0, left - _START):.0f}"]
    status = run([*_BENCH, *given.bench, *options], variables, folder / "bench.log", left)
    if not json_path.exists():
        print(f"benchmark: nothing was measured, see {folder / 'bench.log'}", file=sys.stderr)
        print(*_lines(folder / "bench.log")[-_FEW:], sep="\n", file=sys.stderr)
        return 1
    show = [*_BENCH, "--show", str(json_path), "--plots", str(folder)]
    # The table comes last, so what is done with the files is said before it.
    drawn = subprocess.run(show, cwd=ROOT, env=variables, stdout=subprocess.PIPE)
    (folder / "table.txt").write_bytes(drawn.stdout)
    print(*publish(folder, json_path, whole=not given.bench), sep="\n", flush=True)
    sys.stdout.write(drawn.stdout.decode("utf-8"))
    sys.stdout.flush()
    return 0 if good and status == 0 and drawn.returncode == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
