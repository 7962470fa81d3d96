"""The driver: what it runs, in which time, and what it says of tests that did not run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from .gpu_helpers import make_gpu_results
from .helpers import load_script

ROOT = Path(__file__).parents[2]
TESTS = """
import time

import pytest

def test_passes(): pass
def test_fails(): assert False
def test_is_skipped(): pytest.skip("no reason")
@pytest.fixture
def broken():
    yield
    raise RuntimeError
def test_teardown(broken): pass
def test_slow(): time.sleep({seconds})
def test_after_it(): pass
"""


@pytest.fixture(scope="module")
def script():
    return load_script("gpu")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def run_pytest(tmp_path, folder, budget, seconds):
    """With the plugin, in a project of its own."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    (tmp_path / "test_it.py").write_text(TESTS.format(seconds=seconds), encoding="utf-8")
    variables = dict(
        os.environ,
        PYTHONPATH=str(ROOT / "scripts"),
        GPU_TESTS_END=str(time.time() + budget),
        GPU_TESTS_FOLDER=str(folder),
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_time_budget", "test_it.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120
    )
    return done.returncode


def test_results_are_on_file(script, tmp_path, folder):
    status = run_pytest(tmp_path, folder, budget=1000, seconds=0)
    assert len((folder / "collected.txt").read_text("utf-8").splitlines()) == 6
    lines, good = script.report_tests(folder, status)
    assert lines[0] == "tests: 3 passed, 2 failed, 1 skipped, 0 not run for want of time"
    failed = [line for line in lines if line.startswith("FAILED")]
    assert failed == ["FAILED: test_it.py::test_fails", "FAILED: test_it.py::test_teardown"]
    assert not good


def test_what_is_left_when_the_time_is_up_is_named(script, tmp_path, folder):
    status = run_pytest(tmp_path, folder, budget=-1, seconds=0)
    lines, good = script.report_tests(folder, status)
    assert "6 not run for want of time" in lines[0]
    assert "not run: 6 of 6 in test_it.py" in lines
    assert good  # nothing failed; what did not run is said


def write(folder, collected, results):
    (folder / "collected.txt").write_text("\n".join(collected), encoding="utf-8")
    lines = [json.dumps({"id": name, "outcome": outcome}) for name, outcome in results]
    (folder / "results.jsonl").write_text("\n".join(lines), encoding="utf-8")


def test_a_run_that_was_ended_says_what_it_had_done(script, folder):
    write(folder, ["a.py::x", "a.py::y", "b.py::z"], [("a.py::x", "passed")])
    lines, good = script.report_tests(folder, None)
    assert lines[0] == "tests: 1 passed, 0 failed, 0 skipped, 2 not run for want of time"
    assert "not run: 1 of 2 in a.py" in lines
    assert "not run: 1 of 1 in b.py" in lines
    assert "tests: ended from outside, because one of them did not end" in lines
    assert not good


def test_a_run_without_tests_is_no_success(script, folder):
    lines, good = script.report_tests(folder, 4)
    assert any("none were collected" in line for line in lines)
    assert any("status 4" in line for line in lines)
    assert not good


def test_long_lists_end_in_a_count(script, folder):
    names = [f"a.py::test_{i}" for i in range(50)]
    write(folder, names, [(name, "failed") for name in names])
    lines, _ = script.report_tests(folder, 1)
    assert "FAILED: 30 more" in lines


def test_tests_that_are_there_are_asked_for(script, monkeypatch):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: object())
    command = script.pytest_command(16)
    assert command[command.index("-n") + 1] == "8"
    assert command[command.index("not slow") - 1] == "-m"
    assert "tests/functional" in command
    assert all((ROOT / path).exists() for path in command if path.startswith("tests/"))
    assert "-n" not in script.pytest_command(2)
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    assert "-n" not in script.pytest_command(16)


def test_the_sources_are_taken_where_nothing_is_installed(script, monkeypatch, tmp_path):
    monkeypatch.delenv("NORMALLY_DISABLE_NATIVE", raising=False)
    monkeypatch.setenv("PYTHONPATH", "before")
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    variables = script.environment(None, tmp_path)
    assert variables["NORMALLY_DISABLE_NATIVE"] == "1"
    assert variables["PYTHONPATH"].split(os.pathsep) == [
        str(ROOT / "src"), str(ROOT / "scripts"), "before",
    ]  # fmt: skip
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: object())
    variables = script.environment(None, tmp_path)
    assert "NORMALLY_DISABLE_NATIVE" not in variables
    assert variables["PYTHONPATH"].split(os.pathsep) == [str(ROOT / "scripts"), "before"]


