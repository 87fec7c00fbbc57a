"""Host islands: their ops one after the other, each by the table of its namespace.

Floating-point ops compute in the dtype of their tensors (mostly float32). An op that no table has is refused, by name, before anything
runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ntc.errors import BackendError
from ntc_backends import netlist_schema as schema
from ntc_backends.netlist_json import one_line
from ntc_backends.simulator.aten import ATEN_OPS, MIXES_TOKENS
from ntc_backends.simulator.attention import ATTENTION_OPS
from ntc_backends.simulator.integer_ops import INTEGER_OPS
from ntc_backends.simulator.operators import OPERATORS
from ntc_backends.simulator.piece import Array, Constants, Piece, TokenCount

__all__ = ["HostIsland"]

_TABLES: dict[str, Callable[..., Any]] = {**ATEN_OPS, **OPERATORS}
_WITH_STATE: dict[str, Callable[..., Any]] = {**ATTENTION_OPS, **INTEGER_OPS}
"""Ops that also see the piece of the sequence and the name of their state."""


class HostIsland:
    """One host island of a netlist."""

    def __init__(self, element: schema.HostIsland, constants: Constants) -> None:
        self.element, self.constants = element, constants
        for op in element.ops:
            if op.op not in _TABLES and op.op not in _WITH_STATE:
                raise BackendError(f"the simulator does not know {one_line(op.op)}, which {op.name} of {element.name} is")

    def __call__(self, piece: Piece, **inputs: Any) -> dict[str, Any]:
        """Values of the outputs by port."""
        values: dict[str, Any] = dict(inputs)
        last = {a.value: number for number, op in enumerate(self.element.ops) for a in _values(op.arguments)}
        for number, op in enumerate(self.element.ops):
            if piece.before and op.op in MIXES_TOKENS:
                raise BackendError(f"{op.name} of {self.element.name} is {op.op}, which needs all tokens at once: run the whole sequence")
            try:
                values[op.name] = self._run(op, values, piece)
            except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError) as error:
                raise BackendError(f"{op.name} of {self.element.name} ({op.op}) cannot be computed: {one_line(error)}") from error
            for name in [n for n, at in last.items() if at == number and n not in self.element.outputs]:
                values.pop(name, None)
        return {port: values[port] for port in self.element.outputs}

    def _run(self, op: schema.HostOp, values: dict[str, Any], piece: Piece) -> Any:
        arguments = {name: self._argument(a, values) for name, a in op.arguments.items()}
        with np.errstate(all="ignore"):
            if op.op in _WITH_STATE:
                return _WITH_STATE[op.op](piece, op.name, **arguments)
            if op.op == "aten.sym_size.int":
                return _size(piece, **arguments)
            return _TABLES[op.op](**arguments)

    def _argument(self, given: schema.Argument, values: dict[str, Any]) -> Any:
        match given:
            case list():
                return [self._argument(g, values) for g in given]
            case schema.ValueRef(value=name):
                return values[name]
            case schema.TensorRef(tensor=name):
                return self.constants.tensor(name)
            case schema.NonFinite(float=text):
                return float(text)
            case _:
                return given


def _size(piece: Piece, self: Array, dim: int) -> Any:
    """A size; the number of tokens knows how many came before, so that positions go on."""
    size = self.shape[dim]
    return TokenCount(size, piece.before) if dim == 1 and self.ndim > 1 and size == piece.length else size


def _values(arguments: dict[str, schema.Argument]) -> list[schema.ValueRef]:
    waiting, found = list(arguments.values()), []
    while waiting:
        match waiting.pop():
            case list() as inner:
                waiting += inner
            case schema.ValueRef() as value:
                found.append(value)
    return found
