import copy

import pytest
import torch
from torch import nn

from normally.lab.data import load
from normally.lab.training import (
    evaluate,
    evaluate_with_batch_statistics,
    lenet,
    one_thread,
    train_epoch,
)


@pytest.fixture(scope="module")
def data():
    return load("digits")


@pytest.mark.parametrize("image_size", [8, 28])
def test_both_forms_start_from_the_same_weights(image_size):
    torch.manual_seed(0)
    plain = lenet(image_size, norm=False)
    torch.manual_seed(0)
    norm = lenet(image_size, norm=True)
    pairs = [
        (a, b) for a, b in zip(plain, norm, strict=True) if isinstance(a, nn.Conv2d | nn.Linear)
    ]
    assert len(pairs) == 5
    for a, b in pairs:
        assert torch.equal(a.weight, b.weight)
        assert torch.equal(a.bias, b.bias)
    assert sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in norm) == 4
    assert plain(torch.randn(2, 1, image_size, image_size)).shape == (2, 10)


def test_training_lowers_the_loss(data):
    torch.manual_seed(0)
    model = lenet(8, norm=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    first = train_epoch(model, optimizer, data, 64)
    assert train_epoch(model, optimizer, data, 64) < first
    assert evaluate(model, data.test_x, data.test_y).accuracy > 0.5


def test_a_loss_that_is_not_finite_ends_the_epoch(data):
    model = lenet(8, norm=False)
    model[0].weight.data.fill_(float("nan"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert train_epoch(model, optimizer, data, 64) == float("inf")


def test_evaluation_with_batch_statistics_leaves_the_model_alone(data):
    torch.manual_seed(0)
    model = lenet(8, norm=True).eval()
    before = copy.deepcopy(model.state_dict())
    score = evaluate_with_batch_statistics(model, data.test_x, data.test_y, 360)
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    model.train()
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model(data.test_x), data.test_y).item()
    assert score.loss == expected


def test_one_thread_is_undone_after_an_error():
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with pytest.raises(RuntimeError), one_thread():
        torch.ones(2) @ torch.ones(3)
    assert torch.get_num_threads() == before
