r"""Digit neurons: an analog value as ternary digits, in a number system of any base up to 3.

With a step d > 0 [units of x], T time steps, weights w(t) and thresholds theta(t), both in steps:

    v(0) = x / d;   s(t) = sign(v(t)) 1[|v(t)| >= theta(t)];   v(t+1) = v(t) - w(t) s(t);   x ~ d sum_t w(t) s(t)

The membrane takes the value once and gives away a weight with each spike, of either sign (soft reset); what is left is the error.
``digit_weights`` and ``digit_thresholds`` make the tables:

    w(t) = b^(T-1-t),   1 < b <= 3                                                N = sum_t w(t), the largest number
    reach(t) = sum_{u>t} w(u) + 1/2                                               what the steps after t can still code
    theta(t) = max(min(k w(t), reach(t)), w(t)/2 + lambda / (2 w(t))),   k = b / (b + 1)

Base 3 is balanced ternary (Knuth, The Art of Computer Programming 2, 4.1): every whole number of ``-N ... N`` has exactly one form, so T
steps tell ``3^T`` values, the most that ternary spikes can, where binary planes with a sign tell ``2^(T+1) - 1``. Base 2 is the
non-adjacent form (Reitwiesner 1960): numbers have several forms, this one has the fewest spikes, a third of the digits. With
lambda = 0 and bases 2 and 3, ``|x - d n| <= d / 2`` for ``|x| <= N d``; between them the numbers that can be told are not evenly spaced.

lambda > 0 is the price of a spike, in squared steps: a spike of weight w takes ``v^2 - (v - w)^2`` off the squared error, and is fired
where that is more than lambda. Small values fall silent then (the clipping of membrane potentials of SDLLM, arXiv 2604.16475, is the same
for the last digit), and half a step is no bound any more.

The step is one number ``[1]``, one per channel ``[C]``, or made while the network runs (``ntc::token_step``): ``[B, L, G]`` for G groups of
neighbouring channels, as heads are. A neuron with two bounds only hears what lies between them, ``low <= |x| < high``; two such
neurons side by side code normal values and outliers each in steps of their own (outlier-aware neurons: LAS, arXiv 2505.09659).

Gradients are straight through: ``d sum_t w s`` has slope 1 in x for ``|x| <= (N + 1/2) d`` and 0 outside; every step takes the share of its
weight. The step has the one of LSQ (Esser et al. 2020): ``n - x / d`` inside, ``+-N`` outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops.if_neuron import check_constant
from ntc.ops.spec import Counts, Operand, OpSpec, TypeMismatch, register
from ntc.ops.traffic import fired
from ntc.spike_type import Analog, NodeType, SpikeType

__all__ = [
    "DIGIT_NEURON", "LARGEST_BASE", "MOST_DIGITS", "check_base", "digit_neuron", "digit_thresholds", "digit_weights", "membrane",
    "most_digits", "spread",
]  # fmt: skip

LARGEST_BASE = 3.0
"""With larger bases there are numbers that no digits of -1, 0 and 1 come near to."""

MOST_DIGITS = 24
"""Time steps: all numbers that they tell differ in float32, in any base up to 2; larger ones have fewer (``most_digits``)."""


def most_digits(base: float) -> int:
    """Most time steps of a base: ``b^T <= 2^24``."""
    return min(MOST_DIGITS, int(24 * math.log(2) / math.log(base)))


def check_base(base: float, steps: int) -> None:
    """Refuse what is no number system of ternary digits, or has more digits than float32.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(base, bool) or not isinstance(base, int | float) or not 1.0 < base <= LARGEST_BASE:
        raise ValueError(f"a base of ternary digits is larger than 1 and at most {LARGEST_BASE:g}, got {base!r}")
    most = most_digits(base)
    if not 1 <= steps <= most:
        raise ValueError(f"digits of base {base:g} have 1 to {most} time steps, got {steps}")


def digit_weights(base: float, steps: int) -> list[float]:
    """w(t) = b^(T-1-t), in steps: the last one is 1.

    Raises:
        ValueError: For bases outside (1, 3], or too many or too few steps.
    """
    check_base(base, steps)
    return [float(base) ** (steps - 1 - t) for t in range(steps)]


def digit_thresholds(weights: Sequence[float], price: float = 0.0) -> list[float]:
    """theta(t), in steps, for weights that fall by one base.

    Args:
        weights: w(t), the last one 1.
        price: lambda >= 0, squared steps that a spike must be worth.
    """
    base = weights[0] / weights[1] if len(weights) > 1 else 3.0
    share, levels = base / (base + 1), list[float]()
    for t, w in enumerate(weights):
        reach = sum(weights[t + 1 :]) + 0.5
        levels.append(max(min(share * w, reach), w / 2 + price / (2 * w)))
    return levels


