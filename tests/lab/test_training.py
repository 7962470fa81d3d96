import copy

import pytest
import torch
from torch import nn

from normally.lab.data import load
from normally.lab.networks import lenet
from normally.lab.training import (
    _batches,
    evaluate,
    evaluate_with_batch_statistics,
    few,
    fit,
    one_thread,
    train_epoch,
)


@pytest.fixture(scope="module")
def data():
    return load("digits")


def test_training_lowers_the_loss(data):
    torch.manual_seed(0)
    model = lenet(8, norm="batch")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    first = train_epoch(model, optimizer, data, 64)
    assert train_epoch(model, optimizer, data, 64).loss < first.loss
    assert evaluate(model, data.test_x, data.test_y).accuracy > 0.5


def test_a_loss_that_is_not_finite_ends_the_epoch(data):
    model = lenet(8, norm="none")
    model[0].weight.data.fill_(float("nan"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert train_epoch(model, optimizer, data, 64).loss == float("inf")


def test_evaluation_with_batch_statistics_leaves_the_model_alone(data):
    torch.manual_seed(0)
    model = lenet(8, norm="batch").eval()
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


def test_fit_is_the_same_for_the_same_seed_and_counts_its_epochs(data):
    def once(batch_statistics=False):
        torch.manual_seed(3)
        model = lenet(8, norm="batch")
        options = {"lr": 0.3, "epochs": range(2), "batch_size": 256}
        return fit(model, data, **options, batch_statistics=batch_statistics)

    first = once()
    assert first == once()
    assert first["batch_loss"] == []
    with_batches = once(batch_statistics=True)
    assert with_batches["test_loss"] == first["test_loss"]
    assert [len(values) for values in with_batches.values()] == [2] * 6


def test_a_run_that_diverges_keeps_its_length(data):
    model = lenet(8, norm="none")
    model[0].weight.data.fill_(float("nan"))
    record = fit(model, data, lr=0.1, epochs=range(3), batch_size=256)
    assert record["train_loss"] == [float("inf")] * 3
    assert len(record["test_accuracy"]) == 3


def test_the_loss_before_the_update_and_the_accuracy_on_the_way_are_recorded(data):
    torch.manual_seed(0)
    model = lenet(8, norm="batch")
    record = fit(model, data, lr=0.3, epochs=range(2), batch_size=64, momentum=0.5)
    assert 0 < record["train_accuracy"][0] < record["train_accuracy"][1] <= 1


def order(batches):
    return [batch.tolist() for batch in batches]


def test_steps_are_a_part_of_a_pass_or_several():
    torch.manual_seed(0)
    assert len(order(_batches(10, 3, None, None))) == 3
    assert len(order(_batches(10, 3, 2, None))) == 2
    several = order(_batches(10, 3, 8, None))
    assert [len(batch) for batch in several] == [3] * 8
    for first in (0, 3):  # within a pass no image comes twice
        assert len({i for batch in several[first : first + 3] for i in batch}) == 9
    assert [len(batch) for batch in order(_batches(2, 3, 2, None))] == [2, 2]


def test_with_a_generator_the_order_does_not_depend_on_what_else_is_drawn():
    def once(draws):
        batches = _batches(6, 2, 6, torch.Generator().manual_seed(5))
        return [(batch.tolist(), torch.rand(draws))[0] for batch in batches]

    assert once(0) == once(7)
    assert once(0)[:3] != once(0)[3:]


def test_a_watcher_sees_every_batch_before_its_step():
    data = load("digits").first(100, 50)
    torch.manual_seed(0)
    model, seen = lenet(8), []
    first = model[0].weight.detach().clone()

    def watch(x, y):
        seen.append((len(x), len(y), torch.equal(model[0].weight, first)))

    fit(model, data, lr=0.1, epochs=range(2), batch_size=32, watch=watch)
    assert seen == [(32, 32, True), *[(32, 32, False)] * 5]


def test_what_is_not_trained_on_is_tested(data):
    split = few(data, 384, 2000)
    assert (len(split.train_x), len(split.test_x)) == (384, 1053 + 360)
    assert torch.equal(split.test_x[:1053], data.train_x[384:])
    assert torch.equal(split.test_y[1053:], data.test_y)
    assert len(few(data, 384, 100).test_x) == 100
