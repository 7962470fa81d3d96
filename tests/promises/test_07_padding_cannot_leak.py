"""Promise 7: padding cannot leak, into nothing and whatever it holds; every norm has the same mask.

Compared are bits: what a mask hides must not even round another way.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from normally import nn
from tests import norms
from tests.helpers import DTYPES, assert_same_bits, assert_within, lay_out, values
from tests.norms import Norm, Shape

PADDING = (math.nan, math.inf, -math.inf, 1e30, 3.0)


NORMS = (*norms.ALL, norms.BATCH, norms.FROZEN, norms.EVALUATION)


def padded(x: Tensor, mask: Tensor, padding: float, layout: str) -> Tensor:
    """`x` with what is hidden replaced, rounded to its dtype."""
    return lay_out(torch.where(mask, x, torch.tensor(padding).to(x.dtype)), layout)


def everything(
    norm: Norm, x: Tensor, g: Tensor, mask: Tensor | None, residual: Tensor | None = None
) -> dict[str, Tensor]:
    """Outputs and all gradients of one call."""
    weight, bias = norm.parameters(tuple(x.shape), x.dtype)
    given = {"input": x, "weight": weight, "bias": bias, "residual": residual}
    leaves = {name: t.detach().requires_grad_() for name, t in given.items() if t is not None}
    arguments = leaves.get("weight"), leaves.get("bias")
    if residual is None:
        options = {"act": "sigmoid"} if norm.has_act else {}  # not 0 at 0
        outputs: tuple[Tensor, ...] = (
            norm.ours(leaves["input"], *arguments, mask=mask, **options),
        )
    else:
        assert norm.adds is not None
        outputs = norm.adds(leaves["input"], leaves["residual"], *arguments, mask=mask)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), [g] * len(outputs))
    return {
        **{f"output {i}": y for i, y in enumerate(outputs)},
        **{f"gradient of {name}": d for name, d in zip(leaves, gradients, strict=True)},
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("norm", "shape"), norms.cases(NORMS))
def test_what_is_hidden_has_no_influence(norm: Norm, shape: Shape, dtype: torch.dtype) -> None:
    """On outputs, gradients of everything and their bits; the incoming gradient is hidden, too."""
    x, g = values(shape, dtype), values(shape, dtype, seed=1)
    for mask in (norm.mask(shape), norm.mask(shape, whole_rows=True)):
        for layout in ("contiguous", "channels_last", "strided"):
            clean = None
            for padding in PADDING:
                found = everything(
                    norm, padded(x, mask, padding, layout), padded(g, mask, padding, layout), mask
                )
                clean = clean or found
                for name, value in found.items():
                    assert value.isfinite().all(), (name, padding, layout)
                    assert_same_bits(value, clean[name], f"{name}, {padding}, {layout}")
                    if name in ("output 0", "gradient of input"):
                        hidden = value.masked_select(~mask.expand(shape))
                        assert torch.count_nonzero(hidden) == 0, (name, padding, layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", norms.WITH_RESIDUAL, ids=str)
def test_nor_in_a_sum(norm: Norm, dtype: torch.dtype) -> None:
    for shape in norm.shapes:
        x, residual, g = (values(shape, dtype, seed=seed) for seed in range(3))
        for mask in (norm.mask(shape), norm.mask(shape, whole_rows=True)):
            clean = None
            for padding in PADDING:
                given = [padded(t, mask, padding, "contiguous") for t in (x, g, residual)]
                found = everything(norm, given[0], given[1], mask, given[2])
                clean = clean or found
                for name, value in found.items():
                    assert value.isfinite().all(), (name, padding)
                    assert_same_bits(value, clean[name], f"{name}, {padding}, {shape}")
                    if value.shape == shape and "weight" not in name and "bias" not in name:
                        hidden = value.masked_select(~mask.expand(shape))
                        assert torch.count_nonzero(hidden) == 0, (name, padding)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("norm", "shape"), norms.cases(NORMS))
def test_what_is_kept_is_the_formula_of_it(norm: Norm, shape: Shape, dtype: torch.dtype) -> None:
    x = values(shape, dtype)
    weight, bias = norm.parameters(shape, dtype)
    for mask in (norm.mask(shape), norm.mask(shape, whole_rows=True)):
        expected = norm.formula(x.double(), weight, bias, mask=mask)
        # Terms of up to 2 times x̂; llama rounds once more, before the weight.
        size = 4 * (1 + expected.abs())
        if "llama" in norm.name and dtype is not torch.float64:
            size = size + torch.finfo(dtype).eps / 1e-6 * expected.abs()
        for layout in ("contiguous", "channels_last", "strided"):
            y = norm.ours(padded(x, mask, math.nan, layout), weight, bias, mask=mask)
            assert_within(y, expected, size, dtype, f"output, {layout}")


@pytest.mark.parametrize("norm", [n for n in NORMS if n.num_dims in (None, 1)], ids=str)
def test_lengths_are_a_mask(norm: Norm) -> None:
    """And kept values alone give the same: a sample of length n is that sample cut at n."""
    positions = 2 if norm.channel_dim == 1 else 1
    shape = (5, 8, 9) if positions == 2 else (5, 9, 8)
    lengths = torch.tensor([9, 1, 4, 0, 6])
    kept = (torch.arange(9) < lengths.view(-1, 1)).unsqueeze(norm.channel_dim)
    x = padded(values(shape, torch.float32), kept, math.nan, "contiguous")
    weight, bias = norm.parameters(shape)
    y = norm.ours(x, weight, bias, lengths=lengths)
    assert_same_bits(y, norm.ours(x, weight, bias, mask=kept))
    assert_same_bits(y, norm.ours(x, weight, bias, mask=kept.squeeze(norm.channel_dim)))
    assert torch.count_nonzero(y[3]) == 0
    if norm is norms.BATCH:
        return  # its samples share their statistics
    for sample, length in enumerate(lengths):
        if length > 1:  # instance norm refuses one value alone
            cut = norm.ours(x.narrow(positions, 0, length)[sample : sample + 1], weight, bias)
            torch.testing.assert_close(
                y.narrow(positions, 0, length)[sample : sample + 1], cut, rtol=1e-6, atol=2e-6
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("norm", "shape"), norms.cases(NORMS))
def test_nothing_kept(norm: Norm, shape: Shape, dtype: torch.dtype) -> None:
    x = torch.full(shape, math.nan, dtype=dtype)
    for mask in (norm.mask(shape), norm.mask(shape, whole_rows=True)):
        nothing = torch.zeros_like(mask)
        for layout in ("contiguous", "channels_last"):
            for name, value in everything(norm, lay_out(x, layout), x, nothing).items():
                assert torch.count_nonzero(value) == 0, name  # NaN counts as not zero
            if norm.adds is not None:
                found = everything(norm, lay_out(x, layout), x, nothing, lay_out(x, layout))
                for name, value in found.items():
                    assert torch.count_nonzero(value) == 0, name


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_everything_kept_is_no_mask(norm: Norm) -> None:
    """To rounding: a mask may take another way through the same sums."""
    for shape in norm.shapes:
        x, g = values(shape, torch.float32), values(shape, torch.float32, seed=1)
        mask = torch.ones_like(norm.mask(shape))
        plain, masked = everything(norm, x, g, None), everything(norm, x, g, mask)
        for name, value in masked.items():
            size = float(plain[name].detach().abs().max()) * max(1, x.numel() / 1000)
            torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=2e-6 * size, msg=name)


LAYERS = {
    "BatchNorm1d": lambda momentum: nn.BatchNorm1d(3, momentum=momentum),
    "BatchNorm1d with act": lambda momentum: nn.BatchNorm1d(3, momentum=momentum, act="silu"),
    "InstanceNorm1d": lambda momentum: nn.InstanceNorm1d(
        3, momentum=momentum, affine=True, track_running_stats=True
    ),
}


@pytest.mark.usefixtures("born_on_device")
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("layer", LAYERS)
def test_an_all_masked_batch_leaves_every_buffer(layer: str, momentum: float | None) -> None:
    module = LAYERS[layer](momentum)
    module(values((4, 3, 7), torch.float32))
    before = {name: value.clone() for name, value in module.named_buffers()}
    for padding in PADDING:
        x = torch.full((4, 3, 7), padding, requires_grad=True)
        for arguments in (
            {"mask": torch.zeros(4, 7, dtype=torch.bool)},
            {"lengths": torch.zeros(4, dtype=torch.int64)},
        ):
            y = module(x, **arguments)
            assert torch.count_nonzero(y) == 0
            y.backward(torch.full_like(y, math.nan))
            assert x.grad is not None
            assert torch.count_nonzero(x.grad) == 0
            for name, value in module.named_buffers():
                assert_same_bits(value, before[name], name)
    for parameter in module.parameters():
        assert torch.count_nonzero(parameter.grad) == 0


@pytest.mark.usefixtures("born_on_device")
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("layer", LAYERS)
def test_running_statistics_see_what_is_kept(layer: str, momentum: float | None) -> None:
    """Twice with other padding: the same bits, and those of a batch that has no padding."""
    lengths = torch.tensor([7, 2, 5, 4])
    kept = (torch.arange(7) < lengths.view(-1, 1)).unsqueeze(1)
    x = values((4, 3, 7), torch.float32)
    states = []
    for padding in PADDING:
        module = LAYERS[layer](momentum)
        module(padded(x, kept, padding, "contiguous"), lengths=lengths)
        states.append(dict(module.named_buffers()))
        for name, value in states[-1].items():
            assert value.isfinite().all()
            assert_same_bits(value, states[0][name], f"{name}, {padding}")
    samples = [sample[:, :n] for sample, n in zip(x.double(), lengths, strict=True)]
    if layer.startswith("BatchNorm"):
        together = torch.cat(samples, 1)
        mean, var = together.mean(1), together.var(1)
    else:
        mean = sum(s.mean(1) * s.shape[1] for s in samples) / lengths.sum()
        var = sum(s.var(1, correction=0) * s.shape[1] for s in samples) / lengths.sum()
        m = float(lengths.double().mean())
        var = var * m / (m - 1)
    momentum = 1.0 if momentum is None else momentum
    expected = momentum * mean, (1 - momentum) + momentum * var
    torch.testing.assert_close(states[0]["running_mean"].double(), expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(states[0]["running_var"].double(), expected[1], rtol=1e-6, atol=0)
