"""recalibrate under torch.distributed: the data of all processes is one population."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from normally import adapt, nn, recalibrate
from tests.distributed.launch import results, run
from tests.helpers import assert_same_bits
from tests.surgery.populations import State, images, network

pytestmark = pytest.mark.usefixtures("one_thread")

#: The sizes of the batches of each process: uneven, several, and none.
CUTS: list[list[list[int]]] = [
    [[7, 7, 7], [19]],
    [[], [20, 20]],
    [[11, 9], [5, 5, 9], [1]],
]
FAMILIES = {
    "torch": torch.nn,
    "ours": nn,
    "sync": nn.SyncBatchNorm,
    "torch sync": torch.nn.SyncBatchNorm,
}


class _Family:
    """Layers of one class, whatever the dimensions."""

    def __init__(self, layer: Any) -> None:
        self.BatchNorm1d = self.BatchNorm2d = layer


def _network(family: str) -> torch.nn.Sequential:
    found = FAMILIES[family]
    return network(found if hasattr(found, "BatchNorm2d") else _Family(found), torch.float64)


def _share(rank: int, cuts: list[list[int]]) -> list[Tensor]:
    start = sum(map(sum, cuts[:rank]))
    x = images(sum(map(sum, cuts)), torch.float64)[start : start + sum(cuts[rank])]
    return list(x.split(cuts[rank])) if cuts[rank] else []


def _recalibrated(
    rank: int, family: str, cuts: list[list[int]], wraps: bool
) -> list[tuple[dict[str, Tensor], str]]:
    """In one pass and layer by layer."""
    found = []
    for layerwise in (False, True):
        model = _network(family)
        target: Any = torch.nn.parallel.DistributedDataParallel(model) if wraps else model
        state, data = State(model), _share(rank, cuts)
        _, report = recalibrate(target, data, layerwise=layerwise, return_report=True)
        state.assert_unchanged(but=("running_mean", "running_var", "num_batches_tracked"))
        if wraps:
            assert target.require_forward_param_sync
            assert target.require_backward_grad_sync
        found.append((model.state_dict(), str(report)))
    return found


def _all(cuts: list[list[int]]) -> list[Tensor]:
    return [batch for rank in range(len(cuts)) for batch in _share(rank, cuts)]


@pytest.mark.parametrize("family", FAMILIES)
def test_several_processes_equal_one(family: str) -> None:
    """The same batches in one process: wrapped or not, synchronized or not, with data or not."""
    cuts = CUTS[0 if family.startswith("torch") else 1]
    wraps = family == "sync"
    found = results(2, _recalibrated, family, cuts, wraps)
    for mode, layerwise in enumerate((False, True)):
        expected = _network("torch")
        _, report = recalibrate(expected, _all(cuts), layerwise=layerwise, return_report=True)
        for state, said in (each[mode] for each in found):
            for name, value in expected.state_dict().items():
                assert_same_bits(state[name], found[0][mode][0][name], name)
                # float64, merged in another order; behind a layer relative to what that left.
                torch.testing.assert_close(state[name], value, rtol=1e-11, atol=1e-11)
            # "→ 640 values a channel in 2 batches; means moved by up to 0.1 σ …"
            numbers = [re.findall(r"→ (.*)", text) for text in (said, str(report))]
            assert numbers[0] == numbers[1]
            assert len(numbers[0]) == 3


def test_three_processes_one_of_a_single_sample() -> None:
    cuts = CUTS[2]
    found = results(3, _recalibrated, "ours", cuts, False)
    expected = _network("torch")
    recalibrate(expected, _all(cuts), layerwise=True)
    for _, (state, _) in found:
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-11, atol=1e-11)


def _in_groups(rank: int) -> Tensor:
    groups = [dist.new_group([0]), dist.new_group([1, 2])]
    layer = nn.BatchNorm2d(3)
    recalibrate(layer, [images()[rank::3]], group=groups[min(rank, 1)])
    assert layer.running_mean is not None
    return layer.running_mean


def test_a_group_of_some() -> None:
    means = results(3, _in_groups)
    for mean, x in zip(means, (images()[0::3], *[torch.cat((images()[1::3], images()[2::3]))] * 2),
                       strict=True):  # fmt: skip
        torch.testing.assert_close(mean, x.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)


def _without_data(rank: int) -> str:
    model = network(nn)
    state = State(model)
    try:
        recalibrate(model, [], layerwise=rank < 0)
    except ValueError as error:
        state.assert_unchanged()
        return str(error)
    return ""


def test_no_data_in_any_process() -> None:
    assert (
        results(2, _without_data)
        == ["recalibrate: data must have at least one batch. Got none."] * 2
    )


def _fails_alone(rank: int, layerwise: bool) -> bool:
    model = network(nn)
    state = State(model)
    batches: Any = [images()] if rank == 0 else [images(), "no tensor"]
    try:
        recalibrate(model, batches, layerwise=layerwise)
    finally:
        state.assert_unchanged()
    return True


@pytest.mark.parametrize("layerwise", [False, True])
def test_one_that_fails_is_noticed_by_the_others(layerwise: bool) -> None:
    """Within the group's timeout, and no model is changed."""
    outcomes = run(2, _fails_alone, layerwise, group_timeout=3.0)
    assert not any(o.hung for o in outcomes)
    assert "TypeError" in str(outcomes[1].error)
    assert "could not exchange" in str(outcomes[0].error)
    assert "recalibrate of" in str(outcomes[0].error)
    assert not any("AssertionError" in str(o.error) for o in outcomes)


