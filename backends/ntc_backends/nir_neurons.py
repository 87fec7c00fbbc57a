r"""Neurons in the words of NIR.

The program's neuron has ``v(0) = v0 theta``, fires at ``u >= theta`` and subtracts theta. NIR has no initial potential, compares
with ``>``, and its IF resets to 0 (from version 1.0.6 on). What stands for what:

*Comparison.* For floating-point numbers ``u >= theta`` is ``u > below(theta)``, where ``below`` is the next number of the same dtype
towards minus infinity: no number lies between them. Exact for every u.

*Loop* (soft reset). ``w = v - v0 theta`` begins at 0, which is where an integrator begins, and

    w(t) = w(t-1) + x(t) - theta s(t-1)             I
    s(t) = 1[w(t) > below(theta - v0 theta)]        Threshold
                                                    Scale(-theta) from s back to I, one step late

Threshold and reset are two nodes here, so v0 needs no input of its own. Ternary: a second Threshold on ``-w`` at ``v0 theta``, as
``u < 0`` is ``-w > v0 theta`` (strict on both sides); what both fire goes back. Leaky (LI, ``tau v' = v_leak - v + x``): the
state begins at 0 and leaks towards ``v_leak = -v0 theta``, and what comes back is ``-theta (tau - 1) s``, of which the leak leaves
``-theta (1 - 1/tau) s``: what is left of the subtraction after one step.

*Node.* IF or LIF with ``v_threshold = below(theta)``. v0 is a current at the first step: ``v0 theta`` (IF), ``v0 theta (tau - 1)`` (LIF).
Where IF subtracts, it subtracts ``below(theta)``: the last bit of theta less.
A ternary neuron is two nodes, ``on`` with current x and start ``v0 theta``, ``off`` with -x and start ``(1 - v0) theta``: with
subtracting reset and a constant current one of them never fires and the other one fires when the ternary neuron does. With a
current that changes its sign the two are another neuron.

*Integers.* Between two whole numbers lies a half: ``u >= theta`` is ``u > theta - 1/2``, and all of this is exact in float32 below 2**23
(float64 is written where a sum can be larger). In the loop the threshold is ``theta - start - 1/2``; an IF node, which subtracts what
it compares with, has ``v_threshold = theta`` and half a unit more at the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

from ntc.ops import aten
from ntc.program import Program
from ntc_backends.nir_options import NirOptions

__all__ = [
    "Array", "Form", "Neuron", "Verdict", "arguments", "below", "form_of", "full", "is_layer", "is_population", "judge_neuron",
    "loop_threshold", "neuron_of", "node_threshold", "numpy_of", "start_current",
]  # fmt: skip

Array = NDArray[Any]
Form = Literal["loop", "node", "pair"]

_INTEGER = torch.ops.ntc.integer_fire.default


@dataclass(frozen=True)
class Verdict:
    """How faithfully NIR says one node of the program.

    Attributes:
        fidelity: ``exact`` = the same function of its inputs, up to the order of floating-point sums.
        reason: Why, in one sentence.
    """

    fidelity: Literal["exact", "approximate", "unsupported"]
    reason: str


@dataclass(frozen=True)
class Neuron:
    """A population, its parameters one number per neuron.

    Attributes:
        size: Neurons.
        steps: T.
        threshold: theta, ``[C]``.
        start: Initial potential v0 theta, ``[C]``.
        tau: Time constant in steps, ``[C]``; None for IF.
        signed: Ternary.
        hard: Resets to 0 instead of subtracting.
        timed: Whether its current has a value per step.
        integer: Whether current, threshold and membrane are whole numbers.
    """

    size: int
    steps: int
    threshold: Array
    start: Array
    tau: Array | None
    signed: bool
    hard: bool
    timed: bool
    integer: bool


def arguments(node: Node) -> dict[str, Any]:
    """Arguments of a node by name, defaults included."""
    assert isinstance(node.target, torch._ops.OpOverload)
    declared = node.target._schema.arguments
    given = {a.name: a.default_value for a in declared if a.has_default_value()}
    return given | dict(zip((a.name for a in declared), node.args, strict=False)) | node.kwargs


def numpy_of(value: Tensor, dtype: Any = None) -> Array:
    """A tensor as an array: of that dtype, or float32 (half precision is widened, which is exact), or float64 of float64 and integers."""
    wide = value.dtype == torch.float64 or not value.is_floating_point()
    array: Array = value.detach().to(torch.float64 if wide else torch.float32).cpu().numpy()
    return array if dtype is None else array.astype(dtype)


def full(program: Program, value: Any, size: int, dtype: Any = None) -> Array:
    """A constant (a node, or a number) as one number per channel: NIR knows no broadcasting."""
    array = numpy_of(program.tensor(value), dtype) if isinstance(value, Node) else np.asarray(value, dtype or np.float32)
    return np.ascontiguousarray(np.broadcast_to(array.reshape(-1), (size,)))


def neuron_of(program: Program, node: Node, dtype: Any = None) -> Neuron:
    """The parameters of a population."""
    given, size = arguments(node), int(node.meta["val"].shape[-1])
    integer = node.target is _INTEGER
    theta = full(program, given["threshold"], size, dtype)
    tau = full(program, given["tau"], size, theta.dtype) if "tau" in given else None
    start = full(program, given["start"] if integer else given["v0"], size, theta.dtype)
    return Neuron(
        size, given["steps"], theta, start if integer else start * theta, tau, given.get("signed", False), given.get("hard_reset", False),
        given["timed"], integer,
    )  # fmt: skip


def below(value: Array) -> Array:
    """One floating-point step lower, so that ``u >= value`` is ``u > result`` for every u of that dtype."""
    lower: Array = np.nextafter(value, value.dtype.type(-np.inf))
    return lower


def loop_threshold(neuron: Neuron) -> Array:
    """What the integrator of a loop, which begins at 0, is compared with; ``[C]``."""
    threshold = neuron.threshold - neuron.start
    return threshold - threshold.dtype.type(0.5) if neuron.integer else below(threshold)


def node_threshold(neuron: Neuron) -> Array:
    """``v_threshold`` of an IF or LIF; ``[C]``."""
    return neuron.threshold if neuron.integer else below(neuron.threshold)


def start_current(neuron: Neuron, *, off: bool = False) -> Array:
    """The current at the first step that puts an IF or LIF where the program's neuron begins; ``[C]``."""
    start = neuron.threshold - neuron.start if off else neuron.start
    if neuron.integer and not off:
        start = start + start.dtype.type(0.5)
    return start if neuron.tau is None else start * (neuron.tau - 1)


