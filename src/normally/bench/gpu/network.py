"""The training step of ResNet-50 under bfloat16 autocast, channels_last, with SGD."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..measure import Spread, Step, speedup
from . import resnet
from .results import Network

TITLE = "ResNet-50 training step, bfloat16 autocast, channels_last"
#: The goal is for the last one, which a model gets by using our layers' options.
TORCH_NET, PLAIN, FUSED = "torch", "normally, norms alone", "normally, with sum and ReLU"
_VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    TORCH_NET: copy.deepcopy,
    PLAIN: resnet.with_ours,
    FUSED: resnet.with_fused,
}
_BATCHES = (256, 128, 64)
_ROUNDS, _STEPS = 5, 4


def measure(device: torch.device, side: int = 224) -> Network:
    """Each variant's steps in turns, at the largest batch that all of them have room for.

    Raises:
        ImportError: where there is no library with the network.
    """
    model, source = resnet.load()
    for batch in _BATCHES:
        with suppress(torch.cuda.OutOfMemoryError), _cudnn_benchmark():
            return time_variants(model, source, batch, side, device)
        torch.cuda.empty_cache()
    raise RuntimeError(f"bench.gpu: there is no memory for a batch of {_BATCHES[-1]} images")


def time_variants(
    model: nn.Module, source: str, batch: int, side: int, device: torch.device
) -> Network:
    """From the same weights, on the same images."""
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randn(batch, 3, side, side, generator=generator, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), generator=generator, device=device)
    steps: dict[str, Step] = {}
    loss: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, change in _VARIANTS.items():
        try:
            step = make_training_step(change(model), images, labels, device)
            loss[name] = step().item()
            step()
            steps[name] = step
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # the others are still timed
            failed[name] = f"{type(error).__name__}: {error}"
    times = _interleave(steps, device)
    return Network(
        title=TITLE,
        source=source,
        batch=batch,
        seconds={name: Spread.of(values) for name, values in times.items()},
        speedup={
            name: speedup(values, times[TORCH_NET])
            for name, values in times.items()
            if name != TORCH_NET and TORCH_NET in times
        },
        loss=loss,
        failed=failed,
    )


def make_training_step(
    model: Any, images: Tensor, labels: Tensor, device: torch.device
) -> Callable[[], Tensor]:
    """Forward, loss, backward and update; returns the loss. The model moves to the device."""
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _interleave(steps: Mapping[str, Step], device: torch.device) -> dict[str, list[float]]:
    """Seconds a step, several in flight, one entry a round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(_ROUNDS):
        for name, step in steps.items():
            _wait(device)
            start = time.perf_counter()
            for _ in range(_STEPS):
                step()
            _wait(device)
            times[name].append((time.perf_counter() - start) / _STEPS)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _cudnn_benchmark() -> Iterator[None]:
    """Convolutions by the fastest algorithm, as in training."""
    cudnn = torch.backends.cudnn
    # Not by assignment, which torch forbids once its own test tools have been imported.
    with cudnn.flags(
        enabled=cudnn.enabled, benchmark=True, deterministic=cudnn.deterministic,
        allow_tf32=cudnn.allow_tf32,
    ):  # fmt: skip
        yield
