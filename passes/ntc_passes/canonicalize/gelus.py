"""GELU spelled as arithmetic becomes one node."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from ntc.ops import aten
from ntc.probe import evaluate
from ntc.program import Program
from ntc_passes.canonicalize.making import making

__all__ = ["ARITHMETIC", "rewrite_gelus"]

ARITHMETIC = frozenset({
    aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor, aten.pow.Tensor_Scalar, aten.neg.default,
    aten.tanh.default, aten.erf.default, aten.rsub.Scalar, aten.mul.Scalar, aten.pow.Tensor_Tensor,
})  # fmt: skip


def rewrite_gelus(program: Program) -> int:
    """GELU spelled as arithmetic with tanh or erf becomes one node."""
    count = 0
    probe = torch.linspace(-8, 8, 1025, dtype=torch.float64)
    for node in list(program.graph.nodes):
        if node.target not in (aten.tanh.default, aten.erf.default):
            continue
        approximate = "tanh" if node.target is aten.tanh.default else "none"
        expected = functional.gelu(probe, approximate=approximate)
        found = _region(program, node, probe, expected)
        if found is None:
            continue
        source, last = found
        with making(program, last, [node, last]) as call:
            gelu = call(aten.gelu.default, source, approximate=approximate)
        last.replace_all_uses_with(gelu)
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
