"""Figures: the right numbers in the right panel, equal bytes for equal numbers, whole files or none."""

from __future__ import annotations

import hashlib
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ntc import figures
from ntc.errors import ArtifactError, DataError
from ntc.training import curve
from ntc.training.curve import write_curve

ROWS: list[dict[str, Any]] = [
    {
        "step": i, "tokens": 1000.0 * i, "loss": 2.0 / i, "ce": 4.0 + 1 / i, "kl": 1.0 / i,
        "rates": {"h.0.q": 0.1 * i, "h.1.q": 0.2 * i, "h.0.ffn": 0.3, "relu": 0.05},
        **({"valid_perplexity": 100.0 - i, "valid_perplexity_ann": 68.75, "valid_perplexity_tuned": 66.125} if i % 2 == 0 else {}),
    }
    for i in range(1, 5)
]  # fmt: skip


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The axes of a figure instead of its files."""
    kept: list[Any] = []
    save = curve.save_figure

    def keep(figure: Any, path: Path) -> tuple[Path, Path]:
        kept[:] = figure.axes
        return save(figure, path)

    monkeypatch.setattr(curve, "save_figure", keep)

    def draw(rows: Any) -> list[Any]:
        write_curve(rows, tmp_path / "figure")
        return list(kept)

    return draw


def line(axes: Any, label: str) -> tuple[list[float], list[float]]:
    found = next(line for line in axes.lines if line.get_label().startswith(label))
    return list(found.get_xdata()), list(found.get_ydata())


def test_every_number_in_its_panel(drawn: Any) -> None:
    losses, perplexity, rates = drawn(ROWS)
    x = [1.0, 2.0, 3.0, 4.0]  # thousand tokens
    assert rates.get_xlabel() == "thousand tokens"
    assert line(losses, "total") == (x, [2.0, 1.0, 2 / 3, 0.5])
    assert line(losses, "cross entropy") == (x, [5.0, 4.5, 4 + 1 / 3, 4.25])
    assert line(losses, "KL to teacher") == (x, [1.0, 0.5, 1 / 3, 0.25])
    assert len(losses.lines) == 3
    assert line(perplexity, "spiking (96.0)") == ([2.0, 4.0], [98.0, 96.0])
    assert perplexity.get_yscale() == "log"
    assert line(perplexity, "original (68.8)")[1] == [68.75] * 2
    assert line(perplexity, "original, tuned (66.1)")[1] == [66.125] * 2
    assert line(rates, "Q (0.60)")[1] == pytest.approx([0.15, 0.3, 0.45, 0.6])
    assert line(rates, "FFN (0.30)")[1] == [0.3] * 4
    assert line(rates, "other (0.05)")[1] == [0.05] * 4
    assert len(rates.lines) == 3


def test_what_is_missing_is_left_out(drawn: Any) -> None:
    (perplexity,) = drawn([{"step": 1}, {"step": 2, "valid_perplexity": 50.0, "loss": None}, {"step": 3, "valid_perplexity": math.nan}])
    assert line(perplexity, "spiking") == ([2.0], [50.0])
    assert perplexity.get_xlabel() == "step"
    (losses,) = drawn([{"step": 1, "kl": 1.0}, {"step": 2, "kl": math.inf}, {"step": 3, "kl": 3.0}, {"step": None, "kl": 9.0}])
    assert line(losses, "KL") == ([1.0, 3.0], [1.0, 3.0])
    (rates,) = drawn([{"step": 1, "rates": {"h.0.q": math.nan, "h.1.q": 0.5}}, {"step": 2, "rates": {"h.0.q": math.nan}}])
    assert line(rates, "Q") == ([1.0], [0.5])


def test_noise_is_averaged_and_the_mean_stays(drawn: Any) -> None:
    values = np.random.default_rng(0).normal(5, 1, 1000 * 24)
    (losses,) = drawn([{"step": i, "loss": v} for i, v in enumerate(values)])
    x, y = line(losses, "total")
    assert len(x) == len(y) == 240
    assert y[0] == pytest.approx(values[:100].mean())
    assert x[0] == 49.5
    assert np.mean(y) == pytest.approx(values.mean())


def test_losses_of_very_different_size_get_a_logarithmic_scale(drawn: Any) -> None:
    assert drawn([{"step": 1, "ce": 4.0, "kl": 0.5}])[0].get_yscale() == "linear"
    assert drawn([{"step": 1, "ce": 4.0, "kl": 0.3}])[0].get_yscale() == "log"
    assert drawn([{"step": 1, "ce": 4.0, "kl": 0.0}])[0].get_yscale() == "linear"


@pytest.mark.parametrize(
    ("tokens", "unit", "scale"),
    [(1999, "tokens", 1), (2000, "thousand tokens", 1e3), (2e6, "million tokens", 1e6), (3e9, "billion tokens", 1e9)],
)
def test_unit_of_the_tokens(drawn: Any, tokens: float, unit: str, scale: float) -> None:
    (axes,) = drawn([{"tokens": tokens, "loss": 1.0}])
    assert axes.get_xlabel() == unit
    assert line(axes, "total")[0] == [tokens / scale]


def test_perplexities_across_decades_have_readable_ticks(drawn: Any) -> None:
    (axes,) = drawn([{"step": 1, "valid_perplexity": 5000.0}, {"step": 2, "valid_perplexity": 60.0}])
    shown = {t.get_text() for t in axes.get_yticklabels()}
    assert {"100", "200", "500", "1,000", "2,000", "5,000"} <= shown
    (axes,) = drawn([{"step": 1, "valid_perplexity": 61.0}, {"step": 2, "valid_perplexity": 60.0}])
    low, high = axes.get_ylim()
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 3


def test_equal_numbers_give_equal_bytes_900_pixels_wide(tmp_path: Path) -> None:
    """In another process with another hash seed and a matplotlibrc of its own."""
    png, svg = write_curve(ROWS, tmp_path / "a.b")
    assert (png.name, svg.name) == ("a.b.png", "a.b.svg")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.b.png", "a.b.svg"]
    width, height = struct.unpack(">II", png.read_bytes()[16:24])
    assert (width, height) == (900, 850)
    (tmp_path / "matplotlibrc").write_text("font.size: 30\nsavefig.dpi: 30\nlines.linewidth: 9\n")
    code = (
        "import sys; sys.path[:0] = [sys.argv[1]]; from test_curve import ROWS\nfrom ntc.training.curve import write_curve\n"
        "write_curve(ROWS, sys.argv[2])\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77", "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"), "SOURCE_DATE_EPOCH": "0"}
    subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "again")], check=True, env=environment)
    for path in (png, svg):
        assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256((tmp_path / f"again{path.suffix}").read_bytes()).digest()
    write_curve(ROWS[:3], tmp_path / "other")
    assert (tmp_path / "other.svg").read_bytes() != svg.read_bytes()


def test_the_users_settings_of_matplotlib_stay(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    write_curve(ROWS, tmp_path / "figure")
    assert dict(matplotlib.rcParams) == before


def test_nothing_to_draw(tmp_path: Path) -> None:
    for rows in ([], [{"step": 1, "lr": 1e-3}], [{"loss": 1.0}], [{"step": 1, "loss": math.nan}], [{"step": 1, "rates": {}}]):
        with pytest.raises(DataError, match="no losses, perplexities or firing rates to draw"):
            write_curve(rows, tmp_path / "figure")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"cannot write .*file/figure.png: (Not a directory|File exists)"):
        write_curve(ROWS, tmp_path / "file" / "figure")
    write_curve(ROWS, tmp_path / "new" / "figure")
    whole = (tmp_path / "new" / "figure.png").read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figures.os, "replace", full)
    with pytest.raises(ArtifactError, match=r"figure.png: No space left on device"):
        write_curve(ROWS[:2], tmp_path / "new" / "figure")
    assert (tmp_path / "new" / "figure.png").read_bytes() == whole
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["figure.png", "figure.svg"]
