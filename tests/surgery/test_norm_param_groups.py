"""norm_param_groups: every parameter in one of two groups, once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normally
from normally import convert, freeze, norm_param_groups, unfreeze
from tests.surgery.models import Residual
from tests.surgery.test_convert import NormAct, RmsNorm


def names_of(model: nn.Module, **options: Any) -> tuple[set[str], set[str]]:
    """Names with and without decay; every parameter that requires a gradient is in one of them."""
    groups = norm_param_groups(model, 0.1, **options)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [names[p] for group in groups for p in group["params"]]
    assert len(found) == len(set(found))
    wanted = options.get("trainable_only", True)
    assert set(found) == {n for p, n in names.items() if p.requires_grad or not wanted}
    decay, free = ({names[p] for p in group["params"]} for group in groups)
    return decay, free


class Ln(nn.Module):
    """A norm by what it holds, not by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.epsilon = nn.Parameter(torch.ones(4)), 1e-5


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 3, 4))
        self.attention = nn.MultiheadAttention(4, 2)
        self.rnn = nn.LSTM(4, 4)
        self.ln = Ln()
        self.rms = RmsNorm(4)
        self.act = NormAct(4, nn.PReLU(4))
        self.scale = nn.Parameter(torch.ones(4))
        self.bias_table = nn.Embedding(5, 4)

    def no_weight_decay(self) -> set[str]:
        return {"scale"}


def test_norms_and_biases_of_all_kinds() -> None:
    decay, free = names_of(Mixed())
    assert decay == {
        "pos_embed", "attention.in_proj_weight", "attention.out_proj.weight", "rnn.weight_ih_l0",
        "rnn.weight_hh_l0", "act.act.weight", "bias_table.weight",
    }  # fmt: skip
    assert {"ln.gain", "rms.weight", "act.weight", "act.bias", "scale"} <= free
    _, free = names_of(Mixed(), no_decay=("pos_embed", "bias_*"))
    assert {"pos_embed", "bias_table.weight"} <= free
    _, free = names_of(Mixed(), no_decay=lambda name, p: p.dim() == 1)
    assert "act.act.weight" in free


def test_a_residual_network_converted_frozen_or_not() -> None:
    norms = {f"{path}.{name}" for path, m in Residual().named_modules()
             if isinstance(m, nn.BatchNorm2d) for name in ("weight", "bias")}  # fmt: skip
    _, free = names_of(Residual())
    assert free == norms | {"stem.0.bias", "blocks.0.downsample.0.bias", "head.bias"}
    assert names_of(convert(Residual()))[1] == free
    frozen = freeze(Residual(), only="blocks")
    assert names_of(frozen)[1] == {n for n in free if not ("blocks" in n and n in norms)}
    assert names_of(frozen, trainable_only=False)[1] == free


def test_selection() -> None:
    decay, free = names_of(Residual(), only="BatchNorm2d", skip="blocks.1")
    assert {"head.bias", "blocks.1.bn1.weight"} <= decay
    assert {"stem.1.bias", "blocks.0.bn1.weight"} <= free


def test_shared_and_parametrized_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    model[0].gain = model[1].weight  # shared with what is no norm, and met there first
    decay, free = names_of(model)
    assert decay == {"0.weight"}
    assert free == {"0.bias", "0.gain", "1.bias", "2.bias"}
    torch.nn.utils.parametrize.register_parametrization(model[1], "bias", nn.Softplus())
    torch.nn.utils.parametrizations.weight_norm(model[2])
    decay, free = names_of(model)
    assert "1.parametrizations.bias.original" in free
    assert "2.parametrizations.weight.original0" in decay


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_an_optimizer_decays_the_first_group_alone(optimizer: Any) -> None:
    model = Residual()
    free = names_of(model)[1]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    made = optimizer(norm_param_groups(model, 0.1), lr=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    made.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name in free), name
    made.load_state_dict(made.state_dict())


def test_what_is_unfrozen_later_learns() -> None:
    model = freeze(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    optimizer = torch.optim.SGD(norm_param_groups(model, 0.1, trainable_only=False), lr=0.1)
    unfreeze(model)
    before = model[1].weight.detach().clone()
    model(torch.randn(4, 2)).pow(3).sum().backward()
    optimizer.step()
    assert not torch.equal(model[1].weight, before)


def test_lazy_layers_and_report() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d())
    model[0].bias.requires_grad = False
    groups, report = norm_param_groups(model, 0.1, return_report=True)
    assert [str(change) for change in report.changes] == [
        "0.weight  LazyConv2d left: decays",
        "0.bias  LazyConv2d left: in no group: it requires no gradient",
        "1.weight  LazyBatchNorm2d → no decay: a norm's",
        "1.bias  LazyBatchNorm2d → no decay: a norm's",
    ]
    model(torch.randn(2, 3, 4, 4))
    assert groups[1]["params"] == list(model[1].parameters())


def test_real_models() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=16, depth=1, embed_dim=24, num_heads=2
    )
    decay, free = names_of(model)
    assert {"pos_embed", "cls_token", "norm.weight", "blocks.0.attn.qkv.bias"} <= free
    assert decay == {n for n, p in model.named_parameters() if p.dim() > 1} - free
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config)
    decay, free = names_of(llama)
    assert free == {
        "model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
    }  # fmt: skip
    assert len(decay) == 8


def test_errors() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    cases: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
        (TypeError, r"model must be a torch\.nn\.Module", [model], {}),
        (ValueError, "weight_decay must be 0 or more. Got weight_decay=-1", model, {"decay": -1}),
        (ValueError, "weight_decay must be 0 or more", model, {"decay": float("nan")}),
        (ValueError, "no_decay must name .* Got 'pos_embed'", model, {"no_decay": "pos_embed"}),
        (TypeError, "no_decay must be a name", model, {"no_decay": [1]}),
        (ValueError, "only must name", model, {"only": "head"}),
        (ValueError, "model must have a parameter that", nn.ReLU(), {}),
        (ValueError, "requires a gradient.* with none", freeze(nn.BatchNorm1d(2)), {}),
    ]  # fmt: skip
    for error, match, broken, options in cases:
        with pytest.raises(error, match=match):
            norm_param_groups(broken, options.pop("decay", 0.1), **options)


def test_the_model_stays_as_it_is() -> None:
    model = normally.nn.BatchNorm2d(4)
    seen: list[Tensor] = [*model.parameters()]
    norm_param_groups(model, 0.1)
    assert all(a is b for a, b in zip(seen, model.parameters(), strict=True))
