"""`memory_efficient=True`: less is kept, the bits are the same, and what was changed is seen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import normally
from normally import nn
from normally.bench.memory import peak_bytes
from normally.functional import _recompute, batch_norm
from tests.device import IS_CPU
from tests.helpers import assert_same_bits
from tests.surgery.models import Residual


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """For many forwards of tiny models: on a busy machine threads wait longer than they work."""
    torch.set_num_threads(1)


class Chain(torch.nn.Module):
    """conv → norm → conv → norm → conv → norm, the last two with a residual."""

    def __init__(self, memory_efficient: bool, act: str | None = "relu", **options: Any) -> None:
        super().__init__()
        self.convs = torch.nn.ModuleList(torch.nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.norms = torch.nn.ModuleList(
            nn.BatchNorm2d(4, act=act, memory_efficient=memory_efficient, **options)
            for _ in range(4)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(x), residual=x if i else None, mask=mask)
        return x


def twins(make: Callable[[bool], torch.nn.Module]) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same model without and with."""
    plain, efficient = make(False), make(True)
    efficient.load_state_dict(plain.state_dict())
    return plain, efficient


def recipes(output: Tensor) -> int:
    """How many saved tensors behind an output are recipes."""
    found, nodes, seen = 0, [output.grad_fn], set()
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if not isinstance(node, torch.autograd.function.BackwardCFunction):
            for name in _recompute._names(node.__class__):
                hook = getattr(node, name).unpack_hook
                found += hook is _recompute.Recipe.compute
        nodes.extend(before for before, _ in node.next_functions)
    return found


def assert_same_step(
    plain: torch.nn.Module, efficient: torch.nn.Module, *inputs: Any, expected: int | None = None
) -> None:
    """Outputs, gradients and buffers of one step have the same bits."""
    results = []
    for model in (plain, efficient):
        x = inputs[0].clone().requires_grad_()
        output = model(x, *inputs[1:])
        if expected is not None and IS_CPU:
            assert recipes(output) == (expected if model is efficient else 0)
        (output * torch.linspace(0, 1, output.numel()).view_as(output)).sum().backward()
        gradients = [p.grad for p in model.parameters()]
        results.append([output.detach(), x.grad, *gradients, *model.buffers()])
    for one, other in zip(*results, strict=True):
        assert_same_bits(other, one)


@pytest.mark.parametrize("act", [None, "relu", "leaky_relu", "silu", "gelu", "hardswish"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_same_bits(act: str | None, layout: torch.memory_format, dtype: torch.dtype) -> None:
    plain, efficient = twins(lambda m: Chain(m, act).to(dtype).to(memory_format=layout))
    x = torch.randn(3, 4, 9, 7, dtype=dtype).to(memory_format=layout)
    assert_same_step(plain, efficient, x, expected=3)


OPTIONS: dict[str, dict[str, Any]] = {
    "correction": {"correction": 1},
    "no parameters": {"affine": False},
    "no bias": {"bias": False},
    "no running statistics": {"track_running_stats": False},
    "cumulative": {"momentum": None},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("training", [True, False])
def test_same_bits_with_other_settings(option: str, training: bool) -> None:
    plain, efficient = twins(lambda m: Chain(m, "relu", **OPTIONS[option]).train(training))
    # Constants alone save no input, from which an output could be computed again.
    expected = 0 if not training and option == "no parameters" else 3
    assert_same_step(plain, efficient, torch.randn(3, 4, 9, 7), expected=expected)


def test_same_bits_under_a_mask() -> None:
    plain, efficient = twins(lambda m: Chain(m, "silu"))
    mask = torch.rand(3, 1, 9, 7) > 0.4
    assert_same_step(plain, efficient, torch.randn(3, 4, 9, 7), mask, expected=3)


@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (2, 17, 1, 1), (2, 3, 65, 67), (5, 33, 7, 7)])
def test_the_recipe_gives_the_bits_of_the_output(shape: tuple[int, ...]) -> None:
    # Vector tails, short planes, several segments, bits and none.
    for layout in (torch.contiguous_format, torch.channels_last):
        x = (torch.randn(shape) * 3 + 100).to(memory_format=layout).requires_grad_()
        for residual in (None, torch.randn(shape)):
            norm = nn.BatchNorm2d(shape[1], act="relu", memory_efficient=True)
            y = norm(x, residual=residual)
            if IS_CPU:
                recipe = _recompute._recipe_of(y)
                assert recipe is not None
                again = recipe.compute()
                assert again.stride() == y.stride()
                assert_same_bits(again, y.detach())


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("relu", [None, torch.nn.ReLU(inplace=True)])
def test_the_output_is_given_back_to_the_system(
    memory_efficient: bool, relu: torch.nn.Module | None
) -> None:
    first, second = (nn.BatchNorm2d(4, memory_efficient=memory_efficient) for _ in range(2))
    conv = torch.nn.Conv2d(4, 4, 3)
    y = first(torch.randn(2, 4, 9, 9, requires_grad=True))
    reference = StorageWeakRef(y.untyped_storage())
    z = conv(y if relu is None else relu(y))
    del y
    assert not reference.expired()  # the convolution holds it
    z = second(z)
    assert reference.expired() == memory_efficient
    z.sum().backward()
    # No recipe outlives the backward, even while the graph is held.
    conv_node = z.grad_fn.next_functions[0][0]
    assert conv_node._raw_saved_input.data is None


class Unfused(torch.nn.Module):
    """A norm, a ReLU of some kind, and what comes next."""

    def __init__(self, memory_efficient: bool, relu: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1, self.conv2 = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 5, 3)
        self.bn1 = nn.BatchNorm2d(4, memory_efficient=memory_efficient)
        self.bn2 = nn.BatchNorm2d(5, memory_efficient=memory_efficient)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))


