"""The choice of a compiled library: silence where asked, one warning where it is missing."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import normally
from normally import _native, _triton

CAPABILITIES = ("default", "avx2", "avx512")
ROOT = Path(__file__).parent.parent


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`code` in a fresh interpreter in which every warning is printed."""
    kept = {
        k: v for k, v in os.environ.items() if k not in ("ATEN_CPU_CAPABILITY", "PYTHONWARNINGS")
    }
    kept.pop("NORMALLY_DISABLE_NATIVE", None)
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env={**kept, **environment}, cwd=ROOT, text=True, capture_output=True, timeout=300,
        check=False,
    )  # fmt: skip


def built(instruction_set: str) -> bool:
    return importlib.util.find_spec(f"normally._C_{instruction_set}") is not None


ONE_STEP = """
import torch, normally
layer = normally.nn.BatchNorm2d(3, act="relu")
layer(torch.randn(4, 3, 5, 5)).sum().backward()
assert layer.num_batches_tracked.item() == 1
print(normally._native.loaded, normally.backends()["cpu"])
"""


def test_disabled_it_is_the_reference_without_a_word() -> None:
    result = run(ONE_STEP, NORMALLY_DISABLE_NATIVE="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["None", "reference"]
    assert "normally" not in result.stderr


@pytest.mark.skipif(_native.loaded is None, reason="no compiled kernels here: nothing to load")
def test_loaded_without_a_word() -> None:
    result = run(ONE_STEP)
    assert result.returncode == 0, result.stderr
    assert "compiled" in result.stdout
    assert "normally" not in result.stderr


NOTHING_BUILT = """
import importlib.util, warnings
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.startswith("normally._C_") else find(name, package)
)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import normally
    import normally.nn
ours = [w for w in caught if "normally" in str(w.message)]
print(len(ours), ours[0].category.__name__, normally.backends()["cpu"], sep="|")
import torch
normally.nn.BatchNorm1d(2)(torch.randn(3, 2))
"""


def test_nothing_built_warns_once_and_works() -> None:
    result = run(NOTHING_BUILT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "1|RuntimeWarning|reference"


def test_the_warning_is_in_plain_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NORMALLY_DISABLE_NATIVE", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.warns(RuntimeWarning, match="the compiled kernels were not built") as caught:
        assert _native._load() is None
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith("normally: ")
    assert "run on the slow reference implementation instead" in message
    assert "pip install --no-build-isolation" in message


def test_a_library_that_cannot_be_loaded_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    spec = importlib.machinery.ModuleSpec("normally._C_default", None, origin=str(broken))
    monkeypatch.delenv("NORMALLY_DISABLE_NATIVE", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: spec)
    with pytest.warns(RuntimeWarning, match=r"could not be loaded \(.*broken\.so") as caught:
        assert _native._load() is None
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("capability", "expected"),
    [("AVX512", ["avx512", "avx2", "default"]), ("AVX2", ["avx2", "default"]),
     ("DEFAULT", ["default"]), ("NO AVX", ["default"]), ("SVE256", ["default"])],
)  # fmt: skip
def test_no_wider_instructions_than_torch_uses(
    capability: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.delenv("NORMALLY_DISABLE_NATIVE", raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: asked.append(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert _native._load() is None
    assert asked == [f"normally._C_{name}" for name in expected]


def test_disabled_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMALLY_DISABLE_NATIVE", "1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: pytest.fail(name))
    assert _native._load() is None


def test_backends_name_the_library() -> None:
    without = "Triton's interpreter" if _triton.device_type == "cpu" else "reference"
    assert normally.backends()["cpu"] == (
        f"compiled ({_native.loaded})" if _native.loaded else without
    )


# A few shapes on each side of what kernels block by; both walks, a tail, segments, folded rows.
NUMBERS = """
import itertools, torch, normally
from normally.functional import batch_norm
from tests.helpers import assert_same_bits, check_batch_norm, lay_out, values
assert normally._native.loaded == {expected!r}, normally._native.loaded
SHAPES = [(5, 3), (33, 17), (7, 2, 5), (3, 130, 5), (2, 3, 1025), (3, 2, 4097), (4, 5, 7, 7),
          (9, 33, 1, 1), (2, 3, 2, 3, 5), (130, 24, 4)]
ACTS = (None, *normally.reference.ACTIVATIONS)
turn = 0
for shape, dtype in itertools.product(
    SHAPES, (torch.float64, torch.float32, torch.bfloat16, torch.float16)
):
    layout = ("contiguous", "channels_last", "strided")[turn % 3]  # `make test-isa` has them all
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    x = lay_out(values(shape, dtype, seed=turn), layout)
    weight = torch.linspace(-1.5, 2, shape[1], dtype=wide)
    bias = torch.linspace(1, -1, shape[1], dtype=wide)
    residual = values(shape, dtype, seed=turn + 1) if turn % 2 else None
    check_batch_norm(x, weight, bias, residual, act=ACTS[turn % 12], training=turn % 5 != 0)
    turn += 1
for index, (shape, layout) in enumerate(itertools.product(
    [(4099, 65), (7, 1, 65537), (64, 130, 7, 7), (513, 300, 2)], ("contiguous", "channels_last")
)):
    act = (None, "relu", "gelu")[index % 3]
    x = lay_out(values(shape, torch.float32), layout)
    g = torch.empty_like(x).copy_(x.flip(0))
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        leaf = x.detach().requires_grad_()
        weight = torch.linspace(-1, 2, shape[1]).requires_grad_()
        var = torch.ones(shape[1])
        y = batch_norm(leaf, torch.zeros(shape[1]), var, weight, None, True, act=act)
        results.append((y, var, *torch.autograd.grad(y, [leaf, weight], g)))
    for one, two in zip(*results, strict=True):
        assert_same_bits(one, two, f"{{shape}} {{layout}} {{act}}")
print("right", turn)
"""


def best_of_this_machine() -> str:
    """torch takes the variable at its word: what the machine has is asked without it."""
    if "ATEN_CPU_CAPABILITY" not in os.environ:
        return torch.backends.cpu.get_cpu_capability().lower()
    asked = run("import torch; print(torch.backends.cpu.get_cpu_capability())")
    return asked.stdout.strip().lower()


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_each_library_is_loaded_and_right(capability: str) -> None:
    if not built(capability):
        pytest.skip(f"the {capability} kernels are not built here")
    best = best_of_this_machine()
    if best not in CAPABILITIES or CAPABILITIES.index(capability) > CAPABILITIES.index(best):
        pytest.skip(f"this machine has {best} at best, not {capability}")
    result = run(NUMBERS.format(expected=capability), ATEN_CPU_CAPABILITY=capability)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split() == ["right", "40"]
