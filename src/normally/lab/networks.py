"""The networks of the experiments: a LeNet and a multilayer perceptron, their norm by name."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

import normally.nn

ALL = (1, 2, 3, 4)


def lenet(
    image_size: int,
    *,
    norm: str = "batch",
    positions: Collection[int] = ALL,
    after_activation: bool = False,
    dropout: float = 0.0,
    bias: bool = True,
    classes: int = 10,
) -> nn.Sequential:
    """LeNet (LeCun et al. 1998) with ReLU and a normalization at each of its four hidden layers.

    Convolution and linear layers are drawn as He et al. 2015 do for ReLU, biases are 0. A norm
    draws nothing: from the same seed every form starts with the same weights.

    Args:
        image_size: height and width of the grey images, divisible by 4.
        norm: as in `block`.
        positions: the hidden layers that have it: 1 and 2 are convolutions, 3 and 4 dense.
        after_activation: norm behind ReLU instead of in front of it.
        dropout: probability of zeroing a unit behind each of the two dense hidden layers.
        bias: of the four hidden layers.
        classes: number of outputs.
    """

    def hidden(position: int, features: int) -> list[nn.Module]:
        name = norm if position in positions else "none"
        dim = 2 if position <= 2 else 1
        parts = block(name, features, dim=dim, after_activation=after_activation)
        return [*parts, nn.Dropout(dropout)] if dropout and position > 2 else parts

    model = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        *hidden(1, 6),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5, padding=2),
        *hidden(2, 16),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * (image_size // 4) ** 2, 120),
        *hidden(3, 120),
        nn.Linear(120, 84),
        *hidden(4, 84),
        nn.Linear(84, classes),
    )
    initialize(model)
    if not bias:
        # Taken away, not left out: torch's constructors draw biases, and the weights would differ.
        for layer in [m for m in model if isinstance(m, nn.Conv2d | nn.Linear)][:-1]:
            layer.bias = None
    return model


def mlp(
    features: int, widths: Sequence[int], *, norm: str = "batch", classes: int = 10
) -> nn.Sequential:
    """A multilayer perceptron with ReLU; weights and norms as in `lenet`."""
    parts: list[nn.Module] = [nn.Flatten()]
    for width in widths:
        parts += [nn.Linear(features, width), *block(norm, width, dim=1)]
        features = width
    return initialize(nn.Sequential(*parts, nn.Linear(features, classes)))


def block(norm: str, features: int, *, dim: int, after_activation: bool = False) -> list[nn.Module]:
    """A normalization and ReLU; in front of ReLU the two are one fused layer.

    Args:
        norm: "none" or a name that `normally.nn.create_norm` knows. "layer" of a convolution takes
            its statistics over (C, H, W) of each sample, with an affine a channel: "group:1".
        features: channels.
        dim: 1 for (N, C), 2 for (N, C, H, W).
        after_activation: norm behind ReLU.
    """
    if norm == "none":
        return [nn.ReLU()]
    name = "group:1" if norm == "layer" and dim > 1 else norm
    options = {"dim": dim} if name == "batch" else {}
    if after_activation:
        return [nn.ReLU(), normally.nn.create_norm(name, features, **options)]
    return [normally.nn.create_norm(name, features, act="relu", **options)]


def initialize(model: nn.Sequential) -> nn.Sequential:
    """He et al. 2015 for ReLU; biases 0."""
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return model
