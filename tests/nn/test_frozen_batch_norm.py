"""FrozenBatchNorm: constants that no optimizer sees, others' state dicts, and nothing saved."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from normally import nn, reference
from tests.helpers import assert_same_bits, values
from tests.nn.layer_checks import (
    check_copies,
    check_located,
    check_meta,
    check_symbolic_tracing,
)

# torch's compiler and forward mode load its own deprecated decompositions.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

KEYS = ["weight", "bias", "running_mean", "running_var"]


class Frozen(torch.nn.Module):
    """The buffers of torchvision's, detectron2's and timm's frozen layers, in their order."""

    def __init__(self, num_features: int, version: int) -> None:
        super().__init__()
        self._version = version
        for key in KEYS:
            self.register_buffer(key, torch.rand(num_features) + 0.5)


def filled(num_features: int = 3, **options: Any) -> nn.FrozenBatchNorm:
    layer = nn.FrozenBatchNorm(num_features, **options)
    for buffer in layer.buffers():
        torch.nn.init.uniform_(buffer, 0.5, 1.5)
    return layer


def test_construction() -> None:
    parameters = inspect.signature(nn.FrozenBatchNorm).parameters
    assert list(parameters) == ["num_features", "eps", "device", "dtype"]
    assert list(inspect.signature(nn.FrozenBatchNorm.forward).parameters)[1:] == [
        "input", "mask", "lengths",
    ]  # fmt: skip
    layer = nn.FrozenBatchNorm(3, 1e-3)
    assert repr(layer) == "FrozenBatchNorm(3, eps=0.001)"
    assert list(layer.parameters()) == []
    assert list(layer.state_dict()) == KEYS
    assert not isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)
    for dtype in (torch.float64, torch.bfloat16):
        assert {t.dtype for t in nn.FrozenBatchNorm(3, dtype=dtype).buffers()} == {dtype}


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 2), (4, 3, 5, 2, 1), (0, 3, 5)])
def test_any_rank_in_every_mode(shape: tuple[int, ...]) -> None:
    layer = filled()
    before = copy.deepcopy(layer.state_dict())
    x = values(shape, torch.float32)
    expected = reference.batch_norm(
        x, layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.eps
    )
    for training in (True, False):
        torch.testing.assert_close(layer.train(training)(x), expected)
    for key, value in layer.state_dict().items():
        assert_same_bits(value, before[key], key)


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
@pytest.mark.parametrize("affine", [True, False])
def test_state_dicts_of_batch_norm_both_ways(name: str, affine: bool) -> None:
    theirs = getattr(torch.nn, name)(3, affine=affine)
    for tensor in theirs.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) + 0.5)
    ours = filled()
    state = theirs.state_dict()
    ours.load_state_dict(state)
    assert "num_batches_tracked" in state  # what the caller passed is not changed
    x = values((4, 3, *(2,) * int(name[-2])), torch.float32)
    torch.testing.assert_close(ours(x), theirs.eval()(x))
    if affine:
        back = getattr(torch.nn, name)(3)
        back.load_state_dict(ours.state_dict())
        torch.testing.assert_close(back.eval()(x), ours(x))
    else:
        assert torch.equal(ours.weight, torch.ones(3))
        assert torch.equal(ours.bias, torch.zeros(3))


@pytest.mark.parametrize("version", [1, 2, 3])
def test_state_dicts_of_others_frozen_layers_both_ways(version: int) -> None:
    theirs, ours = torch.nn.Sequential(Frozen(3, version)), torch.nn.Sequential(filled())
    for source, target in ((theirs, ours), (ours, theirs)):
        for tensor in source.state_dict().values():
            torch.nn.init.uniform_(tensor)
        target.load_state_dict(source.state_dict())
        for key, value in source.state_dict().items():
            assert_same_bits(target.state_dict()[key], value, key)


