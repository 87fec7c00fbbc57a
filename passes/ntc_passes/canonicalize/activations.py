"""GELU and SiLU spelled as arithmetic become one node."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops import aten
from ntc.probe import evaluate
from ntc.program import Program
from ntc_passes.canonicalize.making import making

__all__ = ["ARITHMETIC", "rewrite_activations"]

ARITHMETIC = frozenset({
    aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor, aten.pow.Tensor_Scalar, aten.neg.default,
    aten.tanh.default, aten.erf.default, aten.rsub.Scalar, aten.mul.Scalar, aten.pow.Tensor_Tensor,
})  # fmt: skip


_PROBE = torch.linspace(-8, 8, 1025, dtype=torch.float64)

# What a spelling is made around: the op that replaces it, and its options.
_AROUND: dict[Any, tuple[Any, dict[str, str]]] = {
    aten.tanh.default: (aten.gelu.default, {"approximate": "tanh"}),
    aten.erf.default: (aten.gelu.default, {"approximate": "none"}),
    aten.sigmoid.default: (aten.silu.default, {}),
}


def rewrite_activations(program: Program) -> int:
    """GELU spelled as arithmetic with tanh or erf, and SiLU as ``x sigmoid(x)``, becomes one node."""
    count = 0
    for node in list(program.graph.nodes):
        if node.target not in _AROUND:
            continue
        op, options = _AROUND[node.target]
        found = _region(program, node, _PROBE, op(_PROBE, **options))
        if found is None:
            continue
        source, last = found
        with making(program, last, [node, last]) as call:
            activation = call(op, source, **options)
        last.replace_all_uses_with(activation)
        count += 1
    program.graph.eliminate_dead_code()
    return count


def _region(program: Program, middle: Node, probe: Tensor, expected: Tensor) -> tuple[Node, Node] | None:
    """The nodes x and y around ``middle`` with ``y = f(x)`` and ``f(probe) == expected``."""
    sources: list[Node] = []
    frontier = [middle]
    while frontier and len(sources) < 12:
        for a in frontier.pop(0).all_input_nodes:
            if a not in sources and a.op == "call_function":
                sources.append(a)
                if a.target in ARITHMETIC:
                    frontier.append(a)
    results: list[Node] = []
    frontier = [middle]
    while frontier and len(results) < 12:
        for u in frontier.pop(0).users:
            if u not in results and u.target in ARITHMETIC:
                results.append(u)
                frontier.append(u)
    for source in sources:
        for result in results:
            try:
                got = evaluate(program, result, {source: probe}, (3, 7))
            except (LookupError, RuntimeError, TypeError):
                continue
            # 1e-6 is far above what the order of float64 operations moves, far below the difference of the two forms.
            if isinstance(got, Tensor) and got.shape == expected.shape and torch.allclose(got, expected, rtol=0, atol=1e-6):
                return source, result
    return None
