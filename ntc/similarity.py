r"""How near one network comes to another on the same tokens: logits per window, activations per layer.

With logits z (network) and z' (program) at one position, log p = z - logsumexp(z), and targets y:

- cross entropy ``-log p'(y)``, accuracy ``1[argmax z' = y]``
- cosine ``z . z' / (|z| |z'|)``, top-1 agreement ``1[argmax z = argmax z']``
- KL divergence ``sum_v p(v) (log p(v) - log p'(v)) = p . (z - z') - logsumexp(z) + logsumexp(z')`` [nats]

and with activations x (network) and x' (program) of one layer at one position

- cosine ``x . x' / (|x| |x'|)``, relative error ``|x - x'| / |x|``
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.blocks import LayerOutput, Place, layer_outputs
from ntc.meta import SCALE
from ntc.program import Program

__all__ = ["LayerComparison", "LayerQuality", "LogitSummary", "compare_logits", "next_token", "same_channels"]

_TINY = 1e-30  # a vector of zeros has no direction: its cosine is 0


@dataclass(frozen=True)
class LogitSummary:
    """Logits ``[W, V]`` of one window, with what every comparison needs of them, computed once.

    Attributes:
        logits: z.
        top: Most likely token, ``[W]``.
        weights: ``exp(z - max z)``: the probabilities before they are normalized, ``[W, V]``.
        total: Sum of the weights, ``[W]``.
        log_total: ``logsumexp(z)``, ``[W]``.
        square: ``|z|^2`` in float64, ``[W]``.
    """

    logits: Tensor
    top: Tensor
    weights: Tensor
    total: Tensor
    log_total: Tensor
    square: Tensor

    @staticmethod
    def of(logits: Tensor) -> LogitSummary:
        """Summarize logits ``[W, V]`` of one window."""
        z = logits.float()
        largest, top = z.max(-1)
        weights = (z - largest[:, None]).exp_()
        total = weights.sum(-1)
        return LogitSummary(z, top, weights, total, largest + total.log(), torch.linalg.vecdot(z, z).double())


def next_token(summary: LogitSummary, ids: Tensor) -> dict[str, float]:
    """Means over the predictions of one window: ``cross_entropy`` [nats] and ``accuracy``.

    Args:
        summary: Logits of the window.
        ids: Its token ids, ``[W]``.
    """
    targets = ids[1:]
    chosen = summary.logits[:-1].gather(1, targets[:, None])[:, 0]
    return {
        "cross_entropy": float((summary.log_total[:-1] - chosen).double().mean()),
        "accuracy": float((summary.top[:-1] == targets).double().mean()),
    }


def compare_logits(ours: LogitSummary, theirs: LogitSummary) -> dict[str, float]:
    """Means over the positions of one window: ``cosine``, ``top1_agreement`` and ``kl`` from theirs to ours [nats]."""
    dot = torch.linalg.vecdot(ours.logits, theirs.logits).double()
    cosine = dot / (ours.square.sqrt() * theirs.square.sqrt()).clamp(min=_TINY)
    apart = torch.linalg.vecdot(theirs.weights, theirs.logits - ours.logits) / theirs.total
    return {
        "cosine": float(cosine.mean()),
        "top1_agreement": float((ours.top == theirs.top).double().mean()),
        "kl": float((apart.double() - (theirs.log_total - ours.log_total).double()).mean()),
    }


@dataclass(frozen=True)
class LayerQuality:
    """How near one layer of the program comes to the same layer of the network.

    Attributes:
        block: Transformer block, such as ``transformer.h.0``.
        where: ``attention`` or ``ffn``: what that layer adds to the residual stream; ``block``: the stream that leaves the block.
        node: Node of the program.
        cosine: Mean cosine similarity over positions.
        relative_error: Mean of ``|x - x'| / |x|`` over positions.
    """

    block: str
    where: Place
    node: str
    cosine: float
    relative_error: float


def same_channels(program: Program, network: Program) -> bool:
    """Whether channel c of one residual stream is channel c of the other: not if one of the two has been rotated."""
    return ("rotated" in program.facts) == ("rotated" in network.facts)


class LayerComparison:
    """Compares the layers that two programs of one model share, batch by batch: first ``keep`` theirs, then ``compare`` ours.

    Attention, FFN and block outputs (``ntc.blocks.layer_outputs``) are matched by block and place; what only one of the
    two has is left out. Programs whose stream is rotated (fact ``rotated``) share none: their channels are other ones.
    """

    def __init__(self, program: Program, network: Program) -> None:
        ours, theirs = _by_place(program), _by_place(network)
        self._outputs = {place: ours[place] for place in ours if place in theirs and same_channels(program, network)}
        self._ours = {ours[place].node: place for place in self._outputs}
        self._theirs = {theirs[place].node: place for place in self._outputs}
        self._kept: dict[tuple[str, str, int], Tensor] = {}
        self._sums = {place: torch.zeros(2, dtype=torch.float64) for place in self._outputs}
        self._positions = 0

    def keep(self, node: Node, value: Any) -> None:
        """Remember an activation of the network."""
        if (place := self._theirs.get(node)) is not None:
            self._kept[place] = value

    def compare(self, node: Node, value: Any) -> None:
        """Compare an activation of the program with the one that was kept of the network."""
        if (place := self._ours.get(node)) is None:
            return
        scale = torch.tensor(node.meta.get(SCALE, 1.0))  # of the integer grade
        x, other = self._kept.pop(place).float().flatten(0, -2), (value.float() * scale).flatten(0, -2)
        dot = torch.linalg.vecdot(x, other).double()
        norm, other_norm = (torch.linalg.vecdot(v, v).double().sqrt() for v in (x, other))
        error = torch.linalg.vector_norm(x - other, dim=-1).double() / norm.clamp(min=_TINY)
        self._sums[place] += torch.stack([(dot / (norm * other_norm).clamp(min=_TINY)).sum(), error.sum()])

    def advance(self, positions: int) -> None:
        """Count the positions of a batch."""
        self._positions += positions

    def result(self) -> tuple[LayerQuality, ...]:
        """The layers in the order in which the residual stream meets them."""
        means = {place: (sums / max(1, self._positions)).tolist() for place, sums in self._sums.items()}
        return tuple(LayerQuality(o.block, o.where, o.node.name, *means[place]) for place, o in self._outputs.items())


def _by_place(program: Program) -> Mapping[tuple[str, str, int], LayerOutput]:
    """Layers by block, place and number, for blocks with more than one attention or FFN."""
    result: dict[tuple[str, str, int], LayerOutput] = {}
    for output in layer_outputs(program):
        number = sum(key[:2] == (output.block, output.where) for key in result)
        result[output.block, output.where, number] = output
    return result
