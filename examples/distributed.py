"""Train several processes to the weights of one with the whole batch, and measure that it is so.

    torchrun --nproc-per-node 4 examples/distributed.py

Each process gets every fourth sample of a batch. SyncBatchNorm makes the statistics those of all;
DistributedDataParallel averages the gradients. Then the first process trains the same network
alone on the whole batches and compares; the exit status is 1 if the weights differ. Without
torchrun there is one process, and nothing to sum.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import normally
from normally import nn

STEPS, BATCH, CLASSES = 100, 32, 4


def network() -> torch.nn.Module:
    """The same weights in every process."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, act="relu"),
        torch.nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8, act="relu"),
        torch.nn.Flatten(), torch.nn.Linear(8 * 6 * 6, CLASSES),
    ).double()  # fmt: skip


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Images with a bright quarter, which is what is to be recognized."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    images = torch.randn(BATCH, 1, 16, 16, generator=generator, dtype=torch.float64)
    for image, label in zip(images, labels.tolist(), strict=True):
        top, left = 8 * (label // 2), 8 * (label % 2)
        image[0, top : top + 8, left : left + 8] += 1
    return images, labels


def train(model: torch.nn.Module, rank: int, processes: int) -> float:
    """The last loss of this process's share: every sample whose number modulo processes is rank."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loss = torch.tensor(torch.nan)
    for step in range(STEPS):
        images, labels = batch(step)
        output = model(images[rank::processes])
        loss = torch.nn.functional.cross_entropy(output, labels[rank::processes])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> None:
    """Train together, train alone, compare."""
    torch.set_num_threads(1)
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()

    together = normally.convert_sync_batchnorm(network())
    train(DistributedDataParallel(together), rank, processes)
    dist.barrier()
    same = True  # as far as the others know
    if rank == 0:
        alone = network()
        loss = train(alone, 0, 1)
        expected = alone.state_dict()
        differences = {
            name: (value.double() - expected[name].double()).abs().max().item()
            for name, value in together.state_dict().items()
        }
        running = max(d for name, d in differences.items() if "running" in name)
        weights = max(d for name, d in differences.items() if "running" not in name)
        print(f"{processes} processes with {BATCH // processes} samples each, {STEPS} steps")
        print(f"one process with {BATCH}, loss {loss:.4f}")
        print(f"largest difference of a weight {weights:.1e}, of a running statistic {running:.1e}")
        # float64 roundings of 100 steps, which momentum and the norms amplify.
        same = max(weights, running) < 1e-9
        print("the same weights" if same else "NOT the same weights")
    dist.barrier()  # nobody leaves while another one still works
    dist.destroy_process_group()
    if not same:
        sys.exit(1)


if __name__ == "__main__":
    main()
