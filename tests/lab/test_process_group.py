import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from normally.lab import process_group


def total(rank, value):
    tensor = value * (rank + 1)
    dist.all_reduce(tensor)
    return rank, tensor.tolist(), torch.get_num_threads()


def fail(rank, folder):
    Path(folder, str(rank)).write_text(str(os.getpid()))
    if rank == 1:
        raise ValueError("of no use")
    dist.barrier()  # waits for one that will not come


def die(rank):
    if rank == 1:
        os._exit(3)
    dist.barrier()


def sleep(rank, folder):
    Path(folder, f"{rank}.new").write_text(str(os.getpid()))
    Path(folder, f"{rank}.new").rename(Path(folder, str(rank)))
    time.sleep(600)


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_every_process_answers_and_they_exchange():
    found = process_group.run(2, total, torch.tensor([1.0, 2.0]))
    assert found == [(0, [3.0, 6.0], 1), (1, [3.0, 6.0], 1)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_that_fails_ends_all(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)process 1 of 2.*ValueError: of no use"):
        process_group.run(2, fail, str(tmp_path))
    for file in tmp_path.iterdir():
        assert not alive(int(file.read_text()))


def test_one_that_dies_without_a_word_ends_all():
    # The other may be heard first: its barrier fails, because its peer is gone.
    with pytest.raises(RuntimeError, match=r"process [01] of 2"):
        process_group.run(2, die)


@pytest.mark.slow  # a parent and its children import torch one after the other
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_none_outlives_its_parent(tmp_path, how):
    code = (
        "from normally.lab import process_group; from tests.lab.test_process_group import sleep; "
        f"process_group.run(2, sleep, {str(tmp_path)!r})"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as parent:
        try:
            files = [tmp_path / "0", tmp_path / "1"]
            wait_until(lambda: all(file.exists() for file in files))
            pids = [int(file.read_text()) for file in files]
            assert all(map(alive, pids))
            parent.send_signal(how)
            parent.wait(60)
            wait_until(lambda: not any(map(alive, pids)))
        finally:
            parent.kill()
