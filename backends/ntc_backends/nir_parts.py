"""Which nodes of a program become NIR files, cut where NIR has no words, and the verdict on every node.

NIR says linear layers with constant weights, neurons, and gains that are constant. A part is what hangs together of those: from one
value that the host (or a product of two signals) delivers, to the values that leave. A part has no tokens: each
token is a run of T steps of its own, from empty state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch.fx import Node

from ntc.errors import BackendError
from ntc.meta import TYPE, where
from ntc.ops import aten, spec_of, timed
from ntc.program import Program, op_name
from ntc.spike_type import RateType
from ntc_backends.nir_neurons import (
    Array,
    Form,
    Verdict,
    arguments,
    form_of,
    is_layer,
    is_population,
    judge_neuron,
    neuron_of,
    numpy_of,
    start_current,
)
from ntc_backends.nir_options import NirOptions

__all__ = ["NO_NEURONS", "Part", "Plan", "is_scale", "plan", "source_of_part"]

Start = Literal["none", "channel", "add"]

NO_NEURONS = "the program holds no neurons that NIR has words for: those that integrate and fire"
"""Of a program that has no NIR file."""

_NO_WORD = {
    "dynamic_product": "multiplies two signals with each other, and NIR multiplies by constants only",
    "decode": "sums up the steps of one token, and NIR has no end of a token",
    "ntc.position_scale": "divides by the position of the token, and NIR has no tokens",
    "ntc.rms_scale": "divides by a number made from the signal, and NIR has no division",
    "ntc.row_sum_scale": "divides by a number made from the signal, and NIR has no division",
    "linear": "stands between analog values: no neuron drives it or is driven by it",
    "ntc.integer_linear": "stands between numbers: no neuron drives it or is driven by it",
}


@dataclass(frozen=True)
class Part:
    """A connected piece of the program that NIR can say, with one input.

    Attributes:
        nodes: Its nodes in graph order; the first one reads ``source``.
        source: The value that comes in.
        outputs: Nodes whose values leave.
        forms: How each population is said.
        start: How initial potentials get in: ``none`` (in thresholds, or 0), ``channel`` (one more input channel that is 1 at the
            first step), ``add`` (to the current of the first step).
        dtype: Of its parameters: float64 if the program's are, or if its integers can be larger than float32 holds exactly.
    """

    nodes: tuple[Node, ...]
    source: Node
    outputs: tuple[Node, ...]
    forms: dict[Node, Form]
    start: Start
    dtype: Any

    @property
    def name(self) -> str:
        """Name of its first node: unique, and the stem of its file."""
        return self.nodes[0].name

    @property
    def held(self) -> bool:
        """Whether the input is one vector per token, the same at every step."""
        return not timed(self.source.meta[TYPE])

    @property
    def populations(self) -> tuple[Node, ...]:
        """Its neurons."""
        return tuple(self.forms)


@dataclass
class Plan:
    """The parts of a program.

    Attributes:
        parts: In graph order.
        verdicts: Of every operation of the program.
    """

    parts: list[Part] = field(default_factory=list)
    verdicts: dict[Node, Verdict] = field(default_factory=dict)


def plan(program: Program, options: NirOptions) -> Plan:
    """Cut a spiking program into parts.

    Raises:
        BackendError: If it holds no neurons, or firing rates where neurons should be.
    """
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    if not any(is_population(n) or isinstance(n.meta.get(TYPE), RateType) for n in nodes):
        raise BackendError(NO_NEURONS)
    for node in nodes:
        if TYPE not in node.meta or "val" not in node.meta:
            raise BackendError(f"{where(node)} has no type or shape: verify the program before you export it")
        if isinstance(node.meta[TYPE], RateType):
            raise BackendError(f"NIR holds neurons, and {where(node)} is a firing rate: run insert-neurons first")
    result = Plan()
    root: dict[Node, Node] = {}
    forms: dict[Node, Form] = {}
    for node in nodes:
        verdict = result.verdicts[node] = _judge(program, node, options, forms)
        if verdict.fidelity == "unsupported":
            continue
        before = source_of_part(node)
        joined = before in root and not (node in forms and _needs_start(program, node, forms[node]) and not _leads(before, root))
        root[node] = root[before] if joined else node
    for first in dict.fromkeys(root.values()):
        members = tuple(n for n in root if root[n] is first)
        outputs = tuple(n for n in members if any(root.get(user) is not first for user in n.users))
        inside = {n: forms[n] for n in members if n in forms}
        starting = [n for n, form in inside.items() if _needs_start(program, n, form)]
        start: Start = "none" if not starting else "add" if first in starting else "channel"
        source = source_of_part(first)
        result.parts.append(Part(members, source, outputs, inside, start, _dtype(program, source, members)))
    return result


def source_of_part(node: Node) -> Node:
    """The one value that an operation of a part reads, apart from constants."""
    return next(a for a in node.all_input_nodes if a.op != "get_attr")


def _leads(layer: Node, root: dict[Node, Node]) -> bool:
    """Whether a layer is the first of its part and drives one population only: then it can bring a start current along."""
    return root[layer] is layer and is_layer(layer) and len(layer.users) == 1


def _needs_start(program: Program, node: Node, form: Form) -> bool:
    return form == "pair" or (form == "node" and bool((start_current(neuron_of(program, node)) != 0).any()))


def _judge(program: Program, node: Node, options: NirOptions, forms: dict[Node, Form]) -> Verdict:
    spec = spec_of(node)
    if is_population(node):
        neuron = neuron_of(program, node)
        form = form_of(neuron, options)
        layer = source_of_part(node)
        twice = is_layer(layer) and len(layer.users) == 1 and _on_chip(layer)
        verdict = judge_neuron(neuron, form, options, twice)
        if verdict.fidelity != "unsupported":
            forms[node] = form
        return verdict
    if is_layer(node) and _on_chip(node):
        return Verdict("exact", "the bias is added at every step" if arguments(node)["bias"] is not None else "weights without a bias")
    if node.target is aten.mul.Tensor and timed(node.meta[TYPE]):
        return _judge_scale(node)
    no_word = _NO_WORD.get(spec.element if spec else "") or _NO_WORD.get(op_name(node.target))
    return Verdict("unsupported", no_word or f"NIR has no {op_name(node.target)}")


def _on_chip(linear: Node) -> bool:
    """Whether a layer is driven by a train, or drives nothing but neurons; its weights are constants."""
    given = arguments(linear)
    constant = all(a is None or (isinstance(a, Node) and a.op == "get_attr") for a in (given["weight"], given["bias"]))
    drives = [is_population(user) and user.args[0] is linear for user in linear.users]
    return constant and (timed(linear.meta[TYPE]) or (bool(drives) and all(drives)))


def _dtype(program: Program, source: Node, members: tuple[Node, ...]) -> Any:
    """Float32, unless the program has float64, or integers whose sums can leave what float32 holds exactly (2**23, with halves)."""
    constants = [program.tensor(a) for n in members for a in n.all_input_nodes if a.op == "get_attr"]
    if any(c.dtype == torch.float64 for c in constants):
        return np.float64
    value = source.meta["val"]
    if value.is_floating_point():
        return np.float32
    given = arguments(source) if isinstance(source.target, torch._ops.OpOverload) else {}
    limits = torch.iinfo(value.dtype)
    most: float = max(-float(given.get("low", limits.min)), float(given.get("high", limits.max)))
    for node in members:
        if is_population(node):
            neuron = neuron_of(program, node)
            if neuron.steps * most + 2 * float(neuron.threshold.max()) >= 1 << 23:
                return np.float64
            most = 1.0
        else:
            row: Array = np.abs(numpy_of(program.tensor(arguments(node)["weight"]))).sum(axis=1)
            bias = arguments(node)["bias"]
            most = float((most * row + (0 if bias is None else np.abs(numpy_of(program.tensor(bias))))).max())
    return np.float32


def _judge_scale(node: Node) -> Verdict:
    factor = next((a for a in node.all_input_nodes if a.op == "get_attr"), None)
    shape = [] if factor is None else list(factor.meta["val"].shape)
    if any(size != 1 for size in shape[:-1]):
        return Verdict("unsupported", "a factor per token, and NIR has no tokens")
    return Verdict("exact", "a constant gain")


def is_scale(node: Node) -> bool:
    """Whether a node of a part is a gain."""
    return node.target is aten.mul.Tensor
