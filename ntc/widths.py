"""How wide every register of an integer program has to be, proven from the weights and the range of the token ids.

From the constants of the program, each op's interval rule (``OpSpec.bound``) makes an interval for each channel of each value, and for
what the op holds inside: accumulators, membranes, the memory of attention. No data is involved, so no text can overflow what
fits here. What does not fit its type is refused, the node named. Of a streaming program the same is proven, for any way to cut a text into
pieces: its state is one that tokens within the context have made of zeros.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.errors import VerifyError
from ntc.meta import TYPE, module_of, where
from ntc.ops import spec_of
from ntc.ops.interval import Bound, Interval, bits_of
from ntc.program import Program, op_name
from ntc.spike_type import INDEX

__all__ = ["Width", "bounds", "widths"]


@dataclass(frozen=True)
class Width:
    """One value of an integer program, or one register inside of an op.

    Attributes:
        node: Name of the node.
        module: Module of the model that it comes from.
        op: Its op, such as ``ntc.integer_fire``.
        what: ``result``, or what is held inside: ``accumulator``, ``membrane``, ``memory``, ``count``, ``product`` ...
        dtype: How a result is stored; empty for what is inside.
        low: Smallest value that it can have.
        high: Largest value that it can have.
        bits: Bits that hold the interval: two's complement, or unsigned if ``low >= 0``.
        limit: Largest value that is allowed there.
    """

    node: str
    module: str
    op: str
    what: str
    dtype: str
    low: int
    high: int
    bits: int
    limit: int


def widths(program: Program) -> list[Width]:
    """Intervals of all values and registers of an integer program, in the order of the graph.

    Raises:
        VerifyError: If one does not fit, or if the program computes with anything but integers; names the node, what to do, and
            the interval.
    """
    rows = []
    for node, bound in bounds(program).items():
        rows += [_row(node, i.what, "", i.low, i.high, i.most) for i in bound.inside]
        value = node.meta["val"]
        if not isinstance(value, Tensor):  # several results: those who take one of them have its row
            continue
        most = torch.iinfo(value.dtype).max if not value.is_floating_point() else (1 << 24) - 1
        rows.append(_row(node, "result", str(value.dtype).removeprefix("torch."), *bound.result.ends, most))
    return rows


def _row(node: Node, what: str, dtype: str, low: int, high: int, limit: int) -> Width:
    op = op_name(node.target)
    return Width(node.name, module_of(node), op, what, dtype, low, high, bits_of(low, high), limit)


def bounds(program: Program) -> dict[Node, Bound]:
    """What the rule of each node says, for each channel of its value.

    Raises:
        VerifyError: As ``widths``.
    """
    found: dict[Node, Bound] = {}
    for node in program.graph.nodes:
        if node.op != "call_function" or node.meta.get(TYPE) == INDEX:
            continue
        if node.target is operator.getitem and node.args[0] in found:
            several = found[node.args[0]]
            found[node] = Bound((several.result, *several.others)[node.args[1]])
            continue
        spec = spec_of(node)
        if spec is None or spec.bound is None:
            raise VerifyError(f"{node.target} has no interval rule, so no width can be proven: {where(node)}; run quantize on the program")
        arguments = {name: _argument(program, value, found) for name, value in _named(node).items()}
        bound = spec.bound(node, program.info.context, **arguments)
        for inside in bound.inside:
            if inside.low < inside.least or inside.high > inside.most:
                raise VerifyError(
                    f"the {inside.what} of {where(node)} can be {inside.low} ... {inside.high}, and {inside.least} ... {inside.most} is "
                    f"what it may be: {inside.remedy}"
                )
        values = node.meta["val"] if isinstance(node.meta["val"], list | tuple) else (node.meta["val"],)
        each = list(zip(values, (bound.result, *bound.others), strict=True))
        for value, interval in each:
            _check_stored(node, value, interval)
        first, *others = (interval.wide(int(value.shape[-1])) for value, interval in each)
        found[node] = Bound(first, bound.inside, tuple(others))
    return found


def _check_stored(node: Node, value: Tensor, interval: Interval) -> None:
    if value.is_floating_point():
        if node.target is torch.ops.ntc.from_integer.default:
            return
        raise VerifyError(f"{where(node)} computes in {value.dtype}, so no width of it can be proven; run quantize on the program")
    limits, (low, high) = torch.iinfo(value.dtype), interval.ends
    if low < limits.min or high > limits.max:
        raise VerifyError(
            f"the result of {where(node)} can be {low} ... {high}, and it is stored as {value.dtype}, {limits.min} ... {limits.max}: use "
            "fewer bits for what it is made of"
        )


def _named(node: Node) -> dict[str, Any]:
    """Arguments by name, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    given = {a.name: a.default_value for a in schema.arguments}
    given.update(zip((a.name for a in schema.arguments), node.args, strict=False))
    return given | dict(node.kwargs)


def _argument(program: Program, value: Any, found: dict[Node, Bound]) -> Any:
    """An argument as rules take it: an interval, a constant, None for ids and positions, or plain data."""
    if not isinstance(value, Node):
        return value
    if value.op == "get_attr":
        return program.tensor(value).detach()
    return found[value].result if value in found else None
