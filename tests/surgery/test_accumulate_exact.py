"""accumulate(exact=True): micro-batches in step are the large batch."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from normally import nn
from normally.surgery import accumulate
from tests.distributed.launch import results
from tests.helpers import assert_same_bits, cpu_only, values

SIZES = [5, 3, 1, 3]


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """These networks are so small that waking other threads would be all the time they take."""
    torch.set_num_threads(1)


class Block(torch.nn.Module):
    """A residual block, changed in place where torchvision's is."""

    def __init__(self, family: Any, channels: int) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = family.BatchNorm2d(channels)
        self.relu = torch.nn.ReLU(inplace=True)
        self.conv2 = torch.nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = family.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        out: Tensor = self.relu(y)
        return out


def network(family: Any = nn) -> torch.nn.Sequential:
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3), family.BatchNorm2d(4), torch.nn.ReLU(inplace=True),
        Block(family, 4), Block(family, 4), torch.nn.Flatten(),
        torch.nn.Linear(64, 5), family.BatchNorm1d(5),
    ).double()  # fmt: skip


def batch(seed: int, size: int = 12) -> tuple[Tensor, Tensor]:
    return values((size, 2, 6, 6), torch.float64, seed), values((size, 5), torch.float64, -seed)


def loss_of(outputs: list[Tensor], targets: Tensor) -> Tensor:
    """The mean squared error of all samples of the step."""
    split = targets.split([len(y) for y in outputs])
    errors = [(y - t).square().sum() for y, t in zip(outputs, split, strict=True)]
    return torch.stack(errors).sum() / len(targets)


def assert_same_state(a: torch.nn.Module, b: torch.nn.Module, tolerance: float) -> None:
    for name, value in b.state_dict().items():
        torch.testing.assert_close(
            a.state_dict()[name], value, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("family", [nn, torch.nn], ids=["ours", "torch"])
def test_one_step_has_the_gradients_of_the_large_batch(family: Any) -> None:
    model = network(family)
    large = copy.deepcopy(model)
    x, target = batch(1)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    with accumulate(model, 4, exact=True) as step:
        outputs = step(list(a.split(SIZES)))
    loss_of(outputs, target).backward()
    expected = large(b)
    loss_of([expected], target).backward()
    # float64; sums of 12·16 terms of size 1, in another order.
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(torch.cat(outputs), expected, **close)
    torch.testing.assert_close(a.grad, b.grad, **close)
    for p, q in zip(model.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **close)
    assert_same_state(model, large, 1e-12)


@pytest.mark.parametrize("family", [nn, torch.nn], ids=["ours", "torch"])
def test_the_weights_after_50_steps_are_those_of_the_large_batch(family: Any) -> None:
    model = network(family)
    large = copy.deepcopy(model)
    ours = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    theirs = torch.optim.SGD(large.parameters(), lr=0.05, momentum=0.9)
    plain = copy.deepcopy(model)  # what is compared can differ: plain accumulation
    others = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    with accumulate(model, 4, exact=True) as step, accumulate(plain, 4):
        for seed in range(50):
            x, target = batch(seed)
            ours.zero_grad()
            loss_of(step(list(x.split(SIZES))), target).backward()
            ours.step()
            theirs.zero_grad()
            loss_of([large(x)], target).backward()
            theirs.step()
            others.zero_grad()
            # No size of 1, which plain batch norm refuses after the linear layer.
            loss_of([plain(part) for part in x.split([4, 3, 3, 2])], target).backward()
            others.step()
    # Roundings of 1e-16 that 50 steps with momentum carry on.
    assert_same_state(model, large, 1e-10)
    with pytest.raises(AssertionError):
        assert_same_state(plain, large, 1e-3)


def test_one_layer_is_the_large_batch_bit_for_bit() -> None:
    """Where only batch norm happens, it is called with the same tensor."""
    layer = nn.BatchNorm2d(2, act="silu")
    large = copy.deepcopy(layer)
    x = batch(1)[0].float()
    with accumulate(layer, 4, exact=True) as step:
        outputs = step(list(x.split(SIZES)))
    assert_same_bits(torch.cat(outputs), large(x))
    assert_same_bits(layer.running_var, large.running_var)
    assert layer.num_batches_tracked.item() == 1


def test_channels_last_stays() -> None:
    layer = nn.BatchNorm2d(2)
    x = batch(1)[0].float().contiguous(memory_format=torch.channels_last)
    with accumulate(layer, 4, exact=True) as step:
        for y in step(list(x.split(SIZES))):
            assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["images", "sequences", "channels last", "3d"])
