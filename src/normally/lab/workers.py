"""Measure runs: here, in processes of this machine, or on a Ray cluster.

Each way is a generator that yields the index of a run and its outcome as they come. A run that
fails is an outcome too: it must not take an overnight of others with it. Nothing is saved here;
whoever asks does that, in one process.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch

from .. import environment
from . import data as data_module
from .experiment import Record, Run
from .process_group import end_with_parent
from .training import one_thread


@dataclass(frozen=True)
class Cell:
    """One run, as it is sent to whoever measures it."""

    measure: Callable[[Run], Record]
    variant: str
    seed: int
    data: str
    settings: Mapping[str, Any]
    alone: bool = False  # nothing else may run meanwhile, and it has all threads


@dataclass(frozen=True)
class Outcome:
    """What came out: a record, or the text of an error."""

    record: Record | None
    seconds: float
    machine: str
    error: str = ""


Outcomes = Generator[tuple[int, Outcome], None, None]
# Called with the index of a run, and the epochs done and in total: (0, 0) when it starts.
Listen = Callable[[int, int, int], None]
Workers = Callable[[Sequence[Cell], Listen], Outcomes]


def perform(cell: Cell, advance: Callable[[int, int], None] = lambda done, total: None) -> Outcome:
    """Measure one run in this process, with one thread and its seed; the caller's stay."""
    started = time.perf_counter()
    record, error = None, ""
    try:
        dataset = _data(cell.data, os.environ.get("NORMALLY_DATA"))
        with torch.random.fork_rng(devices=[]), nullcontext() if cell.alone else one_thread():
            torch.manual_seed(cell.seed)
            record = cell.measure(Run(cell.variant, cell.seed, dataset, cell.settings, advance))
    except Exception:
        error = traceback.format_exc()
    machine = environment.sentence(environment.describe())
    return Outcome(record, time.perf_counter() - started, machine, error)


def serial(cells: Sequence[Cell], listen: Listen) -> Outcomes:
    """One after the other, here."""
    for index, cell in enumerate(cells):
        listen(index, 0, 0)
        yield index, perform(cell, functools.partial(listen, index))


def in_processes(jobs: int) -> Workers:
    """`jobs` at a time, in processes of their own.

    They are killed as soon as the generator is closed or interrupted, and end by themselves when
    this process is killed.
    """

    def work(cells: Sequence[Cell], listen: Listen) -> Outcomes:
        if not cells:
            return
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        events = context.SimpleQueue()
        pool = ProcessPoolExecutor(jobs, context, _begin, (events,))
        workers: list[int] = []
        ear = threading.Thread(target=_hear, args=(events, workers, listen), daemon=True)
        ear.start()
        try:
            futures: dict[Future[Outcome], int] = {
                pool.submit(_in_worker, index, cell): index for index, cell in enumerate(cells)
            }
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise RuntimeError(
                "lab: a process that measured a run was killed; was there too little memory? "
                "Finished runs are kept: the same command continues; fewer --jobs need less."
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                _kill(worker)
            raise
        finally:
            pool.shutdown()
            events.put(None)
            ear.join()

    return work


def on_ray(cells: Sequence[Cell], listen: Listen) -> Outcomes:
    """One core each, on the Ray cluster that RAY_ADDRESS names, or on one made of this machine.

    Raises:
        ImportError: without Ray.
    """
    if not cells:
        return
    try:
        import ray
    except ImportError:
        raise ImportError(
            "lab: engine='ray' needs Ray. Install it: pip install 'normally[ray]'"
        ) from None
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(log_to_driver=False, include_dashboard=False)
    remote = ray.remote(num_cpus=1)(perform)
    waiting = {remote.remote(cell): index for index, cell in enumerate(cells)}
    try:
        while waiting:
            ready, _ = ray.wait(list(waiting))
            for reference in ready:
                yield waiting.pop(reference), ray.get(reference)
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)
        if started_here:
            ray.shutdown()


@functools.lru_cache(maxsize=2)
def _data(name: str, _: str | None) -> data_module.Dataset:
    return data_module.load(name)


_events: Any = None  # in a worker: the queue to the process that asked


def _begin(events: Any) -> None:
    """A worker starts. Ctrl-C is for the process that asked; it stops the workers."""
    global _events
    _events = events
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    events.put(os.getpid())


def _in_worker(index: int, cell: Cell) -> Outcome:
    _events.put((index, 0, 0))
    return perform(cell, lambda done, total: _events.put((index, done, total)))


def _hear(events: Any, workers: list[int], listen: Listen) -> None:
    """Take what the workers say: their process number first, then how far they are."""
    while (event := events.get()) is not None:
        if isinstance(event, int):
            workers.append(event)
        else:
            listen(*event)


def _kill(process: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGTERM)
