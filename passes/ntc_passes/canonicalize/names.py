"""Names that a person recognizes: nodes after their modules, weights without marks of how they were made."""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Iterator

from torch import Tensor
from torch.fx import Node

from ntc.meta import MADE_BY, module_of
from ntc.ops import aten
from ntc.program import Program, op_name
from ntc_passes.canonicalize.making import NAME

__all__ = ["tidy_names"]

_SPECIAL = re.compile(r"\W+")
_LAYERS = frozenset({
    aten.layer_norm.default, aten.rms_norm.default, aten.embedding.default, aten.gelu.default, aten.relu.default, aten.silu.default,
})  # fmt: skip
# torch.fx gives these another name whenever it copies a graph.
_RESERVED = frozenset({*dir(builtins), *keyword.kwlist, "self", "torch", "device", "inf", "nan", "fx_pytree", "pytree", "operator"})


def tidy_names(program: Program) -> int:
    """Names that a person recognizes: nodes after their modules, weights without marks of how they were made."""
    graph = program.graph
    tensors, count = _tidy_tensors(program)
    modules = {m for n in graph.nodes if n.op == "call_function" for m in _parents(module_of(n))}
    wanted = {n: _wanted_name(n, leaf=module_of(n) not in modules) for n in graph.nodes if n.op == "call_function"}
    # All names are given anew, in graph order: what a node was called before has no influence.
    taken = {n.name for n in graph.nodes if n.op not in ("call_function", "get_attr")}
    for node in graph.nodes:
        if node.op not in ("call_function", "get_attr"):
            continue
        base = wanted[node] if node in wanted else _identifier(f"p_{node.target}")
        unique, number = base, 0
        while unique in taken or unique in _RESERVED:
            number += 1
            unique = f"{base}_{number}"
        taken.add(unique)
        count += unique != node.name
        node.name = unique
    if count:
        program.module = program.with_graph(graph, tensors).module
    return count


def _tidy_tensors(program: Program) -> tuple[dict[str, Tensor], int]:
    """Drop the mark ``_t`` of weights that this pass turned or computed, unless the one of the model is still in use."""
    attributes = [n for n in program.graph.nodes if n.op == "get_attr"]
    targets, count = {str(n.target) for n in attributes}, 0
    tensors: dict[str, Tensor] = {}
    for node in attributes:
        old = str(node.target)
        new = old.removesuffix("_t")
        if new in targets or NAME not in node.meta[MADE_BY]:
            new = old
        tensors[new] = program.tensor(old)
        node.target = new
        count += new != old
    return tensors, count


def _parents(module: str) -> Iterator[str]:
    """``a.b`` and ``a`` for ``a.b.c``."""
    while "." in module:
        module = module.rpartition(".")[0]
        yield module
    if module:
        yield ""


def _wanted_name(node: Node, leaf: bool) -> str:
    """What to call a node: its module if that is nothing but this op, else module and op."""
    module, kind = _short(module_of(node)), op_name(node.target).rpartition(".")[2]
    if node.target is aten.linear.default and isinstance(node.args[1], Node):
        # Where a fused projection was split, the weight says which part; a tied weight says less than the module.
        weight = _short(str(node.args[1].target).removesuffix(".weight"))
        return _identifier(weight if not module or weight.startswith(module) else module)
    named_by_module = leaf and module and node.target in _LAYERS
    return _identifier(module if named_by_module else f"{module}.{kind}" if module else kind)


def _short(name: str) -> str:
    return name.removeprefix("transformer.").removeprefix("model.")


def _identifier(text: str) -> str:
    name = _SPECIAL.sub("_", text).strip("_").lower()
    return name if name and not name[0].isdigit() else f"n_{name}"