def test_other_sizes_in_each_micro_batch(kind: str) -> None:
    """No large batch can be made of these: the reference is one of all positions in a row."""
    channel_dim = -1 if kind == "channels last" else 1
    shapes = {
        "images": [(2, 3, 4, 5), (1, 3, 2, 7), (3, 3, 1, 1)],
        "sequences": [(2, 3, 4), (3, 3, 1), (1, 3, 9)],
        "channels last": [(2, 4, 3), (3, 1, 3), (1, 9, 3)],
        "3d": [(1, 3, 2, 2, 2), (2, 3, 1, 3, 2)],
    }[kind]
    if kind == "images":
        layer: Any = nn.BatchNorm2d(3, act="relu", dtype=torch.float64)
    elif kind == "3d":
        layer = torch.nn.BatchNorm3d(3, dtype=torch.float64)
    else:
        layer = nn.BatchNorm1d(3, channel_dim=channel_dim, dtype=torch.float64)
    flat = nn.BatchNorm1d(3, act=getattr(layer, "act", None), dtype=torch.float64)
    parts = [
        (values((1, 3, 60), torch.float64, i).flatten()[: torch.Size(s).numel()]).view(s)
        for i, s in enumerate(shapes)
    ]
    leaves = [p.clone().requires_grad_() for p in parts]
    with accumulate(layer, 3, exact=True) as step:
        outputs = step(leaves)
    rows = [p.clone().requires_grad_() for p in parts]
    together = torch.cat([r.movedim(channel_dim, -1).reshape(-1, 3) for r in rows])
    expected = flat(together)
    expected.square().sum().backward()
    torch.stack([y.square().sum() for y in outputs]).sum().backward()
    found = torch.cat([y.movedim(channel_dim, -1).reshape(-1, 3) for y in outputs])
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(found, expected, **close)
    for leaf, row, y in zip(leaves, rows, outputs, strict=True):
        assert y.shape == leaf.shape
        torch.testing.assert_close(leaf.grad, row.grad, **close)
    torch.testing.assert_close(layer.running_var, flat.running_var, **close)


@pytest.mark.parametrize("uneven", [False, True])
def test_masks_lengths_and_residuals(uneven: bool) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3, act="relu", dtype=torch.float64)

        def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
            y: Tensor = self.norm(x, x[:1], lengths=lengths)
            return y

    model = Model()
    large = copy.deepcopy(model.norm)
    x = values((6, 3, 5), torch.float64)
    lengths = torch.tensor([5, 1, 2, 3, 3, 2])
    parts: list[Any] = [(x[:2], lengths[:2]), {"x": x[2:5], "lengths": lengths[2:5]}, x[5:]]
    if uneven:  # what is cut off is masked in the large batch
        parts[1]["x"] = x[2:5, :, :3]
    mask = torch.arange(5) < torch.tensor([5, 1, 2, 3, 3, 5])[:, None]
    residual = torch.cat([x[:1].expand(2, 3, 5), x[2:3].expand(3, 3, 5), x[5:]])
    with accumulate(model, 3, exact=True) as step:
        outputs = step(parts)
    expected = large(x, residual, mask)
    torch.testing.assert_close(outputs[0], expected[:2], rtol=0, atol=1e-12)
    torch.testing.assert_close(outputs[1], expected[2:5, :, : 3 if uneven else 5])
    torch.testing.assert_close(outputs[2], expected[5:], rtol=0, atol=1e-12)
    torch.testing.assert_close(model.norm.running_var, large.running_var, rtol=0, atol=1e-12)


