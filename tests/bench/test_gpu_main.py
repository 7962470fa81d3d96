"""A run from its plan to its JSON and table, with a timer that invents times."""

from __future__ import annotations

import json

import pytest
import torch

from normally.bench.gpu import __main__ as program
from normally.bench.gpu import main, network, session
from normally.bench.gpu.cases import plan
from normally.bench.gpu.library import Library
from normally.bench.gpu.results import GpuResults
from normally.bench.gpu.timing import Deadline
from normally.bench.gpu.with_apex import Apex
from normally.bench.gpu.with_liger import Liger
from normally.bench.gpu.with_quack import Quack
from normally.bench.results import Results

from .gpu_helpers import DEVICE, FakeTimer, make_gpu_results, make_network

TINY = {"shapes": ["12a"], "dtypes": ["float32"], "layouts": ["contiguous"]}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(main, "LIBRARIES", ())
    monkeypatch.setattr(session, "compiled", lambda module: module)
    monkeypatch.setattr(network, "measure", lambda device: make_network(1.3))


def run(seconds=1e6, timer=None, **options):
    lines = []
    results = main.run(
        timer or FakeTimer(), DEVICE, Deadline(seconds), tell=lines.append, **{**TINY, **options}
    )
    return results, lines


def test_end_to_end(tmp_path):
    path = tmp_path / "deep" / "run.json"
    results, lines = run(json_path=path)
    assert results.complete
    assert results.stopped == ""
    assert results.not_measured == []
    assert GpuResults.from_json(path.read_text("utf-8")) == results
    assert {"normally", "torch", "torch.compile"} == set(results.records[0].timings)
    assert [n.batch for n in results.networks] == [256]
    assert results.machine["gpu"]["slug"] == "nvidia-test-1"
    # Cases, then the network, then torch.compile.
    assert [line.partition("s  ")[2].partition(" ")[0] for line in lines] == [
        "batch_norm", "ResNet-50", "torch.compile:",
    ]  # fmt: skip


def test_the_json_is_not_taken_for_that_of_a_cpu(tmp_path):
    text = make_gpu_results(shapes=["12a"]).to_json()
    with pytest.raises(ValueError, match=r"schema must be 'normally\.bench/1'"):
        Results.from_json(text)
    entry = json.loads(text)["records"][0]
    assert entry["over_floor"]["torch"] == pytest.approx(2 * entry["over_floor"]["normally"])


def test_what_there_is_no_time_for_is_named():
    results, lines = run(seconds=0.0)
    assert lines == []
    assert results.complete  # the run came to its end
    assert results.not_measured == [
        "no time: batch_norm 12a 2×16×8×8 contiguous float32 +relu",
        f"no time: {network.TITLE}",
    ]


def test_torch_compile_and_networks_can_be_left_out():
    results, _ = run(compile=False, networks=False)
    assert "torch.compile" not in results.records[0].timings
    assert results.networks == []
    assert results.not_measured == []


def test_a_broken_device_ends_the_run_and_says_so(tmp_path):
    path = tmp_path / "run.json"
    results, _ = run(timer=FakeTimer(lost=True), json_path=path)
    assert not results.complete
    assert "illegal memory access" in results.stopped
    assert "batch_norm 12a" in results.stopped
    assert not GpuResults.from_json(path.read_text("utf-8")).complete


def test_an_interrupted_run_keeps_what_was_measured(monkeypatch):
    def interrupted(device):
        raise KeyboardInterrupt

    monkeypatch.setattr(network, "measure", interrupted)
    results, _ = run()
    assert (results.complete, results.stopped) == (False, "interrupted")
    assert len(results.records) == 3


def test_a_case_that_raises_is_named_and_the_others_are_measured(monkeypatch):
    measure = session.Session.measure

    def fails(self, operator, case):
        if case.dtype == "bfloat16":
            raise RuntimeError("no memory")
        measure(self, operator, case)

    monkeypatch.setattr(session.Session, "measure", fails)
    results, _ = run(dtypes=["bfloat16", "float32"])
    assert {record.dtype for record in results.records} == {"float32"}
    (line,) = results.not_measured
    assert line.startswith("RuntimeError: batch_norm 12a")


def test_a_network_that_raises_is_named(monkeypatch):
    def fails(device):
        raise ImportError("No module named 'timm'")

    monkeypatch.setattr(network, "measure", fails)
    results, _ = run()
    assert results.not_measured == [f"ImportError: {network.TITLE}: No module named 'timm'"]


def test_libraries_that_are_missing_say_why(monkeypatch):
    class Missing(Library):
        name = "missing"
        package = "missing"
        modules = ("normally_has_no_such_module",)

        def has(self, operator, case):
            raise AssertionError

        build = has

    monkeypatch.setattr(main, "LIBRARIES", (Missing(),))
    results, _ = run()
    assert results.others == {}
    (line,) = results.not_measured
    assert line.startswith("not importable: missing: ModuleNotFoundError")


@pytest.mark.parametrize("library", [Liger(), Quack(), Apex()], ids=lambda library: library.name)
def test_libraries_have_rows_and_no_batch_norm(library, monkeypatch):
    monkeypatch.setattr(Apex, "_has_group_norm", lambda self: True)
    kinds = {operator.name for operator, case in plan() if library.has(operator, case)}
    assert "rms_norm" in kinds
    assert "batch_norm" not in kinds
    for operator, case in plan(["group_norm"]):
        if library.has(operator, case):
            wanted = {"Liger": "contiguous", "apex": "channels_last"}
            assert case.layout == wanted[library.name]


def test_caches_are_warmed_case_by_case():
    lines = []
    entries = plan(["layer_norm"], ["12b"])
    main.warm(entries, torch.device("cpu"), Deadline(1e6), False, lines.append)
    assert len(lines) == 2
    main.warm(entries, torch.device("cpu"), Deadline(0.0), False, lines.append)
    assert len(lines) == 2


def test_warming_goes_on_after_an_error(monkeypatch):
    lines = []
    monkeypatch.setattr(main, "make_grads", lambda *_: [])
    main.warm(
        plan(["layer_norm"], ["12b"]), torch.device("cpu"), Deadline(1e6), False, lines.append
    )
    assert len(lines) == 4
    assert "Error" in lines[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("options", [[], ["--describe"], ["--warm", "0/2"]])
def test_without_a_gpu_it_says_so(options, capsys):
    assert program.command(options) == 2
    assert "finds no CUDA GPU" in capsys.readouterr().err


def test_a_run_is_shown_without_a_gpu(tmp_path, capsys):
    results = make_gpu_results(shapes=["12"])
    path = results.write(tmp_path / "run.json")
    assert program.command(["--show", str(path), "--plots", str(tmp_path / "plots")]) == 0
    assert "BN+relu 12a" in capsys.readouterr().out
    assert len(list((tmp_path / "plots").glob("nvidia-test-1-*.svg"))) == 4
    results.complete = False
    assert program.command(["--show", str(results.write(path))]) == 1
    assert "STOPPED" in capsys.readouterr().out
