"""The same bits each time, whatever else the GPU does."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.utils.deterministic

from normally import functional
from tests.device import DEVICE, has_kernels
from tests.gpu.layers import (
    LAYERS,
    assert_same_buffers,
    assert_same_step,
    cotangent,
    make,
    sample,
    step,
)
from tests.helpers import assert_same_bits, values

REPEATS = 20
#: torch's own operators, which these two run on where they have no kernel, promise less.
OPERATORS = {"FrozenBatchNorm": "frozen_batch_norm", "LocalResponseNorm": "local_response_norm"}
NAMES = [name for name in LAYERS if name not in OPERATORS or has_kernels(OPERATORS[name])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_repeat_has_the_same_bits(name: str, dtype: torch.dtype) -> None:
    """Beside matrix products on another stream, which take the multiprocessors in turns."""
    layer, g = make(name), cotangent(name, dtype)
    first = copy.deepcopy(layer)
    expected = step(first, sample(name, dtype=dtype), g)
    other = torch.randn(2048, 2048, device=DEVICE)
    noise = torch.cuda.Stream()
    noise.wait_stream(torch.cuda.current_stream())
    for repeat in range(REPEATS):
        with torch.cuda.stream(noise):
            for _ in range(1 + repeat % 3):
                other = (other @ other).tanh_()
        twin = copy.deepcopy(layer)
        results = step(twin, sample(name, dtype=dtype), g)
        assert_same_step(results, expected, f"repeat {repeat}")
        assert_same_buffers(twin, first)
    torch.cuda.synchronize()


@pytest.fixture
def only_deterministic() -> Iterator[None]:
    """torch refuses what is not, and fills what it allocates with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("only_deterministic")
@pytest.mark.parametrize("name", NAMES)
def test_torchs_deterministic_mode(name: str) -> None:
    """It takes our operators, and what they give is written whole."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    layer, g = make(name), cotangent(name)
    twin = copy.deepcopy(layer)
    results = step(layer, sample(name), g)
    assert all(t.isfinite().all() for t in results)
    assert_same_step(results, step(twin, sample(name), g))
    assert_same_buffers(layer, twin)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    """Row norms and group norm: alone, in a small and in a large batch."""
    for shape, function in (
        ((2048, 1031), lambda x: functional.layer_norm(x, x.shape[-1:])),
        ((2048, 1031), lambda x: functional.rms_norm(x, x.shape[-1:])),
        ((256, 64, 14, 14), lambda x: functional.group_norm(x, 8)),
        ((256, 64, 14, 14), lambda x: functional.instance_norm(x)),
        ((256, 64, 14, 14), lambda x: functional.layer_norm(x, (64,), dim=1)),
    ):
        x = values(shape, torch.float32).to(DEVICE)
        together = function(x)
        for part in (slice(0, 1), slice(17, 18), slice(3, 40), slice(shape[0] - 1, None)):
            assert_same_bits(function(x[part]), together[part], f"{shape}, {part}")
