"""The one way to make an HTML page, for doctor, lab and bench.

A page is data (`Page`, `Section`, `Table`, `Figure`, …); `render` makes one self-contained HTML
file of it: styles and figures are inside, nothing is fetched. Figures are matplotlib figures made
within `style()`; on the page they become SVG whose ink and series colours follow the reader's
light or dark theme.
"""

from __future__ import annotations

import html
import io
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "ORANGE",
    "PURPLE",
    "VERMILLION",
    "Card",
    "Code",
    "Entry",
    "Figure",
    "Items",
    "Key",
    "Page",
    "Section",
    "Table",
    "panel",
    "render",
    "standalone",
    "style",
    "write",
]

# Okabe & Ito's colours, which the common forms of colour blindness keep apart. The template gives
# each a lighter twin for dark pages.
BLUE = "#0072b2"
VERMILLION = "#d55e00"
GREEN = "#009e73"
PURPLE = "#b8578f"
ORANGE = "#d98e00"
GREY = "#7d8590"
_SERIES = {BLUE: "blue", VERMILLION: "vermillion", GREEN: "green", PURPLE: "purple"}
_SERIES |= {ORANGE: "orange", GREY: "grey"}
_INK = "#1c2128"  # text and axes; `currentColor` on the page
_GRID = "#d0d7de"

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, selectable, and in the page's font
    "svg.hashsalt": "normally",  # the same figure gives the same bytes
    "font.size": 10.5,
    "font.family": "sans-serif",
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.titlecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "savefig.transparent": True,
}


@dataclass(frozen=True)
class Card:
    """One number that matters.

    Args:
        label: what it is.
        value: the number with its unit, or a word.
        note: a line below it.
        tone: "good", "bad", "unsure" or "neutral".
        link: a relative address behind the label.
    """

    label: str
    value: str
    note: str = ""
    tone: str = "neutral"
    link: str = ""


@dataclass(frozen=True)
class Key:
    """One entry of a figure's legend."""

    label: str
    color: str
    dashed: bool = False


@dataclass(frozen=True)
class Figure:
    """One or more panels side by side (below each other on a phone) under one legend.

    Args:
        name: the file name without ending; letters, digits and hyphens.
        panels: matplotlib figures made within `style()`.
        caption: what the reader sees in it; text as in `Section`.
        keys: the legend.
        columns: panels in a row where there is room, 1 to 3.
    """

    name: str
    panels: Sequence[Canvas]
    caption: str
    keys: Sequence[Key] = ()
    columns: int = 3


@dataclass(frozen=True)
class Table:
    """Rows under column heads; numbers come as text, ready to read.

    Args:
        columns: heads, with units.
        rows: one text a column.
        caption: text as in `Section`.
        text_columns: how many columns from the left are words; the others align right.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    text_columns: int = 1


@dataclass(frozen=True)
class Items:
    """A bulleted list; text as in `Section`."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Code:
    """A source file, folded until the reader opens it.

    Args:
        name: the file's.
        text: all of it.
        link: a relative address of the file.
    """

    name: str
    text: str
    link: str = ""


@dataclass(frozen=True)
class Entry:
    """One line of an index: what stands behind a link, with its picture.

    Args:
        title: the link's text.
        link: a relative address.
        text: a sentence, as in `Section`.
        badge: a verdict in a word or three.
        tone: the badge's tone, as in `Card`.
        note: a line below; text as in `Section`.
        picture: a relative address of an image, or nothing.
    """

    title: str
    link: str
    text: str
    badge: str = ""
    tone: str = "neutral"
    note: str = ""
    picture: str = ""


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it.

    A plain string is a paragraph, in which `code` in backticks and **bold** are marked up and all
    else is literal.
    """

    title: str
    content: Sequence[str | Items | Table | Figure | Code | Entry]


@dataclass(frozen=True)
class Page:
    """A whole page.

    Args:
        title: the heading.
        summary: what was found, in a sentence or two.
        sections: the body.
        eyebrow: a short line above the title.
        badge: the verdict beside it, in a word or three.
        tone: the badge's tone, as in `Card`.
        cards: the numbers that matter.
        footer: lines at the end: machine, versions, how to make the page again.
    """

    title: str
    summary: str
    sections: Sequence[Section]
    eyebrow: str = ""
    badge: str = ""
    tone: str = "neutral"
    cards: Sequence[Card] = ()
    footer: Sequence[str] = ()


@contextmanager
def style() -> Iterator[None]:
    """The figures' look; make and draw matplotlib figures within it."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def panel(
    xlabel: str, ylabel: str, title: str = "", *, width: float = 4.3, height: float = 3.0
) -> tuple[Canvas, Axes]:
    """An empty panel with labelled axes; width and height in inches, labels with units."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(width, height), layout="constrained")
    axes = canvas.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    return canvas, axes


def render(page: Page) -> str:
    """The page as one HTML text that fetches nothing."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["marked"] = _marked
    environment.filters["anchor"] = _anchor
    environment.filters["stroke"] = lambda key: _themed(key.color)
    environment.tests["paragraph"] = lambda block: isinstance(block, str)
    environment.globals["inline"] = _inline
    template = resources.files(__package__).joinpath("report.html.j2").read_text("utf-8")
    return environment.from_string(template).render(page=page)


