"""freeze and unfreeze: what stays, what it costs, and the very same model again."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normally
from normally import (
    convert,
    convert_sync_batchnorm,
    fold,
    freeze,
    fuse,
    recalibrate,
    revert,
    revert_sync_batchnorm,
    unfreeze,
)
from tests.surgery.models import Block, Residual, outcome, randomized, snapshot
from tests.surgery.test_convert import NormAct, RmsNorm, Stranger

C = 4
Make = Callable[[], nn.Module]

#: Layers with running statistics, and an input's shape.
WITH_STATISTICS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(C), (6, C, 5)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(C, momentum=None), (6, C, 3, 2)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(C, affine=False), (6, C, 2, 3, 2)),
    "InstanceNorm2d": (
        lambda: nn.InstanceNorm2d(C, affine=True, track_running_stats=True), (6, C, 5, 2),
    ),
    "ours": (lambda: normally.nn.BatchNorm2d(C, act="relu", unbiased=False), (6, C, 3, 2)),
    "ours channels last": (lambda: normally.nn.BatchNorm1d(C, channel_dim=-1), (6, 5, C)),
    "ours SyncBatchNorm": (lambda: normally.nn.SyncBatchNorm(C), (6, C, 3)),
    "ours InstanceNorm1d": (
        lambda: normally.nn.InstanceNorm1d(C, track_running_stats=True, act="silu"), (6, C, 5),
    ),
    "converted": (lambda: convert(nn.BatchNorm2d(C)), (6, C, 3, 2)),
    "foreign": (lambda: NormAct(C, nn.LeakyReLU(0.3)), (6, C, 3, 2)),
    "foreign converted": (lambda: convert(NormAct(C, nn.ReLU())), (6, C, 3, 2)),
    "of no formula": (lambda: Stranger(C), (6, C, 3, 2)),
}  # fmt: skip
#: Layers whose affine part is all that can be frozen.
OTHERS: dict[str, Make] = {
    "LayerNorm": lambda: nn.LayerNorm(C),
    "RMSNorm": lambda: nn.RMSNorm(C),
    "GroupNorm": lambda: nn.GroupNorm(2, C),
    "ours": lambda: normally.nn.GroupNorm(2, C, act="silu"),
    "foreign": lambda: RmsNorm(C),
    "converted": lambda: convert(RmsNorm(C)),
    "no statistics": lambda: nn.BatchNorm2d(C, track_running_stats=False),
}


def made(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def buffers(layer: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in layer.named_buffers()}


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_a_frozen_layer_is_the_one_in_evaluation(name: str) -> None:
    make, shape = WITH_STATISTICS[name]
    layer = randomized(make()).train()
    twin = copy.deepcopy(layer).eval()
    twin.requires_grad_(False)
    before, keys, parameters = snapshot(layer), list(layer.state_dict()), list(layer.parameters())
    assert freeze(layer) is layer
    assert list(layer.state_dict()) == keys
    assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True))
    for mode in (True, False, True):
        layer.train(mode)
        assert not layer.training
        statistics = buffers(layer)
        x = made(*shape)
        found, expected = outcome(layer, x), outcome(twin, x)
        for a, b in zip(found[:2], expected[:2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        for key, value in buffers(layer).items():
            assert torch.equal(value, statistics[key]), key
    assert not any(p.requires_grad for p in layer.parameters())
    assert unfreeze(layer) is layer
    assert snapshot(layer) == before


@pytest.mark.parametrize("name", OTHERS)
def test_other_norms_have_an_affine_part_alone(name: str) -> None:
    layer = OTHERS[name]()
    before = snapshot(layer)
    _, report = freeze(layer, statistics=True, affine=False, return_report=True)
    assert not report.changed
    _, report = freeze(layer, return_report=True)
    assert report.changed[0].note in ("frozen weight and bias", "frozen weight")
    assert not any(p.requires_grad for p in layer.parameters())
    assert layer.train().training
    unfreeze(layer)
    assert all(p.requires_grad for p in layer.parameters())
    assert snapshot(layer) == before


# --- what it costs


def saved_bytes(call: Callable[[], Tensor], besides: int = 0) -> int:
    """What autograd keeps for the backward, but for tensors as small as that."""
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes if tensor.numel() > besides else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(sizes)


LINEAR = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "ours SyncBatchNorm", "ours channels last")


@pytest.mark.parametrize("name", LINEAR)
def test_nothing_of_the_inputs_size_is_saved(name: str) -> None:
    make, shape = WITH_STATISTICS[name]
    layer, twin = freeze(make()), make()
    constants = 3 * C  # mean, variance and count
    x = made(*shape).detach().float().requires_grad_()
    assert saved_bytes(lambda: layer(x), besides=constants) == 0
    assert saved_bytes(lambda: twin(x), besides=constants) >= x.nbytes
    frozen = normally.nn.FrozenBatchNorm(C)
    if shape[1] == C:
        assert saved_bytes(lambda: frozen(x)) == 3 * 4 * C  # its buffers but the bias, in float32


@pytest.mark.skipif(normally.backends()["cpu"] == "reference", reason="kernels save bits")
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("act", ["relu", "relu6", "leaky_relu"])
def test_a_bit_a_value_is_saved_for_piecewise_linear_activations(act: str, residual: bool) -> None:
    layer = freeze(normally.nn.BatchNorm2d(C, act=act))
    x = torch.randn(2, C, 8, 8, requires_grad=True)
    added = torch.randn(2, C, 8, 8, requires_grad=True) if residual else None
    assert saved_bytes(lambda: layer(x, added), besides=3 * C) == x.numel() // 8


def test_other_activations_and_a_learning_weight_need_the_input() -> None:
    x = torch.randn(2, C, 8, 8, requires_grad=True)
    silu = freeze(normally.nn.BatchNorm2d(C, act="silu"))
    assert saved_bytes(lambda: silu(x), besides=3 * C) == x.nbytes
    learning = freeze(nn.BatchNorm2d(C), affine=False)
    assert saved_bytes(lambda: learning(x), besides=3 * C) == x.nbytes


def test_the_derivative_is_right_in_every_layout_and_twice() -> None:
    for act in (None, "relu", "silu"):
        layer = freeze(randomized(normally.nn.BatchNorm2d(C, act=act)))
        for x in (made(2, C, 3, 2), made(2, 3, 2, C).movedim(-1, 1), made(2, C, 3, 4)[..., ::2]):
            leaf = x.detach().requires_grad_()
            assert torch.autograd.gradcheck(layer, leaf)
            assert torch.autograd.gradgradcheck(layer, leaf)
            outputs = torch.ones_like(layer(leaf)[:1, :1, :1, :1])
            layer(leaf).backward(outputs.expand(2, C, 3, 2))  # strides of 0
            assert leaf.grad is not None
            expected = torch.autograd.grad(layer(leaf).sum(), leaf)[0]
            torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=0)


# --- what keeps it frozen


def frozen_network() -> nn.Module:
    model = randomized(nn.Sequential(
        nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.ReLU(), NormAct(C, nn.ReLU()),
        convert(NormAct(C, nn.Identity())), nn.GroupNorm(2, C),
    ))  # fmt: skip
    return freeze(model.train())


def assert_frozen(model: nn.Module) -> None:
    model.train()
    before = buffers(model)
    model(torch.randn(5, 3, 4, 4, dtype=torch.float64)).sum().backward()
    for name, value in buffers(model).items():
        assert torch.equal(value, before[name]), name
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {"0.weight", "0.bias"}


def test_copies_pickles_and_state_dicts() -> None:
    model = frozen_network()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_frozen(again)
        assert [type(m) for m in again] == [type(m) for m in model]
        unfreeze(again)
        assert all(p.requires_grad for p in again.parameters())
        assert [type(m) for m in again] == [type(m) for m in unfreeze(copy.deepcopy(model))]
        assert all(m.training for m in again.modules())
    assert_frozen(model)
    state = {name: value * 2 for name, value in model.state_dict().items()}
    for assign in (False, True):
        other = frozen_network()
        other.load_state_dict(state, assign=assign)
        torch.testing.assert_close(other[1].running_var, state["1.running_var"])
        assert_frozen(other)
        unfreeze(other)
        assert all(p.requires_grad for p in other.parameters())
    unfreeze(frozen_network()).load_state_dict(state)


def test_train_on_the_layer_and_the_mode_it_was_told() -> None:
    model = frozen_network()
    model[1].train()
    assert not model[1].training
    model.eval()
    assert unfreeze(model)[1].training is False
    model = frozen_network().eval()
    model[1].train()
    assert unfreeze(model)[1].training is True
    assert not model[3].training


def test_what_required_a_gradient_before() -> None:
    model = nn.Sequential(nn.BatchNorm2d(C), nn.BatchNorm2d(C))
    model[0].bias.requires_grad_(False)
    freeze(model)
    freeze(model)  # again: nothing is forgotten
    unfreeze(model)
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]


def test_parts_come_and_go_by_themselves() -> None:
    layer = nn.BatchNorm2d(C)
    before = snapshot(layer)
    freeze(layer, affine=False)
    assert (layer.training, layer.weight.requires_grad) == (False, True)
    x = torch.randn(4, C, 3, 3)
    layer(x).square().sum().backward()
    assert layer.weight.grad is not None
    layer.weight.grad = layer.bias.grad = None
    freeze(layer, statistics=False)
    assert (layer.training, layer.weight.requires_grad) == (False, False)
    unfreeze(layer, affine=False)
    assert (layer.training, layer.weight.requires_grad) == (True, False)
    unfreeze(layer, statistics=False)
    assert snapshot(layer) == before
    freeze(layer)
    unfreeze(layer, statistics=False)
    assert (layer.training, layer.weight.requires_grad) == (False, True)
    unfreeze(layer)
    assert snapshot(layer) == before


@pytest.mark.parametrize("family", [nn, normally.nn], ids=["torch", "ours"])
def test_lazy_layers(family: Any) -> None:
    model = freeze(nn.Sequential(family.LazyBatchNorm2d(), family.LazyInstanceNorm2d()))
    model[0].train()
    model(torch.randn(2, 3, 4, 4) + 5)
    assert isinstance(model[0], family.BatchNorm2d)
    assert not isinstance(model[0], nn.modules.lazy.LazyModuleMixin)
    assert not model.train()[0].training
    assert model[0].running_mean.eq(0).all()
    assert not model[0].weight.requires_grad
    unfreeze(model)
    assert type(model[0]) is family.BatchNorm2d
    assert model[0].training
    assert model[0].weight.requires_grad
    early = unfreeze(freeze(family.LazyBatchNorm2d()))
    assert type(early) is family.LazyBatchNorm2d
    early(torch.randn(2, 3, 4, 4))
    assert type(early) is family.BatchNorm2d


def test_a_shared_parameter() -> None:
    model = nn.Sequential(nn.BatchNorm2d(C), nn.BatchNorm2d(C))
    model[1].weight = model[0].weight
    freeze(model)
    unfreeze(model, only="0")
    assert not model[0].weight.requires_grad  # the other is frozen still
    assert model[0].bias.requires_grad
    unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())


def test_an_optimizer_made_before() -> None:
    model = randomized(nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    freeze(model)
    before = [p.clone() for p in model.parameters()]
    model(torch.randn(5, 3, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert moved == [True, True, False, False]


# --- beside the other verbs


def test_convert_and_revert() -> None:
    model = freeze(nn.Sequential(nn.BatchNorm2d(C), nn.GroupNorm(2, C)))
    _, report = convert(model, return_report=True)
    assert [c.path for c in report.changed] == ["1"]
    assert "unfreeze first" in report.left[0].note
    _, report = revert(model, return_report=True)
    assert [c.path for c in report.changed] == ["1"]
    unfreeze(model)
    assert type(model[0]) is nn.BatchNorm2d
    freeze(convert(model))
    _, report = revert(model, return_report=True)
    assert [c.note for c in report.left] == ["unfreeze comes first"] * 2
    revert(unfreeze(model))
    assert [type(m) for m in model] == [nn.BatchNorm2d, nn.GroupNorm]


@pytest.mark.parametrize("fuse_first", [False, True])
def test_fuse(fuse_first: bool) -> None:
    model = randomized(Residual()).train()
    twin, before = copy.deepcopy(model).eval(), snapshot(model)
    x = made(3, 3, 9, 8)
    steps = [lambda: fuse(model, x.detach(), return_report=True)[1].changed, lambda: freeze(model)]
    for step in steps if fuse_first else reversed(steps):
        assert step()
    model.train()
    assert len([m for m in model.modules() if "frozen" in m.extra_repr()]) == 6
    torch.testing.assert_close(model(x), twin(x), rtol=1e-12, atol=1e-12)
    wide = x.detach().requires_grad_()
    a, b = (torch.autograd.grad(m(wide).square().sum(), wide)[0] for m in (model, twin))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    if fuse_first:
        revert(unfreeze(model))
    else:
        _, report = unfreeze(model, return_report=True)
        assert {c.note for c in report.left} <= {"revert comes first"}
        unfreeze(revert(model))
    assert snapshot(model) == before


def test_a_frozen_and_fused_block_saves_less() -> None:
    model = Block().train()
    x = torch.randn(2, 6, 8, 8, requires_grad=True)
    small = 6 * 6 * 9  # a weight, and all that is less
    ordinary = saved_bytes(lambda: model(x), small)
    frozen = saved_bytes(lambda: freeze(model)(x), small)
    fuse(model, x.detach())
    fused = saved_bytes(lambda: model(x), small)
    # Ordinary: the inputs of two convolutions and of two norms, and two ReLUs' outputs, of which
    # one is an input. Frozen: without the norms'. Fused: bits in place of the ReLUs'.
    assert (ordinary // x.nbytes, frozen // x.nbytes) == (6, 4)
    if normally.backends()["cpu"] != "reference":
        assert fused == 2 * x.nbytes


@pytest.mark.parametrize("train", [False, True])
def test_fold(train: bool) -> None:
    model = freeze(randomized(Residual()).train(train))
    twin, x = copy.deepcopy(model), made(2, 3, 9, 8)
    _, report = fold(model, x.detach(), return_report=True)
    assert len(report.changed) == 6
    assert report.largest_deviation is not None
    assert report.largest_deviation < 1e-12
    torch.testing.assert_close(model(x), twin(x), rtol=1e-12, atol=1e-12)
    assert all(m.training is train for m in model.modules())


def test_sync_leaves_frozen_statistics_and_takes_the_others() -> None:
    model = nn.Sequential(nn.BatchNorm2d(C), nn.BatchNorm2d(C))
    freeze(model, only="0")
    freeze(model, only="1", statistics=False)
    convert_sync_batchnorm(model)
    assert not isinstance(model[0], normally.nn.SyncBatchNorm)
    assert isinstance(model[1], normally.nn.SyncBatchNorm)
    _, report = unfreeze(model, return_report=True)
    assert [c.note for c in report.left] == ["revert_sync_batchnorm comes first"]
    unfreeze(revert_sync_batchnorm(model))
    assert [type(m) for m in model] == [nn.BatchNorm2d] * 2
    assert all(p.requires_grad for p in model.parameters())


def test_recalibrate_leaves_it_and_keeps_its_mode() -> None:
    model = frozen_network()
    model.append(nn.BatchNorm2d(C, dtype=torch.float64))
    data = [torch.randn(5, 3, 4, 4, dtype=torch.float64)]
    _, report = recalibrate(model, data, return_report=True)
    assert [c.path for c in report.changed] == ["6"]
    assert all("frozen" in c.note for c in report.left)
    model.eval()
    recalibrate(model, data)
    assert not any(m.training for m in unfreeze(model).modules())


def test_accumulate_and_adapt_leave_it() -> None:
    model = frozen_network()
    model.append(nn.BatchNorm2d(C, dtype=torch.float64))
    before = buffers(model)
    data = [torch.randn(5, 3, 4, 4, dtype=torch.float64)]
    normally.adapt(model, data).restore()
    assert all(vars(m)["training"] for m in model.modules())
    with normally.accumulate(model, 1):
        model(data[0])
    for name, value in buffers(model).items():
        assert torch.equal(value, before[name]) != name.startswith("6.") or "skipped" in name


@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script(_method)?` is deprecated")
def test_compile_and_export() -> None:
    model = frozen_network()
    x = made(5, 3, 4, 4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for mode in (True, False):
        model.train(mode)
        found, expected = compiled(x), model(x)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        a, b = (torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected))
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    exported = torch.export.export(model, (x.detach(),)).module()
    torch.testing.assert_close(exported(x), model(x), rtol=1e-12, atol=1e-12)


# --- selection, refusals


def test_selection_and_report() -> None:
    model = Residual()
    _, report = freeze(model, only="blocks", skip="*.bn2", return_report=True)
    assert [str(c) for c in report.changes] == [
        "blocks.0.bn1  BatchNorm2d → frozen statistics, weight and bias",
        "blocks.0.downsample.1  BatchNorm2d → frozen statistics, weight and bias",
        "blocks.1.bn1  BatchNorm2d → frozen statistics, weight and bias",
    ]
    _, report = freeze(model, return_report=True)
    assert {c.note for c in report.left} == {"it is frozen already"}
    assert len(report.changed) == len(report.left) == 3
    _, report = unfreeze(model, only="stem", return_report=True)
    assert [c.note for c in report.changed] == ["free statistics, weight and bias"]
    assert unfreeze(Residual(), return_report=True)[1].changes == ()


def parametrized() -> nn.Module:
    layer = nn.BatchNorm2d(C)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus())
    return layer


@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script(_method)?` is deprecated")
def test_what_is_left_says_why() -> None:
    without = nn.BatchNorm2d(C, affine=False, track_running_stats=False)
    scripted = torch.jit.script(nn.BatchNorm2d(C))
    model = nn.Sequential(normally.nn.FrozenBatchNorm(C), without, parametrized(), scripted)
    before = snapshot(model[:3])
    _, report = freeze(model, return_report=True)
    assert [c.note.split(";")[0].split(",")[0] for c in report.left] == [
        "its statistics and affine part are constants", "it keeps no running statistics",
        "it is parametrized", "it is scripted",
    ]  # fmt: skip
    assert not report.changed
    assert snapshot(model[:3]) == before


def test_a_replaced_forward_stays() -> None:
    layer = nn.BatchNorm2d(C)
    calls = []

    def forward(x: Tensor) -> Tensor:
        calls.append(layer.training)
        return nn.BatchNorm2d.forward(layer, x)

    layer.forward = forward  # type: ignore[method-assign]
    freeze(layer)
    layer.train()(torch.randn(2, C, 3, 3) + 5)
    assert calls == [False]
    assert layer.running_mean.eq(0).all()


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"freeze: statistics or affine must be True"):
        freeze(nn.BatchNorm2d(C), statistics=False, affine=False)
    with pytest.raises(ValueError, match=r"unfreeze: statistics or affine must be True"):
        unfreeze(nn.BatchNorm2d(C), statistics=False, affine=False)
    with pytest.raises(ValueError, match=r"freeze: only must name"):
        freeze(nn.BatchNorm2d(C), only="layer9")
    with pytest.raises(TypeError, match=r"freeze: model must be a torch\.nn\.Module"):
        freeze([nn.BatchNorm2d(C)])  # type: ignore[call-overload]
