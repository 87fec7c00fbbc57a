"""The attention of host islands: softmax attention with the keys and values of all tokens so far as its state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ntc_backends.simulator.piece import Array, Piece

__all__ = ["ATTENTION_OPS", "softmax"]


def softmax(x: Array, axis: int) -> Array:
    """``exp(x) / sum exp(x)``, of the differences to the largest, which are the same and do not overflow."""
    grown = np.exp(x - x.max(axis, keepdims=True))
    return np.asarray(grown / grown.sum(axis, keepdims=True))


def _attention(
    piece: Piece, name: str, query: Array, key: Array, value: Array, heads: int, kv_heads: int, scale: float
) -> Array:
    """``softmax_j(scale q_i . k_j) v_j`` over j <= i, per head of consecutive channels."""
    if name in piece.state:
        key, value = (np.concatenate(pair, axis=1) for pair in zip(piece.state[name], (key, value), strict=True))
    piece.state[name] = (key, value)
    q, k, v = _split(query, heads), _split(key, kv_heads), _split(value, kv_heads)
    k, v = (np.repeat(x, heads // kv_heads, axis=1) for x in (k, v))
    scores = q @ k.swapaxes(-1, -2) * query.dtype.type(scale)
    future = np.arange(k.shape[-2]) > piece.positions[:, None]
    scores[..., future] = -np.inf
    return np.moveaxis(softmax(scores, -1) @ v, 1, 2).reshape(*query.shape[:-1], -1)


def _split(x: Array, heads: int) -> Array:
    return np.moveaxis(x.reshape(*x.shape[:2], heads, -1), 2, 1)


ATTENTION_OPS: dict[str, Callable[..., Any]] = {"ntc.attention.default": _attention}
