"""Scatter plots: every point, label, level and limit in its place."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from ntc import figures
from ntc.errors import DataError
from ntc.figures import Point, write_scatter


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The axes of a figure instead of its files."""
    kept: list[Any] = []
    save = figures.save_figure

    def keep(figure: Any, path: Path) -> tuple[Path, Path]:
        kept[:] = figure.axes
        return save(figure, path)

    monkeypatch.setattr(figures, "save_figure", keep)

    def draw(points: Any, **options: Any) -> list[Any]:
        write_scatter(points, tmp_path / "figure", **options)
        return list(kept)

    return draw


def line(axes: Any, label: str) -> tuple[list[float], list[float]]:
    found = next(line for line in axes.lines if line.get_label().startswith(label))
    return list(found.get_xdata()), list(found.get_ydata())


POINTS = [Point(f"T = {t}", t * slope, 80.0 / t**0.2, group) for group, slope in (("binary", 0.1), ("ternary", 0.2)) for t in (1, 2, 4, 8)]


def test_scatter_shows_points_levels_and_limit(drawn: Any) -> None:
    (axes,) = drawn(POINTS, levels={"original": 68.75, "unknown": None}, limit=0.75, join=True)
    assert line(axes, "binary") == ([0.1, 0.2, 0.4, 0.8], [80.0 / t**0.2 for t in (1, 2, 4, 8)])
    assert line(axes, "ternary")[0] == [0.2, 0.4, 0.8, 1.6]
    assert line(axes, "original (68.8)")[1] == [68.75] * 2
    assert line(axes, "limit 0.75")[0] == [0.75] * 2
    assert len(axes.lines) == 4
    assert [t.get_text() for t in axes.texts] == [p.label for p in POINTS]
    assert [t.xy for t in axes.texts] == [(p.x, p.y) for p in POINTS]
    assert {x.get_linestyle() for x in drawn(POINTS, join=False)[0].lines} == {"None"}
    assert [x.get_linestyle() for x in drawn(POINTS, join=("ternary",))[0].lines] == ["None", "-"]


def test_labels_do_not_cover_each_other_or_points(drawn: Any) -> None:
    points = [Point(f"variant {i}", 0.3 + 0.004 * (i % 4), 80.0 + 0.7 * i) for i in range(12)]
    (axes,) = drawn(points)
    boxes = [t.get_window_extent() for t in axes.texts]
    assert len(boxes) == 12
    assert all(a.count_overlaps(boxes) == 1 for a in boxes)  # itself
    at = axes.transData.transform([(p.x, p.y) for p in points])
    assert not any(box.contains(x, y) for box in boxes for x, y in at)


@pytest.mark.parametrize(("x", "y"), [(math.nan, 1.0), (1.0, 0.0), (1.0, math.inf), (1.0, -3.0)])
def test_scatter_refuses_what_has_no_place(tmp_path: Path, x: float, y: float) -> None:
    with pytest.raises(DataError, match="the point 'here' cannot be drawn"):
        write_scatter([Point("there", 1.0, 1.0), Point("here", x, y)], tmp_path / "figure")
    with pytest.raises(DataError, match="there is no point to draw"):
        write_scatter([], tmp_path / "figure")
