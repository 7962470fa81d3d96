"""The data sets: scikit-learn's digits, Fashion-MNIST from a local folder, generated noise."""

from __future__ import annotations

import gzip
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

NAMES = ("digits", "fashion-mnist", "generated")
_FILES = {
    "train_x": "train-images-idx3-ubyte.gz",
    "train_y": "train-labels-idx1-ubyte.gz",
    "test_x": "t10k-images-idx3-ubyte.gz",
    "test_y": "t10k-labels-idx1-ubyte.gz",
}


@dataclass(frozen=True)
class Dataset:
    """Images `(N, 1, H, W)` float32 with mean 0 and std 1 over the training part; labels `(N,)`."""

    name: str
    description: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def first(self, train: int, test: int) -> Dataset:
        """The first images of each part, or all where there are no more; scaled as the whole."""
        return replace(
            self,
            train_x=self.train_x[:train],
            train_y=self.train_y[:train],
            test_x=self.test_x[:test],
            test_y=self.test_y[:test],
        )


def load(name: str) -> Dataset:
    """The data set of that name.

    Raises:
        ValueError: if the name is unknown.
        FileNotFoundError: if Fashion-MNIST is not where `NORMALLY_DATA` says.
    """
    if name == "digits":
        return _digits()
    if name == "fashion-mnist":
        return _fashion_mnist()
    if name == "generated":
        return _generated()
    raise ValueError(f"lab: data must be one of {', '.join(NAMES)}. Got data={name!r}.")


def _digits() -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        images.reshape(-1, 1, 8, 8), labels, test_size=360, random_state=0, stratify=labels
    )
    description = (
        "Digits, bundled with scikit-learn: 1,797 real handwritten digits, 8×8 grey, 10 classes; "
        "1,437 to train, 360 to test (one fixed stratified split)"
    )
    return _dataset("digits", description, *parts)


def _generated() -> Dataset:
    """What the arithmetic of signals in random networks assumes: independent, mean 0, std 1."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(n, 1, 8, 8, generator=generator) for n in (1024, 256)]
    labels = [torch.randint(10, (n,), generator=generator) for n in (1024, 256)]
    description = (
        "Generated: 1,024 and 256 images of 8×8 independent standard normal values, labels drawn "
        "at random; there is nothing to learn"
    )
    return Dataset("generated", description, images[0], labels[0], images[1], labels[1])


def _fashion_mnist() -> Dataset:
    place = os.environ.get("NORMALLY_DATA")
    if not place:
        raise FileNotFoundError(
            "Fashion-MNIST is read from a folder: set the environment variable NORMALLY_DATA to "
            f"the one with {_FILES['train_x']} and its three companions, or use --data digits."
        )
    # The folder itself or one level below it, whatever the collection is called.
    roots = [Path(place), *sorted(Path(place).glob("fashion-mnist*/"))]
    root = next((r for r in roots if all((r / f).is_file() for f in _FILES.values())), None)
    if root is None:
        raise FileNotFoundError(
            f"Fashion-MNIST is not in NORMALLY_DATA={place}: it needs {', '.join(_FILES.values())}."
        )
    arrays = {part: _read_idx(root / file) for part, file in _FILES.items()}
    train, test = len(arrays["train_x"]), len(arrays["test_x"])
    description = (
        f"Fashion-MNIST: real images of clothes, 28×28 grey, 10 classes; {train:,} to train, "
        f"{test:,} to test"
    )
    train_x, test_x = arrays["train_x"][:, None], arrays["test_x"][:, None]
    return _dataset(
        "fashion-mnist", description, train_x, test_x, arrays["train_y"], arrays["test_y"]
    )


def _read_idx(path: Path) -> np.ndarray:
    """An array of bytes in LeCun's IDX format: two zeros, type 8, rank, big-endian sizes, data."""
    with gzip.open(path) as file:
        content = file.read()
    zeros, kind, rank = struct.unpack_from(">HBB", content)
    if zeros != 0 or kind != 8:
        raise ValueError(f"lab: {path} must hold unsigned bytes in IDX format.")
    shape = struct.unpack_from(f">{rank}I", content, 4)
    values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * rank)
    if values.size != np.prod(shape):
        raise ValueError(f"lab: {path} must hold {shape} values. Got {values.size}: cut short?")
    return values.reshape(shape)


def _dataset(
    name: str,
    description: str,
    train_x: np.ndarray,
    test_x: np.ndarray,
    train_y: np.ndarray,
    test_y: np.ndarray,
) -> Dataset:
    mean, std = train_x.mean(), train_x.std()
    images = [torch.tensor((x - mean) / std, dtype=torch.float32) for x in (train_x, test_x)]
    labels = [torch.tensor(y, dtype=torch.long) for y in (train_y, test_y)]
    return Dataset(name, description, images[0], labels[0], images[1], labels[1])
