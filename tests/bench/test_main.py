"""From options to table, JSON and page, on the smallest shape."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from normally.bench import main, page, run, table
from normally.bench.batch_norm import BatchNorm
from normally.bench.results import Results
from normally.bench.shapes import SHAPES, Shape

from .helpers import TINY, make_record, make_results
from .test_results import all_cases


@pytest.fixture(autouse=True)
def small_yardstick(monkeypatch):
    cache = main.environment.Cache("L2", 1 << 20, 1 << 20)
    monkeypatch.setattr(main.environment, "last_level_cache", lambda: cache)


def test_end_to_end(tmp_path, capsys):
    status = run(
        ["batch_norm"],
        shapes=["12"],
        threads=1,
        budget=TINY,
        json_path=tmp_path / "run.json",
        html_path=tmp_path / "run.html",
    )
    assert status == 0
    results = Results.from_json((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert results.complete
    # 2 layouts, 2 dtypes, fused and alone, 3 modes.
    assert len(results.records) == 2 * 2 * 2 * 3
    for record in results.records:
        assert list(record.timings) == ["normally", "torch"]
        assert record.speedup["torch"].low <= record.speedup["torch"].median
        for timing in record.timings.values():
            assert timing.seconds.median > 0
            assert list(timing.error) == ["1", "1e+03", "1e+05"]
            assert (timing.saved_bytes is not None) == (record.mode == "forward_backward")
    text = capsys.readouterr().out
    assert "12a 2×16×8×8 channels_last bfloat16" in text
    assert "geometric mean" not in text  # none of shapes 1 to 7 was measured
    assert "(target 3.0×)" in text
    html = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert "Batch norm: ours against torch" in html
    assert "<svg" in html


def test_every_number_of_threads_has_its_copy_speed(tmp_path, threads):
    before = torch.get_num_threads()
    path = tmp_path / "run.json"
    options = {"shapes": ["12"], "layouts": ["contiguous"], "budget": TINY, "json_path": path}
    assert run(["batch_norm"], threads=[1, 2], **options) == 0
    assert torch.get_num_threads() == before
    results = Results.from_json(path.read_text(encoding="utf-8"))
    assert {record.threads for record in results.records} == {1, 2}
    assert {(speed.dtype, speed.threads) for speed in results.copy} == {
        (dtype, n) for dtype in ("float32", "bfloat16") for n in (1, 2)
    }


def test_what_raises_is_reported_and_the_others_are_timed(monkeypatch, capsys):
    class Faulty(BatchNorm):
        def ours(self, case):
            return super().ours(case) if case.dtype == "float32" else torch.nn.BatchNorm2d(3)

    monkeypatch.setitem(main.OPERATORS, "batch_norm", Faulty())
    options = {"shapes": ["12"], "layouts": ["contiguous"], "budget": TINY, "threads": 1}
    assert run(["batch_norm"], **options) == 1
    text = capsys.readouterr().out
    assert (
        "FAILED normally: batch_norm 12a 2×16×8×8 contiguous bfloat16 forward+relu, 1 thread"
        in text
    )
    assert "FAILED torch" not in text


def test_an_interrupted_run_keeps_what_was_measured(monkeypatch, tmp_path, capsys, threads):
    measure = main.Session.measure

    def interrupted(session, operator, group, tell):
        if group[0].dtype == "bfloat16":
            raise KeyboardInterrupt
        measure(session, operator, group, tell)

    monkeypatch.setattr(main.Session, "measure", interrupted)
    path = tmp_path / "run.json"
    assert run(["batch_norm"], shapes=["12"], budget=TINY, threads=1, json_path=path) == 130
    results = Results.from_json(path.read_text(encoding="utf-8"))
    assert not results.complete
    assert {record.dtype for record in results.records} == {"float32"}
    assert "Interrupted" in capsys.readouterr().out


def test_an_interruption_before_the_first_case(monkeypatch, tmp_path, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(main.Session, "measure", interrupted)
    paths = {"json_path": tmp_path / "run.json", "html_path": tmp_path / "run.html"}
    assert run(shapes=["12"], budget=TINY, threads=1, **paths) == 130
    assert "Interrupted" in capsys.readouterr().out
    assert all(path.exists() for path in paths.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operators": ["batchnorm"]}, "operators must be among 'batch_norm', .* Got 'batchnorm'"),
        ({"dtypes": ["int8"]}, "dtypes must be among .* Got 'int8'"),
        ({"layouts": ["NHWC"]}, "layouts must be among 'contiguous', 'channels_last'"),
        ({"budget": "long"}, "budget must be among 'quick', 'full'. Got 'long'"),
        ({"threads": 0}, "threads must be 1 or more. Got threads=0"),
        ({"threads": []}, "threads must be 1 or more"),
        ({"shapes": ["99"]}, "shapes must be numbers 1 to 12"),
        (
            {"operators": ["batch_norm"], "shapes": ["9"]},
            "shapes must be among those of batch_norm",
        ),
        ({"shapes": ["8"], "layouts": ["channels_last"]}, "shapes must be among those of"),
        ({"also": ["tensorflow"]}, "also must be among 'flax', 'onednn'. Got 'tensorflow'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_default_thread_counts(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert main._thread_counts(None, main.BUDGETS["quick"]) == [4]
    assert main._thread_counts(None, main.BUDGETS["full"]) == [1, 4]


@pytest.mark.parametrize("width", [80, 120, 160, 300])
def test_no_number_is_cut_at_any_width(width):
    results = make_results([make_record(c, 0.5, 10**6) for c in all_cases()])
    stream = io.StringIO()
    table.show(results, [BatchNorm()], Console(file=stream, width=width))
    text = stream.getvalue()
    assert "…" not in text
    assert "NOT reached" in text
    assert "Where torch is faster: 40 of 40 cases" in text
    assert "Above the floor's goal" in text


def test_a_busy_machine_is_named():
    results = make_results([])
    assert not any("CAUTION" in line for line in table.machine_lines(results))
    results.machine = {**results.machine, "load": 1.7}
    assert any("CAUTION: other programs kept 1.7" in line for line in table.machine_lines(results))


def test_a_pipe_has_room_for_every_column(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert table.console(io.StringIO()).width == 160
    monkeypatch.setenv("COLUMNS", "100")
    assert table.console(io.StringIO()).width == 100


def test_the_page_has_every_case_and_says_what_is_slow():
    cases = all_cases() + all_cases("forward") + all_cases("evaluation", "bfloat16")
    results = make_results([make_record(c, 0.5, 10**6, over_floor=3.0) for c in cases])
    built = page.build(results, [BatchNorm()])
    tables = [b for s in built.sections for b in s.content if isinstance(b, page.report.Table)]
    assert [len(t.rows) for t in tables[:1] + tables[-1:]] == [len(cases)] * 2
    html = page.report.render(built)
    assert "Where torch is faster" in html
    assert "Above the floor" in html


@pytest.mark.slow
# torch's own compiler imports what torch has deprecated.
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torch_compile_is_a_contender(monkeypatch, capsys):
    shape = Shape("12a", "batch_norm", (2, 16, 8, 8), "relu")
    monkeypatch.setattr(main, "select", lambda *_: [shape])
    options = {"dtypes": ["float32"], "layouts": ["contiguous"], "threads": 1}
    assert run(["batch_norm"], budget=TINY, compile=True, **options) == 0
    assert "Where torch.compile is faster" in capsys.readouterr().out


def test_every_shape_has_its_operator():
    assert set(main.OPERATORS) == {shape.operator for shape in SHAPES}


def test_the_readme_names_every_field():
    readme = Path(__file__).parents[2] / "benchmarks" / "README.md"
    text = readme.read_text(encoding="utf-8")
    results = make_results([make_record(all_cases()[0], 2.0, 1000)])
    data = json.loads(results.to_json())
    fields = [*data, *data["machine"], *data["options"], *data["copy"][0], *data["records"][0]]
    fields += data["records"][0]["timings"]["normally"]
    assert [name for name in fields if name not in text] == []
