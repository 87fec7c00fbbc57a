r"""Integrate-and-fire neuron with soft reset, binary or ternary.

Per neuron and time step t = 1..T, with threshold theta and initial membrane potential ``v(0) = v0 theta``, 0 <= v0 <= 1:

    u(t) = v(t-1) + x(t)
    s(t) = 1[u(t) >= theta]                        binary
    s(t) = 1[u(t) >= theta] - 1[u(t) < 0]          signed (ternary)
    v(t) = u(t) - theta s(t)

The comparison is ``>=``, the reset subtracts. For a constant current x the number of spikes has a closed form
(Bu et al. 2022, ICLR, QCFS; Hu et al. 2023 and SpikeZIP-TF for the signed neuron):

    sum_t s(t) = clip(floor(v0 + T x / theta), 0, T)      binary
    sum_t s(t) = clip(floor(v0 + T x / theta), -T, T)     signed

so with ``v0 = 1/2`` the rate is ``x / theta`` rounded to the nearest multiple of 1/T, and the rounding error has mean
zero at any T. Thresholds and initial potentials are tensors with gradients: training may choose both per channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops import traced
from ntc.ops.spec import Counts, Operand, OpSpec, TypeMismatch, register
from ntc.ops.traffic import fired
from ntc.spike_type import Analog, CurrentType, NodeType, SpikeType
from ntc.surrogate import surrogate

__all__ = [
    "IF_NEURON", "check_constant", "check_per_channel", "check_start_value", "check_threshold", "check_threshold_value", "count_oracle",
    "integrate_fire", "membrane",
]  # fmt: skip


def check_per_channel(what: str, value: Tensor, channels: int | torch.SymInt) -> None:
    """Refuse a parameter of neurons that is not one number per channel or one for all of them.

    Another shape could broadcast the *current*, and the result would have a shape that nothing downstream expects.
    Looks at sizes only, so it costs nothing; for values see ``check_constant``.

    Raises:
        ValueError: Names the parameter, the shapes that fit and the one given.
    """
    if value.dim() != 1 or (value.shape[0] != 1 and value.shape[0] != channels):
        raise ValueError(f"{what} has shape [1] or [{channels}], one number per channel, and not {list(value.shape)}")


def check_threshold(threshold: Tensor, channels: int | torch.SymInt) -> None:
    """``check_per_channel`` for a threshold."""
    check_per_channel("a threshold", threshold, channels)


def check_constant(node: Node, argument: object, fits: Callable[[Tensor], Tensor], what: str) -> None:
    """Refuse values outside of their range (and NaN) in a constant of the program that is an argument of a node.

    Part of the type rule and not of the kernel: it then runs once per compiler pass instead of once per forward.

    Args:
        node: The node whose argument it is.
        argument: The argument; anything but a ``get_attr`` node passes.
        fits: Which elements are in range.
        what: Beginning of the sentence, such as ``a neuron needs thresholds > 0``.

    Raises:
        TypeMismatch: With the first value that is out of range.
    """
    module = node.graph.owning_module
    if not isinstance(argument, Node) or argument.op != "get_attr" or module is None:
        return
    value: Any = module
    for part in str(argument.target).split("."):
        value = getattr(value, part, None)
    if not isinstance(value, Tensor) or value.is_meta:
        return
    value = value.detach().flatten()
    wrong = (~fits(value)).nonzero()
    if len(wrong):
        index = int(wrong[0])
        raise TypeMismatch(f"{what}, and element {index} of %{argument.name} is {float(value[index]):g}", argument)


def check_threshold_value(node: Node) -> None:
    """Refuse thresholds <= 0 (and NaN) that are constants of the program (argument 1 of a neuron)."""
    check_constant(node, node.args[1], lambda x: x > 0, "a neuron needs thresholds > 0")


def check_start_value(node: Node, position: int) -> None:
    """Refuse initial potentials outside of [0, 1] thresholds that are constants of the program."""
    check_constant(
        node, node.args[position], lambda x: (x >= 0) & (x <= 1), "a neuron starts between 0 and its threshold, so v0 lies in [0, 1]"
    )


def _check(current: Tensor, threshold: Tensor, v0: Tensor) -> None:
    check_threshold(threshold, current.shape[-1])
    check_per_channel("v0", v0, current.shape[-1])


@torch.library.custom_op("ntc::integrate_fire", mutates_args=())
def integrate_fire(
    current: Tensor, threshold: Tensor, v0: Tensor, steps: int, signed: bool, timed: bool, surrogate: str, width: float
) -> Tensor:
    """Run IF neurons for T steps (see the module's docstring for the dynamics).

    Args:
        current: Input current, ``[B, L, C]`` (constant over the steps) or ``[T, B, L, C]`` if ``timed``.
        threshold: Firing threshold theta > 0, shape ``[C]`` or ``[1]``, in units of the current.
        v0: Initial membrane potential as a fraction of theta, in [0, 1], shape ``[C]`` or ``[1]``.
        steps: T, number of time steps.
        signed: Ternary spikes.
        timed: Whether axis 0 of ``current`` is the time step.
        surrogate: Name of the surrogate gradient.
        width: Its width, as a fraction of theta.

    Returns:
        Spikes ``[T, B, L, C]`` in the dtype of the current.

    Raises:
        ValueError: If threshold or v0 have another shape.
        ConfigError: If no surrogate has that name and a gradient is wanted.
    """
    _check(current, threshold, v0)
    v = torch.zeros_like(current[0] if timed else current) + v0 * threshold
    spikes = current.new_empty((steps, *v.shape))
    below = torch.empty_like(v) if signed else v
    for t in range(steps):  # in place: memory traffic is all that this costs
        v.add_(current[t] if timed else current)
        s = torch.ge(v, threshold, out=spikes[t])
        if signed:
            s.sub_(torch.lt(v, 0, out=below))
        v.addcmul_(s, threshold, value=-1)
    return spikes


@integrate_fire.register_fake
def _fake(
    current: Tensor, threshold: Tensor, v0: Tensor, steps: int, signed: bool, timed: bool, surrogate: str, width: float
) -> Tensor:
    _check(current, threshold, v0)
    shape = current.shape[1:] if timed else current.shape
    return current.new_empty((steps, *shape))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    current, threshold, v0, ctx.steps, ctx.signed, ctx.timed, name, ctx.width = inputs
    ctx.derivative = surrogate(name)
    ctx.save_for_backward(current, threshold, v0, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Back-propagation through time with the surrogate in place of ds/du.

    With ``g(t) = dL/ds(t)`` and ``G(t) = dL/dv(t)`` (from the steps after t):
    ``dL/du(t) = G(t) + (g(t) - theta G(t)) h(t)``, ``h = ds/du``; ``G(t-1) = dL/du(t)``; ``dL/dv0 = theta G(0)``.

    Both comparisons are taken as functions of ``u / theta``, so ``ds/dtheta = -h u / theta``. Spikes do not change when
    currents and thresholds grow by one factor, and the gradient keeps that: ``sum x dL/dx + theta dL/dtheta = 0``.
    """
    current, threshold, v0, spikes = ctx.saved_tensors
    potentials, v = [], torch.zeros_like(spikes[0]) + v0 * threshold
    for t in range(ctx.steps):  # the membrane before firing is made again from the spikes: cheaper than storing it
        u = v + (current[t] if ctx.timed else current)
        potentials.append(u)
        v = u - spikes[t] * threshold
    carried = torch.zeros_like(spikes[0])
    grad_threshold = torch.zeros_like(spikes[0])
    grad_current: list[Tensor] = []
    for t in reversed(range(ctx.steps)):
        u = potentials[t]
        to_spike = grad[t] - threshold * carried
        slope = ctx.derivative((u - threshold) / threshold, ctx.width) / threshold
        if ctx.signed:
            slope = slope + ctx.derivative(u / threshold, ctx.width) / threshold
        # theta enters through the comparisons, the reset and (below) the initial potential.
        grad_threshold = grad_threshold - to_spike * slope * u / threshold - carried * spikes[t]
        carried = carried + to_spike * slope
        grad_current.append(carried)
    grad_threshold = grad_threshold + v0 * carried
    by_step = torch.stack(grad_current[::-1])
    to_current = (by_step if ctx.timed else by_step.sum(0)).to(current.dtype)
    to_start = (threshold * carried).sum_to_size(v0.shape)
    return to_current, grad_threshold.sum_to_size(threshold.shape), to_start, None, None, None, None, None


integrate_fire.register_autograd(_backward, setup_context=_setup)


def membrane(arguments: Sequence[Any], spikes: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    """The membrane u(t) of a neuron that has fired ``spikes``, whatever it would have fired itself: for ``OpSpec.membrane``."""
    current, threshold, v0, _, signed, timed = arguments[:6]
    v, potentials = torch.zeros_like(spikes[0]) + v0 * threshold, []
    for t, s in enumerate(spikes):
        u = v + (current[t] if timed else current)
        potentials.append(u)
        v = u - s * threshold
    return torch.stack(potentials), (threshold, torch.zeros_like(threshold)) if signed else (threshold,)


def count_oracle(current: Tensor, threshold: Tensor, v0: Tensor, steps: int, signed: bool) -> Tensor:
    """Number of spikes for a constant current, in closed form (float64).

    Args:
        current: Constant input current, ``[..., C]``.
        threshold: ``[C]`` or ``[1]``, > 0.
        v0: Initial membrane potential as a fraction of theta, ``[C]`` or ``[1]``.
        steps: T.
        signed: Ternary spikes.

    Returns:
        ``sum_t s(t)``, same shape as the current, float64.
    """
    counts = torch.floor(v0.double() + steps * current.double() / threshold.double())
    return counts.clamp(-steps if signed else 0, steps)


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    current, steps, signed, is_timed = node.args[0], node.args[3], node.args[4], node.args[5]
    assert isinstance(current, Node) and isinstance(steps, int)
    given = type_of(current)
    if is_timed:
        # The membrane sums the steps with equal weight and what it fires is read as a rate: other codes would change value.
        if given != CurrentType(steps, "rate"):
            raise TypeMismatch(
                f"neurons with T={steps} take a rate-coded current of as many steps, and %{current.name} is {given}", current
            )
    elif not isinstance(given, Analog):
        raise TypeMismatch(f"neurons with a constant input take an analog current, and %{current.name} is {given}", current)
    check_threshold_value(node)
    check_start_value(node, 2)
    return SpikeType(steps, "rate", "ternary" if signed else "binary")


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    return Counts(neuron_updates=result.numel, spikes=result.nonzero, neurons=result.numel / result.shape[0])


def _onnx(signed: bool, is_timed: bool) -> str:
    """One variant as an ONNX function: the kernel's arithmetic in the kernel's order, so that the spikes are the same bits.

    A Scan over the steps: over the current itself if it is timed, else over the ticks 0..T-1, with the current from outside.
    """
    variant = ".".join(word for word, on in (("signed", signed), ("timed", is_timed)) if on)
    floor = "zero = Constant <value_float = 0.0> ()  floor = CastLike(zero, threshold)" if signed else ""
    fire = "up = CastLike(fires, u)  negative = Less(u, floor)  down = CastLike(negative, u)  s = Sub(up, down)"
    ticks = "first = Constant <value_int = 0> ()  one = Constant <value_int = 1> ()  ticks = Range(first, trips, one)"
    return f"""
    <domain: "ntc", overload: "{variant}", opset_import: ["": 20]>
    IntegrateFire <steps, signed, timed, comparison, reset> (current, threshold, v0) => (spikes)
    {{
        start = Mul(v0, threshold)
        shape = Shape <start = {int(is_timed)}> (current)
        resting = Expand(start, shape)
        trips = Constant <value_int: int = @steps> ()
        {"" if is_timed else ticks}
        {floor}
        membrane, spikes = Scan <num_scan_inputs = 1, body = step (v, x) => (v_next, s) {{
            u = Add(v, {"x" if is_timed else "current"})
            fires = GreaterOrEqual(u, threshold)
            {fire if signed else "s = CastLike(fires, u)"}
            drop = Mul(s, threshold)
            v_next = Sub(u, drop)
        }}> (resting, {"current" if is_timed else "ticks"})
    }}
    """


IF_NEURON = register(
    OpSpec(
        target=torch.ops.ntc.integrate_fire.default, infer=_infer, count=_count, moves=fired, element="population", kind="neurons",
        traced=traced.integrate_fire, membrane=membrane,
        onnx="".join(_onnx(signed, is_timed) for signed in (False, True) for is_timed in (False, True)),
    )
)
