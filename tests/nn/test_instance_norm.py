"""InstanceNorm1d, 2d, 3d: torch's classes, words and numbers; statistics that really accumulate."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from normally import nn, reference
from tests.helpers import assert_same_bits, values
from tests.nn.layer_checks import (
    check_copies,
    check_located,
    check_meta,
    check_signature,
    check_state_dicts,
    check_symbolic_tracing,
    check_words_of_torch,
)

# torch's compiler and forward mode load its own deprecated decompositions.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

SHAPES = {
    "InstanceNorm1d": (6, 3, 4),
    "InstanceNorm2d": (6, 3, 4, 2),
    "InstanceNorm3d": (6, 3, 2, 1, 2),
}
NAMES = tuple(SHAPES)


@pytest.mark.parametrize("name", NAMES)
def test_signature_is_torchs_then_ours_by_keyword(name: str) -> None:
    check_signature(getattr(nn, name), getattr(torch.nn, name), ("act", "act_param"))
    forward = inspect.signature(getattr(nn, name).forward).parameters
    assert list(forward) == ["self", "input", "mask", "lengths", "act", "act_param"]
    layer = getattr(nn, name)(3)
    assert isinstance(layer, getattr(torch.nn, name))
    assert not isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_same_numbers_as_torch_over_training_and_evaluation(
    affine: bool, track: bool, momentum: float, name: str
) -> None:
    options: dict[str, Any] = {
        "momentum": momentum, "affine": affine, "track_running_stats": track,
    }  # fmt: skip
    theirs = getattr(torch.nn, name)(3, **options)
    ours = getattr(nn, name)(3, **options)
    assert repr(ours) == repr(theirs)
    check_state_dicts(ours, theirs)
    for step, training in enumerate((True, True, False, True)):
        x = values(SHAPES[name], torch.float32, seed=step)
        for given in (x, x[0]):
            y = ours.train(training)(given)
            # float32 from both sides, outputs of unit scale
            torch.testing.assert_close(y, theirs.train(training)(given), rtol=1e-5, atol=1e-5)
        for key in ("running_mean", "running_var"):
            if track:
                found, expected = ours.state_dict()[key], theirs.state_dict()[key]
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_momentum_none_really_accumulates(name: str) -> None:
    layer = getattr(nn, name)(3, momentum=None, track_running_stats=True)
    theirs = getattr(torch.nn, name)(3, momentum=None, track_running_stats=True)
    batches = [values(SHAPES[name], torch.float32, seed=seed) for seed in range(5)]
    for batch in batches:
        layer(batch)
        theirs(batch)
    x = torch.cat(batches).double().flatten(2)
    # Five roundings of float32 buffers.
    torch.testing.assert_close(layer.running_mean.double(), x.mean((0, 2)), rtol=1e-6, atol=1e-6)
    expected = x.var(2).mean(0)  # unbiased in each sample, then the plain average
    torch.testing.assert_close(layer.running_var.double(), expected, rtol=1e-6, atol=1e-6)
    assert layer.num_batches_tracked.item() == 5
    assert torch.equal(theirs.running_mean, torch.zeros(3))  # what this is an answer to


def test_evaluation_changes_nothing_and_uses_the_running_statistics() -> None:
    layer = nn.InstanceNorm2d(3, track_running_stats=True, act="relu")
    layer(values((4, 3, 5, 5), torch.float32))
    before = copy.deepcopy(layer.state_dict())
    x = values((4, 3, 5, 5), torch.float32, seed=1)
    expected = reference.batch_norm(x, layer.running_mean, layer.running_var, act="relu")
    torch.testing.assert_close(layer.eval()(x), expected)
    for key, value in layer.state_dict().items():
        assert_same_bits(value, before[key], key)


def test_masked_statistics_are_those_of_the_kept_values() -> None:
    layer = nn.InstanceNorm1d(3, track_running_stats=True, momentum=1.0)
    x = values((4, 3, 6), torch.float32)
    lengths = torch.tensor([6, 0, 2, 3])
    mask = torch.arange(6) < lengths[:, None]
    padded = x.where(mask[:, None], torch.nan)
    output = layer(padded, lengths=lengths)
    torch.testing.assert_close(output, reference.group_norm(padded, 3, mask=mask[:, None]))
    kept = [sample[:, :n].double() for sample, n in zip(x, lengths.tolist(), strict=True) if n]
    together = torch.cat(kept, 1)
    within = torch.stack([(s - s.mean(1, keepdim=True)).square().sum(1) for s in kept]).sum(0)
    pooled = within / (together.shape[1] - len(kept))
    # One rounding to the float32 buffer.
    torch.testing.assert_close(layer.running_mean.double(), together.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), pooled, rtol=1e-6, atol=0)


def test_a_batch_without_values_leaves_the_buffers() -> None:
    for momentum in (0.1, None):
        layer = nn.InstanceNorm1d(3, track_running_stats=True, momentum=momentum)
        x = values((4, 3, 6), torch.float32)
        layer(x)
        before = copy.deepcopy(layer.state_dict())
        for batch, mask in ((x[:0], None), (x, torch.zeros(4, 6).bool()), (x[..., :0], None)):
            output = layer(batch, mask)
            assert not output.any()
            for key, value in layer.state_dict().items():
                assert_same_bits(value, before[key], key)
        assert layer.skipped_updates.item() == 0


def test_a_non_finite_channel_does_not_enter() -> None:
    layer, twin = (nn.InstanceNorm1d(3, track_running_stats=True) for _ in range(2))
    x = values((4, 3, 6), torch.float32)
    bad = x.clone()
    bad[2, 1, 3] = torch.inf
    layer(bad)
    twin(x)
    assert layer.skipped_updates.item() == 1
    assert torch.equal(layer.running_mean[1], torch.tensor(0.0))
    assert torch.equal(layer.running_var[1], torch.tensor(1.0))
    for key in ("running_mean", "running_var"):
        assert_same_bits(layer.state_dict()[key][::2], twin.state_dict()[key][::2], key)
    layer.reset_running_stats()
    assert layer.skipped_updates.item() == 0
    layer(bad)
    layer.load_state_dict(twin.state_dict())
    assert layer.skipped_updates.item() == 0
    assert nn.InstanceNorm1d(3).skipped_updates.item() == 0


def test_one_value_a_sample_has_no_unbiased_variance_to_enter() -> None:
    layer = nn.InstanceNorm1d(3, track_running_stats=True, affine=True)
    torch.nn.init.uniform_(layer.bias)
    output = layer(torch.randn(4, 3, 6), lengths=torch.ones(4, dtype=torch.long))
    assert torch.equal(output[..., 0], layer.bias.expand(4, 3))  # each is its own mean
    assert torch.equal(layer.running_mean, torch.zeros(3))
    assert torch.equal(layer.running_var, torch.ones(3))
    assert layer.skipped_updates.item() == 3


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoints_second_forward_does_not_count(use_reentrant: bool) -> None:
    layer, twin = (nn.InstanceNorm1d(3, affine=True, track_running_stats=True) for _ in range(2))
    x = values((4, 3, 6), torch.float32).requires_grad_()
    checkpoint(layer, x, use_reentrant=use_reentrant).sum().backward()
    twin(x).sum().backward()
    for key, value in twin.state_dict().items():
        assert_same_bits(layer.state_dict()[key], value, key)
    assert_same_bits(layer.bias.grad, twin.bias.grad)


def test_one_graph_with_running_statistics() -> None:
    for momentum in (0.1, None):
        layer = nn.InstanceNorm1d(3, affine=True, track_running_stats=True, momentum=momentum)
        twin = copy.deepcopy(layer)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for seed in range(2):
            x = values((4, 3, 6), torch.float32, seed=seed)
            torch.testing.assert_close(compiled(x), twin(x))
        for key, value in twin.state_dict().items():
            torch.testing.assert_close(layer.state_dict()[key], value)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_batch(name: str) -> None:
    layer = getattr(nn, name)(3, affine=True, act="silu")
    x = values(SHAPES[name], torch.float32)
    mask = torch.rand(x[0, 0].shape) < 0.5
    assert_same_bits(layer(x[0], mask), layer(x[:1], mask)[0])
    assert_same_bits(layer(x[0], mask[None]), layer(x[:1], mask)[0])
    if name == "InstanceNorm1d":
        for lengths in (torch.tensor(2), torch.tensor([2])):
            expected = layer(x[:1], lengths=torch.tensor([2]))[0]
            assert_same_bits(layer(x[0], lengths=lengths), expected)


def test_without_bias_and_repr() -> None:
    layer = nn.InstanceNorm2d(3, affine=True, bias=False, act="silu")
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    torch.nn.init.uniform_(layer.weight)
    layer.reset_parameters()
    assert torch.equal(layer.weight, torch.ones(3))
    assert repr(layer).endswith(", act='silu')")


def test_copies_tracing_and_meta() -> None:
    x = values((6, 3, 4), torch.float32)
    # In evaluation: in training a copy would see the statistics that the original updated.
    check_copies(nn.InstanceNorm1d(3, track_running_stats=True, act="gelu").eval(), x)
    check_symbolic_tracing(nn.InstanceNorm1d(3), x, torch.rand(6, 4) < 0.5)
    check_meta(nn.InstanceNorm2d(3, affine=True, track_running_stats=True, device="meta"),
               (6, 3, 4, 2))  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_refused_with_torchs_words_and_the_path(name: str) -> None:
    ours, theirs = getattr(nn, name), getattr(torch.nn, name)
    x = torch.randn(SHAPES[name])
    for dim in range(7):
        if dim not in (x.dim(), x.dim() - 1):
            bad = torch.randn((3,) * dim)
            check_words_of_torch(lambda b=bad: ours(3)(b), lambda b=bad: theirs(3)(b), ValueError)
    for bad in (x[:, :2], x[0, :2]):
        check_words_of_torch(
            lambda b=bad: ours(3, affine=True)(b),
            lambda b=bad: theirs(3, affine=True)(b),
            ValueError,
        )
    single = torch.randn(6, 3, *(1,) * (x.dim() - 2))
    check_words_of_torch(lambda: ours(3)(single), lambda: theirs(3)(single), ValueError)
    check_located(lambda: ours(3), single, ValueError, "Expected more than 1 spatial element")
    check_located(lambda: ours(3), x.long(), TypeError, "input must be one of")
    check_located(lambda: ours(3, affine=True), x.double(), TypeError, "weight must be")
    check_located(lambda: ours(3, eps=-1.0), x, ValueError, "eps must be non-negative")


def test_other_features_without_parameters_are_warned_of_as_in_torch() -> None:
    x = values((6, 3, 4), torch.float32)
    with pytest.warns(UserWarning, match="does not match num_features"):
        y = nn.InstanceNorm1d(5)(x)
    assert_same_bits(y, nn.InstanceNorm1d(3)(x))
    with pytest.raises(ValueError, match="running_mean should contain 3 elements not 5"):
        nn.InstanceNorm1d(5, track_running_stats=True)(x)


def test_nothing_is_changed_by_a_call_that_raised() -> None:
    layer = nn.InstanceNorm1d(3, track_running_stats=True)
    x = values((6, 3, 4), torch.float32)
    layer(x)
    before = copy.deepcopy(layer.state_dict())
    bad: list[tuple[dict[str, Tensor], type[Exception]]] = [
        ({"input": x[:, :2]}, ValueError),
        ({"input": x[..., :1]}, ValueError),
        ({"input": x.long()}, TypeError),
        ({"input": x, "mask": torch.ones(5, 4).bool()}, ValueError),
        ({"input": x, "mask": torch.ones(6, 4)}, TypeError),
        ({"input": x, "lengths": torch.ones(6)}, TypeError),
    ]
    for arguments, error in bad:
        with pytest.raises(error):
            layer(**arguments)
        for key, value in layer.state_dict().items():
            assert_same_bits(value, before[key], key)


def test_options_are_checked_at_construction() -> None:
    with pytest.raises(ValueError, match=r"^InstanceNorm2d: act must be None or one of 'relu'"):
        nn.InstanceNorm2d(3, act="swish")


def test_float16_running_statistics_are_warned_of_in_training() -> None:
    layer = nn.InstanceNorm1d(3, track_running_stats=True).half()
    x = values((6, 3, 4), torch.float16)
    layer.eval()(x)
    with pytest.warns(UserWarning, match="InstanceNorm1d is training with float16 running"):
        layer.train()(x)
    nn.InstanceNorm1d(3, track_running_stats=True)(x)
