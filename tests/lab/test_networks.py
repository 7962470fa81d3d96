import pytest
import torch
from torch import nn

from normally.lab.networks import lenet, mlp
from normally.nn import BatchNorm1d, BatchNorm2d, GroupNorm, LayerNorm


@pytest.mark.parametrize("image_size", [8, 28])
def test_both_forms_start_from_the_same_weights(image_size):
    torch.manual_seed(0)
    plain = lenet(image_size, norm="none")
    torch.manual_seed(0)
    norm = lenet(image_size, norm="batch")
    pairs = [
        (a, b) for a, b in zip(plain, norm, strict=True) if isinstance(a, nn.Conv2d | nn.Linear)
    ]
    assert len(pairs) == 5
    for a, b in pairs:
        assert torch.equal(a.weight, b.weight)
        assert torch.equal(a.bias, b.bias)
    assert sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in norm) == 4
    assert plain(torch.randn(2, 1, image_size, image_size)).shape == (2, 10)


def test_without_biases_the_weights_and_what_is_drawn_next_are_the_same():
    torch.manual_seed(0)
    with_, next_with = lenet(8, bias=True), torch.rand(1)
    torch.manual_seed(0)
    without, next_without = lenet(8, bias=False), torch.rand(1)
    for a, b in zip(with_, without, strict=True):
        if isinstance(a, nn.Conv2d | nn.Linear):
            assert torch.equal(a.weight, b.weight)
    assert torch.equal(next_with, next_without)


def norms(model):
    kinds = (BatchNorm1d, BatchNorm2d, GroupNorm, LayerNorm)
    return [type(m) for m in model if isinstance(m, kinds)]


@pytest.mark.parametrize(
    ("norm", "kinds"),
    [
        ("none", []),
        ("batch", [BatchNorm2d, BatchNorm2d, BatchNorm1d, BatchNorm1d]),
        ("group:2", [GroupNorm] * 4),
        ("layer", [GroupNorm, GroupNorm, LayerNorm, LayerNorm]),
    ],
)
def test_the_norm_goes_by_its_name(norm, kinds):
    model = lenet(8, norm=norm)
    assert norms(model) == kinds
    assert model(torch.randn(3, 1, 8, 8)).shape == (3, 10)


def test_layer_norm_of_a_convolution_is_that_of_a_whole_sample():
    layer = lenet(8, norm="layer")[1]
    x = torch.randn(2, 6, 8, 8)
    expected = nn.functional.layer_norm(x, (6, 8, 8)).relu()
    assert torch.allclose(layer(x), expected, atol=1e-6)  # unit scale: rounding of float32


def test_positions_dropout_bias_and_order():
    assert norms(lenet(8, positions=(2, 4))) == [BatchNorm2d, BatchNorm1d]
    model = lenet(8, dropout=0.5)
    assert sum(isinstance(m, nn.Dropout) for m in model) == 2
    hidden = [m for m in lenet(8, bias=False) if isinstance(m, nn.Conv2d | nn.Linear)]
    assert [m.bias is None for m in hidden] == [True, True, True, True, False]
    after = lenet(8, after_activation=True)
    assert [type(m) for m in after[1:3]] == [nn.ReLU, BatchNorm2d]
    assert after[2].act is None


def test_the_original_has_no_padding_in_its_second_convolution():
    model = lenet(28, padding=0)
    assert next(m for m in model if isinstance(m, nn.Linear)).in_features == 400
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_mlp_has_its_widths():
    model = mlp(64, [32, 16], norm="batch")
    assert norms(model) == [BatchNorm1d, BatchNorm1d]
    assert model(torch.randn(4, 1, 8, 8)).shape == (4, 10)


@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
def test_other_activations_stand_behind_their_norm(activation):
    model = lenet(8, activation=activation)
    assert [type(m).__name__.lower() for m in model[1:3]] == ["batchnorm2d", activation]
    behind = lenet(8, activation=activation, after_activation=True)
    assert [type(m).__name__.lower() for m in behind[1:3]] == [activation, "batchnorm2d"]
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)
