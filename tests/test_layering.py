"""Who may import whom, read from the source: the arrows of docs/architecture.md point down only."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import normally

ROOT = Path(normally.__file__).parent
LAYERS = (
    ("cli",),
    ("lab", "doctor", "bench"),
    ("surgery",),
    ("nn",),
    ("functional",),
    ("_ops",),
    ("_native", "_triton", "reference", "distributed"),
)
HEIGHT = {unit: -depth for depth, units in enumerate(LAYERS) for unit in units}
# Beside the arrows: the page, which imports nothing of ours, and what this machine is.
BESIDE = ("report", "environment")
# Those that may import less than all that is below them.
ONLY = {
    "report": set(),
    "environment": {"", "_native"},
    "lab": {
        "",
        "report",
        "environment",
        "surgery",
        "nn",
        "functional",
        "distributed",
        "reference",
        "doctor",
    },
    "bench": {"", "report", "environment", "nn", "reference", "_native"},
    "doctor": {
        "",
        "report",
        "environment",
        "surgery",
        "nn",
        "functional",
        "distributed",
        "reference",
    },
    "": {"lab", "doctor", "surgery", "nn", "functional", "distributed", "reference", "_native"},
}
# What the layers themselves need: torch and Python.
PLAIN = ("", "surgery", "nn", "functional", "distributed", "_ops", "_native", "reference")

FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


def unit_of(file: str) -> str:
    """The part of the package a file belongs to; the package's own __init__ is ''."""
    first = file.split("/")[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imports(file: str, source: str) -> Iterator[str]:
    """Absolute names of all that a file imports, wherever in it: a name in a module included."""
    package = ["normally", *file.split("/")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, node.module] if node.module else base
            yield from (".".join([*base, alias.name]) for alias in node.names)


def ours(name: str) -> str | None:
    """The unit of the package that an imported name is in, or None for another package."""
    first, *rest = name.split(".")
    if first != "normally":
        return None
    known = {*HEIGHT, *BESIDE}
    return rest[0] if rest and (rest[0] in known or rest[0].startswith("_C_")) else ""


def violations(file: str, source: str) -> list[str]:
    unit = unit_of(file)
    found = []
    for name in imports(file, source):
        target = ours(name)
        if target is None or target == unit:
            continue
        if unit in ONLY:
            allowed = target in ONLY[unit]
        elif target in ("", *BESIDE):
            allowed = unit == "cli" or (target == "" and unit == "surgery")
        else:
            allowed = HEIGHT[target] < HEIGHT[unit]
        if not allowed:
            found.append(f"{file} imports {name}")
    return found


@pytest.mark.parametrize("file", FILES)
def test_arrows_point_down(file: str) -> None:
    unit = unit_of(file)
    assert unit in {*HEIGHT, *BESIDE, ""}, f"{unit} has no place in the layers"
    assert not violations(file, (ROOT / file).read_text())


@pytest.mark.parametrize("file", [f for f in FILES if unit_of(f) == "lab"])
def test_lab_uses_public_names_only(file: str) -> None:
    tree = ast.parse((ROOT / file).read_text())
    private = [
        name
        for name in imports(file, (ROOT / file).read_text())
        if ours(name) not in (None, "lab")
        and any(part.startswith("_") and part != "__version__" for part in name.split("."))
    ]
    # normally._native.loaded by way of `import normally` is private, too.
    roots = {"normally"}
    private += [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and ast.unparse(node).split(".")[0] in roots
    ]
    assert not private


@pytest.mark.parametrize("file", [f for f in FILES if unit_of(f) in PLAIN])
def test_the_layers_need_torch_alone(file: str) -> None:
    packages = {name.split(".")[0] for name in imports(file, (ROOT / file).read_text())}
    assert packages <= {"normally", "torch", *sys.stdlib_module_names}


@pytest.mark.parametrize(("file", "source"), [
    ("report.py", "from . import nn"),
    ("report.py", "import normally"),
    ("nn/batch_norm.py", "def f():\n    from ..surgery import fuse"),
    ("nn/batch_norm.py", "import normally.lab.engine"),
    ("functional.py", "from .nn import BatchNorm1d"),
    ("_ops/batch_norm.py", "from .. import functional"),
    ("_ops/batch_norm.py", "import normally"),
    ("_native.py", "from . import _ops"),
    ("reference.py", "from . import _native"),
    ("lab/engine.py", "from .._ops import activation"),
    ("lab/experiments/quickstart.py", "from normally import _native"),
    ("bench/session.py", "from ..functional import batch_norm"),
    ("bench/session.py", "from .. import lab"),
    ("lab/engine.py", "from normally.bench import run"),
    ("__init__.py", "from .cli import main"),
])  # fmt: skip
def test_a_forbidden_arrow_is_seen(file: str, source: str) -> None:
    assert violations(file, source)


@pytest.mark.parametrize(("file", "source"), [
    ("cli.py", "from .lab.commands import app"),
    ("lab/engine.py", "from .. import report"),
    ("bench/session.py", "from .. import nn, reference, _native"),
    ("nn/batch_norm.py", "from .. import functional"),
    ("nn/batch_norm.py", "from ._location import located"),
    ("_ops/batch_norm.py", "from .. import reference\nimport torch"),
])  # fmt: skip
def test_an_arrow_that_points_down_is_allowed(file: str, source: str) -> None:
    assert not violations(file, source)
