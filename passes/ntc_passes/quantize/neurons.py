r"""Neurons: thresholds and initial potentials in units of the current that comes in.

In front of a constant current the layer's scales go into the thresholds, channel by channel, and nothing is rescaled:
``theta_o / s_o``. The currents behind spiking attention depend on the position, so a ``requantize`` brings them to units in which every
threshold is the same power of two; it is clamped to twice what was seen, at least to what makes a neuron fire at every step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.fx import Node

from ntc.errors import PassError
from ntc.meta import where
from ntc_passes.quantize.fixed_point import nearest
from ntc_passes.quantize.stream import HEADROOM
from ntc_passes.quantize.walk import Constant, Value, Work, rows_of

__all__ = ["THRESHOLD_BITS", "fire"]

THRESHOLD_BITS = 10
"""Of the thresholds behind spiking attention, ``2**10``: the rounding of a current is then a thousandth of a spike."""

_MOST = 1 << 30


def fire(work: Work, node: Node) -> Value:
    """Integer neurons in place of ``integrate_fire``."""
    source, theta, start, steps, signed, is_timed = node.args[:6]
    assert isinstance(source, Node) and isinstance(steps, int)
    current = work[source]
    threshold = work.constant(node, theta, "a threshold")
    potential = work.constant(node, start, "an initial potential") * threshold
    if current.kind == "product":
        current = _as_current(work, current, node, threshold, steps)
    if current.scale.dim() > 1:
        raise AssertionError(f"{where(node)}: a scale per position reaches neurons")
    whole = nearest(threshold / current.scale).clamp(min=1)
    begin = torch.minimum(nearest(potential / current.scale), whole)
    if float(whole.max()) > _MOST:
        raise PassError(
            f"a threshold of {where(node)} is {float(whole.max()):.3g} in units of its current, more than 31 bits: calibrate on more text"
        )
    assert isinstance(theta, Node)
    thresholds = Constant(str(theta.target), whole.to(torch.int32))
    starts = Constant(_start_beside(str(theta.target)), begin.to(torch.int32))
    result, data = work.emit(node, torch.ops.ntc.integer_fire.default, current, thresholds, starts, steps, bool(signed), bool(is_timed))
    work.notes[node.name] = {"threshold": [int(whole.min()), int(whole.max())]}
    return work.noted(Value(result, "train", torch.ones(1, dtype=torch.float64), data, bound=1, steps=steps))


def _start_beside(threshold: str) -> str:
    """``h.0.start`` for ``h.0.threshold``, ``theta_start`` for ``theta``: beside the tensor, for nothing can be below it."""
    owner, point, last = threshold.rpartition(".")
    return owner + point + (last.replace("threshold", "start") if "threshold" in last else f"{last}_start")


def _as_current(work: Work, product: Value, node: Node, threshold: Tensor, steps: int) -> Value:
    scale = (threshold / (1 << THRESHOLD_BITS)).expand(product.data[0].shape[-1])
    seen = float((rows_of(product) / scale).abs().max())
    limit = (1 << math.ceil(math.log2(max(HEADROOM * seen, (steps + 1) << THRESHOLD_BITS)))) - 1
    source = node.args[0]
    assert isinstance(source, Node)
    return work.requantize(source, product, scale, -limit, limit, f"{source.name}_current", "accumulator")
