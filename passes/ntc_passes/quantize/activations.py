r"""Scales of activations: of several clippings the one with the least squared error of the layers that read them.

With ``e = q(x) - x`` the error of an activation, a layer behind it is wrong by ``W e``, and ``|W e|**2 = e^T (W^T W) e``. The Gram
matrices of all readers are added, each in units of what the layer gives, ``mean |W x|**2`` (rows in front of neurons in units
of their thresholds), so that Q, K and V, or a small and a large layer, count alike.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops import aten
from ntc_passes.quantize.fixed_point import nearest
from ntc_passes.quantize.walk import Value, Work, rows_of

__all__ = ["as_activation", "best_scale", "gram_behind", "relative_error", "sample_rows"]

_IF = torch.ops.ntc.integrate_fire.default
_SHRINK = 0.93
_CLIPPINGS = 26
"""``0.93**25`` = 0.16: a sixth of the largest value is as far as clipping goes."""

_ELEMENTS = 1 << 20
"""Of the sample on which clippings are compared."""


def sample_rows(channels: int) -> int:
    """How many tokens a sample of activations has."""
    return min(max(_ELEMENTS // channels, 128), 1024)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """``|got - wanted|**2 / |wanted|**2``."""
    return float((got - wanted).square().sum() / wanted.square().sum().clamp(min=1e-300))


def gram_behind(work: Work, node: Node, rows: Tensor) -> Tensor:
    """``sum W^T W / mean |W x|**2`` over the linear layers that read a node of the floating-point program, ``[C, C]``; 1 without any."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    moments = rows.T @ rows / max(1, len(rows))
    for linear in _readers(node):
        weight = work.constant(linear, linear.args[1], "the weight of a linear layer")
        neurons = [u for u in linear.users if u.target is _IF]
        if neurons:
            weight = weight / work.constant(neurons[0], neurons[0].args[1], "a threshold").expand(len(weight))[:, None]
        gram = weight.T @ weight
        power = float((gram * moments).sum())
        total += gram / power if power > 0 else 0.0
    return total if bool(total.any()) else torch.eye(len(total), dtype=torch.float64)


def _readers(node: Node) -> Iterator[Node]:
    return (u for u in node.users if u.target is aten.linear.default and u.args[0] is node)


def best_scale(rows: Tensor, gram: Tensor, limit: int) -> float:
    """Scale of a symmetric activation.

    Args:
        rows: Sample values ``[rows, C]``.
        gram: Weights of the errors, ``[C, C]``.
        limit: Largest integer.

    Returns:
        Positive; 1 if all values are 0.
    """
    x, weights = rows.float(), gram.float()
    top = float(x.abs().max()) / limit
    if top == 0:
        return 1.0
    best, least = top, float("inf")
    for power in range(_CLIPPINGS):
        scale = top * _SHRINK**power
        error = nearest(x / scale).clamp(-limit, limit).mul_(scale).sub_(x)
        loss = float(((error @ weights) * error).sum(dtype=torch.float64))
        if loss < least:
            best, least = scale, loss
    return best


def as_activation(work: Work, value: Value, node: Node) -> Value:
    """A value as the input of linear layers.

    Args:
        work: The program.
        value: Activations and counts of spikes are given back; everything else is requantized.
        node: The node of the floating-point program whose value it is.
    """
    options = work.at(node)
    limit = options.activation_limit
    if value.kind == "activation" and value.bound <= limit:
        return value
    if "activation" not in value.made:
        rows = rows_of(value, sample_rows(value.data[0].shape[-1]))
        scale = best_scale(rows, gram_behind(work, node, rows), limit)
        name = f"{node.name}_activation" if value.node.name == node.name or value.kind == "stream" else node.name
        made = work.requantize(node, value, scale, -limit, limit, name, "activation")
        work.notes[name] = {
            "bits": options.activation_bits, "scale": scale,
            "relative_squared_error": relative_error(rows_of(made), rows_of(value)),
        }  # fmt: skip
        value.made["activation"] = made
    return value.made["activation"]
