"""Replace torch's batch norm by ours and change nothing else.

Trains one small convolutional network on scikit-learn's digits twice, side by side: once with
`torch.nn.BatchNorm2d`, once with `normally.nn.BatchNorm2d`. Same seed, same weights, same batches.

    python examples/drop_in.py [--epochs 6] [--double]

The losses differ by rounding alone, which training lets grow: with `--double` the difference all
but vanishes. The two networks take turns step by step, so the time ratio is not one of a quiet
minute against a busy one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import normally


def network(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """Three convolutions with batch norm; `norm` is the only difference."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), norm(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    """One training step; returns the loss."""
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def run(epochs: int, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Print both losses after every epoch; return the largest difference and the time ratio."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).to(dtype).unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target)
    norms = {"torch": nn.BatchNorm2d, "normally": normally.nn.BatchNorm2d}
    models = {name: network(norm).to(dtype) for name, norm in norms.items()}
    optimizers = {
        name: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for name, model in models.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    largest = 0.0
    print("epoch  loss (torch)  loss (normally)  difference")
    for epoch in range(1, epochs + 1):
        losses: dict[str, list[float]] = {name: [] for name in models}
        for batch in torch.randperm(len(labels)).split(128):
            for name, model in models.items():
                start = time.perf_counter()
                loss = step(model, optimizers[name], images[batch], labels[batch])
                seconds[name].append(time.perf_counter() - start)
                losses[name].append(loss)
        theirs, ours = (statistics.fmean(losses[name]) for name in models)
        largest = max(largest, abs(ours - theirs))
        print(f"{epoch:5}  {theirs:12.6f}  {ours:15.6f}  {abs(ours - theirs):10.1e}")
    # The first steps pay for memory and threads that are asked for once.
    theirs, ours = (statistics.median(seconds[name][5:]) for name in models)
    return largest, theirs / ours


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="torch's batch norm against ours, side by side")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--double", action="store_true", help="float64 instead of float32")
    options = parser.parse_args(arguments)
    largest, ratio = run(options.epochs, torch.float64 if options.double else torch.float32)
    print(f"largest difference of the losses: {largest:.1e}")
    print(f"training step, torch / normally: {ratio:.2f} times (convolutions included)")


if __name__ == "__main__":
    main()
