"""Line charts by matplotlib: SVG for web pages, PNG for files; the same bytes for the same numbers."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COLORS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#333333",
)  # safe for colour-blind eyes
DASHES = ("-", "--", ":", "-.")  # a second round of colours is told apart by its dashes


@dataclass(frozen=True, eq=False)
class Line:
    """One curve; `low` and `high` are a band around it. Values that are not finite leave a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    marker: str = ""  # of matplotlib, such as "o"


@dataclass(frozen=True, eq=False)
class Chart:
    """Curves over one pair of axes; `levels` are dotted horizontal lines by name, such as a bound."""

    title: str
    lines: Sequence[Line]
    x: str = ""
    y: str = ""
    levels: Mapping[str, float] = field(default_factory=dict)
    log: bool = False  # logarithmic y axis


def draw_charts(
    charts: Sequence[Chart],
    columns: int = 1,
    size: tuple[float, float] = (6.4, 2.8),
    text: float = 1.0,
    legend: bool = True,
) -> Any:
    """Return a matplotlib Figure with the charts in rows of `columns`.

    `size` is that of one chart in inches, `text` multiplies the size of letters (1: 8 to 10 points). Without
    `legend` whoever shows the figure says which curve is which; `stroke` tells their colours and dashes.
    """
    from matplotlib.figure import Figure

    rows = -(-len(charts) // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for chart, axis in zip(charts, axes, strict=False):
        _fill(axis, chart, text, legend)
    for axis in axes[len(charts) :]:
        axis.set_axis_off()
    return figure


def stroke(number: int) -> tuple[str, str]:
    """Return colour and dash (of matplotlib) of a chart's curve by its number."""
    return COLORS[number % len(COLORS)], DASHES[number // len(COLORS) % len(DASHES)]


def _fill(axis: Any, chart: Chart, text: float, legend: bool) -> None:
    for number, line in enumerate(chart.lines):
        color, dash = stroke(number)
        axis.plot(line.x, line.y, dash, marker=line.marker, ms=4, lw=1.6, color=color, label=line.name)
        if line.low is not None and line.high is not None:
            axis.fill_between(line.x, line.low, line.high, color=color, alpha=0.18, lw=0)
    for number, (name, value) in enumerate(chart.levels.items()):
        axis.axhline(value, color="#888888", ls=(":", "--", "-.")[number % 3], lw=1.2, label=name)
    if chart.log:
        axis.set_yscale("log")
    axis.set_title(chart.title, fontsize=10 * text, loc="left")
    axis.set_xlabel(chart.x, fontsize=9 * text)
    axis.set_ylabel(chart.y, fontsize=9 * text)
    axis.tick_params(labelsize=8 * text)
    _shorten(axis)
    axis.grid(color="#dddddd", lw=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    if legend and len(chart.lines) + len(chart.levels) > 1:
        axis.legend(fontsize=8 * text, frameon=False)


def _shorten(axis: Any) -> None:
    """Numbers of five digits and more as 25k or 1.5M, which do not run into each other."""
    from matplotlib.ticker import EngFormatter

    for line in (axis.xaxis, axis.yaxis):
        if line.get_scale() == "linear" and max(map(abs, line.get_view_interval())) >= 10_000:
            line.set_major_formatter(EngFormatter(sep=""))


def to_svg(figure: Any, salt: str = "foveola") -> str:
    """Return an `<svg>` element that scales with its place; figures of one page need different salts."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none", "font.family": ["sans-serif"]}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    found = re.search(r"<svg\b.*</svg>", text.getvalue(), re.DOTALL)
    assert found is not None
    start, rest = found.group().split(">", 1)
    start = re.sub(r'\s(width|height)="[^"]*"', "", start)
    # ids like "figure_1" and "axes_1" are the same in every figure of matplotlib
    return f'{start} width="100%">' + re.sub(r'(id="|url\(#|href="#)', rf"\1{salt}-", rest)


def save_figure(figure: Any, path: Path) -> Path:
    """Write PNG (at 130 dots an inch) or SVG, as the ending of the path says."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {"Software": None} if path.suffix == ".png" else {"Date": None}
    with matplotlib.rc_context({"svg.hashsalt": "foveola"}):
        figure.savefig(path, dpi=130, metadata=plain)
    return path
