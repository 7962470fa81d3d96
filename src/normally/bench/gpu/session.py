"""Measure the cases of a GPU run, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import memory
from ..measure import Spread, Step, speedup
from ..operator import Case, Operator
from ..results import COMPILED, OURS, TORCH, CopySpeed, Timing
from . import accuracy
from .cases import MODES, floor_bytes, least_bytes
from .device import Device
from .library import Library
from .results import GpuRecord, GpuResults
from .steps import make_grads, make_inputs, make_step
from .timing import Flight, Replay, Timer

#: The yardstick of a case: a copy of its own tensor, in the rounds of its forward.
COPY = "copy"
_MESSAGE = 300  # of an error, in characters


class Session:
    """One run: its timer, the device, and what it has found so far."""

    def __init__(
        self,
        results: GpuResults,
        timer: Timer,
        device: Device,
        libraries: Sequence[Library] = (),
    ) -> None:
        self.results = results
        self._timer = timer
        self._device = device
        self._libraries = libraries
        # Whole tensors where there is room for a dozen of them in float64.
        self._error_elements = max(1 << 16, device.memory_bytes // 512)

    def measure_copy(self, dtypes: Sequence[str]) -> None:
        """The yardstick of the run."""
        for dtype in dtypes:
            speeds = self._timer.copy_speeds(getattr(torch, dtype))
            self.results.copy.append(CopySpeed(dtype, 0, Spread.of(speeds)))
            self._timer.release()

    def measure(self, operator: Operator, case: Case) -> None:
        """Ours, torch's and the other libraries', in every mode.

        Raises:
            DeviceLostError: if a kernel broke the device.
        """
        builds = {OURS: partial(operator.ours, case), TORCH: partial(operator.theirs, case)}
        for library in self._libraries:
            if library.has(operator, case):
                builds[library.name] = partial(library.build, operator, case)
        failed: dict[str, str] = {}
        with self._timer.scope():
            found = accuracy.errors(
                operator, case, builds, self._timer.device, self._error_elements
            )
            self._timer.wait()
            modules = self._build(builds, failed)
            inputs, grads = self._tensors(operator, case)
            for mode in MODES:
                timed = replace(case, mode=mode)
                chosen = {n: m for n, m in modules.items() if self._has(n, operator, timed)}
                record = self._time(operator, timed, chosen, inputs, grads, found, failed)
                self.results.records.append(record)
            del modules, inputs, grads
        self._timer.release()

    def measure_compiled(self, operator: Operator, case: Case) -> None:
        """torch.compile of torch's layers, beside ours again; enters into the case's records."""
        # A graph is made for one shape; earlier ones are of no use.
        torch.compiler.reset()
        failed: dict[str, str] = {}
        with self._timer.scope():
            builds = {
                OURS: partial(operator.ours, case),
                COMPILED: lambda: cast(nn.Module, compiled(operator.theirs(case))),
            }
            modules = self._build(builds, failed)
            inputs, grads = self._tensors(operator, case)
            for mode in MODES:
                key = (operator.name, case.shape.label, case.layout, case.dtype)
                known = self.results.find(key, mode)
                if known is None:
                    continue
                timed = replace(case, mode=mode)
                record = self._time(operator, timed, modules, inputs, grads, {}, failed)
                index = self.results.records.index(known)
                self.results.records[index] = _with_compiled(known, record)
            del modules, inputs, grads
        self._timer.release()

    def _has(self, name: str, operator: Operator, case: Case) -> bool:
        """Whether the contender has the mode, too."""
        libraries = {library.name: library for library in self._libraries}
        return name not in libraries or libraries[name].has(operator, case)

    def _build(self, builds: Mapping[str, Any], failed: dict[str, str]) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {}
        for name, build in builds.items():
            try:
                modules[name] = build().to(self._timer.device).train()
            except Exception as error:
                failed[name] = _message(error)
        return modules

    def _tensors(self, operator: Operator, case: Case) -> tuple[list[Tensor], list[Tensor]]:
        inputs = make_inputs(case, self._timer.device)
        for tensor in inputs:
            tensor.requires_grad_()
        return inputs, make_grads(operator, case, self._timer.device)

    def _time(
        self,
        operator: Operator,
        case: Case,
        modules: Mapping[str, nn.Module],
        inputs: Sequence[Tensor],
        grads: Sequence[Tensor],
        errors: accuracy.Errors,
        broken: Mapping[str, str],
    ) -> GpuRecord:
        steps: dict[str, Step] = {}
        replays: dict[str, Replay] = {}
        failed = dict(broken)
        saved: dict[str, int] = {}
        for name, module in modules.items():
            try:
                step = make_step(module, inputs, case.mode, grads)
                step()
                steps[name] = step
                replays[name] = self._timer.prepare(step)
                if case.mode == "forward_backward" and name in (OURS, TORCH):
                    saved[name] = memory.saved_bytes(module, inputs)
            except Exception as error:  # reported with the case; the others are still timed
                failed[name] = _message(error)
                self._timer.wait()
        if case.mode == "forward" and replays:
            original = inputs[0].detach()
            replays[COPY] = self._timer.prepare(lambda: original.clone())
        times = self._timer.rounds(replays)
        copy = times.pop(COPY, None)
        flights: dict[str, Flight] = {}
        if case.mode != "backward":
            flights = self._timer.in_flight(steps)
        self._timer.wait()
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
            floor_bytes=floor_bytes(operator, case, self._device),
            least_bytes=least_bytes(operator, case, self._device.l2_bytes),
            rounds=max((len(values) for values in times.values()), default=0),
            timings={
                name: Timing(Spread.of(values), errors.get(name), saved.get(name))
                for name, values in times.items()
            },
            speedup={
                name: speedup(times[OURS], values)
                for name, values in times.items()
                if name != OURS and OURS in times
            },
            copy_seconds=None if copy is None else Spread.of(copy),
            eager={name: Spread.of(flight.wall) for name, flight in flights.items()},
            host={name: Spread.of(flight.host) for name, flight in flights.items()},
            failed=failed,
        )


def compiled(module: nn.Module) -> Any:
    """For one shape, and so that a backward can be repeated."""
    from torch._functorch import config

    config.donated_buffer = False  # else a compiled backward frees what the forward saved
    return torch.compile(module, dynamic=False)


def _with_compiled(known: GpuRecord, record: GpuRecord) -> GpuRecord:
    """The record with the compiled contender, whose rounds were beside ours of another time."""
    return replace(
        known,
        timings=known.timings | _only(record.timings),
        speedup=known.speedup | _only(record.speedup),
        eager=known.eager | _only(record.eager),
        host=known.host | _only(record.host),
        failed=known.failed | _only(record.failed),
    )


def _only(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name == COMPILED}


def _message(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= _MESSAGE else f"{text[:_MESSAGE]} …"
