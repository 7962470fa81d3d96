"""Layers inside what people build from them: checkpoints, torch.func, tracing, autocast, DDP."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

from normally import nn
from tests.helpers import DEVICE, assert_same_bits, values

SHAPE = (6, 3, 5, 5)


def model(family: Any = nn, **options: Any) -> torch.nn.Sequential:
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), family.BatchNorm2d(4, **options), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(36, 5), family.BatchNorm1d(5, **options),
    )  # fmt: skip


def assert_same_buffers(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for (name, first), second in zip(a.named_buffers(), b.buffers(), strict=True):
        assert_same_bits(first, second, name)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_an_activation_checkpoint_counts_once(use_reentrant: bool, momentum: float | None) -> None:
    plain = model(momentum=momentum)
    recomputed = copy.deepcopy(plain)
    for step in range(2):
        results = []
        for net in (plain, recomputed):
            x = values(SHAPE, torch.float32, seed=step)
            x[0, 0, 0, 0] = torch.nan if step else 0.0
            x.requires_grad_()
            y = net(x) if net is plain else checkpoint(net, x, use_reentrant=use_reentrant)
            y.nan_to_num().square().sum().backward()
            results.append((y, x.grad, *(p.grad for p in net.parameters())))
        for a, b in zip(*results, strict=True):
            assert_same_bits(a, b)
        assert_same_buffers(plain, recomputed)
    assert recomputed[1].num_batches_tracked.item() == 2
    assert recomputed[1].skipped_updates.item() == 4


def test_a_checkpoint_in_a_checkpoint_counts_once() -> None:
    net = model()
    inner = torch.nn.Sequential(*net[:3])

    def outer(x: Tensor) -> Tensor:
        return net[3:](checkpoint(inner, x, use_reentrant=False))

    x = values(SHAPE, torch.float32).requires_grad_()
    checkpoint(outer, x, use_reentrant=False).square().sum().backward()
    assert net[1].num_batches_tracked.item() == net[5].num_batches_tracked.item() == 1


@pytest.mark.parametrize("training", [True, False])
def test_functional_call_uses_and_updates_what_it_is_given(training: bool) -> None:
    layer = nn.BatchNorm2d(3).train(training)
    untouched = copy.deepcopy(layer)
    other = nn.BatchNorm2d(3).train(training)
    torch.nn.init.uniform_(other.weight)
    other.running_mean.fill_(0.5)
    given = {k: v.clone() for k, v in (*other.named_parameters(), *other.named_buffers())}
    x = values(SHAPE, torch.float32)
    assert_same_bits(functional_call(layer, given, (x,)), other(x))
    assert_same_buffers(layer, untouched)
    for name, buffer in other.named_buffers():
        assert_same_bits(given[name], buffer, name)


def loss(parameters: dict[str, Tensor], layer: torch.nn.Module, x: Tensor) -> Tensor:
    return functional_call(layer, parameters, (x,)).square().mul(torch.arange(5.0)).sum()


MODES = {"evaluation": (False, True), "training without running statistics": (True, False)}


@pytest.mark.parametrize("act", [None, "relu", "gelu"])
@pytest.mark.parametrize("mode", MODES)
def test_func_grad_is_autograds(mode: str, act: str | None) -> None:
    training, track = MODES[mode]
    layer = nn.BatchNorm2d(3, track_running_stats=track, act=act).train(training)
    torch.nn.init.uniform_(layer.bias)
    x = values(SHAPE, torch.float32)
    parameters = dict(layer.named_parameters())
    gradients = grad(loss)(parameters, layer, x)
    loss(parameters, layer, x).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act", [None, "relu", "gelu"])
@pytest.mark.parametrize("mode", MODES)
def test_vmap_over_an_ensemble(mode: str, act: str | None) -> None:
    training, track = MODES[mode]
    layers = [nn.BatchNorm2d(3, track_running_stats=track, act=act).train(training) for _ in "four"]
    for layer in layers:
        torch.nn.init.uniform_(layer.weight)
        if track:
            torch.nn.init.uniform_(layer.running_mean)
    x = torch.stack([values(SHAPE, torch.float32, seed=seed) for seed in range(4)])
    parameters, buffers = stack_module_state(layers)

    def call(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
        return functional_call(layers[0], (parameters, buffers), (x,))

    def gradient(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
        return grad(lambda p: call(p, buffers, x).square().sum())(parameters)

    together = vmap(call)(parameters, buffers, x)
    shared = vmap(call, in_dims=(0, 0, None))(parameters, buffers, x[0])
    gradients = vmap(gradient)(parameters, buffers, x)
    for index, layer in enumerate(layers):
        torch.testing.assert_close(together[index], layer(x[index]), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(shared[index], layer(x[0]), rtol=1e-6, atol=1e-6)
        layer(x[index]).square().sum().backward()
        for name, parameter in layer.named_parameters():
            # Sums of 150 terms of both signs
            torch.testing.assert_close(gradients[name][index], parameter.grad, rtol=1e-5, atol=1e-4)


def test_vmap_over_training_with_shared_running_statistics_is_refused() -> None:
    """As in torch: which of the mapped batches should the buffers take?"""
    layer = nn.BatchNorm1d(3)
    untouched = copy.deepcopy(layer)
    with pytest.raises(RuntimeError):
        vmap(layer)(torch.randn(4, 6, 3))
    assert_same_buffers(layer, untouched)


def test_update_bn_gives_what_it_gives_torchs_layers() -> None:
    batches = [values((n, 3, 5, 5), torch.float32, seed=n) for n in (6, 6, 3)]
    ours, theirs = model(), model(torch.nn)
    for net in (ours, theirs):
        net(batches[0])
        update_bn(batches, net)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
    assert ours[1].momentum == 0.1
    assert ours[1].num_batches_tracked.item() == 3


@pytest.mark.parametrize("training", [True, False])
def test_two_forwards_before_a_backward_with_the_buffers_overwritten(training: bool) -> None:
    """DDP broadcasts the buffers of rank 0 into everybody's before each forward."""
    net = model().train(training)
    x = [values(SHAPE, torch.float32, seed=seed) for seed in (0, 1)]
    expected = []
    for index, shift in enumerate((0.0, 0.25)):
        twin = copy.deepcopy(net)
        overwrite(twin, shift)
        twin(x[index]).square().sum().backward()
        expected.append([p.grad for p in twin.parameters()])
    overwrite(net, 0.0)
    first = net(x[0])
    overwrite(net, 0.25)
    second = net(x[1])
    overwrite(net, 9.0)
    (first.square().sum() + second.square().sum()).backward()
    for parameter, a, b in zip(net.parameters(), *expected, strict=True):
        torch.testing.assert_close(parameter.grad, a + b, rtol=1e-5, atol=1e-4)


