r"""One threshold per population, as chips with one per core need.

``fold-thresholds`` makes every threshold 1 that stands behind a linear layer, exactly. What it cannot fold is the output
neuron of spiking attention (``output = "spikes"``): a dynamic product has no stored weight. Such a population keeps one
threshold per channel.

Before::

    %r = ntc.if_rate(%x, threshold, True)         # threshold [C]
    %y = mul(%r, gain)                            # gain [C]

After::

    %r = ntc.if_rate(%x, shared, True)            # shared [1]
    %y = mul(%r, gain shared / threshold)

The result is the same for every ``|x| <= min(shared, threshold)``; above, the value clips elsewhere. Refused, with the
reason: neurons behind a linear layer, and neurons whose rate goes anywhere else than into one gain.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.fx import Node

from ntc.meta import NEURON, building
from ntc.ops import aten
from ntc.pipeline import Context, Pass, PassResult
from ntc.program import Program
from ntc.recipe import Step
from ntc.registry import recipe

__all__ = ["NEURTRANSFORMER_SHARED", "Options", "ShareThresholds"]


@dataclass(frozen=True)
class Options:
    """Options of ``share-thresholds``.

    Attributes:
        shared_threshold: ``mean`` of the thresholds of a population, or their ``max``: nothing clips that did not clip
            before, and there are fewer spikes.
    """

    shared_threshold: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        if self.shared_threshold not in ("mean", "max"):
            raise ValueError(f"shared_threshold must be 'mean' or 'max', got {self.shared_threshold!r}")


class ShareThresholds(Pass):
    """Give every population one threshold where folding cannot."""

    name = "share-thresholds"
    requires = frozenset({"neurons-annotated"})
    required = True  # who asks for it by name wants to know that there was nothing to share
    Options = Options

    def run(self, program: Program, context: Context) -> PassResult:
        """Share what can be shared; say why the rest is left alone."""
        sites, missed, spread = 0, [], {}
        for node in list(program.graph.nodes):
            if node.target is not torch.ops.ntc.if_rate.default:
                continue
            theta = program.tensor(node.args[1]).detach()
            if bool((theta == theta[0]).all()):
                continue  # one threshold already: nothing looks wrong, so this is no miss
            if reason := _refusal(node):
                missed.append((node.name, reason))
                continue
            spread[node.name] = float(theta.max() / theta.min())
            _share(program, node, theta, self.at(node, context))
            sites += 1
        return PassResult(sites > 0, sites, tuple(missed), notes={"largest_over_smallest": spread} if sites else {})


def _refusal(node: Node) -> str:
    """Why the thresholds of a rate cannot be shared, or an empty string."""
    if node.args[0].target is aten.linear.default:
        return "its current comes from a linear layer: fold-thresholds makes its thresholds 1, and that is exact"
    gains = [u for u in node.users if u.target is aten.mul.Tensor and isinstance(u.args[1], Node) and u.args[1].op == "get_attr"]
    if len(gains) != 1 or len(node.users) != 1:
        return "its rate does not go into one gain, which alone could make up for another threshold; run before fold-thresholds"
    return ""


def _share(program: Program, node: Node, theta: Tensor, options: Options) -> None:
    """Rewrite one rate and the gain behind it."""
    (scaled,) = node.users
    shared = (theta.mean() if options.shared_threshold == "mean" else theta.max()).reshape(1)
    gain = program.tensor(scaled.args[1]).detach() * shared / theta
    with building(program.graph, before=scaled, stands_for=[node, scaled], by=ShareThresholds.name) as call:
        threshold = call(program.add_tensor(str(node.args[1].target), shared))
        rate = call(node.target, node.args[0], threshold, node.args[2], name=node.name)
        rate.meta[NEURON] = node.meta[NEURON]  # still the neuron that an earlier pass chose
        new = call(aten.mul.Tensor, rate, call(program.add_tensor(str(scaled.args[1].target), gain)), name=scaled.name)
    scaled.replace_all_uses_with(new)
    program.graph.erase_node(scaled)
    program.graph.erase_node(node)


_SPIKES = recipe("neurtransformer").with_options("replace-attention", output="spikes")  # as it is, it has no output neuron
NEURTRANSFORMER_SHARED = replace(
    # Anywhere before fold-thresholds, which takes the gains away.
    _SPIKES.insert_before("fold-thresholds", Step(ShareThresholds.name)),
    name="neurtransformer-shared",
    summary="neurtransformer with an output neuron behind its attention, and one threshold per population.",
    source="NeurTransformer, arXiv 2510.00133",
    spiking="Q, K, V, the attention products and their result; the FFN's hidden layer",
    analog="embeddings, LayerNorm, residual stream, the inputs of the Q, K, V and first FFN projections, lm_head",
)
