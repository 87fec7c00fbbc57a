"""Fused projections are taken apart: three linears for queries, keys and values, two for a gate and what it gates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Node

from ntc.ops import aten
from ntc.probe import Gathered, gather_of
from ntc.program import Program
from ntc_passes.canonicalize.making import constant, making

__all__ = ["ACTIVATIONS", "channels_of", "split_fused_projections"]

ACTIVATIONS = frozenset({aten.silu.default, aten.gelu.default, aten.relu.default, aten.sigmoid.default, aten.tanh.default})


def channels_of(program: Program, g: Gathered, part: str, call: Callable[..., Node]) -> Node | None:
    """A node that holds the chosen channels of a root: itself, rows of its linear layer, or a slice.

    ``part`` (``q``, ``k``, ``v``, ``gate`` or ``up``) names the rows.
    """
    shape = g.root.meta["val"].shape
    heads = len(shape) == 4  # [B, G, L, E]
    if torch.equal(g.channels, torch.arange(shape[1] * shape[3] if heads else shape[2])):
        return _merged(g.root, call) if heads else g.root
    if g.root.target is aten.linear.default:
        arguments: list[Any] = [g.root.args[0]]
        for tensor in g.root.args[1:]:
            if isinstance(tensor, Node):
                rows = program.tensor(tensor).detach()[g.channels]
                arguments.append(call(constant(program, _row_name(str(tensor.target), part), rows), at=g.root))
        return call(aten.linear.default, *arguments, at=g.root)
    first = int(g.channels[0])
    if torch.equal(g.channels, torch.arange(first, first + len(g.channels))):
        return call(aten.slice.Tensor, _merged(g.root, call) if heads else g.root, -1, first, first + len(g.channels))
    return None


def _merged(heads: Node, call: Callable[..., Node]) -> Node:
    return call(aten.flatten.using_ints, call(aten.transpose.int, heads, 1, 2), 2)


def _row_name(tensor: str, part: str) -> str:
    """``c_attn.weight`` (``c_attn.weight_t`` if we turned it) becomes ``c_attn.q.weight``, a bare ``w_qkv`` ``w_qkv_q``."""
    owner, _, leaf = tensor.removesuffix("_t").rpartition(".")
    return f"{owner}.{part}.{leaf}" if owner and leaf in ("weight", "bias") else f"{tensor.removesuffix('_t')}_{part}"


def split_fused_projections(program: Program) -> int:
    """Slices of one fused projection in an ``ntc::attention`` or a gated FFN: each gets the rows of the weight that it uses."""
    count = 0
    for node, at, part in [*_attention_arguments(program), *_gate_arguments(program)]:
        argument = node.args[at]
        assert isinstance(argument, Node)
        found = gather_of(program, argument, lambda t: t)
        if found is None or found.factor != 1.0 or found.root is argument:
            continue
        if part in ("gate", "up") and found.root.target is not aten.linear.default:
            continue  # a slice of something else is as short as it gets
        with making(program, node, [found.root, argument]) as call:
            replacement = channels_of(program, found, part, call)
        if replacement is not None:
            node.update_arg(at, replacement)
            count += 1
    return count


def _attention_arguments(program: Program) -> Iterator[tuple[Node, int, str]]:
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.ntc.attention.default):
        for at, part in enumerate("qkv"):
            yield node, at, part


def _gate_arguments(program: Program) -> Iterator[tuple[Node, int, str]]:
    """The input of the activation and the other factor of every product ``act(gate) * up``."""
    for node in program.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        for at, activation in enumerate(node.args):
            if not isinstance(activation, Node) or activation.target not in ACTIVATIONS or len(activation.users) > 1:
                continue
            other = node.args[1 - at]
            if isinstance(other, Node) and isinstance(activation.args[0], Node):
                yield activation, 0, "gate"
                yield node, 1 - at, "up"
                break
