"""Dynamic products: causal spiking attention as a memory M per key head and time step, which spikes write and read.

Many tokens are taken at once: within a stretch of them, ``Y_a = Q_a M + sum_{b <= a} w(a, b) (Q_a . K_b) V_b`` with the weight that the
rule gives a key after some tokens. For one token that is the rule itself.
"""

from __future__ import annotations

import numpy as np

from ntc_backends import netlist_schema as schema
from ntc_backends.simulator.arithmetic import exact_product, largest, round_shift
from ntc_backends.simulator.piece import Array, Constants, Piece, dtype_of

__all__ = ["DynamicProduct"]

_STRETCH = 128
"""Most tokens whose scores are held at once."""


class DynamicProduct:
    """One dynamic product of a netlist. Heads stand in front of tokens inside: ``[T, B, H, L, D]``."""

    def __init__(self, element: schema.DynamicProduct, constants: Constants) -> None:
        self.element = element
        self.dtype = dtype_of(element.outputs.counts)
        self.integer = element.growth is not None
        self.leak = constants.number(element.leak, self.dtype)
        if self.leak is not None:  # one number, [Hk] or [Hk D]: here [Hk, 1] or [Hk, D]
            each = self.leak.size // element.kv_heads or 1
            self.leak = np.broadcast_to(self.leak.reshape(-1, each), (element.kv_heads, each))
        self.growth = constants.number(element.growth, np.dtype(np.int64))
        if self.growth is not None:
            growth = self.growth.reshape(1, -1) if self.growth.ndim < 2 else self.growth
            self.growth = np.broadcast_to(growth, (element.kv_heads, growth.shape[1]))
        renewal = constants.number(element.renewal, np.dtype(np.int64))
        self.renewal = None if renewal is None else renewal.reshape(-1, 1, 1)

    def __call__(self, piece: Piece, query: Array, key: Array, value: Array) -> Array:
        """Counts ``[T, B, L, H Dv]``; M goes on in the state."""
        e = self.element
        q, k, v = self._split(query, e.heads), self._split(key, e.kv_heads), self._split(value, e.kv_heads)
        self._count(piece, q, k, v)
        memory = piece.state.get(e.name)
        if memory is None:
            steps, heads, *sizes = e.state_shape
            memory = np.zeros((steps, piece.batch, heads, *sizes), dtype=np.int64 if self.integer else self.dtype)
        counts = np.empty((*q.shape[:-1], e.value_size), dtype=memory.dtype)
        for part, position in self._stretches(piece):
            counts[..., part, :], memory = self._stretch(q[..., part, :], k[..., part, :], v[..., part, :], memory, position)
        piece.state[e.name] = memory
        merged = np.moveaxis(counts, 2, 3)
        return np.ascontiguousarray(merged).reshape(*query.shape[:-1], -1).astype(self.dtype, copy=False)

    def _stretches(self, piece: Piece) -> list[tuple[slice, int]]:
        """Slices of the piece, and the position of their first token; a renewal begins a new one."""
        period = self.growth.shape[1] if self.growth is not None and self.renewal is not None else _STRETCH
        per_row = self.leak is not None and self.leak.shape[1] > 1
        found, at = [], 0
        while at < piece.length:
            position = piece.before + at
            size = 1 if per_row else min(_STRETCH, period - position % period, piece.length - at)
            found.append((slice(at, at + size), position))
            at += size
        return found

    def _stretch(self, q: Array, k: Array, v: Array, memory: Array, position: int) -> tuple[Array, Array]:
        if self.integer:
            return self._integers(q, k, v, memory, position)
        q, k, v = (x.astype(self.dtype) for x in (q, k, v))
        size = q.shape[-2]
        if self.leak is None:
            scores = np.tril(q @ self._grouped(k).swapaxes(-1, -2))
            return scores @ self._grouped(v) + q @ self._grouped(memory), memory + k.swapaxes(-1, -2) @ v
        if self.leak.shape[1] > 1:  # a leak per row of M, one token
            memory = self.leak[:, :, None] * memory + k.swapaxes(-1, -2) @ v
            return q @ self._grouped(memory), memory
        leak = self.leak[:, :, None]  # [Hk, 1, 1]
        ages = np.arange(size)[:, None] - np.arange(size)
        decay = np.where(ages >= 0, leak ** np.maximum(ages, 0), 0).astype(self.dtype)
        scores = q @ self._grouped(k).swapaxes(-1, -2) * self._grouped(decay)
        kept = (leak ** np.arange(1, size + 1)[:, None]).astype(self.dtype)  # of M, before it is read by each token
        counts = scores @ self._grouped(v) + self._grouped(kept) * (q @ self._grouped(memory))
        grown = k * (leak ** np.arange(size - 1, -1, -1)[:, None]).astype(self.dtype)
        return counts, (leak**size).astype(self.dtype) * memory + grown.swapaxes(-1, -2) @ v

    def _integers(self, q: Array, k: Array, v: Array, memory: Array, position: int) -> tuple[Array, Array]:
        """The lazily leaking rule; exact, so it does not matter where a stretch ends."""
        growth, shift, size = self.growth, self.element.shift, q.shape[-2]
        assert growth is not None and shift is not None
        first = position % growth.shape[1]
        if self.renewal is not None and first == 0 and position:
            memory = round_shift(memory * self.renewal, shift)
        weight = growth[:, first : first + size] if self.renewal is not None else np.broadcast_to(growth, (growth.shape[0], size))
        grown = k.astype(np.int64) * weight[:, :, None]
        width, most = k.shape[-1], largest(grown)
        scores = np.tril(exact_product(q, self._grouped(grown).swapaxes(-1, -2), width * largest(q) * most))
        counts = exact_product(scores, self._grouped(v), size * largest(scores) * largest(v))
        counts += exact_product(q, self._grouped(memory), width * largest(q) * largest(memory))
        return counts, memory + exact_product(grown.swapaxes(-1, -2), v, size * most * largest(v))

    def _split(self, x: Array, heads: int) -> Array:
        return np.moveaxis(x.reshape(*x.shape[:-1], heads, -1), 3, 2)

    def _grouped(self, x: Array) -> Array:
        """Key heads repeated for the query heads that share them; heads are the third axis from the end."""
        groups = self.element.heads // self.element.kv_heads
        return x if groups == 1 else np.repeat(x, groups, axis=-3)

    def _count(self, piece: Piece, q: Array, k: Array, v: Array) -> None:
        """Elements of M written (a key and a value of one step coincide) and read (a query selects a row)."""
        fired = [np.count_nonzero(x, axis=-1) for x in (k, v)]
        operations = int((fired[0] * fired[1]).sum()) + int(np.count_nonzero(q)) * self.element.value_size
        piece.counter.add(piece.counter.synaptic, self.element.name, operations)