def _spoiled(y: Tensor) -> Tensor:
    with torch.no_grad():
        y.mul_(2)
    return y


@pytest.mark.parametrize(("relu", "expected"), [
    (torch.relu_, 2),  # what the convolution saves, and what the ReLU saves
    (torch.relu, 0),
    (lambda y: y, 1),
    (lambda y: y.mul_(2), 0),
    (_spoiled, 0),
    (lambda y: torch.relu_(_spoiled(y)), 0),
    (lambda y: F.max_pool2d(y, 2), 1),  # what the pooling saves
    (lambda y: torch.cat((y.relu_(), y.sigmoid()), 1)[:, ::2], 1),
    (lambda y: y.view(y.shape), 0),
    (lambda y: y * y.sigmoid(), 1),
])  # fmt: skip
def test_whatever_comes_between(relu: Callable[[Tensor], Tensor], expected: int) -> None:
    plain, efficient = twins(lambda m: Unfused(m, relu))
    assert_same_step(plain, efficient, torch.randn(2, 3, 12, 12), expected=expected)


def test_what_is_written_to_after_it_was_saved_is_an_error_as_ever() -> None:
    plain, efficient = twins(lambda m: Unfused(m, torch.nn.Identity()))
    for model in (plain, efficient):
        y = model.bn1(model.conv1(torch.randn(2, 3, 8, 8)))
        z = model.conv2(y)
        y.relu_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            model.bn2(z).sum().backward()


