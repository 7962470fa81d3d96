"""Transformer blocks whose residual sums are in the norms: one call for `x + update` and its norm.

    python examples/transformer_block.py

Two blocks and a last norm are compared with torch's composition in float64, once with LayerNorm and
once with RMSNorm: output and every gradient. A state dict of one loads into the other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import normally

WIDTH, HEADS = 32, 4
Norms = Callable[[int], nn.Module]


class Attention(nn.Module):
    """Self-attention over (N, L, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Every position attends to all."""
        q, k, v = (
            t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.project(x).chunk(3, -1)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(attended.transpose(1, 2).flatten(2))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))


class TorchModel(nn.Module):
    """The usual one: a norm, a sum and a norm again are three operations."""

    def __init__(self, norm: Norms) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norm(WIDTH) for _ in range(5))
        self.layers = nn.ModuleList([Attention(), mlp(), Attention(), mlp()])

    def forward(self, x: Tensor) -> Tensor:
        """Four times x + layer(norm(x)), and a norm."""
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = x + layer(norm(x))
        return self.norms[-1](x)


class FusedModel(TorchModel):
    """The same function: what a layer adds goes into the next norm, together with the stream."""

    def forward(self, x: Tensor) -> Tensor:
        """A norm gives back the sum as well: the stream that the next one takes."""
        first, *others = self.norms
        stream, y = x, first(x)
        for layer, norm in zip(self.layers, others, strict=True):
            y, stream = norm(layer(y), stream)
        return y


def compare(theirs: Norms, ours: Norms) -> dict[str, float]:
    """Largest differences of one training step, by what differs."""
    torch.manual_seed(0)
    models = TorchModel(theirs).double(), FusedModel(ours).double()
    models[1].load_state_dict(models[0].state_dict())
    tokens = torch.randn(2, 10, WIDTH, dtype=torch.float64)
    gradient = torch.randn_like(tokens)
    outputs, gradients = [], []
    for model in models:
        x = tokens.clone().requires_grad_()
        output = model(x)
        output.backward(gradient)
        outputs.append(output)
        gradients.append([x.grad, *(p.grad for p in model.parameters())])
    pairs = zip(*gradients, strict=True)
    return {
        "output": _difference(*outputs),
        "gradients": max(_difference(a, b) for a, b in pairs),
    }


def _difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


PAIRS: dict[str, tuple[Norms, Norms]] = {
    "LayerNorm": (nn.LayerNorm, normally.nn.LayerNorm),
    "RMSNorm": (nn.RMSNorm, normally.nn.RMSNorm),
}


def main() -> None:
    print("largest difference to torch's composition, float64:")
    for name, pair in PAIRS.items():
        for what, difference in compare(*pair).items():
            print(f"  {name:10} {what:10} {difference:.1e}")


if __name__ == "__main__":
    main()
