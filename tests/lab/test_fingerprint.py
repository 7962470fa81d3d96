import pytest

from normally.lab import speed
from normally.lab.experiments import quickstart
from normally.lab.fingerprint import fingerprint

RATE = 0.1


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
