"""fold: the same evaluation with fewer layers, or the reason why not."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normally
from normally import fold, fuse
from normally.surgery import FoldedNorm, Report
from tests.surgery.models import Residual, randomized

GENERATOR = torch.Generator().manual_seed(5)


def made(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=GENERATOR)


def check(model: nn.Module, x: Tensor, folded: int, left: int = 0, convert: bool = False) -> Report:
    """Fold, and ask everything that every fold promises."""
    model = randomized(model).eval()
    twin = copy.deepcopy(model)
    if convert:
        normally.convert(model)
    held = {id(p) for p in model.parameters()}
    result, report = fold(model, x, return_report=True)
    assert result is model
    assert (len(report.changed), len(report.left)) == (folded, left), str(report)
    # float64: a product and a sum more than before.
    torch.testing.assert_close(model(x), twin(x), rtol=1e-12, atol=1e-12)
    more = torch.cat((x, x.flip(0)))
    torch.testing.assert_close(model(more), twin(more), rtol=1e-12, atol=1e-12)
    assert sum(isinstance(m, FoldedNorm) for m in model.modules()) == folded
    norms = [m for m in twin.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    kept = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    assert len(norms) - len(kept) == folded or folded == 0
    # Weights are the parameters that they were; only a missing bias is new.
    new = [p for p in model.parameters() if id(p) not in held]
    assert all(p.dim() == 1 for p in new)
    assert report.largest_deviation is None or report.largest_deviation < 1e-10
    return report


IMAGES = (2, 3, 9, 9)
CONVOLUTIONS: dict[str, tuple[list[nn.Module], tuple[int, ...]]] = {
    "conv1d": ([nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)], (2, 3, 9)),
    "conv2d": ([nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8)], IMAGES),
    "conv2d no bias": ([nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)], IMAGES),
    "grouped": ([nn.Conv2d(6, 9, 3, groups=3), nn.BatchNorm2d(9)], (2, 6, 5, 5)),
    "depthwise": ([nn.Conv2d(6, 12, 3, groups=6, stride=2), nn.BatchNorm2d(12)], (2, 6, 7, 7)),
    "conv3d": ([nn.Conv3d(2, 4, 3, dilation=2), nn.BatchNorm3d(4)], (2, 2, 7, 7, 7)),
    "transposed": ([nn.ConvTranspose2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)], IMAGES),
    "transposed grouped": (
        [nn.ConvTranspose2d(6, 9, 3, groups=3, bias=False), nn.BatchNorm2d(9)], (2, 6, 5, 5),
    ),
    "transposed 1d": ([nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6)], (2, 4, 5)),
    "linear": ([nn.Linear(5, 7), nn.BatchNorm1d(7)], (4, 5)),
    "linear channels last": (
        [nn.Linear(5, 7, bias=False), normally.nn.BatchNorm1d(7, channel_dim=-1)], (4, 3, 5),
    ),
    "no affine": ([nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False)], IMAGES),
    "no bias of the norm": ([nn.Conv2d(3, 8, 3), normally.nn.BatchNorm2d(8, bias=False)], IMAGES),
    "synchronized": ([nn.Conv2d(3, 8, 3), normally.nn.SyncBatchNorm(8)], IMAGES),
    "instance": (
        [nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True, track_running_stats=True)], IMAGES,
    ),
    "dropout between": ([nn.Conv2d(3, 8, 3), nn.Dropout(), nn.BatchNorm2d(8)], IMAGES),
    "views between": (
        [nn.Conv2d(3, 8, 9), nn.Flatten(), nn.Identity(), nn.BatchNorm1d(8)], IMAGES,
    ),
    "no momentum": ([nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=None)], IMAGES),
}  # fmt: skip


@pytest.mark.parametrize("convert", [False, True], ids=["torch", "converted"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_layers(name: str, convert: bool) -> None:
    layers, shape = CONVOLUTIONS[name]
    check(copy.deepcopy(nn.Sequential(*layers)), made(*shape), 1, convert=convert)


def test_a_frozen_norm() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(3, 8, 3), normally.nn.FrozenBatchNorm(8)))
    twin, x = copy.deepcopy(model), made(*IMAGES)
    fold(model, x)
    assert isinstance(model[1], FoldedNorm)
    torch.testing.assert_close(model(x), twin(x), rtol=1e-12, atol=1e-12)


def test_half_and_single() -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        model = randomized(nn.Sequential(nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8))).to(dtype).eval()
        twin = copy.deepcopy(model)
        x = made(2, 16, 9, 9).to(dtype)
        _, report = fold(model, x, return_report=True)
        assert model[0].weight.dtype is dtype
        # The norm scales by up to 2; the weights and the result round once more.
        scale = twin(x).abs().max().item()
        torch.testing.assert_close(model(x), twin(x), rtol=0, atol=tolerance * scale)
        assert 0 <= report.output_deviation <= tolerance


def test_a_residual_network_fused_or_not() -> None:
    x = made(2, 3, 9, 8)
    check(Residual(), x, 6)
    model = randomized(Residual()).eval()
    twin = copy.deepcopy(model)
    fuse(model, x)
    _, report = fold(model, x, return_report=True)
    assert len(report.changed) == 6
    torch.testing.assert_close(model(x), twin(x), rtol=1e-12, atol=1e-12)


def test_an_activation_stays() -> None:
    for act in normally.reference.ACTIVATIONS:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), normally.nn.BatchNorm2d(8, act=act))
        check(model, made(2, 3, 6, 6), 1)
    model = nn.Sequential(
        nn.Linear(3, 8), normally.nn.BatchNorm1d(8, act="leaky_relu", act_param=0.3)
    )
    check(model, made(5, 3), 1)


class WithResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn = normally.nn.BatchNorm2d(3, act="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x), residual=x)


class Masked(WithResidual):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x), mask=x[:, :1] > 0)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(self.conv(x)) + self.other(self.conv(x.sin()))


class OtherUser(WithResidual):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y


class SharedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.bn = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.one(x)) + self.bn(self.other(x))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    model[2].weight = model[0].weight
    return model


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[0].register_forward_pre_hook(lambda m, args: None)
    return model


def weight_normed() -> nn.Module:
    conv = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1))
    return nn.Sequential(conv, nn.BatchNorm2d(3))


class Standardized(nn.Conv2d):
    """Its weight is standardized in the forward: a scale is lost."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class Flattened(nn.Module):
    """A batch norm over what is no channel of the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 2, 1), nn.BatchNorm1d(2 * 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x).flatten(1))


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "shared convolution": (Shared, "conv is used 2 times in the forward"),
    "shared norm": (SharedNorm, "it is used 2 times in the forward"),
    "another user": (OtherUser, "the output of conv is used elsewhere as well"),
    "tied": (tied, "the parameters of 0 are another module's, too"),
    "hooked": (hooked, "0 has hooks, which would see other values"),
    "weight norm": (weight_normed, "0 is parametrized: its weight is computed from others"),
    "masked": (Masked, "its padding is masked"),
    "batch statistics": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
        "it normalizes with the batch's own statistics in evaluation, too",
    ),
    "no convolution": (
        lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)),
        "its input is no convolution's or linear layer's output",
    ),
    "activation between": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)),
        "its input is no convolution's or linear layer's output",
    ),
    "standardized": (lambda: nn.Sequential(Standardized(3, 3, 3), nn.BatchNorm2d(3)), "it changed"),
    "flattened": (Flattened, "changed, it raises RuntimeError|it changed the result"),
}


@pytest.mark.parametrize("name", LEFT)
def test_refusals(name: str) -> None:
    make, reason = LEFT[name]
    model = make()
    norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    report = check(model, made(4, 3, 3, 3), 0, left=norms)
    assert re.search(reason, report.left[0].note), report.left[0].note


def test_a_residual_in_the_call_is_kept() -> None:
    check(WithResidual(), made(2, 3, 5, 5), 1)


class AsTokens(nn.Module):
    """LeViT's: a linear layer whose output is asked for its shape as well."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.bn(x.flatten(0, 1)).reshape_as(x)


