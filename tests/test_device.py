"""The tests' own way to another device: nothing of a tensor is lost on it."""

from __future__ import annotations

import pytest
import torch

from normally import functional as library
from tests import device
from tests.helpers import DTYPES, assert_same_bits, lay_out, layouts_of, values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_copy_keeps_layout_and_bits(dtype: torch.dtype) -> None:
    for shape in ((3, 4), (2, 3, 5), (2, 3, 4, 5), (0, 3, 2), (2, 1, 3)):
        for layout in layouts_of(len(shape)):
            x = lay_out(values(shape, dtype), layout)[1:]
            copy = device._copied(x, torch.device("cpu"))
            assert_same_bits(copy, x)
            assert (copy.stride(), copy.storage_offset()) == (x.stride(), x.storage_offset())
            assert not copy._is_view()


def test_every_function_has_one_for_the_device() -> None:
    for name in library.__all__:
        ours = getattr(device.functional, name)
        assert (ours is getattr(library, name)) is device.IS_CPU


def test_what_is_born_on_the_device_is_as_on_the_cpu() -> None:
    torch.manual_seed(1)
    plain = torch.rand(3, requires_grad=True), torch.arange(4), torch.empty(2, device="meta")
    torch.manual_seed(1)
    with device.BornOnDevice():
        born = torch.rand(3, requires_grad=True), torch.arange(4), torch.empty(2, device="meta")
    for a, b in zip(born, plain, strict=True):
        assert a.device.type == ("meta" if b.is_meta else device.DEVICE.type)
        assert (a.is_leaf, a.requires_grad) == (b.is_leaf, b.requires_grad)
        if not b.is_meta:
            assert_same_bits(a.cpu(), b)
