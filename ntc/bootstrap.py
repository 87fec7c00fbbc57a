r"""Confidence intervals of means over windows, by the percentile bootstrap (Efron 1979; Efron & Tibshirani 1993, chapter 13).

Figures of language models are functions of means over N windows of text, such as ``exp(mean cross entropy)``. The N windows are
drawn anew, N with replacement, R times; the figure of each draw is computed by its own formula, and the interval of level p
lies between the quantiles (1 - p) / 2 and (1 + p) / 2 of the R figures.

All columns share each draw: networks that read the same windows are compared *paired*, so what makes a window hard for
both of them does not widen the interval of their difference. Windows of one text count as independent; the interval says how
much a figure would move on other text of this kind, and nothing about text of another kind.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["FEWEST_WINDOWS", "RESAMPLES", "bootstrap_means", "percentile_interval"]

RESAMPLES = 2000

# Of fewer samples the resampled means lie too close together: the interval would promise more than it holds.
FEWEST_WINDOWS = 8

_COUNTS_AT_ONCE = 1 << 22  # 32 MB of resampling counts


def bootstrap_means(values: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> Tensor:
    """Means over windows that are drawn with replacement.

    Args:
        values: One row per window, one column per quantity, ``[N, M]``.
        resamples: R, number of draws.
        seed: Of the draws; the same seed gives the same windows for every column and every call.

    Returns:
        ``[R, M]`` in float64: row r holds the means of all M quantities over the r-th draw.

    Raises:
        ValueError: If there is no window or no draw.
    """
    windows = len(values)
    if not windows or resamples < 1:
        raise ValueError(f"a bootstrap needs windows and draws, got {windows} windows and {resamples} draws")
    generator = np.random.default_rng(seed)
    share = np.full(windows, 1 / windows)
    data = values.double().numpy()
    parts = []
    for first in range(0, resamples, max(1, _COUNTS_AT_ONCE // windows)):
        rows = min(resamples - first, max(1, _COUNTS_AT_ONCE // windows))
        parts.append(generator.multinomial(windows, share, size=rows) @ data / windows)  # how often each window was drawn
    return torch.from_numpy(np.concatenate(parts))


def percentile_interval(draws: Tensor, level: float = 0.95) -> tuple[float, float]:
    """The interval that holds the middle ``level`` of the draws ``[R]``."""
    low, high = np.quantile(draws.numpy(), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
