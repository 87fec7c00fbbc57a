"""Scales and decodes: gains on trains, and from trains back to values."""

from __future__ import annotations

import numpy as np

from ntc_backends import netlist_schema as schema
from ntc_backends.simulator.arithmetic import round_shift
from ntc_backends.simulator.piece import Array, Constants, Piece, dtype_of

__all__ = ["Decode", "Scale", "requantized"]


class Scale:
    """One scale of a netlist."""

    def __init__(self, element: schema.Scale, constants: Constants) -> None:
        self.element = element
        self.dtype = dtype_of(element.outputs.train)
        self.factor = constants.number(element.factor, self.dtype)
        self.multiplier = constants.number(element.multiplier, np.dtype(np.int64))

    def __call__(self, piece: Piece, train: Array, query: Array | None = None, key: Array | None = None) -> Array:
        """The scaled train ``[T, B, L, C]``."""
        e = self.element
        if e.kind == "requantize":
            assert e.shift is not None and e.low is not None and e.high is not None and self.multiplier is not None
            return requantized(train, self.multiplier, e.shift, e.low, e.high, piece.positions).astype(self.dtype)
        x = train.astype(self.dtype, copy=False)
        if e.kind == "constant":
            return np.asarray(x * self.factor, dtype=self.dtype)
        if e.kind == "position":
            return np.asarray(x / (piece.positions + 1).astype(self.dtype)[:, None])
        assert e.heads is not None
        heads = x.reshape(*x.shape[:-1], e.heads, -1)
        if e.kind == "table":
            factor = self.factor[:, piece.positions].T  # [L, H]
            return np.asarray((heads * factor[:, :, None]).reshape(x.shape))
        if e.kind == "rms":
            mean = heads.mean(0)
            divisor = np.sqrt((mean * mean).mean(-1) + self.dtype.type(e.eps or 0))
        else:
            assert query is not None and key is not None
            divisor = self._row_sums(piece, query, key)
        return np.asarray((heads / divisor[..., None]).reshape(x.shape))

    def _row_sums(self, piece: Piece, query: Array, key: Array) -> Array:
        """``max(abs(z), 1)`` of each token and head, ``[B, L, H]``: a counter per key channel goes on in the state."""
        e = self.element
        assert e.heads is not None and e.kv_heads is not None
        written = key.cumsum(2, dtype=self.dtype)
        if e.name in piece.state:
            written += piece.state[e.name]
        piece.state[e.name] = written[:, :, -1:]
        counters = written.reshape(*written.shape[:-1], e.kv_heads, -1)
        counters = np.repeat(counters, e.heads // e.kv_heads, axis=-2)
        queries = query.reshape(*query.shape[:-1], e.heads, -1).astype(self.dtype)
        z = np.einsum("tblhd,tblhd->blh", queries, counters) / self.dtype.type(query.shape[0])
        return np.asarray(np.maximum(np.abs(z), 1))


class Decode:
    """One decode of a netlist."""

    def __init__(self, element: schema.Decode) -> None:
        self.element = element
        self.dtype = dtype_of(element.outputs.value)

    def __call__(self, train: Array) -> Array:
        """The value ``[B, L, C]`` of a train ``[T, B, L, C]``."""
        e = self.element
        if np.issubdtype(self.dtype, np.integer):
            return np.asarray(train.sum(0, dtype=np.int64), dtype=self.dtype)
        if e.code == "rate":  # a sum divided by T, which for T = 3 is not the sum of thirds
            return np.asarray(train.sum(0, dtype=self.dtype) / self.dtype.type(len(train)))
        return np.asarray(np.tensordot(np.asarray(e.step_weights, self.dtype), train.astype(self.dtype, copy=False), axes=1))


def requantized(x: Array, multiplier: Array, shift: int, low: int, high: int, positions: Array) -> Array:
    """``clamp(round(x m / 2^shift), low, high)``, int64; a multiplier ``[R, C]`` goes by position mod R."""
    if multiplier.ndim == 2:
        multiplier = multiplier[positions % multiplier.shape[0]]
    return np.clip(round_shift(x.astype(np.int64) * multiplier, shift), low, high)
