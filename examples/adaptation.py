"""A small network on digits whose pictures have changed, before and after `normally.adapt`.

It learns on scikit-learn's handwritten digits. The pictures that it is tested on have another
contrast and brightness, and noise. None of their labels is used.

    python examples/adaptation.py --seeds 5
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from normally import adapt, nn

#: What is compared: a name, and the arguments of `adapt`; None leaves the network as it is.
METHODS: dict[str, dict[str, Any] | None] = {
    "source": None,
    "adabn": {"method": "adabn"},
    "mix": {"method": "mix", "prior": 0.5},
    "tent": {"method": "tent", "lr": 1e-2},
}

#: Contrast, brightness and noise.
CHANGES = {"strong": (0.4, 0.5, 0.1), "mild": (0.7, 0.2, 0.1)}


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures `(N, 1, 8, 8)` from 0 to 1 with labels: 1,297 to learn from, 500 to test."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32)[order].view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)[order]
    return x[500:], y[500:], x[:500], y[:500]


def corrupt(x: Tensor, change: str, seed: int) -> Tensor:
    """Less contrast, more light, and noise."""
    contrast, brightness, noise = CHANGES[change]
    generator = torch.Generator().manual_seed(seed)
    return contrast * x + brightness + noise * torch.randn(x.shape, generator=generator)


def train(x: Tensor, y: Tensor, seed: int, epochs: int = 5) -> torch.nn.Module:
    """A network of two convolutions, in evaluation."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16, act="relu"),
        torch.nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32, act="relu"),
        torch.nn.MaxPool2d(2), torch.nn.Flatten(), torch.nn.Linear(32 * 16, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            loss = torch.nn.functional.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: torch.nn.Module, x: Tensor, y: Tensor) -> float:
    """In per cent."""
    return 100 * (model(x).argmax(1) == y).double().mean().item()


def compare(seed: int) -> dict[tuple[str, int], dict[str, float]]:
    """Accuracy on 500 changed pictures, by change, how many of them are adapted to, and method."""
    x, y, test_x, test_y = load()
    model = train(x, y, seed)
    found = {}
    for change in CHANGES:
        changed = corrupt(test_x, change, seed)
        for number in (500, 1):
            found[change, number] = {"unchanged": accuracy(model, test_x, test_y)}
            for name, options in METHODS.items():
                if options is not None:
                    adapt(model, changed[:number].split(50), **options)
                found[change, number][name] = accuracy(model, changed, test_y)
                if options is not None:
                    model.restore()
    return found


def main(arguments: list[str] | None = None) -> None:
    """Compare over several seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    results = [compare(seed) for seed in range(parser.parse_args(arguments).seeds)]
    print(f"accuracy in per cent, mean of {len(results)} seeds (least to most)")
    for change, number in results[0]:
        print(f"{change} change, adapted to {number} of the 500 pictures")
        for name in results[0][change, number]:
            values = [result[change, number][name] for result in results]
            mean = sum(values) / len(values)
            print(f"  {name:9} {mean:5.1f}  ({min(values):.1f} to {max(values):.1f})")


if __name__ == "__main__":
    main()
