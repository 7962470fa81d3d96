"""fuse: found by data flow, proved, the same function, and back again."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normally
from normally import fuse, revert
from normally.surgery import FusedActivation
from normally.surgery._pairs import fusing, generated
from tests.surgery.models import (
    ADDITIONS,
    ROUNDING,
    WRITTEN,
    Block,
    Functional,
    Residual,
    assert_same_function,
    classes,
    randomized,
    snapshot,
)
from tests.surgery.test_convert import NormAct

X = torch.randn(4, 3, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def check(
    model: nn.Module,
    fused: int,
    *args: Tensor,
    left: int | None = 0,
    tolerance: float = ROUNDING,
    **kwargs: Any,
) -> Any:
    """Fuse, and ask everything that every fusion promises; gives the report."""
    model = randomized(model)
    twin, before = copy.deepcopy(model), snapshot(model)
    keys = list(model.state_dict())
    args = args or (X,)
    model, report = fuse(model, args, return_report=True, **kwargs)
    assert len(report.changed) == fused, str(report)
    assert left is None or len(report.left) == left, str(report)
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == [
        identity for state in before.values() for identity in state["_parameters"].values()
        if identity != id(None)
    ]  # fmt: skip
    assert_same_function(model, twin, *args, tolerance=tolerance)
    other = tuple(torch.randn(3, *a.shape[1:], dtype=a.dtype) for a in args)  # another batch size
    assert_same_function(model, twin, *other, tolerance=tolerance)
    assert_same_function(copy.deepcopy(model), twin, *args, tolerance=tolerance)
    if fused:
        assert report.largest_deviation < max(tolerance, 1e-9)
    revert(model)
    assert snapshot(model) == before
    return report


def norms_that_fuse(model: nn.Module) -> list[str]:
    return [p for p, m in model.named_modules() if getattr(m, "act", None) == "relu"]


# --- where the activation is


@pytest.mark.parametrize("act", WRITTEN)
def test_every_way_to_write_an_activation(act: str) -> None:
    # torch's derivatives of the hard ones have 1/6 in float32, ours in float64.
    tolerance = 1e-7 if act.startswith("hard") else ROUNDING
    for function in WRITTEN[act]:
        report = check(Functional(function), 1, tolerance=tolerance)
        assert report.changed[0].note.startswith(act)


@pytest.mark.parametrize(
    "act",
    [nn.ReLU(inplace=True), nn.LeakyReLU(0.2), nn.Hardswish(), nn.GELU("tanh"), nn.SiLU(),
     nn.ELU(2.0)],
    ids=str,
)  # fmt: skip
def test_modules_in_sequence(act: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), act, nn.Conv2d(8, 2, 1))
    check(copy.deepcopy(model), 1, tolerance=1e-7 if "Hard" in str(act) else ROUNDING)
    fuse(randomized(model), X)
    assert isinstance(model[2], FusedActivation)
    assert str(model[2]).endswith("of 1)")
    # Whoever goes through the children by hand gets the same.
    y = X
    for child in model:
        y = child(y)
    torch.testing.assert_close(y, model(X))


@pytest.mark.parametrize(
    "norm",
    [nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True), nn.BatchNorm2d(8, momentum=None),
     nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8, track_running_stats=False),
     normally.nn.BatchNorm2d(8, correction=1), nn.LayerNorm((8, 7, 6))],
    ids=str,
)  # fmt: skip
def test_every_norm_with_activations(norm: nn.Module) -> None:
    check(nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.SiLU()), 1)


def test_norms_without_activations_are_left() -> None:
    report = check(nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8), nn.SiLU()), 0, left=1)
    assert "RMSNorm has no fused activations" in report.left[0].note


class Apart(nn.Module):
    """The norm ends one module, the activation is in the one around it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.BatchNorm2d(8)))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.features(x), inplace=True))


class Viewed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x.flatten(2)).view(x.shape).permute(0, 2, 3, 1)
        return F.silu(y).contiguous()


