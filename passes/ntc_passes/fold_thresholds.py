r"""Fold threshold normalization into the weights, so that every threshold is 1.

Rows, in front of a neuron (Diehl et al. 2015, Rueckauer et al. 2017)::

    if_rate(W x + b, theta)  =  if_rate((W / theta) x + b / theta, 1)          theta > 0

Columns, behind a scale (the neuron's value, the gain of SSA)::

    W (g * r) + b  =  (W diag(g)) r + b

Both are exact, for the rate and, step by step, for the spikes: a soft-reset neuron with everything measured in units of
its threshold fires at the same steps. Refused, with the reason: a weight or bias that is used elsewhere too (tied
embeddings), a pre-activation with other users, a threshold that is not positive (dividing by it turns the comparison
round). Computed in float64, returned in the weight's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from ntc.meta import building
from ntc.ops import aten
from ntc.pipeline import Context, Pass, PassResult
from ntc.program import Program

__all__ = ["FoldThresholds", "fold_columns", "fold_rows"]


class FoldThresholds(Pass):
    """Fold thresholds and scales into the neighbouring weights and biases."""

    name = "fold-thresholds"
    requires = frozenset({"canonical"})
    provides = frozenset({"thresholds-folded"})
    exact = True

    def run(self, program: Program, context: Context) -> PassResult:
        """Fold rows in front of neurons, then columns behind scales."""
        sites, missed = 0, []
        for node in list(program.graph.nodes):
            if node.target in _NEURONS:
                reason = _fold_in_front(program, node)
            elif node.target is aten.mul.Tensor and isinstance(node.args[1], Node) and node.args[1].op == "get_attr":
                reason = _fold_behind(program, node)
            else:
                continue
            if reason is None:
                sites += 1
            elif reason:
                missed.append((node.name, reason))
        return PassResult(sites > 0, sites, tuple(missed))


_NEURONS = (torch.ops.ntc.if_rate.default, torch.ops.ntc.integrate_fire.default)


def fold_rows(weight: Tensor, bias: Tensor | None, threshold: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scale a linear layer so that its neurons fire at 1.

    A neuron fires when ``W x + b >= theta``. For ``theta > 0`` that is ``(W / theta) x + b / theta >= 1``.

    Args:
        weight: Synaptic weights ``[N, M]``, one row per neuron.
        bias: Constant input ``[N]``, or None.
        threshold: Firing thresholds, all > 0, ``[N]`` or ``[1]``.

    Returns:
        Weight and bias in units of the threshold, in the dtype given.

    Raises:
        ValueError: If a threshold is not positive; names the first neuron and its value.
    """
    bad = (~(threshold > 0)).nonzero()  # NaN is not positive either
    if len(bad):
        first = int(bad[0])
        raise ValueError(f"neuron {first} has the threshold {float(threshold[first]):g}, which is not positive")
    theta = threshold.double().expand(weight.shape[0])
    scaled = (weight.double() / theta[:, None]).to(weight.dtype)
    return scaled, None if bias is None else (bias.double() / theta).to(bias.dtype)


def fold_columns(weight: Tensor, scale: Tensor) -> Tensor:
    """``W diag(g)``: the layer that does to ``r`` what ``W`` does to ``g * r``.

    Args:
        weight: ``[N, M]``.
        scale: g, ``[M]`` or ``[1]``.

    Returns:
        ``[N, M]`` in the dtype of the weight.
    """
    return (weight.double() * scale.double().expand(weight.shape[1])).to(weight.dtype)


def _shared(linear: Node) -> str:
    """Why the weights of a linear layer cannot be changed, or an empty string."""
    for part in linear.args[1:3]:
        if isinstance(part, Node):
            if part.op != "get_attr":
                return f"%{part.name} is computed, not a constant"
            holders = [n for n in part.graph.nodes if n.op == "get_attr" and n.target == part.target]
            others = [u.name for n in holders for u in n.users if u is not linear]
            if others:
                return f"{part.target} also feeds %{others[0]}"
    return ""


def _fold_in_front(program: Program, neuron: Node) -> str | None:
    """None if folded, else why not; an empty string if there is nothing to fold."""
    linear, theta_node = neuron.args[0], neuron.args[1]
    assert isinstance(linear, Node) and isinstance(theta_node, Node)
    theta = program.tensor(theta_node).detach()
    if bool((theta == 1).all()):
        return ""
    if linear.target is not aten.linear.default:
        return f"its current %{linear.name} is not the result of a linear layer"
    if len(linear.users) > 1:
        return f"its current %{linear.name} is used elsewhere too"
    if reason := _shared(linear):
        return reason
    weight, bias = linear.args[1], linear.args[2] if len(linear.args) > 2 else None
    assert isinstance(weight, Node)
    try:
        rows, offset = fold_rows(
            program.tensor(weight).detach(), program.tensor(bias).detach() if isinstance(bias, Node) else None, theta
        )
    except ValueError as error:
        return str(error)
    with building(program.graph, before=linear, stands_for=[linear, neuron], by=FoldThresholds.name) as call:
        arguments = [linear.args[0], call(program.add_tensor(str(weight.target), rows), at=linear)]
        if offset is not None and isinstance(bias, Node):
            arguments.append(call(program.add_tensor(str(bias.target), offset), at=linear))
        folded = call(aten.linear.default, *arguments, at=linear, name=linear.name)
        one = call(program.add_tensor(str(theta_node.target), torch.ones_like(theta)), at=neuron)
    linear.replace_all_uses_with(folded)
    program.graph.erase_node(linear)
    neuron.update_arg(1, one)
    neuron.meta["ntc.made_by"] = (*neuron.meta["ntc.made_by"], FoldThresholds.name)
    return None


def _fold_behind(program: Program, scale: Node) -> str | None:
    """None if folded into every user, else why not; an empty string if the scale has nothing to do with neurons."""
    users = list(scale.users)
    if not users or any(u.target is not aten.linear.default or u.args[0] is not scale for u in users):
        return f"its result goes into {', '.join('%' + u.name for u in users) or 'nothing'}, not only into linear layers"
    for user in users:
        if reason := _shared(user):
            return reason
    source, constant = scale.args[0], scale.args[1]
    assert isinstance(constant, Node)
    value = program.tensor(constant).detach()
    if value.dim() > 1:
        return "its factor is not one number per channel"
    for user in users:
        weight = user.args[1]
        assert isinstance(weight, Node)
        with building(program.graph, before=user, stands_for=[user, scale], by=FoldThresholds.name) as call:
            columns = fold_columns(program.tensor(weight).detach(), value)
            stored = call(program.add_tensor(str(weight.target), columns), at=user)
            folded = call(aten.linear.default, source, stored, *user.args[2:], at=user, name=user.name)
        user.replace_all_uses_with(folded)
        program.graph.erase_node(user)
    program.graph.erase_node(scale)
    return None
