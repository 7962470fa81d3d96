"""Measure the cases of a run, one group of tensors after the other."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import environment
from . import accuracy, memory
from .contender import Contender
from .measure import Budget, Spread, Step, interleave, make_step, speedup
from .operator import MODES, Case, Operator
from .results import COMPILED, OURS, TORCH, CopySpeed, Record, Results, Timing
from .yardstick import ColdCopy

Tell = Callable[[Case], object]
Errors = dict[str, dict[str, float | None]]  # by contender, then by mean/std


class Session:
    """One run: its budget, its yardstick and what it has found so far."""

    def __init__(
        self,
        results: Results,
        budget: Budget,
        threads: Sequence[int],
        compile: bool = False,
        others: Sequence[Contender] = (),
    ) -> None:
        cache = environment.last_level_cache()
        self.results = results
        self.budget = budget
        self.threads = threads
        self.compile = compile
        self.others = others
        self._cache_bytes = cache.bytes
        self._copy = ColdCopy(cache.total_bytes, budget.copy_piece)
        self._errors: dict[tuple[Case, tuple[str, ...]], Errors] = {}
        self._copies: dict[tuple[str, int], list[float]] = {}

    def measure(self, operator: Operator, group: Sequence[Case], tell: Tell) -> None:
        """Every mode and number of threads of cases that share shape, layout and dtype.

        `tell` is called before each case. What is measured stays in `results` if this is
        interrupted, and the number of threads is as it was.
        """
        before = torch.get_num_threads()
        generator = torch.Generator().manual_seed(0)
        inputs = accuracy.make_inputs(group[0], generator)
        for tensor in inputs:
            tensor.requires_grad_()
        grads = [
            torch.randn(inputs[0].shape, generator=generator)
            .to(inputs[0].dtype)
            .contiguous(memory_format=group[0].memory_format)
            for _ in range(operator.outputs)
        ]
        try:
            for threads in self.threads:
                torch.set_num_threads(threads)
                self._measure_copy(group[0].dtype, threads)
                for variant in group:
                    given = inputs if variant.has_residual else inputs[:1]
                    modules = self._build(operator, variant)
                    for mode in MODES:
                        case = replace(variant, mode=mode, threads=threads)
                        tell(case)
                        record = self._time(operator, case, modules, given, grads)
                        self.results.records.append(record)
        finally:
            torch.set_num_threads(before)

    def _build(self, operator: Operator, case: Case) -> dict[str, nn.Module]:
        modules = {OURS: operator.ours(case), TORCH: operator.theirs(case)}
        if self.compile:
            # A graph is made for one number of threads and one shape; earlier ones are of no use.
            torch.compiler.reset()
            modules[COMPILED] = cast(nn.Module, torch.compile(operator.theirs(case)))
        return modules

    def _time(
        self,
        operator: Operator,
        case: Case,
        modules: dict[str, nn.Module],
        inputs: Sequence[Tensor],
        grads: Sequence[Tensor],
    ) -> Record:
        steps: dict[str, Step] = {}
        failed: dict[str, str] = {}
        with torch.set_grad_enabled(case.mode != "evaluation"):
            for name, module in modules.items():
                module.train(case.mode != "evaluation")
                try:
                    steps[name] = _warm(make_step(module, inputs, case.mode, grads))
                except Exception as error:  # reported with the case; the others are still timed
                    failed[name] = f"{type(error).__name__}: {error}"
            times = interleave(steps, self.budget) if steps else {}
            if steps:
                times |= self._time_others(operator, case, inputs, grads, failed)
        facts: dict[str, dict[str, Any]] = {name: {} for name in times}
        errors = self._measure_errors(operator, case, tuple(times))
        for name in times:
            facts[name]["error"] = errors.get(name)
        for name in (OURS, TORCH):
            if name in steps and case.mode == "forward_backward":
                facts[name]["saved_bytes"] = memory.saved_bytes(modules[name], inputs)
                facts[name]["peak_bytes"] = memory.peak_bytes(steps[name])
        return Record(
            operator=operator.name,
            label=case.shape.label,
            size=case.shape.size,
            layout=case.layout,
            dtype=case.dtype,
            act=case.act,
            residual=case.has_residual,
            fused=case.fused,
            mode=case.mode,
            threads=case.threads,
            tensor_bytes=case.tensor_bytes,
            floor_bytes=operator.floor_bytes(case, self._cache_bytes),
            rounds=max((len(times[name]) for name in steps), default=0),
            timings={name: Timing(Spread.of(times[name]), **facts[name]) for name in times},
            speedup={
                name: speedup(times[OURS], times[name])
                if name in steps
                else speedup([statistics.median(times[OURS])] * len(times[name]), times[name])
                for name in times
                if name != OURS and OURS in times
            },
            failed=failed,
        )

    def _time_others(
        self,
        operator: Operator,
        case: Case,
        inputs: Sequence[Tensor],
        grads: Sequence[Tensor],
        failed: dict[str, str],
    ) -> dict[str, list[float]]:
        """Each by itself, in half the time: see `contender`."""
        times: dict[str, list[float]] = {}
        budget = replace(self.budget, seconds=self.budget.seconds / 2)
        for other in self.others:
            if not other.has(operator, case):
                continue
            try:
                module = other.build(operator, case)
                step = _warm(other.make_step(module, inputs, case.mode, grads))
            except Exception as error:
                failed[other.name] = f"{type(error).__name__}: {error}"
            else:
                times |= interleave({other.name: step}, budget)
        return times

    def _measure_errors(self, operator: Operator, case: Case, names: tuple[str, ...]) -> Errors:
        """Once for training and once for evaluation; torch.compile's would be torch's."""
        mode = "evaluation" if case.mode == "evaluation" else "forward"
        key = (replace(case, mode=mode, threads=0), names)
        if key not in self._errors:
            available = {OURS: operator.ours, TORCH: operator.theirs}
            if not available.keys() & set(names):
                return {}
            for other in self.others:
                available[other.name] = partial(other.build, operator)
            builds = {name: build for name, build in available.items() if name in names}
            self._errors[key] = accuracy.errors(
                operator, key[0], builds, self.budget.error_elements
            )
        return self._errors[key]

    def _measure_copy(self, dtype: str, threads: int) -> None:
        """Enter this group's copies; the yardstick is the median over the whole run."""
        copies = self._copies.setdefault((dtype, threads), [])
        copies += self._copy.measure(getattr(torch, dtype), self.budget.copy_rounds)
        self.results.copy = [CopySpeed(*key, Spread.of(v)) for key, v in self._copies.items()]


def _warm(step: Step) -> Step:
    """First calls pay for what later ones find ready: compiled code, pages, threads."""
    step()
    return step