class Twice(nn.Module):
    """One activation module behind two norms, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)))


class Elsewhere(Twice):
    """… and somewhere else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.relu(x))


@pytest.mark.parametrize(("model", "fused"), [(Apart, 1), (Viewed, 1), (Twice, 2), (Elsewhere, 2)])
def test_forms(model: Callable[[], nn.Module], fused: int) -> None:
    check(model(), fused)


# --- additions


@pytest.mark.parametrize("add", ADDITIONS)
def test_every_way_to_add(add: str) -> None:
    report = check(Residual(add), 5)
    notes = [c.note for c in report.changed]
    assert sum(note.startswith("+ relu") for note in notes) == 2
    # A block has two ReLUs in one module: its forward is written anew.
    model = randomized(Residual(add))
    fuse(model, X)
    assert isinstance(model.blocks[0], generated.Generated)
    assert isinstance(model.blocks[0], Block)
    assert not isinstance(model.stem, generated.Generated)


class AddsOnly(Block):
    """As MobileNet's: nothing behind the addition."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))


class NestedAdd(nn.Module):
    """As torchvision's MobileNetV3: the norm is two modules deep, the addition outside."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Hardswish()),
            nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)),
        )

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x)
        result += x
        return result


class BothNorms(nn.Module):
    """The sum of two norms: one of them takes the other as its residual."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.one(x) + self.other(x.sin()))


@pytest.mark.parametrize(("model", "fused"), [(AddsOnly, 2), (NestedAdd, 2), (BothNorms, 1)])
def test_forms_with_additions(model: Callable[[], nn.Module], fused: int) -> None:
    x = torch.randn(4, 6, 5, 5, dtype=torch.float64)
    check(model(), fused, x, tolerance=1e-7 if model is NestedAdd else ROUNDING)


# --- what is left, and why


class Branches(nn.Module):
    """HRNet's: a list of branches that nobody calls, and sums of sums."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(3)
        )
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.branches[0](x)
        for branch in self.branches[1:]:
            y = y + branch(x)
        return self.act(y)


@pytest.mark.parametrize("whole", [True, False])
def test_sums_of_sums_in_a_list_of_layers(whole: bool) -> None:
    model = Branches()
    if not whole:  # the list is in a part of a model that cannot be followed
        model = nn.Sequential(model, DataDependent())
    report = check(model, 2, left=None)
    assert all("used 2 times" not in change.note for change in report.left)


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(F.relu(self.bn(x))).tanh()


class TwoUsers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        return y + y.relu()


class IntoResidual(Block):
    def forward(self, x: Tensor) -> Tensor:
        identity = x + 1
        identity += self.bn2(self.conv2(x))
        return self.relu(identity)


class Broadcast(nn.Module):
    """What is added is larger than the norm's output."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(x[:, :, :1]) + x)


class OtherInTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        return y.tanh() if self.training else y.relu()


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "reused": (lambda: nn.Sequential(Reused()), "it is used 2 times in the forward"),
    "into the residual": (IntoResidual, "the sum is written into what is added"),
    "broadcast": (Broadcast, "changed, it raises ValueError.*must be broadcastable"),
    "other in training": (OtherInTraining, "what follows it in training is not"),
}


@pytest.mark.parametrize("name", LEFT)
def test_refusals(name: str) -> None:
    make, reason = LEFT[name]
    shape = (4, 3, 5, 5) if name == "reused" else (4, 6, 5, 5)
    report = check(make(), 0, torch.randn(shape, dtype=torch.float64), left=None)
    assert report.left, "nothing was said"
    assert re.search(reason, report.left[0].note), report.left[0].note


def test_two_users_are_no_fusion() -> None:
    check(TwoUsers(), 0)


def test_hooks_are_heard() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    model[1].register_forward_hook(lambda *_: None)
    _, report = fuse(model, X.float(), return_report=True)
    assert "its hooks would see other values" in report.left[0].note
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    model[2].register_forward_hook(lambda *_: None)
    _, report = fuse(model, X.float(), return_report=True)
    assert "the hooks of 2 would see other values" in report.left[0].note
    assert type(model[1]) is nn.BatchNorm2d  # not even converted


def test_a_failed_proof_leaves_the_model_and_names_the_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted mistake in one of three fusions of a module: the other two are kept."""
    right = fusing._set

    def wrong(norm: Any, act: Any, fusion: Any) -> None:
        right(norm, act, fusion)
        if fusion.path == "4":
            norm.act = "relu6"

    monkeypatch.setattr(fusing, "_set", wrong)
    model = randomized(nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(),
    ))  # fmt: skip
    with torch.no_grad():
        model[4].weight.mul_(9)  # beyond 6
    twin = copy.deepcopy(model)
    _, report = fuse(model, X, return_report=True)
    assert [c.path for c in report.changed] == ["1", "7"]
    assert "it changed the result" in report.left[0].note
    assert type(model[4]) is nn.BatchNorm2d
    assert type(model[5]) is nn.ReLU
    assert_same_function(model, twin, X)


