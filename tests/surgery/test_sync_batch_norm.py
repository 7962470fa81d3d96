"""convert_sync_batchnorm and its revert: the same layers in other classes, and nothing lost."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from normally import nn
from normally.surgery import convert_sync_batchnorm, revert_sync_batchnorm
from tests.distributed.launch import results
from tests.helpers import assert_same_bits, cpu_only, values

SHAPES = {1: (6, 3, 4), 2: (6, 3, 4, 2), 3: (6, 3, 2, 1, 2)}
PLAIN = [(family, dim) for family in (nn, torch.nn) for dim in SHAPES]
IDS = [f"{family.__name__}.BatchNorm{dim}d" for family, dim in PLAIN]


class WithConstructor(torch.nn.BatchNorm2d):
    """What many repositories have: other defaults and nothing else."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, eps=1e-3, momentum=0.01)


def make(family: Any, dim: int, **options: Any) -> Any:
    layer = getattr(family, f"BatchNorm{dim}d")(3, **options)
    for tensor in (*layer.parameters(), layer.running_mean, layer.running_var):
        torch.nn.init.uniform_(tensor, 0.5, 1.5)
    return layer


def snapshot(layer: torch.nn.Module) -> dict[str, Any]:
    """All that a layer is, by identity where it is an object."""
    state: dict[str, Any] = {"class": type(layer)}
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            state[name] = {key: id(item) for key, item in value.items()}
        else:
            state[name] = copy.copy(value) if isinstance(value, set) else value
    return state


@pytest.mark.parametrize(("family", "dim"), PLAIN, ids=IDS)
def test_there_and_back_is_the_very_layer(family: Any, dim: int) -> None:
    model = torch.nn.Sequential(torch.nn.Identity(), make(family, dim))
    layer = model[1]
    seen: list[str] = []
    layer.register_forward_hook(lambda m, args, y: seen.append(type(m).__name__))
    layer.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    layer.weight.register_hook(lambda g: g * 3)
    layer.remark = "mine"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.eval()
    before, tensors = snapshot(layer), copy.deepcopy(layer.state_dict())
    twin = copy.deepcopy(layer)

    assert convert_sync_batchnorm(model) is model
    assert model[1] is layer
    assert type(layer) is nn.SyncBatchNorm
    assert not layer.training
    assert layer.remark == "mine"
    assert layer.weight is optimizer.param_groups[0]["params"][0]
    for name, value in tensors.items():
        assert_same_bits(layer.state_dict()[name], value, name)
    assert list(layer.state_dict()) == list(tensors)
    assert revert_sync_batchnorm(model) is model
    assert snapshot(layer) == before

    convert_sync_batchnorm(model)
    model.train()
    twin.train()
    x = values(SHAPES[dim], torch.float32)
    y = model(x)
    torch.testing.assert_close(y, twin(x))
    assert seen == ["SyncBatchNorm", type(twin).__name__]
    y.square().sum().backward()
    revert_sync_batchnorm(model)
    after = snapshot(layer)
    for name in ("_parameters", "_buffers", "class", "_forward_hooks"):
        assert after[name] == before[name]
    # What it learned in between is kept.
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value)
    assert layer.weight.grad is not None


@pytest.mark.parametrize("options", [
    {"act": "relu"}, {"act": "leaky_relu", "act_param": 0.3}, {"unbiased": False},
    {"correction": 1}, {"on_single_value": "running"}, {"momentum": None}, {"bias": False},
], ids=str)  # fmt: skip
def test_our_options_stay(options: dict[str, Any]) -> None:
    layer = nn.BatchNorm2d(3, **options)
    text = repr(layer)
    twin = copy.deepcopy(layer)
    convert_sync_batchnorm(layer)
    assert repr(layer) == text.replace("BatchNorm2d", "SyncBatchNorm")
    x = values(SHAPES[2], torch.float32)
    assert_same_bits(layer(x), twin(x))
    assert repr(revert_sync_batchnorm(layer)) == text


def test_skipped_updates_stay() -> None:
    layer = nn.BatchNorm1d(3)
    x = torch.randn(6, 3)
    x[0, 1] = torch.nan
    layer(x)
    convert_sync_batchnorm(layer)
    layer(x)
    assert layer.skipped_updates.item() == 2
    revert_sync_batchnorm(layer)
    assert layer.skipped_updates.item() == 2


