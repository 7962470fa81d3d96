"""Sequences of different lengths: a network that does not see how far they were padded.

    python examples/padded_sequences.py

A convolutional network is trained on the same sequences, padded to the longest of them and padded
further. With torch's norms the padding enters every statistic, and the two networks end up apart;
with `lengths=` they are one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import normally

FEATURES, CHANNELS, CLASSES = 3, 16, 2


class Network(nn.Module):
    """Convolution, batch norm, convolution, group norm, and the mean over what counts."""

    def __init__(self, batch_norm: Callable[[int], nn.Module], group_norm: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(FEATURES, CHANNELS, 5, padding=2)
        self.norm1 = batch_norm(CHANNELS)
        self.conv2 = nn.Conv1d(CHANNELS, CHANNELS, 5, padding=2)
        self.norm2 = group_norm
        self.head = nn.Linear(CHANNELS, CLASSES)

    def pooled(self, x: Tensor, lengths: Tensor) -> Tensor:
        """The head of the mean over the first lengths[n] positions."""
        kept = torch.arange(x.shape[-1]) < lengths[:, None]
        return self.head((x * kept[:, None]).sum(-1) / lengths[:, None])


class TorchNetwork(Network):
    """The norms see the padding."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm1d, nn.GroupNorm(4, CHANNELS))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Only the mean at the end knows the lengths."""
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        return self.pooled(x, lengths)


class MaskedNetwork(Network):
    """The norms leave it out, and turn it into 0 again, which the next convolution pads with."""

    def __init__(self) -> None:
        super().__init__(
            lambda channels: normally.nn.BatchNorm1d(channels, act="relu"),
            normally.nn.GroupNorm(4, CHANNELS, act="relu"),
        )

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Every norm knows the lengths."""
        x = self.norm1(self.conv1(x), lengths=lengths)
        x = self.norm2(self.conv2(x), lengths=lengths)
        return self.pooled(x, lengths)


def pad(sequences: Sequence[Tensor], length: int) -> Tensor:
    """(N, FEATURES, length), zeros behind each sequence."""
    return torch.stack([nn.functional.pad(s, (0, length - s.shape[-1])) for s in sequences])


def train(network: type[Network], length: int, steps: int = 20) -> dict[str, Tensor]:
    """The state after training on the same sequences, padded to `length`."""
    torch.manual_seed(0)
    model = network().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        lengths = torch.randint(5, 40, (8,))
        labels = torch.randint(0, CLASSES, (8,))
        sequences = [
            torch.randn(FEATURES, int(n), dtype=torch.float64) + 0.5 * label
            for n, label in zip(lengths, labels, strict=True)
        ]
        loss = nn.functional.cross_entropy(model(pad(sequences, length), lengths), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


def difference(network: type[Network]) -> float:
    """How far padding to 100 instead of 40 moves the trained parameters and statistics."""
    short, long = train(network, 40), train(network, 100)
    floating = [name for name, value in short.items() if value.is_floating_point()]
    return max((short[name] - long[name]).abs().max().item() for name in floating)


def main() -> None:
    print("largest difference of parameters and running statistics, padded to 40 and to 100:")
    for name, network in (("torch", TorchNetwork), ("lengths=", MaskedNetwork)):
        print(f"  {name:10} {difference(network):.1e}")


if __name__ == "__main__":
    main()
