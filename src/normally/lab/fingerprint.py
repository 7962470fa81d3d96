"""What decides a run's numbers, as one short text: under another one the run is measured again."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch

import normally


def fingerprint(measure: Any, data: str, settings: Mapping[str, Any]) -> str:
    """Digest of the code that `measure` reaches, data, settings, versions and backends.

    The number of seeds is left out: more seeds extend a finished experiment. So is all code that
    only judges or shows: a better caption does not throw an overnight run away.
    """
    decided = {key: value for key, value in settings.items() if key != "seeds"}
    facts = [data, decided, normally.__version__, torch.__version__, normally.backends()]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for part in sorted(_reached(measure, set())):
        digest.update(part.encode())
    return digest.hexdigest()[:16]


def _reached(thing: Any, seen: set[int]) -> Iterator[str]:
    """Source of a function or class and, through the names it uses, of what it reaches.

    Only what shares the function's package is followed; the rest is covered by the versions.
    """
    if id(thing) in seen:
        return
    seen.add(id(thing))
    yield inspect.getsource(thing)
    if not isinstance(thing, FunctionType):
        return
    package = _package(thing)
    names = sorted(_names(thing.__code__))
    for place in _places(thing, names):
        for name in names:
            used = place.get(name)
            if isinstance(used, bool | int | float | str | tuple | list | dict):
                # A function in a table prints its address: another one in every process.
                yield re.sub(r" at 0x[0-9a-f]+", "", f"{name}={used!r}")
            for part in _parts(used):
                if isinstance(part, FunctionType | type) and _package(part) == package:
                    yield from _reached(part, seen)


def _parts(used: Any) -> list[Any]:
    """The thing itself, or what a table of functions or classes holds."""
    if isinstance(used, dict):
        return list(used.values())
    return list(used) if isinstance(used, tuple | list) else [used]


def _places(function: FunctionType, names: list[str]) -> list[dict[str, Any]]:
    """Where its names are looked up: its globals and, for `module.name`, the package's modules."""
    known: set[str] = set()
    places = [function.__globals__]
    for place in places:  # grows on the way
        for used in map(place.get, names):
            if isinstance(used, ModuleType) and _package(used) == _package(function):
                places += [] if used.__name__ in known else [vars(used)]
                known.add(used.__name__)
    return places


def _package(thing: FunctionType | type | ModuleType) -> str:
    module = thing.__name__ if isinstance(thing, ModuleType) else thing.__module__
    return module.partition(".")[0]


def _names(code: CodeType) -> set[str]:
    """The names that a function uses, those inside its inner functions included."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names, inner))
