import subprocess
import sys
from pathlib import Path

import pytest

from normally.lab import speed
from normally.lab.experiments import quickstart
from normally.lab.fingerprint import fingerprint

ROOT = Path(__file__).parents[2]
RATE = 0.1


def first(x):
    return x


TABLE = {"first": first}


def by_table(run):
    return TABLE["first"](run)


def helper(x):
    return x * RATE


def measure(run):
    def inner():
        return helper(run)

    return inner()


def test_it_is_stable_and_takes_no_notice_of_the_number_of_seeds():
    one = fingerprint(measure, "digits", {"seeds": 3, "epochs": 2})
    assert one == fingerprint(measure, "digits", {"epochs": 2, "seeds": 9})


@pytest.mark.parametrize("name", ["RATE", "helper"])
def test_a_constant_and_a_function_used_at_depth_count(monkeypatch, name):
    before = fingerprint(measure, "digits", {})
    changed = {"RATE": 0.2, "helper": lambda x: -x}[name]
    if name == "helper":
        changed.__module__ = measure.__module__
    monkeypatch.setitem(globals(), name, changed)
    assert fingerprint(measure, "digits", {}) != before


def test_a_function_reached_through_a_module_counts(monkeypatch):
    before = fingerprint(quickstart.measure, "digits", {})
    monkeypatch.setattr(speed, "SHAPES", ())
    assert fingerprint(quickstart.measure, "digits", {}) != before


def test_what_only_shows_does_not_count(monkeypatch):
    before = fingerprint(quickstart.measure, "digits", {})
    monkeypatch.setattr(quickstart, "LAYERS", ())
    monkeypatch.setattr(quickstart, "_training_section", helper)
    assert fingerprint(quickstart.measure, "digits", {}) == before


def test_a_table_of_functions_counts_the_same_in_every_process(monkeypatch):
    def digest(function):
        monkeypatch.setitem(globals(), "RATE", {"a": function})
        return fingerprint(measure, "digits", {})

    def make():
        return lambda: None

    one, other = make(), make()
    assert one is not other
    assert digest(one) == digest(other)


def test_data_and_settings_count():
    made = {
        fingerprint(measure, data, {"epochs": epochs})
        for data in ("digits", "fashion-mnist")
        for epochs in (1, 2)
    }
    assert len(made) == 4


def test_a_function_in_a_table_counts_by_its_code_and_not_by_its_address(monkeypatch):
    before = fingerprint(by_table, "digits", {})
    code = "from tests.lab.test_fingerprint import *; print(fingerprint(by_table, 'digits', {}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == before
    monkeypatch.setitem(TABLE, "first", helper)
    assert fingerprint(by_table, "digits", {}) != before
