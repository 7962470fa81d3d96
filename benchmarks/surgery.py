"""What one line does to real models: training steps before and after convert and fuse, folding.

    python benchmarks/surgery.py                  # about ten minutes
    python benchmarks/surgery.py --save MACHINE   # also writes results/surgery/MACHINE.json

ResNet-50 and MobileNetV3-Large of torchvision at 160 px, random weights, float32, both memory
layouts. A training step is forward, cross-entropy, backward and SGD with momentum. Contenders take
turns in one process, and ratios are taken round by round. Evaluation compares `normally.fold` with
torch's own folding of the same pairs (`torch.fx.experimental.optimization.fuse`).
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx.experimental.optimization import fuse as torch_fold

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import torchvision_operators

torchvision_operators.declare()

import torchvision  # noqa: E402  # after its operators are declared

import normally  # noqa: E402
from normally import environment  # noqa: E402
from normally.bench.measure import Spread, speedup, time_sample  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "surgery"
#: Architecture and samples of a batch.
MODELS = {"resnet50": 16, "mobilenet_v3_large": 32}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PIXELS = 160
TORCH, CONVERTED, FUSED = "torch", "convert", "convert + fuse"
PLAIN, TORCH_FOLDED, FOLDED = "torch", "torch's fold", "normally.fold"


def build(name: str, layout: str) -> torch.nn.Module:
    """The architecture with the weights of one seed."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(torchvision.models, name)(weights=None)
    return model.to(memory_format=LAYOUTS[layout])


def training_step(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], float]:
    """One step of SGD; returns the loss."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def interleave(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every contender and round, in turns, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            seconds = time_sample(step, 1)
            if round_:
                times[name].append(seconds)
    return times


def measure(name: str, layout: str, rounds: int) -> dict[str, Any]:
    """Training and evaluation of one architecture in one layout."""
    batch = MODELS[name]
    x = torch.randn(batch, 3, PIXELS, PIXELS).to(memory_format=LAYOUTS[layout])
    y = torch.randint(0, 1000, (batch,))
    base = build(name, layout)
    converted = normally.convert(copy.deepcopy(base))
    fused, report = normally.fuse(copy.deepcopy(converted), x[:2], return_report=True)
    models = {TORCH: copy.deepcopy(base), CONVERTED: converted, FUSED: fused}
    steps = {n: training_step(m, x, y) for n, m in models.items()}
    first = {}
    for contender, step in steps.items():
        torch.manual_seed(0)  # of the dropout
        first[contender] = step()
    training = interleave(steps, rounds)

    base.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folded_by_torch = torch_fold(copy.deepcopy(base))
    folded, folds = normally.fold(copy.deepcopy(base), x[:2], return_report=True)
    with torch.inference_mode():
        evaluation = interleave(
            {
                PLAIN: lambda: base(x),
                TORCH_FOLDED: lambda: folded_by_torch(x),
                FOLDED: lambda: folded(x),
            },
            rounds,
        )
    return {
        "model": name,
        "layout": layout,
        "batch": batch,
        "first_loss": first,
        "fused": len(report.changed),
        "left": [str(change) for change in report.left],
        "folded": len(folds.changed),
        "training_seconds": training,
        "evaluation_seconds": evaluation,
    }


def table(records: list[dict[str, Any]]) -> Iterator[str]:
    """The records as lines."""
    for kind, base in (("training", TORCH), ("evaluation", PLAIN)):
        yield f"{kind}: milliseconds, median [quartiles]; times as fast as torch, by rounds"
        for r in records:
            times = r[f"{kind}_seconds"]
            for name, seconds in times.items():
                s, ratio = Spread.of([1e3 * t for t in seconds]), speedup(seconds, times[base])
                yield (
                    f"  {r['model']:>20} {r['layout']:>14} {name:>16}"
                    f"{s.median:10.1f} [{s.low:.1f}, {s.high:.1f}]"
                    f"{ratio.median:8.2f} x [{ratio.low:.2f}, {ratio.high:.2f}]"
                )
        yield ""


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and save where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--save", metavar="MACHINE", help="write results/surgery/MACHINE.json")
    options = parser.parse_args(arguments)
    facts = environment.describe()
    print(environment.sentence(facts), end="\n\n")
    records = []
    for name in options.models.split(","):
        for layout in options.layouts.split(","):
            records.append(measure(name, layout, options.rounds))
            print(f"{name}, {layout}: first losses {records[-1]['first_loss']}", file=sys.stderr)
    print("\n".join(table(records)))
    if options.save:
        results = {
            "schema": "normally.surgery/1",
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "environment": facts,
            "pixels": PIXELS,
            "records": records,
        }
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{options.save}.json"
        path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        print(f"written: {path.name}")


if __name__ == "__main__":
    main()