@pytest.mark.parametrize("family", [nn, torch.nn], ids=["ours", "torch"])
@pytest.mark.parametrize("first", ["input", "state dict", "nothing"])
def test_lazy_layers(first: str, family: Any) -> None:
    layer = family.LazyBatchNorm2d()
    before = snapshot(layer)
    convert_sync_batchnorm(layer)
    assert isinstance(layer, nn.SyncBatchNorm)
    assert layer.has_uninitialized_params()
    if first == "nothing":
        revert_sync_batchnorm(layer)
        assert snapshot(layer) == before
        layer(values(SHAPES[2], torch.float32))
        assert type(layer) is family.BatchNorm2d
        return
    if first == "state dict":
        layer.load_state_dict(make(family, 2).state_dict())
    layer(values(SHAPES[2], torch.float32))
    assert type(layer) is nn.SyncBatchNorm
    assert layer.num_features == 3
    assert layer.num_batches_tracked.item() == 1
    revert_sync_batchnorm(layer)
    assert type(layer) is family.BatchNorm2d
    assert set(vars(layer)) == set(vars(family.BatchNorm2d(3)))
    assert set(layer._buffers) == set(family.BatchNorm2d(3)._buffers)
    layer(values(SHAPES[2], torch.float32))


def test_twice_there_is_once_back() -> None:
    model = torch.nn.Sequential(make(torch.nn, 2), make(nn, 2), nn.SyncBatchNorm(3))
    before = [snapshot(m) for m in model]
    convert_sync_batchnorm(convert_sync_batchnorm(model))
    assert {type(m) for m in model} == {nn.SyncBatchNorm}
    revert_sync_batchnorm(revert_sync_batchnorm(model))
    assert [snapshot(m) for m in model] == before
    assert type(model[2]) is nn.SyncBatchNorm  # it was one before


def test_a_layer_in_two_places_and_other_norms() -> None:
    shared = make(torch.nn, 1)
    others = [torch.nn.GroupNorm(1, 3), nn.InstanceNorm1d(3), nn.FrozenBatchNorm(3)]
    model = torch.nn.ModuleList([shared, *others, torch.nn.ModuleList([shared])])
    before = [snapshot(m) for m in others]
    convert_sync_batchnorm(model)
    assert type(shared) is nn.SyncBatchNorm
    assert [snapshot(m) for m in others] == before
    revert_sync_batchnorm(model)
    assert type(shared) is torch.nn.BatchNorm1d


def test_subclasses_that_only_construct() -> None:
    layer = WithConstructor(3)
    before = snapshot(layer)
    convert_sync_batchnorm(layer)
    assert (type(layer), layer.eps, layer.momentum) == (nn.SyncBatchNorm, 1e-3, 0.01)
    revert_sync_batchnorm(layer)
    assert snapshot(layer) == before


def test_torchs_sync_batch_norm_and_back() -> None:
    layer = torch.nn.SyncBatchNorm(3)
    before = snapshot(layer)
    convert_sync_batchnorm(layer)
    assert type(layer) is nn.SyncBatchNorm
    assert not isinstance(layer, torch.nn.SyncBatchNorm)
    layer(values(SHAPES[2], torch.float32))
    revert_sync_batchnorm(layer)
    after = snapshot(layer)
    assert after == before


def test_the_class_method_is_the_function() -> None:
    model = torch.nn.Sequential(make(torch.nn, 2))
    assert nn.SyncBatchNorm.convert_sync_batchnorm(model) is model
    assert type(model[0]) is nn.SyncBatchNorm

    class Mine(nn.SyncBatchNorm):
        pass

    revert_sync_batchnorm(model)
    Mine.convert_sync_batchnorm(model)
    assert type(model[0]) is Mine
    revert_sync_batchnorm(model)
    assert type(model[0]) is torch.nn.BatchNorm2d


# --- refused


