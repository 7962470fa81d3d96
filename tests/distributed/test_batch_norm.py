"""N processes equal one: `functional.batch_norm(group=…)` against the concatenated batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from normally import functional
from tests.distributed.launch import results
from tests.helpers import lay_out, values

#: Samples a process: of two, of four, with an empty process, with one that has a single sample.
CUTS = [(5, 3), (4, 0), (0, 4), (3, 0, 1, 6)]
CHANNELS = 6
SHAPE = (-1, CHANNELS, 3, 4)

#: What is normalized with, by name: the arguments of `Case`.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "channels_last": {"layout": "channels_last", "act": "relu"},
    "strided": {"layout": "strided", "act": "leaky_relu", "residual": True},
    "act": {"act": "silu"},
    "residual": {"act": "relu", "residual": True},
    "residual silu": {"act": "silu", "residual": True, "layout": "channels_last"},
    "mask": {"mask": True, "act": "gelu", "residual": True},
    "mask channels_last": {"mask": True, "layout": "channels_last"},
    "no parameters": {"affine": False},
    "correction": {"correction": 1, "unbiased": False},
    "average": {"momentum": None},
    "mean 1e6": {"offset": 1e6},
}


class Case:
    """One way of normalizing, and everybody's data for it."""

    def __init__(
        self,
        sizes: tuple[int, ...],
        dtype: torch.dtype,
        *,
        layout: str = "contiguous",
        act: str | None = None,
        residual: bool = False,
        mask: bool = False,
        affine: bool = True,
        correction: int = 0,
        unbiased: bool = True,
        momentum: float | None = 0.1,
        offset: float = 0.0,
    ) -> None:
        shape = (sum(sizes), *SHAPE[1:])
        self.sizes, self.layout = sizes, layout
        self.options = {
            "act": act, "correction": correction, "unbiased": unbiased,
        }  # fmt: skip
        self.momentum = momentum
        self.data = [
            (values(shape, torch.float64, seed=step) + offset).to(dtype) for step in (1, 2)
        ]
        self.gradients = [values(shape, dtype, seed=step) for step in (3, 4)]
        self.residual = values(shape, dtype, seed=5) if residual else None
        generator = torch.Generator().manual_seed(6)
        kept = torch.rand(shape[0], 1, *shape[2:], generator=generator) > 0.4
        self.mask = kept if mask else None
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        self.parameters = [
            torch.linspace(-1, 2, CHANNELS, dtype=wide) if affine else None,
            torch.linspace(0.5, -1, CHANNELS, dtype=wide) if affine else None,
        ]
        self.buffers = {
            "running_mean": torch.zeros(CHANNELS, dtype=wide),
            "running_var": torch.ones(CHANNELS, dtype=wide),
            "num_batches_tracked": torch.zeros((), dtype=torch.int64),
            "skipped_updates": torch.zeros(CHANNELS, dtype=torch.int64),
        }

    def run(self, rank: int | None, group: Any = None) -> dict[str, Tensor]:
        """Two steps on the samples of one process, or on all of them: all that comes out."""

        def own(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            x = x if rank is None else x.split(self.sizes)[rank]
            return lay_out(x, self.layout) if x.numel() and x.shape[1] > 1 else x.clone()

        def leaf(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.detach().clone(memory_format=torch.preserve_format)

        weight, bias = (None if p is None else p.clone().requires_grad_() for p in self.parameters)
        buffers = {name: b.clone() for name, b in self.buffers.items()}
        out: dict[str, Tensor] = {}
        for step, (data, gradient) in enumerate(zip(self.data, self.gradients, strict=True)):
            x, residual = own(data), own(self.residual)
            leaves = [None if t is None else t.detach().requires_grad_() for t in (x, residual)]
            y = functional.batch_norm(
                leaves[0], buffers["running_mean"], buffers["running_var"], weight, bias, True,
                self.momentum, residual=leaves[1], mask=own(self.mask),
                num_batches_tracked=buffers["num_batches_tracked"],
                skipped_updates=buffers["skipped_updates"], group=group, **self.options,
            )  # fmt: skip
            named = {"input": leaves[0], "residual": leaves[1], "weight": weight, "bias": bias}
            given = {name: t for name, t in named.items() if t is not None}
            found = torch.autograd.grad(y, list(given.values()), own(gradient))
            out[f"output {step}"] = y.detach()
            out.update({f"{name} {step}": g for name, g in zip(given, found, strict=True)})
        return {**out, **buffers}


def _run(rank: int, cases: list[tuple[str, tuple[int, ...], torch.dtype]]) -> list[Any]:
    return [
        Case(sizes, dtype, **CASES[name]).run(rank, dist.group.WORLD)
        for name, sizes, dtype in cases
    ]


def _tolerance(dtype: torch.dtype, expected: Tensor) -> dict[str, float]:
    """float64 by the promise; else the rounding of float32 sums, and one cast to a half."""
    if not expected.is_floating_point():
        return {"rtol": 0, "atol": 0}
    if dtype is torch.float64:
        return {"rtol": 1e-12, "atol": 1e-12}
    largest = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    return {"rtol": 2 * torch.finfo(expected.dtype).eps, "atol": 4e-6 * largest}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", CUTS, ids=str)
def test_processes_equal_one(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    names = [n for n in CASES if dtype is not torch.bfloat16 or n != "mean 1e6"]
    found = results(len(sizes), _run, [(name, sizes, dtype) for name in names])
    for index, name in enumerate(names):
        whole = Case(sizes, dtype, **CASES[name]).run(None)
        parts = [values[index] for values in found]
        for key, expected in whole.items():
            what = key.split()[0]
            pieces = [part[key] for part in parts]
            if what in ("output", "input", "residual"):
                actual = torch.cat(pieces)
            elif what in ("weight", "bias"):
                actual = torch.stack(pieces).sum(0)  # which is what DDP averages
            else:
                actual = pieces[0]
                for other in pieces[1:]:
                    assert torch.equal(other, actual), f"{name}: {key} differs between processes"
            if name == "mean 1e6":
                # The mean is exact to its last bit, 1.2e-10, of a std of 0.5: a sum over 100
                # values of g·x̂ moves by a hundred times that.
                tolerance = {"rtol": 1e-9, "atol": 4e-8}
                if dtype is torch.float32:
                    tolerance = {"rtol": 1e-5, "atol": 1e-4}
            else:
                tolerance = _tolerance(dtype, expected)
            torch.testing.assert_close(
                actual, expected, **tolerance, msg=lambda m, w=f"{name}: {key}": f"{w}: {m}"
            )


# --- what a concatenated batch cannot say


def _other_positions(rank: int) -> tuple[Tensor, ...]:
    sizes = [(2, 3, 4), (1, 7, 5)]
    n, h, w = sizes[rank]
    x = values((n, 3, h, w), torch.float64, seed=rank).requires_grad_()
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    y = functional.batch_norm(x, mean, var, training=True, group=dist.group.WORLD)
    (gradient,) = torch.autograd.grad(y.pow(3).sum(), x)
    rows = [t.detach().movedim(1, -1).reshape(-1, 3) for t in (x, y, gradient)]
    return (*rows, mean, var)


def test_other_spatial_sizes_on_every_process() -> None:
    found = results(2, _other_positions)
    x, y, gradient = (torch.cat([values[i] for values in found]) for i in range(3))
    x.requires_grad_()
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    whole = functional.batch_norm(x, mean, var, training=True)
    (expected,) = torch.autograd.grad(whole.pow(3).sum(), x)
    near = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(y, whole.detach(), **near)
    torch.testing.assert_close(gradient, expected, **near)
    for _, _, _, own_mean, own_var in found:
        torch.testing.assert_close(own_mean, mean, **near)
        torch.testing.assert_close(own_var, var, **near)


def _of_pairs(rank: int) -> Tensor:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    x = values((8, 3, 2), torch.float64).split(2)[rank]
    return functional.batch_norm(x, None, None, training=True, group=groups[rank // 2])


def test_groups_of_processes_keep_to_themselves() -> None:
    found = torch.cat(results(4, _of_pairs))
    halves = values((8, 3, 2), torch.float64).split(4)
    expected = torch.cat([functional.batch_norm(x, None, None, training=True) for x in halves])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def _in_evaluation(rank: int) -> Tensor:
    if rank == 1:
        return torch.empty(0)  # and does not miss it
    x = values((4, 3), torch.float64)
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    return functional.batch_norm(x, mean, var, group=dist.group.WORLD)


def test_evaluation_sends_nothing() -> None:
    found, _ = results(2, _in_evaluation, group_timeout=5.0)
    torch.testing.assert_close(found, values((4, 3), torch.float64) / (1 + 1e-5) ** 0.5)


# --- double backward


def _penalty(x: Tensor, weight: Tensor, bias: Tensor, group: Any) -> tuple[Tensor, ...]:
    """A gradient penalty's own gradients: of x, weight and bias."""
    y = functional.batch_norm(x, None, None, weight, bias, True, act="silu", group=group)
    given = torch.linspace(0.5, 1.5, 3, dtype=torch.float64).view(1, 3, 1)
    (gradient,) = torch.autograd.grad((y * y * given).sum(), x, create_graph=True)
    return torch.autograd.grad(gradient.pow(2).sum(), (x, weight, bias))


def _leaves() -> tuple[Tensor, Tensor, Tensor]:
    x = values((7, 3, 4), torch.float64)
    weight = torch.linspace(0.5, 2, 3, dtype=torch.float64).requires_grad_()
    bias = torch.linspace(-1, 1, 3, dtype=torch.float64).requires_grad_()
    return x, weight, bias


def _penalty_of(rank: int, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    x, weight, bias = _leaves()
    own = x.split(sizes)[rank].clone().requires_grad_()
    return _penalty(own, weight, bias, dist.group.WORLD)


@pytest.mark.parametrize("sizes", [(4, 3), (7, 0), (2, 1, 4)], ids=str)
def test_double_backward(sizes: tuple[int, ...]) -> None:
    """Everybody's penalty moves everybody's gradients, the statistics' part included."""
    found = results(len(sizes), _penalty_of, sizes)
    x, weight, bias = _leaves()
    expected = _penalty(x.requires_grad_(), weight, bias, None)
    near = {"rtol": 1e-11, "atol": 1e-11}  # two derivatives of values of a few hundred
    torch.testing.assert_close(torch.cat([f[0] for f in found]), expected[0], **near)
    for index in (1, 2):
        total = torch.stack([f[index] for f in found]).sum(0)
        torch.testing.assert_close(total, expected[index], **near)


# --- one value


def _single(rank: int, counts: tuple[int, ...], choice: str) -> Any:
    x = torch.full((counts[rank], 2), 3.0, dtype=torch.float64)
    mean, var = torch.ones(2, dtype=torch.float64), torch.full((2,), 4.0, dtype=torch.float64)
    try:
        y = functional.batch_norm(
            x, mean, var, training=True, on_single_value=choice, group=dist.group.WORLD
        )
    except ValueError as error:
        return str(error)
    return y, mean


def test_one_value_in_all_processes() -> None:
    for said in results(2, _single, (1, 0), "error"):
        assert "Expected more than 1 value per channel when training" in said
        assert "1 per channel in all processes of the group together" in said
    for y, mean in results(2, _single, (1, 0), "running"):
        assert torch.equal(mean, torch.ones(2, dtype=torch.float64))
        torch.testing.assert_close(y, torch.full_like(y, 2 / (4 + 1e-5) ** 0.5))


def test_one_value_in_each_process_is_enough() -> None:
    for y, _ in results(2, _single, (1, 1), "error"):
        assert torch.equal(y, torch.zeros_like(y))


# --- one graph


def _compiled(rank: int, backend: str) -> list[tuple[Tensor, Tensor]]:
    def step(x: Tensor, mean: Tensor, var: Tensor, count: Tensor, weight: Tensor) -> Tensor:
        return functional.batch_norm(
            x.sin(), mean, var, weight, None, True, None, act="silu", group=dist.group.WORLD,
            num_batches_tracked=count,
        ).cos()  # fmt: skip

    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend=backend)):
        x = values((3 - rank, 2, 5), torch.float64, seed=rank).requires_grad_()
        weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
        buffers = (
            torch.zeros(2, dtype=torch.float64),
            torch.ones(2, dtype=torch.float64),
            torch.zeros((), dtype=torch.int64),
        )
        y = function(x, *buffers, weight)
        gradients = torch.autograd.grad(y.sum(), (x, weight))
        found.append((y.detach(), *gradients, *buffers))
    return list(zip(*found, strict=True))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_break(backend: str) -> None:
    for pairs in results(2, _compiled, backend, timeout=600.0, group_timeout=300.0):
        for eager, compiled in pairs:
            torch.testing.assert_close(compiled, eager, rtol=1e-14, atol=1e-14)


def _norm_after_norm(rank: int) -> list[list[Tensor]]:
    found = []
    for memory_efficient in (False, True):
        x = values((3 + rank, 4, 5), torch.float32, seed=rank).requires_grad_()
        shared = {"training": True, "group": dist.group.WORLD, "memory_efficient": memory_efficient}
        weight = torch.linspace(-1, 2, 4).requires_grad_()
        first = functional.batch_norm(x, None, None, weight, act="silu", correction=1, **shared)
        y = functional.batch_norm(first.sin(), None, None, residual=first, act="relu", **shared)
        replaced = y.grad_fn.next_functions[0][0]._raw_saved_self.unpack_hook is not None
        assert replaced == memory_efficient
        found.append([y.detach(), *torch.autograd.grad(y.pow(3).sum(), (x, weight))])
    return found


def test_memory_efficient_exchanges_nothing_again() -> None:
    for plain, efficient in results(2, _norm_after_norm):
        for one, other in zip(plain, efficient, strict=True):
            assert torch.equal(other, one)
