"""Populations: neurons that integrate and fire, step by step (docs/netlist.md has the equations).

A block of neurons that fits the cache goes through all T steps before the next one begins: membranes never travel to memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ntc.errors import BackendError
from ntc_backends import netlist_schema as schema
from ntc_backends.simulator.piece import Array, Constants, Piece, dtype_of

__all__ = ["Population"]

_BLOCK = 1 << 16
"""Membranes at a time."""


class Population:
    """One population of a netlist."""

    def __init__(self, element: schema.Population, current: schema.Port, constants: Constants) -> None:
        self.element = element
        dtype = dtype_of(current)
        if np.issubdtype(dtype, np.integer):
            bits = element.membrane_bits
            dtype = np.dtype(np.int32 if bits is not None and bits <= 32 else np.int64)
        self.dtype = dtype
        self.threshold = self._parameter(constants.number(element.threshold, dtype))
        if not (self.threshold > 0).all():
            raise BackendError(f"a threshold of {element.name} is not above 0")
        self.folded = bool((self.threshold == 1).all())  # into the weights in front
        if element.start is not None:
            self.start = self._parameter(constants.number(element.start, dtype))
        else:
            self.start = self._parameter(constants.number(element.v0, dtype)) * self.threshold
        self.tau = None if element.tau is None else self._parameter(constants.number(element.tau, dtype))

    def _parameter(self, value: Array) -> Array:
        return np.broadcast_to(value.reshape(-1), (self.element.size,))

    def __call__(self, piece: Piece, current: Array) -> Array:
        """Spikes ``[T, B, L, C]``, int8, of a current ``[B, L, C]`` or, timed, ``[T, B, L, C]``."""
        steps, size, timed = self.element.steps, self.element.size, self.element.input == "timed"
        x = current.reshape((steps, -1, size) if timed else (-1, size))
        rows = x.shape[-2]
        spikes = np.empty((steps, rows, size), dtype=np.int8)
        block = max(1, _BLOCK // size)
        for first in range(0, rows, block):
            part = slice(first, min(first + block, rows))
            self._fire(x[..., part, :], spikes[:, part], timed, piece)
        found = spikes.reshape((steps, *current.shape[1 if timed else 0 :]))
        piece.counter.fired(self.element.name, found, piece.before)
        return found

    def _fire(self, x: Array, spikes: Array, timed: bool, piece: Piece) -> None:
        """All steps of some rows, into ``spikes``."""
        e = self.element
        theta: Any = self.dtype.type(1) if self.folded else self.threshold
        v: Array = np.empty(x.shape[-2:], dtype=self.dtype)
        before: Array = self.start  # the membrane's, one row until there is one for each token
        change = np.empty_like(v)
        for t in range(e.steps):
            if e.model == "if":
                np.add(before, x[t] if timed else x, out=v)
            else:
                np.subtract(x[t] if timed else x, before, out=change)
                assert self.tau is not None
                np.divide(change, self.tau, out=change)
                np.add(before, change, out=v)
            before = v
            piece.counter.membrane(e.name, v.min().item(), v.max().item())
            s = spikes[t]
            np.greater_equal(v, theta, out=s.view(np.bool_))
            if e.signed:
                s -= v < 0
            if e.reset == "soft":
                np.copyto(change, s)  # converted first: a product of two dtypes takes twice the time
                if not self.folded:
                    np.multiply(change, theta, out=change)
                np.subtract(v, change, out=v)
            else:
                np.multiply(v, 1 - s, out=v, casting="unsafe")
