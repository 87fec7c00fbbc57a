"""Figures of a fine-tuning run: losses, perplexity and firing rates over tokens; quality against cost.

Drawn with matplotlib's objects, without pyplot: nothing global is touched and no window is opened. The same numbers give the
same bytes. Colours are those of Okabe and Ito (2008), which people with any colour vision tell apart; line styles or markers
differ as well.
"""

from __future__ import annotations

import io
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ntc.errors import ArtifactError, DataError
from ntc.folders import umask

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

__all__ = ["Point", "write_curve", "write_scatter"]

_BLACK, _ORANGE, _SKY, _GREEN, _BLUE, _VERMILION, _PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
_LOSSES = {
    "loss": ("total", _BLACK, "-"), "ce": ("cross entropy", _BLUE, "-"), "kl": ("KL to teacher", _VERMILION, "-"),
    "hidden": ("hidden states", _GREEN, "--"), "rate": ("spike rate", _PURPLE, "-."),
}  # fmt: skip
_ROLES = {
    "q": ("Q", _BLUE, "-"), "k": ("K", _VERMILION, "-"), "v": ("V", _GREEN, "-"), "ssa": ("SSA output", _PURPLE, "--"),
    "ffn": ("FFN", _ORANGE, "-."), "": ("other", _BLACK, ":"),
}  # fmt: skip
_STYLE: Any = {
    "svg.hashsalt": "ntc", "font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#DDDDDD", "axes.axisbelow": True, "legend.frameon": False, "lines.linewidth": 1.6,
}  # fmt: skip
_DPI = 100
_MOST_POINTS = 240  # of a line: neighbours are averaged down to it, which also shows the trend in the noise


def write_curve(rows: Sequence[Mapping[str, Any]], path_without_suffix: str | Path) -> tuple[Path, Path]:
    """Draw a training run as PNG (900 pixels wide) and SVG: one panel each for losses, perplexity and firing rates.

    Args:
        rows: Those of ``training.jsonl``. All keys are optional, a row needs not have those of the others, and a panel without
            numbers is left out. Over ``tokens``, or over ``step`` where no row has tokens:
            ``loss``, ``ce``, ``kl``, ``hidden``, ``rate``: the training loss and its parts;
            ``valid_perplexity``: of the program; ``valid_perplexity_ann``, ``valid_perplexity_tuned``: of the original network,
            and of it after the same fine-tuning, as horizontal lines (the last value counts);
            ``rates``: firing rate by population, whose name ends in its role (``h.0.q``); drawn as the mean of each role.
        path_without_suffix: Where to write; ``.png`` and ``.svg`` are appended.

    Returns:
        The two paths.

    Raises:
        DataError: If the rows hold nothing to draw.
        ArtifactError: If the files cannot be written.
    """
    key = "tokens" if any("tokens" in row for row in rows) else "step"
    x = _column(rows, key)
    losses = {k: v for k in _LOSSES if _drawable(x, v := _column(rows, k))}
    perplexity = _column(rows, "valid_perplexity")
    rates = _rates_by_role(rows, x)
    panels: list[Callable[[Axes], None]] = []
    unit, scale = _unit(key, x)
    if losses:
        panels.append(lambda axes: _draw_losses(axes, x / scale, losses))
    if _drawable(x, perplexity):
        levels = {"original": _last(rows, "valid_perplexity_ann"), "original, tuned": _last(rows, "valid_perplexity_tuned")}
        panels.append(lambda axes: _draw_perplexity(axes, x / scale, perplexity, levels))
    if rates:
        panels.append(lambda axes: _draw_rates(axes, x / scale, rates))
    if not panels:
        raise DataError("the training log has no losses, perplexities or firing rates to draw")
    with _figure(height=0.7 + 2.6 * len(panels)) as figure:
        first: Axes | None = None
        for i, draw in enumerate(panels):
            axes = figure.add_subplot(len(panels), 1, i + 1, sharex=first)
            first = first or axes
            draw(axes)
            axes.label_outer()
        axes.set_xlabel(unit)
        return _save(figure, Path(path_without_suffix))


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
    join: bool = False,
) -> tuple[Path, Path]:
    """Draw labelled points as PNG (900 pixels wide) and SVG, y on a logarithmic scale.

    Args:
        points: At least one.
        path_without_suffix: Where to write; ``.png`` and ``.svg`` are appended.
        x_label: Of the x axis, with its unit.
        y_label: Of the y axis, with its unit.
        levels: Horizontal lines by name, such as the original network's perplexity.
        limit: A value of x to stay below, as a vertical line.
        join: Connect the points of each group in the order given.

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
    with _figure(height=5.6) as figure:
        axes = figure.add_subplot()
        styles = zip((_BLUE, _VERMILION, _GREEN, _PURPLE, _ORANGE, _SKY, _BLACK) * len(points), "os^Dv<>" * len(points))
        for group, (colour, marker) in zip(dict.fromkeys(p.group for p in points), styles):
            of = [p for p in points if p.group == group]
            axes.plot(
                [p.x for p in of], [p.y for p in of], linestyle="-" if join else "none", color=colour, marker=marker, markersize=7,
                label=group or None,
            )  # fmt: skip
        _draw_levels(axes, levels or {})
        if limit is not None:
            axes.axvline(limit, color=_BLACK, linewidth=1.2, linestyle=":", label=f"limit {limit:g}")
        axes.margins(0.1)
        _log_scale(axes, [p.y for p in points] + [y for y in (levels or {}).values() if _positive(y)])
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        _place_labels(figure, axes, points)
        return _save(figure, Path(path_without_suffix))


# ------------------------------------------------------------------------------------------------ numbers


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def _positive(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> NDArray[np.float64]:
    return np.array([_number(row.get(key)) for row in rows], np.float64)


def _last(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    found = [value for value in _column(rows, key) if not math.isnan(value)]
    return float(found[-1]) if found else None


def _drawable(x: NDArray[np.float64], y: NDArray[np.float64]) -> bool:
    return bool((~np.isnan(x) & ~np.isnan(y)).any())


def _rates_by_role(rows: Sequence[Mapping[str, Any]], x: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Mean firing rate of the populations of each role, row by row."""
    roles: dict[str, NDArray[np.float64]] = {}
    for role in _ROLES:
        values = []
        for row in rows:
            rates = [_number(v) for name, v in (row.get("rates") or {}).items() if _role_of(name) == role]
            known = [r for r in rates if not math.isnan(r)]
            values.append(sum(known) / len(known) if known else math.nan)
        column = np.array(values, np.float64)
        if _drawable(x, column):
            roles[role] = column
    return roles


