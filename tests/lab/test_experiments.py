"""What every experiment owes its reader."""

import inspect
import pickle
import re
from pathlib import Path

import pytest

from normally.lab import experiments
from normally.lab.data import NAMES

ALL = experiments()


@pytest.fixture(params=ALL, ids=str)
def experiment(request):
    return ALL[request.param]


def test_the_file_has_the_name_of_the_experiment(experiment):
    path = Path(inspect.getfile(experiment.measure))
    assert path.stem == experiment.name.replace("-", "_")
    assert path.parent.name == "experiments"


def test_the_text_comes_first_and_is_whole(experiment):
    module = inspect.getmodule(experiment.measure)
    assert len(inspect.getdoc(module).split("\n\n")) > 1, "a page begins with an explanation"
    for text in (experiment.title, experiment.claim, experiment.source, experiment.prediction):
        assert text.strip()
    assert experiment.claim.endswith(".")
    assert experiment.protocol
    assert experiment.thresholds
    source = inspect.getsource(module)
    places = [source.index(part) for part in ("Experiment(", "def measure", "def judge")]
    assert places == sorted(places)


def test_the_seeds_suffice_for_a_verdict(experiment):
    assert experiment.budgets["quick"]["seeds"] >= 3
    assert experiment.budgets["full"]["seeds"] >= 5
    assert set(experiment.budgets["quick"]) == set(experiment.budgets["full"])


def test_variants_are_names_of_files(experiment):
    assert len(set(experiment.variants)) == len(experiment.variants)
    for variant in experiment.variants:
        assert re.fullmatch(r"[\w.+-]+", variant), variant
    assert set(experiment.alone) <= set(experiment.variants)


def test_its_data_are_known(experiment):
    assert experiment.data
    assert set(experiment.data) <= set(NAMES)


def test_it_can_be_sent_to_another_process(experiment):
    assert pickle.loads(pickle.dumps(experiment.measure)) is experiment.measure
    settings = experiment.budgets["full"]
    assert pickle.loads(pickle.dumps(settings)) == settings
