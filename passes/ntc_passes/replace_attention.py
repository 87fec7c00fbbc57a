r"""Softmax attention becomes causal spiking self-attention (NeurTransformer, arXiv 2510.00133, step 1).

Before::

    %y = ntc.attention(%q, %k, %v, heads, kv_heads, scale)

After (rates stand where insert-neurons puts spikes)::

    %rq = ntc.if_rate(%q, q.threshold, False);  %rk = ...;  %rv = ntc.if_rate(%v, v.threshold, True)
    %ssa = ntc.spiking_attention(%rq, %rk, %rv, heads, kv_heads)      # sum_{j<=i} (Q_i . K_j) V_j
    %mean = ntc.position_scale(%ssa)                                  # / (i + 1), in place of the softmax's row sum
    %y = mul(%mean, ssa.gain)

Thresholds are percentiles of the calibration activations per channel. The gain is the least-squares factor per channel
between the T-step spiking result and the softmax attention it replaces, on the calibration text:
``g_c = <y_c, o_c> / <y_c, y_c>``. With ``output = "spikes"`` a fourth neuron follows ``%mean`` (Spikformer's second threshold),
so that the output projection is driven by spikes too. This is not exact, and without fine-tuning it costs quality: the
history says how much the logits moved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from ntc.errors import PassError
from ntc.meta import NEURON, STATS, NeuronSpec, block_of, building, module_of, where
from ntc.ops import aten, integrate_fire, position_scale, spiking_attention
from ntc.pipeline import Calibration, Context, Pass, PassResult
from ntc.program import Program, interpret
from ntc_passes.calibrate import threshold_from

__all__ = ["ReplaceAttention"]


@dataclass(frozen=True)
class Options:
    """Options of ``replace-attention``.

    Attributes:
        steps: T, time steps of the Q, K and V neurons.
        percentile: Percentile of the activations that becomes the threshold of Q, K and V.
        signed_value: Ternary spikes for V (values of either sign), else binary.
        output: ``spikes``: an output neuron, so that the output projection is driven by spikes; ``current``: the counts
            are decoded and projected as an analog value. On the reference GPT-2 at T = 4 the two differ by 0.5 % in
            perplexity before fine-tuning.
        output_percentile: Threshold of the output neuron.
    """

    steps: int = 4
    percentile: float = 90.0
    signed_value: bool = True
    output: Literal["current", "spikes"] = "spikes"
    output_percentile: float = 99.0

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_percentile(self.percentile)
        check_percentile(self.output_percentile)
        if type(self.signed_value) is not bool:
            raise ValueError(f"signed_value must be true or false, got {self.signed_value!r}")
        if self.output not in ("current", "spikes"):
            raise ValueError(f"output must be 'current' or 'spikes', got {self.output!r}")


def check_steps(steps: int) -> None:
    """Refuse a number of time steps that is no positive integer."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}")


def check_percentile(percentile: float) -> None:
    """Refuse a percentile outside of (0, 100]."""
    if not isinstance(percentile, int | float) or isinstance(percentile, bool) or not 0 < percentile <= 100:
        raise ValueError(f"a percentile lies in (0, 100], got {percentile!r}")


@dataclass
class _Site:
    """One attention on its way to SSA: what was decided, and the running sums of the gain fit."""

    options: Options
    thresholds: tuple[Tensor, Tensor, Tensor]
    output_threshold: Tensor | None = None
    cross: Tensor | None = None  # <y, o> per channel
    power: Tensor | None = None  # <y, y> per channel
    error: float = 0.0  # |o|^2, for the fraction explained

    def spikes(self, query: Tensor, key: Tensor, value: Tensor, node: Node) -> Tensor:
        """The T-step current after the position scale, ``[T, B, L, C]``."""
        heads, kv_heads = node.args[3], node.args[4]
        signs = (False, False, self.options.signed_value)
        trains = [
            integrate_fire(x, theta, theta.new_tensor([0.5]), self.options.steps, signed, False, "atan", 1.0)
            for x, theta, signed in zip((query, key, value), self.thresholds, signs, strict=True)
        ]
        current: Tensor = position_scale(spiking_attention(*trains, heads, kv_heads))
        return current

    def result(self, current: Tensor) -> Tensor:
        """What the output projection sees, before the gain, ``[B, L, C]``."""
        if self.output_threshold is None:
            return current.mean(0)
        o = self.options
        half = current.new_tensor([0.5])
        spikes: Tensor = integrate_fire(current, self.output_threshold, half, o.steps, o.signed_value, True, "atan", 1.0)
        return spikes.mean(0)


