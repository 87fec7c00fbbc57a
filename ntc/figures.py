"""Figures, drawn with matplotlib's objects, without pyplot: nothing global is touched and no window is opened.

The same numbers give the same bytes. Colours are those of Okabe and Ito (2008), which people with any colour vision tell apart;
line styles or markers differ as well.
"""

from __future__ import annotations

import io
import math
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntc.errors import ArtifactError, DataError
from ntc.folders import umask

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

__all__ = [
    "BLACK", "BLUE", "GREEN", "ORANGE", "PURPLE", "SKY", "VERMILION", "Point", "draw_levels", "figure_of", "is_positive", "legend_beside",
    "log_scale", "save_figure", "three_digits", "write_scatter",
]  # fmt: skip

BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
_STYLE: Any = {
    "svg.hashsalt": "ntc", "font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#DDDDDD", "axes.axisbelow": True, "legend.frameon": False, "lines.linewidth": 1.6,
}  # fmt: skip
_DPI = 100


@dataclass(frozen=True)
class Point:
    """One point of a scatter plot.

    Attributes:
        label: Written beside it.
        x: For instance T·r, accumulates per multiply-accumulate.
        y: For instance perplexity.
        group: Points of a group share colour and marker, and a line in the legend.
    """

    label: str
    x: float
    y: float
    group: str = ""


def write_scatter(
    points: Sequence[Point],
    path_without_suffix: str | Path,
    *,
    x_label: str = "T·r: accumulates per multiply-accumulate replaced",
    y_label: str = "perplexity",
    levels: Mapping[str, float | None] | None = None,
    limit: float | None = None,
    join: bool | Collection[str] = False,
) -> tuple[Path, Path]:
    """Draw labelled points as PNG (900 pixels wide) and SVG, y on a logarithmic scale.

    Args:
        points: At least one.
        path_without_suffix: Where to write; ``.png`` and ``.svg`` are appended.
        x_label: Of the x axis, with its unit.
        y_label: Of the y axis, with its unit.
        levels: Horizontal lines by name, such as the original network's perplexity.
        limit: A value of x to stay below, as a vertical line.
        join: Connect the points of each group, or of the groups named, in the order given.

    Returns:
        The two paths.

    Raises:
        DataError: If there is no point, a coordinate is not finite, or a y is not positive.
        ArtifactError: If the files cannot be written.
    """
    if not points:
        raise DataError("there is no point to draw")
    for p in points:
        if not math.isfinite(p.x) or not math.isfinite(p.y) or p.y <= 0:
            raise DataError(f"the point {p.label!r} cannot be drawn: x = {p.x} must be finite, y = {p.y} positive")
    with figure_of(height=5.6) as figure:
        axes = figure.add_subplot()
        styles = zip((BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK) * len(points), "os^Dv<>" * len(points))
        groups = list(dict.fromkeys(p.group for p in points))
        joined = (groups if join else ()) if isinstance(join, bool) else join
        for group, (colour, marker) in zip(groups, styles):
            of = [p for p in points if p.group == group]
            line, (x, y) = "-" if group in joined else "none", zip(*((p.x, p.y) for p in of))
            axes.plot(x, y, linestyle=line, color=colour, marker=marker, markersize=7, label=group or None)
        draw_levels(axes, levels or {})
        if limit is not None:
            axes.axvline(limit, color=BLACK, linewidth=1.2, linestyle=":", label=f"limit {limit:g}")
        axes.margins(0.1)
        log_scale(axes, [p.y for p in points] + [y for y in (levels or {}).values() if is_positive(y)])
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if axes.get_legend_handles_labels()[1]:
            legend_beside(axes)
        _place_labels(figure, axes, points)
        return save_figure(figure, Path(path_without_suffix))


def is_positive(value: float | None) -> bool:
    """Whether a logarithmic scale has a place for it."""
    return value is not None and math.isfinite(value) and value > 0


def draw_levels(axes: Axes, levels: Mapping[str, float | None]) -> None:
    """A horizontal line with its value in the legend for each that is known."""
    for (name, value), (colour, style) in zip(levels.items(), ((BLACK, "--"), (VERMILION, "-."), (GREEN, ":"), (PURPLE, "--")) * 4):
        if value is not None and is_positive(value):
            axes.axhline(value, color=colour, linestyle=style, linewidth=1.4, label=f"{name} ({three_digits(value)})")


def three_digits(value: float) -> str:
    """Three or four digits: what a person compares."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def legend_beside(axes: Axes) -> None:
    """Beside the panel: it hides no line."""
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def log_scale(axes: Axes, values: Sequence[float | None]) -> None:
    """A logarithmic y axis with plain numbers: even steps within a decade, 1-2-5 beyond."""
    from matplotlib import ticker

    there = [v for v in values if v is not None]
    axes.set_yscale("log")
    narrow = max(there) < 10 * min(there)
    axes.yaxis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]) if narrow else ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def _place_labels(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Write each label beside its point where it covers no label, no point and if possible no line."""
    from matplotlib import patheffects

    figure.canvas.draw()  # lays out: before, no one knows where anything is
    frame, taken = axes.get_window_extent(), [_around(*axes.transData.transform((p.x, p.y))) for p in points]
    lines = [line.get_transform().transform_path(line.get_path()) for line in axes.lines if line.get_linestyle() != "None"]
    for p in points:
        best: tuple[float, Any, Bbox] | None = None
        for dx, dy in ((9, 0), (0, 9), (-9, 0), (0, -9), (7, 7), (-7, 7), (7, -7), (-7, -7), (0, 20), (0, -20)):
            text = axes.annotate(
                p.label, (p.x, p.y), (dx, dy), textcoords="offset points", fontsize=10,
                ha="left" if dx > 0 else "right" if dx < 0 else "center", va="bottom" if dy > 0 else "top" if dy < 0 else "center",
            )  # fmt: skip
            text.set_path_effects([patheffects.withStroke(linewidth=3, foreground="white")])
            text.set_in_layout(False)  # else the axes would shrink to make room, and all places with them
            box = text.get_window_extent()
            outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
            cost = 2 * box.count_overlaps(taken) + 4 * outside + any(line.intersects_bbox(box, filled=False) for line in lines)
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost, text, box)
            else:
                text.remove()
        assert best is not None
        taken.append(best[2])


def _around(x: float, y: float) -> Bbox:
    from matplotlib.transforms import Bbox

    return Bbox.from_extents(x - 5, y - 5, x + 5, y + 5)


@contextmanager
def figure_of(height: float) -> Iterator[Figure]:
    """An empty figure, 9 inches wide, in our style whatever the user's matplotlibrc says."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(9, height), dpi=_DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def save_figure(figure: Figure, path: Path) -> tuple[Path, Path]:
    """As PNG and SVG, written beside and renamed; no date and no version inside, so that equal figures are equal bytes."""
    written = []
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
        image = io.BytesIO()
        figure.savefig(image, format=suffix[1:], metadata=metadata)
        target = path.with_name(path.name + suffix)
        _replace(target, image.getvalue())
        written.append(target)
    return written[0], written[1]


def _replace(path: Path, content: bytes) -> None:
    beside: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(beside, 0o666 & ~umask())
        os.replace(beside, path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if beside is not None:
            with suppress(FileNotFoundError):
                os.unlink(beside)
