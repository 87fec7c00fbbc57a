"""One attention on its way to spiking attention: what was decided for it, and what the spiking form computes.

``normalized`` is the one description of the ops between the spikes and the output neuron: the fit runs it on tensors, the
rewrite makes nodes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx import Node

from ntc.errors import PassError
from ntc.meta import STATS, NeuronSpec, where
from ntc.ops import integrate_fire, leaky_integrate_fire
from ntc.ops.position_scale import position_table
from ntc_passes.calibrate import threshold_from
from ntc_passes.replace_attention.options import Options

__all__ = ["EPS", "Site", "decide", "normalized", "threshold_of"]

EPS = 1e-5
"""Of the RMS normaliser, in squared coincidences: far below one spike pair (1 / T**2 / D), so it only guards silence."""

Value = TypeVar("Value")

_OPS = torch.ops.ntc


@dataclass
class Site:
    """What was decided for one attention.

    Attributes:
        options: The options for this node.
        heads: H.
        kv_heads: Hk.
        thresholds: Of the Q, K and V neurons, ``[C]`` each.
        table: Position table ``[H, context]`` of ``learned-position``.
        leak: lambda ``[Hk]`` or ``[Hk D]``, once it is chosen.
        output_threshold: Of the output neuron, once it is chosen.
    """

    options: Options
    heads: int
    kv_heads: int
    thresholds: tuple[Tensor, Tensor, Tensor]
    table: Tensor | None = None
    leak: Tensor | None = None
    output_threshold: Tensor | None = None

    def trains(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Spikes of Q, K and V, ``[T, B, L, C]``."""
        q, k, v = (
            _fire(x, theta, self.options.neuron_of(role), timed=False)
            for x, theta, role in zip((query, key, value), self.thresholds, "qkv", strict=True)
        )
        return q, k, v

    def current(self, trains: tuple[Tensor, Tensor, Tensor], leak: Tensor | None) -> Tensor:
        """The normalised T-step result of spiking attention, ``[T, B, L, C]``."""
        arguments = [*trains, self.heads, self.kv_heads, *([] if leak is None else [leak])]
        attended: Tensor = _OPS.spiking_attention.default(*arguments)
        return normalized(_run, self, attended, *trains[:2], self.table)

    def result(self, current: Tensor) -> Tensor:
        """What the output projection sees, before the gain, ``[B, L, C]``."""
        if self.output_threshold is None:
            return current.mean(0)
        return _fire(current, self.output_threshold, self.options.neuron_of("ssa"), timed=True).mean(0)


def decide(node: Node, options: Options, context: int) -> Site:
    """Thresholds and tables of one attention.

    Args:
        node: The ``ntc.attention`` node.
        options: Its options.
        context: Most tokens of the model, 0 if not limited.

    Raises:
        PassError: Without calibration statistics, or if a table over positions is wanted and their number is not limited.
    """
    heads, kv_heads = node.args[3], node.args[4]
    assert isinstance(heads, int) and isinstance(kv_heads, int)
    thetas = []
    for argument, role in zip(node.args[:3], ("q", "k", "v"), strict=True):
        assert isinstance(argument, Node)
        if STATS not in argument.meta:
            raise PassError(f"no calibration statistics at {where(argument)}: run calibrate right before replace-attention")
        thetas.append(threshold_of(argument.meta[STATS]["rows"], options.percentile, options.neuron_of(role)))
    table = None
    if options.normalizer == "learned-position":
        if not context:
            raise PassError(f"learned-position needs a model with a limited context, and this one has none: {where(node)}; use position")
        table = position_table(heads, context).to(thetas[0])
    return Site(options, heads, kv_heads, (thetas[0], thetas[1], thetas[2]), table)


def threshold_of(rows: Tensor, percentile: float, neuron: NeuronSpec) -> Tensor:
    """Threshold ``[C]`` with which the percentile of sample currents ``[rows, C]`` fires at every step.

    An IF neuron does so at a constant current of theta, a leaky one, ``u = v + (x - v) / tau``, from rest at tau theta.
    """
    theta = threshold_from(rows, percentile, neuron.signed)
    return theta / neuron.tau if neuron.tau is not None else theta


def normalized(
    call: Callable[..., Value], site: Site, current: Value, query: Value, key: Value, table: Value | None
) -> Value:
    """The normaliser behind spiking attention; ``call(op, *arguments)`` runs an op or makes a node of it."""
    normalizer = site.options.normalizer
    if normalizer == "position":
        return call(_OPS.position_scale.default, current)
    if normalizer == "learned-position":
        return call(_OPS.position_scale.default, current, table)
    if normalizer in ("rms", "leak-rms"):
        return call(_OPS.rms_scale.default, current, site.heads, EPS)
    if normalizer == "row-sum":
        return call(_OPS.row_sum_scale.default, current, query, key, site.heads, site.kv_heads)
    return current  # what a leak forgets need not be divided away


def _run(op: Any, *arguments: Any) -> Tensor:
    result: Tensor = op(*arguments)
    return result


def _fire(current: Tensor, theta: Tensor, neuron: NeuronSpec, *, timed: bool) -> Tensor:
    """The spikes that insert-neurons' node will fire."""
    start = theta.new_tensor([neuron.v0])
    spikes: Tensor
    if neuron.tau is not None:
        tau = theta.new_tensor([neuron.tau])
        spikes = leaky_integrate_fire(current, theta, tau, start, neuron.steps, False, timed, "atan", 1.0)
    else:
        spikes = integrate_fire(current, theta, start, neuron.steps, neuron.signed, timed, "atan", 1.0)
    return spikes
