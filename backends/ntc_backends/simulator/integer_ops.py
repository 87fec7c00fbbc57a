"""Host ops of the integer grade (docs/integers.md): all in int64, exact, stored as the narrowest of int8, int16 and int32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ntc_backends.simulator.arithmetic import exact_product, isqrt, largest, round_divide, round_shift, row_sum
from ntc_backends.simulator.piece import Array, Piece
from ntc_backends.simulator.trains import requantized

__all__ = ["INTEGER_OPS"]

_PLACES = 16
"""Binary places of a normalised value."""
_COLUMNS = 4096
"""Rows of a weight matrix that are expanded to floating point at a time."""


def _stored(x: Array, low: int, high: int) -> Array:
    """In the narrowest dtype for a range."""
    for dtype in (np.int8, np.int16, np.int32):
        if np.iinfo(dtype).min <= low <= high <= np.iinfo(dtype).max:
            return x.astype(dtype)
    raise ValueError(f"{low} ... {high} is no range that int32 holds")


def _int32(x: Array, what: str) -> Array:
    if largest(x) >= 1 << 31:
        raise ValueError(f"{what} reaches {largest(x)}, which does not fit into int32")
    return x.astype(np.int32)


def _integers(**arrays: Array | None) -> None:
    for name, array in arrays.items():
        if array is not None and not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"{name} holds {array.dtype} and has to hold integers")


def _norm(
    piece: Piece, name: str, x: Array, gain: Array, offset: Array, epsilon: int, guard: int, shift: int, low: int, high: int, centre: bool
) -> Array:
    """LayerNorm (``centre``) or RMSNorm, and the quantization of its result."""
    _integers(x=x, gain=gain, offset=offset)
    d, channels = x.astype(np.int64), x.shape[-1]
    if centre:
        d = d - round_divide(d.sum(-1, keepdims=True), channels)
    v = (d * d).sum(-1, keepdims=True) // channels + epsilon
    root = np.maximum(isqrt(v << (2 * guard)), 1)
    n = round_divide(d << (guard + _PLACES), root)
    y = round_shift(n * gain.astype(np.int64) + offset.astype(np.int64), shift)
    return _stored(np.clip(y, low, high), low, high)


def _linear(piece: Piece, name: str, x: Array, weight: Array, bias: Array | None) -> Array:
    """``sum_c x_c W_oc + b_o``."""
    _integers(x=x, weight=weight, bias=bias)
    rows, bound = x.reshape(-1, weight.shape[1]), largest(x) * row_sum(weight, 1)
    result = np.empty((rows.shape[0], weight.shape[0]), dtype=np.int64)
    for first in range(0, weight.shape[0], _COLUMNS):
        result[:, first : first + _COLUMNS] = exact_product(rows, weight[first : first + _COLUMNS].T, bound)
    if bias is not None:
        result += bias
    return _int32(result.reshape(*x.shape[:-1], -1), "a sum")


def _requantize(piece: Piece, name: str, x: Array, multiplier: Array, shift: int, low: int, high: int) -> Array:
    _integers(x=x, multiplier=multiplier)
    return _stored(requantized(x, multiplier.astype(np.int64), shift, low, high, piece.positions), low, high)


def _lookup(piece: Piece, name: str, x: Array, table: Array, low: int) -> Array:
    """``table[x - low]``; an index out of the table is an error."""
    _integers(x=x, table=table)
    index = x.astype(np.int64) - low
    if index.size and not 0 <= index.min() <= index.max() < len(table):
        raise IndexError(f"{index.min() + low} ... {index.max() + low} is not all in the table, which begins at {low}")
    return np.asarray(table[index])


def _from_integer(piece: Piece, name: str, x: Array, exponent: int) -> Array:
    """``x 2^exponent``, float32: exact."""
    _integers(x=x)
    return x.astype(np.float32) * np.float32(2.0**exponent)


INTEGER_OPS: dict[str, Callable[..., Any]] = {
    "ntc.integer_norm.default": _norm, "ntc.integer_linear.default": _linear, "ntc.requantize.default": _requantize,
    "ntc.integer_lookup.default": _lookup, "ntc.from_integer.default": _from_integer,
}  # fmt: skip
