"""Charts of an `AttentionAnalysis`: statistics over blocks, each head by itself, how much vectors differ."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foveola.drawing.plots import COLORS, Chart, Line, draw_charts, save_figure, stroke
from foveola.evaluation.attention.result import AttentionAnalysis, EncoderAttention, Vectors
from foveola.evaluation.attention.statistics import BLOCK_STATISTICS, HEAD_STATISTICS, Reference

PLOTTED = (  # of the figure over blocks
    "class_to_class",
    "class_entropy",
    "head_divergence",
    "patch_self",
    "patch_entropy",
    "nmi",
    "distance",
    "class_to_registers",
    "patch_to_registers",
    "patch_norm",
    "outlier_share",
)
OF_HEADS = ("class_entropy", "patch_self", "patch_entropy", "nmi", "distance")
FEW_ENCODERS = 3  # encoders whose spread over heads can still be told apart in one chart


def save_attention_plots(analysis: AttentionAnalysis, folder: str | Path) -> list[Path]:
    """Write `attention.png`, `attention_heads.png` and, with more to compare, `attention_vectors.png`."""
    folder = Path(folder)
    made = [
        save_figure(over_blocks(analysis), folder / "attention.png"),
        save_figure(over_heads(analysis), folder / "attention_heads.png"),
    ]
    groups = [group for group in analysis.vectors if len(group.names) > 1]
    if groups:
        made.append(save_figure(between_vectors(groups), folder / "attention_vectors.png"))
    return made


def over_blocks(analysis: AttentionAnalysis, names: Sequence[str] = PLOTTED, columns: int = 3) -> Any:
    """Return a matplotlib Figure: a chart for each statistic that any encoder has, a line for each encoder.

    Up to three encoders have a band from their lowest to their highest head. Dotted: uniform attention.
    """
    known = HEAD_STATISTICS | BLOCK_STATISTICS
    charts = []
    for name in names:
        having = [e for e in analysis.encoders if np.isfinite(e.blocks[name].mean).any()]
        if not having:
            continue
        lines = [_line(encoder, name, len(having) <= FEW_ENCODERS) for encoder in having]
        uniform = {_reference(encoder, name).uniform for encoder in having}
        level = uniform.pop() if len(uniform) == 1 else None
        charts.append(
            Chart(
                title=known[name].title[:1].upper() + known[name].title[1:],
                lines=lines,
                x="block",
                y=known[name].unit,
                levels={} if level is None else {"uniform": level},
            )
        )
    figure = draw_charts(charts, columns, size=(4.6, 2.9), legend=False)
    _one_legend(figure, [encoder.name for encoder in analysis.encoders])
    return figure


def over_heads(analysis: AttentionAnalysis, names: Sequence[str] = OF_HEADS) -> Any:
    """Return a matplotlib Figure: a row for each encoder, a column for each statistic, a dot for each
    head.
    """
    from matplotlib.figure import Figure

    rows, columns = len(analysis.encoders), len(names)
    figure = Figure(figsize=(2.9 * columns, 0.5 + 2.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex="row", sharey="col")
    for encoder, row in zip(analysis.encoders, axes, strict=True):
        for name, axis in zip(names, row, strict=True):
            _dots(axis, encoder, name)
        row[0].set_ylabel(encoder.name, fontsize=9)
    for name, axis in zip(names, axes[0], strict=True):
        statistic = HEAD_STATISTICS[name]
        axis.set_title(f"{_wrapped(statistic.title)}\n{statistic.unit}", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("block", fontsize=9)
    return figure


def between_vectors(groups: Sequence[Vectors]) -> Any:
    """Return a matplotlib Figure: KL(row || column) of any two vectors of the same grid, in nats."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    sizes = [len(group.names) for group in groups]
    figure = Figure(
        figsize=(3.2 + 0.62 * max(sizes), sum(1.9 + 0.42 * n for n in sizes)), layout="constrained"
    )
    ratios = [4 + n for n in sizes]
    axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for group, axis in zip(groups, axes, strict=True):
        values = group.divergence.mean
        top = max(float(np.quantile(values, 0.95)), 1.0)  # vectors that are nearly the same stay pale
        drawn = axis.imshow(values, cmap="Blues", norm=PowerNorm(0.5, 0, top), aspect="auto")
        figure.colorbar(drawn, ax=axis, label="nats", fraction=0.04, pad=0.02)
        for (row, column), value in np.ndenumerate(values):
            color = "white" if value > 0.4 * top else "#333333"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
        labels = [
            f"{name} (H={h:.2f})" for name, h in zip(group.names, group.entropy.mean.tolist(), strict=True)
        ]
        axis.set_yticks(range(len(labels)), labels, fontsize=8)
        axis.set_xticks(range(len(labels)), group.names, fontsize=8, rotation=40, ha="right")
        rows, columns = group.grid
        axis.set_title(f"KL(row || column) in nats, {rows} x {columns} patches", fontsize=10, loc="left")
        axis.spines[:].set_visible(False)
    return figure


def _line(encoder: EncoderAttention, name: str, band: bool) -> Line:
    mean = encoder.blocks[name].mean
    blocks = list(range(1, len(mean) + 1))
    low = high = None
    if band and name in encoder.heads and encoder.heads[name].mean.shape[1] > 1:
        heads = encoder.heads[name].mean
        low, high = heads.min(axis=1).tolist(), heads.max(axis=1).tolist()
    return Line(encoder.name, blocks, mean.tolist(), low, high, marker="o")


def _reference(encoder: EncoderAttention, name: str) -> Reference:
    return (HEAD_STATISTICS | BLOCK_STATISTICS)[name].reference(encoder.layout)


def _dots(axis: Any, encoder: EncoderAttention, name: str) -> None:
    values = encoder.heads[name].mean
    if not np.isfinite(values).any():
        axis.text(0.5, 0.5, "no class token", transform=axis.transAxes, ha="center", va="center", fontsize=8)
    else:
        blocks, heads = values.shape
        x = np.repeat(np.arange(1, blocks + 1), heads)
        axis.scatter(x, values.flatten(), s=14, color=COLORS[0], alpha=0.5, lw=0)
        axis.plot(np.arange(1, blocks + 1), values.mean(axis=1), lw=1.2, color=COLORS[1])
    uniform = _reference(encoder, name).uniform
    if uniform is not None:
        axis.axhline(uniform, color="#888888", ls=":", lw=1)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.tick_params(labelsize=8)
    axis.grid(color="#dddddd", lw=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _one_legend(figure: Any, names: Iterable[str]) -> None:
    """One legend below the charts; an encoder has the same colour in all of them, also where others lack."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    strokes, levels = {name: stroke(number) for number, name in enumerate(names)}, False
    for axis in figure.axes:
        axis.xaxis.get_major_locator().set_params(integer=True)
        for line in axis.get_lines():
            name = str(line.get_label())
            levels = levels or name == "uniform"
            if name in strokes:
                color, dash = strokes[name]
                line.set(color=color, linestyle=dash)
    handles: list[Any] = [
        Line2D([], [], color=color, ls=dash, marker="o", ms=4, lw=1.6, label=name)
        for name, (color, dash) in strokes.items()
    ]
    if levels:
        handles.append(Line2D([], [], color="#888888", ls=":", lw=1.2, label="uniform attention"))
    if any(axis.collections for axis in figure.axes):
        handles.append(Patch(color="#888888", alpha=0.25, lw=0, label="band: lowest to highest head"))
    ncols = min(5, len(handles))
    figure.legend(handles=handles, loc="outside lower center", ncols=ncols, fontsize=9, frameon=False)


def _wrapped(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, 30))
