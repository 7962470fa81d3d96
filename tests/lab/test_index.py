from normally import report
from normally.lab import conclude, index, run

from . import toy


def test_the_index_has_every_result_with_its_verdict_and_picture(tmp_path):
    plain, drawn = toy.make(), toy.make()
    drawn.name = "drawn"

    def present(results):
        canvas, axes = report.panel("x", "y")
        axes.plot([0, 1], [0, 1])
        return [], [report.Section("See", [report.Figure("line", [canvas], "A line.")])]

    drawn.presents(present)
    for experiment in (plain, drawn):
        conclude(experiment, run(experiment, out=tmp_path), out=tmp_path)
    text = index.write(tmp_path).read_text("utf-8")
    for name in ("toy", "drawn"):
        assert f'href="{name}/digits-quick/report.html"' in text
    assert text.count('<div class="badge good">holds</div>') == 2
    assert text.count("<img") == 1
    assert 'src="drawn/digits-quick/picture.svg"' in text
    folder = tmp_path / "drawn" / "digits-quick"
    assert (folder / "picture.svg").is_file()
    assert (folder / "figures" / "line.pdf").is_file()
    assert (folder / "drawn.py").read_text("utf-8").startswith('"""An experiment that costs')
    assert "2 claims" in text


def test_an_unfinished_experiment_is_not_in_the_index(tmp_path):
    run(toy.make(), out=tmp_path, seeds=1)
    assert index.kept(tmp_path) == [("toy", "digits", "quick")]
    assert "0 claims" in index.write(tmp_path).read_text("utf-8")