def test_a_gradient_penalty() -> None:
    """The large batch's second derivatives, too."""
    model = network()
    large = copy.deepcopy(model)
    x, _ = batch(1)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    with accumulate(model, 4, exact=True) as step:
        found = torch.cat(step(list(a.split(SIZES))))
    for y, leaf in ((found, a), (large(b), b)):
        (gradient,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        gradient.square().sum().backward()
    for p, q in zip(model.parameters(), large.parameters(), strict=True):
        scale = q.grad.abs().max().clamp(min=1)
        torch.testing.assert_close(p.grad / scale, q.grad / scale, rtol=0, atol=1e-12)


def test_frozen_layers_and_evaluation() -> None:
    model = network()
    model[1].eval()
    large = copy.deepcopy(model)
    x, _ = batch(1)
    with accumulate(model, 4, exact=True) as step:
        outputs = step(list(x.split(SIZES)))
        torch.testing.assert_close(torch.cat(outputs), large(x), rtol=0, atol=1e-12)
        model.eval()
        large.eval()
        torch.testing.assert_close(model(x), large(x), rtol=0, atol=1e-12)
        outputs = step(list(x.split(SIZES)))
        torch.testing.assert_close(torch.cat(outputs), large(x), rtol=0, atol=1e-12)


def test_layers_without_running_statistics_share_the_batch_in_evaluation_too() -> None:
    layer = nn.BatchNorm2d(2, track_running_stats=False).eval()
    x = batch(1)[0].float()
    with accumulate(layer, 4, exact=True) as step:
        assert_same_bits(torch.cat(step(list(x.split(SIZES)))), layer(x))


class _Scaled(torch.nn.BatchNorm2d):
    """A forward of its own, which exact=True runs as it is."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu() * 2


def test_subclasses_with_their_own_forward_and_lazy_layers() -> None:
    model = torch.nn.Sequential(_Scaled(2), nn.LazyBatchNorm2d(act="relu"), _Scaled(2)).double()
    x, _ = batch(1)
    with accumulate(model, 4, exact=True) as step:
        outputs = step(list(x.split(SIZES)))
    large = torch.nn.Sequential(_Scaled(2), nn.BatchNorm2d(2, act="relu"), _Scaled(2)).double()
    torch.testing.assert_close(torch.cat(outputs), large(x), rtol=0, atol=1e-12)
    assert_same_state(model, large, 1e-12)


# --- memory


def kept_bytes(forward: Callable[[], Any]) -> int:
    """What the graph of a forward holds: all memory that is saved for its backward, once."""
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        held.append(t)  # so that no address is used twice
        return t

    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = forward()
    del outputs
    return sum(saved.values())


def test_the_graph_is_as_large_as_that_of_the_large_batch() -> None:
    model = network()
    x, _ = batch(1, size=64)

    def exact() -> list[Tensor]:
        with accumulate(model, 8, exact=True) as step:
            return step(list(x.chunk(8)))

    found, large = kept_bytes(exact), kept_bytes(lambda: model(x))
    small = kept_bytes(lambda: model(x[:8].clone()))
    assert large > 5 * small
    # The input of a norm is a copy, but what it is a copy of is not kept; nor are parameters more.
    assert 0.95 * large < found < 1.05 * large


def test_nothing_is_left_of_a_call_that_failed() -> None:
    """Not even in a cycle, which the collector would have to find."""
    model = _Branch()
    inside: list[weakref.ref[Tensor]] = []

    def way(x: Tensor) -> Tensor:
        y = x * 2
        inside.append(weakref.ref(y))
        if len(inside) == 3:
            raise KeyError("here")
        z: Tensor = model.large(y)
        return z

    model.way = way
    gc.disable()
    try:
        with accumulate(model, 3, exact=True) as step:
            try:
                step(sizes(4, 2, 5))
            except KeyError:
                pass
            else:
                pytest.fail("it did not raise")
        assert [ref() for ref in inside] == [None] * 3
    finally:
        gc.enable()


# --- what torch keeps for each thread


def test_the_callers_settings_hold_in_every_micro_batch() -> None:
    seen: list[Any] = []

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            seen.append((
                torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"),
                torch.get_autocast_dtype("cpu"), torch.is_inference_mode_enabled(),
                torch.empty(0).device.type,
            ))  # fmt: skip
            y: Tensor = self.norm(x)
            return y

    xs = [torch.randn(4, 3) for _ in range(2)]
    with accumulate(Model(), 2, exact=True) as step:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            outputs = step(xs)
        assert not any(y.requires_grad for y in outputs)
        with torch.device("meta"):
            step(xs)
        assert all(y.requires_grad for y in step(xs))
    assert seen[:2] == [(False, True, torch.bfloat16, False, "cpu")] * 2
    assert seen[2:4] == [(True, False, torch.bfloat16, False, "meta")] * 2
    assert seen[4:] == [(True, False, torch.bfloat16, False, "cpu")] * 2


def test_hooks_of_saved_tensors_see_all_of_them() -> None:
    model = network()
    x, _ = batch(1)
    packed: list[int] = []
    unpacked: list[int] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t.numel())
        return t.clone()

    def unpack(t: Tensor) -> Tensor:
        unpacked.append(t.numel())
        return t

    with accumulate(model, 4, exact=True) as step:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            outputs = step(list(x.split(SIZES)))
        torch.stack([y.square().sum() for y in outputs]).sum().backward()
    # 6 convolutions and linear layers a micro-batch, 6 norms together, and the relus.
    assert len(packed) >= 4 * 6 + 6
    assert sorted(packed) == sorted(unpacked)


def test_the_order_is_that_of_the_micro_batches() -> None:
    """One at a time: random draws, and whatever else has an order, are the same in every run."""
    model = torch.nn.Sequential(
        torch.nn.Dropout(0.5), nn.BatchNorm2d(2), torch.nn.Dropout(0.5), nn.BatchNorm2d(2)
    ).double()
    x, _ = batch(1)

    def run() -> Tensor:
        torch.manual_seed(3)
        with accumulate(model, 4, exact=True) as step:
            return torch.cat(step(list(x.split(SIZES))))

    first = run()
    assert_same_bits(run(), first)
    # And it is: the first dropout of all, then the second of all.
    torch.manual_seed(3)
    h = [model[0](part) for part in x.split(SIZES)]
    h = list(model[1](torch.cat(h)).split(SIZES))
    h = [model[2](part) for part in h]
    assert_same_bits(model[3](torch.cat(h)), first)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_across_the_micro_batches(reentrant: bool) -> None:
    model = network()
    large = copy.deepcopy(model)
    x, target = batch(1)
    saved: list[int] = []

    def count(t: Tensor) -> Tensor:
        saved.append(t.numel())
        return t

    with accumulate(model, 4, exact=True) as step:
        hidden = tuple(part.clone().requires_grad_() for part in x.split(SIZES))
        for block in (model[:3], model[3], model[4], model[5:]):
            hidden = checkpoint(
                lambda *h, block=block: tuple(step(h, block)), *hidden, use_reentrant=reentrant
            )
    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        loss = loss_of(list(hidden), target)
    loss.backward()  # after the context, as the recomputation then is
    loss_of([large(x)], target).backward()
    for p, q in zip(model.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-12)
    assert_same_state(model, large, 1e-12)
    assert model[1].num_batches_tracked.item() == 1


# --- errors


class _Branch(torch.nn.Module):
    """Takes another way for small batches."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.end = nn.BatchNorm1d(3)
        self.unwound: list[int] = []
        self.way: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        try:
            y = (self.large if len(x) > 3 else self.small)(x) if self.way is None else self.way(x)
            z: Tensor = self.end(y)
            return z
        finally:
            self.unwound.append(len(x))


def check_clean(model: _Branch, before: int) -> None:
    assert sorted(model.unwound) == [2, 4, 5]
    assert threading.active_count() == before
    for layer in (model.small, model.large, model.end):
        assert "forward" not in layer.__dict__
        assert layer.num_batches_tracked.item() == 0


def sizes(*numbers: int) -> list[Tensor]:
    return [torch.randn(n, 3) for n in numbers]


def test_micro_batches_that_go_apart() -> None:
    model, before = _Branch(), threading.active_count()
    with (
        accumulate(model, 3, exact=True) as step,
        pytest.raises(
            RuntimeError,
            match=r"0 is at large \(BatchNorm1d\); micro-batch 1 is at small \(BatchNorm1d\); "
            r"micro-batch 2 is at large \(BatchNorm1d\)\.",
        ),
    ):
        step(sizes(4, 2, 5))
    check_clean(model, before)


def test_a_micro_batch_that_ends_early() -> None:
    model, before = _Branch(), threading.active_count()
    model.way = lambda x: x
    leave = torch.nn.Module()
    leave.forward = lambda x: model(x) if len(x) > 2 else model.unwound.append(2)  # type: ignore[method-assign]
    with (
        accumulate(model, 3, exact=True) as step,
        pytest.raises(RuntimeError, match=r"0 is at end \(BatchNorm1d\); micro-batch 1 is done;"),
    ):
        step(sizes(4, 2, 5), leave)
    check_clean(model, before)


def test_a_micro_batch_without_gradients_where_others_have_them() -> None:
    model = _Branch()

    def way(x: Tensor) -> Tensor:
        with torch.set_grad_enabled(len(x) > 2):
            y: Tensor = model.large(x)
        return y

    model.way = way
    with (
        accumulate(model, 3, exact=True) as step,
        pytest.raises(RuntimeError, match=r"1 is at large \(BatchNorm1d\) without gradients"),
    ):
        step(sizes(4, 2, 5))


def test_an_exception_of_one_micro_batch_is_the_callers() -> None:
    model, before = _Branch(), threading.active_count()

    def way(x: Tensor) -> Tensor:
        if len(x) == 2:
            raise KeyError("here")
        return x

    model.way = way
    with accumulate(model, 3, exact=True) as step, pytest.raises(KeyError, match="here"):
        step(sizes(4, 2, 5))
    assert sorted(model.unwound) == [2, 4]  # the third had not begun
    assert threading.active_count() == before
    assert "forward" not in model.end.__dict__


def test_an_error_of_a_layer_names_its_path() -> None:
    model = torch.nn.Sequential(torch.nn.Identity(), nn.BatchNorm1d(3))
    with accumulate(model, 2, exact=True) as step:
        with pytest.raises(
            ValueError, match=r"got 4D input.*\[in BatchNorm1d at 1 of Sequential\]"
        ):
            step([torch.randn(2, 3, 4, 4)] * 2)
        with pytest.raises(ValueError, match=r"inputs of 1 \(BatchNorm1d\) must have the same"):
            step([torch.randn(2, 3), torch.randn(2, 4)])
        with pytest.raises(ValueError, match=r"must have the same.*torch.float64 on"):
            step([torch.randn(2, 3), torch.randn(2, 3).double()])
        with pytest.raises(ValueError, match=r"more than 1 value per channel"):
            step([torch.randn(1, 3)])
        step([torch.randn(1, 3)] * 2)  # together they are two
    assert model[1].num_batches_tracked.item() == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_of_one_micro_batch_is_refused(reentrant: bool) -> None:
    model = _Branch()

    def way(x: Tensor) -> Tensor:
        y: Tensor = checkpoint(model.large, x.requires_grad_(), use_reentrant=reentrant)
        return y

    model.way = way
    with (
        accumulate(model, 3, exact=True) as step,
        pytest.raises(RuntimeError, match="activation checkpoint of one micro-batch"),
    ):
        step(sizes(4, 2, 5))


def test_a_call_of_the_model_by_itself_is_refused() -> None:
    model = torch.nn.Sequential(nn.BatchNorm1d(3))
    x = torch.randn(4, 3)
    with accumulate(model, 2, exact=True):
        with pytest.raises(RuntimeError, match=r"0 \(BatchNorm1d\) must be run by step"):
            model(x)
        assert model[0].num_batches_tracked.item() == 0
        model.eval()(x)
    model.train()(x)


def test_a_thread_of_the_models_own_is_refused() -> None:
    model = _Branch()

    def way(x: Tensor) -> Tensor:
        errors: list[str] = []

        def call() -> None:
            try:
                model.large(x)
            except RuntimeError as error:
                errors.append(str(error))

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        raise KeyError(errors[0])

    model.way = way
    with accumulate(model, 3, exact=True) as step, pytest.raises(KeyError, match="must be run by"):
        step(sizes(4, 2, 5))


def test_arguments() -> None:
    layer = nn.BatchNorm1d(3)
    step = accumulate(layer, 2, exact=True)
    x = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="inside of its context"):
        step([x])
    with step:
        with pytest.raises(TypeError, match=r"must be a list.*Got Tensor; .*\.chunk\(steps\)"):
            step(x)  # type: ignore[arg-type]
        for wrong in ([], [x, x, x]):
            with pytest.raises(ValueError, match=rf"1 to steps=2 of them. Got {len(wrong)}"):
                step(wrong)
        assert len(step([x])) == 1  # a partial step
        with pytest.raises(RuntimeError, match="cannot run micro-batches itself"):
            step([x], lambda x: step([x]))
    with pytest.raises(TypeError, match="fully_shard gathers"):
        accumulate(type("FSDPIdentity", (_FSDPModule, torch.nn.Identity), {})(), 2, exact=True)