def _role_of(population: str) -> str:
    last = population.rsplit(".", 1)[-1]
    return last if last in _ROLES else ""


def _thinned(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The points that are there, neighbours averaged until there are few enough."""
    there = ~np.isnan(x) & ~np.isnan(y)
    x, y = x[there], y[there]
    groups = min(len(x), _MOST_POINTS)
    return (
        np.array([part.mean() for part in np.array_split(x, groups)]),
        np.array([part.mean() for part in np.array_split(y, groups)]),
    )


def _unit(key: str, x: NDArray[np.float64]) -> tuple[str, float]:
    if key == "step":
        return "step", 1
    top = float(np.nanmax(x)) if not np.isnan(x).all() else 0.0
    for scale, name in ((1e9, "billion tokens"), (1e6, "million tokens"), (1e3, "thousand tokens")):
        if top >= 2 * scale:
            return name, scale
    return "tokens", 1


# ------------------------------------------------------------------------------------------------ panels


def _draw_losses(axes: Axes, x: NDArray[np.float64], losses: Mapping[str, NDArray[np.float64]]) -> None:
    drawn: list[float] = []
    for key, values in losses.items():
        name, colour, style = _LOSSES[key]
        at, mean = _thinned(x, values)
        axes.plot(at, mean, style, color=colour, label=name, marker="o" if len(at) == 1 else None)
        drawn += mean.tolist()
    if min(drawn) > 0 and max(drawn) > 10 * min(drawn):  # parts of very different size, such as cross entropy and hidden states
        _log_scale(axes, drawn)
    axes.set_ylabel("training loss")
    _legend(axes)


def _draw_perplexity(axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], levels: Mapping[str, float | None]) -> None:
    there = ~np.isnan(x) & ~np.isnan(y) & (y > 0)
    x, y = x[there], y[there]
    axes.plot(x, y, "-", color=_BLUE, marker="o" if len(x) <= 60 else None, markersize=4, label=f"spiking ({_three(y[-1])})")
    _draw_levels(axes, levels)
    _log_scale(axes, y.tolist() + [v for v in levels.values() if _positive(v)])
    axes.set_ylabel("validation perplexity")
    _legend(axes)


def _draw_levels(axes: Axes, levels: Mapping[str, float | None]) -> None:
    for (name, value), (colour, style) in zip(levels.items(), ((_BLACK, "--"), (_VERMILION, "-."), (_GREEN, ":"), (_PURPLE, "--")) * 4):
        if value is not None and _positive(value):
            axes.axhline(value, color=colour, linestyle=style, linewidth=1.4, label=f"{name} ({_three(value)})")


def _draw_rates(axes: Axes, x: NDArray[np.float64], rates: Mapping[str, NDArray[np.float64]]) -> None:
    for role, values in rates.items():
        name, colour, style = _ROLES[role]
        at, mean = _thinned(x, values)
        axes.plot(at, mean, style, color=colour, label=f"{name} ({mean[-1]:.2f})", marker="o" if len(at) == 1 else None)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("mean firing rate")
    _legend(axes)


def _three(value: float) -> str:
    """Three or four digits: what a person compares."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _legend(axes: Axes) -> None:
    """Beside the panel: it hides no line."""
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def _log_scale(axes: Axes, values: Sequence[float | None]) -> None:
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


# ------------------------------------------------------------------------------------------------ files


@contextmanager
def _figure(height: float) -> Iterator[Figure]:
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


def _save(figure: Figure, path: Path) -> tuple[Path, Path]:
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
