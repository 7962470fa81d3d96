"""torchvision's architectures: converted, fused, folded, and back."""

from __future__ import annotations

import pytest
import torch
import torchvision

from tests.models.architectures import Seen, walk

#: What is converted, fused and folded.
QUICK = {
    "resnet18": (20, 17, 20),
    "mobilenet_v3_small": (34, 29, 34),
    "shufflenet_v2_x0_5": (56, 37, 56),
}

#: By name: the size of the images. Stochastic depth draws, so part of the last two is not fused.
REST = {
    "mobilenet_v2": 64, "mnasnet0_5": 64, "regnet_y_400mf": 64, "densenet121": 64, "googlenet": 64,
    "inception_v3": 299, "vgg11_bn": 32, "convnext_tiny": 64, "swin_t": 64, "vit_b_16": 224,
    "resnext50_32x4d": 64, "efficientnet_b0": 64, "efficientnet_v2_s": 64,
}  # fmt: skip


@pytest.mark.parametrize("name", QUICK)
def test_architectures(name: str) -> None:
    seen = seen_of(name, 64)
    assert seen.fused is not None
    assert seen.folded is not None
    found = tuple(len(report.changed) for report in (seen.converted, seen.fused, seen.folded))
    assert found == QUICK[name], f"{seen.converted}\n{seen.fused}\n{seen.folded}"


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
def test_other_architectures(name: str) -> None:
    assert seen_of(name, REST[name]).converted.changed


def seen_of(name: str, size: int) -> Seen:
    torch.manual_seed(0)
    options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, **options)
    return walk(model, {"x": torch.randn(2, 3, size, size, dtype=torch.float64)})
