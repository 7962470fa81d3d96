import pytest

from normally.lab import speed
from normally.lab.experiments import quickstart
from normally.lab.fingerprint import fingerprint

RATE = 0.1


def made():
    """A new function at a new address each time, as each process has it."""
    return lambda x: x


MAKERS = {"a": made()}


def helper(x):
    return MAKERS["a"](x) * RATE


def measure(run):
    def inner():
        return helper(run)

    return inner()


def test_it_is_stable_and_takes_no_notice_of_the_number_of_seeds():
    one = fingerprint(measure, "digits", {"seeds": 3, "epochs": 2})
    assert one == fingerprint(measure, "digits", {"epochs": 2, "seeds": 9})


def test_the_address_of_a_function_in_a_container_does_not_count(monkeypatch):
    before, first = fingerprint(measure, "digits", {}), MAKERS["a"]
    monkeypatch.setitem(globals(), "MAKERS", {"a": made()})
    assert MAKERS["a"] is not first
    assert fingerprint(measure, "digits", {}) == before
    monkeypatch.setitem(globals(), "MAKERS", {"b": made()})
    assert fingerprint(measure, "digits", {}) != before


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


def test_data_and_settings_count():
    made = {
        fingerprint(measure, data, {"epochs": epochs})
        for data in ("digits", "fashion-mnist")
        for epochs in (1, 2)
    }
    assert len(made) == 4
