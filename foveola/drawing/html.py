"""Pieces of a self-contained web page: text is escaped, images and charts are inside it."""

import base64
import io
import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from string import Template

from PIL import Image

from foveola.drawing.plots import Chart, draw_charts, stroke, to_svg
from foveola.drawing.sheet import Bar, Pixels, Sheet, shrunk

CHART = 3.5, 2.1  # inches; with TEXT its letters are 12 pixels high on a phone
TEXT = 1.22
SVG_DASHES = {"-": "", "--": "6 4", ":": "2 3", "-.": "7 3 2 3"}
LEVEL_DASHES = "2 3", "6 4", "7 3 2 3"  # dashes of the levels of a chart, as `plots` draws them
PNG_UP_TO = 30_000  # bytes; a larger image becomes a JPEG
ON_A_PHONE = 4  # columns that do not fit the width of a phone
LARGEST_TILE = 256  # pixels that a side of a tile has at most: twice what is shown, for sharp screens

PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="$generator">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
$style
</style>
</head>
<body>
$body
</body>
</html>
""")


def page(title: str, body: str, generator: str) -> str:
    """Return a whole page; `body` is HTML, the rest is text."""
    style = (resources.files("foveola") / "drawing" / "page.css").read_text(encoding="utf-8")
    return PAGE.substitute(title=escape(title), body=body, generator=escape(generator), style=style)


def tag(name: str, inner: str, kind: str = "", **attributes: str) -> str:
    """Return an element around HTML; attributes are text."""
    pairs = ({"class": kind} if kind else {}) | attributes
    words = "".join(f' {key.replace("_", "-")}="{escape(value)}"' for key, value in pairs.items())
    return f"<{name}{words}>{inner}</{name}>"


def paragraph(text: str, kind: str = "") -> str:
    return tag("p", escape(text), kind)


def items(texts: Iterable[str], kind: str = "") -> str:
    """Return a list of texts; nothing for none."""
    found = "".join(tag("li", escape(text)) for text in texts)
    return tag("ul", found, kind) if found else ""


def chip(state: str) -> str:
    """Return a coloured word."""
    return tag("span", escape(state), f"chip {state.lower().replace(' ', '-')}")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Return a table that scrolls in its own box. Cells are HTML; the first of each row names it."""
    heads = "".join(tag("th", cell, scope="col") for cell in head)
    lines = "".join(
        tag("tr", tag("th", row[0], scope="row") + "".join(tag("td", cell) for cell in row[1:]))
        for row in rows
    )
    inner = tag("thead", tag("tr", heads)) + tag("tbody", lines)
    columns = len(head) + (kind == "wrap")  # whose columns are wide
    return scroll(tag("table", inner, kind), "table", columns)


