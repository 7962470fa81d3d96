"""recalibrate(layerwise=True): in evaluation, what a layer gets has its running statistics."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from normally import nn, recalibrate
from normally.surgery._statistics.order import blocks, relations
from tests.surgery.populations import FAMILIES, assert_own_population, images, network

pytestmark = pytest.mark.usefixtures("one_thread")


class _Residual(torch.nn.Module):
    """Branches that are executed in another order than they were made in."""

    def __init__(self, family: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.last = family.BatchNorm2d(4)
        self.shortcut = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), family.BatchNorm2d(4))
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3, padding=1), family.BatchNorm2d(4), torch.nn.ReLU(),
            torch.nn.Conv2d(4, 4, 3, padding=1), family.BatchNorm2d(4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x) + self.shortcut(x)
        y: Tensor = self.last(x.relu())
        return y


class _Siamese(torch.nn.Module):
    """All layers are called twice, and none gets what has become of its own output."""

    def __init__(self, family: Any) -> None:
        super().__init__()
        self.tower = network(family)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.tower(x) - self.tower(2 * x.flip(3) + 1)
        return y


class _Recurrent(torch.nn.Module):
    """Both norms get what has become of their own outputs."""

    def __init__(self, family: Any, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.second = family.BatchNorm2d(3), family.BatchNorm2d(3)
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x * self.scale)
        x = self.first(self.conv(self.second(self.conv(x).relu())))
        y: Tensor = self.second(x)
        return y


class _Branching(torch.nn.Module):
    """Dark and bright images go different ways, and meet again."""

    def __init__(self, family: Any) -> None:
        super().__init__()
        self.end = family.BatchNorm2d(3)
        self.bright = torch.nn.Sequential(family.BatchNorm2d(3), torch.nn.ReLU())
        self.dark = torch.nn.Sequential(family.BatchNorm2d(3), torch.nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.end(self.bright(x) if x.mean() > 0 else self.dark(x))
        return y


MODELS = {
    "chain": network,
    "residual": _Residual,
    "siamese": _Siamese,
    "recurrent": _Recurrent,
    "branching": _Branching,
}


@FAMILIES
@pytest.mark.parametrize("name", MODELS)
def test_the_statistics_are_those_of_evaluation(family: Any, name: str) -> None:
    """For every split, to the promise's 1e-6: so splits agree, too."""
    for sizes in ([13, 13, 14], [1, 30, 9], [40]):
        model = MODELS[name](family)
        # One that branches by batch needs batches of one kind.
        batches = list(images().split(sizes))
        _, report = recalibrate(model, batches, layerwise=True, return_report=True)
        assert_own_population(model, batches)
        assert "converge" not in str(report)
        assert model.training


def test_in_float64_splits_agree_to_rounding() -> None:
    for make in (network, _Residual, _Siamese):
        found = []
        for sizes in ([40], [13, 13, 14], [5] * 8):
            model = make(nn).double()
            recalibrate(model, list(images(dtype=torch.float64).split(sizes)), layerwise=True)
            found.append(model.state_dict())
        for other in found[1:]:
            for name, value in found[0].items():
                if "running" in name:
                    # Sums of 1e4 terms in another order, through three layers.
                    torch.testing.assert_close(other[name], value, rtol=1e-12, atol=1e-12)


def test_one_pass_is_not_independent_of_the_split() -> None:
    """Why there is layerwise=True: the test above would see it."""
    found = []
    for sizes in ([40], [13, 13, 14]):
        model = network(nn).double()
        recalibrate(model, list(images(dtype=torch.float64).split(sizes)))
        found.append(model.state_dict())
    torch.testing.assert_close(found[0]["1.running_var"], found[1]["1.running_var"])
    assert (found[0]["5.running_var"] / found[1]["5.running_var"] - 1).abs().max() > 0.1


def test_forwards_end_at_the_layer_that_is_measured() -> None:
    """Three layers: a whole pass, one to the second layer, one to the third. And nothing after."""
    calls: list[str] = []
    for name, expected in (("chain", {"0": 3, "4": 3, "7": 2}), ("siamese", None)):
        model = MODELS[name](nn)
        calls.clear()
        for path, module in model.named_modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                module.register_forward_hook(lambda *_, path=path: calls.append(path))
        recalibrate(model, [images()], layerwise=True)
        if expected is not None:
            assert {path: calls.count(path) for path in expected} == expected
        else:
            # Order, then to the second call of each of three layers, then all to see that it stays.
            assert [calls.count(f"tower.{i}") for i in (0, 4, 7)] == [10, 9, 8]


def test_a_model_that_catches_exceptions() -> None:
    class Catches(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = torch.nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])

        def forward(self, x: Tensor) -> Tensor:
            for norm in self.norms:
                try:
                    x = norm(x).relu()
                except Exception:
                    x = x + torch.nan
            return x

    model = Catches()
    recalibrate(model, list(images().split(9)), layerwise=True)
    assert_own_population(model, [images()])


class _Again(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.norm(x))
        return y


def test_whole_steps_that_lead_away_are_halved() -> None:
    """With inputs of spread σ a step takes an error of the mean to -1/(2σ') times itself."""
    model = _Again()
    batches = list((0.1 * images()).split(13))
    _, report = recalibrate(model, batches, layerwise=True, return_report=True)
    assert "converge" not in report.changed[0].note
    assert_own_population(model, batches)
    assert model.norm.running_var.max() < 0.25  # -1/(2σ') is below -1


def test_what_does_not_converge_is_said() -> None:
    """Tiny inputs: what a layer makes of its own output is far larger than those."""
    model = _Again()
    batches = [1e-3 * images()[:4]]
    _, report = recalibrate(model, batches, layerwise=True, return_report=True)
    assert "did not converge in 50 turns" in report.changed[0].note
    with pytest.raises(AssertionError):
        assert_own_population(model, batches)


# --- the order


def _order(*orders: str) -> list[str]:
    paths = "abcdef"
    called = [any(path in order for order in orders) for path in paths]
    return ["".join(block.paths) for block in blocks(relations(orders, paths), called, paths)]


@pytest.mark.parametrize(("orders", "expected"), [
    ((), []),
    (("b",), ["b"]),
    (("cab",), ["c", "a", "b"]),
    (("caab",), ["c", "a", "b"]),
    (("cabab",), ["c", "ab"]),
    (("cbabad",), ["c", "ba", "d"]),
    (("cabacb",), ["cab"]),
    (("abd", "acd"), ["a", "b", "c", "d"]),
    (("ab", "ba"), ["ab"]),
    (("ab", "bc"), ["a", "b", "c"]),
    (("ab", "bc", "ca"), ["abc"]),
])  # fmt: skip
def test_the_order_of_layers(orders: tuple[str, ...], expected: list[str]) -> None:
    assert _order(*orders) == expected


def test_what_depends_on_itself_and_what_on_others() -> None:
    order = blocks(relations(["abbcdc"], "abcd"), [True] * 4, "abcd")
    assert [(b.paths, b.depends_on_itself, b.has_ancestors) for b in order] == [
        (("a",), False, False),
        (("b",), True, True),
        (("c", "d"), True, True),
    ]


def test_the_order_of_many_layers_does_not_take_long_to_find() -> None:
    paths = [f"layer{i}" for i in range(300)]
    before = relations([paths, paths[:200]], paths)
    assert [b.paths[0] for b in blocks(before, [True] * 300, paths)] == paths
    assert copy.copy(before).sum() == 2 * 300 * 299 / 2