class ReplaceAttention(Pass):
    """Replace softmax attention by causal spiking self-attention."""

    name = "replace-attention"
    requires = frozenset({"canonical", "calibrated"})
    provides = frozenset({"neurons-annotated"})
    removes = frozenset({"thresholds-folded"})
    required = True
    Options = Options

    def run(self, program: Program, context: Context) -> PassResult:
        """Choose thresholds, fit the gains on calibration text, rewrite every attention."""
        if context.calibration is None:
            raise PassError("replace-attention fits its gains on calibration text: give the same as to calibrate")
        nodes = [n for n in program.graph.nodes if n.target is torch.ops.ntc.attention.default]
        if not nodes:
            return PassResult(False, missed=_near_misses(program))
        sites = {node: self._decide(node, context) for node in nodes}
        _fit(program, sites, context.calibration, context.progress)
        explained = {}
        for node, site in sites.items():
            explained[block_of(node) or node.name] = _rewrite(program, node, site)
        return PassResult(True, len(nodes), notes={"explained_variance": explained})

    def _decide(self, node: Node, context: Context) -> _Site:
        options: Options = self.at(node, context)
        thetas = []
        for argument, signed in zip(node.args[:3], (False, False, options.signed_value), strict=True):
            assert isinstance(argument, Node)
            if STATS not in argument.meta:
                raise PassError(f"no calibration statistics at {where(argument)}: run calibrate right before replace-attention")
            thetas.append(threshold_from(argument.meta[STATS]["rows"], options.percentile, signed))
        return _Site(options, (thetas[0], thetas[1], thetas[2]))


def _near_misses(program: Program) -> tuple[tuple[str, str], ...]:
    """Why canonicalize found no attention, if it saw one."""
    return tuple(miss for record in program.history if record.name == "canonicalize" for miss in record.missed)


def _fit(
    program: Program, sites: dict[Node, _Site], calibration: Calibration, progress: Callable[[str, int, int], None]
) -> None:
    """Accumulate the least-squares sums of every site over the calibration text, each on the analog program's inputs."""
    batches = calibration.batches

    def visit(node: Node, args: tuple[Any, ...], value: Any) -> None:
        site = sites.get(node)
        if site is None:
            return
        query, key, attended = args[:3]
        current = site.spikes(query, key, attended, node)
        if site.options.output == "spikes" and site.output_threshold is None:
            rows = current.flatten(0, -2)
            chosen = rows[torch.linspace(0, len(rows) - 1, min(len(rows), 4096)).long()]
            site.output_threshold = threshold_from(chosen, site.options.output_percentile, site.options.signed_value)
        y, o = site.result(current).flatten(0, -2).double(), value.flatten(0, -2).double()
        cross, power = (y * o).sum(0), (y * y).sum(0)
        site.cross = cross if site.cross is None else site.cross + cross
        site.power = power if site.power is None else site.power + power
        site.error += float((o * o).sum())

    with torch.no_grad():
        for number, batch in enumerate(batches):
            progress("replace-attention", number, len(batches))
            interpret(program, batch, visit, last=list(sites)[-1])


def _rewrite(program: Program, node: Node, site: _Site) -> float:
    """Put SSA in place of one attention; returns the share of the analog result's power that it explains."""
    assert site.cross is not None and site.power is not None
    options, prefix = site.options, module_of(node) or node.name
    silent = site.power <= 0
    gain = torch.where(silent, torch.zeros_like(site.cross), site.cross / site.power.clamp(min=1e-30))
    with building(program.graph, before=node, stands_for=[node], by=ReplaceAttention.name) as call:

        def neuron(x: object, theta: Tensor, signed: bool, role: str) -> Node:
            stored = call(program.add_tensor(f"{prefix}.{role}.threshold", theta))
            rate = call(torch.ops.ntc.if_rate.default, x, stored, signed, name=f"{node.name}_{role}_rate")
            rate.meta[NEURON] = NeuronSpec(steps=options.steps, signed=signed, role=role)
            return rate

        signs = (False, False, options.signed_value)
        rates = [
            neuron(a, t, s, r) for a, t, s, r in zip(node.args[:3], site.thresholds, signs, "qkv", strict=True)
        ]
        ssa = call(torch.ops.ntc.spiking_attention.default, *rates, node.args[3], node.args[4], name=f"{node.name}_ssa")
        result = call(torch.ops.ntc.position_scale.default, ssa, name=f"{node.name}_scaled")
        if site.output_threshold is not None:
            result = neuron(result, site.output_threshold, options.signed_value, "ssa")
        dtype = site.thresholds[0].dtype
        stored = call(program.add_tensor(f"{prefix}.ssa.gain", gain.to(dtype)))
        scaled = call(aten.mul.Tensor, result, stored, name=f"{node.name}_gained")
    for argument in node.args[:3]:
        assert isinstance(argument, Node)
        argument.meta.pop(STATS, None)  # used; in a large network the samples take gigabytes
    node.replace_all_uses_with(scaled)
    program.graph.erase_node(node)
    return float((gain * site.cross).sum() / max(site.error, 1e-30))
