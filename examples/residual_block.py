"""A ResNet basic block whose norms, sum and activations are two fused layers.

    python examples/residual_block.py

The block is compared with torch's composition in float64: output, every gradient and the running
statistics. A state dict of one loads into the other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normally.nn import BatchNorm2d


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class TorchBlock(nn.Module):
    """The usual one: norm, ReLU, norm, sum and ReLU as five operations."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(channels, channels), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = conv3x3(channels, channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """relu(bn2(conv2(relu(bn1(conv1(x))))) + x)."""
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + x)


class FusedBlock(nn.Module):
    """The same function: ReLU is in the first norm, the sum and ReLU are in the second."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(channels, channels), BatchNorm2d(channels, act="relu")
        self.conv2, self.bn2 = conv3x3(channels, channels), BatchNorm2d(channels, act="relu")

    def forward(self, x: Tensor) -> Tensor:
        """The same, in two convolutions and two norms."""
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), residual=x)


def compare() -> dict[str, float]:
    """Largest differences of one training step, by what differs."""
    torch.manual_seed(0)
    theirs, ours = TorchBlock(16).double(), FusedBlock(16).double()
    ours.load_state_dict(theirs.state_dict())
    inputs = torch.randn(8, 16, 14, 14, dtype=torch.float64)
    gradient = torch.randn_like(inputs)
    outputs, input_gradients = [], []
    for block in (theirs, ours):
        x = inputs.clone().requires_grad_()
        output = block(x)
        output.backward(gradient)
        outputs.append(output)
        input_gradients.append(x.grad)
    parameters = zip(theirs.parameters(), ours.parameters(), strict=True)
    buffers = theirs.state_dict(), ours.state_dict()
    return {
        "output": _difference(*outputs),
        "gradient of the input": _difference(*input_gradients),
        "gradients of the parameters": max(_difference(a.grad, b.grad) for a, b in parameters),
        "running statistics": max(
            _difference(buffers[0][name], buffers[1][name])
            for name in buffers[0]
            if "running" in name
        ),
    }


def _difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def main() -> None:
    print("largest difference to torch's composition, float64:")
    for name, difference in compare().items():
        print(f"  {name:28} {difference:.1e}")


if __name__ == "__main__":
    main()