def write(page: Page, path: str | os.PathLike[str], figures: bool = True) -> Path:
    """Write the page, and each of its figures as `figures/<name>.svg` and `.pdf` beside it.

    Args:
        page: the page.
        path: of the HTML file; folders are made.
        figures: False writes the page alone.

    Returns:
        The absolute path of the page. A file is replaced in one step: a reader never meets half.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, render(page))
    for figure in _figures(page) if figures else ():
        folder = path.parent / "figures"
        folder.mkdir(exist_ok=True)
        _replace(folder / f"{figure.name}.svg", standalone(figure))
        _replace(folder / f"{figure.name}.pdf", _pdf(figure))
    return path


def standalone(figure: Figure) -> str:
    """The figure as one SVG file: legend, then the panels in rows, on white."""
    panels = [_svg(canvas) for canvas in figure.panels]
    sizes = [_size(text) for text in panels]
    columns = min(figure.columns, len(panels))
    cell_width = max(width for width, _ in sizes) + 12
    cell_height = max(height for _, height in sizes) + 12
    width = columns * cell_width + 12
    legend, top = _legend(figure.keys, width)
    height = -(-len(panels) // columns) * cell_height + top
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        *legend,
    ]
    for index, text in enumerate(panels):
        row, column = divmod(index, columns)
        place = f'x="{12 + column * cell_width:g}" y="{top + row * cell_height:g}"'
        text = _unique_ids(text, f"{figure.name}-{index}-")
        w, h = sizes[index]
        # matplotlib writes points, which here would count as 4/3 of a unit.
        text = re.sub(r'\bwidth="[^"]*"', f'width="{w:g}"', text, count=1)
        text = re.sub(r'\bheight="[^"]*"', f'height="{h:g}"', text, count=1)
        parts.append(text.replace("<svg ", f"<svg {place} ", 1))
    return "\n".join([*parts, "</svg>", ""])


def _legend(keys: Sequence[Key], width: float) -> tuple[list[str], float]:
    """Elements of a legend in as many lines as it needs, and where it ends."""
    parts, x, y = [], 14.0, 18.0
    for key in keys:
        length = 58 + 6.6 * len(key.label)  # of a letter at this size, on average
        if x > 14 and x + length - 24 > width:
            x, y = 14.0, y + 19
        dash = ' stroke-dasharray="5 3"' if key.dashed else ""
        parts.append(
            f'<path d="M{x:g} {y:g}h24" stroke="{key.color}" stroke-width="2.5"{dash}/>'
            f'<text x="{x + 30:g}" y="{y + 4:g}" font-size="12" font-family="sans-serif" '
            f'fill="{_INK}">{html.escape(key.label)}</text>'
        )
        x += length
    return parts, y + 12 if keys else 6


def _pdf(figure: Figure) -> bytes:
    """The figure for a paper: a page a panel, each with the legend above it."""
    from matplotlib.backends.backend_pdf import PdfPages
    from matplotlib.lines import Line2D

    buffer = io.BytesIO()
    lines = [
        Line2D([], [], color=key.color, linestyle="--" if key.dashed else "-")
        for key in figure.keys
    ]
    labels = [key.label for key in figure.keys]
    with style(), PdfPages(buffer, metadata={"CreationDate": None}) as pages:
        for canvas in figure.panels:
            # Everything stays where it is on the page; the legend stands above, and the canvas
            # grows by it.
            canvas.set_layout_engine("none")
            legend = canvas.legend(lines, labels, loc="lower left", bbox_to_anchor=(0, 1))
            pages.savefig(canvas, bbox_inches="tight", bbox_extra_artists=[legend])
            legend.remove()
    return buffer.getvalue()


def _figures(page: Page) -> list[Figure]:
    blocks = [block for section in page.sections for block in section.content]
    return [block for block in blocks if isinstance(block, Figure)]


def _svg(canvas: Canvas) -> str:
    """The canvas as an `<svg>` element without prologue and metadata."""
    buffer = io.StringIO()
    with style():
        canvas.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text[text.index("<svg ") :].strip()


def _size(svg: str) -> tuple[float, float]:
    found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert found is not None  # matplotlib always writes one
    return float(found[1]), float(found[2])


def _unique_ids(svg: str, prefix: str) -> str:
    """Ids that stay apart when several drawings share a document."""
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", svg)


def _inline(figure: Figure, index: int) -> str:
    """A panel for the page: its ink, colours and font are the page's."""
    import markupsafe

    canvas = figure.panels[index]
    label = ", ".join(filter(None, (axes.get_title("left") for axes in canvas.axes)))
    svg = _unique_ids(_svg(canvas), f"{figure.name}-{index}-")
    svg = re.sub(r'(<svg [^>]*?)\bwidth="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)\bheight="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r"(font: [^;\"]*?\d(?:px|pt)) [^;\"]*", r"\1 var(--font)", svg)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)
    return markupsafe.Markup(_themed(svg))


def _themed(text: str) -> str:
    """Colours replaced by the page's, which differ between light and dark."""
    text = text.replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
    for color, name in _SERIES.items():
        text = text.replace(color, f"var(--{name})")
    return text


def _marked(text: str) -> str:
    import markupsafe

    text = html.escape(text, quote=False)
    text = re.sub(r"(?<=\d) (?=[%×])", "\N{NO-BREAK SPACE}", text)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    return markupsafe.Markup(re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text))


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _replace(path: Path, content: str | bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
    os.chmod(name, 0o644)
    os.replace(name, path)
