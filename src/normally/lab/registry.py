"""Every module in `experiments/` is an experiment; a new file needs no registration."""

from __future__ import annotations

import difflib
import importlib
import pkgutil

from . import experiments as _package
from .experiment import Experiment


def experiments() -> dict[str, Experiment]:
    """All experiments by name, in alphabetical order."""
    found = {}
    for module in pkgutil.iter_modules(_package.__path__, f"{_package.__name__}."):
        experiment = importlib.import_module(module.name).EXPERIMENT
        found[experiment.name] = experiment
    return dict(sorted(found.items()))


def find(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
        ValueError: if there is none; the message names the nearest.
    """
    known = experiments()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ValueError(f"lab: experiment must be one of {', '.join(known)}. Got {name!r}.{hint}")
