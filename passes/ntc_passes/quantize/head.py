r"""The end: whatever the network returns, in units of a power of two, as float32 logits that hold every bit of it.

The largest logit on the calibration text gets twice the room, in 23 bits: float32 holds integers up to ``2**24``. Where the sums of the
last layer are small multiples of a power of two that is no smaller, they are logits as they are, and nothing is rounded or clamped.
"""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from ntc_passes.quantize.fixed_point import EXACT, short_unit
from ntc_passes.quantize.stream import HEADROOM
from ntc_passes.quantize.walk import Work

__all__ = ["head"]

_BITS = 23
_EXPONENTS = -126, 103


def head(work: Work, output: Node) -> None:
    """Return floating-point logits made of the integers of the node that the program returns."""
    (result,) = output.args
    assert isinstance(result, Node)
    value = work[result]
    largest = max(HEADROOM * work.floating.largest[result], 1e-30)
    exponent = min(max(math.ceil(math.log2(largest)) - _BITS, _EXPONENTS[0]), _EXPONENTS[1])
    limit = (1 << _BITS) - 1
    if (unit := short_unit(value.scale)) is not None and exponent <= unit <= _EXPONENTS[1]:
        exponent, limit = unit, EXACT - 1
    logits = work.requantize(result, value, 2.0**exponent, -limit, limit, f"{result.name}_logits", "accumulator")
    node, _ = work.emit(result, torch.ops.ntc.from_integer.default, logits, exponent, name="logits")
    work.notes[result.name + "_logits"] = {"bits": _BITS + 1, "scale": 2.0**exponent}
    output.args = (node,)
