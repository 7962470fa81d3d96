"""The data sets: scikit-learn's digits, Fashion-MNIST and MNIST, generated noise."""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .download import Source, complete, fetch, folder

NAMES = ("digits", "fashion-mnist", "mnist", "generated")
OWN = "own"  # of `lab compare`: the experiment gets them itself
_FILES = {
    "train_x": "train-images-idx3-ubyte.gz",
    "train_y": "train-labels-idx1-ubyte.gz",
    "test_x": "t10k-images-idx3-ubyte.gz",
    "test_y": "t10k-labels-idx1-ubyte.gz",
}
SOURCES = {
    "fashion-mnist": Source(
        ["http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"],
        {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
        megabytes=31,
    ),
    "mnist": Source(
        [
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "http://yann.lecun.com/exdb/mnist/",
        ],
        {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
        megabytes=12,
    ),
}
_TITLES = {"fashion-mnist": "Fashion-MNIST", "mnist": "MNIST"}
_CONTENTS = {"fashion-mnist": "real images of clothes", "mnist": "real handwritten digits"}
# Below NORMALLY_DATA: folders of our name, and torchvision's.
_FOLDERS = {
    "fashion-mnist": ("fashion-mnist*", "FashionMNIST/raw"),
    "mnist": ("mnist*", "MNIST/raw"),
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

    def few(self, train: int, test: int) -> Dataset:
        """The first training images; the others of them join the test images, of which so many."""
        return replace(
            self,
            train_x=self.train_x[:train],
            train_y=self.train_y[:train],
            test_x=torch.cat([self.train_x[train:], self.test_x])[:test],
            test_y=torch.cat([self.train_y[train:], self.test_y])[:test],
        )


def load(name: str) -> Dataset:
    """The data set of that name; Fashion-MNIST and MNIST are downloaded where they are missing.

    Raises:
        ValueError: if the name is unknown.
        FileNotFoundError: if NORMALLY_DATA is set and the data set is not there.
        ConnectionError: if it cannot be downloaded.
    """
    if name == "digits":
        return _digits()
    if name == "generated":
        return _generated()
    if name in SOURCES:
        root = _local(name) or fetch(name, SOURCES[name])
        return _images(name, root)
    if name == OWN:
        nothing = torch.empty(0)
        return Dataset(OWN, "as below", nothing, nothing, nothing, nothing)
    raise ValueError(f"lab: data must be one of {', '.join(NAMES)}. Got data={name!r}.")


def available(name: str) -> bool:
    """Whether `load` finds it on this machine, without the network."""
    if name not in SOURCES:
        return name in (*NAMES, OWN)
    try:
        return _local(name) is not None
    except FileNotFoundError:
        return False


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


def _local(name: str) -> Path | None:
    """The folder with the files: what NORMALLY_DATA names, else the cache, else None."""
    place = os.environ.get("NORMALLY_DATA")
    if not place:
        return folder(name) if complete(name, SOURCES[name]) else None
    below = [root for pattern in _FOLDERS[name] for root in sorted(Path(place).glob(pattern))]
    for root in [*below, Path(place)]:
        if all((root / file).is_file() for file in _FILES.values()) and _may_be(name, root):
            return root
    raise FileNotFoundError(
        f"{name} is not in NORMALLY_DATA={place}: it needs {', '.join(_FILES.values())}, there or "
        f"in a folder {_FOLDERS[name][0].rstrip('*')} below. Unset the variable to download it."
    )


def _may_be(name: str, root: Path) -> bool:
    """False where the files are another data set's: all of them go by the same file names."""
    labels = _FILES["test_y"]
    digest = hashlib.md5((root / labels).read_bytes(), usedforsecurity=False).hexdigest()
    owner = next((n for n, source in SOURCES.items() if source.md5[labels] == digest), None)
    return owner in (name, None)


def _images(name: str, root: Path) -> Dataset:
    arrays = {part: _read_idx(root / file) for part, file in _FILES.items()}
    train, test = len(arrays["train_x"]), len(arrays["test_x"])
    description = (
        f"{_TITLES[name]}: {_CONTENTS[name]}, 28×28 grey, 10 classes; {train:,} to train, "
        f"{test:,} to test"
    )
    train_x, test_x = arrays["train_x"][:, None], arrays["test_x"][:, None]
    return _dataset(name, description, train_x, test_x, arrays["train_y"], arrays["test_y"])


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
