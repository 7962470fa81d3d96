"""recalibrate: the statistics of all values, for whatever the data looks like."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn

from normally import nn, recalibrate
from tests.surgery.populations import (
    FAMILIES,
    assert_population,
    images,
    inputs,
    network,
    rows,
)

pytestmark = pytest.mark.usefixtures("one_thread")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked", "_skipped_updates")


# --- what the statistics are


@FAMILIES
@pytest.mark.parametrize("sizes", [[100] * 10, [1, 2, 3, 994], [1000], [7] * 142 + [6]], ids=len)
def test_sorted_data_in_any_split(family: Any, sizes: list[int]) -> None:
    """Promise 11. The averages of update_bn miss the variance between batches."""
    torch.manual_seed(0)
    x = torch.randn(1000, 1).sort(0).values
    layer = family.BatchNorm1d(1)
    recalibrate(layer, list(x.split(sizes)))
    assert_population(layer, rows(x))
    assert layer.num_batches_tracked.item() == len(sizes)


def test_what_update_bn_gives_on_sorted_data() -> None:
    """The gap that promise 11 names: the true variance is 1.008."""
    torch.manual_seed(0)
    x = torch.randn(10_000, 1)
    x = ((x - x.mean()) / x.std() * 1.008**0.5).sort(0).values
    theirs, ours = torch.nn.BatchNorm1d(1), torch.nn.BatchNorm1d(1)
    batches = list(x.split(100))
    update_bn(batches, theirs)
    recalibrate(ours, batches)
    assert theirs.running_var.item() < 0.01
    assert ours.running_var.item() == pytest.approx(1.008, rel=1e-6)


@FAMILIES
def test_one_batch_is_one_forward_in_training(family: Any) -> None:
    """What a single forward of all the data leaves with momentum=None."""
    model = network(family).eval()
    whole = copy.deepcopy(model)
    for module in whole.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.train()
            module.momentum = None
    whole(images())
    recalibrate(model, [images()])
    for name, value in whole.state_dict().items():
        # torch sums the statistics in float32 there.
        torch.testing.assert_close(model.state_dict()[name], value, rtol=2e-6, atol=1e-6)


@FAMILIES
def test_one_pass_is_precise_batch_norm(family: Any) -> None:
    """Every layer normalizes with the batch while it is measured; dropout is off."""
    batches = list(images().split([16, 5, 19]))
    model = network(family)
    behind = copy.deepcopy(model).double()
    behind[3].eval()
    found = inputs(behind, [x.double() for x in batches])
    recalibrate(model, batches)
    for path, values in found.items():
        # From float32 activations: each is off by 1e-7 of its size, the mean of many by less.
        assert_population(model.get_submodule(path), values)


def test_unbiased_and_correction_are_the_layers_own() -> None:
    batches = list(images(dtype=torch.float64).split(9))
    for options in ({"unbiased": False}, {"correction": 1}):
        model = torch.nn.Sequential(
            nn.BatchNorm2d(3, dtype=torch.float64, **options),
            nn.BatchNorm2d(3, dtype=torch.float64, **options),
        )
        found = inputs(copy.deepcopy(model), batches)
        recalibrate(model, batches)
        for path, values in found.items():
            assert_population(model.get_submodule(path), values, options.get("unbiased", True))


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e6])
def test_far_from_zero(mean: float) -> None:
    """Float32 inputs whose squares would cancel."""
    torch.manual_seed(0)
    x = torch.randn(400, 3, 5) + mean
    for family in (torch.nn, nn):
        layer = family.BatchNorm1d(3)
        recalibrate(layer, list(x.split([50, 350])))
        assert_population(layer, rows(x))


@FAMILIES
def test_momentum_none_and_a_layer_without_counter(family: Any) -> None:
    x = images()
    layer = family.BatchNorm2d(3, momentum=None)
    recalibrate(layer, list(x.split(7)))
    assert_population(layer, rows(x))
    assert layer.momentum is None
    assert layer.num_batches_tracked.item() == 6
    layer.num_batches_tracked = None
    recalibrate(layer, list((2 * x).split(7)))
    assert_population(layer, rows(2 * x))


def test_masks_and_lengths_count() -> None:
    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.BatchNorm1d(3)
            self.second = nn.BatchNorm1d(3, channel_dim=-1)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            x = self.first(x, lengths=lengths).mT
            mask = torch.arange(x.shape[1]) < lengths[:, None]
            y: Tensor = self.second(x, None, mask)
            return y

    torch.manual_seed(0)
    x, lengths = torch.randn(12, 3, 6), torch.tensor([6, 1, 0, 4, 2, 3] * 2)
    x[torch.arange(6).expand(12, 3, 6) >= lengths[:, None, None]] = torch.nan
    batches = [{"x": x[i : i + 4], "lengths": lengths[i : i + 4]} for i in range(0, 12, 4)]
    batches.insert(1, {"x": x[2:3], "lengths": lengths[2:3]})  # nothing but padding
    for layerwise in (False, True):
        model = Masked()
        recalibrate(model, batches, layerwise=layerwise)
        kept = rows(x)[~rows(x).isnan().any(1)]
        assert_population(model.first, kept)
        assert model.first.num_batches_tracked.item() == 3
        if layerwise:
            model.eval()
            y = model.first(x, lengths=lengths).detach()
            assert_population(model.second, rows(y)[~rows(x).isnan().any(1)])


# --- whatever the data looks like


class _Named(torch.nn.Module):
    """A model in Hugging Face's manner."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(3)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.norm(pixel_values).mean((2, 3))}


