"""More than 2^31 elements: an offset of 32 bits would read and write somewhere else.

The inputs are made on the GPU. What is expected of the first and the last samples is computed from
them alone, in float64 on the CPU.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from normally import functional, reference
from tests.device import DEVICE
from tests.helpers import assert_same_bits, assert_within

#: Input, output and their gradients, and three more for copies and what random numbers take.
TENSORS = 7
DTYPE = torch.bfloat16

#: What one call may be off by, beside bfloat16's rounding: 1e-6 of these sizes. Values are normal,
#: so that |x̂| and |g| are below 7 in as many as are looked at, and weights are at most 2.
SIZE_OF_OUTPUT = 2 * 7 + 1
SIZE_OF_GRADIENT = 2 * 7 * (2 + 7)


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """Each test starts with all of it."""
    gc.collect()
    torch.cuda.empty_cache()
    yield
    gc.collect()


def need_memory(shape: tuple[int, ...]) -> None:
    count = torch.Size(shape).numel()
    assert count > 2**31
    needed = TENSORS * count * DTYPE.itemsize
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"asks for {needed / 2**30:.0f} GiB of free memory; there are "
                    f"{free / 2**30:.0f}")  # fmt: skip


def parameters(count: int) -> tuple[Tensor, Tensor]:
    return torch.linspace(-1.5, 2.0, count), torch.linspace(1.0, -1.0, count)


#: Norms whose samples do not know each other. A call takes (module, x, weight, bias), the module
#: being `functional` or `reference`; the shape is that of x, followed by the parameters' size.
Call = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
BY_SAMPLE: dict[str, tuple[Call, tuple[int, ...], int]] = {
    "layer_norm": (
        lambda m, x, w, b: m.layer_norm(x, x.shape[-1:], w, b), (2**19 + 1, 4096), 4096,
    ),
    "layer_norm dim=1": (
        lambda m, x, w, b: m.layer_norm(x, x.shape[1:2], w, b, dim=1), (2**11 + 1, 32, 2**15), 32,
    ),
    "rms_norm": (
        lambda m, x, w, b: m.rms_norm(x, x.shape[-1:], w, 1e-6), (2**19 + 1, 4096), 4096,
    ),
    "rms_norm of short rows": (
        lambda m, x, w, b: m.rms_norm(x, x.shape[-1:], w, 1e-6), (2**25 + 1, 64), 64,
    ),
    "group_norm": (
        lambda m, x, w, b: m.group_norm(x, 8, w, b), (2**11 + 1, 32, 256, 128), 32,
    ),
    "instance_norm": (
        lambda m, x, w, b: m.group_norm(x, 32, w, b), (2**11 + 1, 32, 256, 128), 32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", BY_SAMPLE)
def test_first_and_last_samples(name: str, channels_last: bool) -> None:
    """Only these have a gradient, so that the parameters' is that of a small batch of them."""
    call, shape, count = BY_SAMPLE[name]
    if channels_last and len(shape) != 4:
        pytest.skip("channels_last is a layout of four dimensions")
    need_memory(shape)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(shape, dtype=DTYPE, device=DEVICE, memory_format=memory_format)
    x.normal_()
    ends = [0, 1, shape[0] - 2, shape[0] - 1]
    g = torch.zeros_like(x)
    for sample in ends:
        g[sample].normal_()
    leaves = [t.to(DEVICE).requires_grad_() for t in parameters(count)]
    x.requires_grad_()
    y = call(functional, x, *leaves)
    used = leaves[:1] if name.startswith("rms") else leaves
    gradients = torch.autograd.grad(y, [x, *used], g)
    del leaves

    wide = [t[ends].detach().cpu().double().requires_grad_() for t in (x,)]
    wide += [t.double().requires_grad_() for t in parameters(count)]
    expected = call(reference, *wide)
    cut = g[ends].cpu().double()
    wanted = torch.autograd.grad(expected, wide[: 1 + len(used)], cut)
    assert_within(y[ends].cpu(), expected, SIZE_OF_OUTPUT, DTYPE, "output")
    # Rows of which no gradient was asked have none, the one in the middle of memory among them.
    assert torch.count_nonzero(gradients[0][shape[0] // 2]) == 0
    assert_within(gradients[0][ends].cpu(), wanted[0], SIZE_OF_GRADIENT, DTYPE, "gradient of input")
    terms = cut.numel() / count
    for parameter, found, right in zip(("weight", "bias"), gradients[1:], wanted[1:], strict=False):
        # As many terms as have a gradient, of |x̂·g| or |g|: below 1 in the mean.
        assert_within(found.cpu(), right, terms, DTYPE, f"gradient of {parameter}")


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_batch_norm(channels_last: bool) -> None:
    """Every sample is the same one, so that a channel's statistics are those of that sample."""
    samples, *size = shape = (2**11 + 1, 32, 256, 128)
    need_memory(shape)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    one, cotangent = (torch.randn(1, *size).to(DTYPE) for _ in range(2))
    x, g = (
        torch.empty(shape, dtype=DTYPE, device=DEVICE, memory_format=memory_format).copy_(t)
        for t in (one.to(DEVICE), cotangent.to(DEVICE))
    )
    weight, bias = (t.to(DEVICE).requires_grad_() for t in parameters(32))
    mean, var = torch.zeros(32, device=DEVICE), torch.ones(32, device=DEVICE)
    x.requires_grad_()
    y = functional.batch_norm(x, mean, var, weight, bias, True, 1.0, act="silu")
    gradients = torch.autograd.grad(y, [x, weight, bias], g)

    wide = [one.double().requires_grad_()]
    wide += [t.double().requires_grad_() for t in parameters(32)]
    expected = reference.batch_norm(wide[0], None, None, *wide[1:], act="silu")
    wanted = torch.autograd.grad(expected, wide, cotangent.double())
    for sample in (0, samples // 2, samples - 1):
        assert_same_bits(y[sample], y[0], f"output of sample {sample}")
        assert_same_bits(gradients[0][sample], gradients[0][0], f"gradient of sample {sample}")
    assert_within(y[-1:].cpu(), expected, SIZE_OF_OUTPUT, DTYPE, "output")
    assert_within(gradients[0][-1:].cpu(), wanted[0], SIZE_OF_GRADIENT, DTYPE, "gradient of input")
    terms = x.numel() / 32
    for name, found, right in zip(("weight", "bias"), gradients[1:], wanted[1:], strict=True):
        assert_within(found.cpu(), samples * right, terms, DTYPE, f"gradient of {name}")
    count = x.numel() // 32
    batch = one.double().movedim(1, 0).flatten(1)
    assert_within(mean.cpu(), batch.mean(1), 1.0, torch.float32, "running_mean")
    unbiased = batch.var(1, correction=0) * count / (count - 1)
    assert_within(var.cpu(), unbiased, 1.0, torch.float32, "running_var")


def test_long_rows() -> None:
    """The offset within a row is beyond 2^31 bytes, and rows start beyond 2^31 elements.

    The rows are ±1 in turns: their mean is 0 and their variance 1, exactly.
    """
    shape = (3, 2**30)
    need_memory(shape)
    x = torch.ones(shape, dtype=DTYPE, device=DEVICE)
    x[:, ::2] = -1
    y = functional.layer_norm(x, shape[1:], eps=0.0)
    assert torch.equal(y, x)
    del y
    y = functional.rms_norm(x, shape[1:], eps=0.0)
    assert torch.equal(y, x)
    x.requires_grad_()
    for function in (functional.layer_norm, functional.rms_norm):
        y = function(x, shape[1:], eps=0.0)
        # g = x = x̂: without its part along x̂ nothing is left of it but the rounding of three 1s.
        (gradient,) = torch.autograd.grad(y, x, x.detach())
        assert float(gradient.abs().max()) <= 3e-6
        del y, gradient
