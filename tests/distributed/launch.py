"""Real processes for the tests of `torch.distributed`, and what became of each.

The processes are forked from one that has imported torch and normally already, so that a test costs
tenths of a second and not the seconds of an import per process.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "normally", __name__])


@dataclass(frozen=True)
class Outcome:
    """What became of one process."""

    rank: int
    #: What the function returned; None where it did not return.
    value: Any = None
    #: The exception that it raised, "ValueError: …", with the traceback below; None without one.
    error: str | None = None
    #: The process's own: 0 after a value, 1 after an exception, -n where signal n ended it.
    exitcode: int | None = None
    #: Whether it was still running when the time was up, and had to be killed.
    hung: bool = False
    #: From the start of all to the value or the exception, in seconds.
    seconds: float = 0.0


def run(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 120.0,
    group_timeout: float = 60.0,
    environment: dict[str, str] | None = None,
    tcp: bool = False,
) -> list[Outcome]:
    """Call `function(rank, *args)` in so many processes, gloo's default group initialized in each.

    It waits no longer than `timeout` and the ten seconds in which one that is done must end, and
    leaves no process behind.

    Args:
        world_size: how many processes.
        function: of a module's top level, so that the processes find it by its name.
        args: anything that can be pickled.
        timeout: in seconds; who is not done by then is killed, and `hung`.
        group_timeout: that of the group's collectives, in seconds.
        environment: variables beside this process's own.
        tcp: rank 0 hosts the group's store, as under torchrun; else it is a file.

    Returns:
        One outcome a rank.
    """
    variables = {**os.environ, **(environment or {})}
    with tempfile.TemporaryDirectory() as folder:
        store = f"tcp://127.0.0.1:{_free_port()}" if tcp else f"file://{folder}/store"
        processes, pipes = [], []
        begin = time.monotonic()
        for rank in range(world_size):
            reader, writer = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(
                target=_main,
                args=(writer, rank, world_size, store, group_timeout, variables,
                      function, args),
            )  # fmt: skip
            process.start()
            writer.close()  # the other end is the process's alone: it closes when that dies
            processes.append(process)
            pipes.append(reader)
        said = _collect(pipes, begin, begin + timeout)
        outcomes = []
        for rank, process in enumerate(processes):
            # One that has said its word ends by itself, soon.
            process.join(10.0 if rank in said else 0)
            hung = process.is_alive()
            if hung:
                process.kill()
                process.join()
            value, error, seconds = said.get(rank, (None, None, timeout))
            outcomes.append(Outcome(rank, value, error, process.exitcode, hung, seconds))
    return outcomes


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def results(world_size: int, function: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
    """What `function(rank, *args)` returned in each process; AssertionError unless all did.

    The options are those of `run`.
    """
    outcomes = run(world_size, function, *args, **options)
    bad = [o for o in outcomes if o.hung or o.error is not None or o.exitcode != 0]
    assert not bad, "\n".join(
        f"rank {o.rank}: {o.error or 'no exception'}, exit code {o.exitcode}, hung: {o.hung}"
        for o in bad
    )
    return [o.value for o in outcomes]


def _collect(pipes: list[Connection], begin: float, deadline: float) -> dict[int, Any]:
    """(value, error, seconds) of every rank that said its word or died, by the deadline."""
    open_pipes = dict(zip(pipes, range(len(pipes)), strict=True))
    said: dict[int, Any] = {}
    while open_pipes and (left := deadline - time.monotonic()) > 0:
        for pipe in wait(list(open_pipes), timeout=left):
            assert isinstance(pipe, Connection)
            rank = open_pipes.pop(pipe)
            try:
                value, error = pickle.loads(pipe.recv_bytes())
            except EOFError:  # it died without a word
                value, error = None, None
            said[rank] = (value, error, time.monotonic() - begin)
    for pipe in pipes:
        pipe.close()
    return said


def _main(
    writer: Connection,
    rank: int,
    world_size: int,
    store: str,
    group_timeout: float,
    variables: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """What a process does."""
    os.environ.clear()
    os.environ.update(variables)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's name may mean nothing
    torch.set_num_threads(1)
    torch.manual_seed(20261121)
    try:
        dist.init_process_group(
            "gloo",
            init_method=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=group_timeout),
        )
        # Who is still connecting when another ends would fail for that.
        connections = dist.distributed_c10d._get_default_store()
        connections.set(f"connected/{rank}", "")
        connections.wait([f"connected/{other}" for other in range(world_size)])
        value = function(rank, *args)
        # Pickled here: what cannot be is this function's error, and tensors go by value.
        word = pickle.dumps((value, None))
    except BaseException as error:
        word = pickle.dumps((None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
        writer.send_bytes(word)
        os._exit(1)  # the others may be dead: nothing is left to agree upon
    writer.send_bytes(word)
    writer.close()
    if dist.is_initialized():
        dist.destroy_process_group()
