"""What must hold of a program after every pass: a well-formed graph, complete metadata, types that fit, the stage's dialect."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from ntc.errors import VerifyError
from ntc.meta import MADE_BY, ORIGIN, TYPE, where
from ntc.ops import OpSpec, TypeMismatch, aten, spec_of
from ntc.ops.spec import host_rule
from ntc.program import Program
from ntc.spike_type import ANALOG, INDEX, Analog, NodeType

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
    output = next(n for n in program.graph.nodes if n.op == "output")
    (result,) = output.args
    if not isinstance(result, Node) or not isinstance(result.meta[TYPE], Analog):
        raise VerifyError(f"a program returns analog logits, and {output.args} is {getattr(result, 'meta', {}).get(TYPE)}")


def infer_type(node: Node) -> NodeType:
    """Type of a node from the types of its arguments.

    Raises:
        VerifyError: If the op does not take them; names both nodes.
    """
    value = node.meta.get("val")
    if node.op in ("placeholder", "get_attr"):
        return ANALOG if isinstance(value, Tensor) and value.is_floating_point() else INDEX
    spec: OpSpec | None = spec_of(node)
    try:
        return (spec.infer if spec else host_rule)(node, lambda n: n.meta[TYPE])
    except TypeMismatch as error:
        culprit = f"; the argument is {where(error.argument)}" if error.argument is not None else ""
        raise VerifyError(f"{error}: at {where(node)}{culprit}") from error


def max_difference(before: Program, after: Program) -> tuple[float, float]:
    """Largest |difference| of the logits on the example input, and the largest |logit|."""
    with torch.no_grad():
        a, b = before.module(before.example), after.module(after.example)
    if a.shape != b.shape:
        return float("inf"), float(a.abs().max())
    return float((a - b).abs().max()), float(a.abs().max())
