"""Runs in other processes, and on a Ray cluster of this machine."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from normally.lab import find, run
from normally.lab.engine import run_all
from normally.lab.plan import plan
from normally.lab.progress import Progress
from normally.lab.workers import Cell, on_ray, perform, serial

from . import toy


class Log(Progress):
    def __init__(self):
        self.started, self.epochs, self.finished = [], [], []

    def run(self, index, label):
        self.started.append(label)

    def epoch(self, index, done, total):
        self.epochs.append((done, total))

    def finish(self, index, label):
        self.finished.append(label)


BUDGET = {"seeds": 1, "epochs": 1, "batch_size": 256}


def where(run):
    run.advance(1, 1)
    return {"process": os.getpid(), "variant": run.variant}


def cells(measure, count, **options):
    return [Cell(measure, str(i), 0, "digits", {}, **options) for i in range(count)]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Two experiments in two processes, once for several tests: a process takes seconds to start.

    The first trains; the second says where it ran, and its "b" measures time.
    """
    trains, says = replace(find("bias"), budgets={"quick": BUDGET}), toy.make()
    trains.measures(find("bias").measure)
    says.measures(where)
    says.alone = ("b",)
    out = tmp_path_factory.mktemp("runs")
    log = Log()
    plans = [plan(trains, out=out), plan(says, out=out)]
    found = dict(zip(["trains", "says"], run_all(plans, jobs=2, progress=log), strict=True))
    return {name: results for name, (_, results) in found.items()} | {"log": log}


def test_processes_give_the_same_numbers_as_this_one(together, tmp_path, monkeypatch):
    experiment = find("bias")
    monkeypatch.setitem(experiment.budgets, "quick", BUDGET)
    assert run(experiment, out=tmp_path).records == together["trains"].records


def test_runs_are_spread_over_processes_of_their_own(together):
    used = set(together["says"].get("a", "process"))
    assert os.getpid() not in used
    assert 1 <= len(used) <= 2


def test_what_measures_time_runs_here_after_all_others(together):
    assert set(together["says"].get("b", "process")) == {os.getpid()}
    assert [label.partition(",")[0] for label in together["log"].finished[-3:]] == ["toy: b"] * 3


def test_the_progress_of_every_run_is_heard(together):
    log = together["log"]
    assert sorted(log.started) == sorted(log.finished)
    assert len(log.started) == 8
    assert log.epochs.count((1, 1)) == 8


def test_a_failed_run_is_an_outcome():
    outcome = perform(cells(lambda run: 1 / 0, 1)[0])
    assert outcome.record is None
    assert "ZeroDivisionError" in outcome.error


def test_a_worker_that_is_killed_is_reported_and_finished_runs_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_DIES", "b1")
    with pytest.raises(RuntimeError, match="was killed; was there too little memory"):
        run(toy.make(), out=tmp_path, jobs=2)
    monkeypatch.delenv("TOY_DIES")
    assert len(run(toy.make(), out=tmp_path).records) == 6


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_process_that_asked_and_their_runs_are_kept(tmp_path, sent):
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.lab.toy", str(tmp_path), "2"],
        cwd=root,
        env={**os.environ, "TOY_PAUSE": "0.2", "PYTHONPATH": path},
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: list(tmp_path.rglob("*-seed*.json")), 3)
        workers = [p for p in children(process.pid) if "spawn_main" in p[1]]
        os.kill(process.pid, sent)
        process.wait(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert len(workers) == 2
    wait_for(lambda: [w for w in workers if not Path("/proc", w[0]).exists()], 2)
    kept = len(list(tmp_path.rglob("*-seed*.json")))
    log = Log()
    assert len(run(toy.make(seeds=20), out=tmp_path, progress=log).records) == 40
    assert len(log.finished) == 40 - kept


def children(parent):
    """Process numbers and command lines of the direct children; from Linux's /proc."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
            command = (status.parent / "cmdline").read_text()
        except OSError:  # it has just ended
            continue
        if int(fields[1]) == parent:
            found.append((status.parent.name, command))
    return found


def wait_for(ask, count):
    deadline = time.monotonic() + 60
    while len(found := ask()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: the extra [ray]"
)
@pytest.mark.slow
def test_a_local_ray_gives_the_same_numbers(tmp_path, monkeypatch):
    experiment = find("bias")
    monkeypatch.setitem(experiment.budgets, "quick", BUDGET)
    alone = run(experiment, out=tmp_path / "1")
    cluster = run(experiment, out=tmp_path / "2", engine="ray")
    assert alone.records == cluster.records


def test_without_ray_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"normally\[ray\]"):
        next(on_ray(cells(where, 1), lambda *_: None))


def test_serial_says_when_a_run_starts():
    heard = []
    assert len(list(serial(cells(where, 2), lambda *event: heard.append(event)))) == 2
    assert heard == [(0, 0, 0), (0, 1, 1), (1, 0, 0), (1, 1, 1)]
