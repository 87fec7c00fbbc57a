r"""Multi-threshold neuron: at most one event per time step, of either sign and one of N sizes.

Per neuron and time step t = 1..T, with base threshold theta and v(0) = 0 (ECMT, arXiv 2502.21193):

    u(t) = v(t-1) + x(t)
    e(t) = sign(u) 2^i,   i the largest of 0..N-1 with |u| >= (2^i - 1/2) theta;   0 if there is none
    v(t) = u(t) - theta e(t)

so that ``theta sum_t e(t) = sum_t x(t) - v(T)`` whatever x, and the mean over the steps is off by ``v(T) / T``. Of a constant input the sum
has a closed form (``sum_oracle``), with g the largest size that is not above it, or 1:

    g = 2^i,   i = floor(log2(|x| / theta)) within 0..N-1
    sum_t e(t) = sign(x) min(g floor((T |x| / theta + 1/2) / g), 2^(N-1) T)

Why: as long as nothing is clipped, ``-theta/2 <= v(t) < (g - 1/2) theta`` for x > 0, and all events are multiples of g, or it is 1. So the
mean is short by less than ``g theta / T``, the T-th part of the value: below theta values are rounded to a T-th of theta, and above it they
are rounded down, to T equal parts of each power of two. An event carries its
size, one of N: a line of its own to copies of the weights scaled by ``2^i`` (the paper's parallel normalization), or a shift at the
receiver; the train has graded spikes and the code ``rate``, in units of theta. The paper has a threshold of its own for either sign; here
they are one, so that theta is a factor of the weights behind. N is at most 7: sizes up to 64 are whole numbers of 8 bits, as trains are
recorded.

The gradient is straight through: ``de(t)/dx(t) = 1 / theta`` for ``|u| < (2^N - 1/2) theta``, the neuron's own range, and 0 beyond it;
what the membrane keeps goes on to the next step. Thresholds have the gradient of ``x / theta``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops.if_neuron import check_threshold, check_threshold_value
from ntc.ops.spec import Counts, Operand, OpSpec, TypeMismatch, register
from ntc.ops.traffic import fired
from ntc.spike_type import Analog, CurrentType, NodeType, SpikeType

__all__ = ["MOST_LEVELS", "MT_NEURON", "membrane", "mt_neuron", "sum_oracle"]

MOST_LEVELS = 7
"""Sizes of events: the largest is 64 thresholds, which 8 bits hold with a sign."""


def _check(current: Tensor, threshold: Tensor, levels: int) -> None:
    check_threshold(threshold, current.shape[-1])
    if not 1 <= levels <= MOST_LEVELS:
        raise ValueError(f"a multi-threshold neuron has 1 to {MOST_LEVELS} levels, got {levels}")


def _event(u: Tensor, threshold: Tensor, levels: int) -> Tensor:
    """``sign(u) 2^i``, without a logarithm: each threshold that is reached doubles the event."""
    size = torch.zeros_like(u)
    for i in range(levels):
        size = torch.where(u.abs() >= (2.0**i - 0.5) * threshold, 2.0**i, size)
    return size * u.sign()


@torch.library.custom_op("ntc::mt_neuron", mutates_args=())
def mt_neuron(current: Tensor, threshold: Tensor, steps: int, levels: int, timed: bool) -> Tensor:
    """Run multi-threshold neurons (see the module's docstring).

    Args:
        current: ``[B, L, C]`` (constant over the steps) or ``[T, B, L, C]`` if ``timed``.
        threshold: theta > 0, ``[C]`` or ``[1]``, in units of the current.
        steps: T.
        levels: N, number of sizes; 1 to 7.
        timed: Whether axis 0 of ``current`` is the time step.

    Returns:
        Events ``[T, B, L, C]``, 0 or +-2^i, in the dtype of the current.

    Raises:
        ValueError: If the threshold has another shape, or for another number of levels.
    """
    _check(current, threshold, levels)
    v = torch.zeros_like(current[0] if timed else current)
    events = current.new_empty((steps, *v.shape))
    for t in range(steps):
        u = v + (current[t] if timed else current)
        events[t] = _event(u, threshold, levels)
        v = u - events[t] * threshold
    return events


@mt_neuron.register_fake
def _fake(current: Tensor, threshold: Tensor, steps: int, levels: int, timed: bool) -> Tensor:
    _check(current, threshold, levels)
    return current.new_empty((steps, *(current.shape[1:] if timed else current.shape)))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    current, threshold, ctx.steps, ctx.levels, ctx.timed = inputs
    ctx.save_for_backward(current, threshold, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """``dL/du = G + (g - theta G) h`` with ``h = de/du``, G what the next step's membrane is worth; ``de/dtheta = -h u / theta``."""
    current, threshold, events = ctx.saved_tensors
    potentials, v = [], torch.zeros_like(events[0])
    for t in range(ctx.steps):
        potentials.append(v + (current[t] if ctx.timed else current))
        v = potentials[t] - events[t] * threshold
    carried, to_threshold = torch.zeros_like(v), torch.zeros_like(v)
    to_current: list[Tensor] = []
    for t in reversed(range(ctx.steps)):
        u = potentials[t]
        slope = (u.abs() < (2.0**ctx.levels - 0.5) * threshold).to(u.dtype) / threshold
        to_event = grad[t] - threshold * carried
        to_threshold = to_threshold - to_event * slope * u / threshold - carried * events[t]
        carried = carried + to_event * slope
        to_current.append(carried)
    by_step = torch.stack(to_current[::-1])
    return (by_step if ctx.timed else by_step.sum(0)), to_threshold.sum_to_size(threshold.shape), None, None, None


mt_neuron.register_autograd(_backward, setup_context=_setup)


def membrane(arguments: Sequence[Any], spikes: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    """The membrane u(t) of a neuron that has fired ``spikes``, and its thresholds of either sign: for ``OpSpec.membrane``."""
    current, threshold, _, levels, timed = arguments[:5]
    v, potentials = torch.zeros_like(spikes[0]), []
    for t, e in enumerate(spikes):
        u = v + (current[t] if timed else current)
        potentials.append(u)
        v = u - e * threshold
    up = [(2.0**i - 0.5) * threshold for i in reversed(range(levels))]
    return torch.stack(potentials), (*up, *(-level for level in reversed(up)))


def sum_oracle(current: Tensor, threshold: Tensor, steps: int, levels: int) -> Tensor:
    """``sum_t e(t)`` of a constant input in closed form (see the module's docstring).

    Args:
        current: ``[..., C]``.
        threshold: theta > 0, ``[C]`` or ``[1]``.
        steps: T.
        levels: N.

    Returns:
        Same shape as the current, float64, in units of theta.
    """
    size = current.double().abs() / threshold.double()
    g = torch.exp2((torch.frexp(size).exponent - 1).clamp(0, levels - 1).double())
    told = g * torch.floor((steps * size + 0.5) / g)
    return current.double().sign() * told.clamp(max=2.0 ** (levels - 1) * steps)


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    current, _, steps, _, is_timed = node.args
    assert isinstance(current, Node) and isinstance(steps, int)
    given = type_of(current)
    if is_timed and given != CurrentType(steps, "rate"):
        raise TypeMismatch(f"neurons with T={steps} take a rate-coded current of as many steps, and %{current.name} is {given}", current)
    if not is_timed and not isinstance(given, Analog):
        raise TypeMismatch(f"neurons with a constant input take an analog current, and %{current.name} is {given}", current)
    check_threshold_value(node)
    return SpikeType(steps, "rate", "graded")


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    """An update per step; each of the other thresholds is one comparison more, a subtraction."""
    levels = node.args[3]
    assert isinstance(levels, int)
    return Counts(
        neuron_updates=result.numel, acs=(levels - 1) * result.numel, spikes=result.nonzero, neurons=result.numel / result.shape[0]
    )


def _onnx(is_timed: bool) -> str:
    ticks = "first = Constant <value_int = 0> ()  one = Constant <value_int = 1> ()  ticks = Range(first, trips, one)"
    return f"""
    <domain: "ntc", overload: "{"timed" if is_timed else ""}", opset_import: ["": 20]>
    MultiThreshold <steps, levels, timed, comparison, reset> (current, threshold) => (events)
    {{
        trips = Constant <value_int: int = @steps> ()
        sizes = Constant <value_int: int = @levels> ()
        zero_tick = Constant <value_int = 0> ()
        one_tick = Constant <value_int = 1> ()
        levels_up = Range(zero_tick, sizes, one_tick)
        exponents = CastLike(levels_up, threshold)
        two_value = Constant <value_float = 2.0> ()
        two = CastLike(two_value, threshold)
        half_value = Constant <value_float = 0.5> ()
        half = CastLike(half_value, threshold)
        powers = Pow(two, exponents)
        lowered = Sub(powers, half)
        zero_value = Constant <value_float = 0.0> ()
        zero = CastLike(zero_value, threshold)
        shape = Shape <start = {int(is_timed)}> (current)
        resting = Expand(zero, shape)
        {"" if is_timed else ticks}
        membrane, events = Scan <num_scan_inputs = 1, body = step (v, x) => (v_next, e) {{
            u = Add(v, {"x" if is_timed else "current"})
            magnitude = Abs(u)
            size = Scan <num_scan_inputs = 2, body = level (before, power, low) => (chosen) {{
                at = Mul(low, threshold)
                reached = GreaterOrEqual(magnitude, at)
                chosen = Where(reached, power, before)
            }}> (resting, powers, lowered)
            sign = Sign(u)
            e = Mul(size, sign)
            drop = Mul(e, threshold)
            v_next = Sub(u, drop)
        }}> (resting, {"current" if is_timed else "ticks"})
    }}
    """


MT_NEURON = register(
    OpSpec(
        target=torch.ops.ntc.mt_neuron.default, infer=_infer, count=_count, moves=fired, element="population", kind="neurons",
        membrane=membrane, onnx=_onnx(False) + _onnx(True),
    )
)  # fmt: skip
