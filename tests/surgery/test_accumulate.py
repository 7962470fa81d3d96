"""accumulate: statistics that enter once a step, and nothing that is half applied."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from normally import nn
from normally.surgery import accumulate
from tests.distributed.launch import results
from tests.helpers import assert_same_bits, cpu_only, values

#: Statistics of float64 values, merged in another order than they were summed in.
CLOSE = {"rtol": 1e-13, "atol": 1e-13}
#: Two roundings of a float32 buffer, and torch's own float32 sums.
CLOSE32 = {"rtol": 1e-6, "atol": 1e-6}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def parts(
    sizes: tuple[int, ...] = (5, 3, 1, 3), dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    return list(values((sum(sizes), 3, 4, 2), dtype).split(sizes))


def buffers(layer: torch.nn.Module) -> dict[str, Tensor]:
    return {name: layer.get_buffer(name).clone() for name in BUFFERS}


def assert_buffers(layer: Any, expected: Any, **tolerance: float) -> None:
    for name in BUFFERS:
        torch.testing.assert_close(layer.get_buffer(name), expected.get_buffer(name), **tolerance)


def assert_unchanged(layer: torch.nn.Module, before: dict[str, Tensor]) -> None:
    for name, value in before.items():
        assert_same_bits(layer.get_buffer(name), value, name)


# --- what enters


@pytest.mark.parametrize("options", [
    {}, {"momentum": None}, {"momentum": 0.7}, {"unbiased": False}, {"correction": 1},
    {"act": "relu"}, {"affine": False}, {"bias": False},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("sizes", [(4, 4, 4), (5, 3, 1, 3), (12,)])
def test_one_layer_has_the_statistics_of_the_large_batch(
    sizes: tuple[int, ...], options: dict[str, Any]
) -> None:
    layer = nn.BatchNorm2d(3, dtype=torch.float64, **options)
    whole = copy.deepcopy(layer)
    with accumulate(layer, len(sizes)):
        for step in range(3):
            for x in parts(sizes):
                layer(x + step)
            whole(torch.cat(parts(sizes)) + step)
            assert_buffers(layer, whole, **CLOSE)
    assert_buffers(layer, whole, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_torchs_own_layers(dtype: torch.dtype, momentum: float | None) -> None:
    layer = torch.nn.BatchNorm2d(3, momentum=momentum, dtype=dtype)
    whole = copy.deepcopy(layer)
    sizes = (5, 3, 1, 3)
    with accumulate(layer, 4):
        for _ in range(2):
            for x in parts(sizes, dtype):
                layer(x)
            whole(torch.cat(parts(sizes, dtype)))
    assert_buffers(layer, whole, **(CLOSE if dtype is torch.float64 else CLOSE32))


def test_float32_buffers_round_once() -> None:
    """The micro-batches' statistics are float64 whatever the buffers are."""
    layer = nn.BatchNorm2d(3, momentum=1.0)
    whole = nn.BatchNorm2d(3, momentum=1.0, dtype=torch.float64)
    xs = [x + 1000 for x in parts(dtype=torch.float32)]
    with accumulate(layer, 4):
        for x in xs:
            layer(x)
    whole(torch.cat(xs).double())
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(
            layer.get_buffer(name), whole.get_buffer(name).float(), rtol=2e-7, atol=0
        )


def test_outputs_and_gradients_are_those_without_it() -> None:
    layer = nn.BatchNorm2d(3)
    plain = copy.deepcopy(layer)
    xs = parts(dtype=torch.float32)
    with accumulate(layer, 4):
        for x in xs:
            a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
            y, expected = layer(a), plain(b)
            assert_same_bits(y, expected)
            y.square().sum().backward()
            expected.square().sum().backward()
            assert_same_bits(a.grad, b.grad)
    assert_same_bits(layer.weight.grad, plain.weight.grad)


def test_masks_and_lengths_weigh_by_what_they_keep() -> None:
    layer = nn.BatchNorm1d(3, dtype=torch.float64)
    whole = copy.deepcopy(layer)
    x = values((6, 3, 5), torch.float64)
    lengths = torch.tensor([5, 1, 2, 0, 0, 4])
    mask = torch.arange(5, device=x.device) < lengths.to(x.device)[:, None]
    with accumulate(layer, 3):
        layer(x[:2], lengths=lengths[:2].to(x.device))
        layer(x[2:5], None, mask[2:5])
        layer(x[5:], mask=mask[5:])
    whole(x, mask=mask)
    assert_buffers(layer, whole, **CLOSE)


