"""What holds for every layer, as checks that the layers' own tests call."""

from __future__ import annotations

import copy
import inspect
import io
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_same_bits


def check_signature(ours: type, theirs: type, added: tuple[str, ...]) -> None:
    """torch's parameters in torch's order, then ours by keyword only."""
    expected = inspect.signature(theirs).parameters
    found = inspect.signature(ours).parameters
    by_position = [p for p in expected.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    for parameter, wanted in zip(found.values(), by_position, strict=False):
        assert (parameter.name, parameter.kind) == (wanted.name, wanted.kind)
        assert parameter.default == wanted.default, parameter.name
    by_keyword = list(found.values())[len(by_position) :]
    assert all(p.kind is p.KEYWORD_ONLY for p in by_keyword)
    # torch has `bias` of some layers by keyword from 2.13 on; before, it is ours.
    assert [p.name for p in by_keyword if p.name != "bias"] == list(added)
    assert set(expected) <= set(found)


def check_state_dicts(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """One loads the other's strictly and keeps every bit, both ways."""
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for target, source in ((ours, theirs), (theirs, ours)):
        generator = torch.Generator().manual_seed(5)
        for value in source.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
            else:
                value.fill_(7)
        target.load_state_dict(source.state_dict(), strict=True)
        for key, value in source.state_dict().items():
            assert_same_bits(target.state_dict()[key], value, key)


def check_copies(layer: torch.nn.Module, input: Tensor) -> None:
    """Copied, pickled and saved: the same settings and the same results."""
    expected = layer(input)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for twin in (copy.deepcopy(layer), copy.copy(layer), loaded):
        assert type(twin) is type(layer)
        assert repr(twin) == repr(layer)
        assert_same_bits(twin(input), expected)


def check_symbolic_tracing(layer: torch.nn.Module, input: Tensor, mask: Tensor) -> None:
    """One `call_module` node with the arguments that were given, as torch's layers are."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = layer

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.norm(x) + self.norm(x, mask=mask)

    model = Net()
    traced = torch.fx.symbolic_trace(model)
    nodes = [node for node in traced.graph.nodes if node.op == "call_module"]
    assert [node.target for node in nodes] == ["norm", "norm"]
    assert [sorted(node.kwargs) for node in nodes] == [[], ["mask"]]
    assert_same_bits(traced(input, mask), model(input, mask))
    with pytest.raises(torch.fx.proxy.TraceError, match="cannot be its root"):
        torch.fx.symbolic_trace(layer)


def check_meta(layer: torch.nn.Module, shape: tuple[int, ...]) -> None:
    """A layer made on the meta device gives shapes and no numbers."""
    tensors = [*layer.parameters(), *layer.buffers()]
    assert all(t.is_meta for t in tensors)
    output = layer(torch.empty(shape, device="meta"))
    assert output.is_meta
    assert output.shape == shape


def check_located(
    make: Callable[[], torch.nn.Module], input: Tensor, error: type[Exception], words: str
) -> None:
    """The words, the layer's kind and its path, in one traceback."""
    layer = make()
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Sequential(layer))
    name = type(layer).__name__
    with pytest.raises(error, match=re.escape(words)) as raised:
        model(input)
    assert str(raised.value).endswith("of Sequential]")
    assert " at 1.0 of " in str(raised.value)
    assert raised.value.__suppress_context__
    with pytest.raises(error) as raised:
        make()(input)
    assert re.search(rf"\[in (Lazy)?{name.removeprefix('Lazy')}\]$", str(raised.value))


def check_words_of_torch(
    ours: Callable[[], object], theirs: Callable[[], object], error: type[Exception]
) -> None:
    """torch's message is part of ours, and the class is torch's as well."""
    with pytest.raises(error) as expected:
        theirs()
    with pytest.raises(error, match=re.escape(str(expected.value))) as found:
        ours()
    assert isinstance(found.value, ValueError | TypeError)
