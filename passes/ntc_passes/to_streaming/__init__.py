"""From a program over whole sequences to one that takes the next tokens and a state.

Before::

    %positions = arange(%length)
    %ssa = ntc.spiking_attention(%q, %k, %v, 4, 4, leak)
    %scaled = ntc.position_scale(%ssa)
    return %logits

After::

    %position: index [1]                            # inputs behind input_ids
    %ssa_memory: current T=4 [4, B, 4, 8, 8]
    %arange = arange(%length)
    %positions = add(%arange, %position)
    %ssa_stream = ntc.spiking_attention_stream(%q, %k, %v, %ssa_memory, 4, 4, leak)
    %ssa = getitem(%ssa_stream, 0)
    %scaled = ntc.position_scale(%ssa, None, %position)
    return %logits, %position_next, %ssa_memory_next

What a token takes from earlier ones becomes state: M of spiking attention (also of the integer grade), keys and values of softmax
attention, the sums of keys of a row-sum scale, and the number of tokens so far, from which positions and rows of position tables are
made (see ``positions.py``). All else works on each token by itself and stays as it is.

The pass is exact up to rounding; but where products are added up in another order a spike may come a step earlier or later, so it
is not declared exact. It checks itself instead, node by node and given equal spikes (see ``check.py``), and refuses a program in which
anything else mixes tokens, with the first such node.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.fx import Node

from ntc.meta import MODULE, SCALE, SOURCE, STATE, TYPE, building, module_of, source_of
from ntc.ops import aten
from ntc.pipeline import Context, Pass, PassResult
from ntc.program import Program
from ntc.spike_type import INDEX, NodeType
from ntc.state import BATCH, PAST, StateSpec
from ntc_passes.to_streaming.check import check
from ntc_passes.to_streaming.positions import shift_positions

__all__ = ["ToStreaming"]

_OPS = torch.ops.ntc


class ToStreaming(Pass):
    """Turn the program into one that takes the next tokens and a state: constant cost per token in spiking attention."""

    name = "to-streaming"
    requires = frozenset({"canonical"})
    provides = frozenset({"streaming"})
    refuses: ClassVar = {
        "products-coded": "products of attention on coded trains have no streaming form; known are softmax and spiking attention"
    }

    def run(self, program: Program, context: Context) -> PassResult:
        """Positions, then the ops that mix tokens, then the check."""
        if "streaming" in program.facts:
            return PassResult(False)
        parallel = program.copy()
        edit = StateEdit(program)
        sites = shift_positions(program, edit.position, self.name)
        for node in list(program.graph.nodes):
            if (form := _FORMS.get(node.target)) is not None and form(edit, node) is not False:
                sites += 1
        edit.finish()
        program.refresh()
        return PassResult(True, sites, notes={**check(parallel, program), **_sizes(program)})


def _sizes(program: Program) -> dict[str, int]:
    """Bytes of the state of one sequence: what never grows, and what each token adds."""
    first, second = (sum(part.bytes(past) for part in program.state) for past in (0, 1))
    return {"state_bytes": first, "state_bytes_per_token": second - first}


class StateEdit:
    """Adds a state to a program: inputs behind the token ids, results behind the logits."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.ids = self.last = program.graph.find_nodes(op="placeholder")[0]
        self.results: list[Node] = []
        self.position = self.part("position", INDEX, (1,), torch.int64, self.ids)
        with building(program.graph, before=self.end, stands_for=[self.ids], by=ToStreaming.name) as call:
            length = call(aten.sym_size.int, self.ids, 1, name="length")
            self.results.append(call(aten.add.Tensor, self.position, length, name="position_next"))

    @property
    def end(self) -> Node:
        """The output node."""
        (node,) = self.program.graph.find_nodes(op="output")
        assert isinstance(node, Node)
        return node

    def part(self, name: str, kind: NodeType, shape: tuple[int | str, ...], dtype: torch.dtype, of: Node) -> Node:
        """A new part of the state, for the node ``of``."""
        with self.program.graph.inserting_after(self.last):
            node = self.last = self.program.graph.placeholder(name)
        node.meta |= {STATE: StateSpec(node.name, kind, shape, dtype), MODULE: module_of(of), SOURCE: source_of(of)}
        return node

    def replace(self, node: Node, target: Callable[..., Any], parts: list[Node], *args: Any) -> None:
        """Put an op with several results in the place of ``node``: the first stands for it, the others are the new ``parts``."""
        with building(self.program.graph, before=node, stands_for=[node], by=ToStreaming.name) as call:
            several = call(target, *args, name=f"{node.name}_stream")
            first = call(operator.getitem, several, 0, name=node.name)
            first.meta |= {key: node.meta[key] for key in (SCALE,) if key in node.meta}
            self.results += [call(operator.getitem, several, i, name=f"{part.name}_next") for i, part in enumerate(parts, 1)]
        node.replace_all_uses_with(first)
        self.program.graph.erase_node(node)

    def finish(self) -> None:
        """The state behind the logits."""
        (logits,) = self.end.args
        self.end.args = ((logits, *self.results),)