def test_who_asks_for_a_shape_takes_no_value() -> None:
    check(AsTokens(), made(2, 3, 5), 1)


def test_what_is_left_of_a_norm() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), normally.nn.BatchNorm2d(8, act="relu")).train()
    norm = model[1]
    fold(model, torch.randn(2, 3, 5, 5))
    assert model[1] is norm  # it stays in all places where it is
    assert norm.training
    assert isinstance(norm, nn.Identity)
    assert isinstance(norm.act, nn.ReLU)
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(again(x), model(x))
    with pytest.raises(ValueError, match="mask and lengths must be None"):
        norm(x, mask=x > 0)


def test_foreign_norms_are_folded_and_others_stay_what_they_were() -> None:
    timm = pytest.importorskip("timm")
    layer = timm.layers.BatchNormAct2d(8, act_layer=nn.SiLU)
    model = randomized(
        nn.Sequential(nn.Conv2d(3, 8, 3), layer, timm.layers.BatchNormAct2d(8))
    ).eval()
    twin = copy.deepcopy(model)
    _, report = fold(model, made(2, 3, 5, 5), return_report=True)
    assert [c.done for c in report.changes].count(True) == 1
    assert type(model[2]) is timm.layers.BatchNormAct2d
    x = made(2, 3, 5, 5)
    torch.testing.assert_close(model(x), twin(x), rtol=1e-12, atol=1e-12)


