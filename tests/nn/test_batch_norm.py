"""BatchNorm1d, 2d, 3d: torch's signature, classes and behaviour, then what is ours."""

from __future__ import annotations

import copy
import inspect
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from normally import nn, reference
from tests.helpers import assert_same_bits, on_device, values
from tests.test_reference import EXAMPLE, FIRST_ROW_UNBIASED, SIX_DECIMALS

SHAPES = {"BatchNorm1d": (6, 3, 4), "BatchNorm2d": (6, 3, 4, 2), "BatchNorm3d": (6, 3, 2, 1, 2)}
NAMES = tuple(SHAPES)
EVERY = (*NAMES, *(f"Lazy{name}" for name in NAMES))
OURS = (
    "act", "act_param", "channel_dim", "unbiased", "correction", "on_single_value",
    "memory_efficient",
)  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_signature_is_torchs_then_ours_by_keyword(name: str) -> None:
    theirs = inspect.signature(getattr(torch.nn, name)).parameters
    ours = inspect.signature(getattr(nn, name)).parameters
    by_position = [p for p in theirs.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    for parameter, expected in zip(ours.values(), by_position, strict=False):
        assert (parameter.name, parameter.kind) == (expected.name, expected.kind)
        assert parameter.default == expected.default, parameter.name
    by_keyword = list(ours.values())[len(by_position) :]
    assert all(p.kind is p.KEYWORD_ONLY for p in by_keyword)
    # torch has `bias` by keyword from 2.13 on; before, it is ours.
    assert [p.name for p in by_keyword] == ["bias", *OURS]
    for parameter in set(theirs) - {p.name for p in by_position}:
        assert ours[parameter].default == theirs[parameter].default


@pytest.mark.parametrize("name", NAMES)
def test_forward_takes_a_residual_and_masks(name: str) -> None:
    parameters = inspect.signature(getattr(nn, name).forward).parameters
    assert list(parameters)[:4] == ["self", "input", "residual", "mask"]
    assert parameters["residual"].default is parameters["mask"].default is None


@pytest.mark.parametrize("name", NAMES)
def test_what_recognizes_torchs_layers_recognizes_ours(name: str) -> None:
    from torch.nn.modules import batchnorm

    layer, lazy = getattr(nn, name)(3), getattr(nn, f"Lazy{name}")()
    for base in (getattr(torch.nn, name), batchnorm._BatchNorm, batchnorm._NormBase):
        assert isinstance(layer, base)
    for base in (getattr(torch.nn, f"Lazy{name}"), batchnorm._BatchNorm, batchnorm._LazyNormBase):
        assert isinstance(lazy, base)
    lazy(torch.randn(SHAPES[name]))
    assert type(lazy) is getattr(nn, name)
    others = [getattr(torch.nn, other) for other in NAMES if other != name]
    assert not isinstance(layer, (*others, torch.nn.SyncBatchNorm))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("track", [True, False])
def test_same_numbers_as_torch_over_training_and_evaluation(
    track: bool, momentum: float | None, name: str
) -> None:
    for affine, bias in ((True, True), (True, False), (False, True)):
        options: dict[str, Any] = {
            "momentum": momentum, "affine": affine, "track_running_stats": track,
        }  # fmt: skip
        theirs = getattr(torch.nn, name)(3, **options)
        ours = getattr(nn, name)(3, bias=bias, **options)
        if affine:
            torch.nn.init.uniform_(theirs.weight)
            torch.nn.init.uniform_(theirs.bias)
        if affine and not bias:
            theirs.register_parameter("bias", None)
        ours.load_state_dict(theirs.state_dict())
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
        for step, training in enumerate((True, True, False, True)):
            x = values(SHAPES[name], torch.float32, seed=step)
            y = ours.train(training)(x)
            # float32 from both sides, outputs of unit scale
            torch.testing.assert_close(y, theirs.train(training)(x), rtol=1e-5, atol=1e-5)
            assert list(ours.state_dict()) == list(theirs.state_dict())
            for key, value in theirs.state_dict().items():
                torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_statistics_that_are_there_but_not_tracked(name: str) -> None:
    """torch's switch after construction: training leaves them alone, evaluation uses them."""
    layer = getattr(nn, name)(3)
    layer.running_mean.fill_(0.5)
    layer.track_running_stats = False
    before = copy.deepcopy(layer.state_dict())
    x = values(SHAPES[name], torch.float32)
    torch.testing.assert_close(layer(x).detach(), reference.batch_norm(x))
    for key, value in layer.state_dict().items():
        assert_same_bits(value, before[key], key)
    expected = reference.batch_norm(x, layer.running_mean, layer.running_var)
    torch.testing.assert_close(layer.eval()(x).detach(), expected)


def test_evaluation_changes_nothing() -> None:
    layer = nn.BatchNorm2d(3).eval()
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(4, 3, 5, 5)).sum().backward()
    for key, value in layer.state_dict().items():
        assert_same_bits(value, before[key], key)


