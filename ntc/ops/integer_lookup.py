r"""A pointwise function of an activation as a table: ``y = table[x - low]``.

An int8 activation has at most 256 values, so GELU and its like are 256 numbers and no arithmetic. Runs on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops.integer import check_integers, integer_argument, integer_constants
from ntc.ops.interval import Bound, Inside, Integers, Interval, integers
from ntc.ops.spec import Counts, Operand, OpSpec, Traffic, register
from ntc.ops.traffic import values
from ntc.spike_type import INTEGER, NodeType

__all__ = ["INTEGER_LOOKUP", "integer_lookup"]


def _check(x: Tensor, table: Tensor) -> None:
    check_integers(x=x, table=table)
    if table.dim() != 1 or not table.shape[0]:
        raise ValueError(f"a look-up table has one axis and at least one entry, and not the shape {list(table.shape)}")


@torch.library.custom_op("ntc::integer_lookup", mutates_args=())
def integer_lookup(x: Tensor, table: Tensor, low: int) -> Tensor:
    """Look up each element.

    Args:
        x: Integers of any shape, ``low <= x < low + N``.
        table: ``[N]``, the result for ``low``, ``low + 1`` ...
        low: Value of x that the first entry is for.

    Returns:
        The shape of x, in the dtype of the table.

    Raises:
        ValueError: For shapes and dtypes that do not fit.
        IndexError: If x is out of the table.
    """
    _check(x, table)
    # index_select refuses a negative index, which indexing would count from the end.
    return table.index_select(0, (x.to(torch.int64) - low).flatten()).view(x.shape)


@integer_lookup.register_fake
def _fake(x: Tensor, table: Tensor, low: int) -> Tensor:
    _check(x, table)
    return x.new_empty(x.shape, dtype=table.dtype)


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    integer_argument(node, type_of)
    integer_constants(node, 1)
    return INTEGER


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    return Counts(elementwise=result.numel)


def _moves(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Traffic:
    """One entry of the table per value."""
    return Traffic(weights=result.numel, sweep=result.numel) + values(operands[0]) + values(result)


def _bound(node: Node, context: int, x: Interval, table: Tensor, low: int) -> Bound:
    index = x - Interval.of(low, low)
    remedy = "clamp the activation in front to what the table covers"
    inside = Inside("index into the table", *index.ends, 0, len(table) - 1, remedy)
    found = integers(table)
    ends = [found[max(a, 0) : b + 1] for a, b in zip(index.low.tolist(), index.high.tolist(), strict=True)]
    if not all(len(part) for part in ends):
        return Bound(Interval.of(*(int(f(found)) for f in (min, max))), (inside,))
    return Bound(Interval(*(_each(f, ends) for f in (min, max))), (inside,))


def _each(function: Callable[..., int], parts: Sequence[Integers]) -> Integers:
    result = np.empty(len(parts), dtype=object)
    result[:] = [function(part) for part in parts]
    return result


INTEGER_LOOKUP = register(
    OpSpec(target=torch.ops.ntc.integer_lookup.default, infer=_infer, count=_count, moves=_moves, kind="activation", bound=_bound)
)
