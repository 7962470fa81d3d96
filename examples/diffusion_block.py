"""The residual block of a diffusion model: GroupNorm and SiLU in one layer, in channels_last.

    python examples/diffusion_block.py

The block is compared with torch's composition in float64: output and every gradient. A state dict
of one loads into the other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normally.nn import GroupNorm

CHANNELS, GROUPS, TIME = 64, 32, 16


class TorchBlock(nn.Module):
    """The usual one: norm and SiLU are two operations (Ho et al. 2020, arXiv:2006.11239)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, CHANNELS), nn.GroupNorm(GROUPS, CHANNELS)
        self.conv1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.conv2 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.time = nn.Linear(TIME, CHANNELS)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Gives x + conv(silu(norm(conv(silu(norm(x))) + time)))."""
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        h = h + self.time(time)[:, :, None, None]
        return x + self.conv2(nn.functional.silu(self.norm2(h)))


class FusedBlock(TorchBlock):
    """The same function: SiLU is in the norms."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = GroupNorm(GROUPS, CHANNELS, act="silu")
        self.norm2 = GroupNorm(GROUPS, CHANNELS, act="silu")

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """The same, in two norms and two convolutions."""
        h = self.conv1(self.norm1(x)) + self.time(time)[:, :, None, None]
        return x + self.conv2(self.norm2(h))


def compare() -> dict[str, float]:
    """Largest differences of one training step, by what differs."""
    torch.manual_seed(0)
    theirs, ours = (
        block().double().to(memory_format=torch.channels_last) for block in (TorchBlock, FusedBlock)
    )
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, CHANNELS, 8, 8, dtype=torch.float64)
    images = images.to(memory_format=torch.channels_last)
    time = torch.randn(2, TIME, dtype=torch.float64)
    gradient = torch.randn_like(images)
    outputs, input_gradients = [], []
    for block in (theirs, ours):
        x = images.clone().requires_grad_()
        output = block(x, time)
        output.backward(gradient)
        outputs.append(output)
        input_gradients.append(x.grad)
    parameters = zip(theirs.parameters(), ours.parameters(), strict=True)
    return {
        "output": _difference(*outputs),
        "gradient of the input": _difference(*input_gradients),
        "gradients of the parameters": max(_difference(a.grad, b.grad) for a, b in parameters),
    }


def _difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def main() -> None:
    print("largest difference to torch's composition, float64:")
    for name, difference in compare().items():
        print(f"  {name:28} {difference:.1e}")


if __name__ == "__main__":
    main()
