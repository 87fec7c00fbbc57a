"""What the writers of integer ops share: proven widths of a program, calls of functions given by their text, and values beside values.

A node's value in the file need not be what it is in the program where all of its readers take it in another form: as uint8 with a zero
point (``unsigned``), as float32 that holds the integers (``real``). Such forms are entries of ``Writer.shared``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.fx import Node

from ntc.ops.interval import Bound, Interval
from ntc.widths import bounds
from ntc_backends.onnx_writer import Writer, bound, functions_in, onnx_type

__all__ = ["SINGLE", "WHOLE", "call", "inside", "interval", "is_narrow", "once", "proven", "readers", "result_type", "zero_point"]

SINGLE, WHOLE = 1 << 24, 1 << 53
"""Integers below are exact in float32 and in float64."""

ntc = torch.ops.ntc

_PROVEN: WeakKeyDictionary[Writer, dict[Node, Bound]] = WeakKeyDictionary()


def proven(w: Writer) -> dict[Node, Bound]:
    """What the rules say of each node, made once."""
    if w not in _PROVEN:
        _PROVEN[w] = bounds(w.program)
    return _PROVEN[w]


def interval(w: Writer, node: Node) -> Interval:
    """Of a node's result."""
    return proven(w)[node].result


def inside(w: Writer, node: Node) -> dict[str, int]:
    """Largest magnitude of what an op holds, by name."""
    return {i.what: max(-i.low, i.high) for i in proven(w)[node].inside}


def call(w: Writer, node: Node, text: str, inputs: Sequence[str], part: str = "", **attributes: Any) -> str:
    """A call of a local function given by its text."""
    (function,) = functions_in(text)
    w.functions.setdefault((function.domain, function.name, function.overload), function)
    given: dict[str, Any] = {k: int(v) if isinstance(v, bool) else v for k, v in attributes.items()}
    return w.call(function.name, inputs, part, domain=function.domain, overload=function.overload, **given)


def result_type(node: Node) -> int:
    """ONNX's number of the dtype that a node has in the program."""
    return onnx_type(node.meta["val"].dtype)


def once(w: Writer, key: Any, make: Callable[[], str]) -> str:
    """A value that several readers take, made for the first."""
    if key not in w.shared:
        w.shared[key] = make()
    name: str = w.shared[key]
    return name


def is_narrow(w: Writer, node: Node) -> bool:
    """Whether both operands of an ``integer_linear`` have 8 bits."""
    a = bound(node)
    low, high = interval(w, a["x"]).ends
    return w.program.tensor(a["weight"]).dtype == torch.int8 and high - min(low, 0) <= 255


def zero_point(w: Writer, node: Node) -> int | None:
    """What makes a value uint8, if all its readers are 8-bit products: nobody needs the value itself then."""
    if not node.users or not all(r.target is ntc.integer_linear.default and is_narrow(w, r) for r in node.users):
        return None
    return max(-interval(w, node).ends[0], 0)


def readers(node: Node) -> list[Node]:
    """The readers of a train, those of its sum over the steps in place of a ``decode``."""
    return [r for u in node.users for r in (u.users if u.target is ntc.decode.default else [u])]
