"""docs/experiments/ is what the experiments' files and the published results say."""

import re

import pytest

from normally.lab import experiments
from tests.bench.helpers import load_script

REMEDY = "make experiment-pages"


@pytest.fixture(scope="module")
def script():
    return load_script("experiment_pages")


def test_the_pages_are_up_to_date(script):
    pages = script.build(script.published())
    found = {path.name: path.read_text("utf-8") for path in script.PAGES.glob("*.md")}
    assert sorted(found) == sorted(pages), REMEDY
    for name, text in pages.items():
        assert found[name] == text, f"{name}: {REMEDY}"


def test_every_experiment_has_a_published_result_of_its_claim(script):
    results = script.published()
    assert sorted(results) == sorted(experiments())
    for name, experiment in experiments().items():
        assert results[name]["claim"] == experiment.claim, f"measure {name} again"
        assert len(results[name]["seeds"]) >= 3
        assert (script.PICTURES / f"{name}.svg").is_file()


def test_a_page_has_verdict_protocol_and_the_whole_code(script):
    text = script.build(script.published())["bias.md"]
    assert "**The claim holds.**" in text
    assert re.search(r"\| ≥ 4 decades \| holds \|", text)
    assert "def measure(run: Run) -> Record:" in text


def test_results_are_taken_from_a_folder_of_runs(script, tmp_path, monkeypatch):
    from normally.lab import conclude, find, run

    experiment = find("bias")
    budget = {"seeds": 1, "epochs": 1, "batch_size": 256}
    monkeypatch.setitem(experiment.budgets, "quick", budget)
    conclude(experiment, run(experiment, out=tmp_path), out=tmp_path)
    monkeypatch.setattr(script, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(script, "PICTURES", tmp_path / "pictures")
    script.publish(tmp_path)
    assert script.published()["bias"]["runs"] == 2
    assert (tmp_path / "pictures" / "bias.svg").is_file()
    pages = script.build(script.published())
    assert "**Inconclusive.**" in pages["bias.md"]
    assert "No result is published yet." in pages["quickstart.md"]
