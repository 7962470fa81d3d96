"""The yardstick copies, and its rings are larger than any cache."""

from __future__ import annotations

import pytest
import torch

from normally import environment
from normally.bench.yardstick import ColdCopy


@pytest.mark.parametrize(("cache", "piece"), [(1 << 20, 1 << 18), (3 << 18, 1 << 18), (1, 1 << 12)])
def test_each_ring_exceeds_four_caches(cache, piece):
    assert ColdCopy(cache, piece).ring_bytes >= 4 * cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_piece_has_its_turn(dtype):
    copy = ColdCopy(1 << 16, 1 << 14)
    for index, source in enumerate(copy._sources):
        source.fill_(index + 2)
    speeds = copy.measure(dtype, len(copy._sources))
    assert len(speeds) == len(copy._sources)
    assert all(speed > 0 for speed in speeds)
    for source, target in zip(copy._sources, copy._targets, strict=True):
        assert torch.equal(source, target)


def test_the_caches_of_a_described_machine(tmp_path):
    sizes = {("1", "Data"): "48K", ("1", "Instruction"): "32K", ("3", "Unified"): "32M"}
    for core in range(4):
        for index, ((level, kind), size) in enumerate(sizes.items()):
            folder = tmp_path / f"cpu{core}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            shared = f"{core // 2 * 2}-{core // 2 * 2 + 1}" if level == "3" else str(core)
            for name, text in (
                ("level", level), ("type", kind), ("size", size), ("shared_cpu_list", shared),
            ):  # fmt: skip
                (folder / name).write_text(text + "\n")
    assert environment.caches(tmp_path) == [
        environment.Cache("L1", 48 << 10, 4 * 48 << 10),
        environment.Cache("L3", 32 << 20, 2 * 32 << 20),
    ]


def test_a_machine_that_does_not_tell_its_caches(tmp_path):
    assert environment.caches(tmp_path) == []


def test_this_machine_is_described():
    facts = environment.describe()
    assert facts["cpu"]
    assert facts["torch"] == str(torch.__version__)
    assert environment.last_level_cache().bytes > 0
