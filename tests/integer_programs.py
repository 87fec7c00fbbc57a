"""Programs of the integer grade, made by hand: what the ops, the width analysis and the back ends are tested on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ntc.meta import MADE_BY, ORIGIN
from ntc.ops import aten
from ntc.pipeline import run_pipeline
from ntc.program import ModelInfo, Program
from ntc.verify import verify
from ntc_passes.to_streaming import ToStreaming

ntc = torch.ops.ntc
STEPS, CHANNELS, VOCABULARY, CONTEXT = 4, 8, 13, 24


class Builder:
    """Makes a program node by node: ``b.call(op, x, tensor, 3)``; tensors become constants."""

    def __init__(self, table: Tensor, context: int = CONTEXT) -> None:
        self.graph = Graph()
        self.context = context
        self.tensors: dict[str, Tensor] = {}
        self.ids = self.graph.placeholder("input_ids")
        self.table = table
        self.embedded = self.call(aten.embedding.default, table, self.ids)

    def call(self, op: Any, *args: Any, name: str | None = None) -> Node:
        node = self.graph.create_node("call_function", op, tuple(map(self.constant, args)), name=name)
        return self._marked(node)

    def constant(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        name = f"constant_{len(self.tensors)}"
        self.tensors[name] = value
        return self._marked(self.graph.create_node("get_attr", name))

    @staticmethod
    def _marked(node: Node) -> Node:
        node.meta |= {ORIGIN: (node.name,), MADE_BY: ("test",)}
        return node

    def program(self, result: Node) -> Program:
        self.graph.output(result)
        module = GraphModule({k: torch.nn.Buffer(v) for k, v in self.tensors.items()}, self.graph, "Program")
        vocabulary = len(self.table)
        ids = torch.randint(0, vocabulary, (2, 9), generator=torch.Generator().manual_seed(3))
        made = Program(module, ModelInfo("by hand", "Integers", vocabulary, context=self.context), ids)
        made.refresh()
        verify(made)
        return made


def streaming(program: Program) -> Program:
    """Its streaming form; programs made by hand are canonical."""
    canonical = program.copy()
    canonical.facts |= {"canonical"}
    return run_pipeline(canonical, [ToStreaming()])


def one_op(make: Callable[[Builder, Node], Node], table: Tensor, context: int = CONTEXT) -> Program:
    """A program of one op (or a few) on the rows of a table, its result as logits."""
    b = Builder(table, context)
    result = make(b, b.embedded)
    clamped = b.call(ntc.requantize.default, result, torch.ones(1, dtype=torch.int32), 0, -(2**23), 2**23)
    return b.program(b.call(ntc.from_integer.default, clamped, 0))


def integers(low: int, high: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.int32) -> Tensor:
    """Uniform integers, both ends included."""
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def block(
    *, leak: bool = True, signed: bool = True, neuron: bool = True, centre: bool = True, heads: int = 2, kv_heads: int = 2,
    context: int = CONTEXT,
) -> Program:  # fmt: skip
    """One transformer block of spiking attention and a feed-forward layer, with random weights."""
    c, head = CHANNELS, CHANNELS // heads
    b = Builder(integers(-500, 500, VOCABULARY, c), context)
    weight = [integers(-127, 127, n, c, seed=i, dtype=torch.int8) for i, n in enumerate([c, head * kv_heads, head * kv_heads, c, 2 * c], 1)]
    theta = [integers(3000, 9000, len(w), seed=i + 10) for i, w in enumerate(weight)]
    gain, offset = integers(100, 2000, c, seed=20), integers(-1000, 1000, c, seed=21)

    def norm(x: Node) -> Node:
        return b.call(ntc.integer_norm.default, x, gain, offset, 1, 8, 18, -127, 127, centre)

    def fired(x: Node, i: int, name: str) -> Node:
        current = b.call(ntc.integer_linear.default, x, weight[i], integers(-300, 300, len(weight[i]), seed=i + 30))
        return b.call(ntc.integer_fire.default, current, theta[i], theta[i] // 2, STEPS, signed, False, name=name)

    x = norm(b.embedded)
    trains = [fired(x, i, name) for i, name in enumerate(("q", "k", "v"))]
    period = 4 if leak else 1
    growth = torch.tensor([[16, 20, 25, 31], [16, 18, 20, 23]][:kv_heads], dtype=torch.int32) if leak else torch.ones(1, 1, dtype=torch.int32)
    renewal = torch.tensor([100, 160][:kv_heads], dtype=torch.int32) if leak else None
    y = b.call(ntc.integer_attention.default, *trains, heads, kv_heads, growth, renewal, 8, name="attention")
    if neuron:
        current = b.call(ntc.requantize.default, y, integers(10, 90, period, c, seed=40), 8, -1000, 1000)
        train = b.call(ntc.integer_fire.default, current, integers(50, 90, c, seed=41), integers(0, 50, c, seed=42), STEPS, signed, True, name="ssa")
        value = b.call(ntc.decode.default, train, "count")
    else:
        value = b.call(ntc.decode.default, b.call(ntc.requantize.default, y, integers(10, 90, period, c, seed=40), 10, -128, 127), "count")
    out = b.call(ntc.integer_linear.default, value, weight[3], None)
    stream = b.call(aten.add.Tensor, b.embedded, b.call(ntc.requantize.default, out, integers(1, 30, c, seed=43), 6, -(2**15), 2**15))
    counts = b.call(ntc.decode.default, fired(norm(stream), 4, "ffn"), "count")
    down = b.call(ntc.integer_linear.default, counts, integers(-127, 127, c, 2 * c, seed=50, dtype=torch.int8), None)
    stream = b.call(aten.add.Tensor, stream, b.call(ntc.requantize.default, down, integers(1, 30, 1, seed=51), 6, -(2**15), 2**15))
    pointwise = b.call(ntc.integer_lookup.default, norm(stream), integers(-127, 127, 255, seed=60, dtype=torch.int8), -127)
    logits = b.call(ntc.integer_linear.default, pointwise, integers(-127, 127, VOCABULARY, c, seed=61, dtype=torch.int8), None)
    return b.program(b.call(ntc.from_integer.default, b.call(ntc.requantize.default, logits, integers(7, 7, 1), 4, -(2**20), 2**20), -4))
