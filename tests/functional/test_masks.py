"""`prepare_mask`: one form for every way to say which positions count."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from normally.functional._masks import prepare_mask, rows_of_mask

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

X = torch.zeros(3, 4, 5, 2)


def expected_of(mask: Tensor, input: Tensor, channel_dim: int) -> Tensor:
    """By broadcasting against the input without its channel."""
    channel_dim %= input.dim()
    without = input.select(channel_dim, 0)
    return mask.broadcast_to(without.shape).unsqueeze(channel_dim)


@pytest.mark.parametrize("channel_dim", [0, 1, 2, 3, -1, -3])
@pytest.mark.parametrize("leading", [0, 1, 2])
def test_without_the_channel_dimension(channel_dim: int, leading: int) -> None:
    shape = X.select(channel_dim, 0).shape
    full = torch.rand(shape) < 0.5
    variants = [full, full[..., :1], full[:, :1], full[:1], torch.tensor(True)]
    for mask in (full[(0,) * leading], *variants):
        found = prepare_mask(X, mask, None, channel_dim, "test")
        assert found is not None
        assert found.dtype is torch.bool
        assert torch.equal(found, expected_of(mask, X, channel_dim))
        with_channel = expected_of(mask, X, channel_dim)
        again = prepare_mask(X, with_channel, None, channel_dim, "test")
        assert again is not None
        assert torch.equal(again, found)


def test_as_many_dimensions_broadcast_too() -> None:
    mask = torch.rand(3, 1, 1, 2) < 0.5
    found = prepare_mask(X, mask, None, 1, "test")
    assert found is not None
    assert found.shape == (3, 1, 5, 2)
    assert torch.equal(found, mask.expand(3, 1, 5, 2))
    assert found.untyped_storage().data_ptr() == mask.untyped_storage().data_ptr()  # no copy


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize(
    ("shape", "channel_dim"), [((3, 4, 6), 1), ((3, 6, 4), 2), ((3, 6, 4), -1)]
)
def test_lengths(shape: tuple[int, ...], channel_dim: int, dtype: torch.dtype) -> None:
    x = torch.zeros(shape)
    found = prepare_mask(x, None, torch.tensor([6, 0, 2], dtype=dtype), channel_dim, "test")
    assert found is not None
    wanted = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]).bool()
    assert torch.equal(found, wanted.unsqueeze(channel_dim % 3))


def test_lengths_beyond_the_size_keep_all_and_below_zero_none() -> None:
    found = prepare_mask(torch.zeros(2, 1, 3), None, torch.tensor([9, -9]), 1, "test")
    assert found is not None
    assert found[:, 0].tolist() == [[True] * 3, [False] * 3]


def test_none() -> None:
    assert prepare_mask(X, None, None, 1, "test") is None


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 0, 5), (3, 4, 0)])
def test_empty_inputs(shape: tuple[int, ...]) -> None:
    n, _, length = shape
    for arguments in (
        (torch.ones(n, length).bool(), None), (None, torch.ones(n, dtype=torch.long)),
    ):  # fmt: skip
        found = prepare_mask(torch.zeros(shape), *arguments, 1, "test")
        assert found is not None
        assert found.shape == (n, 1, length)


BOOLS = torch.ones(3, 5, 2).bool()
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "both": ({"mask": BOOLS, "lengths": torch.ones(3).long()}, ValueError,
             "mask and lengths cannot be given together"),
    "float mask": ({"mask": BOOLS.float()}, TypeError,
                   "mask must be torch.bool, True where a position counts. "
                   "Got mask.dtype=torch.float32; convert it with mask.bool()."),
    "channels differ": ({"mask": torch.ones(3, 4, 5, 2).bool()}, ValueError,
                        "mask must be broadcastable to (3, 5, 2), the input without its channel, "
                        "or to (3, 1, 5, 2). Got mask of shape (3, 4, 5, 2)"),
    "size": ({"mask": torch.ones(3, 5, 3).bool()}, ValueError, "Got mask of shape (3, 5, 3)"),
    "batch": ({"mask": torch.ones(2, 5, 2).bool()}, ValueError, "Got mask of shape (2, 5, 2)"),
    "rank": ({"mask": torch.ones(1, 3, 1, 5, 2).bool()}, ValueError, "of shape (1, 3, 1, 5, 2)"),
    "device": ({"mask": BOOLS.to("meta")}, ValueError, "mask on meta"),
    "lengths of an image": ({"lengths": torch.ones(3).long()}, ValueError,
                            "lengths needs exactly one dimension beside the batch (dim 0) and the "
                            "channel (dim 1). Got input of shape (3, 4, 5, 2); pass mask= instead"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    arguments, error, words = REFUSED[case]
    with pytest.raises(error, match=f"^test: .*{re.escape(words)}"):
        prepare_mask(X, arguments.get("mask"), arguments.get("lengths"), 1, "test")


def test_refused_lengths() -> None:
    x = torch.zeros(3, 4, 5)
    for lengths, error, words in (
        (torch.ones(3), TypeError, "lengths must be integers. Got lengths.dtype=torch.float32"),
        (torch.ones(3).bool(), TypeError, "lengths must be integers"),
        (
            torch.ones(2).long(),
            ValueError,
            "one number a sample, of shape (3,). Got lengths of sha",
        ),
        (torch.ones(3, 1).long(), ValueError, "Got lengths of shape (3, 1)"),
        (torch.ones(3).long().to("meta"), ValueError, "lengths on meta"),
    ):
        with pytest.raises(error, match=re.escape(words)):
            prepare_mask(x, None, lengths, 1, "test")
    for shape, channel_dim in (((3, 4), 1), ((3, 4), 0), ((3, 4, 5), 0)):
        with pytest.raises(ValueError, match="lengths needs exactly one dimension"):
            prepare_mask(torch.zeros(shape), None, torch.ones(3).long(), channel_dim, "test")


def both_ways(x: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
    a = prepare_mask(x, mask, None, 1, "test")
    b = prepare_mask(x, None, lengths, -1, "test")
    assert a is not None
    assert b is not None
    return x.where(a, 0.0) + x.where(b, 0.0)


def sample() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(3, 4, 5), torch.rand(3, 5) < 0.5, torch.tensor([4, 0, 2])


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_graph(dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(both_ways, fullgraph=True, backend="eager", dynamic=dynamic)
    for batch in (3, 7):
        x, mask = torch.randn(batch, 4, 5), torch.rand(batch, 5) < 0.5
        lengths = torch.arange(batch) % 5
        assert torch.equal(compiled(x, mask, lengths), both_ways(x, mask, lengths))


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_batch_of_any_size(strict: bool) -> None:
    class Net(torch.nn.Module):
        def forward(self, x: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
            return both_ways(x, mask, lengths)

    batch = torch.export.Dim("batch", min=2)
    dims = ({0: batch}, {0: batch}, {0: batch})
    exported = torch.export.export(Net(), sample(), dynamic_shapes=dims, strict=strict)
    for size in (3, 7):
        arguments = torch.randn(size, 4, 5), torch.rand(size, 5) < 0.5, torch.arange(size) % 5
        assert torch.equal(exported.module()(*arguments), both_ways(*arguments))


def test_vmap() -> None:
    x, mask, lengths = (torch.stack(pair) for pair in zip(sample(), sample(), strict=True))
    for dims in ((0, 0, 0), (0, None, 0), (0, 0, None), (None, 0, 0)):
        picked = [t if d == 0 else t[0] for t, d in zip((x, mask, lengths), dims, strict=True)]
        found = torch.func.vmap(both_ways, in_dims=dims)(*picked)
        for i in range(2):
            one = [t[i] if d == 0 else t for t, d in zip(picked, dims, strict=True)]
            assert torch.equal(found[i], both_ways(*one))


def test_rows() -> None:
    """The mask of whole rows is found by strides: a materialized one is taken for a partial one."""
    x = torch.zeros(3, 4, 5)
    for mask, start, whole in (
        (torch.rand(3, 1) < 0.5, 1, True),
        (torch.rand(3, 4) < 0.5, 1, False),
        (torch.rand(3, 4) < 0.5, 2, True),
        (torch.rand(1, 4) < 0.5, 0, False),
        (torch.tensor(True), 0, True),
    ):
        prepared = prepare_mask(x, mask, None, -1, "test")
        assert prepared is not None
        rows = rows_of_mask(prepared, start)
        assert (rows is not None) is whole
        if rows is not None:
            assert rows.shape == (*prepared.shape[:start], *(1,) * (3 - start))
            assert torch.equal(rows.expand_as(prepared), prepared)
