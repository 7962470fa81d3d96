"""The public face: `__all__` is there, is right, and everything in it explains itself."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path
from types import ModuleType

import pytest

import normally

# The modules that a user imports from. What lies in a package is reached through the package, and
# `cli` is run, not imported.
PUBLIC = (
    "normally",
    *(
        f"normally.{info.name}"
        for info in pkgutil.iter_modules(normally.__path__)
        if not info.name.startswith("_") and info.name != "cli"
    ),
)

# Fixed by the project's plan: other people's tests run against these names.
PROMISED = {
    "normally": {
        "functional", "nn", "reference", "distributed", "backends", "create_norm", "accumulate",
        "adapt", "recalibrate",
        "convert_sync_batchnorm", "revert_sync_batchnorm", "__version__",
    },
    "normally.functional": {
        "add_layer_norm", "add_rms_norm", "batch_norm", "frozen_batch_norm", "group_norm",
        "instance_norm", "layer_norm", "local_response_norm", "rms_norm",
    },
    "normally.nn": {
        "BatchNorm1d", "BatchNorm2d", "BatchNorm3d",
        "LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d",
        "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d",
        "LazyInstanceNorm1d", "LazyInstanceNorm2d", "LazyInstanceNorm3d",
        "SyncBatchNorm", "FrozenBatchNorm", "GroupNorm", "LayerNorm", "LocalResponseNorm",
        "RMSNorm", "create_norm",
    },
}  # fmt: skip


def test_the_public_modules_are_found() -> None:
    assert {"normally.functional", "normally.nn", "normally.reference"} <= set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_all_exists_and_its_names_exist(name: str) -> None:
    module = importlib.import_module(name)
    exported = module.__all__
    assert len(exported) == len(set(exported)), "a name twice"
    missing = [n for n in exported if not hasattr(module, n)]
    assert not missing
    assert not [n for n in exported if n.startswith("_") and n != "__version__"]


@pytest.mark.parametrize("name", PUBLIC)
def test_all_leaves_nothing_out(name: str) -> None:
    """What a public module defines itself without an underscore is in `__all__`."""
    module = importlib.import_module(name)
    own = {
        n
        for n, value in vars(module).items()
        if not n.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == name
    }
    assert own <= set(module.__all__)


@pytest.mark.parametrize("name", PROMISED)
def test_promised_names(name: str) -> None:
    assert set(importlib.import_module(name).__all__) >= PROMISED[name]


@pytest.mark.parametrize("name", PUBLIC)
def test_everything_public_has_a_docstring(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    silent = []
    for exported in module.__all__:
        value = getattr(module, exported)
        if inspect.isfunction(value) and not value.__doc__:
            silent.append(exported)
        if inspect.isclass(value):
            # Its own: a class that inherits a docstring explains its parent.
            fields = getattr(value, "__dataclass_fields__", {})
            members = {n: m for n, m in vars(value).items() if n not in fields}
            silent += [exported] * (not members.get("__doc__"))
            silent += [
                f"{exported}.{n}"
                for n, member in members.items()
                if not n.startswith("_")
                and (inspect.isfunction(member) or isinstance(member, property))
                and not member.__doc__
            ]
    assert not silent


def test_the_root_package_defines_nothing_itself() -> None:
    """It holds the public names and nothing else."""
    tree = ast.parse(Path(inspect.getfile(normally)).read_text())
    kinds = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Expr)
    assert all(isinstance(node, kinds) for node in tree.body)


def test_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    assert normally.__version__ == version("normally")


def test_modules_in_all_are_importable_by_that_path() -> None:
    for name in normally.__all__:
        value = getattr(normally, name)
        if isinstance(value, ModuleType):
            assert importlib.import_module(f"normally.{name}") is value