def _lead(value: torch.Tensor) -> tuple[int | str, ...]:
    """What stands before the tokens: the time steps, if any, and the batch."""
    return (*(int(size) for size in value.shape[:-3]), BATCH)


def _wide(value: torch.Tensor) -> torch.dtype:
    """Sums over all tokens are held in float32 or better."""
    return torch.promote_types(value.dtype, torch.float32)


def _arguments(node: Node) -> tuple[Any, ...]:
    """Positional, as the passes make them."""
    arguments: tuple[Any, ...] = node.args
    return arguments


def _attention(edit: StateEdit, node: Node) -> None:
    query, key, value, heads, kv_heads, scale = _arguments(node)
    kind: NodeType = node.meta[TYPE]
    parts = [
        edit.part(f"{node.name}_{name}", kind, (BATCH, PAST, int(x.meta["val"].shape[-1])), x.meta["val"].dtype, node)
        for name, x in (("keys", key), ("values", value))
    ]
    edit.replace(node, _OPS.attention_stream.default, parts, query, key, value, *parts, heads, kv_heads, scale)


def _memory_shape(key: Node, value: Node, kv_heads: int) -> tuple[int | str, ...]:
    """``[T, B, Hk, D, Dv]``."""
    k, v = key.meta["val"], value.meta["val"]
    return (*_lead(k), kv_heads, int(k.shape[-1]) // kv_heads, int(v.shape[-1]) // kv_heads)


def _spiking_attention(edit: StateEdit, node: Node) -> None:
    query, key, value, heads, kv_heads, *leak = _arguments(node)
    memory = edit.part(f"{node.name}_memory", node.meta[TYPE], _memory_shape(key, value, kv_heads), _wide(key.meta["val"]), node)
    edit.replace(node, _OPS.spiking_attention_stream.default, [memory], query, key, value, memory, heads, kv_heads, *leak)


def _row_sum_scale(edit: StateEdit, node: Node) -> None:
    current, query, key, heads, kv_heads = _arguments(node)
    k = key.meta["val"]
    sums = edit.part(f"{node.name}_key_sums", node.meta[TYPE], (*_lead(k), int(k.shape[-1])), _wide(k), node)
    edit.replace(node, _OPS.row_sum_scale_stream.default, [sums], current, query, key, sums, heads, kv_heads)


def _position_scale(edit: StateEdit, node: Node) -> None:
    node.args = (node.args[0], node.args[1] if len(node.args) > 1 else None, edit.position)


def _integer_attention(edit: StateEdit, node: Node) -> None:
    query, key, value, heads, kv_heads, *more = _arguments(node)
    memory = edit.part(f"{node.name}_memory", node.meta[TYPE], _memory_shape(key, value, kv_heads), torch.int32, node)
    target = _OPS.integer_attention_stream.default
    edit.replace(node, target, [memory], query, key, value, memory, heads, kv_heads, *more, edit.position)


def _requantize(edit: StateEdit, node: Node) -> bool:
    multiplier: Any = node.args[1]
    if multiplier.meta["val"].dim() < 2:  # the same at every position
        return False
    node.target, node.args = _OPS.requantize_stream.default, (*node.args, edit.position)
    return True


_FORMS: dict[Any, Callable[[StateEdit, Node], bool | None]] = {
    _OPS.attention.default: _attention,
    _OPS.spiking_attention.default: _spiking_attention,
    _OPS.row_sum_scale.default: _row_sum_scale,
    _OPS.position_scale.default: _position_scale,
    _OPS.integer_attention.default: _integer_attention,
    _OPS.requantize.default: _requantize,
}
"""How each op that mixes tokens, or knows where a token stands, is made to go on from earlier ones; false = this one needs not."""
