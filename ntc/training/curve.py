"""The figure of a fine-tuning run: losses, perplexity and firing rates over tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ntc.errors import DataError
from ntc.figures import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    VERMILION,
    draw_levels,
    figure_of,
    is_positive,
    legend_beside,
    log_scale,
    save_figure,
    three_digits,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["write_curve"]

_LOSSES = {
    "loss": ("total", BLACK, "-"), "ce": ("cross entropy", BLUE, "-"), "kl": ("KL to teacher", VERMILION, "-"),
    "hidden": ("hidden states", GREEN, "--"), "rate": ("spike rate", PURPLE, "-."),
}  # fmt: skip
_ROLES = {
    "q": ("Q", BLUE, "-"), "k": ("K", VERMILION, "-"), "v": ("V", GREEN, "-"), "ssa": ("SSA output", PURPLE, "--"),
    "ffn": ("FFN", ORANGE, "-."), "": ("other", BLACK, ":"),
}  # fmt: skip
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
    with figure_of(height=0.7 + 2.6 * len(panels)) as figure:
        first: Axes | None = None
        for i, draw in enumerate(panels):
            axes = figure.add_subplot(len(panels), 1, i + 1, sharex=first)
            first = first or axes
            draw(axes)
            axes.label_outer()
        axes.set_xlabel(unit)
        return save_figure(figure, Path(path_without_suffix))


# ------------------------------------------------------------------------------------------------ numbers


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


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
        log_scale(axes, drawn)
    axes.set_ylabel("training loss")
    legend_beside(axes)


def _draw_perplexity(axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], levels: Mapping[str, float | None]) -> None:
    there = ~np.isnan(x) & ~np.isnan(y) & (y > 0)
    x, y = x[there], y[there]
    axes.plot(x, y, "-", color=BLUE, marker="o" if len(x) <= 60 else None, markersize=4, label=f"spiking ({three_digits(y[-1])})")
    draw_levels(axes, levels)
    log_scale(axes, y.tolist() + [v for v in levels.values() if is_positive(v)])
    axes.set_ylabel("validation perplexity")
    legend_beside(axes)


def _draw_rates(axes: Axes, x: NDArray[np.float64], rates: Mapping[str, NDArray[np.float64]]) -> None:
    for role, values in rates.items():
        name, colour, style = _ROLES[role]
        at, mean = _thinned(x, values)
        axes.plot(at, mean, style, color=colour, label=f"{name} ({mean[-1]:.2f})", marker="o" if len(at) == 1 else None)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("mean firing rate")
    legend_beside(axes)
