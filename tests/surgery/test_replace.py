"""replace: other norms, with what the old ones had, or a reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normally
from normally import convert, freeze, fuse, replace
from tests.surgery.models import Residual, randomized
from tests.surgery.test_convert import NormAct, RmsNorm

C = 6


def test_group_norm_for_batch_norm() -> None:
    model = randomized(Residual()).train()
    model.blocks[1].eval()
    parameters, keys = list(model.parameters()), {n for n, _ in model.named_parameters()}
    old = dict(model.named_modules())
    model, report = replace(model, {"BatchNorm2d": "group:3"}, return_report=True)
    assert len(report.changed) == len(report.changes) == 6
    for path, module in model.named_modules():
        before = old[path]
        assert module.training == before.training
        assert (module is before) != isinstance(before, nn.BatchNorm2d)
        if isinstance(before, nn.BatchNorm2d):
            assert isinstance(module, normally.nn.GroupNorm)
            assert module.num_groups == 3
            assert "keeps weight, bias" in next(c.note for c in report.changes if c.path == path)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert {n for n, _ in model.named_parameters()} == keys
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    bn = old["stem.1"]
    expected = nn.functional.group_norm(model.stem[0](x), 3, bn.weight, bn.bias).relu()
    torch.testing.assert_close(model.stem(x), expected, rtol=1e-12, atol=1e-12)


PLACES: dict[str, tuple[nn.Module, str, type[nn.Module], tuple[int, ...]]] = {
    "layer": (nn.BatchNorm2d(C), "layer", normally.nn.LayerNorm, (2, C, 3, 4)),
    "instance": (nn.BatchNorm1d(C), "instance", normally.nn.InstanceNorm1d, (2, C, 5)),
    "batch": (nn.GroupNorm(2, C), "batch", normally.nn.BatchNorm2d, (2, C, 3, 4)),
    "batch 3d": (
        nn.InstanceNorm3d(C, affine=True), "BN3d", normally.nn.BatchNorm3d, (2, C, 2, 3, 4)
    ),
    "frozen": (nn.BatchNorm2d(C), "frozen", normally.nn.FrozenBatchNorm, (2, C, 3, 4)),
    "sync": (nn.BatchNorm2d(C), "sync", normally.nn.SyncBatchNorm, (2, C, 3, 4)),
    "rms": (nn.LayerNorm(C), "rms", normally.nn.RMSNorm, (2, 5, C)),
    "layer for rms": (RmsNorm(C), "layer", normally.nn.LayerNorm, (2, 5, C)),
    "activation": (
        normally.nn.BatchNorm2d(C, act="leaky_relu", act_param=0.3), "group:1",
        normally.nn.GroupNorm, (2, C, 3, 4),
    ),
    "none": (nn.BatchNorm2d(C), "none", nn.Identity, (2, C, 3, 4)),
    "none, activated": (normally.nn.BatchNorm2d(C, act="silu"), "none", nn.Identity, (2, C, 3)),
    "none, foreign": (NormAct(C, nn.ReLU()), "none", nn.Identity, (2, C, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_places(name: str) -> None:
    layer, wanted, cls, shape = PLACES[name]
    layer = randomized(copy.deepcopy(layer)).eval()
    model = replace(nn.Sequential(layer), {"*": wanted})
    new = model[0]
    assert isinstance(new, cls)
    assert not new.training
    for key in ("weight", "bias", "running_mean", "running_var"):
        before, after = getattr(layer, key, None), getattr(new, key, None)
        if before is not None and after is not None:
            assert torch.equal(before, after), key
            assert after.dtype is torch.float64
    x = torch.randn(shape, dtype=torch.float64)
    y = model(x)
    assert y.shape == x.shape
    if name in ("frozen", "sync"):  # the same function in evaluation
        torch.testing.assert_close(y, layer(x), rtol=1e-12, atol=1e-12)
    if name == "none, activated":
        torch.testing.assert_close(y, nn.functional.silu(x))
    if name == "none, foreign":
        torch.testing.assert_close(y, x.relu())
    if name == "activation":
        expected = nn.functional.group_norm(x, 1, layer.weight, layer.bias)
        torch.testing.assert_close(y, nn.functional.leaky_relu(expected, 0.3))


def test_keys_and_functions() -> None:
    seen = []

    def make(layer: Any) -> nn.Module:
        seen.append(layer)
        return nn.GroupNorm(2, layer.num_features)

    model = Residual()
    norms = {"stem": "none", "*.downsample.1": make, "BatchNorm?d": "layer"}
    _, report = replace(model, norms, skip="blocks.1", return_report=True)
    assert type(model.stem[1]) is nn.Identity
    assert type(model.blocks[0].downsample[1]) is nn.GroupNorm
    assert isinstance(model.blocks[0].bn1, normally.nn.LayerNorm)
    assert type(model.blocks[1].bn1) is nn.BatchNorm2d
    assert len(seen) == 1
    notes = {c.path: c.note for c in report.changes}
    assert notes["stem.1"] == "Identity(); gone: weight, bias"
    assert "new: weight, bias; gone: weight, bias" in notes["blocks.0.downsample.1"]


def test_a_layer_in_two_places_stays_one() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Identity())
    model[2] = model[0]
    replace(model, {"BatchNorm2d": "group:2"})
    assert model[0] is model[2]
    assert isinstance(model[0], normally.nn.GroupNorm)


# --- fitted


def spread() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return list(torch.randn(24, 3, 8, 8, generator=generator, dtype=torch.float64).split(7))


def test_the_fit_is_that_of_least_squares() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C))).train()
    data = spread()
    h = model[0](torch.cat(data)).detach()
    y = copy.deepcopy(model[1]).eval()(h).detach()
    _, report = replace(model, {"BatchNorm2d": "group:2"}, match=data, return_report=True)
    x = nn.functional.group_norm(h, 2)
    distance = 0.0
    for c in range(C):
        columns = torch.stack([x[:, c].flatten(), torch.ones_like(x[:, c]).flatten()], 1)
        solution = torch.linalg.lstsq(columns, y[:, c].flatten()).solution
        torch.testing.assert_close(model[1].weight[c], solution[0], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(model[1].bias[c], solution[1], rtol=1e-8, atol=1e-8)
        distance += float((columns @ solution - y[:, c].flatten()).square().sum())
    (change,) = report.changes
    assert change.deviation == pytest.approx((distance / float(y.square().sum())) ** 0.5, rel=1e-6)
    assert model.training
    assert model[1].training


@pytest.mark.parametrize("name", ["group:2", "layer", "instance", "frozen"])
def test_the_evaluation_function_stays_near(name: str) -> None:
    data = spread()
    model = randomized(Residual())
    for _ in range(20):  # statistics of the data, as a trained model has
        model.train()(torch.cat(data))
    model.eval()
    x = torch.cat(data)
    expected = model(x).detach()
    plain = replace(copy.deepcopy(model), {"BatchNorm2d": name})
    options = {"affine": True} if name == "instance" else {}
    make: Any = lambda m: normally.create_norm(name, m.num_features, **options)  # noqa: E731
    fitted, report = replace(
        copy.deepcopy(model),
        {"BatchNorm2d": make if options else name},
        match=[(batch, None) for batch in data],
        return_report=True,
    )
    far, near = ((m(x) - expected).norm() / expected.norm() for m in (plain, fitted))
    assert all(c.deviation is not None and c.deviation < 1 for c in report.changes)
    assert all("fitted, from a deviation of" in c.note for c in report.changes)
    if name == "frozen":  # the same function before and after
        assert near < 1e-10
    elif name != "layer":  # whose layers are better one by one; the output is about as far
        assert near < 0.7 * far


def test_the_activation_is_left_out_of_the_fit() -> None:
    model = randomized(nn.Sequential(normally.nn.BatchNorm1d(3, act="relu")))
    x = torch.randn(64, 3, 5, dtype=torch.float64)
    twin = copy.deepcopy(model).eval()
    replace(model, {"BatchNorm1d": "batch"}, match=[x])
    torch.testing.assert_close(model.eval()(x), twin(x), rtol=1e-9, atol=1e-9)


def test_layers_that_the_data_does_not_come_to() -> None:
    model = nn.ModuleDict({"used": nn.BatchNorm2d(4), "unused": nn.BatchNorm2d(4)})
    _, report = replace(
        model, {"BatchNorm2d": "group:2"}, match=[torch.randn(2, 4, 3, 3)],
        forward=lambda m, x: m["used"](x), return_report=True,
    )  # fmt: skip
    assert [c.deviation is None for c in report.changes] == [False, True]
    assert "not fitted" in report.changes[1].note


def test_an_exception_leaves_the_model_as_it_was() -> None:
    model = randomized(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)))
    layers, before = list(model), copy.deepcopy(model.state_dict())
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    calls = []

    def forward(m: nn.Module, batch: Tensor) -> Tensor:
        calls.append(m)
        if len(calls) == 5:  # while the second layer is fitted
            raise KeyboardInterrupt
        return m(batch)

    with pytest.raises(KeyboardInterrupt):
        replace(model, {"BatchNorm2d": "group:2"}, match=[x], forward=forward)
    assert all(a is b for a, b in zip(model, layers, strict=True))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


# --- beside the other verbs


def test_beside_fuse_convert_and_freeze() -> None:
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    model = randomized(Residual())
    fuse(model, x)
    before = model(x)
    with pytest.raises(ValueError, match="revert comes first"):
        replace(model, {"BatchNorm2d": "group:2"}, only="stem")
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    # Norms that the module around them fuses: its own forward is called then.
    twin = normally.revert(copy.deepcopy(model))
    for m in (model, twin):
        replace(m, {"BatchNorm2d": "group:2"}, only="blocks")
    torch.testing.assert_close(model(x), twin(x), rtol=1e-12, atol=1e-12)
    replaced = replace(Residual().double(), {"BatchNorm2d": "group:2"})
    _, report = fuse(replaced, x, return_report=True)
    assert report.changed
    with pytest.raises(ValueError, match="unfreeze comes first"):
        replace(freeze(Residual()), {"BatchNorm2d": "group:2"})
    converted = replace(convert(nn.Sequential(nn.BatchNorm2d(4))), {"BatchNorm2d": "group:2"})
    assert isinstance(normally.revert(converted)[0], normally.nn.GroupNorm)
    compiled = torch.compile(converted, backend="aot_eager", fullgraph=True)
    assert compiled(torch.randn(2, 4, 3, 3)).shape == (2, 4, 3, 3)


def hooked() -> nn.Module:
    layer = nn.BatchNorm2d(C)
    layer.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    ("layer", "name", "reason"),
    [
        (nn.BatchNorm2d(24), "group:32", r"32 groups do not divide its 24 channels; 1, 2, 3, 4, 6"),
        (nn.BatchNorm2d(24), "group", "32 groups do not divide"),
        (hooked(), "group:2", "it has hooks"),
        (nn.BatchNorm2d(C), "rms", "its channels are dimension 1, and 'rms' is over the last one"),
        (nn.LayerNorm(C), "group:2", "its channels come last"),
        (nn.LayerNorm((3, C)), "rms", r"it normalizes over a shape of \(3, 6\)"),
        (nn.LazyBatchNorm2d(), "group:2", "has not met its first input"),
        (NormAct(C, nn.ReLU()), "group:2", "it applies an activation"),
        (normally.nn.BatchNorm2d(C, act="relu"), "frozen", "it applies an activation"),
        (nn.BatchNorm2d(C), "grop", "did you mean 'group'"),
        (nn.BatchNorm2d(C), lambda layer: None, "gave no module but NoneType"),
        (nn.BatchNorm2d(C), lambda layer: layer, "gave the layer itself"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 9 else "",
)
def test_refusals_change_nothing(layer: nn.Module, name: Any, reason: str) -> None:
    other = nn.GroupNorm(2, 4)
    model = nn.Sequential(other, layer)
    with pytest.raises(ValueError, match=rf"(?s)Nothing was changed.*\n  1 \(\w+\): .*{reason}"):
        replace(model, {"GroupNorm": "batch", "1": name})
    assert model[0] is other
    assert model[1] is layer


def test_errors() -> None:
    model, norms = nn.Sequential(nn.BatchNorm2d(4)), {"BatchNorm2d": "group:2"}
    cases: list[tuple[type[Exception], str, Any]] = [
        (TypeError, r"model must be a torch\.nn\.Module", lambda: replace([model], norms)),  # type: ignore[call-overload]
        (TypeError, "norms must be a mapping", lambda: replace(model, "group:2")),  # type: ignore[call-overload]
        (TypeError, "norms must have names.* Got 3", lambda: replace(model, {"0": 3})),  # type: ignore[dict-item]
        (ValueError, "norms must name norms.* Got 'BatchNorm1d'",
         lambda: replace(model, {"BatchNorm1d": "layer"})),
        (ValueError, "only must name", lambda: replace(model, norms, only="head")),
        (ValueError, "the model itself", lambda: replace(nn.BatchNorm2d(4), norms)),
        (TypeError, "data must be an iterable", lambda: replace(
            model, norms, match=torch.randn(2, 4, 3, 3))),
        (ValueError, "one after the other", lambda: replace(
            model, norms, match=(x for x in [torch.randn(2, 4, 3, 3)]))),
    ]  # fmt: skip
    for error, match, call in cases:
        with pytest.raises(error, match=match):
            call()
        assert type(model[0]) is nn.BatchNorm2d
