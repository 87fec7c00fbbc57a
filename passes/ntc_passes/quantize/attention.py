r"""Spiking attention: tables that stand for the leak, and what the counts stand for at each position.

With a leak lambda the memory is renewed once in R tokens, and in between keys are written with the weight ``g lambda^-r`` at position r
of the period (docs/integers.md). R is chosen per layer, g per key head, in one of two ways:

- **Short**: counts, summed over T steps, stay below ``2^24`` whatever the spikes, and so do twice the products of a renewal, which has few
  bits: kappa = n / 2^s. The tables are those of the leak ``kappa^(1/R)``, which differs from lambda by less than the rounding of
  the weights does. What computes in float32 is exact then, and a chip needs memories of 24 bits less those of T D rows: 16 for T D = 256.
  R is the longest period up to ``_PERIOD`` in which neither the weakest weight (by ``1 / (2 g)``) nor the horizon
  ``1 / (1 - lambda)`` is wrong by more than ``_WRONG``.
- **Wide**, where no such period is: counts stay within 32 bits, the renewal has ``_RENEWAL_BITS`` binary places, and R is the longest
  period with which the weakest weight has still ``_FINE`` steps.

So the relative error of ``lambda^d`` is at most ``1 / (2 g)``, where keys are written; M is rounded to whole numbers when it is renewed.

Counts at position r stand for ``lambda^r / g`` times as much. That factor, one per 1/(i + 1) or of a learned table (which is a period as
long as the context), and a constant gain behind it all go into the multiplier of the ``requantize`` that reads them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from ntc.errors import PassError
from ntc.meta import SCALE, module_of, where
from ntc_passes.quantize.fixed_point import nearest
from ntc_passes.quantize.walk import Constant, Value, Work

__all__ = ["Leak", "attention", "leak_in_integers", "position_scale"]

_PERIOD = 32
_FINE = 1 << 8
_FINEST = 1 << 12
_MOST = 1 << 31
_RENEWAL_BITS = 30
"""Binary places: what is lost is less than the rounding of M, which has at most 30 bits."""

_SHORT = 1 << 24
_SHORTEST = 8
"""Tokens: with fewer, renewals are most of the work, and the wide form is the better one."""

_WRONG = 1 / 128


@dataclass(frozen=True)
class Leak:
    """A leak in integers.

    Attributes:
        growth: Weights ``g lambda^-r``, ``[Hk, R]``, int32.
        renewal: What a renewal leaves, times ``2^shift``, ``[Hk]``, int32.
        shift: Binary places of the renewal.
        leak: The lambda of these tables, ``[Hk]``.
        gain: g, ``[Hk]``.
    """

    growth: Tensor
    renewal: Tensor
    shift: int
    leak: Tensor
    gain: Tensor

    @property
    def period(self) -> int:
        """R."""
        return self.growth.shape[1]

    @property
    def factors(self) -> Tensor:
        """What one of a count stands for at each position of the period: ``lambda^r / g``, ``[R, Hk]``."""
        return self.leak ** torch.arange(self.period, dtype=torch.float64)[:, None] / self.gain

    @property
    def error(self) -> float:
        """Largest relative error of a written weight."""
        exact = _powers(self.leak, self.period) * self.gain[:, None]
        return float(((self.growth.double() - exact) / exact).abs().max())


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
        made = leak_in_integers(leak, context, key_size, trains[0].steps, where(node))
        growth, renewal, shift = made.growth, made.renewal, made.shift
        work.notes[node.name] = {"period": made.period, "gain": int(made.gain.min()), "leak_error": made.error}
        factors = made.factors.repeat_interleave(heads // kv_heads, dim=1)
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


def leak_in_integers(leak: Tensor, context: int, key_size: int, steps: int, place: str) -> Leak:
    """Tables of a layer: the short form, or the wide one where that is none (see the module's docstring).

    Args:
        leak: lambda of each key head, in (0, 1].
        context: Most tokens of a sequence, 0 if not limited.
        key_size: D.
        steps: T.
        place: Where, for the error.

    Raises:
        PassError: If a leak of 1 meets an unlimited context, or no period does.
    """
    period = _PERIOD
    while period >= _SHORTEST:
        options = [made for shift in range(1, 23) if (made := _short(leak, context, key_size * steps, period, shift)) is not None]
        if options:
            error, best = min(options, key=lambda option: option[0])
            if error <= _WRONG:
                return best
        period //= 2
    return _wide(leak, context, key_size, steps, place)


def _short(leak: Tensor, context: int, rows: int, period: int, shift: int) -> tuple[float, Leak] | None:
    """Tables whose counts of so many rows are below 2^24 with renewals of ``shift`` places, and what is wrong with them, relatively.

    After a renewal an entry of M is at most ``kappa`` times what it was before, and 1/2 more; the weights of a period add up to at most
    ``g sum_r lambda^-r + R / 2``. So it never exceeds ``(g sum_r lambda^-r + (R + 1) / 2) (1 + kappa + kappa^2 + ...)``, with as many
    terms as a context has periods.
    """
    renewal = nearest(leak**period * 2.0**shift).clamp(1, 2.0**shift)
    kept = renewal / 2.0**shift
    made = kept ** (1 / period)
    if bool((kept == 1).any()) and not context:
        return None
    terms = torch.where(kept < 1, (1 - kept ** math.ceil(context / period) if context else 1.0) / (1 - kept).clamp(min=1e-12), 0.0)
    terms = torch.where(kept < 1, terms, math.ceil(context / period))
    most = torch.minimum(torch.tensor((_SHORT - 1) / rows, dtype=torch.float64), (_SHORT / 2 - 1) / renewal)
    gain = ((most - (period + 1) / 2 * terms) / (_powers(made, period).sum(1) * terms) * (1 - 1e-9)).floor().clamp(max=_FINEST)
    if bool((gain < 1).any()):
        return None
    moved = (made - leak).abs() / (1 - leak).clamp(min=1 / context if context else 1e-12)
    growth = nearest(gain[:, None] * _powers(made, period)).to(torch.int32)
    return float(torch.maximum(0.5 / gain, moved).max()), Leak(growth, renewal.to(torch.int32), shift, made, gain)


def _powers(leak: Tensor, period: int) -> Tensor:
    """``lambda^-r``, ``[Hk, R]``."""
    powers: Tensor = leak[:, None] ** -torch.arange(period, dtype=torch.float64)
    return powers


def _wide(leak: Tensor, context: int, key_size: int, steps: int, place: str) -> Leak:
    """Tables whose counts fit into 32 bits.

    The largest entry of M, at the last position of a period, is ``g lambda^-(R-1) min(1 / (1 - lambda), context)``, and a sum over
    ``key_size`` rows of M is that many times as much; a decode adds up T of them.
    """
    remembered = torch.where(leak < 1, 1 / (1 - leak).clamp(min=1e-12), math.inf)
    if context:
        remembered = remembered.clamp(max=context)
    period = _PERIOD
    while period >= 1:
        largest = float((leak ** -(period - 1) * remembered).max()) * key_size * steps
        room = _MOST / largest / 1.02  # rounding of the weights, and of M when it is renewed
        if room >= _FINE:
            gain = torch.full_like(leak, 1 << min(int(math.log2(room)), int(math.log2(_FINEST))))
            growth = nearest(gain[:, None] * _powers(leak, period)).to(torch.int32)
            return Leak(growth, nearest(leak**period * (1 << _RENEWAL_BITS)).to(torch.int32), _RENEWAL_BITS, leak, gain)
        period //= 2
    raise PassError(
        f"the memory of {place} does not fit into 32 bits with {context or 'unlimited'} tokens of context and {key_size} rows per head: "
        "choose a leak below 1, or a shorter context"
    )


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
