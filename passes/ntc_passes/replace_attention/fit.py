r"""The output neuron's threshold and the gain: least squares between the T-step spiking result y and softmax attention o.

    g_c = <y_c, o_c> / <y_c, y_c>                          one gain per channel
    g_h = sum_c <y_c, o_c> / sum_c <y_c, y_c>              one gain per head, c its channels

over the calibration text, every site on the analog program's own inputs. Explained variance is ``1 - |g y - o|**2 / |o|**2``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.pipeline import Calibration
from ntc.program import Program, interpret
from ntc_passes.replace_attention.site import Site, threshold_of

__all__ = ["Gain", "fit_gains"]

_ROWS = 4096
"""Most tokens from which the threshold of the output neuron is taken."""


@dataclass(frozen=True)
class Gain:
    """Result of the fit at one site.

    Attributes:
        factor: Per channel, ``[C]`` (equal within a head if one per head was asked for).
        explained: Share of the power of the analog attention that the spiking one explains, at most 1.
    """

    factor: Tensor
    explained: float


class _Sums:
    """Running sums of the least-squares fit at one site."""

    def __init__(self) -> None:
        self.cross: Tensor | float = 0.0  # <y, o> per channel
        self.power: Tensor | float = 0.0  # <y, y> per channel
        self.target = 0.0  # |o|^2

    def see(self, y: Tensor, o: Tensor) -> None:
        self.cross = self.cross + (y * o).sum(0)
        self.power = self.power + (y * y).sum(0)
        self.target += float((o * o).sum())

    def gain(self, heads: int) -> Gain:
        """With one gain per channel (``heads`` = 0) or one for each of so many heads."""
        cross, power = self.cross, self.power
        assert isinstance(cross, Tensor) and isinstance(power, Tensor)
        fitted_cross, fitted_power = cross, power
        if heads:
            size = len(cross) // heads
            fitted_cross, fitted_power = (x.view(heads, size).sum(1).repeat_interleave(size) for x in (cross, power))
        silent = fitted_power <= 0
        factor = torch.where(silent, torch.zeros_like(cross), fitted_cross / fitted_power.clamp(min=1e-30))
        error = self.target - 2 * float((factor * cross).sum()) + float((factor * factor * power).sum())
        return Gain(factor, 1.0 - error / max(self.target, 1e-30))


def fit_gains(
    program: Program, sites: dict[Node, Site], calibration: Calibration, progress: Callable[[int, int], None]
) -> dict[Node, Gain]:
    """Choose output thresholds (from the first batch) and fit the gain of every site; ``progress`` gets (batches done, batches)."""
    sums = {node: _Sums() for node in sites}
    batches = calibration.batches

    def visit(node: Node, args: tuple[Any, ...], value: Any) -> None:
        site = sites.get(node)
        if site is None:
            return
        query, key, attended = args[:3]
        current = site.current(site.trains(query, key, attended), site.leak)
        if site.options.output == "spikes" and site.output_threshold is None:
            rows = current.flatten(0, -2)
            chosen = rows[torch.linspace(0, len(rows) - 1, min(len(rows), _ROWS)).long()]
            site.output_threshold = threshold_of(chosen, site.options.output_percentile, site.options.neuron_of("ssa"))
        sums[node].see(site.result(current).flatten(0, -2).double(), value.flatten(0, -2).double())

    with torch.no_grad():
        for number, batch in enumerate(batches):
            progress(number, len(batches))
            interpret(program, batch, visit, last=list(sites)[-1])
    return {node: sums[node].gain(site.heads if site.options.gain == "head" else 0) for node, site in sites.items()}
