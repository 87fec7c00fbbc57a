"""Run the calibration text through the program and keep sample activations where neurons may go.

Policy passes after this one read ``node.meta["ntc.stats"]["rows"]`` (a sample of ``[rows, C]`` activations) at the inputs
of every attention and the pre-activation of every GELU or ReLU, and decide thresholds from it. Nothing is rewritten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.errors import PassError
from ntc.meta import STATS
from ntc.ops import SOFTMAX_ATTENTION, aten
from ntc.pipeline import Context, Pass, PassResult
from ntc.program import Program, check_ids, interpret

__all__ = ["Calibrate", "percentile_of", "positive_threshold", "threshold_from"]


@dataclass(frozen=True)
class Options:
    """Options of ``calibrate``.

    Attributes:
        rows: Most tokens kept per site; more make percentiles and fits surer and need more memory. Fewer are kept where the samples of all
            sites would take more than a gibibyte.
        seed: Which tokens are kept.
    """

    rows: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


_MOST_BYTES = 1 << 30


class Calibrate(Pass):
    """Sample activations at every place where a neuron may go."""

    name = "calibrate"
    requires = frozenset({"canonical"})
    provides = frozenset({"calibrated"})
    exact = True
    Options = Options

    def run(self, program: Program, context: Context) -> PassResult:
        """Run every calibration batch once."""
        calibration = context.calibration
        if calibration is None or calibration.tokens == 0:
            raise PassError("calibrate needs calibration text: give --calibration FILE, or a Calibration in the context")
        for batch in calibration.batches:
            check_ids(batch, program.info)
        sites = _sites(program)
        keep = _chosen_rows(calibration.tokens, min(self.options.rows, _rows_in(_MOST_BYTES, sites)), self.options.seed)
        samples: dict[Node, list[Tensor]] = {site: [] for site in sites}
        first = 0
        with torch.no_grad():
            for number, batch in enumerate(calibration.batches):
                context.progress("calibrate", number, len(calibration.batches))
                rows = keep[(keep >= first) & (keep < first + batch.numel())] - first

                def visit(node: Node, args: tuple[Any, ...], value: Any, rows: Tensor = rows) -> None:
                    if node in samples:
                        samples[node].append(value.flatten(0, -2)[rows].clone())

                interpret(program, batch, visit, last=sites[-1] if sites else None)
                first += batch.numel()
        for site, parts in samples.items():
            site.meta[STATS] = {"rows": torch.cat(parts)}
        notes = {"tokens": calibration.tokens, "data": calibration.description, "sha256": calibration.sha256, "rows": len(keep)}
        return PassResult(modified=bool(sites), sites=len(sites), notes=notes)


def _sites(program: Program) -> list[Node]:
    found: dict[Node, None] = {}
    for node in program.graph.nodes:
        if node.target in SOFTMAX_ATTENTION:
            found.update(dict.fromkeys(a for a in node.args[:3] if isinstance(a, Node)))
        elif node.target in (aten.gelu.default, aten.relu.default) and isinstance(node.args[0], Node):
            found[node.args[0]] = None
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    return sorted(found, key=order.__getitem__)


def _rows_in(most: int, sites: list[Node]) -> int:
    """Tokens whose samples at all sites together take so many bytes; at least one."""
    each: int = sum(v.shape[-1] * v.element_size() for v in (site.meta["val"] for site in sites))
    return max(1, most // max(each, 1))


def _chosen_rows(tokens: int, rows: int, seed: int) -> Tensor:
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    return order[:rows].sort().values


def threshold_from(rows: Tensor, percentile: float, signed: bool) -> Tensor:
    """Threshold per channel: the percentile of the activations that the neuron should be able to code.

    Rueckauer et al. 2017 (10.3389/fnins.2017.00682) use the 99 to 99.9th percentile of the positive activations, so that
    a few outliers do not stretch the scale.

    Args:
        rows: Sample activations ``[rows, C]``.
        percentile: In (0, 100].
        signed: Of ``|x|`` for ternary neurons, else of ``max(x, 0)``.

    Returns:
        ``[C]``, positive: a channel that is never active gets a thousandth of the largest threshold, so that it stays
        silent in spite of rounding, not a zero that would fire always.
    """
    values = rows.abs() if signed else rows.clamp(min=0)
    (theta,) = percentile_of(values, percentile)
    return positive_threshold(theta)


def percentile_of(
    rows: Tensor, percentile: float, maps: Iterable[Callable[[Tensor], Tensor]] = (lambda x: x,)
) -> Iterator[Tensor]:
    """Percentile per channel of ``f(rows)`` for monotone maps f, with one sort for all of them.

    Between the two order statistics around the place it interpolates linearly, as numpy does. ``torch.quantile`` would do
    the same, but refuses more than 2**24 values: 4,096 rows of 4,096 channels are too many.

    Args:
        rows: ``[rows, C]``.
        percentile: In (0, 100].
        maps: Functions of tensors, elementwise and not decreasing.

    Yields:
        ``[C]`` for each map.
    """
    place = percentile / 100 * (len(rows) - 1)
    ordered = rows.sort(dim=0).values
    below = int(place)
    low, high = ordered[below], ordered[min(below + 1, len(rows) - 1)]
    for f in maps:
        yield torch.lerp(f(low), f(high), place - below)


def positive_threshold(theta: Tensor) -> Tensor:
    """Raise thresholds ``[C]`` that are zero, or nearly so, to a thousandth of the largest one."""
    return theta.clamp(min=float(theta.max()) * 1e-3 or 1e-3)
