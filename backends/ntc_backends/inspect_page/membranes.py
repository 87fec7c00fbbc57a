r"""The membrane potentials of a few neurons, by running their dynamics once more on the current that they were given.

Ops return spikes, and nothing but training needs what is inside of a neuron, so the potential is made again, with the equations of
``ntc/ops/if_neuron.py``, ``lif_neuron.py`` and ``integer_fire.py`` in the same arithmetic:

    IF     u(t) = v(t-1) + x(t)                     integers alike, with v(0) = start
    LIF    u(t) = v(t-1) + (x(t) - v(t-1)) / tau
    s(t) = [u(t) >= theta], signed: minus [u(t) < 0];   v(t) = u(t) - theta s(t), hard reset: u(t) (1 - s(t))

The spikes that come of it must be those that were seen, or an error says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.errors import BackendError
from ntc.meta import where

__all__ = ["Membranes", "membranes"]

_OPS = torch.ops.ntc


@dataclass(frozen=True)
class Membranes:
    """What some neurons of one population did.

    Attributes:
        before: u, the potential before the reset ``[L, T, n]``.
        after: v, the potential after it ``[L, T, n]``.
        start: v(0) ``[n]``: where each neuron begins at each token.
        threshold: theta ``[n]``.
    """

    before: Tensor
    after: Tensor
    start: Tensor
    threshold: Tensor


def membranes(node: Node, args: tuple[Any, ...], spikes: Tensor, neurons: Tensor) -> Membranes | None:
    """Run some neurons of a population once more.

    Args:
        node: The population.
        args: What its op was called with, tensors in place of nodes; batch size 1.
        spikes: What it returned, ``[T, 1, L, C]``.
        neurons: Indices of the neurons, int64 ``[n]``.

    Returns:
        Their potentials; None for an op whose dynamics are not known here.

    Raises:
        BackendError: If the spikes are not those that were seen.
    """
    named = {a.name: a.default_value for a in node.target._schema.arguments}  # type: ignore[union-attr]
    named |= dict(zip(named, args, strict=False))
    if node.target not in (_OPS.integrate_fire.default, _OPS.leaky_integrate_fire.default, _OPS.integer_fire.default):
        return None
    leaky, whole = node.target is _OPS.leaky_integrate_fire.default, node.target is _OPS.integer_fire.default
    seen = spikes[:, 0].index_select(-1, neurons)
    current: Tensor = named["current"].index_select(-1, neurons)
    current = current[:, 0] if named["timed"] else current[0]
    if whole:
        current = current.to(torch.int64)
    theta = _of(named["threshold"], neurons, spikes).to(current.dtype)
    start = _of(named["start"], neurons, spikes).to(current.dtype) if whole else _of(named["v0"], neurons, spikes) * theta
    tau = _of(named["tau"], neurons, spikes) if leaky else None
    signed, hard = not leaky and named["signed"], leaky and named["hard_reset"]
    v = torch.zeros_like(seen[0], dtype=current.dtype) + start
    before, after = [], []
    for t in range(named["steps"]):
        x = current[t] if named["timed"] else current
        u = v + x if tau is None else v + (x - v) / tau
        s = (u >= theta).to(u.dtype)
        if signed:
            s = s - (u < 0).to(u.dtype)
        if not torch.equal(s, seen[t].to(s.dtype)):
            raise BackendError(f"the membrane at step {t + 1} would make other spikes than those that were seen: {where(node)}")
        v = u * (1 - s) if hard else u - theta * s
        before.append(u)
        after.append(v)
    return Membranes(torch.stack(before, 1), torch.stack(after, 1), start, theta)


def _of(parameter: Tensor, neurons: Tensor, spikes: Tensor) -> Tensor:
    """One number per neuron of a parameter that is one for all or one for each."""
    return parameter.detach().expand(spikes.shape[-1]).index_select(0, neurons)
