"""recalibrate: what is left as it was, and why: layers, and whole models after an exception."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from normally import nn, recalibrate
from tests.surgery.populations import (
    FAMILIES,
    State,
    assert_population,
    images,
    inputs,
    network,
    rows,
)

pytestmark = pytest.mark.usefixtures("one_thread")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked", "_skipped_updates")


# --- what is left


@FAMILIES
def test_a_channel_that_is_not_finite_keeps_its_statistics(family: Any) -> None:
    x = images()
    x[33, 1, 0, 0] = torch.nan
    layer = family.BatchNorm2d(3)
    layer.running_mean.fill_(0.5)
    _, report = recalibrate(layer, list(x.split(9)), return_report=True)
    assert layer.running_mean[1].item() == 0.5
    assert layer.running_var[1].item() == 1.0
    sound = family.BatchNorm2d(2)
    recalibrate(sound, list(x[:, ::2].split(9)))
    torch.testing.assert_close(layer.running_var[::2], sound.running_var)
    assert "1 of 3 channels not finite" in report.changed[0].note
    if family is nn:
        assert layer.skipped_updates.item() == 1
        recalibrate(layer, [images()])
        assert layer.skipped_updates.item() == 0
    _, report = recalibrate(layer, [x * torch.inf], return_report=True)
    assert "all" not in report.left[0].note
    assert "3 of 3 channels not finite" in report.left[0].note


def test_frozen_and_other_layers_are_left_with_a_reason() -> None:
    class Sticky(torch.nn.BatchNorm2d):
        def train(self, mode: bool = True) -> Sticky:
            return super().train(False)

    class Property(torch.nn.BatchNorm2d):
        @property
        def training(self) -> bool:
            return False

        @training.setter
        def training(self, mode: bool) -> None:
            self.__dict__["training"] = mode

    model = torch.nn.Sequential(
        nn.FrozenBatchNorm(3),
        Sticky(3).eval(),
        torch.nn.BatchNorm2d(3, track_running_stats=False),
        torch.nn.InstanceNorm2d(3, track_running_stats=True),
        torch.nn.InstanceNorm2d(3),
        torch.nn.GroupNorm(1, 3),
        torch.nn.BatchNorm2d(3),
        Property(3),
    )
    for module in (model[0], model[1], model[3]):
        module.running_mean.fill_(0.25)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model[1].train()
    for train in (False, True):
        model.train(train)
        _, report = recalibrate(model, list(images().split(9)), return_report=True)
        assert [change.path for change in report.changed] == ["6"]
        assert {change.path: change.note.split(":")[0] for change in report.left} == {
            "0": "it is frozen",
            "1": "it is frozen",
            "2": "it keeps no running statistics",
            "3": "instance norm's are averages over samples, not over values",
            "7": "it is frozen",
        }
        assert vars(model[7])["training"] == train
        for name, value in model.state_dict().items():
            if not name.startswith("6"):
                assert torch.equal(value, before[name]), name


def test_a_layer_in_evaluation_in_a_model_that_trains_is_frozen() -> None:
    model = network(torch.nn)
    model[5].eval()
    _, report = recalibrate(model, list(images().split(9)), return_report=True)
    assert [change.path for change in report.changed] == ["1", "8"]
    assert "in evaluation while the model is in training" in report.left[0].note
    assert model[5].running_mean.eq(0).all()
    _, report = recalibrate(model.eval(), list(images().split(9)), return_report=True)
    assert [change.path for change in report.changed] == ["1", "5", "8"]


def test_only_and_skip() -> None:
    """Layers that are left use their running statistics."""
    model = network(nn)
    model[1].running_mean.fill_(1.0)
    recalibrate(model, list(images().split(9)), only="8")
    assert model[1].running_mean.eq(1).all()
    expected = copy.deepcopy(model).double().eval()
    found = inputs(expected, [images().double()])["8"]
    assert_population(model[8], found)
    recalibrate(model, list(images().split(9)), skip=lambda path, module: path == "8")
    assert_population(model[8], found)
    assert_population(model[1], rows(model[0](images())))


def test_a_layer_that_is_not_called_is_left() -> None:
    model = torch.nn.ModuleDict({"used": nn.BatchNorm2d(3), "unused": nn.BatchNorm2d(3)})
    _, report = recalibrate(
        model, [images()], forward=lambda model, x: model["used"](x), return_report=True
    )
    assert report.left[0].path == "unused"
    assert "did not call it" in report.left[0].note


# --- errors, and what they leave behind


def test_refusals() -> None:
    layer, x = torch.nn.BatchNorm2d(3), images()
    cases: list[tuple[type[Exception], str, Any]] = [
        (TypeError, "must be a torch.nn.Module", lambda: recalibrate([layer], [x])),
        (ValueError, "must have a batch norm .* Sequential with none", lambda: recalibrate(
            torch.nn.Sequential(torch.nn.ReLU()), [x])),
        (ValueError, "(?s)with none but.*0  FrozenBatchNorm left: it is frozen",
         lambda: recalibrate(torch.nn.Sequential(nn.FrozenBatchNorm(3)), [x])),
        (ValueError, "at least one batch. Got none", lambda: recalibrate(layer, [])),
        (ValueError, "at least one batch. Got none", lambda: recalibrate(
            network(nn), [], layerwise=True)),
        (ValueError, "Expected more than 1 value per channel .* in the model itself",
         lambda: recalibrate(layer, [x[:1, :, :1, :1]])),
        (TypeError, r"data must be an iterable .* Got Tensor.*data=\[x\]",
         lambda: recalibrate(layer, x)),
        (TypeError, r"data must be an iterable .* Got dict.*data=\[batch\]",
         lambda: recalibrate(layer, {"x": x})),
        (TypeError, "data must be an iterable .* Got int", lambda: recalibrate(layer, 3)),  # type: ignore[call-overload]
        (ValueError, "go through again.*layerwise=True.* Got generator",
         lambda: recalibrate(layer, (x for _ in range(2)), layerwise=True)),
        (ValueError, "steps must be 1 or more", lambda: recalibrate(layer, [x], steps=0)),
        (TypeError, "steps must be an integer", lambda: recalibrate(layer, [x], steps=1.5)),  # type: ignore[call-overload]
        (ValueError, "only must name", lambda: recalibrate(layer, [x], only="conv")),
        (ValueError, "must have an input. Got an empty tuple", lambda: recalibrate(layer, [()])),
        (ValueError, "without a call of one", lambda: recalibrate(
            layer, [x], forward=lambda model, batch: batch)),
        (TypeError, "group must be a torch.distributed.ProcessGroup",
         lambda: recalibrate(layer, [x], group=3)),  # type: ignore[call-overload]
        (ValueError, r"first input. Got 0 \(LazyBatchNorm2d\)", lambda: recalibrate(
            torch.nn.Sequential(torch.nn.LazyBatchNorm2d()), [x])),
        (ValueError, r"first input. Got 0 \(LazyConv2d\)", lambda: recalibrate(
            torch.nn.Sequential(torch.nn.LazyConv2d(3, 3), layer), [x])),
    ]  # fmt: skip
    state = State(layer)
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
        state.assert_unchanged()


def test_data_that_gives_less_each_time() -> None:
    class Once:
        left = 2

        def __iter__(self) -> Iterator[Tensor]:
            self.left -= 1
            return iter([images()] * self.left)

    model = network(nn)
    state = State(model)
    with pytest.raises(ValueError, match="1 in the first pass and 0 in a later one"):
        recalibrate(model, Once(), layerwise=True)
    state.assert_unchanged()


@FAMILIES
@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_exception_leaves_the_model_as_it_was(
    family: Any, layerwise: bool, error: type[BaseException]
) -> None:
    """Wherever it comes from: the data, the model, or the function that is told the progress."""
    model = network(family)
    model[3].eval()
    model[5].momentum = None
    recalibrate(model, [images() + 1])
    state = State(model)
    batches = list(images().split(9))

    def failing() -> Iterator[Tensor]:
        yield from batches[:3]
        raise error

    class Data:
        def __iter__(self) -> Iterator[Tensor]:
            return failing()

    def fail(*_: Any) -> None:
        raise error

    with pytest.raises(error):
        recalibrate(model, Data(), layerwise=layerwise)
    state.assert_unchanged()
    with pytest.raises(error):
        recalibrate(model, batches, layerwise=layerwise, progress=fail)
    state.assert_unchanged()
    for part in (model[4], model[8]):
        handle = part.register_forward_pre_hook(fail)
        with pytest.raises(error):
            recalibrate(model, batches, layerwise=layerwise)
        handle.remove()
        state.assert_unchanged()


def test_an_exception_while_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    from normally.surgery._statistics import population

    model = network(nn)
    state = State(model)
    write, calls = population.write, []

    def fails(*args: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(population, "write", fails)
    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, [images()])
    state.assert_unchanged()


@FAMILIES
def test_nothing_but_the_statistics_changes(family: Any) -> None:
    model = network(family)
    model[3].eval()
    model[8].momentum = None
    model[1].register_forward_hook(lambda module, args, output: None)
    model.requires_grad_(False)
    for layerwise in (False, True):
        state = State(model)
        assert recalibrate(model, list(images().split(9)), layerwise=layerwise) is model
        state.assert_unchanged(but=STATISTICS)
        assert model[8].training
        assert not model[3].training
