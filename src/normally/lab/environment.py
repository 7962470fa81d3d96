"""The machine and the software that a number was measured with."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

import normally


def describe() -> dict[str, Any]:
    """Versions, machine, backends and settings; None where the system does not tell."""
    return {
        "normally": normally.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "backends": normally.backends(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "transparent_huge_pages": _huge_pages(),
        "caches": _caches(),
    }


def sentence(facts: dict[str, Any]) -> str:
    """The facts that belong beside a measurement, in one line."""
    backends = ", ".join(f"{device}: {name}" for device, name in facts["backends"].items())
    return (
        f"normally {facts['normally']} ({backends}), torch {facts['torch']}, "
        f"Python {facts['python']}; {facts['cpu'] or facts['platform']}, "
        f"{facts['instruction_set']}, {facts['threads']} "
        f"{'thread' if facts['threads'] == 1 else 'threads'}; transparent huge pages: "
        f"{facts['transparent_huge_pages'] or 'unknown'}"
    )


def _read(path: str | Path) -> str | None:
    try:
        return Path(path).read_text("utf-8").strip()
    except OSError:
        return None


def _cpu_model() -> str | None:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or None


def _huge_pages() -> str | None:
    """`always`, `madvise` or `never`: the bracketed word of the kernel's setting."""
    setting = _read("/sys/kernel/mm/transparent_hugepage/enabled") or ""
    return next((word[1:-1] for word in setting.split() if word.startswith("[")), None)


def _caches() -> dict[str, str] | None:
    """Sizes as the first core sees them, such as {"L1d": "32K", "L2": "1024K"}."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(index / name) for name in ("level", "type", "size"))
        if level and size:
            suffix = {"Data": "d", "Instruction": "i"}.get(kind or "", "")
            found[f"L{level}{suffix}"] = size
    return found or None
