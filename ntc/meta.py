"""The metadata contract of graph nodes, and the only way to make a node.

==================  ========================  ==========================  =========================================
key                 type                      writer                      reader
==================  ========================  ==========================  =========================================
``val``             FakeTensor or SymInt      runner (shape propagation)  passes, back ends
``nn_module_stack`` torch's own               capture                     ``module_of``
``stack_trace``     torch's own               capture                     ``source_of``
``ntc.origin``      tuple of str              capture, ``building``       ``ntc explain``: captured nodes it stands for
``ntc.made_by``     tuple of str              ``building``                ``ntc explain``: passes, oldest first
``ntc.module``      str                       capture, ``building``       reports, netlist, overrides
``ntc.source``      str                       capture, ``building``       errors, ``ntc explain``
``ntc.type``        NodeType                  verify                      passes, back ends
``ntc.neuron``      NeuronSpec                policy passes               ``insert-neurons``, ``fold-thresholds``
``ntc.scale``       float or list of float    ``quantize``                back ends: n stands for n times it; per channel as a list
``ntc.stats``       dict of name to Tensor    ``calibrate``               policy passes; not saved
``ntc.state``       StateSpec                 ``to-streaming``            ``Program``: a part of the state, on its placeholder
``ntc.name``        str                       ``building``                ``Program.refresh``: the name to take when it is free
==================  ========================  ==========================  =========================================

``val`` may be invalidated and is made again; what must reach an artefact is plain data.
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.fx import Graph, Node

__all__ = [
    "MADE_BY", "MODULE", "NAME", "NEURON", "ORIGIN", "SCALE", "SOURCE", "STATE", "STATS", "TYPE", "NeuronSpec", "block_in", "block_of",
    "building", "module_of", "raised_at", "source_of", "stamp_captured", "where",
]  # fmt: skip

ORIGIN = "ntc.origin"
MADE_BY = "ntc.made_by"
MODULE = "ntc.module"
SOURCE = "ntc.source"
TYPE = "ntc.type"
NEURON = "ntc.neuron"
SCALE = "ntc.scale"
STATS = "ntc.stats"
STATE = "ntc.state"
NAME = "ntc.name"


@dataclass(frozen=True)
class NeuronSpec:
    """The neuron that a rate node will become: written by policy, read by mechanism.

    Attributes:
        kind: ``if`` (integrate and fire) or ``lif`` (leaky integrate and fire; binary only).
        steps: T, number of time steps.
        signed: Ternary spikes {-1, 0, 1} instead of {0, 1}.
        v0: Initial membrane potential as a fraction of the threshold; 1/2 turns floor into round (Bu et al. 2022).
        tau: Membrane time constant [steps] of ``lif``, >= 1; None for ``if``.
        reset: ``soft`` = subtract the threshold.
        role: What it is for in its block (``q``, ``k``, ``v``, ``ssa``, ``ffn``), for reports and overrides.
    """

    kind: Literal["if", "lif"] = "if"
    steps: int = 4
    signed: bool = False
    v0: float = 0.5
    tau: float | None = None
    reset: Literal["soft"] = "soft"
    role: str = ""


def module_of(node: Node) -> str:
    """Qualified name of the model's module that a node came from, such as ``transformer.h.0.mlp.c_fc``; may be empty."""
    if MODULE in node.meta:
        return str(node.meta[MODULE])
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    return str(next(reversed(stack.values()))[0])


# The frame in the model is wanted, not torch's own or that of the wrapper which captures it.
_NOT_THE_MODEL = (os.path.dirname(torch.__file__) + os.sep, os.path.join(os.path.dirname(__file__), "frontend.py"))
_FRAME = re.compile(r'File "(?P<path>[^"]+)", line (?P<line>\d+), in (?P<function>\w+)')


def source_of(node: Node) -> str:
    """Line of the model's source that a node came from, such as ``modeling_gpt2.py:246 in forward``; may be empty."""
    if SOURCE in node.meta:
        return str(node.meta[SOURCE])
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    chosen = next((f for f in reversed(frames) if not f["path"].startswith(_NOT_THE_MODEL)), None)
    if chosen is None:
        return ""
    return f"{chosen['path'].rsplit('/', 1)[-1]}:{chosen['line']} in {chosen['function']}"


