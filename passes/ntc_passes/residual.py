r"""The residual stream as one vector space: who writes into it, who reads it.

    x_0 = E[ids] + P[positions],   x_(i+1) = x_i + f_i(x_i),   logits = W norm(x_n)

Values that are added to each other are vectors of one space, and a change of its basis has to be made in all of them at once. A
``Stream`` is such a set of values: closed under addition and scaling by a number. What is neither an addition nor a scaling *writes*
(embeddings, linear layers); what takes a value and is neither *reads* (norms, linear layers). Every norm and every projection that nothing
is added to is a little stream by itself; the residual stream is the one that the most nodes belong to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.fx import Node

from ntc.ops import aten
from ntc.program import Program

__all__ = ["Stream", "is_norm_of_stream", "residual_stream", "streams"]


@dataclass(frozen=True)
class Stream:
    """Values ``[..., C]`` in one basis.

    Attributes:
        width: C.
        members: The nodes, in graph order.
        writers: Those that are no sum and no multiple of others.
        readers: (node, which of its arguments is a member), in graph order; the program's output counts.
    """

    width: int
    members: tuple[Node, ...]
    writers: tuple[Node, ...]
    readers: tuple[tuple[Node, Node], ...]


def streams(program: Program) -> list[Stream]:
    """Every stream of the program that a norm over its whole width reads or an embedding writes, in graph order."""
    order = {node: number for number, node in enumerate(program.graph.nodes)}
    found, seen = list[Stream](), set[Node]()
    for node in program.graph.nodes:
        start = node if node.target is aten.embedding.default else node.args[0] if is_norm_of_stream(node) else None
        if isinstance(start, Node) and start not in seen and _width(start):
            stream = _grown(start, order)
            seen.update(stream.members)
            found.append(stream)
    return found


def residual_stream(program: Program) -> Stream | None:
    """The stream with the most members; None if nothing is embedded or normed."""
    return max(streams(program), key=lambda stream: len(stream.members), default=None)


def is_norm_of_stream(node: Node) -> bool:
    """Whether a node is an RMSNorm or LayerNorm over the last axis of a value ``[B, L, C]`` (a norm per head is none)."""
    if node.target not in (aten.rms_norm.default, aten.layer_norm.default):
        return False
    shape = node.args[1]
    return isinstance(shape, list | tuple) and len(shape) == 1 and node.meta["val"].dim() == 3


def _grown(start: Node, order: dict[Node, int]) -> Stream:
    width = _width(start)
    members, frontier, readers = set[Node](), [start], list[tuple[Node, Node]]()
    while frontier:
        node = frontier.pop()
        if node in members:
            continue
        members.add(node)
        frontier.extend(_terms(node))
        for user in node.users:
            if node in _terms(user) and _width(user) == width:
                frontier.append(user)
            else:
                readers.append((user, node))
    ordered = sorted(members, key=order.__getitem__)
    return Stream(
        width, tuple(ordered), tuple(n for n in ordered if not _terms(n)), tuple(sorted(readers, key=lambda pair: order[pair[0]]))
    )


def _terms(node: Node) -> tuple[Node, ...]:
    """What a node is a sum or a multiple of; empty if it is neither."""
    if node.target is aten.add.Tensor and len(tensors := list(_values(node))) == 2:
        return tuple(tensors)
    if node.target in (aten.mul.Tensor, aten.div.Tensor):
        values = list(_values(node))
        moving = [v for v in values if not _is_number(v)]
        if len(moving) == 1 and (node.target is aten.mul.Tensor or moving[0] is node.args[0]):
            return (moving[0],)
    return ()


def _values(node: Node) -> Iterator[Node]:
    yield from (a for a in node.args if isinstance(a, Node) and isinstance(a.meta.get("val"), Tensor))


def _is_number(node: Node) -> bool:
    """A constant with one element."""
    return node.op == "get_attr" and node.meta["val"].numel() == 1


def _width(node: Node) -> int:
    """Channels of a value with a last axis of known size; 0 of anything else."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 1 or not isinstance(value.shape[-1], int):
        return 0
    return int(value.shape[-1])
