r"""The residual stream: int32, one power of two for the whole network, so that adding to it is adding.

Its unit is the smallest power of two with which nothing can overflow. The range is known before anything runs: an embedding reaches as
far as its table, and a layer that is added is clamped to the power of two above twice the most that it gives on the calibration
text (``HEADROOM``); ranges add up along the stream. The largest sum of them gets as many bits as the squares inside of a norm leave
room for in 64 bits, 24 at most.
"""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from ntc.errors import PassError
from ntc.meta import NAME as WANTED_NAME
from ntc.meta import where
from ntc.ops import aten
from ntc.program import Program
from ntc_passes.quantize.fixed_point import nearest
from ntc_passes.quantize.statistics import Statistics
from ntc_passes.quantize.walk import Constant, Value, Work

__all__ = ["HEADROOM", "add", "as_stream", "embedding", "is_stream", "stream_exponent"]

HEADROOM = 2.0
"""How many times the most that was seen a layer may add to the stream before it is clamped; rounded up to a power of two."""

_BITS = 24
"""Of the stream's largest magnitude, at most: so float32 holds it."""


def is_stream(node: Node) -> bool:
    """Whether a node of the floating-point program is one of the residual stream: an embedding or a sum."""
    return node.target in (aten.embedding.default, aten.add.Tensor) and node.meta["val"].is_floating_point()


def stream_exponent(program: Program, floating: Statistics) -> int:
    """Exponent of the stream's unit.

    Raises:
        PassError: If the network has no residual stream.
    """
    ranges: dict[Node, float] = {}
    channels = 1
    for node in program.graph.nodes:
        if node.op != "call_function" or not is_stream(node):
            continue
        channels = max(channels, int(node.meta["val"].shape[-1]))
        if node.target is aten.embedding.default:
            ranges[node] = _table(program, node)
        else:
            ranges[node] = sum(ranges[a] if a in ranges else _added(floating, a) for a in node.args[:2] if isinstance(a, Node))
    if not ranges:
        raise PassError("the network has no embedding, and without one there is no residual stream that integers could start from")
    bits = min(_BITS, int(30 - math.log2(channels) / 2))
    return math.ceil(math.log2(max(max(ranges.values()), 1e-30))) - bits


def _table(program: Program, node: Node) -> float:
    table = node.args[0]
    assert isinstance(table, Node)
    return float(program.tensor(table).detach().abs().max())


def _added(floating: Statistics, node: Node) -> float:
    """Range of a layer that is added: a power of two; a constant, which ``add`` refuses, has none."""
    return 2.0 ** math.ceil(math.log2(max(HEADROOM * floating.largest.get(node, 0.0), 1e-30)))


def embedding(work: Work, node: Node) -> Value:
    """A table in units of the stream."""
    table, ids = node.args[:2]
    weight = work.constant(node, table, "the table of an embedding")
    assert isinstance(table, Node)
    stored = Constant(str(table.target), nearest(weight / work.unit).to(torch.int32))
    result, data = work.emit(node, aten.embedding.default, stored, work[ids])
    return _on_stream(work, result, data, int(stored.value.abs().max()))


def add(work: Work, node: Node) -> Value:
    """Two values of the stream, added."""
    if len(node.args) != 2 or node.kwargs or not all(isinstance(a, Node) and a.op == "call_function" for a in node.args):
        raise PassError(f"the integer grade adds two values of the residual stream, and {where(node)} adds something else")
    left, right = (as_stream(work, work[a], a) for a in node.args if isinstance(a, Node))
    result, data = work.emit(node, aten.add.Tensor, left, right)
    return _on_stream(work, result, data, left.bound + right.bound)


def _on_stream(work: Work, node: Node, data: list[torch.Tensor], bound: int) -> Value:
    return work.noted(Value(node, "stream", torch.tensor([work.unit], dtype=torch.float64), data, bound=bound))


def as_stream(work: Work, value: Value, node: Node) -> Value:
    """A value in units of the stream; ``node`` is the one of the floating-point program whose value it is."""
    if value.kind == "stream":
        return value
    if "stream" not in value.made:
        limit = max(1, round(_added(work.floating, node) / work.unit)) - 1
        taken = value.node.meta.get(WANTED_NAME, value.node.name) == node.name
        name = f"{node.name}_stream" if taken else node.name
        value.made["stream"] = work.requantize(node, value, work.unit, -limit, limit, name, "stream")
    return value.made["stream"]
