import json
import subprocess
import sys
import types

import pytest
import torch
from typer.testing import CliRunner

import normally
from normally import cli
from normally.lab import registry

from .lab import toy


@pytest.fixture
def invoke():
    app = cli.create_app()
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def toys(monkeypatch):
    experiments = {"toy": toy.make()}
    monkeypatch.setattr(registry, "experiments", lambda: experiments)
    return experiments


def test_lab_list_names_every_experiment_with_its_claim(invoke):
    result = invoke("lab", "list")
    assert result.exit_code == 0
    for name, experiment in registry.experiments().items():
        assert name in result.output
        assert experiment.claim.split()[0] in result.output


def test_lab_run_prints_verdict_and_the_address_of_the_page(invoke, toys, tmp_path):
    result = invoke("lab", "run", "toy", "--jobs", 1, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    page = tmp_path / "toy" / "digits-quick" / "report.html"
    assert "toy: holds" in result.output
    assert str(page) in result.output
    assert page.as_uri() in result.output
    assert page.is_file()
    assert "toy/digits-quick/report.html" in (tmp_path / "index.html").read_text("utf-8")


def test_lab_run_all_and_report(invoke, toys, tmp_path):
    assert (
        invoke("lab", "run", "--all", "--seeds", 2, "--jobs", 2, "--out", tmp_path).exit_code == 0
    )
    page = tmp_path / "toy" / "digits-quick" / "report.html"
    page.unlink()
    result = invoke("lab", "report", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert page.is_file()
    assert "1 of 3 planned seeds are not finished" in page.read_text("utf-8")


def test_lab_run_all_leaves_an_experiment_its_own_data(invoke, toys, tmp_path):
    toys["toy"].data = ("generated",)
    arguments = ("--data", "digits", "--jobs", 1, "--out", tmp_path)
    result = invoke("lab", "run", "--all", *arguments)
    assert result.exit_code == 0, result.output
    assert "toy does not use digits: generated instead." in result.output
    assert invoke("lab", "run", "toy", *arguments).exit_code == 2


def test_lab_run_falls_back_to_data_that_is_there(invoke, toys, tmp_path, monkeypatch):
    monkeypatch.setenv("NORMALLY_DATA", str(tmp_path))
    toys["toy"].data = ("fashion-mnist", "digits")
    result = invoke("lab", "run", "toy", "--jobs", 1, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "toy: fashion-mnist is not on this machine: digits instead." in result.output


def test_lab_run_says_first_how_long_it_takes(invoke, toys, tmp_path):
    toys["toy"].budgets["full"] = {"seeds": 5, "epochs": 4}
    arguments = ("lab", "run", "toy", "--jobs", 1, "--out", tmp_path)
    assert "10 runs of an experiment: this may take a night" in (
        invoke(*arguments, "--budget", "full", "--seeds", 5).output
    )
    invoke(*arguments)
    result = invoke(*arguments, "--budget", "full", "--seeds", 7)
    assert "4 runs of an experiment: about 0 s with --jobs 1" in result.output


def test_lab_run_names_the_run_that_failed_and_keeps_the_others(
    invoke, toys, tmp_path, monkeypatch
):
    monkeypatch.setenv("TOY_FAILS", "b1")
    arguments = ("lab", "run", "toy", "--jobs", 1, "--out", tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert "1 of 6 runs failed; the others are kept" in result.output
    assert "toy: b, seed 1" in result.output
    assert "ValueError: the toy is broken" in result.output
    monkeypatch.delenv("TOY_FAILS")
    assert "5 of 6 runs are on disk already" in invoke(*arguments).output


def test_a_verdict_that_fails_takes_no_other_experiment_with_it(invoke, toys, tmp_path):
    toys["other"] = toy.make()
    toys["other"].name = "other"
    toys["toy"].judges(lambda results: 1 / 0)
    result = invoke("lab", "run", "--all", "--jobs", 1, "--out", tmp_path)
    assert result.exit_code == 1
    assert "toy: no verdict." in result.output
    assert "ZeroDivisionError" in result.output
    assert "other: holds" in result.output
    assert (tmp_path / "other" / "digits-quick" / "report.html").is_file()


def test_lab_report_without_runs_says_what_to_do(invoke, tmp_path):
    result = invoke("lab", "report", "--out", tmp_path)
    assert result.exit_code == 1
    assert "normally lab run quickstart" in result.output


def test_ctrl_c_keeps_what_is_finished_and_says_so(invoke, toys, tmp_path):
    measure = toys["toy"].measure

    def stopped(run):
        if run.seed == 1:
            raise KeyboardInterrupt
        return measure(run)

    toys["toy"].measure = stopped
    result = invoke("lab", "run", "toy", "--jobs", 1, "--out", tmp_path)
    assert result.exit_code == 130
    assert "the same command continues" in result.output
    assert len(list(tmp_path.rglob("*-seed0.json"))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lab", "run"), "--all"),
        (("lab", "run", "toy", "--all"), "--all"),
        (("lab", "run", "toi"), "Did you mean toy?"),
        (("lab", "run", "toy", "--budget", "huge"), "budget must be one of"),
        (("lab", "run", "toy", "--engine", "dask"), "engine must be one of"),
        (("lab", "run", "toy", "--data", "cifar"), "data must be one of"),
        (("lab", "run", "toy", "--data", "fashion-mnist"), "NORMALLY_DATA"),
    ],
)
def test_a_wrong_command_is_refused_with_a_reason(
    invoke, toys, tmp_path, tmp_path_factory, monkeypatch, arguments, message
):
    monkeypatch.setenv("NORMALLY_DATA", str(tmp_path_factory.mktemp("empty")))
    result = invoke(*arguments, *(("--out", tmp_path)))
    assert result.exit_code == 2
    # rich draws a box and folds lines; the words stay in order.
    assert message in " ".join(result.output.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_env_names_versions_and_backends(invoke):
    result = invoke("env")
    assert result.exit_code == 0
    for expected in (normally.__version__, torch.__version__, normally.backends()["cpu"]):
        assert expected in result.output
    facts = json.loads(invoke("env", "--json").output)
    assert facts["backends"] == normally.backends()
    assert facts["threads"] == torch.get_num_threads()
    assert facts["instruction_set"] == torch.backends.cpu.get_cpu_capability()


def test_env_in_a_file_has_one_fact_a_line():
    code = "from normally.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "env"], capture_output=True, text=True, check=True
    )
    facts = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert facts["torch"].strip() == torch.__version__


def test_bench_hands_its_options_over(invoke, monkeypatch, tmp_path):
    calls = []

    def run(operators, **options):
        calls.append((operators, options))
        return 1

    monkeypatch.setitem(sys.modules, "normally.bench", types.SimpleNamespace(run=run))
    monkeypatch.setattr(normally, "bench", sys.modules["normally.bench"], raising=False)
    result = invoke(
        "bench",
        "batch_norm",
        "--shapes",
        "1, 5a",
        "--threads",
        "1,2",
        "--json",
        tmp_path / "a.json",
    )
    assert result.exit_code == 1
    operators, options = calls[0]
    assert operators == ["batch_norm"]
    assert options["shapes"] == ["1", "5a"]
    assert options["threads"] == [1, 2]
    assert options["dtypes"] == ["float32", "bfloat16"]
    assert options["json_path"] == tmp_path / "a.json"


def test_bench_refuses_an_unknown_name(invoke):
    result = invoke("bench", "bach_norm")
    assert result.exit_code == 2
    assert "bach_norm" in result.output


@pytest.mark.parametrize("package", ["typer", "rich", "sklearn"])
def test_a_missing_package_is_one_sentence_and_status_2(package, tmp_path):
    code = (
        f"import sys; sys.modules[{package!r}] = None; import normally.cli; "
        f"sys.argv = ['normally', 'lab', 'run', 'quickstart', '--out', {str(tmp_path)!r}]; "
        "normally.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if "RuntimeWarning" not in line]
    assert lines[-1] == (
        f"normally: the command line needs the package {package}. "
        'Install it with: pip install "normally[lab]"'
    )
    assert "Traceback" not in done.stderr
