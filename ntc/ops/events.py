"""Counting on the values that flow: spikes, and products with no factor zero.

Everything here runs beside the network at every evaluation, so it takes as few passes over memory as it can. Counts are exact: float32
adds whole numbers exactly up to 2^24, in whatever order, and what may be larger is added in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = [
    "nonzero_products", "products_with_zero_weights", "scores_and_values", "spikes_per_head", "spikes_per_neuron", "zeros_in",
]  # fmt: skip

_BLOCK = 1 << 18
"""Elements that are taken at once: what is made of them stays in the cache of a processor."""

_TOKENS = 64
"""Queries that are taken at once."""


def _magnitude(train: Tensor, levels: str) -> Tensor:
    """1 for each spike, whatever its sign or payload."""
    if levels == "binary":
        return train
    return train.abs() if levels == "ternary" else (train != 0).to(torch.float32)


def spikes_per_neuron(train: Tensor, levels: str) -> Tensor:
    """Spikes of each neuron of a train ``[..., C]`` over all its places: ``[C]``, float64."""
    rows = train.flatten(0, -2)
    total = torch.zeros(rows.shape[-1], dtype=torch.float64, device=rows.device)
    size = max(1, _BLOCK // max(1, rows.shape[-1]))
    ones = torch.ones(min(size, len(rows)), dtype=torch.float32, device=rows.device)
    for block in torch.split(rows, size):
        total += ones[: len(block)] @ _magnitude(block, levels).to(torch.float32)
    return total


def spikes_per_head(train: Tensor, heads: int, levels: str) -> Tensor:
    """Spikes of a train ``[..., L, H D]`` per token and head: ``[..., L, H]``, float32."""
    width = train.shape[-1] // heads
    head = torch.eye(heads, dtype=torch.float32, device=train.device).repeat_interleave(width, 0)
    return _magnitude(train, levels).to(torch.float32) @ head


def scores_and_values(
    query: Tensor, key: Tensor, value_spikes: Tensor, heads: int, kv_heads: int, per_channel: bool
) -> tuple[float, float, float]:
    """Of spiking attention: additions of values that scores other than zero cause, such scores, and coincidences of Q and K.

        sum_{j <= i} [s_ij != 0] v_j,   sum_{j <= i} [s_ij != 0],   sum_{j <= i} sum_d |q_id k_jd|,   s_ij = Q_i . K_j

    Args:
        query: Spikes ``[..., L, H D]``. Signed: coincidences that cancel leave a score of zero, and nothing is added.
        key: Spikes ``[..., L, Hk D]``.
        value_spikes: Spikes of the values per token and key head, ``[..., L, Hk]``.
        heads: H.
        kv_heads: Hk.
        per_channel: Whether each channel fades at its own rate: coincidences of either sign then do not cancel, and are counted.
    """
    length, groups = query.shape[-2], heads // kv_heads
    q, k = (x.reshape(-1, length, n, x.shape[-1] // n) for x, n in ((query, heads), (key, kv_heads)))
    v = value_spikes.reshape(-1, length, kv_heads)
    if per_channel:
        q, k = q.abs(), k.abs()
    below = torch.ones(min(_TOKENS, length), min(_TOKENS, length), device=q.device).tril_()
    row = torch.ones(1, 1, len(below), device=q.device)
    values = scores = coincidences = 0.0
    for part, head, start in _parts(len(q), heads, length):
        stop = min(start + _TOKENS, length)
        size, kv = stop - start, head // groups
        s = torch.bmm(q[part, start:stop, head], k[part, :stop, kv].mT)  # a view each: nothing is copied
        s[..., start:].mul_(below[:size, :size])
        coincidences += float(s.sum(dtype=torch.float64)) if per_channel else 0.0
        of_key = torch.bmm(row[..., :size].expand(len(s), -1, -1), s.ne_(0))[:, 0]
        values += float((of_key * v[part, :stop, kv]).sum(dtype=torch.float64))
        scores += float(of_key.sum(dtype=torch.float64))
    return values, scores, coincidences


def _parts(rows: int, heads: int, length: int) -> Iterator[tuple[slice, int, int]]:
    """Rows, head and first query of each block of scores."""
    size = max(1, _BLOCK // max(1, length * min(_TOKENS, length)))
    for first in range(0, rows, size):
        for head in range(heads):
            for start in range(0, length, _TOKENS):
                yield slice(first, first + size), head, start


def nonzero_products(x: Tensor, weight: Tensor) -> float:
    """Products of ``x W^T`` with both factors other than zero, for x ``[..., C]`` and W ``[N, C]``."""
    nonzero: float = _once(_nonzero, x, lambda: float(x.count_nonzero()))
    return nonzero * weight.shape[0] - products_with_zero_weights(x, weight)


def products_with_zero_weights(x: Tensor, weight: Tensor) -> float:
    """Products of ``x W^T`` whose factor from W is zero and whose factor from x is not; few columns of W hold a zero."""
    columns, zeros = _zeros_of(weight)
    if not len(columns):
        return 0.0
    used = (x[..., columns] != 0).flatten(0, -2).sum(0)
    return float(used.double() @ zeros)


def zeros_in(weight: Tensor) -> float:
    """Elements of a matrix that are zero."""
    return float(_zeros_of(weight)[1].sum())


def _zeros_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of a matrix that hold a zero, and how many each holds."""

    def look() -> tuple[Tensor, Tensor]:
        if int(weight.count_nonzero()) == weight.numel():
            return weight.new_zeros(0, dtype=torch.int64), weight.new_zeros(0, dtype=torch.float64)
        per_column = (weight == 0).sum(0)
        columns = per_column.nonzero().flatten()
        return columns, per_column[columns].double()

    found: tuple[Tensor, Tensor] = _once(_zeros, weight, look)
    return found


# By tensor, as long as it lives: its version, and what was counted. Layers of one input, and one layer at every batch, count once.
_nonzero, _zeros = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()


def _once(known: WeakTensorKeyDictionary, tensor: Tensor, look: Callable[[], Any]) -> Any:
    """What ``look`` finds in a tensor, again only if the tensor was written to since; of inference mode nothing is known of that."""
    if tensor.is_inference():
        return look()
    version = tensor._version
    if tensor not in known or known[tensor][0] != version:
        known[tensor] = (version, look())
    return known[tensor][1]