def where(node: Node) -> str:
    """Name a node, its module and its line of model source, for the end of an error message.

    Example: ``node %gelu (transformer.h.0.mlp.act, modeling_gpt2.py:246 in forward)``.
    """
    details = [part for part in (module_of(node), source_of(node)) if part]
    return f"node %{node.name}" + (f" ({', '.join(details)})" if details else "")


def raised_at(error: BaseException, model: nn.Module) -> str:
    """Name the innermost module of a model, and its line, whose code an error went through, for the middle of an error message.

    Example: `` at model.layers.0.mlp.experts (moe.py:118 in forward)``. Empty if it went through none.
    """
    names = {id(module): name or type(model).__name__ for name, module in model.named_modules()}
    cause: BaseException | None = error
    while cause is not None:
        found = ""
        for frame, line in traceback.walk_tb(cause.__traceback__):
            path = frame.f_code.co_filename
            name = names.get(id(frame.f_locals.get("self")))
            if name and not path.startswith(_NOT_THE_MODEL):
                found = f" at {name} ({os.path.basename(path)}:{line} in {frame.f_code.co_name})"
        if found:
            return found
        cause = cause.__cause__ or cause.__context__  # torch.export wraps what it meets
    return ""


_BLOCK = re.compile(r"^(?P<block>(?:.*\.)?(?:h|layers|blocks|layer|block)\.\d+)(?:\.|$)")


def block_of(node: Node) -> str:
    """The transformer block that a node lies in, such as ``transformer.h.0``; empty outside of blocks."""
    return block_in(module_of(node))


def block_in(module: str) -> str:
    """The transformer block that a module lies in: ``transformer.h.0`` of ``transformer.h.0.mlp``; empty outside of blocks."""
    found = _BLOCK.match(module)
    return found["block"] if found else ""


def stamp_captured(graph: Graph, strip_prefix: str = "") -> None:
    """Freeze where each node came from, right after capture, in a form that survives saving."""
    for node in graph.nodes:
        module = module_of(node)
        if not re.fullmatch(r"[\w.]*", module) or "empty_nn_module" in module:  # torch's mark for "no module"
            module = ""
        node.meta[MODULE] = module.removeprefix(strip_prefix).lstrip(".") if strip_prefix else module
        node.meta[SOURCE] = source_of(node)
        node.meta[ORIGIN] = (node.name,)
        node.meta[MADE_BY] = ("capture",)


def _union(parts: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for part in parts for name in part))


@contextmanager
def building(graph: Graph, *, before: Node, stands_for: Iterable[Node], by: str) -> Iterator[Callable[..., Node]]:
    """Make nodes that say where they come from.

    Inside the block, ``call(target, *args, **kwargs)`` inserts a ``call_function`` node (``call(name)`` with a string
    a ``get_attr`` node) before ``before``. The new nodes take the union of the origins of ``stands_for``, and the
    module and source line of its first node (``at=NODE`` picks another one).

    Args:
        graph: The graph to add to.
        before: New nodes go before this one.
        stands_for: Nodes whose meaning the new ones carry; not empty.
        by: Name of the pass.
    """
    old = list(stands_for)
    origin = _union(node.meta.get(ORIGIN, ()) for node in old)
    made_by = _union([*(node.meta.get(MADE_BY, ()) for node in old), (by,)])

    def call(target: Callable[..., Any] | str, *args: Any, at: Node | None = None, name: str | None = None, **kwargs: Any) -> Node:
        with graph.inserting_before(before):
            if isinstance(target, str):
                node = graph.create_node("get_attr", target, name=name or target.replace(".", "_"))
            else:
                node = graph.create_node("call_function", target, args, kwargs, name=name)
        place = at or old[0]
        node.meta |= {MODULE: module_of(place), SOURCE: source_of(place), ORIGIN: origin, MADE_BY: made_by}
        if name is not None:
            node.meta[NAME] = name
        return node

    yield call