def test_an_input_that_is_written_to_is_an_error() -> None:
    model = Unfused(True, torch.nn.Identity())
    x = model.conv1(torch.randn(2, 3, 8, 8))
    z = model.bn2(model.conv2(model.bn1(x)))
    with torch.no_grad():
        x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_a_parameter_that_was_updated_is_an_error_where_it_is_needed() -> None:
    plain, efficient = twins(lambda m: Unfused(m, torch.nn.Identity()))
    x = torch.randn(2, 3, 8, 8)
    gradients = []
    for model in (plain, efficient):
        z = model(x).sin().sum()
        with torch.no_grad():
            model.bn1.weight.mul_(2)
        # The convolution's weight gradient needs the output as it was, not the parameter.
        gradients += torch.autograd.grad(z, model.conv2.weight, retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.backward()
    assert_same_bits(gradients[1], gradients[0])


def test_backward_twice_and_through_the_backward() -> None:
    plain, efficient = twins(lambda m: Chain(m, "silu").double())
    data = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    results = []
    for model in (plain, efficient):
        x = data.clone().requires_grad_()
        loss = model(x).square().sum()
        (first,) = torch.autograd.grad(loss, x, retain_graph=True)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        gradient.square().sum().backward()
        results.append([first, gradient.detach(), x.grad, *(p.grad for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        assert_same_bits(other, one)


@pytest.mark.parametrize("reentrant", [True, False])
def test_inside_of_a_checkpoint(reentrant: bool) -> None:
    class Checkpointed(torch.nn.Module):
        def __init__(self, memory_efficient: bool) -> None:
            super().__init__()
            self.chain, self.head = Chain(memory_efficient), Chain(memory_efficient)

        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.chain, x, use_reentrant=reentrant)
            return self.head(x)

    plain, efficient = twins(Checkpointed)
    assert_same_step(plain, efficient, torch.randn(2, 4, 9, 7))


def test_under_the_callers_own_hooks() -> None:
    plain, efficient = twins(Chain)
    with torch.autograd.graph.save_on_cpu():
        assert_same_step(plain, efficient, torch.randn(2, 4, 9, 7), expected=0)


def test_under_autocast() -> None:
    plain, efficient = twins(Chain)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_step(plain, efficient, torch.randn(2, 4, 9, 7))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, in jvp
def test_torch_func_and_no_grad_are_as_without() -> None:
    plain, efficient = twins(lambda m: Chain(m, "silu", track_running_stats=False))
    x = torch.randn(2, 4, 5, 5)
    for run in (
        lambda m: m(x),
        lambda m: torch.func.grad(lambda x: m(x).sum())(x),
        lambda m: torch.func.vmap(m)(torch.stack((x, x))),
        lambda m: torch.func.jvp(m, (x,), (x,))[1],
    ):
        with torch.no_grad():
            assert_same_bits(run(efficient), run(plain))


def test_compiled_to_one_graph() -> None:
    efficient = Chain(True)
    compiled = torch.compile(copy.deepcopy(efficient), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(compiled(x), efficient(x))


def test_a_long_chain_of_residuals_keeps_some() -> None:
    norms = [nn.BatchNorm1d(3, memory_efficient=True) for _ in range(40)]
    y = torch.randn(8, 3)
    for norm in norms:
        y = norm(torch.randn(8, 3, requires_grad=True), residual=y)
        recipe = _recompute._recipe_of(y)
        assert recipe is not None
        assert recipe.cost <= _recompute.MAX_COST + 1
        assert_same_bits(recipe.compute(), y.detach())


def test_norm_after_norm() -> None:
    plain, efficient = twins(
        lambda m: torch.nn.Sequential(
            *(nn.BatchNorm1d(5, act="silu", memory_efficient=m) for _ in range(3))
        )
    )
    assert_same_step(plain, efficient, torch.randn(6, 5))


def test_the_function_takes_it() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    y = batch_norm(x, None, None, training=True, memory_efficient=True)
    assert _recompute._recipe_of(y) is not None
    assert _recompute._recipe_of(batch_norm(x, None, None, training=True)) is None


def test_convert_and_fuse_a_residual_network() -> None:
    plain, efficient = Residual(), Residual()
    efficient.load_state_dict(plain.state_dict())
    x = torch.randn(4, 3, 10, 10)
    normally.fuse(normally.convert(plain), x)
    _, report = normally.convert(efficient, memory_efficient=True, return_report=True)
    assert all(change.note.endswith(", memory_efficient") for change in report.changed)
    normally.fuse(efficient, x)
    losses: list[list[Tensor]] = [[], []]
    for model, seen in zip((plain, efficient), losses, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(10):
            optimizer.zero_grad()
            output = model(x)
            if not seen and IS_CPU:
                assert (recipes(output) > 0) == (model is efficient)
            loss = F.cross_entropy(output, torch.arange(4))
            loss.backward()
            optimizer.step()
            seen.append(loss.detach())
    assert_same_bits(torch.stack(losses[1]), torch.stack(losses[0]))


def test_convert_sets_and_revert_resets_it() -> None:
    theirs, ours = torch.nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    model = torch.nn.Sequential(theirs, ours, torch.nn.LayerNorm(3))
    normally.convert(model)
    _, report = normally.convert(model, memory_efficient=True, return_report=True)
    assert [str(change) for change in report.changed] == [
        "0  BatchNorm2d → memory_efficient",
        "1  BatchNorm2d → memory_efficient",
    ]
    assert theirs.memory_efficient
    assert ours.memory_efficient
    _, report = normally.convert(model, memory_efficient=True, return_report=True)
    assert not report.changes
    normally.revert(model)
    assert type(theirs) is torch.nn.BatchNorm2d
    assert "memory_efficient" not in vars(theirs)
    assert type(ours) is nn.BatchNorm2d
    assert not ours.memory_efficient


@pytest.mark.slow
def test_resnet50_holds_30_percent_less() -> None:
    from torchvision.models import resnet50  # after the conftest has declared its operators

    x = torch.randn(8, 3, 160, 160)
    peaks, losses = [], []
    for memory_efficient in (False, True):
        torch.manual_seed(0)
        model = normally.convert(resnet50(), memory_efficient=memory_efficient)
        model = normally.fuse(model, x[:2]).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
            optimizer.zero_grad(set_to_none=False)  # so that gradients are there before
            loss = F.cross_entropy(model(x), torch.arange(8))
            loss.backward()
            optimizer.step()
            return loss.item()

        losses.append([step(model, optimizer) for _ in range(10)])
        peaks.append(peak_bytes(lambda m=model, o=optimizer: step(m, o)))
    assert losses[1] == losses[0]
    assert peaks[1] < 0.7 * peaks[0]
