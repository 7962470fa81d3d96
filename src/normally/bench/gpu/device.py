"""The GPU that is measured: its name, its memories, and the versions of what drives it."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch

from ... import environment

_QUERY = "driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"


@dataclass(frozen=True)
class Device:
    """What a GPU says of itself."""

    name: str
    capability: str
    multiprocessors: int
    l2_bytes: int
    sm_bytes: int  # of one multiprocessor's shared memory and L1
    memory_bytes: int

    @property
    def slug(self) -> str:
        """The name as a file's.

        >>> Device("NVIDIA H200", "9.0", 132, 0, 0, 0).slug
        'nvidia-h200'
        """
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    @classmethod
    def current(cls) -> Device:
        """The one that torch uses."""
        p = torch.cuda.get_device_properties()
        return cls(
            name=p.name,
            capability=f"{p.major}.{p.minor}",
            multiprocessors=p.multi_processor_count,
            l2_bytes=p.L2_cache_size,
            sm_bytes=p.shared_memory_per_multiprocessor,
            memory_bytes=p.total_memory,
        )


def missing() -> str | None:
    """Why there is nothing to measure here, or None."""
    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} finds no CUDA GPU. Run this on a machine that has one, "
            "with a torch that was built for CUDA."
        )
    if importlib.util.find_spec("triton") is None:
        return "the GPU kernels need Triton. Install it with: pip install triton"
    return None


def describe(device: Device) -> dict[str, Any]:
    """The facts of `environment.describe`, and under "gpu" those of the device."""
    facts = {"slug": device.slug, **asdict(device)}
    facts["cuda"] = torch.version.cuda
    facts["cudnn"] = torch.backends.cudnn.version()
    facts["triton"] = _version("triton")
    facts["nvidia_smi"] = _nvidia_smi()
    return {**environment.describe(), "gpu": facts}


def lines(machine: dict[str, Any]) -> list[str]:
    """The facts that belong beside a measurement, a few a line."""
    g = machine["gpu"]
    return [
        f"{g['name']}, compute capability {g['capability']}, {g['multiprocessors']} "
        f"multiprocessors, L2 {g['l2_bytes'] / 2**20:.3g} MiB, {g['sm_bytes'] / 2**10:.3g} KiB a "
        f"multiprocessor, {g['memory_bytes'] / 2**30:.4g} GiB",
        f"CUDA {g['cuda']}, cuDNN {g['cudnn']}, Triton {g['triton']}, torch {machine['torch']}, "
        f"Python {machine['python']}, normally {machine['normally']}",
        f"driver, clocks, power limit, temperature: {g['nvidia_smi'] or 'unknown'}",
        f"host: {machine['cpu']}, {machine['cores']} cores, {machine['system']}",
    ]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _nvidia_smi() -> str | None:
    """What the driver says at this moment; nothing is changed."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None
