r"""How far coarser digits of some sites move the network's answer: measured, where ``ntc_passes.sensitivity`` predicts.

    KL(p || p_e) = mean_tokens sum_y p(y | x) log(p(y | x) / p_e(y | x))        [nats per token]

p is the answer with the exact number told by every site, p_e that with coded ones told by the sites in question and by them alone. Fisher
information is the curvature of this at e = 0; errors as large as few events make them, and errors that depend on each other, cost another
amount: those of queries and keys go through an exponential. Against a program that codes all sites finely the divergence would be too
large: a change anywhere draws the errors of all sites behind it anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops.digit_neuron import spread
from ntc.pipeline import Calibration
from ntc.program import Program, interpret
from ntc_passes.sensitivity import windows

__all__ = ["divergences"]


def divergences(
    program: Program,
    sites: Iterable[Node],
    groups: Mapping[str, Mapping[Node, Callable[[Tensor], Tensor]]],
    calibration: Calibration,
    tokens: int,
    progress: Callable[..., None],
) -> dict[str, float]:
    """The divergence of each group of sites, on the first ``tokens`` tokens of a text.

    Args:
        program: As it is; it is not changed.
        sites: ``ntc::digit_neuron`` nodes that tell ``x / d``, ``[B, L, C]``, where nothing else is said.
        groups: What each site of a group makes of that number, in the same steps.
        calibration: Text.
        tokens: How many of it, at least one window.
        progress: Called with a title, a number and how many there are.
    """
    exact: dict[Node, Callable[[Tensor], Tensor]] = dict.fromkeys(sites, _same)
    parts = list(windows(program, calibration, tokens))
    total, seen, done = dict.fromkeys(groups, 0.0), 0, 0
    with torch.no_grad():
        for ids in parts:
            expected = interpret(program, ids, _telling(exact)).log_softmax(-1)
            for name, told in groups.items():
                progress("measure divergences", done, len(parts) * len(groups))
                logits = interpret(program, ids, _telling(exact | dict(told)))
                total[name] += float((expected.exp() * (expected - logits.log_softmax(-1))).sum(dtype=torch.float64))
                done += 1
            seen += ids.numel()
    return {name: value / seen for name, value in total.items()}


def _same(number: Tensor) -> Tensor:
    return number


def _telling(told: Mapping[Node, Callable[[Tensor], Tensor]]) -> Callable[[Node, tuple[Any, ...], Any], Tensor | None]:
    """What puts other numbers in the place of trains: readers sum a train, so all of a number can stand in its last step, of weight 1."""

    def visit(node: Node, args: tuple[Any, ...], value: Any) -> Tensor | None:
        if node not in told:
            return None
        x, step, weights = args[:3]
        train = torch.zeros_like(value)
        train[-1] = told[node](x / spread(step, x)) / float(weights[-1])
        return train

    return visit
