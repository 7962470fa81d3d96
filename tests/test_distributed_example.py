"""examples/, benchmarks/ and docs/guide/distributed: in real processes they do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from normally import convert_sync_batchnorm
from tests.distributed.launch import results
from tests.helpers import values

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "distributed.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    ours = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**ours, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_one_process_is_itself() -> None:
    """Two are in distributed/test_example.py."""
    run = _run(EXAMPLE)
    assert run.returncode == 0, run.stderr
    assert "largest difference of a weight 0.0e+00, of a running statistic 0.0e+00" in run.stdout
    assert run.stdout.endswith("\nthe same weights\n")


def test_without_synchronization_it_says_no(tmp_path: Path) -> None:
    script = tmp_path / "plain.py"
    script.write_text(
        "import runpy\nimport normally\n"
        "normally.convert_sync_batchnorm = lambda model: model\n"
        f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')\n",
        "utf-8",
    )
    run = _run(*TORCHRUN, script)
    assert run.returncode != 0
    assert run.stdout.endswith("\nNOT the same weights\n"), run.stderr


def test_the_benchmark_counts_what_is_sent() -> None:
    """Its table has 2C + 2 and 2C + 1 float64 numbers for C = 64; times are not looked at."""
    run = _run(ROOT / "benchmarks" / "distributed.py", "--rounds", "2", "--shapes", "1")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].split()[:3] == ["2×64×8×8", "1,040,", "1,032"]


SIZES = (3, 0, 5, 2)


def _net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.SiLU(), nn.Linear(5, 1)).double()


def _guide(rank: int) -> tuple[list[Tensor], Tensor]:
    """The guide's functions: the gradients of its loss, and outputs of groups of two."""
    guide: dict[str, Any] = {}
    text = (ROOT / "docs" / "guide" / "distributed.md").read_text("utf-8")
    for code in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        exec(code, guide)
    net = DistributedDataParallel(convert_sync_batchnorm(_net()))
    own = values((sum(SIZES), 3), torch.float64, seed=1).split(SIZES)[rank]
    guide["mean_over_all"](net(own).square().squeeze(1)).backward()
    in_groups = guide["convert"](_net(), processes_of_a_node=2)
    output = in_groups(values((8, 3), torch.float64, seed=2).split(2)[rank])
    return [p.grad for p in net.parameters()], output.detach()


def test_the_guides_functions() -> None:
    alone = _net()
    alone(values((sum(SIZES), 3), torch.float64, seed=1)).square().mean().backward()
    halves = values((8, 3), torch.float64, seed=2).split(4)
    expected = torch.cat([_net()(half).detach() for half in halves]).split(2)
    # float64: values of size 1, sums of 10.
    for (gradients, output), wanted in zip(results(4, _guide), expected, strict=True):
        for gradient, p in zip(gradients, alone.parameters(), strict=True):
            torch.testing.assert_close(gradient, p.grad, rtol=0, atol=1e-12)
        torch.testing.assert_close(output, wanted, rtol=0, atol=1e-12)
