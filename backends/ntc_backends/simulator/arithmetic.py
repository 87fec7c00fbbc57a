"""Integer arithmetic as docs/netlist.md defines it, and exact products of integer matrices by floating point."""

from __future__ import annotations

from typing import Any

import numpy as np

from ntc_backends.simulator.piece import Array

__all__ = ["exact_product", "isqrt", "largest", "round_divide", "round_shift", "row_sum"]


def round_shift(a: Array, shift: int) -> Array:
    """``round(a / 2**shift)``: halves go up."""
    return np.asarray((a + (1 << (shift - 1))) >> shift if shift else a)


def round_divide(a: Array, b: Array | int) -> Array:
    """``round(a / b) = floor((a + floor(b / 2)) / b)``, b > 0."""
    return np.asarray((a + b // 2) // b)


def isqrt(n: Array) -> Array:
    """``floor(sqrt(n))`` of int64, 0 <= n < 2**62."""
    root = np.sqrt(n.astype(np.float64)).astype(np.int64)
    root -= root * root > n
    return root + ((root + 1) * (root + 1) <= n)


def largest(x: Array) -> int:
    """``max |x|``; 0 of an empty array."""
    return max(-int(x.min()), int(x.max()), 0) if x.size else 0


def row_sum(weight: Array, axis: int) -> int:
    """Largest sum of absolute weights, over blocks so that no wide copy of the whole matrix is made."""
    found, moved = 0, np.moveaxis(weight, axis, -1)
    for first in range(0, moved.shape[0], 1024):
        found = max(found, int(np.abs(moved[first : first + 1024].astype(np.int64)).sum(-1).max(initial=0)))
    return found


def exact_product(a: Array, b: Array, bound: int) -> Array:
    """``a @ b`` of integers, int64, exactly: through floating point while it holds every partial sum, else in int64.

    Args:
        a: ``[..., m, k]``.
        b: ``[..., k, n]``.
        bound: ``max sum_k |a_ik b_kj|``, or more.
    """
    dtype: Any = np.float32 if bound < 1 << 24 else np.float64 if bound < 1 << 53 else np.int64
    return np.asarray((a.astype(dtype) @ b.astype(dtype)).astype(np.int64))
