"""What must hold of a program after every pass: a well-formed graph, complete metadata, types that fit, a whole state, the dialect."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from ntc.errors import VerifyError
from ntc.meta import MADE_BY, ORIGIN, STATE, TYPE, where
from ntc.ops import OpSpec, TypeMismatch, aten, spec_of
from ntc.ops.spec import host_rule
from ntc.program import Program
from ntc.spike_type import Analog, NodeType, type_of_tensor
from ntc.state import PAST

__all__ = ["FORBIDDEN", "infer_type", "max_difference", "verify"]

# Ops that may not be left once a fact is claimed, with the reason.
FORBIDDEN: dict[str, dict[object, str]] = {
    "canonical": {
        aten.dropout.default: "dropout does nothing at inference",
        aten._assert_tensor_metadata.default: "it only checks",
        aten.scaled_dot_product_attention.default: "every causal attention is one ntc::attention",
        aten.addmm.default: "every product with a weight is one linear",
    },
    "spiking": {torch.ops.ntc.if_rate.default: "insert-neurons turns every rate into a neuron"},
}


def verify(program: Program) -> None:
    """Check a program and write the type of every node into its metadata.

    Raises:
        VerifyError: Names the node, its module and line, and what to do.
    """
    try:
        program.graph.lint()
    except RuntimeError as error:
        raise VerifyError(f"the graph is malformed: {error}") from error
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        if node.op != "placeholder" and (ORIGIN not in node.meta or MADE_BY not in node.meta):
            raise VerifyError(f"{where(node)} does not say where it comes from; make nodes with ntc.meta.building()")
        if "val" not in node.meta:
            raise VerifyError(f"{where(node)} has no shape; call program.refresh() after editing")
        for fact in program.facts & FORBIDDEN.keys():
            if node.target in FORBIDDEN[fact]:
                raise VerifyError(f"a {fact} program holds no {node.target} ({FORBIDDEN[fact][node.target]}): {where(node)}")
        node.meta[TYPE] = infer_type(node)
    logits, *after = program.results
    if not isinstance(logits, Node) or not isinstance(logits.meta[TYPE], Analog):
        raise VerifyError(f"a program returns analog logits, and {logits} is {getattr(logits, 'meta', {}).get(TYPE)}")
    _verify_state(program, after)


def _verify_state(program: Program, after: Sequence[Node]) -> None:
    """Each part of the state comes in and goes out as the same kind of thing, and a program with a state says so."""
    _, *before = program.graph.find_nodes(op="placeholder")
    if unknown := [n.name for n in before if STATE not in n.meta or n.meta[STATE].name != n.name]:
        raise VerifyError(f"a program takes token ids and its state, and the input %{unknown[0]} is neither")
    if bool(before) != ("streaming" in program.facts):
        raise VerifyError("a program has a state if it is streaming, and only then; run to-streaming on the parallel one")
    if len(before) != len(after):
        raise VerifyError(f"a program returns its state behind the logits: {len(before)} parts come in, {len(after)} go out")
    for node, new in zip(before, after, strict=True):
        spec, value = node.meta[STATE], new.meta["val"]
        grown = ["L + P" if size == PAST else str(size) for size in spec.shape]
        if new.meta[TYPE] != spec.type or value.dtype != spec.dtype or program.shape_text(new) != f"[{', '.join(grown)}]":
            raise VerifyError(
                f"the state %{node.name} is {spec.type} of {spec.dtype}, {grown} after the tokens given, and comes back as "
                f"{new.meta[TYPE]} of {value.dtype}, {program.shape_text(new)}: {where(new)}"
            )


def infer_type(node: Node) -> NodeType:
    """Type of a node from the types of its arguments.

    Raises:
        VerifyError: If the op does not take them; names both nodes.
    """
    value = node.meta.get("val")
    if STATE in node.meta:
        given: NodeType = node.meta[STATE].type
        return given
    if node.op in ("placeholder", "get_attr"):
        return type_of_tensor(value)
    spec: OpSpec | None = spec_of(node)
    try:
        return (spec.infer if spec else host_rule)(node, lambda n: n.meta[TYPE])
    except TypeMismatch as error:
        culprit = f"; the argument is {where(error.argument)}" if error.argument is not None else ""
        raise VerifyError(f"{error}: at {where(node)}{culprit}") from error


def max_difference(before: Program, after: Program) -> tuple[float, float]:
    """Largest |difference| of the logits on the example input, and the largest |logit|."""
    with torch.no_grad():
        a, b = before(before.example), after(after.example)
    if a.shape != b.shape:
        return float("inf"), float(a.abs().max())
    return float((a - b).abs().max()), float(a.abs().max())