def test_gradients_are_that_of_the_folded_layers() -> None:
    """Inputs can still be differentiated; a fresh bias learns where the weight does."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
    model[0].weight.requires_grad_(False)
    fold(model, torch.randn(2, 3, 5, 5))
    assert not model[0].bias.requires_grad


class Opaque(nn.Module):
    """Branches on a value: its inside can be followed, itself cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        if bool(x.sum() > 1e9):
            return x
        return self.bn(self.conv(x))


def test_inside_of_what_cannot_be_followed() -> None:
    report = check(Opaque(), made(2, 3, 5, 5), 1, left=1)
    assert report.changed[0].path == "inner.1"
    assert "cannot be followed" in report.left[0].note


class ByShape(Opaque):
    """Branches on a size, which torch.fx cannot and torch.export can."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1))
        return self.bn(self.conv(self.inner(x)).contiguous())


class ByShapeTwice(ByShape):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


def test_by_export() -> None:
    report = check(nn.Sequential(ByShape()), made(2, 3, 5, 5), 2)
    assert {c.path for c in report.changed} == {"0.inner.1", "0.bn"}
    # A part that runs twice is one place; what is called in two places is not.
    report = check(ByShapeTwice(), made(2, 3, 5, 5), 1, left=1)
    assert report.changed[0].path == "inner.1"
    assert report.left[0].note == "it is used 2 times in the forward"


def test_selection_and_errors() -> None:
    model = randomized(Residual()).eval()
    _, report = fold(model, made(2, 3, 9, 8), only="blocks.0", skip="*.bn1", return_report=True)
    assert [c.path for c in report.changed] == ["blocks.0.bn2", "blocks.0.downsample.1"]
    with pytest.raises(TypeError, match="fold: example_inputs must be"):
        fold(model, None)


def test_at_least_what_torch_folds() -> None:
    """The same weights as torch's function for one pair, which takes eps in float32."""
    conv, bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
    model = randomized(nn.Sequential(conv, bn)).float().eval()
    theirs = torch.nn.utils.fuse_conv_bn_eval(copy.deepcopy(conv), copy.deepcopy(bn))
    fold(model, torch.randn(2, 3, 5, 5))
    torch.testing.assert_close(conv.weight, theirs.weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(conv.bias, theirs.bias, rtol=1e-6, atol=1e-6)