def test_a_step_that_keeps_nothing_changes_nothing() -> None:
    layer = nn.BatchNorm1d(3)
    before = buffers(layer)
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    with accumulate(layer, 2):
        layer(values((2, 3, 5), torch.float32), mask=nothing)
        layer(torch.empty(0, 3, 5))
    assert_unchanged(layer, before)


def test_a_single_value_that_uses_the_running_statistics_does_not_enter() -> None:
    layer = nn.BatchNorm1d(3, on_single_value="running", dtype=torch.float64)
    whole = copy.deepcopy(layer)
    x = values((7, 3), torch.float64)
    with accumulate(layer, 2):
        single = layer(x[:1])
        layer(x[1:])
    torch.testing.assert_close(single, whole(x[:1]))
    whole(x[1:])
    assert_buffers(layer, whole, **CLOSE)


def test_a_bad_micro_batch_is_a_bad_step() -> None:
    """As in the large batch: the channel is left alone and counted, the others enter."""
    layer = nn.BatchNorm2d(3, dtype=torch.float64)
    whole = copy.deepcopy(layer)
    xs = parts()
    xs[1][0, 1, 0, 0] = torch.nan
    with accumulate(layer, 4):
        for x in xs:
            layer(x)
    whole(torch.cat(xs))
    assert_buffers(layer, whole, **CLOSE)
    assert layer.skipped_updates.item() == whole.skipped_updates.item() == 1
    theirs = torch.nn.BatchNorm2d(3, dtype=torch.float64)
    with accumulate(theirs, 4):
        for x in xs:
            theirs(x)
    assert_buffers(theirs, whole, **CLOSE)  # torch's own would be NaN from now on


def test_a_layer_that_is_used_twice() -> None:
    layer = nn.BatchNorm1d(3, dtype=torch.float64)
    whole = copy.deepcopy(layer)

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x + 1) + self.norm(x)

    x = values((8, 3), torch.float64)
    with accumulate(Twice(), 2) as accumulation:
        model = accumulation._model
        model(x[:4])
        assert layer.num_batches_tracked.item() == 0
        model(x[4:])
    whole(torch.cat((x, x + 1)))
    assert_buffers(layer, whole, **CLOSE)


def test_lazy_layers() -> None:
    for family in (nn, torch.nn):
        model = torch.nn.Sequential(family.LazyBatchNorm2d(dtype=torch.float64))
        whole = nn.BatchNorm2d(3, dtype=torch.float64)
        with accumulate(model, 4):
            for x in parts():
                model(x)
        whole(torch.cat(parts()))
        assert_buffers(model[0], whole, **CLOSE)


# --- when it enters


def test_every_step_a_partial_one_on_exit_and_flush() -> None:
    layer = nn.BatchNorm2d(3)
    count = layer.num_batches_tracked
    x = parts()[0].float()
    with accumulate(layer, 2) as accumulation:
        for expected in (0, 1, 1, 2, 2):
            layer(x)
            assert count.item() == expected
        accumulation.flush()
        assert count.item() == 3
        accumulation.flush()
        assert count.item() == 3
        layer(x)
        assert count.item() == 3
    assert count.item() == 4
    layer(x)
    assert count.item() == 5


def test_a_partial_step_has_its_own_weight() -> None:
    layer = nn.BatchNorm2d(3, dtype=torch.float64)
    whole = copy.deepcopy(layer)
    xs = parts()
    with accumulate(layer, 3):
        for x in xs:
            layer(x)
    whole(torch.cat(xs[:3]))
    with pytest.raises(AssertionError):
        assert_buffers(layer, whole, **CLOSE)
    whole(xs[3])
    assert_buffers(layer, whole, **CLOSE)


def test_evaluation_inside_counts_for_nothing_and_sees_the_last_step() -> None:
    model = torch.nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval())
    layer, frozen = model[0], model[1]
    x = parts()[0].float()
    with accumulate(model, 2):
        model[0](x)  # a part: not a micro-batch of the model
        model.eval()
        before = buffers(layer)
        expected = torch.nn.functional.batch_norm(x, torch.zeros(3), torch.ones(3))
        torch.testing.assert_close(layer(x), expected, **CLOSE32)
        for _ in range(3):
            model(x)
        assert_unchanged(layer, before)
        model.train()
        frozen.eval()
        model(x)
        assert layer.num_batches_tracked.item() == 0
        model(x)
        assert layer.num_batches_tracked.item() == 1
    assert frozen.num_batches_tracked.item() == 0


