"""Which linear layers belong to attention, read off the graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from ntc.meta import block_of
from ntc.ops import SOFTMAX_ATTENTION, aten, spec_of
from ntc.program import Program, op_name

__all__ = ["LINEAR", "STREAM_NAMES", "attention_projections"]

_WHOLE = (
    *SOFTMAX_ATTENTION, torch.ops.ntc.spiking_attention.default, torch.ops.ntc.integer_attention.default,
    torch.ops.ntc.coded_attention.default,
    *(getattr(torch.ops.ntc, name).default for name in ("causal_scores", "weighted_values", "coded_scores", "coded_values")),
)  # fmt: skip
_STREAMS = (
    torch.ops.ntc.attention_stream.default, torch.ops.ntc.spiking_attention_stream.default,
    torch.ops.ntc.integer_attention_stream.default,
)  # fmt: skip
_PRODUCTS = (*_WHOLE, *_STREAMS)
STREAM_NAMES = frozenset(op_name(target) for target in _STREAMS)
LINEAR = (aten.linear.default, torch.ops.ntc.integer_linear.default, torch.ops.ntc.spike_linear.default)


def attention_projections(program: Program) -> frozenset[str]:
    """Names of the linear layers that make queries, keys and values, and of those that take the result.

    Read off the graph and not off module names: a hand-written block may hold its attention and its FFN in one module.
    """
    found: set[str] = set()
    for product in (n for n in program.graph.nodes if n.target in _PRODUCTS):
        # Behind Q, K and V anything of the same block (rotary embeddings, norms); after the result only what leaves it
        # itself, since a residual add leads on to the FFN.
        found |= _nearest_linears(product, lambda n: [a for a in n.args[:3] if isinstance(a, Node)], lambda n: n.all_input_nodes)
        found |= _nearest_linears(product, lambda n: list(n.users), lambda n: list(n.users) if _passes_on(n) else [])
    return frozenset(found)


def _nearest_linears(start: Node, first: Callable[[Node], list[Node]], onward: Callable[[Node], list[Node]]) -> set[str]:
    found: set[str] = set()
    seen: set[Node] = set()
    frontier = first(start)
    while frontier:
        node = frontier.pop()
        if node in seen or node.op != "call_function" or block_of(node) != block_of(start):
            continue
        seen.add(node)
        if node.target in LINEAR:
            found.add(node.name)
        else:
            frontier.extend(onward(node))
    return found


def _passes_on(node: Node) -> bool:
    """Whether an op hands its one input on: a change of layout, a scale, a neuron, a decode."""
    spec = spec_of(node)
    return spec is not None and (spec.element in ("population", "decode", "scale") or spec.kind in ("layout", "neurons"))
