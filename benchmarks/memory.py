"""What `memory_efficient` does to ResNet-50: peak memory, losses and time of training steps.

    python benchmarks/memory.py                  # some minutes
    python benchmarks/memory.py --save MACHINE   # also writes results/memory/MACHINE.json

torchvision's architecture with random weights, float32; a step is forward, cross-entropy, backward
and SGD with momentum. Every contender has a fresh process for

- the losses of the first ten steps, compared bit by bit,
- the process's peak memory in them (VmHWM) less what it held before the first: gradients and
  momentum, and what the allocator keeps for itself, are in it. glibc's keeps freed blocks of less
  than 32 MB; under MALLOC_MMAP_THRESHOLD_=1048576 it gives them back,
- a step's peak of what the allocator's events say is allocated, less what was there before. The
  gradients of the parameters are there before, so these are activations, their gradients and
  scratch. `gradients_born` is the same where a step allocates those gradients as well.

Times are taken in turns in one more process, and ratios round by round.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import torchvision_operators

torchvision_operators.declare()

import torchvision  # noqa: E402  # after its operators are declared

import normally  # noqa: E402
from normally import environment  # noqa: E402
from normally.bench.measure import Spread, speedup, time_sample  # noqa: E402
from normally.bench.memory import peak_bytes  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "memory"
MB = 1e6
STEPS = 10
TORCH, CONVERTED, FUSED = "torch", "convert", "convert + fuse"
EFFICIENT = {CONVERTED: "convert, efficient", FUSED: "convert + fuse, efficient"}
CONTENDERS = (TORCH, CONVERTED, EFFICIENT[CONVERTED], FUSED, EFFICIENT[FUSED])


def build(contender: str, x: torch.Tensor) -> torch.nn.Module:
    """The architecture with the weights of one seed, changed as the contender's name says."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: torch.nn.Module = torchvision.models.resnet50(weights=None)
    if contender != TORCH:
        normally.convert(model, memory_efficient=contender in EFFICIENT.values())
    if FUSED in contender:
        normally.fuse(model, x[:2])
    return model.train()


def data(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch."""
    torch.manual_seed(1)
    x = torch.randn(options.batch, 3, options.pixels, options.pixels)
    if options.layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    return x, torch.randint(0, 1000, (options.batch,))


def training_step(
    contender: str, x: torch.Tensor, y: torch.Tensor, layout: str, *, keeps_gradients: bool = True
) -> Callable[[], float]:
    """One step of SGD; returns the loss."""
    model = build(contender, x)
    if layout == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> float:
        optimizer.zero_grad(set_to_none=not keeps_gradients)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def status(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) * 1024


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """One contender, in a process of its own."""
    x, y = data(options)
    step = training_step(options.one, x, y, options.layout)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what building and fusing left behind
    Path("/proc/self/clear_refs").write_text("5", "utf-8")  # the peak starts anew
    before = status("VmRSS")
    losses = [step() for _ in range(STEPS)]
    resident = status("VmHWM") - before
    births = training_step(options.one, x, y, options.layout, keeps_gradients=False)
    births()
    return {
        "losses": losses,
        "resident_bytes": resident,
        "peak_bytes": peak_bytes(step),
        "peak_bytes_gradients_born": peak_bytes(births),
    }


def measure_time(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every contender and round, in turns, after one round that is not counted."""
    x, y = data(options)
    steps = {name: training_step(name, x, y, options.layout) for name in CONTENDERS}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(options.rounds + 1):
        for name, step in steps.items():
            seconds = time_sample(step, 1)
            if round_:
                times[name].append(seconds)
    return times


def in_a_process(options: argparse.Namespace, one: str) -> Any:
    """What this script prints for one contender, or "time"."""
    command = [
        sys.executable, __file__, "--one", one, "--batch", str(options.batch),
        "--pixels", str(options.pixels), "--layout", options.layout,
        "--rounds", str(options.rounds),
    ]  # fmt: skip
    # torch warns of every block that was allocated before its profiler started.
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    return json.loads(done.stdout)


def table(memory: dict[str, Any], times: dict[str, list[float]]) -> Iterator[str]:
    """The results as lines."""
    yield f"{'':>26}{'peak MB':>10}{'+ gradients':>13}{'resident':>10}{'ms':>9}  last loss"
    for name, r in memory.items():
        ms = 1e3 * Spread.of(times[name]).median
        yield (
            f"{name:>26}{r['peak_bytes'] / MB:10.1f}{r['peak_bytes_gradients_born'] / MB:13.1f}"
            f"{r['resident_bytes'] / MB:10.1f}{ms:9.1f}  {r['losses'][-1]!r}"
        )
    for plain, efficient in EFFICIENT.items():
        one, other = memory[plain], memory[efficient]
        less = {k: 1 - other[k] / one[k] for k in one if k != "losses"}
        ratio = speedup(times[plain], times[efficient])
        yield (
            f"{efficient}: {less['peak_bytes']:.1%} less "
            f"({less['peak_bytes_gradients_born']:.1%} with the parameters' gradients, "
            f"{less['resident_bytes']:.1%} of the resident memory); "
            f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}] times the time; the losses "
            f"have {'the same' if one['losses'] == other['losses'] else 'OTHER'} bits"
        )


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and save where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pixels", type=int, default=160)
    parser.add_argument("--layout", default="contiguous", choices=("contiguous", "channels_last"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--save", metavar="MACHINE", help="write results/memory/MACHINE.json")
    options = parser.parse_args(arguments)
    if options.one:
        result: Any = measure_time(options) if options.one == "time" else measure_memory(options)
        print(json.dumps(result))
        return
    facts = environment.describe()
    print(environment.sentence(facts), end="\n\n")
    memory = {name: in_a_process(options, name) for name in CONTENDERS}
    times = in_a_process(options, "time")
    print("\n".join(table(memory, times)))
    if options.save:
        results = {
            "schema": "normally.memory/1",
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "environment": facts,
            "model": "resnet50",
            "batch": options.batch,
            "pixels": options.pixels,
            "layout": options.layout,
            "memory": memory,
            "seconds": times,
        }
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{options.save}.json"
        path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        print(f"written: {path.name}")


if __name__ == "__main__":
    main()
