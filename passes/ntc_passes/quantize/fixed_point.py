r"""Real factors as integers: a multiplier and a shift, ``f ~ m / 2**shift``.

One shift serves all channels of an op, so the largest factor gets the 30 bits that a multiplier has besides its sign, and a factor
that is a thousandth of it still has 20.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ntc.ops.integer import MOST_SHIFT

__all__ = ["MULTIPLIER_BITS", "fixed_point", "integer_dtype", "nearest", "shift_for"]

MULTIPLIER_BITS = 30
"""Of the largest multiplier, without its sign: with 31 a factor just below a power of two could round up to 2**31."""


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
    return torch.round(factor * 2.0**shift).to(torch.int32), shift


def nearest(x: Tensor) -> Tensor:
    """Rounded as the integer grade rounds: halves go up."""
    return torch.floor(x + 0.5)


def integer_dtype(limit: int) -> torch.dtype:
    """The narrowest of int8, int16 and int32 that holds ``-limit ... limit``."""
    return torch.int8 if limit < 1 << 7 else torch.int16 if limit < 1 << 15 else torch.int32