def test_parts_called_by_themselves_enter_at_the_end() -> None:
    model = torch.nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])
    x = parts()[0].float()
    with accumulate(model, 2) as accumulation:
        for _ in range(3):
            model[0](x)
        assert model[0].num_batches_tracked.item() == 0
        accumulation.flush()
        assert model[0].num_batches_tracked.item() == 1
        model[1](x)
    assert model[1].num_batches_tracked.item() == 1


def test_state_dict_copies_and_loading_inside() -> None:
    layer = nn.BatchNorm2d(3)
    xs = parts(dtype=torch.float32)
    with accumulate(layer, 2):
        layer(xs[0])
        before = copy.deepcopy(layer.state_dict())
        assert before["num_batches_tracked"].item() == 0
        assert torch.equal(before["running_mean"], torch.zeros(3))
        assert layer.momentum == 0.1
        layer(xs[1])
        after = copy.deepcopy(layer.state_dict())
        assert after["num_batches_tracked"].item() == 1
        layer.load_state_dict(before)
        assert torch.equal(layer.running_mean, torch.zeros(3))
    assert layer.num_batches_tracked.item() == 0  # loaded, and nothing was collected since


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_are_counted_once(reentrant: bool) -> None:
    for family in (nn, torch.nn):
        layer = family.BatchNorm2d(3, dtype=torch.float64)
        whole = nn.BatchNorm2d(3, dtype=torch.float64)

        class Model(torch.nn.Module):
            def __init__(self, layer: torch.nn.Module) -> None:
                super().__init__()
                self.norm = layer

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = checkpoint(self.norm, x, use_reentrant=reentrant)
                return y

        model = Model(layer)
        with accumulate(model, 4):
            for x in parts():
                model(x.requires_grad_()).square().sum().backward()
        whole(torch.cat(parts()))
        assert_buffers(layer, whole, **CLOSE)


# --- exceptions


class _FailsAt(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3, dtype=torch.float64)
        self.second = torch.nn.BatchNorm2d(3, dtype=torch.float64)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.fails:
            raise KeyError("here")
        y: Tensor = self.second(x)
        return y


def test_an_exception_that_leaves_drops_the_unfinished_step() -> None:
    model = _FailsAt()
    xs = parts()

    def train() -> None:
        with accumulate(model, 2):
            model(xs[0])
            model(xs[1])
            states.append(copy.deepcopy(model.state_dict()))
            model(xs[2])
            model.fails = True
            model(xs[3])

    states: list[dict[str, Tensor]] = []
    with pytest.raises(KeyError):
        train()
    for name, value in model.state_dict().items():
        assert_same_bits(value, states[0][name], name)
    assert model.first.num_batches_tracked.item() == 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_exception_that_is_caught_leaves_nothing_of_its_micro_batch() -> None:
    model, plain = _FailsAt(), _FailsAt()
    xs = parts()
    with accumulate(model, 2), accumulate(plain, 2):
        for x in xs[:2]:
            model.fails = True
            with pytest.raises(KeyError):
                model(x)
            model.fails = False
            model(x)
            plain(x)
    for layer, expected in ((model.first, plain.first), (model.second, plain.second)):
        assert_unchanged(layer, buffers(expected))


@pytest.mark.parametrize("family", [nn, torch.nn])
def test_a_layer_that_refuses_its_input_has_its_buffers_back(family: Any) -> None:
    layer = family.BatchNorm2d(3)
    before = buffers(layer)
    own = [layer.get_buffer(name) for name in BUFFERS]
    with accumulate(layer, 1):
        for bad in (torch.zeros(2, 3), torch.zeros(2, 5, 1, 2), torch.zeros(1, 3, 1, 1)):
            with pytest.raises((ValueError, RuntimeError)):
                layer(bad)
            assert all(a is layer.get_buffer(n) for a, n in zip(own, BUFFERS, strict=True))
            assert layer.momentum == 0.1
    assert_unchanged(layer, before)


# --- who takes part


def test_hooks_see_what_they_saw_before() -> None:
    layer = nn.BatchNorm2d(3)
    seen: list[Any] = []
    layer.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    layer.register_forward_hook(lambda m, args, y: seen.append(m.running_mean.dtype))
    whole = nn.BatchNorm2d(3)
    xs = parts(dtype=torch.float32)
    with accumulate(layer, 4):
        for x in xs:
            layer(x)
    whole(torch.cat(xs) * 2)
    assert_buffers(layer, whole, **CLOSE32)
    assert seen == [torch.float32] * 4


