import gzip
import hashlib
import os
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.datasets import MNIST, FashionMNIST

from normally.lab.data import SOURCES, available, load

NAMES = {
    "train-images-idx3-ubyte.gz": (20, 28, 28),
    "train-labels-idx1-ubyte.gz": (20,),
    "t10k-images-idx3-ubyte.gz": (10, 28, 28),
    "t10k-labels-idx1-ubyte.gz": (10,),
}


def write_idx(path, shape, cut=0):
    values = np.random.default_rng(0).integers(0, 10, shape).astype(np.uint8)
    header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
    path.write_bytes(gzip.compress(header + values.tobytes()[: values.size - cut]))


def test_digits_are_normalized_and_split_without_overlap():
    data = load("digits")
    assert data.train_x.shape == (1437, 1, 8, 8)
    assert data.test_x.shape == (360, 1, 8, 8)
    assert data.train_x.dtype == torch.float32
    assert data.train_x.mean().item() == pytest.approx(0, abs=1e-6)
    assert data.train_x.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    # Stratified: every class has its share of the 360.
    assert data.test_y.bincount().tolist() == pytest.approx([36] * 10, abs=2)
    assert torch.equal(load("digits").test_x, data.test_x)


@pytest.mark.parametrize("folder", ["", "fashion-mnist-part"])
def test_fashion_mnist_is_read_from_the_folder_or_one_below(tmp_path, monkeypatch, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    for name, shape in NAMES.items():
        write_idx(tmp_path / folder / name, shape)
    monkeypatch.setenv("NORMALLY_DATA", str(tmp_path))
    data = load("fashion-mnist")
    assert data.train_x.shape == (20, 1, 28, 28)
    assert data.test_y.shape == (10,)
    expected = np.random.default_rng(0).integers(0, 10, (10,))
    assert data.test_y.tolist() == expected.tolist()


def test_a_file_cut_short_is_named(tmp_path, monkeypatch):
    for name, shape in NAMES.items():
        write_idx(tmp_path / name, shape, cut=3 if name.startswith("t10k-images") else 0)
    monkeypatch.setenv("NORMALLY_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"t10k-images.*must hold.*cut short"):
        load("fashion-mnist")


def test_where_the_folder_lacks_it_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMALLY_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"is not in NORMALLY_DATA=.*Unset the variable"):
        load("fashion-mnist")
    assert not available("fashion-mnist")


def test_the_cache_is_used_where_no_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("NORMALLY_DATA", raising=False)
    monkeypatch.setenv("NORMALLY_CACHE", str(tmp_path))
    assert not available("mnist")
    (tmp_path / "mnist").mkdir()
    for name, shape in NAMES.items():
        write_idx(tmp_path / "mnist" / name, shape)
    assert available("mnist")
    assert load("mnist").description.startswith("MNIST: real handwritten digits")


def test_one_data_set_is_not_taken_for_the_other(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMALLY_DATA", str(tmp_path))
    for name, shape in NAMES.items():
        write_idx(tmp_path / name, shape)
    labels = (tmp_path / "t10k-labels-idx1-ubyte.gz").read_bytes()
    source = replace(
        SOURCES["mnist"],
        md5={**SOURCES["mnist"].md5, "t10k-labels-idx1-ubyte.gz": hashlib.md5(labels).hexdigest()},
    )
    monkeypatch.setitem(SOURCES, "mnist", source)
    assert available("mnist")
    assert not available("fashion-mnist")


def test_the_sums_are_those_that_torchvision_checks():
    for ours, theirs in (("mnist", MNIST), ("fashion-mnist", FashionMNIST)):
        assert dict(theirs.resources) == SOURCES[ours].md5
        assert set(theirs.mirrors) <= set(SOURCES[ours].mirrors)


@pytest.mark.skipif(
    not os.environ.get("NORMALLY_DATA"),
    reason="NORMALLY_DATA, the folder with the real Fashion-MNIST images, is not set",
)
def test_the_real_fashion_mnist_has_its_ten_classes():
    data = load("fashion-mnist")
    assert data.train_x.shape[1:] == (1, 28, 28)
    assert data.train_y.unique().tolist() == list(range(10))


def test_generated_data_is_standard_normal_and_always_the_same():
    data = load("generated")
    assert data.train_x.shape == (1024, 1, 8, 8)
    # 65,536 values: their mean has a standard error of 0.004, their std one of 0.003.
    assert data.train_x.mean().item() == pytest.approx(0, abs=0.02)
    assert data.train_x.std().item() == pytest.approx(1, abs=0.015)
    assert torch.equal(load("generated").test_x, data.test_x)


def test_the_first_images_keep_their_labels_and_their_scale():
    data = load("digits")
    part = data.first(10, 5000)
    assert torch.equal(part.train_x, data.train_x[:10])
    assert torch.equal(part.train_y, data.train_y[:10])
    assert len(part.test_x) == len(part.test_y) == 360


def test_what_is_not_trained_on_is_tested():
    data = load("digits")
    split = data.few(384, 2000)
    assert (len(split.train_x), len(split.test_x)) == (384, 1053 + 360)
    assert torch.equal(split.test_x[:1053], data.train_x[384:])
    assert torch.equal(split.test_y[1053:], data.test_y)
    assert len(data.few(384, 100).test_x) == 100
