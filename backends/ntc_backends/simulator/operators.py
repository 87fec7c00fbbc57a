"""Python's operators, which compute with sizes and pick from lists."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from ntc_backends.simulator.piece import TokenCount

__all__ = ["OPERATORS"]


def _add(a: Any, b: Any) -> Any:
    if isinstance(a, TokenCount) and b == 0:
        return a
    return b if isinstance(b, TokenCount) and a == 0 else a + b


OPERATORS: dict[str, Callable[..., Any]] = {
    "operator.add": _add,
    "operator.sub": lambda a, b: a if isinstance(a, TokenCount) and b == 0 else operator.sub(a, b),
    "operator.mul": lambda a, b: operator.mul(a, b),
    "operator.floordiv": lambda a, b: operator.floordiv(a, b),
    "operator.getitem": lambda a, b: operator.getitem(a, b),
}
