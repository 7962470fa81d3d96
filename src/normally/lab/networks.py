"""The networks of the experiments: a LeNet and a multilayer perceptron, their norm by name."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

import normally.nn

ALL = (1, 2, 3, 4)
ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


def lenet(
    image_size: int,
    *,
    norm: str = "batch",
    positions: Collection[int] = ALL,
    activation: str = "relu",
    after_activation: bool = False,
    dropout: float = 0.0,
    bias: bool = True,
    classes: int = 10,
    padding: int = 2,
) -> nn.Sequential:
    """LeNet (LeCun et al. 1998) with a normalization at each of its four hidden layers.

    Convolution and linear layers are drawn as `initialize` says. A norm draws nothing: from the
    same seed every form starts with the same weights.

    Args:
        image_size: height and width of the grey images, divisible by 4.
        norm: as in `block`.
        positions: the hidden layers that have it: 1 and 2 are convolutions, 3 and 4 dense.
        activation: as in `block`.
        after_activation: norm behind the activation instead of in front of it.
        dropout: probability of zeroing a unit behind each of the two dense hidden layers.
        bias: of the four hidden layers.
        classes: number of outputs.
        padding: of the second convolution: 2 keeps its size, 0 is the original's.
    """

    def hidden(position: int, features: int) -> list[nn.Module]:
        name = norm if position in positions else "none"
        dim = 2 if position <= 2 else 1
        parts = block(
            name, features, dim=dim, activation=activation, after_activation=after_activation
        )
        return [*parts, nn.Dropout(dropout)] if dropout and position > 2 else parts

    model = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        *hidden(1, 6),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5, padding=padding),
        *hidden(2, 16),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * ((image_size // 2 + 2 * padding - 4) // 2) ** 2, 120),
        *hidden(3, 120),
        nn.Linear(120, 84),
        *hidden(4, 84),
        nn.Linear(84, classes),
    )
    initialize(model, activation)
    if not bias:
        # Taken away, not left out: torch's constructors draw biases, and the weights would differ.
        for layer in [m for m in model if isinstance(m, nn.Conv2d | nn.Linear)][:-1]:
            layer.bias = None
    return model


def mlp(
    features: int,
    widths: Sequence[int],
    *,
    norm: str = "batch",
    activation: str = "relu",
    dropout: float = 0.0,
    classes: int = 10,
) -> nn.Sequential:
    """A multilayer perceptron; weights, norms, activations and dropout as in `lenet`."""
    parts: list[nn.Module] = [nn.Flatten()]
    for width in widths:
        parts += [nn.Linear(features, width), *block(norm, width, dim=1, activation=activation)]
        parts += [nn.Dropout(dropout)] if dropout else []
        features = width
    return initialize(nn.Sequential(*parts, nn.Linear(features, classes)), activation)


def block(
    norm: str,
    features: int,
    *,
    dim: int,
    activation: str = "relu",
    after_activation: bool = False,
) -> list[nn.Module]:
    """A normalization and an activation; a norm in front of ReLU is one fused layer with it.

    Args:
        norm: "none" or a name that `normally.nn.create_norm` knows. "layer" of a convolution takes
            its statistics over (C, H, W) of each sample, with an affine a channel: "group:1".
        features: channels.
        dim: 1 for (N, C), 2 for (N, C, H, W).
        activation: "relu", "sigmoid" or "tanh".
        after_activation: norm behind the activation.
    """
    acts = [ACTIVATIONS[activation]()]
    if norm == "none":
        return acts
    name = "group:1" if norm == "layer" and dim > 1 else norm
    options = {"dim": dim} if name == "batch" else {}
    if activation == "relu" and not after_activation:
        return [normally.nn.create_norm(name, features, act="relu", **options)]
    norms = [normally.nn.create_norm(name, features, **options)]
    return [*acts, *norms] if after_activation else [*norms, *acts]


def initialize(model: nn.Sequential, activation: str = "relu") -> nn.Sequential:
    """Weights as in He et al. 2015 for ReLU, in Glorot & Bengio 2010 for the others; biases 0."""
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            if activation == "relu":
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            else:
                nn.init.xavier_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return model