def test_one_layer_in_one_accumulation_at_a_time() -> None:
    model = torch.nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    outer = accumulate(model, 2)
    for exact in (False, True):
        with outer:
            with pytest.raises(RuntimeError, match=r"one accumulation at a time\. Got '1'"):  # noqa: SIM117
                with accumulate(torch.nn.ModuleDict({"1": model[1]}), 2, exact=exact):  # type: ignore[call-overload]
                    pass
            model(parts()[0].float())
    assert model[1].num_batches_tracked.item() == 2  # two partial steps
    with accumulate(model[0], 2), accumulate(model[1], 2):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class _OwnForward(torch.nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return input


class _Plain(torch.nn.BatchNorm2d):
    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, eps=1e-3)


def test_what_is_refused() -> None:
    replaced = nn.BatchNorm2d(3)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    cases: list[tuple[torch.nn.Module, str]] = [
        (_OwnForward(3), r"0 \(_OwnForward\): a forward of its own"),
        (replaced, r"0 \(BatchNorm2d\): a forward of its own"),
        (nn.InstanceNorm2d(3, track_running_stats=True), r"0 \(InstanceNorm2d\): instance norm"),
        (torch.nn.DataParallel(nn.BatchNorm2d(3)), r"0 \(DataParallel\): its replicas"),
    ]
    for module, message in cases:
        with pytest.raises(TypeError, match=message):
            accumulate(torch.nn.Sequential(module), 2)
    several = torch.nn.Sequential(_OwnForward(3), torch.nn.Sequential(_OwnForward(3)))
    with pytest.raises(TypeError, match=r"0 \(_OwnForward\).*; 1\.0 \(_OwnForward\)"):
        accumulate(several, 2)
    with pytest.raises(TypeError, match="the model itself"):
        accumulate(_OwnForward(3), 2)
    for fine in (_Plain(3), nn.InstanceNorm2d(3), nn.FrozenBatchNorm(3), nn.SyncBatchNorm(3)):
        accumulate(fine, 2)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_scripted_modules_are_refused() -> None:
    scripted = torch.jit.script(torch.nn.BatchNorm2d(3))
    with pytest.raises(TypeError, match="it is scripted"):
        accumulate(torch.nn.Sequential(scripted), 2)


def test_arguments() -> None:
    layer = nn.BatchNorm2d(3)
    with pytest.raises(ValueError, match=r"steps must be 1 or more\. Got steps=0"):
        accumulate(layer, 0)
    for steps in (2.0, True, None):
        with pytest.raises(TypeError, match="steps must be an integer"):
            accumulate(layer, steps)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module\. Got list"):
        accumulate([layer], 2)  # type: ignore[call-overload]


# --- compilers


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_compiled_code_is_refused_or_noticed() -> None:
    model = torch.nn.Sequential(nn.BatchNorm2d(3))
    x = parts()[0].float()
    with pytest.raises(TypeError, match="compiled code"):
        accumulate(torch.compile(model, backend="eager"), 2)  # type: ignore[call-overload]
    function = torch.compile(lambda x: model(x), backend="eager")
    function(x)
    # The model's own hooks are not called either, so nothing counts: it is seen on the way out.
    before = model[0].num_batches_tracked.item()
    with pytest.raises(RuntimeError, match=r"by itself: code that torch\.compile"):  # noqa: SIM117
        with accumulate(model, 2):
            function(x)
    assert model[0].num_batches_tracked.item() == before + 1
    torch.compiler.reset()


# --- several processes


def _sync_layer(rank: int, sizes: list[list[int]]) -> dict[str, Tensor]:
    layer = nn.SyncBatchNorm(3, dtype=torch.float64)
    x = values((sum(map(sum, sizes)), 3, 4), torch.float64)
    ends = torch.tensor(sizes).flatten().cumsum(0).view(len(sizes), -1)
    with accumulate(layer, len(sizes[0])):
        for end, size in zip(ends[rank], sizes[rank], strict=True):
            layer(x[end - size : end])
    return layer.state_dict()


@cpu_only("gloo between processes")
@pytest.mark.parametrize("sizes", [[[2, 3], [4, 1]], [[2, 0], [3, 4]]])
def test_collected_over_processes(sizes: list[list[int]]) -> None:
    whole = nn.BatchNorm1d(3, dtype=torch.float64)
    whole(values((sum(map(sum, sizes)), 3, 4), torch.float64))
    states = results(2, _sync_layer, sizes)
    for name in BUFFERS:
        torch.testing.assert_close(states[0][name], whole.get_buffer(name), **CLOSE)
        assert_same_bits(states[0][name], states[1][name])