class _Keywords(_Named):
    def forward(self, pixel_values: Tensor, **others: Any) -> dict[str, Tensor]:
        assert set(others) == {"labels", "more"}
        return super().forward(pixel_values)


class _Several(torch.nn.Module):
    """Its input is a list."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, parts: list[Tensor]) -> Tensor:
        y: Tensor = self.norm(torch.cat(parts, 1))
        return y


def _loader(x: Tensor) -> torch.utils.data.DataLoader[Any]:
    data = torch.utils.data.TensorDataset(x, torch.arange(len(x)))
    return torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)


def test_kinds_of_batches() -> None:
    x = images()
    parts = x.split(16)
    named = [{"labels": torch.zeros(len(p)), "pixel_values": p, "more": 1} for p in parts]
    cases: list[tuple[torch.nn.Module, Any]] = [
        (torch.nn.BatchNorm2d(3), parts),
        (torch.nn.BatchNorm2d(3), [[p, 0] for p in parts]),
        (torch.nn.BatchNorm2d(3), [(p, torch.zeros(1)) for p in parts]),
        (torch.nn.BatchNorm2d(3), [{"image": p, "label": 0} for p in parts]),
        (torch.nn.BatchNorm2d(3), (p for p in parts)),
        (torch.nn.BatchNorm2d(3), _loader(x)),
        (_Named(), named),
        (_Keywords(), named),
        (_Named(), [(each, 0) for each in named]),
        (torch.nn.DataParallel(_Named()), named),
        (torch.compile(_Named(), backend="eager"), named),
        (torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.BatchNorm2d(3))), parts),
        (_Several(), [([p[:, :2], p[:, 2:]], 0) for p in parts]),
    ]
    for model, data in cases:
        recalibrate(model, data)
        layer = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
        assert_population(layer, rows(x))


def test_forward_chooses() -> None:
    x = images()
    layer = torch.nn.BatchNorm2d(3)
    recalibrate(layer, [(0, p) for p in x.split(16)], forward=lambda model, batch: model(batch[1]))
    assert_population(layer, rows(x))


def test_steps() -> None:
    layer = torch.nn.BatchNorm2d(3)
    recalibrate(layer, list(images().split(8)), steps=2)
    assert_population(layer, rows(images()[:16]))

    def endless() -> Iterator[Tensor]:
        while True:
            yield images()

    recalibrate(layer, endless(), steps=3)
    assert layer.num_batches_tracked.item() == 3


def test_a_single_value_is_normalized_with_what_was_found_before() -> None:
    """The last batch of a loader: in training it would be an error."""
    x = images(41)
    for family in (torch.nn, nn):
        model = network(family)
        recalibrate(model, [x[:20], x[20:40], x[40:]])
        assert_population(model[1], rows(model[0](x)))
        assert model[8].num_batches_tracked.item() == 3
        assert all(t.isfinite().all() for t in model.state_dict().values())
        recalibrate(model, [x[40:], x[:20], x[20:40]])  # the first: with the running statistics
        assert all(t.isfinite().all() for t in model.state_dict().values())


def test_an_empty_batch_changes_nothing() -> None:
    x = images()
    for family in (torch.nn, nn):
        layer = family.BatchNorm2d(3)
        recalibrate(layer, [x[:7], x[:0], x[7:]])
        assert_population(layer, rows(x))
        assert layer.num_batches_tracked.item() == 2


# --- what it says meanwhile


def test_progress_is_told() -> None:
    batches = list(images().split(9))
    told: list[tuple[int, int | None]] = []
    recalibrate(network(nn), batches, progress=lambda done, total: told.append((done, total)))
    assert told == [(i + 1, 5) for i in range(5)]
    told.clear()
    recalibrate(
        network(nn),
        batches,
        layerwise=True,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(i + 1, 15) for i in range(15)]
    told.clear()
    recalibrate(network(nn), iter(batches), progress=lambda done, total: told.append((done, total)))
    assert told == [(i + 1, None) for i in range(5)]


def test_the_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    recalibrate(network(nn), [images()])
    assert capsys.readouterr() == ("", "")  # stderr is no terminal
    recalibrate(network(nn), [images()], progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "recalibrate" in err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    recalibrate(network(nn), [images()])
    with pytest.raises(ImportError, match="progress=True needs rich"):
        recalibrate(network(nn), [images()], progress=True)


def test_the_report() -> None:
    model = network(nn)
    _, report = recalibrate(model, list(images().split(16)), return_report=True)
    lines = str(report).splitlines()
    assert lines[0] == "recalibrate: 3 changed, 0 left as they were"
    assert lines[1].startswith(
        "  1  BatchNorm2d → 1,440 values a channel in 3 batches; means moved"
    )
