import textwrap

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from normally import cli
from normally.lab import Results, compare, compare_page
from normally.lab.data import load
from normally.lab.verdict import MIN_SEEDS
from normally.nn import BatchNorm2d, GroupNorm

SOURCE = """
    import torch
    from torch import nn

    def model():
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)
        )

    def dense():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))

    def loaders(batch_size):
        x = torch.randn(32, 1, 8, 8)
        batches = list(zip(x.split(batch_size), (x.mean((1, 2, 3)) > 0).long().split(batch_size)))
        return batches, batches

    def nothing():
        return 3

    def triples(batch_size):
        return [(1, 2, 3)], [(1, 2, 3)]
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with the user's module, where the command is called."""
    (tmp_path / "mine.py").write_text(textwrap.dedent(SOURCE), "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(compare.sys.modules, "mine", raising=False)
    yield tmp_path
    compare.sys.modules.pop("mine", None)


def planted(first, other, sizes=(4, 32), seeds=MIN_SEEDS):
    """Results with these final accuracies, a value a batch size each; a list has one a seed."""
    grid = {
        compare_page.variant(norm, size, 0.1): {"norm": norm, "batch_size": size, "lr": 0.1}
        for norm in ("batch", "layer")
        for size in sizes
    }
    records = {}
    for norm, values in (("batch", first), ("layer", other)):
        for size, value in zip(sizes, values, strict=True):
            for seed in range(seeds):
                accuracy = value[seed] if isinstance(value, list) else value
                record = {"test_accuracy": [accuracy], "train_loss": [1.0], "refused": ""}
                records[compare_page.variant(norm, size, 0.1), seed] = record
    return Results(records, load("digits"), {"grid": grid, "epochs": 1}, seeds)


@pytest.mark.parametrize(
    ("results", "status"),
    [
        (planted((0.5, 0.9), (0.8, 0.9)), "holds"),
        (planted((0.9, 0.9), (0.8, 0.9)), "does not hold"),
        (planted((0.5, 0.9), ([0.5, 0.52, 0.5], 0.9)), "inconclusive"),
        (planted((0.5, 0.9), (0.8, 0.9), seeds=2), "inconclusive"),
    ],
)
def test_the_verdict_follows_the_data(results, status):
    assert compare_page.judge(results, compare.MARGIN).status == status


def test_the_sentence_says_above_and_below():
    sentence = compare_page.judge(planted((0.5, 0.9), (0.8, 0.8)), 1.0).sentence
    assert "batch size 4 the best of the others, layer, ends 30 points above batch" in sentence
    assert "batch size 32 the best of the others, layer, ends 10 points below batch" in sentence


def test_the_command_trains_makes_a_page_and_makes_it_again(mine):
    arguments = ["--norms", "batch,none", "--batch-sizes", "1,8", "--lrs", "0.1"]
    arguments += ["--epochs", "1", "--seeds", "1", "--jobs", "1"]
    app = cli.create_app()
    result = CliRunner().invoke(
        app, ["lab", "compare", "mine:dense", "--data", "mine:loaders", *arguments]
    )
    assert result.exit_code == 0, result.output
    page = mine / "runs" / "compare-dense" / "own-compare" / "report.html"
    text = page.read_text("utf-8")
    assert "normally lab compare mine:dense --data mine:loaders --norms batch,none" in text
    assert "epochs 1.</li>" in text  # the grid itself is in the table
    assert "cannot train: Expected more than 1 value per channel" in text
    page.unlink()
    result = CliRunner().invoke(app, ["lab", "report"])
    assert result.exit_code == 0, result.output
    assert page.read_text("utf-8") == text
    assert "compare-dense/own-compare/report.html" in (mine / "runs/index.html").read_text("utf-8")


def test_changed_code_of_the_user_is_another_experiment(mine):
    def digest():
        return compare.make("mine:model", "digits").budgets["compare"]["code"]

    before = digest()
    assert before == digest()
    (mine / "mine.py").write_text(textwrap.dedent(SOURCE) + "\n# other\n", "utf-8")
    assert digest() != before


@pytest.mark.parametrize(
    ("factory", "data", "norms", "message"),
    [
        ("mine:model", "digits", "batch", r"norms must name two or more"),
        ("absent:make", "digits", "batch none", r"module:function that can be imported.*absent"),
        ("mine:absent", "digits", "batch none", r"module:function that can be imported"),
        ("mine:nothing", "digits", "batch none", r"mine:nothing must make a .*Module. Got int"),
        ("mine:model", "mine:triples", "batch none", r"must give batches of \(inputs, labels\)"),
        ("mine:model", "cifar", "batch none", r"data one of digits"),
        ("mine:model", "digits", "batch group:3", r"group"),
        ("mine:model", "digits", "batch bach", r"bach"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(mine, factory, data, norms, message):
    with pytest.raises((ValueError, TypeError), match=message):
        compare.check(compare.make(factory, data, norms=norms.split()))


@pytest.mark.parametrize(
    ("norm", "kind"), [("own", nn.BatchNorm2d), ("batch", BatchNorm2d), ("group:2", GroupNorm)]
)
def test_norms_are_put_into_the_model(mine, norm, kind):
    assert type(compare._model("mine:model", norm)[1]) is kind


def test_rms_norm_of_a_convolution_is_over_the_channels_of_each_position(mine):
    layer = compare._model("mine:model", "rms")[1]
    x = torch.randn(2, 8, 3, 3)
    expected = x / (x.square().mean(1, keepdim=True) + torch.finfo().eps).sqrt()
    assert torch.allclose(layer(x), expected, atol=1e-6)  # unit scale: rounding of float32
