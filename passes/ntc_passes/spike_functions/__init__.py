r"""Nonlinear functions by few-spikes neurons and products of trains, each kind by choice.

=============  =======================================================================================================================
``activation``  SiLU, GELU, sigmoid, tanh: neurons fitted to the function; the graded train that they give sums to its value
``gate``        a product of an activation and another value: product of their two trains
``norm``        RMSNorm and LayerNorm: the input in phase code, its square, mean, a neuron for 1/sqrt, and the product of both trains
``softmax``     exp below the largest score of a row, the row's sum, a neuron for 1/x, and the product of both trains; in attention between
                scores and weighted values, two ops that take its place
=============  =======================================================================================================================

Before::

    %y = silu(%x)

After (``Builder`` in building.py has the others)::

    %s = ntc.fs_neuron(%x, intervals, theta, reset, T)      # spikes T binary fitted
    %t = ntc.fs_synapse(%s, %x, intervals, weight, T)       # spikes T graded count
    %y = ntc.decode(%t, 'count')

Neurons are fitted in closed form (``fit``), in at most ``intervals`` intervals, four times as many where there is one value per row (1/x,
1/sqrt). Activations are fitted to the interval that the calibration text reaches, widened by ``margin`` at both ends; outside of it they
are clamped. The others need no text: the mean of the squares lies between 1/C and 1 of the largest one, the sum of a row of exponentials
between 1 and the number of keys, and an exponential below ``2^-(T + 4)`` of the largest is silent. The history says for each site what was
fitted, on which interval, and the largest error.

What stays analog inside is said in the notes under ``islands``: the largest channel of a token (its step), the largest score of a row,
sums of real values along a row and their division by a constant, gains and biases. Functions that are not chosen are islands altogether. A
norm over heads, capped scores, a softmax whose number of keys is not known, and attention that ``spike-products`` has converted, are left
alone with the reason. The other way round, this pass first, both products of attention and its softmax are spiking.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.fx import Node

from ntc.errors import PassError
from ntc.meta import TYPE, where
from ntc.ops import SOFTMAX_ATTENTION, aten
from ntc.pipeline import LEFT_ANALOG, Context, Pass, PassResult
from ntc.program import Program, check_ids, interpret
from ntc.spike_type import ANALOG, Analog
from ntc_passes.spike_functions.building import Builder, power_limits
from ntc_passes.spike_functions.fit import MOST_STEPS, Fit, fit

__all__ = ["SpikeFunctions"]

Kind: TypeAlias = Literal["activation", "gate", "norm", "softmax"]
How: TypeAlias = Literal["analog", "spiking"]
KINDS: tuple[Kind, ...] = ("activation", "gate", "norm", "softmax")

_ACTIVATIONS: dict[Any, Callable[[Node], str]] = {
    aten.silu.default: lambda node: "silu",
    aten.gelu.default: lambda node: "gelu_tanh" if "tanh" in (*node.args[1:], *node.kwargs.values()) else "gelu",
    aten.sigmoid.default: lambda node: "sigmoid",
    aten.tanh.default: lambda node: "tanh",
}
_NORMS = frozenset({aten.rms_norm.default, aten.layer_norm.default})
_SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
_CODED = torch.ops.ntc.coded_attention.default
_ROWS = 4  # times as many intervals for a function of one value per row

_ISLANDS: dict[Kind, tuple[str, ...]] = {
    "activation": (),
    "gate": ("the step of each token that is encoded: its largest channel", "the steps of both factors, once per value"),
    "norm": (
        "the step of each token: its largest channel", "the mean of the squares, and LayerNorm's of the channels: sums of real values",
        "gains and biases",
    ),
    "softmax": (
        "the largest score of each row, which is subtracted", "the sum of each row of exponentials: real values",
        "the products of attention, Q K and P V, unless spike-products runs behind",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Options of ``spike-functions``.

    Attributes:
        activation: SiLU, GELU, sigmoid, tanh: ``analog`` or ``spiking``.
        gate: The product of a gated FFN.
        norm: RMSNorm and LayerNorm.
        softmax: Softmax, that of attention and any other along a last axis.
        steps: T, time steps of all of them.
        intervals: G, most intervals that a function of each value is fitted in; a function of a row gets four times as many.
        margin: By which part of it the interval that the calibration text reaches is widened at each end.
    """

    activation: How = "analog"
    gate: How = "analog"
    norm: How = "analog"
    softmax: How = "analog"
    steps: int = 8
    intervals: int = 32
    margin: float = 0.1

    def __post_init__(self) -> None:
        for kind in KINDS:
            if getattr(self, kind) not in ("analog", "spiking"):
                raise ValueError(f"{kind} must be 'analog' or 'spiking', got {getattr(self, kind)!r}")
        for name, least, most in (("steps", 2, MOST_STEPS), ("intervals", 1, 1024)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise ValueError(f"{name} must be a whole number from {least} to {most}, got {value!r}")
        if isinstance(self.margin, bool) or not isinstance(self.margin, int | float) or not 0 <= self.margin < math.inf:
            raise ValueError(f"margin must be a number of at least 0, got {self.margin!r}")


class SpikeFunctions(Pass):
    """Compute activations, gates, norms and softmax with few-spikes neurons, those kinds that are chosen."""

    name = "spike-functions"
    requires = frozenset({"canonical"})
    Options = Options

    def run(self, program: Program, context: Context) -> PassResult:
        """Choose, measure the intervals on the program as it is, then rewrite in the order of the graph."""
        chosen, missed = dict[Node, Options](), list[tuple[str, str]]()
        kinds = {n: kind for n in program.graph.nodes if (kind := _kind(n)) is not None}
        for node, kind in kinds.items():
            options = self.at(node, context)
            reason = LEFT_ANALOG if getattr(options, kind) == "analog" else _refusal(node, kind, program)
            if reason:
                missed.append((node.name, reason))
            else:
                chosen[node] = options
        reached = _ranges(program, {n for n in chosen if kinds[n] == "activation"}, context)
        fits: dict[Node, list[Fit]] = {}
        for node, options in chosen.items():
            fits[node] = _fits(node, kinds[node], options, reached.get(node), program)
        builder = Builder(program, self.name)
        for number, (node, options) in enumerate(chosen.items()):
            context.progress(self.name, number, len(chosen))
            _rewrite(builder, node, kinds[node], options, fits[node])
        notes = _notes(kinds, chosen, {n.name: f for n, f in fits.items()}) if kinds else {}
        return PassResult(bool(chosen), len(chosen), tuple(missed), notes=notes if chosen else {})


def _kind(node: Node) -> Kind | None:
    if node.target in _ACTIVATIONS:
        return "activation"
    if node.target in _NORMS:
        return "norm"
    if node.target in _SOFTMAX or node.target in SOFTMAX_ATTENTION or node.target is _CODED:
        return "softmax"
    if node.target is aten.mul.Tensor:
        factors = [a for a in node.args if isinstance(a, Node) and a.op == "call_function"]
        if len(factors) == 2 and any(a.target in _ACTIVATIONS for a in factors) and _shape(factors[0]) == _shape(factors[1]):
            return "gate"
    return None


def _shape(node: Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    return tuple(map(str, value.shape)) if isinstance(value, Tensor) else ()


def _refusal(node: Node, kind: Kind, program: Program) -> str:
    """Why a function cannot be computed with spikes, or an empty string."""
    if node.target is _CODED:
        return "its products are made of spikes and its exponentials inside of it: run this pass in front of spike-products"
    for argument in node.all_input_nodes:
        if not isinstance(given := argument.meta.get(TYPE, ANALOG), Analog):
            return f"its input %{argument.name} is {given}, and not analog"
    if node.target in SOFTMAX_ATTENTION:
        if len(node.args) > 7 and node.args[7]:
            return "its scores are capped, which this pass has no neurons for"
        return "" if program.info.context else "the number of its keys is not known: the model states no context"
    value = node.meta["val"]
    if kind in ("gate", "norm") and value.dim() != 3:
        return f"it is no [B, L, C] value but has {value.dim()} axes, as norms of single heads have"
    if kind == "softmax" and node.args[1] not in (-1, value.dim() - 1):
        return f"it is taken along axis {node.args[1]}, and not the last one"
    if kind == "softmax" and not _keys(node, program):
        return "the number of its keys is not known: the model states no context"
    return ""


def _keys(node: Node, program: Program) -> int:
    """Most values in a row of a softmax; 0 if unknown."""
    if node.target in SOFTMAX_ATTENTION:
        window = node.args[6] if len(node.args) > 6 else 0
        return min(filter(None, (program.info.context, window)))  # type: ignore[type-var, return-value]
    size = node.meta["val"].shape[-1]
    return size if isinstance(size, int) else program.info.context


# --------------------------------------------------------------------------------------------------------------------- intervals


def _ranges(program: Program, wanted: set[Node], context: Context) -> dict[Node, tuple[float, float]]:
    """Lowest and highest input of activations on the calibration text."""
    if not wanted:
        return {}
    order, calibration = list(program.graph.nodes), context.calibration
    if calibration is None or calibration.tokens == 0:
        raise PassError(
            "spike-functions chooses the intervals of activations on calibration text: give --calibration FILE or a Calibration in the "
            f"context, or leave activation = analog; {where(min(wanted, key=order.index))}"
        )
    for batch in calibration.batches:
        check_ids(batch, program.info)
    found: dict[Node, tuple[float, float]] = {}
    last = max(wanted, key=order.index)

    def visit(node: Node, args: tuple[Any, ...], value: Any) -> None:
        if node in wanted:
            low, high = (float(x) for x in args[0].aminmax())
            before = found.get(node, (math.inf, -math.inf))
            found[node] = min(low, before[0]), max(high, before[1])

    with torch.no_grad():
        for number, batch in enumerate(calibration.batches):
            context.progress("measure intervals", number, len(calibration.batches))
            interpret(program, batch, visit, last=last)
    return found


def _fits(node: Node, kind: Kind, options: Options, reached: tuple[float, float] | None, program: Program) -> list[Fit]:
    """The neurons of one site: one function, or the two of a softmax."""
    steps = options.steps
    try:
        if kind == "activation":
            assert reached is not None
            low, high = reached
            room = options.margin * (high - low) if high > low else 1e-3
            return [fit(_ACTIVATIONS[node.target](node), low - room, high + room, steps, options.intervals)]
        if kind == "norm":
            return [fit("rsqrt", *power_limits(int(node.meta["val"].shape[-1]), steps), steps, _ROWS * options.intervals)]
        if kind == "softmax":
            exponential = fit("exp", -(steps + 4) * math.log(2), 0.0, steps, options.intervals)
            keys = max(2, _keys(node, program)) * (1 + exponential.bound)
            return [exponential, fit("reciprocal", 1 - exponential.bound_absolute, keys, steps, _ROWS * options.intervals)]
    except ValueError as error:
        raise PassError(f"spike-functions: {error}; {where(node)}") from error
    return []


# ------------------------------------------------------------------------------------------------------------------- rewriting


def _rewrite(builder: Builder, node: Node, kind: Kind, options: Options, fits: list[Fit]) -> None:
    source = node.args[0]
    assert isinstance(source, Node)
    if kind == "activation":
        builder.replace(node, lambda call: builder.function(call, source, fits[0], node.name)[0])
    elif kind == "norm":
        builder.norm(node, fits[0])
    elif node.target in SOFTMAX_ATTENTION:
        builder.attention(node, fits[0], fits[1])
    elif kind == "softmax":
        builder.replace(node, lambda call: builder.softmax(call, source, node.name, fits[0], fits[1]))
    else:
        builder.gate(node, options.steps)


def _notes(kinds: dict[Node, Kind], chosen: dict[Node, Options], fits: dict[str, list[Fit]]) -> dict[str, Any]:
    spiking, analog = Counter(kinds[n] for n in chosen), Counter(kind for n, kind in kinds.items() if n not in chosen)
    islands = [f"{kind} of {count} nodes, altogether" for kind, count in sorted(analog.items())]
    islands += [island for kind in KINDS if kind in spiking for island in _ISLANDS[kind]]
    return {
        "spiking": dict(sorted(spiking.items())),
        "islands": list(dict.fromkeys(islands)),
        "fits": {
            name: [{"function": f.function, "low": f.low, "high": f.high, "intervals": len(f.intervals), "largest_error": f.bound_absolute,
                    "largest_error_in_units": f.bound} for f in found]
            for name, found in fits.items() if found
        },
    }  # fmt: skip