@pytest.mark.parametrize("name", NAMES)
def test_cumulative_average_is_that_of_the_population(name: str) -> None:
    layer = getattr(nn, name)(3, momentum=None)
    batches = [values(SHAPES[name], torch.float32, seed=seed) for seed in range(5)]
    for batch in batches:
        layer(batch)
    mean, var = reference.population_statistics(batches)
    # Five roundings of float32 buffers.
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_channel_dim_last_is_the_transposed_call(name: str) -> None:
    x = values(SHAPES[name], torch.float32)
    residual = values(SHAPES[name], torch.float32, seed=1)
    first = getattr(nn, name)(3, act="silu")
    last = getattr(nn, name)(3, act="silu", channel_dim=-1)
    for training in (True, False):
        y = first.train(training)(x, residual)
        z = last.train(training)(
            x.movedim(1, -1).contiguous(), residual=residual.movedim(1, -1).contiguous()
        )
        torch.testing.assert_close(z.movedim(-1, 1), y, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(last.running_var, first.running_var, rtol=1e-6, atol=0)


@pytest.mark.parametrize("channel_dim", [0, 1, 2, -2, -3])
def test_channel_dim_anywhere(channel_dim: int) -> None:
    x = values((6, 3, 4), torch.float32)
    layer = nn.BatchNorm1d(3, channel_dim=channel_dim)
    moved = x.movedim(1, channel_dim)
    y = layer(moved)
    torch.testing.assert_close(y.movedim(channel_dim, 1).detach(), reference.batch_norm(x))


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_which_variance_normalizes_and_which_is_stored(
    name: str, unbiased: bool, correction: int
) -> None:
    layer = getattr(nn, name)(3, momentum=1.0, unbiased=unbiased, correction=correction)
    x = values(SHAPES[name], torch.float32)
    y = layer(x)
    torch.testing.assert_close(y.detach(), reference.batch_norm(x, correction=correction))
    dims = [d for d in range(x.dim()) if d != 1]
    stored = x.double().var(dims, correction=int(unbiased))
    torch.testing.assert_close(layer.running_var.double(), stored, rtol=1e-6, atol=0)


def test_worked_example_1_with_the_variance_of_tiny_dnn() -> None:
    for name in NAMES:
        layer = getattr(nn, name)(1, correction=1, dtype=torch.float64)
        spatial = {"BatchNorm1d": (6,), "BatchNorm2d": (1, 6), "BatchNorm3d": (1, 2, 3)}[name]
        y = layer(on_device(EXAMPLE).view(3, 1, *spatial))
        first = y[0].flatten().detach().cpu()
        torch.testing.assert_close(first, FIRST_ROW_UNBIASED, **SIX_DECIMALS)
        # What is stored is the unbiased variance whatever normalized.
        assert layer.running_var.item() == pytest.approx(0.9 + 206.05393545751635, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_single_value_uses_the_running_statistics_where_asked(name: str) -> None:
    shape = tuple(n if d == 1 else 1 for d, n in enumerate(SHAPES[name]))
    layer = getattr(nn, name)(3, on_single_value="running")
    layer(values(SHAPES[name], torch.float32))
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert_same_bits(y, copy.deepcopy(layer).eval()(x))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().min() > 0
    for key, value in layer.state_dict().items():
        assert_same_bits(value, before[key], key)
    layer(values(SHAPES[name], torch.float32))
    assert layer.num_batches_tracked.item() == 2


def test_residual_and_activation_are_what_follows_the_plain_layer() -> None:
    for name, training in itertools.product(NAMES, (True, False)):
        x, residual = values(SHAPES[name], torch.float32), torch.randn(SHAPES[name])
        plain, fused = getattr(nn, name)(3), getattr(nn, name)(3, act="leaky_relu", act_param=0.2)
        y = fused.train(training)(x, residual)
        expected = plain.train(training)(x) + residual
        torch.testing.assert_close(y, torch.nn.functional.leaky_relu(expected, 0.2))


def test_repr_adds_what_differs_from_torch() -> None:
    assert repr(nn.BatchNorm2d(3)).endswith("track_running_stats=True)")
    text = repr(nn.BatchNorm2d(3, act="elu", act_param=0.5, channel_dim=-1, unbiased=False))
    assert text.endswith("act='elu', act_param=0.5, channel_dim=-1, unbiased=False)")
    text = repr(nn.LazyBatchNorm1d(correction=1, on_single_value="running"))
    assert text.endswith("correction=1, on_single_value='running')")


def test_reset() -> None:
    layer = nn.BatchNorm1d(3)
    fresh = copy.deepcopy(layer.state_dict())
    x = values((6, 3), torch.float32)
    x[0, 0] = torch.nan
    layer(x)
    torch.nn.init.uniform_(layer.weight)
    torch.nn.init.uniform_(layer.bias)
    layer.reset_running_stats()
    assert layer.skipped_updates.item() == 0
    assert not torch.equal(layer.weight, fresh["weight"])
    layer.reset_parameters()
    for key, value in layer.state_dict().items():
        assert_same_bits(value, fresh[key], key)


@pytest.mark.parametrize(
    "options", [{"affine": False}, {"track_running_stats": False}, {"bias": False}]
)
def test_reset_of_what_is_not_there(options: dict[str, bool]) -> None:
    layer = nn.BatchNorm1d(3, **options)
    layer(values((6, 3), torch.float32))
    layer.reset_parameters()
    assert layer.skipped_updates.item() == 0
    for key, value in nn.BatchNorm1d(3, **options).state_dict().items():
        assert_same_bits(layer.state_dict()[key], value, key)


def output_of(layer: torch.nn.Module, dtype: torch.dtype) -> Tensor:
    return layer(values((6, 3), dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_the_parameters(dtype: torch.dtype) -> None:
    layer = nn.BatchNorm1d(3, dtype=dtype).eval()
    assert {t.dtype for t in layer.state_dict().values()} == {dtype, torch.long}
    assert output_of(layer, dtype).dtype is dtype
    moved = nn.BatchNorm1d(3).to(dtype).eval()
    assert_same_bits(output_of(moved, dtype), output_of(layer, dtype))
    assert moved.skipped_updates.dtype is torch.long


def test_float16_running_statistics_are_warned_of_in_training() -> None:
    layer = nn.BatchNorm1d(3).half()
    layer.eval()(values((6, 3), torch.float16))
    with pytest.warns(UserWarning, match="float16 running statistics"):
        layer.train()(values((6, 3), torch.float16))
    nn.BatchNorm1d(3)(values((6, 3), torch.float16))
    nn.BatchNorm1d(3, track_running_stats=False).half()(values((6, 3), torch.float16))
    nn.BatchNorm1d(3).bfloat16()(values((6, 3), torch.bfloat16))
