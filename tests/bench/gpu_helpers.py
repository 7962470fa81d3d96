"""A GPU that is not there: its facts, a timer that invents times, and a run that nobody made."""

from __future__ import annotations

import contextlib

import torch

from normally.bench.gpu.cases import MODES, floor_bytes, least_bytes, plan
from normally.bench.gpu.device import Device
from normally.bench.gpu.results import GpuRecord, GpuResults, Network
from normally.bench.gpu.timing import DeviceLostError, Flight
from normally.bench.measure import Spread
from normally.bench.results import CopySpeed, Timing

from .helpers import MACHINE

DEVICE = Device("NVIDIA Test 1", "9.0", 132, 60 << 20, 228 << 10, 1 << 24)
GPU_MACHINE = {
    **MACHINE,
    "gpu": {
        "slug": DEVICE.slug,
        "name": DEVICE.name,
        "capability": DEVICE.capability,
        "multiprocessors": DEVICE.multiprocessors,
        "l2_bytes": DEVICE.l2_bytes,
        "sm_bytes": DEVICE.sm_bytes,
        "memory_bytes": DEVICE.memory_bytes,
        "cuda": "13.0",
        "cudnn": 91000,
        "triton": "3.6.0",
        "nvidia_smi": None,
    },
}
SPEED = 4e12  # bytes a second


class FakeTimer:
    """Runs every step once, on the CPU; a contender's times are its place among them, in ms."""

    device = torch.device("cpu")

    def __init__(self, lost=False):
        self.calls = []
        self.lost = lost

    def scope(self):
        return contextlib.nullcontext()

    def prepare(self, step):
        step()
        return step

    def rounds(self, replays):
        self.calls.append(tuple(replays))
        return {name: [1e-3 * i, 1e-3 * i, 3e-3 * i] for i, name in enumerate(replays, start=1)}

    def in_flight(self, steps):
        return {
            name: Flight([2e-3 * i] * 3, [1e-5 * i] * 3) for i, name in enumerate(steps, start=1)
        }

    def copy_speeds(self, dtype):
        return [SPEED]

    def wait(self):
        if self.lost:
            raise DeviceLostError("an illegal memory access was encountered")

    def release(self):
        pass


def spread(seconds):
    return Spread(seconds, seconds * 0.9, seconds * 1.1)


def make_gpu_record(operator, case, ratio, share=0.9, eager=None):
    """A case that reached `share` of its floor; torch took `ratio` times as long."""
    floor = floor_bytes(operator, case, DEVICE)
    seconds = max(2e-6, floor / SPEED / share)  # a launch takes its time
    error = {"1": 1e-7, "1e+03": 2e-7, "1e+05": None}
    has_eager = case.mode != "backward"
    return GpuRecord(
        operator=operator.name,
        label=case.shape.label,
        size=case.shape.size,
        layout=case.layout,
        dtype=case.dtype,
        act=case.act,
        residual=case.has_residual,
        fused=case.fused,
        mode=case.mode,
        threads=0,
        tensor_bytes=case.tensor_bytes,
        floor_bytes=floor,
        rounds=21,
        timings={
            "normally": Timing(spread(seconds), error),
            "torch": Timing(spread(seconds * ratio), error),
        },
        speedup={"torch": spread(ratio)},
        least_bytes=least_bytes(operator, case, DEVICE.l2_bytes),
        copy_seconds=spread(seconds / 2) if case.mode == "forward" else None,
        eager={"normally": spread(1e-4), "torch": spread(1e-4 * (eager or ratio))}
        if has_eager
        else {},
        host={"normally": spread(2e-5), "torch": spread(3e-5)} if has_eager else {},
    )


def make_gpu_results(ratio=2.0, shapes=None, **kinds):
    """A complete run with every case at one ratio."""
    from dataclasses import replace

    records = [
        make_gpu_record(operator, replace(case, mode=mode), ratio, **kinds)
        for operator, case in plan(shapes=shapes)
        for mode in MODES
    ]
    copy = [CopySpeed(dtype, 0, spread(SPEED)) for dtype in ("bfloat16", "float32")]
    return GpuResults(
        GPU_MACHINE, {}, "2026-11-21T00:00:00+00:00", True, copy, records,
        networks=[make_network(ratio)], not_measured=["no time: something"],
    )  # fmt: skip


def make_network(ratio):
    variants = ("torch", "normally, norms alone", "normally, with sum and ReLU")
    return Network(
        "ResNet-50 training step, bfloat16 autocast, channels_last", "torchvision 1.0", 256,
        seconds={name: spread(0.1) for name in variants},
        speedup={name: spread(ratio) for name in variants[1:]},
        loss=dict.fromkeys(variants, 6.9),
    )  # fmt: skip
