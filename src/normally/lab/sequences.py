"""Sequences of different lengths, padded to one tensor, and two networks that read them.

An image is read column by column, a step each, and stands somewhere in a sequence of standard
normal noise. To name it, a network has to find it and, if it reads step by step, to remember it
until the sequence ends. Beyond the end there is padding: zeros.

A sequence is `(steps, features + 1)`. Its last feature is 1 where a step counts and 0 where it is
padding, so that data and mask travel together through the training loop.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normally.nn

from .data import Dataset


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Features `(N, steps, features)` and mask `(N, steps)`, True where a step counts."""
    return x[..., :-1], x[..., -1] > 0


def pad(x: Tensor, steps: int) -> Tensor:
    """That many steps of padding more."""
    return F.pad(x, (0, 0, 0, steps))


def hide(images: Tensor, lengths: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """A sequence for each image.

    Args:
        images: `(N, 1, H, W)` of mean 0 and standard deviation 1; W steps of H features.
        lengths: `(N,)`, from W to `steps`.
        steps: to which all are padded.
        generator: of the noise and the places.

    Returns:
        `(N, steps, H + 1)`.
    """
    count, _, features, width = images.shape
    x = torch.randn(count, steps, features, generator=generator)
    start = (torch.rand(count, generator=generator) * (lengths - width + 1)).long()
    places = (start[:, None] + torch.arange(width))[..., None].expand(-1, -1, features)
    x.scatter_(1, places, images[:, 0].transpose(1, 2))
    mask = (torch.arange(steps) < lengths[:, None]).to(x)[..., None]
    return torch.cat([x * mask, mask], -1)


def hidden_images(data: Dataset, seed: int, *, shortest: int, longest: int, steps: int) -> Dataset:
    """The data set's images as sequences, their lengths drawn evenly from `shortest` to `longest`.

    The same seed gives the same sequences.
    """
    generator = torch.Generator().manual_seed(seed)

    def sequences(images: Tensor) -> Tensor:
        lengths = torch.randint(shortest, longest + 1, (len(images),), generator=generator)
        return hide(images, lengths, steps, generator)

    return replace(data, train_x=sequences(data.train_x), test_x=sequences(data.test_x))


@torch.no_grad()
def padding_dependence(model: nn.Module, x: Tensor, steps: int, *, training: bool) -> float:
    """How far the outputs for the same sequences change with that many steps of padding more.

    Root mean square of the change over that of the outputs, on copies of the model.
    """
    one, other = (copy.deepcopy(model).train(training)(s) for s in (x, pad(x, steps)))
    return float((one - other).norm() / one.norm().clamp_min(1e-30))


class Convolutional(nn.Module):
    """Two convolutions over time, each with norm and ReLU; the maximum over the real steps.

    Args:
        features: of a step.
        norm: "none", "layer" over the channels of each step, "batch" with the mask, or "padded",
            which is batch norm without it.
        width: channels.
        classes: number of outputs.
    """

    def __init__(self, features: int, norm: str, width: int, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv1d(channels, width, 5, padding=2) for channels in (features, width)
        )
        self.norms = nn.ModuleList(_norm(norm, width, dim=1) for _ in self.layers)
        self.masked = norm in ("layer", "batch")
        self.output = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, steps, features + 1)` to `(N, classes)`."""
        values, mask = split(x)
        values = values.transpose(1, 2)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            values = layer(values)
            values = norm(values, mask=mask) if self.masked else norm(values)
            values = values.relu() * mask[:, None]
        return self.output(values.amax(2))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """A gated recurrent unit (Cho et al. 2014) with norms; its last real state is classified.

    Args:
        features: of a step.
        norm: "none", "layer", "batch" with the mask and one set of running statistics for all
            steps, or "steps", with a set of its own for each.
        width: units.
        longest: how many sets "steps" has; later steps take the last.
        classes: number of outputs.
    """

    def __init__(
        self, features: int, norm: str, width: int, longest: int, classes: int = 10
    ) -> None:
        super().__init__()
        self.input = nn.Linear(features, 3 * width)
        self.state = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, classes)
        for gate in self.state.weight.data.split(width):
            nn.init.orthogonal_(gate)
        self.masked = norm != "none"
        one = "batch" if norm == "steps" else norm
        self.input_norm = _norm(one, 3 * width, dim=-1)
        count = longest if norm == "steps" else 1
        self.state_norms = nn.ModuleList(_norm(one, 3 * width) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """`(N, steps, features + 1)` to `(N, classes)`."""
        values, mask = split(x)
        steps = int(mask.sum(1).max())
        values, mask = self.input(values[:, :steps]), mask[:, :steps]
        values = self.input_norm(values, mask=mask) if self.masked else values
        state = values.new_zeros(len(x), self.state.in_features)
        for step in range(steps):
            norm, real = self.state_norms[min(step, len(self.state_norms) - 1)], mask[:, step]
            gates = self.state(state)
            gates = norm(gates, mask=real) if self.masked else gates
            (a, b, c), (d, e, f) = values[:, step].chunk(3, 1), gates.chunk(3, 1)
            keep, new = (b + e).sigmoid(), (c + (a + d).sigmoid() * f).tanh()
            state = torch.where(real[:, None], new + keep * (state - new), state)
        return self.output(state)  # type: ignore[no-any-return]


def _norm(norm: str, channels: int, dim: int = 1) -> nn.Module:
    """Of `channels` at dimension 1 or -1."""
    if norm == "none":
        return nn.Identity()
    if norm == "layer":
        return normally.nn.LayerNorm(channels, dim=None if dim == -1 else dim)
    # Where one sequence alone goes on there is no variance over samples.
    return normally.nn.BatchNorm1d(channels, on_single_value="running", channel_dim=dim)
