"""Confidence intervals: they cover what they say, and follow normal theory where that holds."""

from __future__ import annotations

import math

import pytest
import torch

from ntc import bootstrap
from ntc.bootstrap import bootstrap_means, percentile_interval


def noise(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covered(draws: torch.Tensor, truth: float, level: float = 0.95) -> float:
    """Share of the columns whose interval holds the truth."""
    intervals = [percentile_interval(column, level) for column in draws.unbind(1)]
    return sum(low <= truth <= high for low, high in intervals) / len(intervals)


@pytest.mark.parametrize(("level", "least", "most"), [(0.95, 0.90, 0.98), (0.8, 0.73, 0.85)])
def test_intervals_cover_the_true_mean(level: float, least: float, most: float) -> None:
    """600 texts of 40 windows each, from a distribution whose mean is known: 95 % intervals hold it in about 95 % of them."""
    assert least < covered(bootstrap_means(4 + 0.7 * noise(40, 600), 600), 4.0, level) < most
    skewed = -(noise(40, 600).erf() / 2 + 0.5).clamp(1e-9).log()  # as losses are
    truth = float(-(noise(10**6, seed=9).erf() / 2 + 0.5).clamp(1e-9).log().mean())
    assert least - 0.05 < covered(bootstrap_means(skewed, 600), truth, level) < most


def test_intervals_cover_a_ratio_of_perplexities() -> None:
    """Two networks on the same windows, the second 5 % worse; some windows are much harder than others, for both."""
    hardness = 4 + 0.7 * noise(40, 300)
    worse = hardness + math.log(1.05) + 0.02 * noise(40, 300, seed=4)
    draws = bootstrap_means(torch.cat([hardness, worse], 1), 600)
    change = draws[:, 300:].exp() / draws[:, :300].exp() - 1
    assert 0.88 < covered(change, 0.05) < 0.99
    low, high = percentile_interval(change[:, 0])
    alone = percentile_interval(draws[:, 300].exp() / math.exp(4.0) - 1)
    assert high - low < (alone[1] - alone[0]) / 10, "what is hard for both must not widen the interval of their difference"


def test_an_interval_of_many_windows_is_that_of_normal_theory() -> None:
    values = noise(1000, 1)
    low, high = percentile_interval(bootstrap_means(values, 4000)[:, 0])
    half = 1.959964 * float(values.std()) / math.sqrt(1000)
    assert (low, high) == pytest.approx((float(values.mean()) - half, float(values.mean()) + half), abs=0.06 * half)


def test_a_constant_has_no_width_and_a_seed_no_chance() -> None:
    values = torch.stack([torch.full((9,), 3.0), torch.arange(9.0)], 1)
    draws = bootstrap_means(values, 50, seed=5)
    assert percentile_interval(draws[:, 0]) == pytest.approx((3, 3), abs=1e-12)
    assert torch.equal(draws, bootstrap_means(values, 50, seed=5))
    assert not torch.equal(draws, bootstrap_means(values, 50, seed=6))
    assert draws[:, 1].min() >= 0 and draws[:, 1].max() <= 8
    assert torch.allclose(draws[:, 1] * 9, (draws[:, 1] * 9).round(), atol=1e-9), "each draw is a mean of nine of the windows"


def test_many_windows_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = noise(7, 2)
    whole = bootstrap_means(values, 10)
    monkeypatch.setattr(bootstrap, "_COUNTS_AT_ONCE", 21)
    assert torch.allclose(bootstrap_means(values, 10), whole)


@pytest.mark.parametrize(("windows", "draws"), [(0, 10), (5, 0)])
def test_nothing_to_draw(windows: int, draws: int) -> None:
    with pytest.raises(ValueError, match=f"{windows} windows and {draws} draws"):
        bootstrap_means(torch.zeros(windows, 1), draws)
