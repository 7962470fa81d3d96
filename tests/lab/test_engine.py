import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from normally.lab import conclude, recorded, run
from normally.lab.progress import Progress

from . import toy


def runs(out):
    return sorted(Path(out, "toy", "digits-quick", "runs").glob("*.json"))


class Log(Progress):
    def __init__(self, stop_at=None):
        self.labels, self.stop_at, self.done = [], stop_at, None

    def begin(self, done, total):
        self.done = (done, total)

    def run(self, index, label):
        if len(self.labels) == self.stop_at:
            raise KeyboardInterrupt
        self.labels.append(label.removeprefix("toy: "))


def test_every_variant_gets_every_seed_and_whole_seeds_come_first(tmp_path):
    log = Log()
    results = run(toy.make(), out=tmp_path, progress=log)
    assert log.labels == [f"{variant}, seed {seed}" for seed in range(3) for variant in "ab"]
    assert results.get("b", "value") == [10.0, 11.0, 12.0]
    assert results.seeds("a", "b") == [0, 1, 2]
    assert len(runs(tmp_path)) == 6


def test_an_interrupted_experiment_continues_with_the_run_that_was_lost(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(toy.make(), out=tmp_path, progress=Log(stop_at=3))
    kept = {path: path.stat().st_mtime_ns for path in runs(tmp_path)}
    assert len(kept) == 3
    log = Log()
    results = run(toy.make(), out=tmp_path, progress=log)
    assert log.done == (3, 6)
    assert log.labels == ["b, seed 1", "a, seed 2", "b, seed 2"]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert results.get("a", "value") == [0.0, 1.0, 2.0]


def test_a_killed_process_loses_at_most_the_running_seed(tmp_path):
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "TOY_PAUSE": "0.15",
        "PYTHONPATH": os.pathsep.join([str(root), *sys.path]),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.lab.toy", str(tmp_path), "1"],
        cwd=root,
        env=environment,
    )
    try:
        deadline = time.monotonic() + 60
        while len(runs(tmp_path)) < 3:
            assert process.poll() is None, "the experiment ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    kept = runs(tmp_path)
    assert 3 <= len(kept) < 40
    for path in kept:
        json.loads(path.read_text("utf-8"))
    log = Log()
    results = run(toy.make(seeds=20), out=tmp_path, progress=log)
    assert log.done == (len(kept), 40)
    assert len(log.labels) == 40 - len(kept)
    assert len(results.seeds("a", "b")) == 20


def test_a_damaged_file_is_measured_again(tmp_path):
    run(toy.make(), out=tmp_path)
    runs(tmp_path)[0].write_text('{"fingerprint": "', "utf-8")
    log = Log()
    run(toy.make(), out=tmp_path, progress=log)
    assert log.labels == ["a, seed 0"]


def test_changed_code_of_the_measurement_is_measured_again(tmp_path, monkeypatch):
    run(toy.make(), out=tmp_path)
    monkeypatch.setattr(toy, "OFFSET", 20.0)
    log = Log()
    results = run(toy.make(), out=tmp_path, progress=log)
    assert len(log.labels) == 6
    assert results.get("b", "value") == [20.0, 21.0, 22.0]


def test_more_seeds_extend_what_is_there(tmp_path):
    run(toy.make(), out=tmp_path, seeds=1)
    log = Log()
    run(toy.make(), out=tmp_path, seeds=2, progress=log)
    assert log.labels == ["a, seed 1", "b, seed 1"]


def test_a_seed_decides_the_random_numbers_and_the_callers_stay(tmp_path):
    experiment = toy.make()

    @experiment.measures
    def measure(run):
        return {"value": torch.rand(()).item()}

    torch.manual_seed(5)
    expected = torch.rand(())
    torch.manual_seed(5)
    results = run(experiment, out=tmp_path)
    assert torch.rand(()) == expected
    values = results.get("a", "value")
    assert values == results.get("b", "value")
    assert len(set(values)) == 3


def test_conclude_writes_verdict_and_page(tmp_path):
    experiment = toy.make()
    results = run(experiment, out=tmp_path)
    verdict, page = conclude(experiment, results, out=tmp_path)
    assert verdict.status == "holds"
    assert page.read_text("utf-8").count("b is 10 more.") == 1
    result = json.loads((page.parent / "result.json").read_text("utf-8"))
    assert result["verdict"]["criteria"][0]["by_seed"] == [10.0, 10.0, 10.0]
    assert result["measured_with"] == list(results.machines)
    assert "torch" in results.machines[0]


def test_recorded_reads_what_is_there_and_the_page_says_what_is_missing(tmp_path):
    experiment = toy.make()
    run(experiment, out=tmp_path, seeds=2)
    results = recorded(experiment, out=tmp_path)
    assert results.seeds("a", "b") == [0, 1]
    verdict, page = conclude(experiment, results, out=tmp_path)
    assert verdict.status == "inconclusive"
    assert "1 of 3 planned seeds are not finished" in page.read_text("utf-8")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"budget": "huge"}, r"budget must be one of quick. Got budget='huge'"),
        ({"jobs": 0}, r"jobs must be 1 or more. Got jobs=0"),
        ({"engine": "dask"}, r"engine must be one of local, ray. Got engine='dask'"),
        ({"seeds": 0}, r"seeds must be 1 or more. Got seeds=0"),
        ({"data": "cifar"}, r"data must be one of digits, fashion-mnist, mnist. Got data='cifar'"),
    ],
)
def test_impossible_arguments_are_refused_before_anything_is_written(tmp_path, argument, message):
    with pytest.raises(ValueError, match=message):
        run(toy.make(), out=tmp_path, **argument)
    assert list(tmp_path.iterdir()) == []


def test_an_experiment_uses_its_own_data_and_no_other(tmp_path):
    experiment = toy.make()
    experiment.data = ("generated",)
    assert run(experiment, out=tmp_path).data.name == "generated"
    with pytest.raises(
        ValueError, match=r"data must be one of generated\. Got data='digits' for toy"
    ):
        run(experiment, data="digits", out=tmp_path)
