"""Nothing waits for the GPU: the host runs ahead of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from normally import functional
from tests.device import DEVICE
from tests.gpu.layers import LAYERS, cotangent, make, sample, step, warmed_up
from tests.helpers import values

# torch's words whenever the mode is set.
pytestmark = pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")


@pytest.fixture
def refuse_to_wait() -> Iterator[Callable[[], None]]:
    """A function that makes every synchronization an error until the test ends."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def test_a_synchronization_would_be_seen(refuse_to_wait: Callable[[], None]) -> None:
    x = torch.ones(3, device=DEVICE)
    refuse_to_wait()
    with pytest.raises(RuntimeError, match="synchronizing"):
        x.sum().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_backward(
    name: str, dtype: torch.dtype, refuse_to_wait: Callable[[], None]
) -> None:
    layer, x, g = make(name), sample(name, dtype=dtype), cotangent(name, dtype)
    warmed_up(layer, x, g)
    refuse_to_wait()
    for _ in range(3):
        step(layer, x, g)


#: (input, residual, mask) -> output. Not batch norm in training with a mask: an error for one
#: value a channel asks how many a mask keeps.
MASKED: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "layer_norm": (
        (64, 32, 256), lambda x, r, mask: functional.layer_norm(x, (256,), mask=mask[..., 0]),
    ),
    "add_layer_norm": (
        (64, 32, 256),
        lambda x, r, mask: functional.add_layer_norm(x, r, (256,), mask=mask[..., 0])[0],
    ),
    "add_rms_norm": (
        (64, 32, 256),
        lambda x, r, mask: functional.add_rms_norm(x, r, (256,), mask=mask[..., 0])[0],
    ),
    "group_norm": (
        (16, 32, 256), lambda x, r, mask: functional.group_norm(x, 8, mask=mask[:, 0]),
    ),
    "instance_norm": (
        (16, 32, 256), lambda x, r, mask: functional.instance_norm(x, mask=mask[:, 0]),
    ),
    "batch_norm in evaluation": (
        (16, 32, 256),
        lambda x, r, mask: functional.batch_norm(
            x, x.detach()[0, :, 0], x.detach()[0, :, 1].abs(), residual=r, act="relu",
            mask=mask[:, 0],
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKED)
def test_with_masks_and_residuals(name: str, refuse_to_wait: Callable[[], None]) -> None:
    shape, function = MASKED[name]
    x, residual, g = (values(shape, torch.float32, seed=s).to(DEVICE) for s in range(3))
    x.requires_grad_()
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)).to(DEVICE) < 0.7
    for attempt in range(2):
        if attempt == 1:  # all is compiled
            torch.cuda.synchronize()
            refuse_to_wait()
        torch.autograd.grad(function(x, residual, mask), x, g)
