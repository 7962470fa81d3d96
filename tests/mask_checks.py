"""What a mask must do in every norm: the padding is as if it were not there."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.helpers import assert_same_bits, assert_within, values
from tests.norm_helpers import call, mask_shape, normalized, sizes_of

#: What padding may hold.
GARBAGE = (math.nan, math.inf, -math.inf, 1e30)


def random_mask(
    name: str, x: Tensor, settings: dict[str, Any] | None = None, keep: float = 0.6, seed: int = 0
) -> Tensor:
    """Of the input's shape with 1 at the channels; the last position is hidden, the first kept."""
    shape = mask_shape(name, x, settings or {})
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < keep
    if mask.numel() > 1:
        mask.view(-1)[0], mask.view(-1)[-1] = True, False
    return mask


def everything(
    name: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    settings: dict[str, Any],
) -> dict[str, Tensor]:
    """Output, sum and the gradients of a fixed cotangent."""
    given = {"input": x, "residual": residual, "weight": weight, "bias": bias}
    leaves = {k: None if t is None else t.detach().requires_grad_() for k, t in given.items()}
    y, total = call(name, *leaves.values(), mask, settings)  # type: ignore[arg-type]
    g = values(tuple(y.shape), y.dtype, seed=5) if y.dim() > 1 else torch.ones_like(y)
    outputs = [y] if total is None else [y, total]
    present = {k: t for k, t in leaves.items() if t is not None}
    gradients = torch.autograd.grad(outputs, list(present.values()), [g, g.flip(0)][: len(outputs)])
    results = {"output": y.detach()}
    if total is not None:
        results["sum"] = total.detach()
    return results | {f"gradient of {k}": t for k, t in zip(present, gradients, strict=True)}


def check_padding_is_not_read(
    name: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor,
    residual: Tensor | None = None,
    **settings: Any,
) -> None:
    """Whatever the padding holds, every result has the same bits."""

    def holding(value: float) -> dict[str, Tensor]:
        filled = [
            None if t is None else torch.empty_like(t).copy_(torch.where(mask, t, value))
            for t in (x, residual)
        ]
        return everything(name, filled[0], weight, bias, filled[1], mask, settings)  # type: ignore[arg-type]

    plain = holding(0.0)
    for value in GARBAGE:
        for what, result in holding(value).items():
            assert_same_bits(result, plain[what], f"{what}, {value} in the padding")


def compacted(
    name: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor,
    settings: dict[str, Any],
) -> Tensor:
    """The norm of what is kept, taken out of the padding and put back among zeros."""
    kept = mask.expand(mask_shape(name, x, settings))
    if name in ("layer_norm", "rms_norm"):
        dim = settings.get("dim")
        last = x if dim is None else x.movedim(dim, -1)
        kept = kept if dim is None else kept.movedim(dim, -1)
        inside = len(normalized(x, settings))
        rows = kept.flatten(-inside)[..., 0]
        plain = {k: v for k, v in settings.items() if k != "dim"}
        y, _ = call(name, last[rows], None, weight, bias, None, plain)
        output = torch.zeros(last.shape, dtype=y.dtype).index_put((rows,), y)
        return output if dim is None else output.movedim(-1, dim)
    if name in ("group_norm", "instance_norm"):
        samples = []
        for sample, positions in zip(x, kept[:, 0], strict=True):
            output = torch.zeros(sample.shape, dtype=x.dtype).movedim(0, -1)
            if positions.any():
                y, _ = call(
                    name, sample[:, positions].unsqueeze(0), None, weight, bias, None, settings
                )
                output = output.index_put((positions,), y[0].T)
            samples.append(output.movedim(-1, 0))
        return torch.stack(samples)
    # The statistics are a channel's, or there are none: everything kept is one batch.
    last, kept = x.movedim(1, -1), kept[:, 0]
    rows_of_channels = last[kept]
    if name == "local_response_norm":
        rows_of_channels = rows_of_channels.unsqueeze(-1)  # it wants a position
    y, _ = call(name, rows_of_channels, None, weight, bias, None, settings)
    output = torch.zeros(last.shape, dtype=y.dtype).index_put((kept,), y.view(-1, x.shape[1]))
    return output.movedim(-1, 1)


