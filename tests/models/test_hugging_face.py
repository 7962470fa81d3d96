"""Our RMS norm beside Hugging Face's, and small models of theirs with their norms replaced by ours.

Every model is made from a configuration: nothing is downloaded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from normally import nn
from tests.helpers import assert_same_bits, needs_native

SIZES = (64, 255, 1000, 4096)
EPS = 1e-6
OPTIONS: dict[type, dict[str, Any]] = {
    LlamaRMSNorm: {"casting": "llama"},
    GemmaRMSNorm: {"casting": "gemma", "zero_centered_weight": True},
}
THEIRS = pytest.mark.parametrize("theirs", OPTIONS, ids=lambda c: c.__name__)


def pair(theirs: type, size: int, dtype: torch.dtype) -> tuple[torch.nn.Module, nn.RMSNorm]:
    """Their layer and ours with the same weights, which went through a state dict."""
    layer = theirs(size, EPS)
    torch.nn.init.normal_(layer.weight)
    layer = layer.to(dtype)
    ours = nn.RMSNorm(size, EPS, dtype=dtype, **OPTIONS[theirs])
    ours.load_state_dict(layer.state_dict())
    return layer, ours


def exact(shape: tuple[int, ...]) -> Tensor:
    """Integers whose squares sum to less than 2^24: float32 adds them exactly in any order."""
    x = torch.randint(-40, 41, shape).float()
    assert float(x.square().sum(-1).max()) < 2**24
    return x


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """How many numbers of their dtype lie between the two."""
    integer = {4: torch.int32, 2: torch.int16}[a.element_size()]
    low = torch.iinfo(integer).min
    ordered = [t.detach().view(integer).long() for t in (a, b)]
    ordered = [torch.where(i < 0, low - i, i) for i in ordered]
    return (ordered[0] - ordered[1]).abs()


@needs_native
@THEIRS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_bit_for_bit_where_the_sum_is_exact(size: int, dtype: torch.dtype, theirs: type) -> None:
    """The order of operations and every rounding after the sum are theirs, in every dtype."""
    layer, ours = pair(theirs, size, dtype)
    for scale in (1.0, 2.0**-7):
        x = (exact((37, size)) * scale).to(dtype)
        assert_same_bits(ours(x), layer(x))
        assert_same_bits(ours(x.view(37, 1, size)), layer(x.view(37, 1, size)))


@needs_native
@THEIRS
@pytest.mark.parametrize("size", SIZES)
def test_random_float32(size: int, theirs: type) -> None:
    """Theirs adds the squares in float32, ours in blocks whose sums are float64.

    Where the two sums round to the same float32 the row has the same bits: four rows in five. The
    others differ by no more than theirs is off: a sum of n float32 terms in torch's cascade by some
    4 units, its inverse root by half of that, and the weight's product turns 1 unit into 2. Ours is
    the one nearer to float64.
    """
    layer, ours = pair(theirs, size, torch.float32)
    x = torch.randn(512, size)
    found, other = ours(x), layer(x)
    distance = ulps(found, other)
    assert int(distance.max()) <= 4
    assert float((distance == 0).all(1).double().mean()) >= 0.7
    wide = layer.weight.detach().double()
    if theirs is GemmaRMSNorm:
        wide = 1 + wide
    expected = x.double() * (x.double().square().mean(1, keepdim=True) + EPS).rsqrt() * wide
    errors = [((t - expected) / expected).abs().mean().item() for t in (found, other)]
    assert errors[0] <= errors[1]


@needs_native
@THEIRS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_random_half_to_one_rounding(size: int, dtype: torch.dtype, theirs: type) -> None:
    """A float32 that differs in its last bits rounds the other way once in ten thousand.

    llama multiplies what was rounded: one unit of that is up to two of the product.
    """
    layer, ours = pair(theirs, size, dtype)
    x = torch.randn(512, size).to(dtype)
    distance = ulps(ours(x), layer(x))
    assert int(distance.max()) <= (2 if theirs is LlamaRMSNorm else 1)
    assert float((distance == 0).double().mean()) >= 0.999


@THEIRS
def test_gradients(theirs: type) -> None:
    """Theirs come from autograd through five operators in float32, ours from one formula."""
    layer, ours = pair(theirs, 255, torch.float32)
    x, g = torch.randn(64, 255), torch.randn(64, 255)
    results = []
    for module in (ours, layer):
        leaf = x.clone().requires_grad_()
        results.append(torch.autograd.grad(module(leaf), [leaf, module.weight], g))
    for a, b in zip(*results, strict=True):
        # Sums of 255 and of 64 terms of unit scale.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def with_our_norms(model: torch.nn.Module) -> tuple[torch.nn.Module, int]:
    """A copy with every norm replaced by setattr, and how many those were."""
    model = copy.deepcopy(model)
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            options = {
                "device": "cpu",
                "dtype": next(iter([*child.parameters(), torch.ones(1)])).dtype,
            }
            if type(child) in OPTIONS:
                size, eps = child.weight.shape, getattr(child, "variance_epsilon", None)
                eps = child.eps if eps is None else eps
                ours: torch.nn.Module = nn.RMSNorm(size, eps, **options, **OPTIONS[type(child)])
            elif type(child) is torch.nn.LayerNorm:
                ours = nn.LayerNorm(child.normalized_shape, child.eps, **options)
            else:
                continue
            ours.load_state_dict(child.state_dict())
            setattr(parent, name, ours.train(child.training))
            count += 1
    return model, count


TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip


def _causal(config: Any) -> torch.nn.Module:
    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model


def _llama() -> torch.nn.Module:
    return _causal(transformers.LlamaConfig(**TEXT, num_key_value_heads=2))


def _gemma() -> torch.nn.Module:
    return _causal(transformers.GemmaConfig(**TEXT, num_key_value_heads=2, head_dim=16))


def _bert() -> torch.nn.Module:
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForMaskedLM(transformers.BertConfig(**TEXT, **dropout))


def _vit() -> torch.nn.Module:
    config = transformers.ViTConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        image_size=32, patch_size=8, num_labels=10,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def _tokens() -> dict[str, Tensor]:
    kept = torch.arange(17) < torch.tensor([17, 5, 11]).view(-1, 1)
    return {"input_ids": torch.randint(0, 64, (3, 17)), "attention_mask": kept.long()}


def _images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(3, 3, 32, 32)}


#: A model, what goes in, and how many norms it has.
MODELS: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[], dict[str, Tensor]], int]] = {
    "llama": (_llama, _tokens, 5),
    "gemma": (_gemma, _tokens, 5),
    "bert": (_bert, _tokens, 6),
    "vit": (_vit, _images, 5),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_model_with_our_norms(name: str, training: bool) -> None:
    """Logits, loss gradients of every parameter, and one step of an optimizer agree."""
    make, inputs, norms = MODELS[name]
    theirs = make().train(training)
    for parameter_name, parameter in theirs.named_parameters():
        if "norm" in parameter_name.lower():  # 1 and 0 would hide a wrong weight
            torch.nn.init.normal_(parameter, parameter.detach().mean().item(), 0.3)
    ours, count = with_our_norms(theirs)
    assert count == norms
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    given = inputs()
    results = []
    for model in (ours, theirs):
        logits = model(**given).logits
        gradients = torch.autograd.grad(logits.log_softmax(-1)[..., 0].mean(), model.parameters())
        results.append((logits, *gradients))
    names = ["logits", *(name for name, _ in theirs.named_parameters())]
    for what, a, b in zip(names, *results, strict=True):
        # A dozen float32 operators in two orders of rounding, relative to the tensor's own scale.
        error = (a - b).detach().abs().max().item()
        assert error <= 2e-5 * b.detach().abs().max().item() + 1e-9, (what, error)


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_bfloat16_model(name: str) -> None:
    """Two models in bfloat16, to what bfloat16 itself is off from float32."""
    make, inputs, _ = MODELS[name]
    theirs = make().eval()
    given = inputs()
    half = copy.deepcopy(theirs).to(torch.bfloat16)
    ours, _ = with_our_norms(half)
    with torch.no_grad():
        exactly, rounded, found = (model(**given).logits.float() for model in (theirs, half, ours))
    assert found.isfinite().all()
    error = float((rounded - exactly).abs().max())
    assert float((found - exactly).abs().max()) <= 1.5 * error
    assert float((found - rounded).abs().max()) <= error


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_generation(name: str) -> None:
    """Token by token with a cache: rows of one, the shape of inference."""
    theirs = MODELS[name][0]().eval()
    ours, _ = with_our_norms(theirs)
    prompt = {"input_ids": torch.randint(3, 64, (2, 7)), "attention_mask": torch.ones(2, 7).long()}
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
    assert torch.equal(ours.generate(**prompt, **options), theirs.generate(**prompt, **options))
