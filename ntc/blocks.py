"""Where the residual stream leaves each transformer block, and what attention and FFN add to it.

A block is ``x -> x + attention(...) + ffn(...)`` around a residual stream ``x [B, L, C]`` (He et al. 2016, Vaswani et al. 2017).
Spiking and analog forms of one model have the same blocks under the same names and the same values in the same places,
so activations can be compared and matched block by block. All of it is read off the graph, from the modules that nodes came
from (``ntc.meta.block_of``) and from who adds what to whom; captured, canonical and spiking programs alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor
from torch.fx import Node

from ntc.meta import TYPE, block_of
from ntc.ops import aten, spec_of
from ntc.program import Program
from ntc.spike_type import ANALOG, Analog, Integer

__all__ = ["LayerOutput", "Place", "block_outputs", "layer_outputs"]

Place: TypeAlias = Literal["attention", "ffn", "block"]


@dataclass(frozen=True)
class LayerOutput:
    """A value ``[B, L, C]`` in or on its way into the residual stream.

    Attributes:
        block: Transformer block, such as ``transformer.h.0``.
        where: ``attention`` or ``ffn``: a value added to the stream; ``block``: the stream that leaves the block.
        node: The node of the graph.
    """

    block: str
    where: Place
    node: Node


def block_outputs(program: Program) -> dict[str, Node]:
    """The node of the residual stream ``[B, L, C]`` that leaves each transformer block, by block name, in order.

    It is the last analog node of the block that a later block or the head uses. A model that holds its sublayers in blocks
    and adds their results outside of them (``x = x + block.mlp(x)`` in its own ``forward``) has that sum taken.

    Returns:
        Names such as ``transformer.h.0``, the same for the analog and the spiking program of one model. Empty if no
        module of the model is called like a transformer block (see ``ntc.meta.block_of``).
    """
    order = {node: number for number, node in enumerate(program.graph.nodes)}
    found: dict[str, Node] = {}
    for node in program.graph.nodes:
        block = block_of(node) if _is_activation(node) else ""
        if block and any(block_of(user) != block for user in node.users):
            found.pop(block, None)  # a block stands where its last node does
            found[block] = node
    return {block: _with_sum_outside(node, block, order) for block, node in found.items()}


def layer_outputs(program: Program) -> tuple[LayerOutput, ...]:
    """Every attention output, FFN output and block output of the program, in the order in which the stream meets them.

    Attention and FFN outputs are the values that are *added* to the stream, after the output projection; attention is
    told from FFN by what the value was computed with. Blocks that compute both side by side (GPT-J, GPT-NeoX) have both.
    """
    order = {node: number for number, node in enumerate(program.graph.nodes)}
    outputs = block_outputs(program)
    result: list[LayerOutput] = []
    for block, output in outputs.items():
        entries = frozenset(outputs.values()) - {output}
        added = _Stream(block, entries, order).terms(output)
        result += sorted((LayerOutput(block, where, node) for node, where in added.items()), key=lambda found: order[found.node])
        result.append(LayerOutput(block, "block", output))
    return tuple(result)


def _is_activation(node: Node) -> bool:
    """Whether a node computes an analog value, or one of the integer grade, with batch, position and channel."""
    value, kind = node.meta.get("val"), node.meta.get(TYPE, ANALOG)
    return (
        node.op == "call_function" and isinstance(kind, Analog | Integer) and isinstance(value, Tensor) and value.dim() == 3
        and (value.is_floating_point() or isinstance(kind, Integer))
    )  # fmt: skip


def _summands(node: Node) -> tuple[Node, Node] | None:
    """The two activations that a node adds; None if it is no sum of two (a bias is none)."""
    if node.target is not aten.add.Tensor or len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    return (a, b) if isinstance(a, Node) and isinstance(b, Node) and _is_activation(a) and _is_activation(b) else None


def _with_sum_outside(node: Node, block: str, order: dict[Node, int]) -> Node:
    """The sum with the stream that a model makes of a block's results outside of any block; else the node itself."""
    total = node
    while True:
        user = next((u for u in total.users if not block_of(u) and _summands(u)), None)
        pair = None if user is None else _summands(user)
        if user is None or pair is None:
            return node
        other = pair[1] if pair[0] is total else pair[0]
        if other is not total and _depends(total, other, order):
            return user
        if block_of(other) != block:
            return node
        total = user  # attention and FFN of the block are added to each other first


def _depends(node: Node, on: Node, order: dict[Node, int]) -> bool:
    """Whether a node is computed from another one."""
    seen: set[Node] = set()
    frontier = [node]
    while frontier:
        one = frontier.pop()
        if one is on:
            return True
        if one not in seen and order[one] > order[on]:  # what stands before it cannot come from it
            seen.add(one)
            frontier.extend(one.all_input_nodes)
    return False


@dataclass(frozen=True)
class _Stream:
    """The residual stream within one block, walked from its end to its beginning."""

    block: str
    entries: frozenset[Node]  # where other blocks end
    order: dict[Node, int]

    def terms(self, output: Node) -> dict[Node, Place]:
        """What was added to the stream since the block's beginning."""
        found: dict[Node, Place] = {}
        frontier = [output]
        while frontier:
            node = frontier.pop()
            if node in self.entries or block_of(node) not in (self.block, ""):
                continue
            pair = _summands(node)
            if pair is None:  # the stream runs on through a norm behind the sum (post-norm blocks) or a change of layout
                one_input = [a for a in node.args if isinstance(a, Node) and _is_activation(a)]
                if node.op == "call_function" and len(one_input) == 1 and not self._computes(node):
                    frontier.extend(one_input)
                continue
            for stream, term in (pair, pair[::-1]):
                if _depends(term, stream, self.order):
                    frontier.append(stream)
                    self._enter(found, term, stream)
                    break
            else:  # neither comes from the other: side by side
                for part in pair:
                    if _summands(part) is not None:
                        frontier.append(part)
                    else:
                        self._enter(found, part, None)
        return found

    def _enter(self, found: dict[Node, Place], term: Node, stream: Node | None) -> None:
        pair = _summands(term)
        kinds = None if pair is None else tuple(self._place(part, stream) for part in pair)
        if pair is not None and kinds in (("attention", "ffn"), ("ffn", "attention")):  # x + (attention + ffn)
            for part in pair:
                self._enter(found, part, stream)
        elif (place := self._place(term, stream)) is not None:
            found[term] = place

    def _place(self, term: Node, stream: Node | None) -> Place | None:
        """Attention or FFN: by the ops between the stream and the value that is added to it; None if nothing is computed."""
        kinds: set[str] = set()
        seen: set[Node] = set()
        frontier = [term]
        while frontier:
            node = frontier.pop()
            if node in seen or node is stream or node in self.entries or block_of(node) != self.block:
                continue
            seen.add(node)
            spec = spec_of(node)
            kinds.add(spec.kind if spec is not None else "unknown")
            frontier.extend(node.all_input_nodes)
        return "attention" if "attention" in kinds else "ffn" if "projection" in kinds else None

    def _computes(self, node: Node) -> bool:
        spec = spec_of(node)
        return spec is not None and spec.kind in ("attention", "projection")
