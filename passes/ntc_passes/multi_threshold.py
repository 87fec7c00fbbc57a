r"""Multi-threshold neurons at the input of linear layers, read as rates (ECMT, arXiv 2502.21193).

Before::

    %y = linear(%x, W, c)

After::

    %s = ntc.mt_neuron(%x, theta, T, N, False)   # spikes T graded rate: 0 or +-2^i, i < N
    %i = linear(%s, theta W, c)                  # current: one step's estimate of y
    %y = ntc.decode(%i, 'rate')                  # their mean

theta is one number per site, or one per channel of it, known in advance and folded into the weights. Nothing is measured and nothing is
scaled while the network runs; an event of size 2^i adds a column of the weights, shifted by i. What T steps tell of a value has a closed
form (``ntc.ops.mt_neuron``): within ``theta 2^(N-1)`` it is short by less than the T-th part of the value, or of theta if that is more. So
T buys a relative precision of 1/T, and N the range in which it holds.

A calibration percentile sets theta in one of two ways:

    largest      theta 2^(N-1) = percentile of |x|: at 100 no calibration value is clipped
    smallest     theta = percentile of |x|, levels go up from it: the paper's code, with 99

With the second most values lie below theta, are rounded to T parts of it, and take several steps until they fire. Above theta neurons round
down, so what is told is short in the mean, too; ``gain`` puts one factor per site into the weights, by least squares on calibration values:

    gain = sum x told(x) / sum told(x)^2

Between layers values are analog, as the decode gives them. The paper tells nonlinear functions step by step instead, by what makes the
mean over the steps exact (expectation compensation): ``(1/T) sum_t o(t) = f((1/T) sum_t x(t))``, which is f of the decoded value. So each
value of this program is the mean over the steps of the paper's as long as the neurons fire the same; they receive a constant here and
increments there, which may leave something else in a membrane. ``ntc::expectation`` is that function, for programs that keep their steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.fx import Node

from ntc.meta import building
from ntc.ops import aten
from ntc.ops.mt_neuron import MOST_LEVELS, sum_oracle
from ntc.pipeline import LEFT_ANALOG, Context, Pass, PassResult
from ntc.program import Program
from ntc_passes.digits import check_steps, range_of, sampled
from ntc_passes.encode_linears import refusal
from ntc_passes.new_weights import NewWeights, times
from ntc_passes.replace_attention import check_percentile, check_switch

__all__ = ["MultiThreshold"]

_OPS = torch.ops.ntc


@dataclass(frozen=True)
class Options:
    """Options of ``multi-threshold``.

    Attributes:
        steps: T, time steps; values are told to one part in T of themselves.
        levels: N, thresholds of either sign, each twice the one before; 1 to 7.
        threshold: Which of them the percentile is: the ``largest``, so that all calibration values are in range, or the ``smallest`` (the
            paper's code, with percentile 99).
        percentile: Of the absolute calibration activations.
        scale: Thresholds of each site (``static``) or of each ``channel``.
        gain: Whether the weights make up for what is told short; not the paper's.
        rows: Most tokens of the calibration text that percentiles are taken of.
        convert: Whether to convert at all: false, set for some modules in an override, leaves their inputs analog.
    """

    steps: int = 4
    levels: int = MOST_LEVELS
    threshold: Literal["largest", "smallest"] = "largest"
    percentile: float = 100.0
    scale: Literal["static", "channel"] = "static"
    gain: bool = False
    rows: int = 1024
    convert: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "levels", "rows"):
            check_steps(name, getattr(self, name))
        if self.levels > MOST_LEVELS:
            raise ValueError(f"levels must be at most {MOST_LEVELS}: trains are recorded in 8 bits, got {self.levels}")
        if self.threshold not in ("largest", "smallest"):
            raise ValueError(f"threshold must be 'largest' or 'smallest', got {self.threshold!r}")
        check_percentile(self.percentile)
        if self.scale not in ("static", "channel"):
            raise ValueError(f"scale must be 'static' or 'channel', got {self.scale!r}")
        check_switch("gain", self.gain)
        check_switch("convert", self.convert)

    def theta(self, rows: Tensor) -> Tensor:
        """Thresholds on calibration values ``[rows, C]``: ``[1]`` or ``[C]``."""
        top = range_of(rows, self.scale, self.percentile, 1.0)
        return top / 2 ** (self.levels - 1) if self.threshold == "largest" else top

    def unit(self, rows: Tensor, theta: Tensor) -> Tensor:
        """What an event of size 1 stands for, float64: theta, or the gain times theta."""
        if not self.gain:
            return theta.double()
        told = sum_oracle(rows, theta, self.steps, self.levels) * theta.double() / self.steps
        return theta.double() * (rows.double() * told).sum() / told.square().sum().clamp(min=1e-300)


_Neurons: TypeAlias = dict[tuple[Node, Options], tuple[Node, str]]


class MultiThreshold(Pass):
    """Put multi-threshold neurons in front of every linear layer."""

    name = "multi-threshold"
    requires = frozenset({"canonical"})
    provides = frozenset({"spiking", "coded"})
    required = True
    Options = Options

    def run(self, program: Program, context: Context) -> PassResult:
        """Choose thresholds first, on the program as it is; then convert layer by layer."""
        chosen, missed, wanted = dict[Node, Options](), list[tuple[str, str]](), dict[Node, int]()
        for layer in program.graph.find_nodes(op="call_function", target=aten.linear.default):
            options = self.at(layer, context)
            reason = refusal(layer) if options.convert else LEFT_ANALOG
            if reason:
                missed.append((layer.name, reason))
                continue
            chosen[layer], source = options, layer.args[0]
            wanted[source] = max(options.rows, wanted.get(source, 0))
        samples = sampled(program, wanted, context, self.name, "encode-linears with scale = token, which needs none")
        weights, neurons = NewWeights(program, self.name), _Neurons()
        for number, (layer, options) in enumerate(chosen.items()):
            context.progress(self.name, number, len(chosen))
            _convert(program, layer, options, weights, neurons, samples)
        notes: dict[str, Any] = {"layers": len(chosen), "populations": len(neurons)} if chosen else {}
        if chosen and (untied := weights.untied()):
            notes["untied"] = untied
        return PassResult(bool(chosen), len(chosen), tuple(missed), notes=notes)


def _convert(program: Program, layer: Node, options: Options, weights: NewWeights, neurons: _Neurons, samples: dict[Node, Tensor]) -> None:
    source, matrix, *bias = layer.args
    assert isinstance(source, Node) and isinstance(matrix, Node)
    if (source, options) not in neurons:
        name = program.add_tensor(f"{source.name}.threshold", options.theta(samples[source]))
        with building(program.graph, before=layer, stands_for=[source], by=MultiThreshold.name) as call:
            args = (source, call(name), options.steps, options.levels, False)
            neurons[source, options] = call(_OPS.mt_neuron.default, *args, name=f"{source.name}_spikes"), name
    spikes, theta = neurons[source, options]
    columns = options.unit(samples[source], program.tensor(theta).detach())
    stored = weights.of(matrix, ("threshold", theta), times(columns), layer)
    with building(program.graph, before=layer, stands_for=[layer], by=MultiThreshold.name) as call:
        current = call(aten.linear.default, spikes, call(stored, at=layer), *bias, name=layer.name)
        value = call(_OPS.decode.default, current, "rate", name=f"{layer.name}_decoded")
    layer.replace_all_uses_with(value)
    program.graph.erase_node(layer)
