r"""Spiking attention: tables that stand for the leak, and what the counts stand for at each position.

With a leak lambda the memory is renewed once in R tokens, and in between keys are written with the weight ``g lambda^-r`` at position r
of the period (docs/integers.md). R and g are chosen per layer: the longest period up to ``_PERIOD`` with which the weakest weight g has
still ``_FINE`` steps, while the largest count, summed over T steps, stays within 32 bits whatever the spikes. So the relative error of
``lambda^d`` is at most ``1 / (2 g)``, where keys are written; M is rounded to whole numbers when it is renewed.

Counts at position r stand for ``lambda^r / g`` times as much. That factor, one per 1/(i + 1) or of a learned table (which is a period as
long as the context), and a constant gain behind it all go into the multiplier of the ``requantize`` that reads them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.fx import Node

from ntc.errors import PassError
from ntc.meta import SCALE, module_of, where
from ntc_passes.quantize.fixed_point import nearest
from ntc_passes.quantize.walk import Constant, Value, Work

__all__ = ["attention", "period_and_gain", "position_scale", "tables"]

_PERIOD = 32
_FINE = 1 << 8
_FINEST = 1 << 12
_MOST = 1 << 31
_RENEWAL_BITS = 30
"""Binary places: what is lost is less than the rounding of M, which has at most 30 bits."""


def attention(work: Work, node: Node) -> Value:
    """``integer_attention`` in place of ``spiking_attention``."""
    trains = [work[a] for a in node.args[:3]]
    heads, kv_heads = node.args[3:5]
    assert isinstance(heads, int) and isinstance(kv_heads, int)
    for train, argument in zip(trains, node.args[:3], strict=True):
        if train.kind != "train" or not bool((train.scale == 1).all()):
            raise PassError(f"spiking attention takes plain spikes in the integer grade, and %{argument} is none: {where(node)}")
    leak = _leak(work, node, kv_heads)
    context = work.program.info.context
    key_size = int(trains[1].data[0].shape[-1]) // kv_heads
    prefix = module_of(node) or node.name
    channels = int(trains[2].data[0].shape[-1]) // kv_heads * heads
    if leak is None:
        growth, renewal, shift = torch.ones(kv_heads, 1, dtype=torch.int32), None, 0
        factors = torch.ones(1, heads, dtype=torch.float64)
    else:
        period, gain = period_and_gain(leak, context, key_size, trains[0].steps, where(node))
        (growth, renewal), shift = tables(leak, period, gain), _RENEWAL_BITS
        work.notes[node.name] = {"period": period, "gain": gain, "leak_error": _leak_error(leak, growth, gain)}
        factors = leak.repeat_interleave(heads // kv_heads) ** torch.arange(period, dtype=torch.float64)[:, None] / gain
    result, data = work.emit(
        node, torch.ops.ntc.integer_attention.default, *trains, heads, kv_heads, Constant(f"{prefix}.ssa.growth", growth),
        None if renewal is None else Constant(f"{prefix}.ssa.renewal", renewal), shift,
    )  # fmt: skip
    result.meta[SCALE] = factors.tolist()
    scale = factors.repeat_interleave(channels // heads, dim=1)
    return Value(result, "product", scale, data, steps=trains[0].steps)


def _leak(work: Work, node: Node, kv_heads: int) -> Tensor | None:
    """The leak of each key head, or None."""
    given = node.args[5] if len(node.args) > 5 else node.kwargs.get("leak")
    if given is None:
        return None
    leak = work.constant(node, given, "a leak")
    if len(leak) not in (1, kv_heads):
        raise PassError(
            f"a leak for each key channel has no integer form, one per head has: {where(node)}; compile with normalizer = \"leak\""
        )
    return leak.expand(kv_heads)


def period_and_gain(leak: Tensor, context: int, key_size: int, steps: int, place: str) -> tuple[int, int]:
    """R and g of a layer.

    The largest entry of M, at the last position of a period, is ``g lambda^-(R-1) min(1 / (1 - lambda), context)``, and a sum over
    ``key_size`` rows of M is that many times as much; a decode adds up T of them.

    Args:
        leak: lambda of each head, in (0, 1].
        context: Most tokens of a sequence, 0 if not limited.
        key_size: D.
        steps: T.
        place: Where, for the error.

    Raises:
        PassError: If a leak of 1 meets an unlimited context, or no period does.
    """
    remembered = torch.where(leak < 1, 1 / (1 - leak).clamp(min=1e-12), math.inf)
    if context:
        remembered = remembered.clamp(max=context)
    period = _PERIOD
    while period >= 1:
        largest = float((leak ** -(period - 1) * remembered).max()) * key_size * steps
        room = _MOST / largest / 1.02  # rounding of the weights, and of M when it is renewed
        if room >= _FINE:
            return period, 1 << min(int(math.log2(room)), int(math.log2(_FINEST)))
        period //= 2
    raise PassError(
        f"the memory of {place} does not fit into 32 bits with {context or 'unlimited'} tokens of context and {key_size} rows per head: "
        "choose a leak below 1, or a shorter context"
    )


def tables(leak: Tensor, period: int, gain: int) -> tuple[Tensor, Tensor]:
    """``growth [Hk, R]`` and ``renewal [Hk]``, the latter with ``_RENEWAL_BITS`` binary places."""
    growth = nearest(gain * leak[:, None] ** -torch.arange(period, dtype=torch.float64))
    return growth.to(torch.int32), nearest(leak**period * (1 << _RENEWAL_BITS)).to(torch.int32)


def _leak_error(leak: Tensor, growth: Tensor, gain: int) -> float:
    """Largest relative error of a written weight."""
    exact = gain * leak[:, None] ** -torch.arange(growth.shape[1], dtype=torch.float64)
    return float(((growth.double() - exact) / exact).abs().max())


def position_scale(work: Work, node: Node) -> Value:
    """No op: the factor of each position goes into what the counts stand for."""
    source, table = node.args[0], node.args[1] if len(node.args) > 1 else None
    product, context = work[source], work.program.info.context
    if product.kind != "product":
        raise PassError(f"the integer grade scales by position behind spiking attention only, and not at {where(node)}")
    if not context:
        raise PassError(f"scaling by position needs a table as long as the context, and the model of {where(node)} has no limit")
    if table is None:
        factor = 1.0 / torch.arange(1, context + 1, dtype=torch.float64)[:, None]
    else:
        by_head = work.constant(node, table, "a position table")
        factor = by_head.T.repeat_interleave(product.scale.shape[1] // len(by_head), dim=1)
    period = torch.arange(len(factor)) % len(product.scale)
    return Value(product.node, "product", product.scale[period] * factor, product.data, steps=product.steps)
