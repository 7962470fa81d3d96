"""ResNet-50 with its batch norms replaced by ours, and with their sums and ReLUs in them."""

from __future__ import annotations

import copy
import importlib
from typing import Any, cast

from torch import Tensor, nn

from ... import nn as ours_nn

_PARTS = ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3")


def load() -> tuple[nn.Module, str]:
    """A fresh ResNet-50 and the library that it is of.

    Raises:
        ImportError: where neither torchvision nor timm can be imported.
    """
    try:
        library = importlib.import_module("torchvision")
        models = importlib.import_module("torchvision.models")
        return models.resnet50(), f"torchvision {library.__version__}"
    except ImportError:
        timm = importlib.import_module("timm")
        return timm.create_model("resnet50"), f"timm {timm.__version__}"


def with_ours(model: nn.Module) -> nn.Module:
    """A copy whose torch.nn.BatchNorm2d are ours, each alone."""
    model = copy.deepcopy(model)
    _replace_norms(model)
    return model


def with_fused(model: nn.Module) -> nn.Module:
    """A copy whose batch norms also do the ReLU, and at a block's end the sum before it."""
    model = with_ours(model)
    fused = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if all(hasattr(child, part) for part in _PARTS):
                setattr(parent, name, _Bottleneck(child))
                fused += 1
    if fused == 0:
        raise ValueError("bench.gpu: the network must have bottleneck blocks. Got none.")
    _fuse_stem(model)
    return model


class _Bottleneck(nn.Module):
    """A block's layers, called with the activation and the residual inside the norms."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = block.conv1, block.conv2, block.conv3
        self.bn1, self.bn2, self.bn3 = block.bn1, block.bn2, block.bn3
        self.downsample = block.downsample
        for norm in (self.bn1, self.bn2, self.bn3):
            norm.act = "relu"

    def forward(self, input: Tensor) -> Tensor:
        """relu(bn(conv(…)) + input), as He et al. 2015."""
        residual = input if self.downsample is None else self.downsample(input)
        x = self.bn1(self.conv1(input))
        x = self.bn2(self.conv2(x))
        return cast(Tensor, self.bn3(self.conv3(x), residual))


def _fuse_stem(model: nn.Module) -> None:
    """The first convolution's norm takes the ReLU after it."""
    for name in ("relu", "act1"):  # torchvision's and timm's
        if isinstance(getattr(model, name, None), nn.ReLU):
            setattr(model, name, nn.Identity())
            cast(Any, model).bn1.act = "relu"
            return


def _replace_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:  # a subclass does more
            setattr(module, name, _ours(child))
        else:
            _replace_norms(child)


def _ours(norm: nn.BatchNorm2d) -> nn.Module:
    """Our layer with the same parameters and statistics."""
    layer = ours_nn.BatchNorm2d(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    )
    layer.load_state_dict(norm.state_dict())
    return layer.train(norm.training)