# --- forwards that are written anew


def fused_block() -> tuple[nn.Module, nn.Module]:
    model = randomized(Residual())
    twin = copy.deepcopy(model)
    fuse(model, X)
    return model, twin


def calls_of(model: nn.Module, x: Tensor) -> list[str]:
    """The operators' activations, by whether a residual came with them."""
    found = []
    real = normally.nn.BatchNorm2d.forward

    def spy(
        self: Any, input: Tensor, residual: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        act = kwargs.get("act") or self.act
        found.append(("+" if residual is not None else "") + str(act))
        return real(self, input, residual, *args, **kwargs)

    normally.nn.BatchNorm2d.forward = spy  # type: ignore[method-assign]
    try:
        model(x)
    finally:
        normally.nn.BatchNorm2d.forward = real  # type: ignore[method-assign]
    return found


def test_the_norms_do_it_in_one_call() -> None:
    model, _ = fused_block()
    assert calls_of(model, X) == ["relu", "relu", "+relu", "relu", "+relu"]


def test_a_changed_block_runs_its_own_forward() -> None:
    model, twin = fused_block()
    for m in (model, twin):
        m.blocks[0].relu = nn.Tanh()
        m.blocks[1].downsample = nn.Identity()
    assert_same_function(model, twin, X)
    assert calls_of(model, X)[1:] == ["None"] * 4


def test_a_hook_that_comes_later_is_called() -> None:
    model, twin = fused_block()
    seen: list[Tensor] = []
    model.blocks[0].relu.register_forward_hook(lambda m, args, y: seen.append(y))
    torch.testing.assert_close(model(X), twin(X))
    assert len(seen) == 2
    assert calls_of(model, X)[1:] == ["None", "None", "relu", "+relu"]


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.double = False

    def forward(self, x: Tensor, scale: float = 1.0, extra: Tensor | None = None) -> Tensor:
        y = F.relu(self.bn(x)) * scale
        if extra is not None:
            y = y + extra
        return y * 2 if self.double else y


def test_calls_unlike_the_example_are_right() -> None:
    model = randomized(Optional())
    twin = copy.deepcopy(model)
    fuse(model, (X, 3.0))
    assert isinstance(model, generated.Generated)
    for args, kwargs in [
        ((X, 3.0), {}),
        ((X,), {}),
        ((X, 2.0), {}),
        ((X, 3.0, X), {}),
        ((X,), {"extra": X}),
    ]:
        torch.testing.assert_close(model(*args, **kwargs), twin(*args, **kwargs))
    model.double = twin.double = True
    torch.testing.assert_close(model(X, 3.0), twin(X, 3.0))


def test_keyword_examples() -> None:
    model = randomized(Optional())
    twin = copy.deepcopy(model)
    fuse(model, {"x": X, "extra": X})
    assert calls_of(model, X) == ["None"]
    assert calls_of_keywords(model) == ["relu"]
    torch.testing.assert_close(model(x=X, extra=X), twin(x=X, extra=X))


def calls_of_keywords(model: nn.Module) -> list[str]:
    return calls_of(lambda x: model(x=x, extra=x), X)  # type: ignore[arg-type]


def test_pickle_and_deepcopy_keep_the_forward() -> None:
    model, twin = fused_block()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert classes(other) == classes(model)
        assert_same_function(other, twin, X)
        assert calls_of(other, X) == ["relu", "relu", "+relu", "relu", "+relu"]
        revert(other)
        assert classes(other) == classes(twin)


@pytest.mark.parametrize("training", [True, False])
def test_one_graph(training: bool) -> None:
    model, twin = fused_block()
    model.train(training)
    twin.train(training)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), twin(X))
    if not training:
        exported = torch.export.export(model, (X,)).module()
        torch.testing.assert_close(exported(X), twin(X))


