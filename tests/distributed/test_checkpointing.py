"""Activation checkpoints across processes: the second forward communicates, and does not count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from normally import convert_sync_batchnorm
from tests.distributed.launch import results
from tests.helpers import values

SIZE = 2
STEPS = 3


class Net(nn.Module):
    """A stem, and two blocks that can be checkpointed each."""

    def __init__(self, momentum: float | None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Sequential(nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6, momentum=momentum))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv1d(6, 6, 3), nn.BatchNorm1d(6, momentum=momentum), nn.SiLU())
            for _ in range(2)
        )
        self.double()

    def forward(self, input: Tensor, use_reentrant: bool | None) -> Tensor:
        """With None there is no checkpoint."""
        h: Tensor = self.stem(input)
        for block in self.blocks:
            if use_reentrant is None:
                h = block(h)
            else:
                h = checkpoint(block, h, use_reentrant=use_reentrant)
        return h


def _train(
    rank: int | None, sizes: tuple[int, ...], use_reentrant: bool | None, momentum: float | None
) -> dict[str, Tensor]:
    """What some steps leave behind: gradients, parameters and buffers."""
    net: nn.Module = Net(momentum)
    if rank is not None:
        net = DistributedDataParallel(convert_sync_batchnorm(net))
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    out = {}
    for step in range(STEPS):
        x = values((sum(sizes), 2, 12), torch.float64, seed=step)
        x[: sizes[0]] += 2
        x = x if rank is None else x.split(sizes)[rank].clone()
        x.requires_grad_()
        optimizer.zero_grad()
        loss = net(x, use_reentrant).square().sum()
        # DistributedDataParallel's gradients are the mean over processes of those of their sums.
        (loss / SIZE if rank is None else loss).backward()
        assert x.grad is not None
        out[f"input {step}"] = x.grad * SIZE if rank is None else x.grad
        optimizer.step()
    for name, p in net.named_parameters():
        assert p.grad is not None
        out[f"{name}.grad"] = p.grad
    out.update(net.state_dict())
    return {name.removeprefix("module."): t.detach() for name, t in out.items()}


def _both(rank: int, *arguments: Any) -> list[dict[str, Tensor]]:
    """With checkpoints and without."""
    sizes, use_reentrant, momentum = arguments
    return [_train(rank, sizes, kind, momentum) for kind in (use_reentrant, None)]


@pytest.mark.parametrize(
    ("sizes", "momentum"),
    [((4, 2), 0.1), ((4, 2), None), ((5, 0), 0.1)],
    ids=["", "average", "an empty process"],
)
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
def test_a_checkpoint_counts_once(
    sizes: tuple[int, ...], momentum: float | None, use_reentrant: bool
) -> None:
    expected = _train(None, sizes, None, momentum)
    for rank, (found, plain) in enumerate(results(SIZE, _both, sizes, use_reentrant, momentum)):
        assert found.keys() == plain.keys() == expected.keys()
        for name, t in found.items():
            assert torch.equal(t, plain[name]), name  # the same sums, computed twice
            wanted = expected[name]
            if name.startswith("input"):
                wanted = wanted.split(sizes)[rank]
            torch.testing.assert_close(t, wanted, rtol=1e-10, atol=1e-12)
        for name in ("stem.1", "blocks.0.1", "blocks.1.1"):
            assert int(found[f"{name}.num_batches_tracked"]) == STEPS