def check_compacted(
    name: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor,
    *,
    same_bits: bool = False,
    **settings: Any,
) -> None:
    """Masked results are those of the compacted data.

    Both are within the error that `check_norm` allows of the same float64 numbers, so within twice
    that of each other; with `same_bits` output and input gradient are equal bit for bit.
    """
    results = []
    for masked in (True, False):
        leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
        if masked:
            y, _ = call(name, leaves[0], None, leaves[1], leaves[2], mask, settings)  # type: ignore[arg-type]
        else:
            y = compacted(name, *leaves, mask, settings)  # type: ignore[arg-type]
        g = values(tuple(y.shape), y.dtype, seed=5)
        present = [leaf for leaf in leaves if leaf is not None]
        gradients = iter(torch.autograd.grad(y, present, g))
        results.append([y.detach(), *(None if t is None else next(gradients) for t in leaves)])
    sizes = sizes_of(name, x.detach().double(), weight, bias, mask, x.dtype, settings)
    dz = torch.where(mask, g.double().abs(), 0.0)
    if settings.get("act") is not None:
        dz = dz * (2 + 2 * sizes.output)  # |act'| ≤ 2 and |act''| ≤ 2
    allowed = (sizes.output, *sizes.gradients(dz))
    names = ("output", "gradient of input", "gradient of weight", "gradient of bias")
    for index, (a, b, size, what) in enumerate(zip(*results, allowed, names, strict=True)):
        if a is None or b is None:
            assert a is b
        elif same_bits and index < 2:
            assert_same_bits(a, b, what)
        else:
            # assert_within allows one rounding to a's dtype; b may have gone the other way.
            assert_within(a, b.double(), 2 * size, a.dtype, what)


def check_forms(name: str, x: Tensor, mask: Tensor, channels_at: int, **settings: Any) -> None:
    """With or without the channel dimension, broadcast or spelled out: the same bits."""
    plain = everything(name, x, None, None, None, mask, settings)
    without = mask.squeeze(channels_at)
    first = without[:1]
    for form, full in (
        (without, mask),
        (without.clone(memory_format=torch.contiguous_format), mask),
        (without.mT.contiguous().mT if without.dim() > 1 else without, mask),
        (first, first.unsqueeze(channels_at).expand(mask.shape)),
        (first[0], first.unsqueeze(channels_at).expand(mask.shape)),
    ):
        wanted = plain if full is mask else everything(name, x, None, None, None, full, settings)
        for what, result in everything(name, x, None, None, None, form, settings).items():
            assert_same_bits(result, wanted[what], f"{what}, mask of shape {tuple(form.shape)}")


def check_lengths(name: str, x: Tensor, channels_at: int, **settings: Any) -> None:
    """`lengths=` is the mask that keeps what comes before them; 0 and the whole length included."""
    (position,) = (d for d in range(1, x.dim()) if d != channels_at % x.dim())
    size = x.shape[position]
    lengths = torch.linspace(size, 0, x.shape[0]).round().long()
    mask = (torch.arange(size) < lengths[:, None]).unsqueeze(channels_at)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        leaf = x.detach().requires_grad_()
        y, _ = call(name, leaf, None, None, None, None, {**settings, "lengths": lengths.to(dtype)})
        wanted = everything(name, x, None, None, None, mask, settings)
        g = values(tuple(y.shape), y.dtype, seed=5)
        assert_same_bits(y, wanted["output"], "output")
        assert_same_bits(
            torch.autograd.grad(y, leaf, g)[0], wanted["gradient of input"], "gradient of input"
        )


def check_nothing_kept(
    name: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    **settings: Any,
) -> None:
    """Zeros everywhere, from an input of NaN: no statistic, no gradient, no error."""
    mask = torch.zeros(mask_shape(name, x, settings), dtype=torch.bool)
    broken = torch.full_like(x, math.nan)
    results = everything(name, broken, weight, bias, residual, mask, settings)
    for what, result in results.items():
        assert torch.count_nonzero(result) == 0, what  # NaN is not 0


def check_gradients(
    name: str, shape: tuple[int, ...], parameters: int, mask: Tensor, **settings: Any
) -> None:
    """torch's gradcheck and gradgradcheck, with NaN in the padding."""
    x = torch.randn(shape, dtype=torch.float64)
    weight, bias = (torch.randn(parameters, dtype=torch.float64) for _ in range(2))
    given = [x, weight, bias] if parameters else [x]
    if name == "rms_norm":
        given.pop()
    leaves = [t.requires_grad_() for t in given]

    def function(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        hidden = torch.where(mask, x, math.nan)
        return call(name, hidden, None, weight, bias, mask, settings)[0]

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)
