"""Real processes for an experiment on `torch.distributed`, all gone when it is over.

They are started anew (spawn), because a fork of a process whose torch has threads may hang, and
meet at a file in a folder of their own: a fixed port could be taken. Each has one thread.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
import torch.distributed as dist

_TIMEOUT = timedelta(seconds=120)


def run(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(rank, *args)` in so many processes with gloo's default group; their results.

    No process is left behind, whatever happens: the first that fails ends them all, an interrupt
    here does so too, and those whose parent was killed end by themselves.

    Args:
        world_size: how many processes.
        function: of a module's top level, so that they find it by its name.
        args: what can be pickled; tensors go by value.

    Returns:
        One result a rank.

    Raises:
        RuntimeError: if one raises or dies, with its traceback.
    """
    context = multiprocessing.get_context("spawn")
    call = pickle.dumps((function, args))
    processes: list[SpawnProcess] = []
    pipes: list[Connection] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            for rank in range(world_size):
                reader, writer = context.Pipe(duplex=False)
                process = context.Process(
                    target=_main, args=(writer, rank, world_size, folder, call), daemon=True
                )
                pipes.append(reader)
                process.start()
                processes.append(process)
                writer.close()  # the process's end alone is left: it closes when that dies
            return _collect(pipes)
        finally:
            for process in processes:
                process.kill()
                process.join()
            for pipe in pipes:
                pipe.close()


def _collect(pipes: list[Connection]) -> list[Any]:
    """What every process sends, by rank."""
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        for pipe in wait([p for rank, p in enumerate(pipes) if rank not in results]):
            assert isinstance(pipe, Connection)
            rank = pipes.index(pipe)
            try:
                result, error = pickle.loads(pipe.recv_bytes())
            except EOFError:
                error = (
                    "it ended without a word. A script that calls this has to do so below "
                    'if __name__ == "__main__".'
                )
            if error is not None:
                raise RuntimeError(f"lab: process {rank} of {len(pipes)}: {error}")
            results[rank] = result
    return [results[rank] for rank in range(len(pipes))]


def _main(writer: Connection, rank: int, world_size: int, folder: str, call: bytes) -> None:
    """What a process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends all
    threading.Thread(target=end_with_parent, daemon=True).start()
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine's name may mean nothing
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=_TIMEOUT,
        )
        function, args = pickle.loads(call)
        word = pickle.dumps((function(rank, *args), None))
        dist.barrier()  # who ends while others still exchange would be an error to them
    except BaseException:
        word = pickle.dumps((None, traceback.format_exc()))
    writer.send_bytes(word)
    writer.close()
    os._exit(0)  # without the group's farewell, which waits for peers that may be gone


def end_with_parent() -> None:
    """End this process as soon as the one that started it has ended; for a thread of its own."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a child
    wait([parent.sentinel])
    os._exit(1)
