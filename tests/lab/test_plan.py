import pytest

from normally.lab.plan import core_seconds, plan

from . import toy


def measured(out, seconds, **settings):
    experiment = toy.make()
    experiment.budgets["quick"] = {"seeds": 3, **settings}
    made = plan(experiment, out=out)
    for variant, seed in made.grid:
        made.store.save(variant, seed, {"value": 1.0}, seconds, "this machine")
    return experiment


def test_the_grid_has_whole_seeds_first(tmp_path):
    made = plan(toy.make(), seeds=2, out=tmp_path)
    assert made.grid == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert made.folder == tmp_path / "toy" / "digits-quick"


@pytest.mark.parametrize(
    ("quick", "full", "factor"),
    [
        ({"epochs": 2}, {"epochs": 4}, 2),
        ({"epochs": 2, "train_images": 10}, {"epochs": 2, "train_images": 30}, 3),
        ({"steps": 10, "batch_size": 4}, {"steps": 20, "batch_size": 8}, 4),
    ],
)
def test_another_budget_is_longer_by_the_images_that_it_sees(tmp_path, quick, full, factor):
    experiment = measured(tmp_path, 2.0, **quick)
    experiment.budgets["full"] = {"seeds": 5, **full}
    assert core_seconds(plan(experiment, out=tmp_path)) == 6 * 2.0
    longer = core_seconds(plan(experiment, budget="full", out=tmp_path))
    assert longer == pytest.approx(10 * 2.0 * factor)


def test_without_a_run_nothing_is_known(tmp_path):
    assert core_seconds(plan(toy.make(), out=tmp_path)) is None


def test_data_that_are_not_here_give_way_to_those_that_are(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMALLY_DATA", str(tmp_path))
    experiment = toy.make()
    experiment.data = ("fashion-mnist", "digits")
    assert plan(experiment, out=tmp_path).data == "digits"
    assert plan(experiment, data="fashion-mnist", out=tmp_path).data == "fashion-mnist"