def _others(rank: int) -> bool:
    model = network(nn)
    state = State(model)
    try:
        recalibrate(model, [images()], skip="1" if rank else "8")
    finally:
        state.assert_unchanged()
    return True


def test_processes_that_measure_other_layers() -> None:
    outcomes = run(2, _others, group_timeout=10.0)
    for outcome in outcomes:
        assert "ValueError" in str(outcome.error)
        assert "rank 1: recalibrate of" in str(outcome.error)


def _interrupted(
    rank: int, folder: str, layerwise: bool
) -> tuple[dict[str, Tensor], int, list[str]]:
    def stop(done: int, total: int | None) -> None:
        if done == (2 if rank == 0 else 3):
            raise KeyboardInterrupt

    cuts, file = CUTS[0], f"{folder}/sums"
    with suppress(KeyboardInterrupt, RuntimeError):  # rank 1 waits for rank 0 at its end
        recalibrate(
            _network("ours"), _share(rank, cuts), layerwise=layerwise, resume=file, progress=stop
        )
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    left = sorted(p.name for p in Path(folder).glob("sums*"))
    model, told = _network("ours"), []
    dist.barrier()
    recalibrate(
        model, _share(rank, cuts), layerwise=layerwise, resume=file,
        progress=lambda done, total: told.append(done),
    )  # fmt: skip
    dist.barrier()
    assert not list(Path(folder).glob("sums*"))
    return model.state_dict(), len(told), left


@pytest.mark.parametrize("layerwise", [False, True])
def test_each_process_has_a_file_of_its_own(tmp_path: Path, layerwise: bool) -> None:
    expected = _network("torch")
    recalibrate(expected, _all(CUTS[0]), layerwise=layerwise)
    found = results(2, _interrupted, str(tmp_path), layerwise, group_timeout=3.0)
    passes = 3 if layerwise else 1
    for rank, (state, told, left) in enumerate(found):
        assert left == ["sums.rank0", "sums.rank1"]
        # Rank 0 was stopped after 2 of its 3 batches, rank 1 waited behind its only one.
        assert told == passes * len(CUTS[0][rank]) - (2, 1)[rank]
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-11, atol=1e-11)


def _adapted(rank: int) -> tuple[dict[str, Tensor], str]:
    model = _network("sync")
    adapt(model, _share(rank, CUTS[0]), method="mix", prior=0.25)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.restore()  # type: ignore[operator]
    try:
        adapt(model, _share(rank, CUTS[0]), method="tent")
    except NotImplementedError as error:
        return state, str(error)
    return state, ""


def test_adapt_in_several_processes() -> None:
    expected = _network("torch")
    adapt(expected, _all(CUTS[0]), method="mix", prior=0.25)
    for state, refused in results(2, _adapted):
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-11, atol=1e-11)
        assert "method='tent' is of one process" in refused