def overwrite(net: torch.nn.Module, shift: float) -> None:
    with torch.no_grad():
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.full_like(buffer, shift))
            elif name.endswith("running_var"):
                buffer.copy_(torch.full_like(buffer, 1 + shift))


def test_inference_mode() -> None:
    plain, inferring = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    x = values((6, 3), torch.float32)
    expected = plain(x)
    with torch.inference_mode():
        y = inferring(x)
        assert y.is_inference()
    assert_same_bits(y, expected)
    assert_same_buffers(inferring, plain)
    inferring(x).sum().backward()  # an ordinary layer still
    with torch.inference_mode():
        born = nn.BatchNorm1d(3, act="relu")
        born(x)
        assert_same_bits(
            born.eval()(x), nn.BatchNorm1d(3, act="relu").eval()(x).detach() * 0 + born(x)
        )
        assert born.num_batches_tracked.item() == 1


@pytest.mark.parametrize("training", [True, False])
def test_autocast_to_bfloat16(training: bool) -> None:
    ours, theirs = model().train(training), model(torch.nn).train(training)
    theirs.load_state_dict(ours.state_dict())
    x = values(SHAPE, torch.float32)
    results = []
    for net in (ours, theirs):
        seen: list[torch.dtype] = []
        handle = net[1].register_forward_hook(
            lambda _m, given, out, seen=seen: seen.extend((given[0].dtype, out.dtype))
        )
        with torch.autocast(DEVICE.type, torch.bfloat16):
            y = net(x)
        handle.remove()
        assert seen == [torch.bfloat16, torch.bfloat16]
        assert y.dtype is torch.bfloat16
        y.float().square().sum().backward()
        results.append((y.float(), [p.grad for p in net.parameters()]))
    for (name, buffer), other in zip(
        ours.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        assert buffer.dtype is other.dtype
        torch.testing.assert_close(buffer, other, rtol=2**-6, atol=2**-6, msg=name)
    # Two layers that round to bfloat16 (2^-8), the second around values from the first.
    torch.testing.assert_close(results[0][0], results[1][0], rtol=2**-5, atol=2**-5)
    assert all(g.dtype is torch.float32 for g in results[0][1])


@pytest.mark.parametrize("training", [True, False])
def test_symbolic_tracing_keeps_the_layers(training: bool) -> None:
    net = model(act="relu").train(training)
    traced = torch.fx.symbolic_trace(copy.deepcopy(net))
    kept = [
        type(traced.get_submodule(n.target)) for n in traced.graph.nodes if n.op == "call_module"
    ]
    assert kept.count(nn.BatchNorm2d) == kept.count(nn.BatchNorm1d) == 1
    x = values(SHAPE, torch.float32)
    assert_same_bits(traced(x), net(x))
    assert_same_buffers(traced, net)


class Residual(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, act="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, residual=x) + self.norm(x)


def test_symbolic_tracing_keeps_the_residual() -> None:
    traced = torch.fx.symbolic_trace(Residual().eval())
    x = values(SHAPE, torch.float32)
    assert_same_bits(traced(x), Residual().eval()(x))


class Masked(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.norm(x, mask=mask)


def test_symbolic_tracing_does_not_lose_a_mask() -> None:
    x, mask = torch.randn(4, 3, 5), torch.rand(4, 1, 5) > 0.5
    y = torch.fx.symbolic_trace(Masked())(x, mask)
    assert_same_bits(y, Masked()(x, mask))
    assert not y.masked_select(~mask).any()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_jit_trace_of_evaluation() -> None:
    net = model(act="silu")
    net(values(SHAPE, torch.float32))
    net.eval()
    traced = torch.jit.trace(net, values(SHAPE, torch.float32))
    x = values((2, *SHAPE[1:]), torch.float32, seed=3)
    torch.testing.assert_close(traced(x), net(x), rtol=1e-6, atol=1e-6)