class OwnForward(torch.nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class OwnMethod(nn.BatchNorm2d):
    drop = 0.5

    def helper(self) -> None: ...


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_unknown_classes_are_refused_all_at_once_and_nothing_is_changed() -> None:
    replaced = make(torch.nn, 2)
    replaced.forward = lambda x: x
    parametrized = make(torch.nn, 2)
    torch.nn.utils.parametrize.register_parametrization(parametrized, "weight", torch.nn.Softplus())
    sharded = make(torch.nn, 2)
    mixin = type("FSDPModule", (), {"unshard": None})  # what fully_shard puts in front
    sharded.__class__ = type("FSDPBatchNorm2d", (mixin, torch.nn.BatchNorm2d), {})
    model = torch.nn.ModuleDict({
        "fine": make(torch.nn, 2),
        "own": OwnForward(3),
        "inner": torch.nn.Sequential(OwnMethod(3)),
        "replaced": replaced,
        "parametrized": parametrized,
        "sharded": sharded,
        "scripted": torch.jit.script(make(torch.nn, 2)),
    })  # fmt: skip
    before = snapshot(model["fine"])
    with pytest.raises(TypeError) as error:
        convert_sync_batchnorm(model)
    message = str(error.value)
    for words in (
        "own (OwnForward): a subclass with methods or attributes that SyncBatchNorm would not use "
        "(forward)",
        "inner.0 (OwnMethod): a subclass with methods or attributes that SyncBatchNorm would not "
        "use (drop, helper)",
        "replaced (BatchNorm2d): its forward was replaced",
        "parametrized (ParametrizedBatchNorm2d): a subclass with",
        "sharded (FSDPBatchNorm2d): it is sharded by itself",
        "scripted (RecursiveScriptModule): it is scripted",
        "Nothing was changed",
    ):
        assert words in message, words
    assert "fine" not in message
    assert snapshot(model["fine"]) == before
    with pytest.raises(TypeError, match=r"the model itself \(OwnForward\)"):
        convert_sync_batchnorm(OwnForward(3))


def test_arguments() -> None:
    for function in (convert_sync_batchnorm, revert_sync_batchnorm):
        expected = f"{function.__name__}: model must be a torch.nn.Module. Got list."
        with pytest.raises(TypeError, match=re.escape(expected)):
            function([])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"group must be a torch\.distributed\.ProcessGroup"):
        convert_sync_batchnorm(make(nn, 2), [0, 1])


# --- in processes


def _converted(rank: int) -> tuple[list[Tensor], list[str], bool]:
    model = torch.nn.Sequential(make_seeded(), torch.nn.SyncBatchNorm(3))
    first = torch.distributed.new_group([0, 1])
    second = torch.distributed.new_group([0, 1])
    model[1].process_group = first
    convert_sync_batchnorm(model)
    kept = model[0].process_group is None and model[1].process_group is first
    convert_sync_batchnorm(model, second)
    kept = kept and all(m.process_group is second for m in model)
    copied = copy.deepcopy(model)  # a group itself cannot be copied
    kept = kept and copied[1].process_group is second and copied[1].weight is not model[1].weight
    x = values((6, 3, 4), torch.float32)[rank * 2 : rank * 2 + 2 + 2 * rank]
    outputs = [model(x), copied(x)]
    revert_sync_batchnorm(model)
    kept = kept and model[1].process_group is first and not hasattr(model[0], "process_group")
    return (
        [y.detach() for y in outputs] + [model[0].running_var, model[1].running_var],
        [type(m).__name__ for m in model],
        kept,
    )


def make_seeded() -> Any:
    torch.manual_seed(1)
    return make(torch.nn, 1)


@cpu_only("gloo between processes")
def test_groups_and_the_statistics_of_all() -> None:
    model = torch.nn.Sequential(make_seeded(), torch.nn.BatchNorm1d(3))
    expected = model(values((6, 3, 4), torch.float32)).split([2, 4])
    for rank, (tensors, names, kept) in enumerate(results(2, _converted)):
        assert kept
        assert names == ["BatchNorm1d", "SyncBatchNorm"]
        for y in tensors[:2]:
            torch.testing.assert_close(y, expected[rank].detach())
        for layer, running_var in zip(model, tensors[2:], strict=True):
            torch.testing.assert_close(layer.running_var, running_var)
