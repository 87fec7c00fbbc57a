"""Where a program makes positions of its own, and how they move on with the sequence.

Positions are what depends on the *number* of tokens and on no token: a piece of constant graph that ends where it meets the
tokens. In a streaming program it is given L new tokens and has to give what the parallel program gives for the last L of ``position + L``.
Two beginnings of such pieces are known, by what they compute and not by how they are spelled:

- n, n + 1 ... n + L - 1 for some n, from ``arange`` or anything else: ``position`` is added;
- the first L rows of a table: the rows from ``position`` on are taken.

What is made of them (embeddings, the angles of rotary embeddings) follows by itself, and whether it is right is checked on values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Node

from ntc.meta import NAME, building
from ntc.ops import aten
from ntc.probe import evaluate, probe_sizes
from ntc.program import Program

__all__ = ["constant_nodes", "shift_positions", "token_axis"]


def shift_positions(program: Program, position: Node, by: str) -> int:
    """Let positions begin at ``position [1]``; returns at how many places.

    Args:
        program: The program; edited.
        position: The node that holds the number of tokens so far.
        by: Name of the pass.
    """
    constant, moved, sites = constant_nodes(program), set[Node](), 0
    for node in list(program.graph.nodes):
        if node not in constant or any(a in moved for a in node.all_input_nodes):
            moved.update({node} & constant)  # what is made of moved positions has moved with them
            continue
        axis = token_axis(program, node)
        if axis is None:
            continue
        with building(program.graph, before=node.next, stands_for=[node], by=by) as call:
            if _counts_tokens(program, node):
                shifted = call(aten.add.Tensor, node, position, name=node.name)
                node.meta[NAME] = f"{node.name}_within"
            elif _is_beginning(program, node, axis, constant):
                length = call(aten.sym_size.int, program.graph.find_nodes(op="placeholder")[0], 1)
                numbers = call(aten.arange.default, length, device=torch.device("cpu"), pin_memory=False)
                rows = call(aten.add.Tensor, numbers, position)
                shifted = call(aten.index_select.default, node.args[0], axis, rows, name=node.name)
            else:
                continue
        node.replace_all_uses_with(shifted, delete_user_cb=lambda user, own=shifted: user is not own)
        moved.add(shifted)
        sites += 1
    return sites


def constant_nodes(program: Program) -> set[Node]:
    """Nodes that no token has an influence on: constants, sizes, and what is made of them."""
    found: set[Node] = set()
    for node in program.graph.nodes:
        known = node.op == "get_attr" or node.target is aten.sym_size.int
        if known or (node.op == "call_function" and all(a in found for a in node.all_input_nodes)):
            found.add(node)
    return found


def token_axis(program: Program, node: Node) -> int | None:
    """The one axis of a tensor that is as long as the text; None if there is none, or another size depends on it too."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    sizes = [program.size(s) for s in value.shape]
    return sizes.index("L") if sum("L" in size for size in sizes) == sizes.count("L") == 1 else None


def _counts_tokens(program: Program, node: Node) -> bool:
    """Whether it is n, n + 1 ... n + L - 1, in any layout and any dtype; n does not depend on L."""
    first: list[float] = []

    def pair(value: Tensor, length: int) -> tuple[Tensor, Tensor]:
        first.append(float(value.flatten()[0]))
        return value.flatten(), torch.arange(length) + first[0]

    return _same(program, node, pair)


def _is_beginning(program: Program, node: Node, axis: int, constant: set[Node]) -> bool:
    """Whether it is the first L entries, along its token axis, of a constant that does not depend on L."""
    table = node.args[0] if node.args else None
    if not isinstance(table, Node) or table not in constant or not isinstance(table.meta["val"], Tensor):
        return False
    if any("L" in program.size(s) for s in table.meta["val"].shape):
        return False

    def pair(value: Tensor, length: int) -> tuple[Tensor, Tensor]:
        return value, evaluate(program, table, {}, (1, length)).narrow(axis, 0, length)

    return _same(program, node, pair)


def _same(program: Program, node: Node, pair: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> bool:
    """Whether the two tensors that ``pair`` makes of the node's value are equal for every probed length."""
    for sizes in probe_sizes(program):
        try:
            got, expected = pair(evaluate(program, node, {}, sizes), sizes[1])
        except (LookupError, RuntimeError, IndexError, ValueError, TypeError):
            return False
        if got.shape != expected.shape or not bool((got == expected).all()):
            return False
    return True
