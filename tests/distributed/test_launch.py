"""The launcher itself: values, exceptions, deaths and hangs are told apart, and nothing is left."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.launch import results, run


def _sum(rank: int, factor: float) -> torch.Tensor:
    x = torch.full((2,), factor * (rank + 1))
    dist.all_reduce(x)
    return x


def _trouble(rank: int) -> int:
    if rank == 0:
        raise KeyError("nothing here")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 2:
        time.sleep(600)
    return os.getpid()


def _variable(rank: int, name: str) -> str | None:
    return os.environ.get(name)


def test_values_come_back() -> None:
    for value in results(2, _sum, 2.0):
        assert torch.equal(value, torch.full((2,), 6.0))


def test_variables_reach_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMALLY_TEST_VARIABLE", "1")
    assert results(1, _variable, "NORMALLY_TEST_VARIABLE") == ["1"]
    given = {"NORMALLY_TEST_VARIABLE": "2"}
    assert results(1, _variable, "NORMALLY_TEST_VARIABLE", environment=given) == ["2"]


def test_every_end_has_its_name() -> None:
    raised, died, hung, fine = run(4, _trouble, timeout=15.0)
    assert raised.error is not None
    assert raised.error.startswith("KeyError: 'nothing here'\nTraceback")
    assert raised.exitcode == 1
    assert died.error is None
    assert died.exitcode == -signal.SIGKILL
    assert not died.hung
    assert hung.hung
    assert hung.value is None
    assert (fine.error, fine.exitcode, fine.hung) == (None, 0, False)
    with pytest.raises(ProcessLookupError):
        os.kill(fine.value, 0)


def test_what_is_wrong_fails_the_test() -> None:
    with pytest.raises(AssertionError, match="rank 0: KeyError: 'nothing here'"):
        results(1, _trouble)
