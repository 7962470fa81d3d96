import dataclasses
import html
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from normally import report


class Outline(HTMLParser):
    """Ids, everything that a browser would fetch, and whether all tags are closed."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, text):
        super().__init__()
        self.ids, self.fetched, self.open, self.words = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in {"src", "href", "xlink:href", "srcset", "data", "action"}:
                self.fetched.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def page():
    with report.style():
        panels = []
        for title in ("left", "right"):
            canvas, axes = report.panel("epoch", "loss (nats)", title)
            axes.plot([1, 2, 3], [3, 2, 1], color=report.BLUE)
            axes.fill_between([1, 2, 3], [2, 1, 0], color=report.VERMILLION)
            panels.append(canvas)
    keys = [report.Key("one <b>", report.BLUE), report.Key("two", report.VERMILLION, dashed=True)]
    return report.Page(
        title="Tom & Jerry <script>alert(1)</script>",
        summary="A `code` and **bold** sentence, 1 < 2.",
        badge="The claim holds",
        tone="good",
        cards=[report.Card("label", "1.5 ×", "note", "good")],
        sections=[
            report.Section("First", ["A paragraph.", report.Items(["an item", "`x < y`"])]),
            report.Section("Second", [report.Table(["a", "b"], [["x", "1"], ["y", "2"]], "cap")]),
            report.Section("Third", [report.Figure("curves", panels, "A caption.", keys)]),
        ],
        footer=["The end."],
    )


def test_the_page_is_well_formed_and_fetches_nothing(page):
    text = report.render(page)
    outline = Outline(text)
    assert outline.open == []
    assert outline.fetched
    assert all(address.startswith("#") for address in outline.fetched)
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    # Names of XML vocabularies look like addresses; nothing fetches them.
    rest = re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    assert not re.search(r"https?://", rest)


def test_text_is_literal_but_for_code_and_bold(page):
    text = report.render(page)
    assert "<script>" not in text
    assert "<code>code</code> and <strong>bold</strong> sentence, 1 &lt; 2." in text
    assert "<code>x &lt; y</code>" in text


def test_everything_given_is_on_the_page(page):
    words = " ".join(" ".join(Outline(report.render(page)).words).split())
    for expected in ("Tom & Jerry", "The claim holds", "1.5 ×", "an item", "cap", "A caption.",
                     "one <b>", "two", "epoch", "loss (nats)", "left", "The end."):  # fmt: skip
        assert expected in words


def test_ids_are_unique_and_references_meet_them(page):
    text = report.render(page)
    ids = Outline(text).ids
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^)"]*)', text)) <= set(ids)


def test_figures_follow_the_theme(page):
    figures = report.render(page).partition("<main>")[2]
    assert "currentColor" in figures
    assert "var(--blue)" in figures
    for color in (report.BLUE, report.VERMILLION):
        assert color not in figures


def test_write_puts_the_figures_beside_the_page(page, tmp_path):
    path = report.write(page, tmp_path / "deep" / "page.html")
    assert path.read_text("utf-8") == report.render(page)
    figure = tmp_path / "deep" / "figures" / "curves.svg"
    root = ElementTree.fromstring(figure.read_text("utf-8"))
    assert root.tag.endswith("svg")
    assert len(root.findall("{http://www.w3.org/2000/svg}svg")) == 2
    assert figure.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    assert sorted(p.name for p in path.parent.iterdir()) == ["figures", "page.html"]


def test_the_same_page_gives_the_same_bytes(page):
    assert report.render(page) == report.render(page)


def test_the_smallest_page():
    text = report.render(report.Page("Title", "Summary.", []))
    assert Outline(text).open == []
    assert "<nav" not in text


def test_the_style_does_not_leak():
    import matplotlib

    before = dict(matplotlib.rcParams)
    with report.style():
        assert matplotlib.rcParams["svg.fonttype"] == "none"
    assert dict(matplotlib.rcParams) == before


def test_it_imports_nothing_of_ours():
    source = Path(report.__file__).read_text("utf-8")
    assert not re.search(r"^\s*(from \.|import normally|from normally)", source, re.MULTILINE)


def test_matplotlib_is_not_loaded_for_a_page_without_figures():
    code = (
        "import sys; from normally import report; report.render(report.Page('a', 'b', [])); "
        "assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_entry_has_its_picture_and_its_link():
    entry = report.Entry("A <claim>", "a/b.html", "`x` grows.", "holds", "good", "note", "a/p.svg")
    text = report.render(report.Page("T", "S", [report.Section("Claims", [entry, entry])]))
    outline = Outline(text)
    assert outline.open == []
    assert set(outline.fetched) == {"a/b.html", "a/p.svg"}
    assert "A &lt;claim&gt;" in text
    assert "<code>x</code> grows." in text
    without = report.Entry("A", "a.html", "text")
    assert "<img" not in report.render(report.Page("T", "S", [report.Section("C", [without])]))


def test_code_is_shown_as_it_is_written():
    code = report.Code("a.py", 'x = "<b>" # **not bold** `nor code`', link="a.py")
    text = report.render(report.Page("T", "S", [report.Section("Code", [code])]))
    assert Outline(text).open == []
    shown = text.partition("<pre><code>")[2].partition("</code></pre>")[0]
    assert html.unescape(shown) == code.text


def test_a_long_legend_takes_more_lines(page):
    figure = page.sections[2].content[0]
    many = [report.Key(f"a side with a long name, {i}", report.BLUE) for i in range(6)]
    root = ElementTree.fromstring(
        report.standalone(dataclasses.replace(figure, keys=many, panels=figure.panels[:1]))
    )
    texts = root.findall("{http://www.w3.org/2000/svg}text")
    assert len(texts) == 6
    assert len({text.get("y") for text in texts}) > 1
    # By the letters' average width; no line may leave the drawing.
    ends = [float(text.get("x")) + 6.6 * len(text.text) for text in texts]
    assert max(ends) <= float(root.get("width"))
