"""New weights in place of old ones: shared where the old one was shared, untied where its users need different ones now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torch.fx import Node

from ntc.meta import building, module_of
from ntc.ops import aten
from ntc.program import Program
from ntc.scratch import released

__all__ = ["NewWeights", "constant_weights", "times"]


def constant_weights(layer: Node) -> str:
    """Why the weights of a linear layer or embedding cannot be made anew, or an empty string."""
    at = slice(1, 3) if layer.target is aten.linear.default else slice(0, 1)
    for part in layer.args[at]:
        if isinstance(part, Node) and part.op != "get_attr":
            return f"%{part.name}, its weight or bias, is computed and not a constant"
    return ""


def times(factor: Tensor | float) -> Callable[[Tensor], Tensor]:
    """What multiplies a matrix by a number, or its columns by one each, in place."""
    return lambda matrix: matrix.mul_(factor)


class NewWeights:
    """The tensors that one pass makes of others.

    One tensor for each pair of an old tensor and what is done to it: two layers with one weight, of which the same is made, still
    share it. Where something else is made of it, or it is used as it was, the two are untied, and ``untied`` says so.
    """

    def __init__(self, program: Program, by: str) -> None:
        self.program, self.by = program, by
        self._made: dict[tuple[str, Hashable], str] = {}
        self._asked: Counter[str] = Counter()
        self._in_place: dict[str, list[tuple[str, str]]] = {}  # old name: (wanted, given until the old one is gone) of each new one

    def of(self, tensor: Node, change: Hashable, make: Callable[[Tensor], Tensor], layer: Node, leaf: str = "") -> str:
        """Name of the tensor that ``make`` makes of that of a ``get_attr`` node.

        Args:
            tensor: The old one.
            change: What ``make`` does: equal for equal changes.
            make: From float64, a copy that it may write into, to float64; rounded to the old dtype.
            layer: Who uses it; a weight that several modules share gets the name of this one.
            leaf: For a tensor that stands beside the old one and not in its place: ``bias`` beside ``weight``.
        """
        old = str(tensor.target)
        if (old, change) not in self._made:
            value = self.program.tensor(tensor).detach()
            wanted = self._name(tensor, layer, leaf)
            self._asked[wanted] += 1
            if (number := self._asked[wanted]) > 1:  # two tensors cannot both get the name when it is free
                wanted = f"{wanted}_{number - 1}"
            self._made[old, change] = given = self.program.add_tensor(wanted, make(value.to(torch.float64, copy=True)).to(value.dtype))
            released([value])  # of a large network one weight is in memory at a time
            if not leaf:
                self._in_place.setdefault(old, []).append((wanted, given))
        return self._made[old, change]

    def linear(self, layer: Node, source: Node, weight: str, bias: str | None, stands_for: list[Node]) -> Node:
        """Put a linear layer with new weights in the place of an old one."""
        with building(self.program.graph, before=layer, stands_for=[layer, *stands_for], by=self.by) as call:
            parts = [call(weight, at=layer), *([call(bias, at=layer)] if bias is not None else [])]
            made = call(aten.linear.default, source, *parts, at=layer, name=layer.name)
        self._put(made, layer)
        return made

    def embedding(self, layer: Node, weight: str) -> Node:
        """Put an embedding with a new table in the place of an old one."""
        with building(self.program.graph, before=layer, stands_for=[layer], by=self.by) as call:
            made = call(aten.embedding.default, call(weight, at=layer), *layer.args[1:], at=layer, name=layer.name, **layer.kwargs)
        self._put(made, layer)
        return made

    def _put(self, made: Node, layer: Node) -> None:
        made.meta["val"] = layer.meta["val"]
        layer.replace_all_uses_with(made)
        self.program.graph.erase_node(layer)

    def untied(self) -> dict[str, list[str]]:
        """Old tensors that are still in use, or of which several were made, and the new ones; call it when all is done."""
        self.program.graph.eliminate_dead_code()
        made_here = set(self._made.values())
        live = {str(n.target) for n in self.program.graph.find_nodes(op="get_attr")} - made_here
        found: dict[str, list[str]] = {}
        for old, made in self._in_place.items():
            if old in live or len(made) > 1:
                for wanted, given in made:
                    name = given if wanted in live else wanted
                    live.add(name)
                    found.setdefault(old, []).append(name)
        return found

    def _name(self, tensor: Node, layer: Node, leaf: str) -> str:
        """The old name, or that of the layer if the old one belongs to a module of several."""
        old, module = str(tensor.target), module_of(layer)
        owners = {module_of(u) for n in self.program.graph.find_nodes(op="get_attr") if n.target == old for u in n.users}
        owner, _, last = old.rpartition(".")
        if len(owners) > 1 and module and not old.startswith(f"{module}."):
            return f"{module}.{leaf or last}"
        return ".".join(filter(None, (owner, leaf))) if leaf else old
