"""What a run says: goals, losses first, one table last, and the page of the repository."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest

from normally.bench.gpu import page, plots, summary, table
from normally.bench.gpu.cases import plan
from normally.bench.main import OPERATORS

from .gpu_helpers import make_gpu_results
from .helpers import load_script

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def whole():
    return make_gpu_results(2.0)


@pytest.fixture(scope="module")
def script():
    return load_script("performance_page")


def shown(results):
    out = io.StringIO()
    table.show(results, out)
    return out.getvalue()


def losing(results, how, label="11a", mode="forward_backward"):
    """The run with one case of float32 in which torch is twice as fast."""
    for index, record in enumerate(results.records):
        if (record.operator, record.label, record.dtype, record.mode) == (
            "rms_norm", label, "float32", mode,
        ):  # fmt: skip
            if how == "replayed":
                half = replace(record.speedup["torch"], median=0.5)
                changed = replace(record, speedup={"torch": half})
            else:
                half = replace(record.eager["normally"], median=2 * record.eager["torch"].median)
                changed = replace(record, eager=record.eager | {"normally": half})
            records = [*results.records[:index], changed, *results.records[index + 1 :]]
            return replace(results, records=records)
    raise AssertionError


def test_goals_are_those_of_large_tensors(whole):
    by_goal = {verdict.goal: verdict for verdict in summary.verdicts(whole)}
    forward = by_goal["batch norm forward, 85 % of the floor"]
    assert forward.reached == len(forward.values) > 10
    assert not any("12a" in name or " 8a " in name for _, name in forward.values)
    rows = by_goal["layer and RMS norm forward, 88 % of the floor"]
    assert "90 %" in rows.line
    fused = by_goal["batch norm with ReLU forward+backward, 1.8 × torch in its better layout"]
    # Shapes 1 to 4, two layouts, two dtypes.
    assert (fused.reached, len(fused.values)) == (16, 16)
    rms = by_goal["RMS norm as kernels, never slower than torch"]
    # Twelve shapes with the narrow ones, two dtypes, three modes; of eager calls two.
    assert len(rms.values) == 12 * 2 * 3
    assert len(by_goal["RMS norm as eager calls, never slower than torch"].values) == 12 * 2 * 2
    network = next(v for goal, v in by_goal.items() if goal.startswith("ResNet-50"))
    assert network.line.endswith("1 of 1 cases, median 2.00 ×, worst 2.00 × "
                                 "(batch 256, torchvision 1.0)")  # fmt: skip


def test_a_missed_goal_names_the_worst_case():
    verdicts = summary.verdicts(make_gpu_results(1.5, share=0.5))
    assert all(v.reached == 0 for v in verdicts if "floor" in v.goal)
    assert re.search(r"0 of \d+ cases, median 50 %, worst 50 % \(batch_norm", verdicts[0].line)
    assert summary.Verdict("a goal", "%", 0.5, ()).line == "a goal: not measured"


def test_the_better_layout_is_the_faster_one_of_torch():
    results = make_gpu_results(2.0, shapes=["1"])
    ours, theirs = (
        next(r for r in results.records if (r.layout, r.mode) == (layout, "forward"))
        for layout in ("contiguous", "channels_last")
    )
    slower = replace(
        theirs, timings=theirs.timings | {"torch": replace(
            theirs.timings["torch"], seconds=replace(theirs.timings["torch"].seconds, median=9.0)
        )},
    )  # fmt: skip
    results.records[results.records.index(theirs)] = slower
    assert summary.over_better_layout(results, ours) == pytest.approx(2.0)
    assert summary.over_better_layout(results, slower) == pytest.approx(2.0)


def test_every_case_has_a_row_and_the_table_is_last(whole):
    lines = shown(whole).splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("case "))
    assert len(lines) - head - 1 == len(plan())
    assert all(line.startswith(" ") for line in lines[head + 1 :])  # none is lost
    # The device tool of a lent machine hands back the last 12,000 characters.
    assert len("\n".join(lines[head:])) < 9_000
    assert any("ResNet-50" in line for line in lines[:head])
    assert "not measured: no time: something" in lines[:head]


@pytest.mark.parametrize("how", ["replayed", "eager"])
def test_rows_where_torch_is_faster_come_first(whole, how):
    results = losing(whole, how)
    first, second, *_ = table.rows(results)
    assert first[0] == "!RMS 11a 8192×4096 f32"
    assert second[0].startswith(" BN")
    (loss,) = summary.losses(results)
    assert (loss.how, loss.ratio, loss.other) == (how, 0.5, "torch")


def test_a_row_without_ours_has_dashes():
    results = make_gpu_results(2.0, shapes=["12b"])
    results.records = [
        replace(r, timings={"torch": r.timings["torch"]}, speedup={}, eager={}, host={},
                failed={"normally": "RuntimeError: no"})
        for r in results.records
    ]  # fmt: skip
    row = table.rows(results)[0]
    assert row[1:] == ("-",) * 9 + ("-/-", "-/2e-07")
    assert "FAILED: normally forward layer_norm 12b 1×768 bfloat16: RuntimeError: no" in shown(
        results
    )


def test_long_lists_are_cut_above_the_table(whole):
    results = replace(whole, not_measured=[f"no time: case {i}" for i in range(40)])
    text = shown(results)
    assert text.count("not measured: no time: case") == 12
    assert "not measured: 28 more, in the JSON" in text


def test_figures_are_drawn_for_every_operator_and_dtype():
    results = make_gpu_results(2.0, shapes=["7", "11d", "12"])
    figures = plots.figures(results)
    assert list(figures) == plots.names(results)
    assert len(figures["nvidia-test-1-speedup.svg"].panels) == 2 * 5


def test_the_page_has_every_case_and_its_losses_first(whole):
    text = page.build([losing(whole, "eager")], "assets/performance-gpu")
    assert text.startswith("# Performance on a GPU\n")
    assert "\n## NVIDIA Test 1\n" in text
    section = text[text.index("\n## NVIDIA Test 1") :]
    assert section.index("**Torch is faster in 1 of") < section.index("### NVIDIA Test 1, batch")
    assert "| rms_norm 11a 8192×4096 float32 | forward + backward | eager | 0.50 × |" in text
    for operator in OPERATORS:
        _, _, rest = text.partition(f"### NVIDIA Test 1, {operator.replace('_', ' ')}\n\n")
        rows = rest.partition("\n\n")[0].splitlines()
        assert len(rows) == 2 + sum(o.name == operator for o, _ in plan())
        assert len({row.count("|") for row in rows}) == 1
    for name in plots.names(whole):
        assert f"(assets/performance-gpu/{name})" in text
    assert "| ResNet-50 training step, bfloat16 autocast, channels_last, 1.2 × | 1 of 1 |" in text


def test_missed_goals_and_losses_are_bold():
    text = page.build([make_gpu_results(0.5, share=0.5)], "figures")
    assert "**50 %**" in text
    assert "**0.50**" in text
    assert re.search(r"\| \*\*0 of \d+\*\* \|", text)
    assert "**50 %**" not in page.build([make_gpu_results(2.0, share=0.95)], "figures")


def test_a_page_without_a_run_says_that_nothing_is_measured(script):
    assert "**On a GPU: not measured yet.**" in script.build({}, [])
    assert "performance-gpu.md" not in script.build({}, [])


def test_the_page_of_the_cpu_points_to_that_of_the_gpu(script, whole):
    text = script.build({}, [losing(whole, "replayed")])
    assert "[NVIDIA Test 1](performance-gpu.md#nvidia-test-1).** Torch is faster in 1 of" in text
    assert "not measured yet" not in text


def test_the_newest_run_of_a_gpu_is_taken_if_it_is_whole(tmp_path):
    old = make_gpu_results(2.0, shapes=["12b"])
    new = replace(old, created="2027-01-01T00:00:00+00:00")
    paths = [old.write(tmp_path / "b.json"), new.write(tmp_path / "a.json")]
    assert [r.created for r in page.load(paths)] == [new.created]
    cut = replace(old, complete=False).write(tmp_path / "c.json")
    with pytest.raises(ValueError, match="must be a complete run"):
        page.load([*paths, cut])


def test_figures_are_written_and_old_ones_go(tmp_path):
    results = make_gpu_results(2.0, shapes=["12b"])
    (tmp_path / "old.svg").write_text("", encoding="utf-8")
    page.write_figures([results], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(plots.names(results))
    changed = make_gpu_results(2.1, shapes=["12b"])
    for name, digest in page.digests(results).items():
        assert (tmp_path / name).read_text("utf-8").endswith(digest)
        assert digest != page.digests(changed)[name]


def test_the_published_page_is_up_to_date(script):
    remedy = "run: make perf-page"
    runs = script.published_gpus()
    path = DOCS / "performance-gpu.md"
    assert path.exists() == bool(runs), remedy
    folder = DOCS / "assets" / "performance-gpu"
    expected = {name: d for results in runs for name, d in page.digests(results).items()}
    found = {p.name for p in folder.iterdir()} if folder.exists() else set()
    assert found == set(expected), remedy
    if runs:
        assert path.read_text("utf-8") == page.build(runs, "assets/performance-gpu"), remedy
    for name, digest in expected.items():
        assert (folder / name).read_text("utf-8").endswith(digest), remedy
