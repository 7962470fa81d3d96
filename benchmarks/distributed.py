"""What it costs a layer to share its statistics, in real processes on this machine.

    python benchmarks/distributed.py                  # two processes, a thread each
    torchrun --nproc-per-node 4 benchmarks/distributed.py
    python benchmarks/distributed.py --save MACHINE   # also writes results/distributed/MACHINE.json

One training step of one layer, forward and backward, float32 over gloo. Four contenders take turns:
batch norm and SyncBatchNorm of this package, and the same two of torch. torch's SyncBatchNorm has
no CPU kernels, so its algorithm is written here with torch's CPU kernels for batch norm and plain
`all_gather` and `all_reduce`. Processes begin a sample together, and the slowest counts. Before
anything is timed both synchronized layers are compared, and what they send is counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from normally import environment, nn
from normally.bench.measure import Spread, make_step, speedup, time_sample

RESULTS = Path(__file__).parent / "results" / "distributed"
PROCESSES = 2
#: Samples of one process: a small layer, whose cost is the message, and four of ResNet-50.
SHAPES = [
    (2, 64, 8, 8), (8, 64, 56, 56), (8, 256, 28, 28), (8, 512, 14, 14), (8, 2048, 7, 7),
]  # fmt: skip
#: Seconds of a sample, roughly: enough for the clock, and for a barrier to be nothing.
SAMPLE = 5e-3
LOCAL, SYNC, TORCH_LOCAL, TORCH_SYNC = "ours", "ours, sync", "torch", "torch's algorithm, sync"


class _TorchSync(torch.autograd.Function):
    """torch/nn/modules/_functions.py, SyncBatchNorm, with CPU kernels in place of CUDA's."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, buffers: list[Tensor]
    ) -> Tensor:
        """Gather (mean, rstd, count) of all, combine, normalize."""
        eps, momentum, channels = 1e-5, 0.1, input.shape[1]
        mean, var = torch.batch_norm_update_stats(input, None, None, momentum)
        count = torch.full((1,), input.numel() // channels, dtype=mean.dtype)
        own = torch.cat([mean, (var + eps).rsqrt(), count])
        everything = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(everything, own)
        means, rstds, counts = torch.stack(everything).split([channels, channels, 1], dim=1)
        m = counts.sum()
        mean = (means * counts).sum(0) / m
        variances = rstds.pow(-2) - eps + (means - mean).square()
        var = (variances * counts).sum(0) / m
        running_mean, running_var = buffers
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * m / (m - 1), momentum)
        ctx.save_for_backward(input, weight, mean, var, m)
        return torch.nn.functional.batch_norm(input, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Sum (Σ g, Σ g·(x - mean)) over all, then the input's gradient."""
        input, weight, mean, var, m = ctx.saved_tensors
        eps = 1e-5
        _, weight_gradient, bias_gradient = torch.ops.aten.native_batch_norm_backward(
            gradient, input, weight, mean, var, None, None, False, eps, [False, True, True]
        )
        rstd = (var + eps).rsqrt()
        sums = torch.cat([bias_gradient, weight_gradient / rstd])
        dist.all_reduce(sums)
        total, total_x = (sums / m).chunk(2)
        by_gradient = weight * rstd
        by_input = -by_gradient * rstd.square() * total_x
        shift = -by_gradient * total - by_input * mean
        each = (-1, 1, 1)
        own = torch.addcmul(shift.view(each), gradient, by_gradient.view(each))
        own.addcmul_(input, by_input.view(each))
        return own, weight_gradient, bias_gradient, None


class TorchSyncBatchNorm(torch.nn.BatchNorm2d):
    """torch's algorithm as a layer."""

    def forward(self, input: Tensor) -> Tensor:
        """Training only."""
        return _TorchSync.apply(
            input, self.weight, self.bias, [self.running_mean, self.running_var]
        )


def compare(layers: dict[str, torch.nn.Module], x: Tensor, gradient: Tensor) -> float:
    """The largest difference of the two synchronized layers' outputs and gradients."""
    found = []
    for name in (SYNC, TORCH_SYNC):
        wanted = [x, *layers[name].parameters()]
        y = layers[name](x)
        found.append([y, *torch.autograd.grad(y, wanted, gradient)])
    scaled = [(a - b).abs().max() / a.abs().max() for a, b in zip(*found, strict=True)]
    return max(s.item() for s in scaled)


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """(collective, bytes of this process's message) of all that is sent meanwhile."""
    sent: list[tuple[str, int]] = []

    def wrap(name: str, real: Callable[..., Any], message: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            sent.append((name, args[message].nbytes))
            return real(*args, **kwargs)

        return call

    places = [
        (torch.ops._c10d_functional, "all_gather_into_tensor", 0),
        (torch.ops._c10d_functional, "all_reduce_", 0),
        (dist, "all_gather", 1),
        (dist, "all_reduce", 0),
        (dist, "reduce", 0),
        (dist, "broadcast", 0),
    ]
    with ExitStack() as stack:
        for place, name, message in places:
            wrapper = wrap(name, getattr(place, name), message)
            stack.enter_context(mock.patch.object(place, name, wrapper))
        yield sent


def agree_on_calls(step: Callable[[], object]) -> int:
    """Calls a sample, the same number in every process."""
    dist.barrier()
    seconds = torch.tensor(statistics.median(time_sample(step, 1) for _ in range(5)))
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return max(1, round(SAMPLE / seconds.item()))


def measure(shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """One shape: seconds a step of every contender and round, and the messages."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(shape, generator=generator).requires_grad_()
    gradient = torch.randn(shape, generator=generator)
    channels = shape[1]
    layers: dict[str, torch.nn.Module] = {
        LOCAL: nn.BatchNorm2d(channels),
        SYNC: nn.SyncBatchNorm(channels),
        TORCH_LOCAL: torch.nn.BatchNorm2d(channels),
        TORCH_SYNC: TorchSyncBatchNorm(channels),
    }
    difference = compare(layers, x, gradient)  # and the first call of each
    # float32 rounds at 6e-8; sums of 1e5 terms, and statistics that torch's algorithm rounds.
    if not difference < 1e-4:
        raise SystemExit(f"{shape}: the two synchronized layers differ by {difference:.1e}")
    steps = {
        name: make_step(layer, [x], "forward_backward", [gradient])
        for name, layer in layers.items()
    }
    messages = {}
    for name, step in steps.items():
        step()  # a layer's agreement with others on their first call after it is not of the step
        with counted() as sent:
            step()
        messages[name] = sent
    calls = {name: agree_on_calls(step) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            dist.barrier()
            times[name].append(time_sample(step, calls[name]))
    slowest = torch.tensor(list(times.values()), dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return {
        "shape": list(shape),
        "difference": difference,
        "messages": messages,
        "seconds": dict(zip(times, slowest.tolist(), strict=True)),
    }


def table(records: list[dict[str, Any]]) -> Iterator[str]:
    """The records as lines."""
    names = (LOCAL, SYNC, TORCH_LOCAL, TORCH_SYNC)
    yield "milliseconds of a step, forward and backward: median [quartiles]"
    yield f"{'a process':>16}" + "".join(f"{name:>28}" for name in names)
    for record in records:
        times = [Spread.of([1e3 * s for s in record["seconds"][name]]) for name in names]
        cells = [f"{t.median:.2f} [{t.low:.2f}, {t.high:.2f}]" for t in times]
        yield f"{size(record):>16}" + "".join(f"{cell:>28}" for cell in cells)
    yield ""
    yield "synchronizing costs (sync / not, in turns); ours is so many times as fast as torch's"
    yield f"{'a process':>16}{'ours costs':>24}{'torch costs':>24}{'sync, ours faster':>24}"
    for record in records:
        s = record["seconds"]
        ratios = [
            speedup(s[LOCAL], s[SYNC]),
            speedup(s[TORCH_LOCAL], s[TORCH_SYNC]),
            speedup(s[SYNC], s[TORCH_SYNC]),
        ]
        cells = [f"{r.median:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in ratios]
        yield f"{size(record):>16}" + "".join(f"{cell:>24}" for cell in cells)
    yield ""
    yield "bytes that a process gives to the collectives in a step (forward, backward)"
    yield f"{'a process':>16}{SYNC:>28}{TORCH_SYNC:>28}{'largest difference':>24}"
    for record in records:
        sent = [", ".join(f"{b:,}" for _, b in record["messages"][n]) for n in (SYNC, TORCH_SYNC)]
        yield f"{size(record):>16}{sent[0]:>28}{sent[1]:>28}{record['difference']:>24.1e}"


def size(record: dict[str, Any]) -> str:
    """The shape in words.

    >>> size({"shape": [2, 64, 8, 8]})
    '2×64×8×8'
    """
    return "×".join(map(str, record["shape"]))


def main(arguments: list[str] | None = None) -> None:
    """Measure in the processes of torchrun, or start them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first so many")
    parser.add_argument("--save", metavar="MACHINE", help="write results/distributed/MACHINE.json")
    options = parser.parse_args(arguments)
    if "RANK" not in os.environ:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, "--nproc-per-node", str(PROCESSES), __file__]
        given = sys.argv[1:] if arguments is None else arguments
        variables = {**os.environ, "OMP_NUM_THREADS": "1"}
        sys.exit(subprocess.run([*command, *given], env=variables, check=False).returncode)

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    facts = environment.describe()
    records = [measure(shape, options.rounds) for shape in SHAPES[: options.shapes]]
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes, gloo. {environment.sentence(facts)}")
        print("\n".join(["", *table(records)]))
        if options.save:
            results = {
                "schema": "normally.distributed/1",
                "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "environment": facts,
                "processes": dist.get_world_size(),
                "backend": "gloo",
                "dtype": "float32",
                "records": records,
            }
            RESULTS.mkdir(parents=True, exist_ok=True)
            path = RESULTS / f"{options.save}.json"
            path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
            print(f"\nwritten: {path}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