#: What fully_shard mixes into the classes of modules, here without processes.
_FSDPModule = type("FSDPModule", (), {})


def test_calls_that_cannot_be_joined() -> None:
    model = _Branch()
    with accumulate(model, 2, exact=True) as step:
        model.way = lambda x: model.large(x, x if len(x) > 2 else None)
        with pytest.raises(
            ValueError, match=r"large \(BatchNorm1d\) must have a residual, or none"
        ):
            step(sizes(4, 2))
    theirs = torch.nn.BatchNorm1d(3)
    with (
        accumulate(theirs, 2, exact=True) as step,
        pytest.raises(TypeError, match="be called with"),
    ):
        step([{"input": sizes(4)[0], "other": 1}])


# --- several processes


def _small(norm: Callable[..., torch.nn.Module]) -> torch.nn.Sequential:
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Conv1d(3, 4, 3, padding=1), norm(4), torch.nn.ReLU(inplace=True),
        torch.nn.Conv1d(4, 2, 1), norm(2),
    ).double()  # fmt: skip


def _train(rank: int, parts: list[list[int]], ddp: bool) -> dict[str, Tensor]:
    """Two steps of a network with SyncBatchNorm, of micro-batches of `parts[rank]` each."""
    model = _small(nn.SyncBatchNorm)
    called: torch.nn.Module = DistributedDataParallel(model) if ddp else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ends = torch.tensor(parts).flatten().cumsum(0).view(len(parts), -1)
    total = int(ends[-1, -1])
    for seed in range(2):
        x = values((total, 3, 4), torch.float64, seed=seed)
        own = [x[end - size : end] for end, size in zip(ends[rank], parts[rank], strict=True)]
        optimizer.zero_grad()
        with accumulate(called, len(own), exact=True) as step:
            outputs = step(own)
        # DistributedDataParallel divides by the number of processes.
        loss = torch.stack([y.square().sum() for y in outputs]).sum() / total
        (loss * len(parts) if ddp else loss).backward()
        if not ddp:
            for parameter in model.parameters():
                torch.distributed.all_reduce(parameter.grad)
        optimizer.step()
    return model.state_dict()


@cpu_only("gloo between processes")
@pytest.mark.parametrize("ddp", [False, True])
@pytest.mark.parametrize("parts", [[[2, 3], [4, 1]], [[2, 0], [3, 4]]])
def test_in_several_processes_it_is_one_large_batch(parts: list[list[int]], ddp: bool) -> None:
    model = _small(nn.BatchNorm1d)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    total = sum(map(sum, parts))
    for seed in range(2):
        optimizer.zero_grad()
        y = model(values((total, 3, 4), torch.float64, seed=seed))
        (y.square().sum() / total).backward()
        optimizer.step()
    for state in results(2, _train, parts, ddp):
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=1e-12)
