import pytest
import torch
from torch import nn

from normally.lab.data import load
from normally.lab.sequences import (
    Convolutional,
    Recurrent,
    hidden_images,
    hide,
    pad,
    padding_dependence,
    split,
)


@pytest.fixture(scope="module")
def digits():
    return load("digits").first(200, 50)


def test_the_image_stands_whole_within_the_length_and_padding_is_zero(digits):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.arange(8, 24).repeat(4)[:50]
    x = hide(digits.test_x, lengths, 24, generator)
    features, mask = split(x)
    assert features.shape == (50, 24, 8)
    assert torch.equal(mask.sum(1), lengths)
    assert (mask.long().diff(dim=1) <= 0).all()
    assert (features[~mask] == 0).all()
    starts = set()
    for sequence, image, length in zip(features, digits.test_x, lengths, strict=True):
        windows = sequence.unfold(0, 8, 1)  # (starts, features, width): an image each
        found = (windows == image[0]).all(2).all(1).nonzero().flatten().tolist()
        assert len(found) == 1
        assert found[0] + 8 <= length
        starts.add(found[0])
    assert len(starts) > 5  # all over the sequence, not at its beginning


def test_the_noise_has_the_images_mean_and_spread(digits):
    data = hidden_images(digits, 0, shortest=40, longest=40, steps=40)
    features, mask = split(data.train_x)
    values = features[mask]
    assert abs(values.mean().item()) < 0.05
    assert abs(values.std().item() - 1) < 0.05


def test_a_seed_gives_the_same_sequences_and_another_gives_others(digits):
    options = {"shortest": 8, "longest": 20, "steps": 24}
    one, same, other = (hidden_images(digits, seed, **options) for seed in (3, 3, 4))
    assert torch.equal(one.train_x, same.train_x)
    assert torch.equal(one.test_x, same.test_x)
    assert not torch.equal(one.train_x, other.train_x)
    assert torch.equal(one.train_y, digits.train_y)
    lengths = split(one.train_x)[1].sum(1)
    assert (lengths.min().item(), lengths.max().item()) == (8, 20)


class Mean(nn.Module):
    def __init__(self, masked):
        super().__init__()
        self.masked = masked

    def forward(self, x):
        features, mask = split(x)
        weight = mask.float() if self.masked else torch.ones(mask.shape)
        return (features * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)


@pytest.mark.parametrize("training", [False, True])
def test_padding_dependence_of_a_mean_over_steps(digits, training):
    x = hidden_images(digits, 0, shortest=10, longest=16, steps=16).test_x
    assert padding_dependence(Mean(masked=True), x, 16, training=training) < 1e-6
    # Twice the steps: the mean over all of them is halved.
    found = padding_dependence(Mean(masked=False), x, 16, training=training)
    assert found == pytest.approx(0.5, rel=1e-5)


def test_padding_adds_steps_that_do_not_count(digits):
    x = hidden_images(digits, 0, shortest=8, longest=9, steps=9).test_x
    longer = pad(x, 5)
    assert longer.shape == (50, 14, 9)
    assert torch.equal(longer[:, :9], x)
    assert not split(longer)[1][:, 9:].any()


NETWORKS = [
    *(("conv", norm) for norm in ("none", "layer", "batch", "padded")),
    *(("gru", norm) for norm in ("none", "layer", "batch", "steps")),
]


def network(kind, norm):
    torch.manual_seed(0)
    return Convolutional(8, norm, 6) if kind == "conv" else Recurrent(8, norm, 5, longest=20)


@pytest.mark.parametrize(("kind", "norm"), NETWORKS)
def test_more_padding_changes_nothing_but_unmasked_statistics(digits, kind, norm):
    x = hidden_images(digits, 0, shortest=8, longest=20, steps=24).test_x
    model = network(kind, norm)
    assert padding_dependence(model, x, 24, training=False) < 1e-6  # float32 rounding
    found = padding_dependence(model, x, 24, training=True)
    assert (found > 0.01) if norm == "padded" else (found < 1e-6)


@pytest.mark.parametrize(("kind", "norm"), NETWORKS)
def test_a_sequence_in_evaluation_is_read_the_same_alone(digits, kind, norm):
    x = hidden_images(digits, 0, shortest=8, longest=20, steps=24).test_x
    model = network(kind, norm).eval()
    alone = x[:1, : int(x[0, :, -1].sum())]
    torch.testing.assert_close(model(alone), model(x)[:1])  # float32: other kernels


@pytest.mark.parametrize("kind", ["conv", "gru"])
def test_all_norms_start_from_the_same_weights(kind):
    def weights(norm):
        named = network(kind, norm).named_parameters()
        return {name: p for name, p in named if "norm" not in name}

    plain = weights("none")
    for norm in ("layer", "batch"):
        assert all(torch.equal(p, plain[name]) for name, p in weights(norm).items())


def test_without_norm_the_recurrent_network_is_torchs_gru(digits):
    x = hidden_images(digits, 0, shortest=12, longest=12, steps=12).test_x
    model, gru = network("gru", "none"), nn.GRU(8, 5, batch_first=True)
    with torch.no_grad():
        gru.weight_ih_l0.copy_(model.input.weight)
        gru.bias_ih_l0.copy_(model.input.bias)
        gru.weight_hh_l0.copy_(model.state.weight)
        gru.bias_hh_l0.zero_()
        expected = model.output(gru(split(x)[0])[1][0])
    torch.testing.assert_close(model(x), expected)


def test_steps_beyond_the_longest_take_the_last_statistics(digits):
    x = hidden_images(digits, 0, shortest=23, longest=23, steps=23).test_x
    model = network("gru", "steps").train()
    model(x)
    counts = [int(norm.num_batches_tracked) for norm in model.state_norms]
    assert counts == [1] * 19 + [4]