def test_a_wheel_is_installed_beside(script, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(script.subprocess, "run", lambda command, **_: calls.append(command))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    variables = script.environment(Path("dist/normally.whl"), tmp_path)
    assert variables["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path / "site")
    assert calls[0][-1] == str(Path("dist/normally.whl").resolve())
    assert {"--no-index", "--no-deps"} <= set(calls[0])


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks the system of Linux")
def test_a_program_that_does_not_end_is_ended_with_its_children(script, tmp_path):
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    log = tmp_path / "log"
    assert script.run([sys.executable, "-c", code], dict(os.environ), log, 5.0) is None
    pid = int(log.read_text("utf-8"))
    for _ in range(100):  # its parent is gone: whoever takes it on collects it at leisure
        if not _runs(pid):
            break
        time.sleep(0.1)
    assert not _runs(pid)
    assert script.run([sys.executable, "-c", "exit(3)"], dict(os.environ), log, 60.0) == 3


def _runs(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def pretend(script, monkeypatch, tmp_path, complete=True, tests_are_good=True):
    """Every program replaced; returns what was run, with its seconds."""
    calls = []

    def run(command, variables, log, seconds):
        calls.append(("bench", list(command), seconds))
        path = Path(command[command.index("--json") + 1])
        results = make_gpu_results(2.0, shapes=["12b"])
        results.complete = complete
        results.write(path)
        (path.parent / "bench.log").write_text("1.00 s  a case", encoding="utf-8")
        (path.parent / "nvidia-test-1-speedup.svg").write_text("<svg/>", encoding="utf-8")
        return 0 if complete else 1

    def run_tests(variables, folder, seconds):
        calls.append(("tests", [], seconds))
        (folder / "tests.log").write_text("ok", encoding="utf-8")
        print("tests: 1 passed")
        return tests_are_good

    def run_program(command, **options):
        calls.append(("program", list(command), None))
        return subprocess.CompletedProcess(command, 0, stdout=b"case  fwd\nthe table\n")

    def start_compilers(variables, folder, seconds, options):
        calls.append(("compilers", list(options), seconds))
        return []

    monkeypatch.setattr(script, "run", run)
    monkeypatch.setattr(script, "run_tests", run_tests)
    monkeypatch.setattr(script.subprocess, "run", run_program)
    monkeypatch.setattr(script, "start_compilers", start_compilers)
    monkeypatch.setattr(script, "PUBLISHED", tmp_path / "published")
    return calls


def test_the_parts_share_eight_minutes_and_the_table_is_last(
    script, monkeypatch, tmp_path, folder, capsys
):
    calls = pretend(script, monkeypatch, tmp_path)
    monkeypatch.setenv("OUT", str(folder))
    assert script.main(["--folder", str(tmp_path / "build")]) == 0
    assert [kind for kind, *_ in calls] == ["program", "compilers", "tests", "bench", "program"]
    (_, _, for_tests), (_, command, for_bench) = calls[2], calls[3]
    assert for_tests == 220
    assert for_bench == pytest.approx(480 - 25, abs=5)  # the tests took no time here
    assert float(command[command.index("--seconds") + 1]) < for_bench
    assert for_tests + 20 + 25 < 480
    text = capsys.readouterr().out
    assert text.endswith("case  fwd\nthe table\n")
    assert text.startswith("tests: 1 passed\nJSON: ")
    assert [path.name for path in (tmp_path / "published").iterdir()] == ["nvidia-test-1.json"]
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "nvidia-test-1.json", "nvidia-test-1-speedup.svg", "tests.log", "bench.log", "table.txt",
    }  # fmt: skip


def test_a_part_or_an_unfinished_run_is_not_published(script, monkeypatch, tmp_path):
    monkeypatch.delenv("OUT", raising=False)
    folder = str(tmp_path / "build")
    pretend(script, monkeypatch, tmp_path)
    assert script.main(["--folder", folder, "--", "--shapes", "12b"]) == 0
    assert not (tmp_path / "published").exists()
    pretend(script, monkeypatch, tmp_path, complete=False)
    assert script.main(["--folder", folder]) == 1
    assert not (tmp_path / "published").exists()


def test_a_failed_test_is_a_failure(script, monkeypatch, tmp_path):
    pretend(script, monkeypatch, tmp_path, tests_are_good=False)
    assert script.main(["--folder", str(tmp_path / "build")]) == 1


def test_tests_can_be_left_out(script, monkeypatch, tmp_path):
    calls = pretend(script, monkeypatch, tmp_path)
    assert script.main(["--folder", str(tmp_path / "build"), "--no-tests"]) == 0
    assert "tests" not in [kind for kind, *_ in calls]


def test_a_benchmark_without_results_says_where_to_look(script, monkeypatch, tmp_path, capsys):
    pretend(script, monkeypatch, tmp_path)
    monkeypatch.setattr(script, "run", lambda *_: 1)
    assert script.main(["--folder", str(tmp_path / "build")]) == 1
    assert "nothing was measured, see" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(script, tmp_path):
    command = [sys.executable, "scripts/gpu.py", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "finds no CUDA GPU" in done.stderr
    assert done.stdout == ""