def form_of(neuron: Neuron, options: NirOptions) -> Form:
    """Which of the forms in the module's docstring a neuron takes."""
    if not neuron.hard and options.reset == "explicit":
        return "loop"
    return "pair" if neuron.signed else "node"


def judge_neuron(neuron: Neuron, form: Form, options: NirOptions, splittable: bool) -> Verdict:
    """How faithful a form is.

    Args:
        neuron: The population.
        form: Its form.
        options: Reset and version.
        splittable: Whether the layer in front can be written twice, as two nodes for a ternary neuron need it.
    """
    kind = "IF" if neuron.tau is None else "LIF"
    if form == "loop":
        stands = "I" if neuron.tau is None else "LI"
        also = "; a second Threshold for the negative spikes" if neuron.signed else ""
        return Verdict("exact", f"soft reset as a loop of {stands}, Threshold and Scale, v0 in the threshold{also}")
    if neuron.hard:
        if options.subtracts:
            return Verdict("unsupported", f"resets to 0, and {kind} of NIR {options.compat} subtracts its threshold")
        return Verdict("exact", f"{kind} resets to v_reset = 0; v0 is a current at the first step")
    if form == "pair" and neuron.timed:
        return Verdict("unsupported", f"ternary with a current that changes its sign: no pair of {kind} nodes is that; take reset=explicit")
    if form == "pair" and not splittable:
        return Verdict("unsupported", f"ternary, and the layer in front drives others too; a pair of {kind} nodes needs it twice")
    said = f"two {kind} nodes for the two signs, " if form == "pair" else ""
    if options.subtracts:
        return Verdict("exact", f"{said}{kind} of NIR {options.compat} subtracts its threshold; v0 is a current at the first step")
    if options.reset == "annotate":
        return Verdict("approximate", f"{said}{kind} resets to 0 by definition; metadata say soft, for readers that subtract")
    return Verdict("approximate", f"{said}{kind} resets to 0 and forgets what was above the threshold")


def is_population(node: Node) -> bool:
    """Whether a node is a neuron of the kinds that have forms here."""
    return node.target in (torch.ops.ntc.integrate_fire.default, torch.ops.ntc.leaky_integrate_fire.default, _INTEGER)


def is_layer(node: Node) -> bool:
    """Whether a node is a linear layer."""
    return node.target in (aten.linear.default, torch.ops.ntc.integer_linear.default)
