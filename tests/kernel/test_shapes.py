"""Shapes: a call that is alike to one before is not run again, and one that differs in anything but values is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from programs import canonical, spiking
from torch import Tensor, nn
from torch.fx import Graph, Node

from ntc.ops import aten
from ntc.program import Program
from ntc.shapes import Shapes


def plain(program: Program) -> list[Any]:
    """Shapes by running every node, in a propagation of its own."""
    work = program.copy()
    shapes = Shapes()
    ids = shapes.dynamic(work.example)
    values: dict[Node, Any] = {}
    for node in work.graph.nodes:
        if node.op == "placeholder":
            values[node] = ids
        elif node.op == "get_attr":
            values[node] = shapes.from_tensor(work.tensor(node), static_shapes=True)
        elif node.op == "call_function":
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
            with shapes:
                values[node] = node.target(*args, **kwargs)
    return [described(v) for v in values.values()]


def described(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return str(value)
    return [str(s) for s in (*value.shape, *value.stride())], value.dtype


@pytest.mark.parametrize("make", [canonical, spiking])
def test_every_node_has_the_shape_that_running_it_gives(make: Callable[..., Program]) -> None:
    program = make().copy()
    program.propagate()
    got = [described(n.meta["val"]) for n in program.graph.nodes if n.op != "output"]
    assert got == plain(program)


def test_a_third_block_costs_no_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = [canonical(n_layer=layers).copy() for layers in (2, 3)]
    entered, enter = list[Shapes](), Shapes.__enter__
    monkeypatch.setattr(Shapes, "__enter__", lambda mode: (entered.append(mode), enter(mode))[1])
    counts = []
    for program in programs:
        entered.clear()
        program.propagate()
        counts.append(len(entered))
    assert 0 < counts[0] == counts[1]


def called(shapes: Shapes, target: Any, *args: Any, **kwargs: Any) -> Any:
    """The value of a call whose arguments are values; a tensor comes in as a node."""
    graph = Graph()

    def node(value: Any) -> Any:
        if not isinstance(value, Tensor | torch.SymInt):
            return value
        made = graph.placeholder("x")
        made.meta["val"] = value
        return made

    return shapes.call(graph.call_function(target, tuple(map(node, args)), {k: node(v) for k, v in kwargs.items()}))


def test_calls_that_differ_are_told_apart() -> None:
    shapes = Shapes()
    x, y = shapes.dynamic(torch.zeros(3, 4)), shapes.dynamic(torch.zeros(3, 4))
    assert called(shapes, aten.relu.default, x) is called(shapes, aten.relu.default, x)
    assert called(shapes, aten.relu.default, x) is not called(shapes, aten.relu.default, y)  # other symbols
    assert called(shapes, aten.relu.default, x).shape == x.shape and called(shapes, aten.relu.default, y).shape == y.shape
    whole = shapes.constant(torch.zeros(4, dtype=torch.int64))
    assert called(shapes, aten.mul.Tensor, whole, 1).dtype == torch.int64
    assert called(shapes, aten.mul.Tensor, whole, 1.0).dtype == torch.float32  # equal to 1, and not the same
    wide, narrow = shapes.constant(torch.zeros(4, 6)), shapes.constant(torch.zeros(6, 4).T)
    assert called(shapes, aten.abs.default, wide).stride() == (6, 1)
    assert called(shapes, aten.abs.default, narrow).stride() == (1, 4)
    assert called(shapes, aten.sum.dim_IntList, wide, [0]).shape == (6,)
    assert called(shapes, aten.sum.dim_IntList, wide, [1]).shape == (4,)
    assert called(shapes, aten.sum.dim_IntList, wide, [1], keepdim=True).shape == (4, 1)


def test_a_size_that_depends_on_values_is_another_in_every_call() -> None:
    shapes = Shapes()
    x = shapes.constant(torch.zeros(4))
    assert called(shapes, aten.nonzero.default, x).shape[0] is not called(shapes, aten.nonzero.default, x).shape[0]
    assert str(called(shapes, aten.nonzero.default, x).shape[0]) != str(called(shapes, aten.nonzero.default, x).shape[0])


def test_weights_of_one_shape_share_their_fake_and_parameters_stay_parameters() -> None:
    shapes = Shapes()
    assert shapes.constant(torch.zeros(2, 3)) is shapes.constant(torch.ones(2, 3))
    assert shapes.constant(torch.zeros(2, 3)) is not shapes.constant(torch.ones(3, 2))
    assert isinstance(shapes.constant(nn.Parameter(torch.zeros(2, 3))), nn.Parameter)
    assert not isinstance(shapes.constant(torch.zeros(2, 3)), nn.Parameter)


def test_a_fake_tensor_leads_back_to_its_propagation() -> None:
    program = canonical(n_layer=1).copy()
    program.propagate()
    ids = next(iter(program.graph.nodes))
    assert Shapes.of(ids.meta["val"]) is Shapes.of(program.find("ln_f").meta["val"])
