"""Projections: what spikes, spike counts or analog vectors become behind a weight matrix.

Work is done per event. All tokens at once, the spikes are a sparse matrix (scipy, CSR) and its product with the weights adds one row of
weights for each of them; step by step, the rows of the neurons that fired are gathered. Where a decode is all that reads the current,
the spikes of a neuron for one token are added up before, since sums commute: one row then serves all steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy import sparse

from ntc_backends import netlist_schema as schema
from ntc_backends.simulator.arithmetic import exact_product, largest, row_sum
from ntc_backends.simulator.piece import Array, Constants, Piece, dtype_of

__all__ = ["Projection"]

_SHARE, _FINDING = 0.09, 10.0
"""Events are worth their own product below a share of ``_SHARE - _FINDING / post``: one costs as much as eleven terms of a dense
product, and finding it among the neurons that did not fire as much as 110 (measured: AVX-512, OpenBLAS, float32)."""
_ROWS = 256
"""Rows of spikes that are expanded to floating point at a time."""
_FEW_ROWS = 2
"""Up to so many, gathering weights costs less than setting up a product."""
_COLUMNS = 1024
"""Columns of integer weights that are."""


class Projection:
    """One projection of a netlist."""

    def __init__(self, element: schema.Projection, constants: Constants) -> None:
        self.element, self.constants = element, constants
        self.dtype = dtype_of(element.outputs.current)
        self.integer = np.issubdtype(self.dtype, np.integer)
        self._row_sum: int | None = None

    @property
    def bias(self) -> Array | None:
        """The bias, in the dtype of the sums."""
        if self.element.bias is None:
            return None
        return self.constants.tensor(self.element.bias).astype(np.int64 if self.integer else self.dtype)

    def __call__(self, piece: Piece, pre: Array) -> Array:
        """The current ``[..., post]`` of values or spikes ``[..., pre]``."""
        e = self.element
        rows = pre.reshape(-1, e.shape[1])
        if e.synapse == "analog":
            piece.counter.add(piece.counter.macs, e.name, rows.shape[0] * e.synapses)
            current = self._dense(rows)
        else:
            # Of counts, each spike is an event: neurons fired at most T times in the same direction.
            events = int(np.abs(rows).sum(dtype=np.int64)) if e.synapse == "counts" else int(np.count_nonzero(rows))
            piece.counter.add(piece.counter.synaptic, e.name, events * e.shape[0])
            current = self._gathered(rows) if piece.stepwise else self._events(rows)
        if self.bias is not None:
            current += self.bias
        return current.astype(self.dtype, copy=False).reshape(*pre.shape[:-1], e.shape[0])

    def decoded(self, piece: Piece, spikes: Array, step_weights: list[int | float]) -> Array:
        """``sum_t step_weights[t] (weight @ spikes[t] + bias)``, ``[B, L, post]``, with one product for all steps."""
        e = self.element
        piece.counter.add(piece.counter.synaptic, e.name, int(np.count_nonzero(spikes)) * e.shape[0])
        uniform = all(w == step_weights[0] for w in step_weights)
        if uniform:
            payload = spikes.sum(0, dtype=np.int8 if len(spikes) < 128 else np.int32)
        else:
            payload = np.tensordot(np.asarray(step_weights, self.dtype), spikes.astype(self.dtype), axes=1)
        value = self._events(payload.reshape(-1, e.shape[1]))
        if uniform:
            value *= self.dtype.type(step_weights[0])
        if self.bias is not None:
            value += self.bias * self.dtype.type(sum(step_weights))
        return value.reshape(*payload.shape[:-1], e.shape[0])

    # Three ways to the same sums.

    def _events(self, rows: Array) -> Array:
        """Sparse where few neurons fired, dense where many did."""
        if rows.shape[0] <= _FEW_ROWS:
            return self._gathered(rows)
        weight = self.constants.by_column(self.element.weight)
        result = np.empty((rows.shape[0], self.element.shape[0]), dtype=np.int64 if self.integer else self.dtype)
        for first in range(0, rows.shape[0], _ROWS):
            part = rows[first : first + _ROWS]
            few = np.count_nonzero(part) < (_SHARE - _FINDING / self.element.shape[0]) * part.size
            dtype, blocks = self._in_floating_point(part)
            left: Any = _sparse(part, dtype) if few else part.astype(dtype)
            for columns in blocks:
                right, out = weight[:, columns].astype(dtype, copy=False), result[first : first + _ROWS, columns]
                if few or self.integer:
                    out[...] = left @ right
                else:
                    np.matmul(left, right, out=out)
        return result

    def _gathered(self, rows: Array) -> Array:
        """Row by row, the weights of the neurons that fired."""
        weight = self.constants.by_column(self.element.weight)
        sums = np.dtype(np.int64) if self.integer else self.dtype
        result = np.empty((rows.shape[0], self.element.shape[0]), dtype=sums)
        for out, row in zip(result, rows, strict=True):
            fired = np.flatnonzero(row)
            payload, weights = row[fired], weight[fired]
            if (payload == 1).all():
                weights.sum(0, dtype=sums, out=out)
            else:
                (weights * payload.astype(sums)[:, None]).sum(0, dtype=sums, out=out)
        return result

    def _dense(self, rows: Array) -> Array:
        weight = self.constants.tensor(self.element.weight)
        if not self.integer:
            return np.asarray(rows.astype(self.dtype, copy=False) @ weight.T)
        result = np.empty((rows.shape[0], self.element.shape[0]), dtype=np.int64)
        bound = largest(rows) * self._weight_sum(weight, 1)
        for first in range(0, weight.shape[0], _COLUMNS):
            result[:, first : first + _COLUMNS] = exact_product(rows, weight[first : first + _COLUMNS].T, bound)
        return result

    def _in_floating_point(self, rows: Array) -> tuple[np.dtype[Any], Iterator[slice]]:
        """A dtype in which the product is exact (of integers) or meant, and the columns to take at a time."""
        post = self.element.shape[0]
        if not self.integer:
            return self.dtype, iter((slice(0, post),))
        bound = largest(rows) * self._weight_sum(self.constants.by_column(self.element.weight), 0)
        dtype: Any = np.float32 if bound < 1 << 24 else np.float64 if bound < 1 << 53 else np.int64
        return np.dtype(dtype), (slice(first, first + _COLUMNS) for first in range(0, post, _COLUMNS))

    def _weight_sum(self, weight: Array, axis: int) -> int:
        if self._row_sum is None:
            self._row_sum = row_sum(weight, axis)
        return self._row_sum


def _sparse(rows: Array, dtype: np.dtype[Any]) -> Any:
    """Rows of spikes as a sparse matrix; faster than scipy finds them."""
    fired = rows != 0
    where = np.flatnonzero(fired)
    ends = np.concatenate([[0], np.count_nonzero(fired, axis=1).cumsum()])
    columns = where - np.repeat(np.arange(len(rows)) * rows.shape[1], np.diff(ends))
    return sparse.csr_array((rows.reshape(-1)[where].astype(dtype), columns, ends), shape=rows.shape)