def spread(step: Tensor, x: Tensor) -> Tensor:
    """A step as it meets the channels of x: ``[1]`` and ``[C]`` as they are, ``[..., G]`` once for each channel of its group."""
    if step.dim() < 2 or step.shape[-1] in (1, x.shape[-1]):
        return step
    return step.repeat_interleave(x.shape[-1] // step.shape[-1], -1)


def _check(x: Tensor, step: Tensor, weights: Tensor, thresholds: Tensor) -> None:
    known = step.dim() == 1 and step.shape[0] in (1, x.shape[-1])
    grouped = step.dim() == x.dim() and x.dim() > 1 and all(a == b for a, b in zip(step.shape[:-1], x.shape[:-1], strict=True))
    if not known and not (grouped and x.shape[-1] % step.shape[-1] == 0):
        raise ValueError(
            f"a step has shape [1], [{x.shape[-1]}] or {[*x.shape[:-1], 'G']} with G groups of the {x.shape[-1]} channels, "
            f"and not {list(step.shape)}"
        )
    if weights.dim() != 1 or weights.shape != thresholds.shape:
        raise ValueError(
            f"weights and thresholds have shape [T], one number per time step, and not {list(weights.shape)} and {list(thresholds.shape)}"
        )


def _heard(x: Tensor, low: float, high: float) -> Tensor:
    """The value where it lies between the bounds, else 0."""
    if low <= 0 and high <= 0:
        return x
    return torch.where(_between(x.abs(), low, high), x, torch.zeros((), dtype=x.dtype, device=x.device))


def _between(size: Tensor, low: float, high: float) -> Tensor:
    return (size >= low) & (size < high) if high > 0 else size >= low


@torch.library.custom_op("ntc::digit_neuron", mutates_args=())
def digit_neuron(
    x: Tensor, step: Tensor, weights: Tensor, thresholds: Tensor, per_token: bool = False, low: float = 0.0, high: float = 0.0
) -> Tensor:
    """Ternary digits of a value (see the module's docstring).

    Args:
        x: Value, ``[..., C]``.
        step: d > 0, in the units of x: ``[1]``, ``[C]`` or ``[..., G]``.
        weights: w, ``[T]``, in steps.
        thresholds: theta > 0, ``[T]``, in steps.
        per_token: Whether the step is made while the network runs, ``[..., G]``; it says nothing that shapes do not, except to exports.
        low: Least size that is heard, in the units of x.
        high: Size from which on nothing is heard; 0 = there is none.

    Returns:
        Spikes ``[T, ..., C]`` in {-1, 0, 1}, in the dtype of x.

    Raises:
        ValueError: If the step or a table has another shape.
    """
    _check(x, step, weights, thresholds)
    v = _heard(x, low, high) / spread(step, x)
    spikes = x.new_empty((weights.shape[0], *x.shape))
    for t, (w, theta) in enumerate(zip(weights.tolist(), thresholds.to(x.dtype), strict=True)):
        below = float(torch.nextafter(theta, torch.zeros_like(theta)))  # |v| > below is |v| >= theta, in one pass over v
        torch.sign(torch.nn.functional.hardshrink(v, below), out=spikes[t])
        v.sub_(spikes[t], alpha=w)
    return spikes


@digit_neuron.register_fake
def _fake(
    x: Tensor, step: Tensor, weights: Tensor, thresholds: Tensor, per_token: bool = False, low: float = 0.0, high: float = 0.0
) -> Tensor:
    _check(x, step, weights, thresholds)
    return x.new_empty((weights.shape[0], *x.shape))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, step, weights, _, _, ctx.low, ctx.high = inputs
    ctx.save_for_backward(x, step, weights)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """``ds(t)/dn = w(t) / sum w^2``; then n as a function of x and d."""
    x, step, weights = ctx.saved_tensors
    d, w = spread(step, x), weights.to(grad.dtype)
    to_n = torch.tensordot(w / (w * w).sum(), grad, dims=1)
    heard = _between(x.abs(), ctx.low, ctx.high)
    inside = ((x.abs() <= (w.sum() + 0.5) * d) & heard).to(grad.dtype)
    to_x = to_n * inside / d
    to_d = -to_x * x / d
    if step.dim() > 1 and step.shape[-1] not in (1, x.shape[-1]):
        to_d = to_d.reshape(*step.shape, -1).sum(-1)
    return to_x, to_d.sum_to_size(step.shape), None, None, None, None, None


digit_neuron.register_autograd(_backward, setup_context=_setup)


def membrane(arguments: Sequence[Any], spikes: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    """``v(t) / theta(t)`` of a neuron that has fired ``spikes``, and where it fires: at 1, and below -1 the other way.

    A value at a bound is another neuron's after the slightest change, and that fires another train altogether. So where spikes would be
    explained by hearing the value or by not hearing it, the membrane counts as no farther from where it fires than the value is from the
    nearest bound.
    """
    x, step, weights, thresholds = arguments[:4]
    low, high = [*arguments[5:7], 0.0, 0.0][:2] if len(arguments) > 5 else (0.0, 0.0)
    column = [-1, *[1] * x.dim()]
    w, theta = weights.to(x.dtype).reshape(column), thresholds.to(x.dtype).reshape(column)
    given = (w * spikes).cumsum(0) - w * spikes
    one = torch.ones(1, dtype=x.dtype, device=x.device)
    u = (x / spread(step, x) - given) / theta
    if low > 0 or high > 0:
        heard, fired = _between(x.abs(), low, high), spikes.any(0)
        away = torch.stack([(x.abs() - bound).abs() for bound in (low, high) if bound > 0]).amin(0) / spread(step, x) / theta
        silent = torch.where(x < 0, -one, one) * torch.where(heard, u.abs().minimum(1 + away), (1 - away).clamp(min=0))
        u = torch.where(fired, torch.where(heard | (spikes == 0), u, spikes.sign() * (1 - away)), silent)
    return u, (one, -one)


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    x, step, weights, thresholds = node.args[:4]
    for what, argument in (("a value", x), ("a step", step), ("weights", weights), ("thresholds", thresholds)):
        assert isinstance(argument, Node)
        if not isinstance(type_of(argument), Analog):
            raise TypeMismatch(f"a digit neuron takes {what} that is analog, and %{argument.name} is {type_of(argument)}", argument)
    assert isinstance(step, Node) and isinstance(weights, Node) and isinstance(thresholds, Node)
    check_constant(node, step, lambda d: d > 0, "a digit neuron needs steps > 0")
    check_constant(node, thresholds, lambda level: level > 0, "a digit neuron needs thresholds > 0")
    return SpikeType(int(weights.meta["val"].shape[0]), "fitted", "ternary")


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    """Each time step compares and subtracts once per neuron."""
    return Counts(neuron_updates=result.numel, spikes=result.nonzero, neurons=result.numel / result.shape[0])


_SCAN = """
    silent = CastLike(nothing, v0)
    left, spikes = Scan <num_scan_inputs = 2, body = step (v, w, theta) => (v_next, s) {
        size = Abs(v)
        fires = GreaterOrEqual(size, theta)
        sign = Sign(v)
        s = Where(fires, sign, silent)
        fall = Mul(s, w)
        v_next = Sub(v, fall)
    }> (v0, weights, thresholds)
"""
ONNX_DIGITS = f"""
    nothing = Constant <value_float = 0.0> ()
    {_SCAN}
"""
"""From the membrane ``v0`` to ``spikes``, in the text of ONNX functions."""

ONNX_GROUPS = """
    groups = Shape <start = -1> (step)
    lead = Shape <end = -1> (step)
    any = Constant <value_ints = [-1]> ()
    split = Concat <axis = 0> (lead, groups, any)
    step_column = Unsqueeze(step, any)
"""
"""What takes a value ``[..., C]`` apart into G groups and brings a step to them."""


def _onnx(per_token: bool) -> str:
    divided = "grouped = Reshape(heard, split)  parts = Div(grouped, step_column)  whole = Shape(x)  v0 = Reshape(parts, whole)"
    return f"""
    <domain: "ntc", overload: "{"per_token" if per_token else ""}", opset_import: ["": 20]>
    DigitNeuron <per_token, low, high> (x, step, weights, thresholds) => (spikes)
    {{
        deaf_value = Constant <value_float = 0.0> ()
        deaf = CastLike(deaf_value, x)
        size_of_x = Abs(x)
        low_value = Constant <value_float: float = @low> ()
        lowest = CastLike(low_value, x)
        high_value = Constant <value_float: float = @high> ()
        given = CastLike(high_value, x)
        huge_value = Constant <value_float = 3.4e38> ()
        huge = CastLike(huge_value, x)
        bounded = Greater(given, deaf)
        highest = Where(bounded, given, huge)
        above = GreaterOrEqual(size_of_x, lowest)
        below = Less(size_of_x, highest)
        between = And(above, below)
        heard = Where(between, x, deaf)
        {ONNX_GROUPS + divided if per_token else "v0 = Div(heard, step)"}
        {ONNX_DIGITS}
    }}
    """


DIGIT_NEURON = register(
    OpSpec(
        target=torch.ops.ntc.digit_neuron.default, infer=_infer, count=_count, moves=fired, element="population", kind="neurons",
        membrane=membrane, onnx=_onnx(False) + _onnx(True),
    )
)  # fmt: skip
