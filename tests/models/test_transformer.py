"""torch's own transformer layers with our norms in them, its fast path for inference included."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from normally import nn

# Nested tensors are a prototype, which the encoder's fast path makes use of.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


def encoder(*, norm_first: bool = False, layers: int = 2) -> torch.nn.TransformerEncoder:
    layer = torch.nn.TransformerEncoderLayer(
        32, 4, 64, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    return torch.nn.TransformerEncoder(
        layer, layers, torch.nn.LayerNorm(32), enable_nested_tensor=not norm_first
    )


def with_our_norms(model: torch.nn.Module) -> torch.nn.Module:
    """A copy whose layer norms are ours."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.LayerNorm:
                ours = nn.LayerNorm(child.normalized_shape, child.eps)
                ours.load_state_dict(child.state_dict())
                setattr(parent, name, ours.train(child.training))
    return model


def scattered(model: torch.nn.Module) -> torch.nn.Module:
    """Norm weights and biases that are not 1 and 0."""
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.normal_(module.weight, 1.0, 0.3)
            torch.nn.init.normal_(module.bias, 0.0, 0.3)
    return model


def padding() -> Tensor:
    """True where there is padding: torch's meaning here, the opposite of our mask."""
    return torch.arange(9) >= torch.tensor([9, 4, 6]).view(-1, 1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_encoder_and_its_gradients(training: bool, norm_first: bool, padded: bool) -> None:
    theirs = scattered(encoder(norm_first=norm_first)).train(training)
    ours = with_our_norms(theirs)
    x = torch.randn(3, 9, 32)
    mask = padding() if padded else None
    results = []
    for model in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = model(leaf, src_key_padding_mask=mask)
        kept = y if mask is None else y[~mask]
        results.append(
            (kept, *torch.autograd.grad(kept.square().sum(), [leaf, *model.parameters()]))
        )
    for a, b in zip(*results, strict=True):
        error = float((a - b).detach().abs().max())
        # A dozen float32 operators in two orders of rounding, relative to the tensor's own scale.
        assert error <= 2e-5 * float(b.detach().abs().max())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_fast_path_of_inference(norm_first: bool, padded: bool) -> None:
    """Without gradients torch runs a whole layer as one operator, from our layers' parameters."""
    theirs = scattered(encoder(norm_first=norm_first)).eval()
    ours = with_our_norms(theirs)
    x = torch.randn(3, 9, 32)
    mask = padding() if padded else None
    with torch.no_grad():
        enabled = torch.backends.mha.get_fastpath_enabled()
        fast = ours(x, src_key_padding_mask=mask)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            slow = ours(x, src_key_padding_mask=mask)
        finally:
            torch.backends.mha.set_fastpath_enabled(enabled)
        plain = theirs(x, src_key_padding_mask=mask)
    kept = slice(None) if mask is None else ~mask
    for other in (slow, plain):
        torch.testing.assert_close(fast[kept], other[kept], rtol=1e-5, atol=1e-5)


def test_fast_path_is_taken_with_our_norms() -> None:
    """Or the test above would compare the slow path with itself."""
    calls: list[str] = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    model = with_our_norms(encoder()).eval()
    with torch.no_grad(), Spy():
        model(torch.randn(3, 9, 32))
    assert sum("transformer_encoder_layer" in call for call in calls) == 2


@pytest.mark.parametrize("nested", [False, True])
def test_fast_path_does_not_drop_an_activation(nested: bool) -> None:
    """torch's fast path reads a norm's parameters; a norm that does more must be called."""
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    layer.norm1 = nn.LayerNorm(32, act="relu")
    model: torch.nn.Module = layer
    if nested:
        model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(3, 9, 32)
    with_gradients = model.eval()(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x), with_gradients)
