"""recalibrate(resume=…): an interrupted measurement goes on where it was, and is the same."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from normally import nn, recalibrate
from normally.surgery._statistics import partial_sums
from tests.distributed.launch import run
from tests.helpers import assert_same_bits
from tests.surgery.populations import State, images, network

pytestmark = pytest.mark.usefixtures("one_thread")
MODES = pytest.mark.parametrize("layerwise", [False, True])
BATCHES = list(images().split(7))  # 6 of them


class _Interrupted:
    """The data, which is interrupted once, at the batch of that number of all passes."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __iter__(self) -> Iterator[Tensor]:
        for batch in BATCHES:
            self.left -= 1
            if self.left == -1:
                raise KeyboardInterrupt
            yield batch

    def __len__(self) -> int:
        return len(BATCHES)


def _forwards(model: torch.nn.Module) -> list[Any]:
    calls: list[Any] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))  # type: ignore[operator, index]
    return calls


def assert_same(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    for name, value in expected.state_dict().items():
        assert_same_bits(model.state_dict()[name], value, name)


@MODES
@pytest.mark.parametrize("at", [0, 1, 5, 6, 7, 11, 14])
def test_goes_on_behind_the_batches_that_are_counted(
    tmp_path: Path, layerwise: bool, at: int
) -> None:
    file = tmp_path / "sums"
    expected = network(nn)
    recalibrate(expected, BATCHES, layerwise=layerwise)
    model = network(nn)
    data, state = _Interrupted(at), State(model)
    if layerwise or at < 6:
        with pytest.raises(KeyboardInterrupt):
            recalibrate(model, data, layerwise=layerwise, resume=file)
        state.assert_unchanged()
        assert file.exists() == (at > 0)
    model = network(nn)  # another process, that has read the same checkpoint
    calls = _forwards(model)
    told: list[Any] = []
    recalibrate(
        model,
        data,
        layerwise=layerwise,
        resume=str(file),
        progress=lambda done, total: told.append((done, total)),
    )
    assert_same(model, expected)
    total = 18 if layerwise else 6
    done = at if layerwise or at < 6 else 0
    assert len(calls) == total - done
    assert told[-1] == (total, total)
    assert len(told) == total - done
    assert list(tmp_path.iterdir()) == []


def _dies(rank: int, file: str, layerwise: bool, at: int) -> None:
    partial_sums._INTERVAL = 0.0

    def die(done: int, total: int | None) -> None:
        if done == at:
            os.kill(os.getpid(), signal.SIGKILL)

    recalibrate(network(nn), BATCHES, layerwise=layerwise, resume=file, progress=die)


@MODES
def test_a_process_that_is_killed(tmp_path: Path, layerwise: bool) -> None:
    """Nothing but what is written meanwhile is left of it."""
    file = tmp_path / "sums"
    (outcome,) = run(1, _dies, str(file), layerwise, 4)
    assert outcome.exitcode == -signal.SIGKILL
    model, expected = network(nn), network(nn)
    calls = _forwards(model)
    recalibrate(model, BATCHES, layerwise=layerwise, resume=file)
    recalibrate(expected, BATCHES, layerwise=layerwise)
    assert_same(model, expected)
    assert len(calls) == (18 if layerwise else 6) - 4


def test_generators_go_on_too(tmp_path: Path) -> None:
    file = tmp_path / "sums"
    model, expected = network(nn), network(nn)
    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, iter(_Interrupted(3)), resume=file)
    recalibrate(model, iter(BATCHES), resume=file)
    recalibrate(expected, BATCHES)
    assert_same(model, expected)


def test_several_interrupts(tmp_path: Path) -> None:
    file = tmp_path / "sums"
    model, expected = network(nn), network(nn)
    calls = _forwards(model)
    for at in (2, 4, 5, 8, 7, 3):  # each call goes through the batches again
        with pytest.raises(KeyboardInterrupt):
            recalibrate(model, _Interrupted(at), resume=file, layerwise=True)
    recalibrate(model, BATCHES, resume=file, layerwise=True)
    recalibrate(expected, BATCHES, layerwise=True)
    assert_same(model, expected)
    assert len(calls) == 18


# --- what is refused


def _left_behind(file: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        recalibrate(network(nn), _Interrupted(3), resume=file)


def test_files_of_something_else(tmp_path: Path) -> None:
    file = tmp_path / "sums"
    _left_behind(file)
    content = file.read_bytes()
    other = network(nn)
    with torch.no_grad():
        other[0].weight[0, 0, 0, 0].add_(1e-3)
    cases: list[tuple[torch.nn.Module, str, dict[str, Any]]] = [
        (other, "another model, or of other weights", {}),
        (network(nn).double(), "another model, or of other weights", {}),
        (network(nn), "made with layerwise=False, not layerwise=True", {"layerwise": True}),
        (network(nn), "made with steps=None, not steps=2", {"steps": 2}),
        (network(nn), r"layers=\['1', '5', '8'\], not layers=\['1', '5'\]", {"skip": "8"}),
    ]
    for model, message, options in cases:
        state = State(model)
        with pytest.raises(ValueError, match=f"recalibrate: resume must be a new file.*{message}"):
            recalibrate(model, BATCHES, resume=file, **options)
        state.assert_unchanged()
        assert file.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 half a file"], ids=repr)
def test_files_that_are_none(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "sums"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="which is no such file"):
        recalibrate(network(nn), BATCHES, resume=file)
    assert file.read_bytes() == content


def test_a_state_dict_is_no_such_file(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save(network(nn).state_dict(), file)
    with pytest.raises(ValueError, match="which is no such file"):
        recalibrate(network(nn), BATCHES, resume=file)


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="in a folder that exists"):
        recalibrate(network(nn), BATCHES, resume=tmp_path / "none" / "sums")


def test_data_with_fewer_batches_than_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "sums"
    _left_behind(file)
    with pytest.raises(ValueError, match=r"have the 3 batches that are counted .* Got 1 batches"):
        recalibrate(network(nn), BATCHES[:1], resume=file)
    assert file.exists()


# --- the file itself


def test_it_is_written_every_few_seconds_and_in_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "sums"
    now = [0.0]
    monkeypatch.setattr(partial_sums.time, "monotonic", lambda: now[0])
    sizes: list[int] = []

    def later(done: int, total: int | None) -> None:
        now[0] += 2.0
        content = torch.load(file, weights_only=True) if file.exists() else {"passes": []}
        sizes.append(sum(each["batches"] for each in content["passes"]))
        assert len(list(tmp_path.iterdir())) <= 1  # no half file beside it

    recalibrate(network(nn), BATCHES, resume=file, progress=later)
    assert sizes == [0, 0, 0, 4, 4, 4]  # 5 seconds are over before the fourth, not again since


def test_a_disk_that_is_full_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "sums"
    _left_behind(file)
    content = file.read_bytes()

    def fails(content: Any, to: Any) -> None:
        to.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fails)
    model = network(nn)
    state = State(model)
    with pytest.raises(OSError, match="No space"):
        recalibrate(model, BATCHES, resume=file)
    state.assert_unchanged()
    assert file.read_bytes() == content
    assert list(tmp_path.iterdir()) == [file]


def test_identity_sees_every_bit_and_name() -> None:
    model = network(nn)
    identity = partial_sums.identity(model)
    assert identity == partial_sums.identity(network(nn))
    assert identity != partial_sums.identity(torch.nn.Sequential(model))
    with torch.no_grad():
        model[5].running_mean[3] = -0.0
    assert identity != partial_sums.identity(model)
