r"""Integrate-and-fire neuron with soft reset on integers: the membrane, the threshold and the current are whole numbers.

Per neuron and time step t = 1..T, with threshold theta and initial membrane potential ``v(0) = start``:

    u(t) = v(t-1) + x(t)
    s(t) = [u(t) >= theta]                    binary
    s(t) = [u(t) >= theta] - [u(t) < 0]       signed (ternary)
    v(t) = u(t) - theta s(t)

The dynamics are those of ``ntc::integrate_fire``; the scale of the weights in front is absorbed by the thresholds, one integer for each
channel, and no current is ever rescaled. For a constant current and ``0 <= start <= theta`` the number of spikes is

    sum_t s(t) = clip(floor((start + T x) / theta), 0, T)      binary
    sum_t s(t) = clip(floor((start + T x) / theta), -T, T)     signed
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops.if_neuron import check_constant, check_per_channel
from ntc.ops.integer import check_integers, constant_of, integer_argument, integer_constants, largest
from ntc.ops.interval import Bound, Inside, Integers, Interval, integers
from ntc.ops.spec import Counts, Operand, OpSpec, TypeMismatch, register
from ntc.ops.traffic import fired
from ntc.spike_type import CurrentType, NodeType, SpikeType

__all__ = ["INTEGER_FIRE", "integer_fire", "spike_count"]


def _check(current: Tensor, threshold: Tensor, start: Tensor, steps: int, timed: bool) -> None:
    check_integers(current=current, threshold=threshold, start=start)
    check_per_channel("a threshold", threshold, current.shape[-1])
    check_per_channel("a start", start, current.shape[-1])
    if steps < 1 or (timed and current.shape[0] != steps):
        raise ValueError(f"neurons with T={steps} take at least one step and a timed current of as many, and not {list(current.shape)}")


@torch.library.custom_op("ntc::integer_fire", mutates_args=())
def integer_fire(current: Tensor, threshold: Tensor, start: Tensor, steps: int, signed: bool, timed: bool) -> Tensor:
    """Run integer IF neurons for T steps (see the module's docstring for the dynamics).

    Args:
        current: Integers ``[B, L, C]`` (constant over the steps) or ``[T, B, L, C]`` if ``timed``.
        threshold: theta > 0, integers ``[C]`` or ``[1]``.
        start: Initial membrane potential in [0, theta], integers ``[C]`` or ``[1]``.
        steps: T.
        signed: Ternary spikes.
        timed: Whether axis 0 of ``current`` is the time step.

    Returns:
        Spikes ``[T, B, L, C]``, int8.

    Raises:
        ValueError: For shapes, dtypes or steps that do not fit.
    """
    _check(current, threshold, start, steps, timed)
    # Programs have membranes that int32 holds (ntc.widths proves it); a kernel alone must not wrap around.
    most = steps * largest(current) + largest(start) + 2 * largest(threshold)
    dtype = torch.int32 if most < 1 << 31 else torch.int64
    x, theta = current.to(dtype), threshold.to(dtype)
    v = torch.zeros_like(x[0] if timed else x) + start.to(dtype)
    spikes = torch.empty((steps, *v.shape), dtype=torch.int8, device=current.device)
    for t in range(steps):
        v += x[t] if timed else x
        s = torch.ge(v, theta).to(torch.int8)
        if signed:
            s -= torch.lt(v, 0).to(torch.int8)
        v -= theta * s
        spikes[t] = s
    return spikes


@integer_fire.register_fake
def _fake(current: Tensor, threshold: Tensor, start: Tensor, steps: int, signed: bool, timed: bool) -> Tensor:
    _check(current, threshold, start, steps, timed)
    return current.new_empty((steps, *(current.shape[1:] if timed else current.shape)), dtype=torch.int8)


def spike_count(current: Tensor, threshold: Tensor, start: Tensor, steps: int, signed: bool) -> Tensor:
    """Number of spikes for a constant current, in closed form: int64, the shape of the current."""
    reached = torch.div(start.to(torch.int64) + steps * current.to(torch.int64), threshold.to(torch.int64), rounding_mode="floor")
    return reached.clamp(-steps if signed else 0, steps)


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    current, steps, signed, is_timed = node.args[0], node.args[3], node.args[4], node.args[5]
    assert isinstance(current, Node) and isinstance(steps, int)
    given = integer_argument(node, type_of, currents=bool(is_timed))
    if is_timed and given != CurrentType(steps, "count"):
        raise TypeMismatch(f"timed neurons with T={steps} take a current of as many steps, and %{current.name} is {given}", current)
    integer_constants(node, 1, 2)
    check_constant(node, node.args[1], lambda x: x > 0, "a neuron needs thresholds > 0")
    threshold = constant_of(node, 1)
    most = float("inf") if threshold is None else threshold
    check_constant(node, node.args[2], lambda x: (x >= 0) & (x <= most), "a neuron starts between 0 and its threshold")
    return SpikeType(steps, "count", "ternary" if signed else "binary")


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    return Counts(neuron_updates=result.numel, spikes=result.nonzero, neurons=result.numel / result.shape[0])


def _bound(node: Node, context: int, current: Interval, threshold: Tensor, start: Tensor, steps: int, signed: bool, timed: bool) -> Bound:
    """Step by step: what a membrane in an interval can be before it fires, and after."""
    channels = len(current.low)
    theta = np.broadcast_to(integers(threshold), (channels,))
    v = Interval(integers(start), integers(start)).wide(channels)
    reached = v
    for _ in range(steps):
        u = v + current
        before, v, reached = v, _after(u, theta, signed), reached | u
        if np.array_equal(v.low, before.low) and np.array_equal(v.high, before.high):
            break  # every further step is like this one
    fires, falls = reached.high >= theta, (reached.low < 0) & signed
    spikes = Interval(-falls.astype(int).astype(object), fires.astype(int).astype(object))
    return Bound(spikes, (Inside.over("membrane", reached, 32, "use fewer bits for weights or activations"),))


def _after(u: Interval, theta: Integers, signed: bool) -> Interval:
    """The membrane after the reset: the union of the pieces on which the neuron fires alike."""
    nothing = float("inf")
    pieces = [(0 if signed else -nothing, theta - 1, 0), (theta, nothing, -theta)] + ([(-nothing, -1, theta)] if signed else [])
    lows, highs = [], []
    for least, most, added in pieces:
        low, high = np.maximum(u.low, least), np.minimum(u.high, most)
        empty = low > high
        lows.append(np.where(empty, nothing, low + added))
        highs.append(np.where(empty, -nothing, high + added))
    return Interval(np.minimum.reduce(lows), np.maximum.reduce(highs))


INTEGER_FIRE = register(
    OpSpec(
        target=torch.ops.ntc.integer_fire.default, infer=_infer, count=_count, moves=fired, element="population", kind="neurons",
        bound=_bound,
    )
)  # fmt: skip
