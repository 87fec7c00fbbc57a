"""Rates become spike trains: the mechanism that gives a program its time axis.

Before::

    %r = ntc.if_rate(%h, threshold, False)        # annotated: NeuronSpec(steps=4, v0=0.5, ...)
    %y = linear(%r, weight, bias)
    %z = add(%x, %y)

After::

    %s = ntc.integrate_fire(%h, threshold, v0, 4, ...)  # spikes T=4
    %i = linear(%s, weight, bias)                       # synaptic current T=4
    %y = ntc.decode(%i, 'rate')                         # mean over the steps
    %z = add(%x, %y)

Every annotated rate node is replaced. The time axis goes on through every op whose type rule takes it (linear layers
driven by spikes, spiking attention, scales); where an op does not, a decode is put in front of it. A bias is a constant
current at every step, which the mean leaves as it is. Which neuron and how many steps was decided before, by the passes
that wrote the annotations; this one decides nothing. The initial potential becomes a tensor with one number per channel, named
after the threshold (``transformer.h.0.attn.q.threshold`` gives ``transformer.h.0.attn.q.v0``), so that it can be trained; so does
the time constant of a leaky neuron (``.tau``), which becomes ``ntc.leaky_integrate_fire`` with soft reset.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from ntc.errors import PassError
from ntc.meta import NEURON, TYPE, NeuronSpec, building, where
from ntc.ops import TypeMismatch, spec_of, timed
from ntc.ops.spec import host_rule
from ntc.pipeline import Context, Pass, PassResult
from ntc.program import Program
from ntc.spike_type import ANALOG, CurrentType, NodeType, SpikeType

__all__ = ["InsertNeurons"]

_RATE = torch.ops.ntc.if_rate.default
_IF = torch.ops.ntc.integrate_fire.default
_LIF = torch.ops.ntc.leaky_integrate_fire.default


class InsertNeurons(Pass):
    """Replace annotated rates by neurons and put decodes where time ends."""

    name = "insert-neurons"
    requires = frozenset({"neurons-annotated"})
    provides = frozenset({"spiking", "integrate-fire"})
    removes = frozenset({"neurons-annotated"})
    required = True

    def run(self, program: Program, context: Context) -> PassResult:
        """One walk in topological order."""
        types: dict[Node, NodeType] = {}
        decoded: dict[Node, Node] = {}
        sites = 0
        for node in list(program.graph.nodes):
            if node.op == "output":
                (result,) = node.args
                assert isinstance(result, Node)
                if timed(types[result]):
                    node.replace_input_with(result, _decode(program, result, types[result], node, decoded))
                continue
            if node.target is _RATE:
                spec = node.meta.get(NEURON)
                if spec is None:
                    raise PassError(f"{where(node)} is a rate without a neuron annotation: a policy pass has to decide its neuron")
                node = _insert(program, node, spec, types, decoded)
                sites += 1
            types[node] = _type(program, node, types, decoded)
        return PassResult(sites > 0, sites)


def _insert(
    program: Program, node: Node, spec: NeuronSpec, types: dict[Node, NodeType], decoded: dict[Node, Node]
) -> Node:
    current, theta = node.args[0], node.args[1]
    assert isinstance(current, Node) and isinstance(theta, Node)
    given = types[current]
    is_timed = isinstance(given, CurrentType) and given.steps == spec.steps
    if timed(given) and not is_timed:  # a train of another length is read out first
        current = _decode(program, current, given, node, decoded)
        types[current] = current.meta[TYPE]
    with building(program.graph, before=node, stands_for=[node], by=InsertNeurons.name) as call:

        def parameter(name: str, value: float) -> Node:
            stored = call(program.add_tensor(f"{_prefix(theta)}.{name}", _per_channel(current, theta, value)))
            stored.meta[TYPE] = types[stored] = ANALOG
            program.infer(stored)
            return stored

        name = node.name.removesuffix("_rate") + "_spikes"
        if spec.kind == "lif":
            tau, start = parameter("tau", _time_constant(node, spec)), parameter("v0", spec.v0)
            spikes = call(_LIF, current, theta, tau, start, spec.steps, False, is_timed, "atan", 1.0, name=name)
        else:
            spikes = call(_IF, current, theta, parameter("v0", spec.v0), spec.steps, spec.signed, is_timed, "atan", 1.0, name=name)
    spikes.meta[NEURON] = spec
    program.infer(spikes)
    node.replace_all_uses_with(spikes)
    program.graph.erase_node(node)
    return spikes


def _time_constant(node: Node, spec: NeuronSpec) -> float:
    if spec.signed:
        raise PassError(f"a leaky neuron is binary, and {where(node)} asks for a ternary one: choose kind 'if', or signed = False")
    if spec.tau is None or not spec.tau >= 1:
        raise PassError(f"a leaky neuron needs a time constant of at least one step, and {where(node)} has tau = {spec.tau}")
    return spec.tau


def _prefix(theta: Node) -> str:
    """Where the parameters of neurons belong: beside their threshold."""
    return str(theta.target if theta.op == "get_attr" else theta.name).removesuffix(".threshold")


def _per_channel(current: Node, theta: Node, value: float) -> Tensor:
    """A parameter of one number for every channel, in the dtype of the threshold."""
    like = theta.meta["val"]
    return torch.full((int(current.meta["val"].shape[-1]),), value, dtype=like.dtype, device=like.device)


def _type(program: Program, node: Node, types: dict[Node, NodeType], decoded: dict[Node, Node]) -> NodeType:
    """Type of a node, after decoding what it does not take."""
    if node.op in ("placeholder", "get_attr"):
        kept: NodeType = node.meta[TYPE] if TYPE in node.meta else host_rule(node, types.__getitem__)
        return kept
    spec = spec_of(node)
    rule = spec.infer if spec else host_rule
    trains = [a for a in node.all_input_nodes if timed(types[a])]
    if not trains:
        return node.meta[TYPE] if TYPE in node.meta else rule(node, types.__getitem__)
    try:
        return rule(node, types.__getitem__)
    except TypeMismatch as mismatch:
        for train in trains:
            value = _decode(program, train, types[train], node, decoded)
            types[value] = value.meta[TYPE]
            node.replace_input_with(train, value)
        try:
            return rule(node, types.__getitem__)
        except TypeMismatch:  # it needs trains, only others: the first reason is the one that helps
            raise PassError(f"{mismatch}: at {where(node)}") from mismatch


def _decode(program: Program, train: Node, given: NodeType, before: Node, decoded: dict[Node, Node]) -> Node:
    """The decoded value of a train, made once, right behind it."""
    if train not in decoded:
        assert isinstance(given, SpikeType | CurrentType)
        following = train.next
        with building(program.graph, before=following, stands_for=[train], by=InsertNeurons.name) as call:
            decoded[train] = call(torch.ops.ntc.decode.default, train, given.code, name=f"{train.name}_decoded")
        decoded[train].meta[TYPE] = ANALOG
        program.infer(decoded[train])
    return decoded[train]
