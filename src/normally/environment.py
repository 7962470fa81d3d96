"""The machine and the software that a number was measured with."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ._native import backends

__all__ = ["ASSUMED_CACHE", "Cache", "caches", "describe", "last_level_cache", "sentence"]

_CPU = Path("/sys/devices/system/cpu")
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
#: Where the system does not say: a desktop's last-level cache.
ASSUMED_CACHE = 32 << 20


@dataclass(frozen=True)
class Cache:
    """A kind of cache: one instance's size, and all instances' together."""

    name: str
    bytes: int
    total_bytes: int


def caches(cpu: Path = _CPU) -> list[Cache]:
    """The data and unified caches, innermost first; empty where the system does not tell."""
    instances: dict[int, dict[str, int]] = {}
    for index in cpu.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level = int(_read(index / "level"))
            if _read(index / "type") != "Instruction":
                sharers = _read(index / "shared_cpu_list")
                instances.setdefault(level, {})[sharers] = _to_bytes(_read(index / "size"))
        except (OSError, ValueError):
            continue
    return [
        Cache(f"L{level}", max(sizes.values()), sum(sizes.values()))
        for level, sizes in sorted(instances.items())
    ]


def last_level_cache() -> Cache:
    """The outermost cache, or `ASSUMED_CACHE` under a name that says so."""
    found = caches()
    return found[-1] if found else Cache("assumed", ASSUMED_CACHE, ASSUMED_CACHE)


def describe() -> dict[str, Any]:
    """Versions, machine, backends and settings, as results and `normally env` give them."""
    from . import __version__  # the package is complete by now

    return {
        "cpu": _cpu_model(),
        "cores": _usable_cores(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "caches": {cache.name: cache.bytes for cache in (caches() or [last_level_cache()])},
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "transparent_huge_pages": _chosen(_THP),
        "torch_huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE", "0") == "1",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "normally": __version__,
        "backends": backends(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def sentence(facts: dict[str, Any]) -> str:
    """The facts that belong beside a measurement, in one line."""
    served = ", ".join(f"{device}: {name}" for device, name in facts["backends"].items())
    threads = f"{facts['threads']} {'thread' if facts['threads'] == 1 else 'threads'}"
    return (
        f"normally {facts['normally']} ({served}), torch {facts['torch']}, "
        f"Python {facts['python']}; {facts['cpu']}, {facts['instruction_set']}, {threads}; "
        f"transparent huge pages: {facts['transparent_huge_pages']}"
    )


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _chosen(path: Path) -> str:
    """The word in brackets of a kernel setting such as `always [madvise] never`."""
    try:
        found = re.search(r"\[(\w+)\]", _read(path))
    except OSError:
        found = None
    return found[1] if found else "unknown"


def _to_bytes(size: str) -> int:
    """Bytes of a size as the kernel writes it.

    >>> _to_bytes("1024K")
    1048576
    """
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1], 1)
    return int(size.rstrip("KMG")) * unit


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip()