# --- forwards that a trace would not be the truth of


class NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.bn(x)
        return F.relu(y)


class Checkpointed(NoGrad):
    def forward(self, x: Tensor) -> Tensor:
        inner = torch.utils.checkpoint.checkpoint(self.bn, x, use_reentrant=False)
        return F.relu(inner)


class Remembers(NoGrad):
    def forward(self, x: Tensor) -> Tensor:
        self.is_large = len(x) > 2
        return F.relu(self.bn(x))


class Random(NoGrad):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(x))
        return y if torch.rand(1).item() < 2 else x


class DataDependent(NoGrad):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(x))
        return y if bool(y.sum() > -1) else x


@pytest.mark.parametrize("make", [NoGrad, Checkpointed, Remembers, Random, DataDependent])
def test_forwards_that_cannot_be_followed_are_left(make: Callable[[], nn.Module]) -> None:
    inner = make()
    inner.is_large = True
    model = nn.Sequential(inner, nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    report = check(model, 1, left=None)  # what is beside it is fused
    assert report.changed[0].path == "1.0"


class ByShape(nn.Module):
    """Branches on a size, which torch.fx cannot and torch.export can."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.act, self.bn = nn.Hardswish(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1))
        return F.relu(self.bn(self.act(self.features(x))))


def test_by_export() -> None:
    report = check(ByShape(), 1, left=1, tolerance=1e-7)
    assert report.changed[0].path == "features.1"
    assert report.left[0].path == "bn"  # needs a forward, which only torch.fx can write
    assert "torch.fx cannot trace it" in report.left[0].note


def test_twice_and_after_convert() -> None:
    model = normally.convert(randomized(Residual()))
    twin = copy.deepcopy(model)
    fuse(model, X)
    _, report = fuse(model, X, return_report=True)
    assert not report.changed
    assert_same_function(model, twin, X)
    revert(model)
    assert type(model.stem[1]) is nn.BatchNorm2d


def test_selection() -> None:
    report = check(Residual(), 2, only="blocks.1")
    assert {c.path for c in report.changed} == {"blocks.1.bn1", "blocks.1.bn2"}


@pytest.mark.parametrize("bad", [3, "x", None])
def test_example_inputs(bad: Any) -> None:
    with pytest.raises(TypeError, match="fuse: example_inputs must be a tensor, a tuple"):
        fuse(Residual(), bad)


def test_what_a_failing_model_raises_is_its_own() -> None:
    with pytest.raises(RuntimeError, match="channels"):
        fuse(Residual(), torch.randn(2, 5, 8, 8))


def test_a_converted_and_fused_layer_is_pickled() -> None:
    """It remembers a class that was made at run time."""
    model = normally.convert(
        nn.Sequential(nn.Conv2d(3, 4, 1), NormAct(4, nn.Identity()), nn.ReLU())
    )
    x = torch.randn(2, 3, 4, 4)
    _, report = fuse(model, x, return_report=True)
    assert report.changed
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    assert [type(m) for m in normally.revert(again)] == [nn.Conv2d, NormAct, nn.ReLU]
