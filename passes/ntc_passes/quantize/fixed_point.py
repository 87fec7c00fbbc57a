r"""Real factors as integers: a multiplier and a shift, ``f ~ m / 2**shift``.

One shift serves all channels of an op, so the largest factor gets the 30 bits that a multiplier has besides its sign, and a factor
that is a thousandth of it still has 20. Multipliers and shift are in lowest terms: factors that are small multiples of one power of two
have multipliers of a few bits. Layers whose results are rescaled and nothing else have such scales where that is cheap
(``short_scales``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ntc.ops.integer import MOST_SHIFT

__all__ = ["EXACT", "MULTIPLIER_BITS", "fixed_point", "integer_dtype", "nearest", "shift_for", "short_scales", "short_unit"]

MULTIPLIER_BITS = 30
"""Of the largest multiplier, without its sign: with 31 a factor just below a power of two could round up to 2**31."""

EXACT = 1 << 24
"""Integers below are exact in float32."""

_MARGIN = 1.05
"""Compensated weights may sum to a little more than those that they stand for, and rescaling adds its half."""

_COARSER = 1.3
"""How many times the squared rounding error of the weights short scales may cost."""

_SHORT_BITS = 12


def shift_for(largest: float, bits: int = MULTIPLIER_BITS) -> int:
    """Largest shift <= 62 with ``largest * 2**shift < 2**bits``; below 0 for a factor that has no such form."""
    if largest <= 0:
        return 0
    _, exponent = math.frexp(largest)  # largest < 2**exponent
    return min(bits - exponent, MOST_SHIFT)


def fixed_point(factor: Tensor, bits: int = MULTIPLIER_BITS) -> tuple[Tensor, int]:
    """Multipliers (int32) and the shift that they share.

    Args:
        factor: Any shape, float64.
        bits: Of the largest.

    Raises:
        ValueError: If a factor is 2**bits or more, or is not finite.
    """
    largest = float(factor.abs().max())
    shift = shift_for(largest, bits)
    if not math.isfinite(largest) or shift < 0:
        raise ValueError(f"a factor of {largest:g} has no multiplier of {bits + 1} bits")
    multiplier = torch.round(factor * 2.0**shift).to(torch.int32)
    while shift > 0 and bool((multiplier != 0).any()) and not bool((multiplier & 1).any()):
        multiplier, shift = multiplier >> 1, shift - 1
    return multiplier, shift


def short_scales(scale: Tensor, most: Tensor) -> Tensor:
    """Scales ``m u`` with small whole m and a power of two u, so that sums times m stay below 2^24; the given ones where that costs much.

    What rescales such sums computes exactly in float32, or with a multiplier of few bits. u is the least with ``most < 2^24 u``, and no
    scale gets smaller, so that no weight is clipped that was not.

    Args:
        scale: Of the sums of each row, positive, ``[O]`` float64.
        most: What the largest sum of each row stands for, ``[O]`` float64.
    """
    unit = 2.0 ** math.ceil(math.log2(max(float(most.max()) * _MARGIN / EXACT, 1e-30)))
    short = torch.where(most > 0, torch.ceil(scale / unit) * unit, unit)
    cheap = short[most > 0].square().sum() <= _COARSER * scale[most > 0].square().sum()
    return short if bool(cheap) else scale


def short_unit(scale: Tensor) -> int | None:
    """Exponent of the largest power of two that scales are multiples of, if they are small ones."""
    exponent = math.frexp(float(scale.max()))[1] - _SHORT_BITS
    whole = scale / 2.0**exponent
    if not bool((whole == whole.round()).all()):
        return None
    while not bool((whole % 2 != 0).any()):
        whole, exponent = whole / 2, exponent + 1
    return exponent


def nearest(x: Tensor) -> Tensor:
    """Rounded as the integer grade rounds: halves go up."""
    return torch.floor(x + 0.5)


def integer_dtype(limit: int) -> torch.dtype:
    """The narrowest of int8, int16 and int32 that holds ``-limit ... limit``."""
    return torch.int8 if limit < 1 << 7 else torch.int16 if limit < 1 << 15 else torch.int32
