"""Under which kind operations are booked: what a node is in a language model, read off the graph and its blocks.

==================  ==================================================================================
kind                what
==================  ==================================================================================
attention products  queries with keys, and what comes of it with values; scales of spiking attention
softmax             of attention, its elementwise operations
projections         linear layers that make queries, keys and values, and those that take the result
FFN                 the other linear layers of a block
lm_head             the linear layer that makes logits
norms, embedding, activations, ...
encoders            neurons that code analog values, the steps of their tokens, rotations in front of them
neuron updates      all other neurons
==================  ==================================================================================

What an op is by itself its own file declares (``OpSpec.kind``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch.fx import Node

from ntc.energy.projections import LINEAR, attention_projections
from ntc.meta import block_of
from ntc.observe import NodeCounts
from ntc.ops import SOFTMAX_ATTENTION, Counts, Traffic, aten, spec_of
from ntc.program import Program, op_name

__all__ = ["ENCODERS", "SOFTMAX", "booked", "by_kind"]

SOFTMAX, ENCODERS = "softmax", "encoders"

_ENCODER_OPS = tuple(getattr(torch.ops.ntc, name).default for name in ("encode", "digit_neuron", "token_step", "hadamard"))
_NAMES = {
    "attention": "attention products", "norm": "norms", "neurons": "neuron updates", "activation": "activations", "decode": "decoding",
    "unknown": "not counted",
}  # fmt: skip
_SOFTMAX_NAMES = frozenset(
    op_name(target) for target in (*SOFTMAX_ATTENTION, torch.ops.ntc.attention_stream.default, aten.scaled_dot_product_attention.default)
)


def booked(program: Program) -> dict[str, str]:
    """The kind of each node, by name."""
    around, head = attention_projections(program), _head(program)
    return {node.name: _kind(node, around, head) for node in program.graph.nodes if node.op == "call_function"}


def _kind(node: Node, around: frozenset[str], head: Node | None) -> str:
    if node.target in _ENCODER_OPS:
        return ENCODERS
    if node.target in LINEAR:
        if node.name in around:
            return "projections"
        return "lm_head" if node is head else "FFN" if block_of(node) else "other layers"
    spec = spec_of(node)
    kind = spec.kind if spec else "unknown"
    return "other products" if kind == "projection" else _NAMES.get(kind, kind)


def _head(program: Program) -> Node | None:
    """The linear layer outside of all blocks that is nearest to the logits; None if there is none."""
    frontier, seen = [program.results[0]], set[Node]()
    while frontier:
        node = frontier.pop(0)
        if node.target in LINEAR:
            return None if block_of(node) else node
        fresh = [n for n in node.all_input_nodes if n not in seen and n.op == "call_function"]
        seen.update(fresh)
        frontier += fresh
    return None


def by_kind(nodes: Iterable[NodeCounts], kinds: Mapping[str, str]) -> dict[str, list[NodeCounts]]:
    """The nodes of each kind; of softmax attention the products and the softmax apart."""
    found: dict[str, list[NodeCounts]] = {}
    for node in nodes:
        parts = [(kinds.get(node.name, _NAMES.get(node.kind, node.kind)), node)]
        if node.op in _SOFTMAX_NAMES:
            rest = replace(node, counts=replace(node.counts, elementwise=0.0))
            parts = [(parts[0][0], rest), (SOFTMAX, replace(node, counts=Counts(elementwise=node.counts.elementwise), traffic=Traffic()))]
        for kind, part in parts:
            found.setdefault(kind, []).append(part)
    return found
