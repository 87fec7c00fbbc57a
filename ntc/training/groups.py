"""Which tensors of a program are trained: read off the graph, not off the names of modules.

============== ====================================================================================================
group          tensors
============== ====================================================================================================
``ssa``        what the paper trains: projections of queries, keys, values and of the result of every attention, with
               their neurons' thresholds, initial potentials, leaks and scales (in the original network: the projections)
``thresholds`` thresholds, initial potentials, leaks, time constants and scales of every neuron; no weights
``ffn``        linear layers and neurons of the feed-forward blocks
``all``        everything
============== ====================================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from torch.fx import Node

from ntc.energy import attention_projections
from ntc.errors import ConfigError
from ntc.meta import NEURON, block_of, module_of
from ntc.ops import aten, spec_of
from ntc.program import Program
from ntc.training.legal import Domain

__all__ = ["GROUPS", "Group", "TensorRole", "roles_of", "trained"]

Group: TypeAlias = Literal["ssa", "thresholds", "ffn", "all"]
GROUPS: tuple[Group, ...] = get_args(Group)

Part: TypeAlias = Literal["ssa", "ffn", "other"]

# Constants of neurons and of attention by the names that they have in the signatures of the ops: a stranger's neuron that
# calls its threshold "threshold" is trained like ours.
_NEURON_ARGUMENTS: dict[str, Domain] = {
    "threshold": "positive", "v0": "unit", "tau": "above-one", "leak": "unit", "table": "positive",
}  # fmt: skip
_ATTENTION_ROLES = frozenset({"q", "k", "v", "ssa"})


@dataclass(frozen=True)
class TensorRole:
    """What a tensor is in its program.

    Attributes:
        part: ``ssa``, ``ffn`` or ``other`` (norms, embeddings, head).
        role: ``weight``, ``scale``, or the argument's name: ``threshold``, ``v0``, ``tau``, ``leak``, ``table``.
        domain: The values that it may have.
    """

    part: Part
    role: str = "weight"
    domain: Domain = "any"


def roles_of(program: Program) -> dict[str, TensorRole]:
    """The role of every floating-point tensor of a program, by target name."""
    around = attention_projections(program)
    products = [n for n in program.graph.nodes if (spec := spec_of(n)) is not None and spec.kind == "attention"]
    attention_modules = {module_of(n) for n in products}
    found: dict[str, TensorRole] = {}
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        names = _argument_names(node)
        for position, argument in enumerate(node.args):
            if not isinstance(argument, Node) or argument.op != "get_attr" or not program.tensor(argument).is_floating_point():
                continue
            role = _role(node, names[position] if position < len(names) else "", around, attention_modules)
            name = str(argument.target)
            if name not in found or found[name].part == "other":  # tied tensors: the more specific use names them
                found[name] = role
    return found


def _argument_names(node: Node) -> list[str]:
    schema = getattr(node.target, "_schema", None)
    return [a.name for a in schema.arguments] if schema is not None else []


def _role(node: Node, argument: str, around: frozenset[str], attention_modules: set[str]) -> TensorRole:
    spec = spec_of(node)
    neuron = node.meta.get(NEURON)
    if spec is not None and spec.element in ("population", "dynamic_product", "scale") and argument in _NEURON_ARGUMENTS:
        is_attention = spec.kind == "attention" or (neuron.role in _ATTENTION_ROLES if neuron else module_of(node) in attention_modules)
        return TensorRole("ssa" if is_attention else "ffn", argument, _NEURON_ARGUMENTS[argument])
    if node.target is aten.linear.default:
        if node.name in around:
            return TensorRole("ssa")
        return TensorRole("ffn" if block_of(node) else "other")
    if node.target is aten.mul.Tensor and block_of(node):
        return TensorRole("ssa" if module_of(node) in attention_modules else "ffn", "scale")
    return TensorRole("other")


def trained(roles: Mapping[str, TensorRole], group: str) -> frozenset[str]:
    """Names of the tensors that a group trains.

    Raises:
        ConfigError: For a group that does not exist, or one without a tensor in this program.
    """
    if group not in GROUPS:
        raise ConfigError(f"no group of parameters is called {group!r}; there are {', '.join(GROUPS)}")
    if group == "all":
        names = frozenset(roles)
    elif group == "thresholds":
        names = frozenset(n for n, r in roles.items() if r.role != "weight")
    else:
        names = frozenset(n for n, r in roles.items() if r.part == group)
    if not names:
        raise ConfigError(f"the group {group!r} has no tensor in this program: it has no such neurons or layers")
    return names
