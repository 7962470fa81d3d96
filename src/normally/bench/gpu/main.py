"""`run`: the benchmark of a GPU, in the order of what matters, until its time is up."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from time import perf_counter

import torch

from ..measure import make_step
from ..operator import LAYOUTS
from . import network
from .cases import Entry, name_of, plan
from .device import Device, describe
from .library import Library, usable
from .results import GpuResults
from .session import Session, compiled
from .steps import make_grads, make_inputs
from .timing import Deadline, DeviceLostError, Timer
from .with_apex import Apex
from .with_liger import Liger
from .with_quack import Quack

LIBRARIES: tuple[Library, ...] = (Liger(), Quack(), Apex())
DTYPES = ("bfloat16", "float32")
_SHARE_OF_CASES = 0.7  # of the time: the network and torch.compile come after
_NETWORK_SECONDS = 25.0  # three variants, a hundred steps, and cuDNN's choice of algorithms
_WRITE_EVERY = 8  # cases

Tell = Callable[[str], object]


def run(
    timer: Timer,
    device: Device,
    deadline: Deadline,
    *,
    operators: Sequence[str] | None = None,
    shapes: Sequence[str] | None = None,
    dtypes: Sequence[str] = DTYPES,
    layouts: Sequence[str] = LAYOUTS,
    compile: bool = True,
    networks: bool = True,
    json_path: str | os.PathLike[str] | None = None,
    tell: Tell = print,
) -> GpuResults:
    """Measure, and write what there is after every few cases.

    The cases in eager torch and the other libraries come first, then ResNet-50, then torch.compile
    for as many cases as there is time. What was left out is in the results, by name.

    Args:
        timer: takes the times.
        device: whose floors and facts the results have.
        deadline: after it nothing new begins.
        operators: as in `normally bench`; None means all, as for `shapes`.
        shapes: numbers or labels.
        dtypes: of the tensors.
        layouts: "contiguous" and "channels_last".
        compile: whether torch.compile is measured.
        networks: whether ResNet-50 is.
        json_path: where the JSON goes, if anywhere.
        tell: gets a line a case.
    """
    entries = plan(operators, shapes, dtypes, layouts)
    libraries, versions, reasons = usable(LIBRARIES)
    results = GpuResults(
        machine=describe(device),
        options={
            "operators": None if operators is None else list(operators),
            "shapes": None if shapes is None else list(shapes),
            "dtypes": list(dtypes),
            "layouts": list(layouts),
            "compile": compile,
            "networks": networks,
        },
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        others=versions,
        not_measured=[f"not importable: {reason}" for reason in reasons],
    )
    write = partial(_write, results, json_path)
    try:
        session = Session(results, timer, device, libraries)
        session.measure_copy(dtypes)
        for_cases = deadline.part(_SHARE_OF_CASES) if compile or networks else deadline
        done = _each(entries, session.measure, for_cases, results, "", tell, write)
        if networks:
            _measure_network(results, timer, deadline, tell)
            write()
        if compile:
            what = "torch.compile: "
            _each(done, session.measure_compiled, deadline, results, what, tell, write)
        results.complete = True
    except DeviceLostError as error:
        results.stopped = f"a kernel broke the device: {error}"
    except KeyboardInterrupt:
        results.stopped = "interrupted"
    write()
    return results


def _each(
    entries: Sequence[Entry],
    measure: Callable[..., None],
    deadline: Deadline,
    results: GpuResults,
    what: str,
    tell: Tell,
    write: Callable[[], None],
) -> list[Entry]:
    """Those that were measured; one that raises is named, and so is what there was no time for."""
    done: list[Entry] = []
    for index, (operator, case) in enumerate(entries):
        name = f"{what}{name_of(operator, case)}"
        if deadline.passed:
            results.not_measured.append(f"no time: {name}")
            continue
        start = perf_counter()
        try:
            measure(operator, case)
        except DeviceLostError as error:
            raise DeviceLostError(f"{name}: {error}") from error
        except Exception as error:
            results.not_measured.append(f"{type(error).__name__}: {name}: {error}")
        else:
            done.append((operator, case))
        tell(f"{perf_counter() - start:6.2f} s  {name}")
        if index % _WRITE_EVERY == 0:
            write()
    return done


def _measure_network(results: GpuResults, timer: Timer, deadline: Deadline, tell: Tell) -> None:
    if deadline.left < _NETWORK_SECONDS:
        results.not_measured.append(f"no time: {network.TITLE}")
        return
    start = perf_counter()
    try:
        results.networks.append(network.measure(timer.device))
    except Exception as error:
        results.not_measured.append(f"{type(error).__name__}: {network.TITLE}: {error}")
        timer.wait()
    timer.release()
    tell(f"{perf_counter() - start:6.2f} s  {network.TITLE}")


def _write(results: GpuResults, path: str | os.PathLike[str] | None) -> None:
    if path is not None and results.copy:
        results.write(path)


def warm(
    entries: Sequence[Entry], device: torch.device, deadline: Deadline, compile: bool, tell: Tell
) -> None:
    """Compile what the cases need into the caches on disk: for a process beside the tests.

    Errors are told and left to the run, which meets them again.
    """
    for operator, case in entries:
        if deadline.passed:
            return
        start = perf_counter()
        try:
            inputs = [tensor.requires_grad_() for tensor in make_inputs(case, device)]
            grads = make_grads(operator, case, device)
            modules = [operator.ours(case).to(device)]
            if compile:
                torch.compiler.reset()
                modules.append(compiled(operator.theirs(case).to(device)))
            for module in modules:
                make_step(module.train(), inputs, "forward_backward", grads)()
        except Exception as error:
            tell(f"{name_of(operator, case)}: {type(error).__name__}: {error}")
        tell(f"{perf_counter() - start:6.2f} s  {name_of(operator, case)}")
