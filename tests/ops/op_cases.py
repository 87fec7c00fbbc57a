"""What the tests of the ops share: graphs of one node, operands, reference steps with a surrogate gradient."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph, Node

from ntc.ops import SPECS, Counts, Operand
from ntc.spike_type import ANALOG, Analog, CurrentType, Index, Integer, NodeType, RateType, SpikeType, type_of_tensor

torch.set_num_threads(1)

SPIKES = SpikeType(4)
TERNARY = SpikeType(4, levels="ternary")
GRADED = SpikeType(4, levels="graded", scale="channel")
CURRENT = CurrentType(4)
RATE = RateType()


@dataclass(frozen=True)
class Constant:
    """A ``get_attr`` argument of that shape."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


def node_of(target: Any, *arguments: Any) -> tuple[Node, dict[Node, NodeType]]:
    """A node with one placeholder for each argument that is a type and one ``get_attr`` for each ``Constant``."""
    graph, types, args = Graph(), {}, []
    for i, argument in enumerate(arguments):
        if isinstance(argument, Analog | CurrentType | Index | Integer | RateType | SpikeType):
            node = graph.placeholder(f"x{i}")
            types[node] = argument
            is_timed = isinstance(argument, SpikeType | CurrentType)
            whole = isinstance(argument, Integer) or (is_timed and argument.code == "count")  # trains of the integer grade
            node.meta["val"] = torch.zeros((argument.steps, 2, 3, 8) if is_timed else (2, 3, 8), dtype=torch.int32 if whole else None)
        elif isinstance(argument, Constant):
            node = graph.create_node("get_attr", f"c{i}")
            node.meta["val"] = torch.zeros(argument.shape, dtype=argument.dtype)
            types[node] = type_of_tensor(node.meta["val"])
        else:
            node = argument
        args.append(node)
    node = graph.call_function(target, tuple(args))
    node.meta["val"] = torch.zeros(2, 3, 8)
    return node, types


def infer(target: Any, *arguments: Any) -> NodeType:
    """What the type rule of an op says."""
    node, types = node_of(target, *arguments)
    return SPECS[target].infer(node, types.__getitem__)


def item_of(target: Any, index: int, *arguments: Any) -> NodeType:
    """Type of one result of an op that has several."""
    node, types = node_of(target, *arguments)
    types[node] = SPECS[target].infer(node, types.__getitem__)
    item = node.graph.call_function(operator.getitem, (node, index))
    item.meta["val"] = torch.zeros(2, 3, 8)
    return SPECS[operator.getitem].infer(item, types.__getitem__)


def operand(x: Tensor, kind: NodeType = ANALOG) -> Operand:
    """A tensor as the counting rules see it."""
    return Operand(tuple(x.shape), kind, float((x != 0).sum()))


def counts(target: Any, operands: list[Operand], result: Operand, *arguments: Any, measured: dict[str, float] | None = None) -> Counts:
    """What the counting rule of an op says."""
    node, _ = node_of(target, *arguments)
    rule = SPECS[target].count
    assert rule is not None
    return rule(node, operands, result, measured or {})


def soft_step(u: Tensor, name: str, width: float) -> Tensor:
    """An antiderivative of the surrogate in u: its derivative is left to autograd."""
    z = u / width
    if name == "sigmoid":
        return torch.sigmoid(4 * z)
    if name == "atan":
        return torch.atan(z) / torch.pi
    if name == "straight-through":
        return (z / 2).clamp(-0.5, 0.5)
    assert name == "triangular"
    z = z.clamp(-1, 1)
    return z - z * z.abs() / 2


class Step(torch.autograd.Function):
    """``1[u >= 0]`` whose gradient is the one of ``soft_step``."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, name: str, width: float) -> Tensor:
        ctx.save_for_backward(u)
        ctx.name, ctx.width = name, width
        return (u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        with torch.enable_grad():
            u = ctx.saved_tensors[0].detach().requires_grad_()
            (slope,) = torch.autograd.grad(soft_step(u, ctx.name, ctx.width).sum(), u)
        return grad * slope, None, None


def gradients(output: Tensor, inputs: list[Tensor], seed: int = 0) -> list[Tensor]:
    """Gradients of a random linear function of the output."""
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=output.dtype)
    return list(torch.autograd.grad((output * weight).sum(), inputs))


def random(*shape: int, seed: int = 0, grad: bool = True, dtype: torch.dtype = torch.float64, low: float = -1.5, high: float = 1.5) -> Tensor:
    """Uniform numbers."""
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * (high - low) + low
    return x.requires_grad_(grad)


@st.composite
def dyadics(draw: st.DrawFn, low: int, high: int, count: int, denominator: int = 8) -> list[float]:
    """Numbers ``n / 8``: sums and differences of a few of them are exact in float32."""
    return [n / denominator for n in draw(st.lists(st.integers(low, high), min_size=count, max_size=count))]


def same_layout(op: Any, *inputs: Any) -> bool:
    """Whether the fake kernel promises the strides that the real one gives."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = op(*inputs)
    mode = FakeTensorMode()
    with mode:
        fake = op(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in inputs))
    pairs = zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]
    return all(r.shape == f.shape and r.stride() == f.stride() and r.dtype == f.dtype for r, f in pairs)
