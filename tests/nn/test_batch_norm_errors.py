"""What a layer refuses: torch's words, where it sits in the model, and nothing changed."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from normally import nn
from tests.helpers import assert_same_bits, on_device, values

LAYERS = {"BatchNorm1d": (2, 3), "BatchNorm2d": (4,), "BatchNorm3d": (5,)}


@pytest.mark.parametrize(
    ("name", "dim"), [(name, dim) for name in LAYERS for dim in range(7) if dim not in LAYERS[name]]
)
def test_another_rank_in_torchs_words(name: str, dim: int) -> None:
    x = torch.randn((3,) * dim)
    with pytest.raises(ValueError, match="expected") as theirs:
        getattr(torch.nn, name)(3)(x)
    with pytest.raises(ValueError, match=re.escape(str(theirs.value))):
        getattr(nn, name)(3)(x)


@pytest.mark.parametrize("name", LAYERS)
def test_one_value_per_channel_in_torchs_words(name: str) -> None:
    x = torch.randn(1, 3, *(1,) * (LAYERS[name][-1] - 2))
    with pytest.raises(ValueError, match="Expected more than 1 value") as theirs:
        getattr(torch.nn, name)(3)(x)
    with pytest.raises(ValueError, match=re.escape(str(theirs.value))) as ours:
        getattr(nn, name)(3)(x)
    for way_out in ("drop_last=True", ".eval()", "on_single_value='running'"):
        assert way_out in str(ours.value)


@pytest.mark.parametrize("training", [True, False])
def test_another_number_of_channels_in_torchs_words(training: bool) -> None:
    x = torch.randn(6, 5, 4)
    with pytest.raises(RuntimeError, match="should contain 5 elements not 3") as theirs:
        torch.nn.BatchNorm1d(3).train(training)(x)
    for error in (RuntimeError, ValueError):  # whichever the user's code catches
        with pytest.raises(error, match=str(theirs.value)):
            nn.BatchNorm1d(3).train(training)(x)


class Block(torch.nn.Module):
    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.features = torch.nn.Sequential(torch.nn.Identity(), norm, torch.nn.ReLU())

    def forward(self, input: Tensor) -> Tensor:
        return self.features(input)


class Net(torch.nn.Module):
    def __init__(self, norm: torch.nn.Module, recompute: bool = False) -> None:
        super().__init__()
        self.stem = torch.nn.Identity()
        self.blocks = torch.nn.ModuleDict({"first": Block(norm)})
        self.recompute = recompute

    def forward(self, input: Tensor) -> Tensor:
        if self.recompute:
            return checkpoint(self.blocks["first"], self.stem(input), use_reentrant=False)
        return self.blocks["first"](self.stem(input))


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_path_is_that_in_the_outermost_model(recompute: bool, lazy: bool) -> None:
    layer = nn.LazyBatchNorm2d() if lazy else nn.BatchNorm2d(3)
    model = Net(layer, recompute)
    where = r"\[in BatchNorm2d at blocks\.first\.features\.1 of Net\]"
    single = torch.randn(1, 3, 1, 1)
    with pytest.raises(ValueError, match=where) as error:
        model(single)
    assert error.value.__suppress_context__  # one traceback, not two
    with pytest.raises(ValueError, match=rf"expected 4D input \(got 2D input\).*{where}"):
        model(torch.randn(2, 3))
    with pytest.raises(ValueError, match=rf"5 elements not 3[\s\S]*{where}"):
        model(torch.randn(2, 5, 4, 4))
    with pytest.raises(TypeError, match=rf"float64[\s\S]*{where}"):
        model(torch.randn(2, 3, 4, 4).double())
    with pytest.raises(ValueError, match=r"\[in BatchNorm2d at features\.1 of Block\]"):
        model.blocks["first"](single)
    with pytest.raises(ValueError, match=r"\[in BatchNorm2d at 1 of Sequential\]"):
        model.blocks["first"].features(single)
    with pytest.raises(ValueError, match=r"\[in BatchNorm2d\]$"):
        layer(single)


X = on_device(values((4, 3, 5), torch.float32))
BAD: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "rank": ({"input": X[..., None]}, ValueError),
    "channels": ({"input": X[:, :2]}, ValueError),
    "one value": ({"input": X[:1, :, :1]}, ValueError),
    "integers": ({"input": X.long()}, TypeError),
    "complex": ({"input": X.to(torch.complex64)}, TypeError),
    "dtype": ({"input": X.double()}, TypeError),
    "device": ({"input": X.to("meta")}, ValueError),
    "residual's shape": ({"input": X, "residual": X[:, :, :2]}, ValueError),
    "residual's device": ({"input": X, "residual": X.to("meta")}, ValueError),
    "mask": ({"input": X, "mask": torch.ones(4, 3, 5).bool()}, ValueError),
    "lengths": ({"input": X, "lengths": torch.tensor([5.0, 4, 3, 2])}, TypeError),
    "one value kept": ({"input": X, "lengths": torch.tensor([0, 0, 1, 0])}, ValueError),
}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("case", BAD)
def test_nothing_is_changed_by_a_call_that_raised(case: str, momentum: float | None) -> None:
    layer = nn.BatchNorm1d(3, momentum=momentum)
    bad = X.clone()
    bad[0, 0] = torch.nan
    layer(bad)
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    versions = {name: buffer._version for name, buffer in layer.named_buffers()}
    arguments, error = BAD[case]
    with pytest.raises(error):
        layer(**arguments)
    for name, buffer in layer.named_buffers():
        assert_same_bits(buffer, buffers[name], name)
        assert buffer._version == versions[name], name
    twin = nn.BatchNorm1d(3, momentum=momentum)
    twin(bad)
    assert_same_bits(layer(X), twin(X))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("options", "error", "words"), [
    ({"act": "swish"}, ValueError, "act must be None or one of 'relu'"),
    ({"act": "relu", "act_param": 0.1}, ValueError, "act_param must be None unless"),
    ({"on_single_value": "skip"}, ValueError, "on_single_value must be 'error' or 'running'"),
    ({"correction": -1}, ValueError, "correction must be 0 or more. Got correction=-1"),
])  # fmt: skip
def test_options_are_checked_at_construction(
    name: str, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=f"^{name}: {re.escape(words)}"):
        getattr(nn, name)(3, **options)
    with pytest.raises(error, match=f"^Lazy{name}: {re.escape(words)}"):
        getattr(nn, f"Lazy{name}")(**options)


@pytest.mark.parametrize("eps", [0.0, -1e-5, float("nan")])
def test_eps_that_is_not_positive(eps: float) -> None:
    layer = nn.BatchNorm1d(3, eps=eps)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="batch_norm eps must be positive during training"):
        layer(X)
    for key, value in layer.state_dict().items():
        assert_same_bits(value, before[key], key)


def test_a_single_value_without_running_statistics_is_refused_even_if_they_are_asked_for() -> None:
    layer = nn.BatchNorm1d(3, on_single_value="running", track_running_stats=False)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        layer(torch.randn(1, 3))