def scroll(inner: str, name: str, columns: int = 1) -> str:
    """Return HTML in a box of its own that scrolls sideways, also by keyboard; `name` says what is in it.

    From ON_A_PHONE columns on, a line above says on narrow screens that there is more to the right.
    """
    hint = paragraph("Scroll this sideways to see all columns.", "hint") if columns >= ON_A_PHONE else ""
    return hint + tag("div", inner, "scroll", tabindex="0", role="region", aria_label=name)


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Return names and values, as a list that stacks on a phone; both are text."""
    inner = "".join(tag("div", tag("dt", escape(name)) + tag("dd", escape(value))) for name, value in pairs)
    return tag("dl", inner, "facts")


def code(text: str) -> str:
    return tag("pre", tag("code", escape(text)), tabindex="0")


def folded(summary: str, inner: str) -> str:
    """Return HTML that opens on a click."""
    return tag("details", tag("summary", escape(summary)) + inner)


def section(name: str, title: str, *parts: str) -> str:
    """Return a part of the page that links can point at."""
    return tag("section", tag("h2", escape(title)) + "\n".join(filter(None, parts)), id=name)


def image(pixels: Pixels, alt: str, width: int | None = None) -> str:
    """Return an image as a data URI, PNG or, where that is large, JPEG."""
    size = {"width": str(width or pixels.shape[1]), "height": str(_height(pixels, width))}
    words = "".join(f' {key}="{value}"' for key, value in size.items())
    return f'<img src="{data_uri(pixels)}" alt="{escape(alt)}"{words}>'


def data_uri(pixels: Pixels) -> str:
    """Return `data:image/...;base64,...` of pixels."""
    kinds = (("png", {}), ("jpeg", {"quality": 88, "subsampling": 0}))
    written: bytes = b""
    for kind, options in kinds:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind, **options)
        written = file.getvalue()
        if kind == "jpeg" or len(written) <= PNG_UP_TO:
            return f"data:image/{kind};base64,{base64.b64encode(written).decode('ascii')}"
    raise AssertionError("the last kind is always taken")


def _height(pixels: Pixels, width: int | None) -> int:
    return pixels.shape[0] if width is None else round(pixels.shape[0] * width / pixels.shape[1])


def sheet(drawn: Sheet, names: Sequence[str] = (), kind: str = "") -> str:
    """Return tiles of a sheet as a table of images; `names` of its rows go into the alternative texts."""
    head = tag("tr", "".join(tag("th", escape(column), scope="col") for column in drawn.columns))
    lines = []
    for number, row in enumerate(drawn.rows):
        name = row.title or (names[number] if number < len(names) else f"row {number + 1}")
        cells = []
        for index, tile in enumerate(row.tiles):
            caption = row.captions[index] if index < len(row.captions) else ""
            right = row.right[index] if index < len(row.right) else None
            what = drawn.columns[index] if index < len(drawn.columns) else caption
            frame = "" if right is None else "right" if right else "wrong"
            description = f"{drawn.title}: {what} of {name}" + (f", {caption}" if caption else "")
            mark = "" if right is None else ("✓ " if right else "✗ ")
            below = tag("span", escape(mark + caption), "caption") if caption else ""
            cells.append(tag("td", image(shrunk(tile, LARGEST_TILE), description) + below, frame))
        title = tag("th", escape(row.title), "name", scope="row") if any(r.title for r in drawn.rows) else ""
        lines.append(tag("tr", title + "".join(cells)))
    if any(row.title for row in drawn.rows):
        head = head.replace("<tr>", "<tr><td></td>", 1)
    inner = tag("table", tag("thead", head) + tag("tbody", "".join(lines)), "tiles")
    note = paragraph(drawn.note, "note") if drawn.note else ""
    below = (bar(drawn.bar) if drawn.bar else "") + note
    wide = max((len(row.tiles) for row in drawn.rows), default=0)
    tiles = scroll(inner, drawn.title, wide)
    return tag("div", tag("h3", escape(drawn.title)) + tiles + below, f"sheet {kind}".strip())


def bar(drawn: Bar) -> str:
    """Return what colours mean: a strip with its marks below."""
    description = f"colours from {drawn.marks[0][1]} to {drawn.marks[-1][1]}"
    size = f'width="{drawn.colors.shape[1]}" height="12"'
    strip = f'<img src="{data_uri(drawn.colors)}" alt="{escape(description)}" {size}>'
    marks = "".join(
        tag(
            "span",
            escape(text),
            style=f"left: {100 * fraction:.1f}%; transform: translateX(-{100 * fraction:.0f}%)",
        )
        for fraction, text in drawn.marks
    )
    return tag("div", strip + tag("div", marks, "marks"), "bar")


def chart(drawn: Chart, salt: str, lines: bool = True) -> str:
    """Return a chart with its title and legend as text beside it, so that both wrap and stay readable.

    Without `lines` the legend names levels alone, for charts that share their curves' names.
    """
    plain = Chart("", drawn.lines, drawn.x, drawn.y, drawn.levels, drawn.log)
    svg = to_svg(draw_charts([plain], size=CHART, text=TEXT, legend=False), salt)
    description = (
        f"{drawn.title}: {', '.join(line.name for line in drawn.lines if len(line.x))} over {drawn.x}"
    )
    svg = re.sub(r"^<svg", lambda _: f'<svg role="img" aria-label="{escape(description)}"', svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    keys = _keys([line.name for line in drawn.lines]) if lines and len(drawn.lines) > 1 else []
    keys += [_key(name, "#888888", LEVEL_DASHES[n % 3]) for n, name in enumerate(drawn.levels)]
    legend = tag("div", "".join(keys), "legend") if keys else ""
    return tag("figure", tag("figcaption", escape(drawn.title)) + legend + svg, "chart")


def _keys(names: Sequence[str]) -> list[str]:
    """Curves of a legend, in the order of a chart's."""
    strokes = [stroke(number) for number in range(len(names))]
    return [_key(name, color, SVG_DASHES[dash]) for name, (color, dash) in zip(names, strokes, strict=True)]


def _key(name: str, color: str, dash: str) -> str:
    style = f"stroke: {color}; stroke-width: 2.4; stroke-dasharray: {dash or 'none'}"
    line = f'<line x1="0" y1="5" x2="22" y2="5" style="{style}"/>'
    mark = f'<svg viewBox="0 0 22 10" width="22" height="10" aria-hidden="true">{line}</svg>'
    return tag("span", mark + escape(name))


def charts(drawn: Sequence[Chart], salt: str, names: Sequence[str] = ()) -> str:
    """Return charts side by side, as many as there is room for; `names`: a legend that all of them share."""
    inner = "".join(chart(each, f"{salt}{number}", not names) for number, each in enumerate(drawn))
    legend = tag("div", "".join(_keys(names)), "legend shared") if names and drawn else ""
    return legend + tag("div", inner, "charts")
