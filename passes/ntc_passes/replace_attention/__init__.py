r"""Softmax attention becomes causal spiking self-attention (NeurTransformer, arXiv 2510.00133, step 1).

Before::

    %y = ntc.attention(%q, %k, %v, heads, kv_heads, scale)

After (rates stand where insert-neurons puts spikes)::

    %rq = ntc.if_rate(%q, q.threshold, False);  %rk = ...;  %rv = ntc.if_rate(%v, v.threshold, True)
    %ssa = ntc.spiking_attention(%rq, %rk, %rv, heads, kv_heads)      # sum_{j<=i} (Q_i . K_j) V_j
    %scaled = ntc.position_scale(%ssa)                                # / (i + 1), in place of the softmax's row sum
    %y = mul(%scaled, ssa.gain)

Another ``normalizer`` puts another op, or none and a leak of the memory, in the place of ``position_scale``.

Thresholds are percentiles of the calibration activations per channel. The gain is the least-squares factor per channel (or
head) between the T-step spiking result and the softmax attention it replaces, on the calibration text (``fit``); leaks are
chosen there too (``leaks``). With ``output = "spikes"`` a fourth neuron follows ``%scaled`` (Spikformer's second threshold),
so that the output projection is driven by spikes too. This is not exact, and without fine-tuning it costs quality: the
history says how much the logits moved, how much of each block's attention is explained, and which leaks were chosen.

An attention whose module has ``convert = false`` stays as it is and is listed as missed. A program that spikes already, with some
attention left so, can be run through the recipe again to convert more of it: the fit then sees what the spikes before it give.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from ntc.errors import PassError
from ntc.meta import NEURON, STATS, block_of, building, module_of
from ntc.ops import SOFTMAX_ATTENTION, aten
from ntc.pipeline import LEFT_ANALOG, Context, Pass, PassResult
from ntc.program import Program
from ntc_passes.replace_attention.fit import Gain, fit_gains
from ntc_passes.replace_attention.leaks import choose_leaks
from ntc_passes.replace_attention.options import Options, check_percentile, check_steps, check_switch
from ntc_passes.replace_attention.site import Site, decide, normalized

__all__ = ["ReplaceAttention", "check_percentile", "check_steps", "check_switch"]


class ReplaceAttention(Pass):
    """Replace softmax attention by causal spiking self-attention."""

    name = "replace-attention"
    requires = frozenset({"canonical", "calibrated"})
    provides = frozenset({"neurons-annotated"})
    removes = frozenset({"thresholds-folded", "spiking"})  # rates again, until insert-neurons
    required = True
    Options = Options

    def run(self, program: Program, context: Context) -> PassResult:
        """Choose thresholds and leaks, fit the gains on calibration text, rewrite every attention."""
        calibration = context.calibration
        if calibration is None:
            raise PassError("replace-attention fits its gains on calibration text: give the same as to calibrate")
        nodes = [n for n in program.graph.nodes if n.target in SOFTMAX_ATTENTION]
        if not nodes:
            return PassResult(False, missed=_near_misses(program))
        options = {node: self.at(node, context) for node in nodes}
        left = tuple((node.name, LEFT_ANALOG) for node in nodes if not options[node].convert)
        if len(left) == len(nodes):
            return PassResult(False, missed=left)
        sites = {node: decide(node, given, program.info.context) for node, given in options.items() if given.convert}
        choose_leaks(program, sites, calibration, lambda done, total: context.progress("choose leaks", done, total))
        gains = fit_gains(program, sites, calibration, lambda done, total: context.progress(self.name, done, total))
        explained, leaks = {}, {}
        for node, site in sites.items():
            place = block_of(node) or node.name
            explained[place] = gains[node].explained
            if site.leak is not None:
                leaks[place] = _leaks_of(site)
            _rewrite(program, node, site, gains[node])
        return PassResult(True, len(sites), left, notes={"explained_variance": explained, **({"leaks": leaks} if leaks else {})})


def _near_misses(program: Program) -> tuple[tuple[str, str], ...]:
    """Why canonicalize found no attention, if it saw one."""
    return tuple(miss for record in program.history if record.name == "canonicalize" for miss in record.missed)


def _leaks_of(site: Site) -> list[float] | list[list[float]]:
    """One number per key head; of leaks per channel the smallest, the median and the largest of each head."""
    assert site.leak is not None
    if site.options.normalizer != "channel-leak":
        return [float(x) for x in site.leak]
    return [[float(f) for f in (row.min(), row.median(), row.max())] for row in site.leak.view(site.kv_heads, -1)]


def _rewrite(program: Program, node: Node, site: Site, gain: Gain) -> None:
    """Put SSA in place of one attention."""
    options, prefix = site.options, module_of(node) or node.name
    dtype = site.thresholds[0].dtype
    with building(program.graph, before=node, stands_for=[node], by=ReplaceAttention.name) as call:

        def constant(name: str, value: torch.Tensor) -> Node:
            return call(program.add_tensor(f"{prefix}.{name}", value))

        def neuron(x: object, theta: torch.Tensor, role: str) -> Node:
            spec, stored = options.neuron_of(role), constant(f"{role}.threshold", theta)
            rate = call(torch.ops.ntc.if_rate.default, x, stored, spec.signed, name=f"{node.name}_{role}_rate")
            rate.meta[NEURON] = spec
            return rate

        rates = [neuron(a, t, r) for a, t, r in zip(node.args[:3], site.thresholds, "qkv", strict=True)]
        leak = [] if site.leak is None else [constant("ssa.leak", site.leak)]
        ssa = call(
            torch.ops.ntc.spiking_attention.default, *rates, site.heads, site.kv_heads, *leak, name=f"{node.name}_ssa"
        )
        table = None if site.table is None else constant("ssa.position", site.table)
        result = normalized(lambda op, *a: call(op, *a, name=f"{node.name}_scaled"), site, ssa, rates[0], rates[1], table)
        if site.output_threshold is not None:
            result = neuron(result, site.output_threshold, "ssa")
        scaled = call(aten.mul.Tensor, result, constant("ssa.gain", gain.factor.to(dtype)), name=f"{node.name}_gained")
    for argument in node.args[:3]:
        assert isinstance(argument, Node)
        argument.meta.pop(STATS, None)  # used; in a large network the samples take gigabytes
    node.replace_all_uses_with(scaled)
    program.graph.erase_node(node)