def test_a_state_dict_without_statistics_is_refused() -> None:
    state = torch.nn.GroupNorm(1, 3).state_dict()
    with pytest.raises(RuntimeError, match=r'Missing key\(s\).*"running_mean", "running_var"'):
        filled().load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*weight"):
        filled().load_state_dict({"other": torch.zeros(3)})


def test_nothing_of_the_inputs_size_is_saved() -> None:
    layer = filled(8)
    x = torch.randn(4, 8, 32, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    assert sum(t.numel() for t in saved) <= 4 * 8
    y.sum().backward()
    scale = layer.weight / (layer.running_var + layer.eps).sqrt()
    torch.testing.assert_close(x.grad, scale.view(1, 8, 1).expand(4, 8, 32))


def test_nothing_of_the_inputs_size_is_saved_by_a_compiled_graph() -> None:
    layer = filled(8)
    x = torch.randn(4, 8, 32, requires_grad=True)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert_same_bits(y, layer(x))
    saved: list[Tensor] = list(y.grad_fn.saved_tensors)
    assert sum(t.numel() for t in saved) <= 4 * 8
    g = torch.randn(y.shape)
    assert_same_bits(torch.autograd.grad(y, x, g)[0], torch.autograd.grad(layer(x), x, g)[0])


def test_gradients() -> None:
    layer = filled(dtype=torch.float64)
    x = values((2, 3, 4), torch.float64).requires_grad_()
    mask = torch.rand(2, 4) < 0.5
    for call in (layer, lambda x: layer(x, mask), lambda x: layer(x).square()):
        assert torch.autograd.gradcheck(call, x, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(call, x)


def test_transforms() -> None:
    layer = filled(dtype=torch.float64)
    x = values((5, 2, 3, 4), torch.float64)

    def loss(x: Tensor) -> Tensor:
        return layer(x).sin().sum()

    expected = torch.stack([torch.func.grad(loss)(sample) for sample in x])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), expected)
    leaf = x[0].clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(loss(leaf), leaf)[0], expected[0])
    _, tangent = torch.func.jvp(loss, (x[0],), (x[1],))
    torch.testing.assert_close(tangent, (expected[0] * x[1]).sum())


def test_a_mask_and_lengths() -> None:
    layer = filled()
    x = values((3, 3, 5), torch.float32)
    mask = torch.arange(5) < torch.tensor([[5], [0], [2]])
    padded = x.where(mask[:, None], torch.nan).requires_grad_()
    y = layer(padded, mask)
    assert_same_bits(y, layer(x).where(mask[:, None], 0.0))
    assert_same_bits(layer(padded, lengths=mask.sum(1)), y)
    y.square().sum().backward()
    assert torch.equal(padded.grad != 0, mask[:, None].expand(3, 3, 5))


def test_copies_tracing_and_meta() -> None:
    x = values((4, 3, 5), torch.float32)
    check_copies(filled(), x)
    check_symbolic_tracing(filled(), x, torch.rand(4, 5) < 0.5)
    check_meta(nn.FrozenBatchNorm(3, device="meta"), (4, 3, 5))


def test_refused_with_the_path() -> None:
    x = values((4, 3, 5), torch.float32)
    make = nn.FrozenBatchNorm
    check_located(lambda: make(4), x, ValueError, "running_mean should contain 3 elements not 4")
    check_located(lambda: make(3), x[0, 0], ValueError, "at least 2 dimensions (N, C, *). Got 1D")
    check_located(lambda: make(3), x.long(), TypeError, "input must be one of")
    check_located(lambda: make(3), x.double(), TypeError, "weight must be torch.float64")
    check_located(lambda: make(3, -1.0), x, ValueError, "eps must be non-negative")
    check_located(lambda: make(3), x.to("meta"), ValueError, "on the same device")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_with_buffers_of_either_dtype(dtype: torch.dtype) -> None:
    x = values((4, 3, 5), dtype).requires_grad_()
    for layer in (filled(), filled(dtype=dtype)):
        y = layer(x)
        y.sum().backward()
        assert y.dtype is dtype
        assert x.grad is not None
        assert x.grad.dtype is dtype
