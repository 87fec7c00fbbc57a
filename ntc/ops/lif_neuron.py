r"""Leaky integrate-and-fire neuron, soft or hard reset.

Per neuron and time step, with membrane time constant tau >= 1 [steps], resting and reset potential 0 and
``v(0) = v0 theta`` (Fang et al. 2021, arXiv 2007.05785, learn tau; Spikformer, Zhou et al. 2023, uses tau = 2, theta = 1,
v0 = 0, hard reset):

    u(t) = v(t-1) + (x(t) - v(t-1)) / tau
    s(t) = 1[u(t) >= theta]
    v(t) = u(t) - theta s(t)        soft reset
    v(t) = u(t) (1 - s(t))          hard reset

Without spikes a constant current x drives the membrane to ``u(t) = x + (v(0) - x) (1 - 1/tau)**t``, so with v(0) = 0 the
neuron fires first at ``t = ceil(log(1 - theta / x) / log(1 - 1 / tau))`` for x > theta, and never for x < theta. With
tau = 1 nothing is remembered: it fires at every step where ``x(t) >= theta``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops import traced
from ntc.ops.if_neuron import check_constant, check_per_channel, check_start_value, check_threshold, check_threshold_value
from ntc.ops.spec import Counts, Operand, OpSpec, TypeMismatch, register
from ntc.ops.traffic import fired
from ntc.spike_type import Analog, CurrentType, NodeType, SpikeType
from ntc.surrogate import surrogate

__all__ = ["LIF_NEURON", "first_spike_oracle", "leaky_integrate_fire", "membrane"]


def _check(current: Tensor, threshold: Tensor, tau: Tensor, v0: Tensor) -> None:
    check_threshold(threshold, current.shape[-1])
    check_per_channel("tau", tau, current.shape[-1])
    check_per_channel("v0", v0, current.shape[-1])


@torch.library.custom_op("ntc::leaky_integrate_fire", mutates_args=())
def leaky_integrate_fire(
    current: Tensor, threshold: Tensor, tau: Tensor, v0: Tensor, steps: int, hard_reset: bool, timed: bool, surrogate: str, width: float
) -> Tensor:
    """Run LIF neurons for T steps (see the module's docstring for the dynamics).

    Args:
        current: Input current, ``[B, L, C]`` (constant) or ``[T, B, L, C]`` if ``timed``.
        threshold: Firing threshold theta > 0, ``[C]`` or ``[1]``.
        tau: Membrane time constant [steps], >= 1, ``[C]`` or ``[1]``.
        v0: Initial membrane potential as a fraction of theta, in [0, 1], ``[C]`` or ``[1]``; 0 is usual.
        steps: T.
        hard_reset: Reset to 0 instead of subtracting theta.
        timed: Whether axis 0 of ``current`` is the time step.
        surrogate: Name of the surrogate gradient.
        width: Its width, as a fraction of theta.

    Returns:
        Spikes ``[T, B, L, C]`` in the dtype of the current.

    Raises:
        ValueError: If threshold, tau or v0 have another shape.
        ConfigError: If no surrogate has that name and a gradient is wanted.
    """
    _check(current, threshold, tau, v0)
    v = torch.zeros_like(current[0] if timed else current) + v0 * threshold
    spikes = current.new_empty((steps, *v.shape))
    for t in range(steps):
        u = v + ((current[t] if timed else current) - v) / tau
        s = (u >= threshold).to(u.dtype)
        v = u * (1 - s) if hard_reset else u - s * threshold
        spikes[t] = s
    return spikes


@leaky_integrate_fire.register_fake
def _fake(
    current: Tensor, threshold: Tensor, tau: Tensor, v0: Tensor, steps: int, hard_reset: bool, timed: bool, surrogate: str, width: float
) -> Tensor:
    _check(current, threshold, tau, v0)
    shape = current.shape[1:] if timed else current.shape
    return current.new_empty((steps, *shape))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    current, threshold, tau, v0, ctx.steps, ctx.hard, ctx.timed, name, ctx.width = inputs
    ctx.derivative = surrogate(name)
    ctx.save_for_backward(current, threshold, tau, v0, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Back-propagation through time; the reset is part of the gradient, unlike in ``detach_reset`` implementations.

    As at the IF neuron, and with ``du(t)/dtau = -(x(t) - v(t-1)) / tau**2``, ``du(t)/dv(t-1) = 1 - 1 / tau``.
    """
    current, threshold, tau, v0, spikes = ctx.saved_tensors
    potentials, drives, v = [], [], torch.zeros_like(spikes[0]) + v0 * threshold
    for t in range(ctx.steps):
        drive = ((current[t] if ctx.timed else current) - v) / tau
        u = v + drive
        potentials.append(u)
        drives.append(drive)
        v = u * (1 - spikes[t]) if ctx.hard else u - spikes[t] * threshold
    carried = torch.zeros_like(spikes[0])
    grad_threshold, grad_tau = torch.zeros_like(spikes[0]), torch.zeros_like(spikes[0])
    grad_current: list[Tensor] = []
    for t in reversed(range(ctx.steps)):
        u, s = potentials[t], spikes[t]
        slope = ctx.derivative((u - threshold) / threshold, ctx.width) / threshold
        to_spike = grad[t] - (u if ctx.hard else threshold) * carried
        to_membrane = carried * ((1 - s) if ctx.hard else 1.0) + to_spike * slope
        grad_threshold = grad_threshold - to_spike * slope * u / threshold - (0.0 if ctx.hard else 1.0) * carried * s
        to_input = to_membrane / tau
        grad_tau = grad_tau - to_input * drives[t]
        grad_current.append(to_input)
        carried = to_membrane - to_input
    grad_threshold = grad_threshold + v0 * carried
    by_step = torch.stack(grad_current[::-1])
    to_current = (by_step if ctx.timed else by_step.sum(0)).to(current.dtype)
    return (
        to_current, grad_threshold.sum_to_size(threshold.shape), grad_tau.sum_to_size(tau.shape),
        (threshold * carried).sum_to_size(v0.shape), None, None, None, None, None,
    )  # fmt: skip


leaky_integrate_fire.register_autograd(_backward, setup_context=_setup)


def membrane(arguments: Sequence[Any], spikes: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    """The membrane u(t) of a neuron that has fired ``spikes``, whatever it would have fired itself: for ``OpSpec.membrane``."""
    current, threshold, tau, v0, _, hard, timed = arguments[:7]
    v, potentials = torch.zeros_like(spikes[0]) + v0 * threshold, []
    for t, s in enumerate(spikes):
        u = v + ((current[t] if timed else current) - v) / tau
        potentials.append(u)
        v = u * (1 - s) if hard else u - s * threshold
    return torch.stack(potentials), (threshold,)


def first_spike_oracle(current: Tensor, threshold: Tensor, tau: float) -> Tensor:
    """Step (from 1) of the first spike for a constant current, infinity where there is none (float64).

    Args:
        current: Constant input current, ``[..., C]``.
        threshold: ``[C]`` or ``[1]``, > 0.
        tau: Membrane time constant [steps], >= 1.
    """
    x, theta, keep = current.double(), threshold.double(), 1.0 - 1.0 / tau
    if tau == 1:
        return torch.where(x >= theta, 1.0, torch.inf).double()
    step = torch.ceil(torch.log1p(-theta / x) / math.log1p(-1.0 / tau))
    # The quotient of the logarithms is off by an ulp where the membrane meets theta exactly: ask the membrane itself.
    step = torch.where(x * (1.0 - keep ** (step - 1)) >= theta, step - 1, step)
    step = torch.where(x * (1.0 - keep**step) < theta, step + 1, step)
    return torch.where(x > theta, step, torch.inf)


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    current, steps, is_timed = node.args[0], node.args[4], node.args[6]
    assert isinstance(current, Node) and isinstance(steps, int)
    given = type_of(current)
    # A timed current must be rate-coded for the reason given at the IF neuron.
    fits = given == CurrentType(steps, "rate") if is_timed else isinstance(given, Analog)
    if not fits:
        raise TypeMismatch(f"LIF neurons with T={steps} do not take %{current.name}, which is {given}", current)
    check_threshold_value(node)
    check_constant(node, node.args[2], lambda x: x >= 1, "a leaky neuron needs time constants tau >= 1 step")
    check_start_value(node, 3)
    return SpikeType(steps, "rate", "binary")


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    # The leak is one more multiplication per update than an IF neuron has.
    return Counts(neuron_updates=result.numel, macs=result.numel, spikes=result.nonzero, neurons=result.numel / result.shape[0])


def _onnx(hard: bool, is_timed: bool) -> str:
    """One variant as an ONNX function (see the IF neuron's)."""
    variant = ".".join(word for word, on in (("hard_reset", hard), ("timed", is_timed)) if on)
    ticks = "first = Constant <value_int = 0> ()  one = Constant <value_int = 1> ()  ticks = Range(first, trips, one)"
    unit = "whole = Constant <value_float = 1.0> ()  unit = CastLike(whole, threshold)" if hard else ""
    reset = "quiet = Sub(unit, s)  v_next = Mul(u, quiet)" if hard else "drop = Mul(s, threshold)  v_next = Sub(u, drop)"
    return f"""
    <domain: "ntc", overload: "{variant}", opset_import: ["": 20]>
    LeakyIntegrateFire <steps, hard_reset, timed, comparison, reset> (current, threshold, tau, v0) => (spikes)
    {{
        start = Mul(v0, threshold)
        shape = Shape <start = {int(is_timed)}> (current)
        resting = Expand(start, shape)
        trips = Constant <value_int: int = @steps> ()
        {"" if is_timed else ticks}
        {unit}
        membrane, spikes = Scan <num_scan_inputs = 1, body = step (v, x) => (v_next, s) {{
            driven = Sub({"x" if is_timed else "current"}, v)
            leaked = Div(driven, tau)
            u = Add(v, leaked)
            fires = GreaterOrEqual(u, threshold)
            s = CastLike(fires, u)
            {reset}
        }}> (resting, {"current" if is_timed else "ticks"})
    }}
    """


LIF_NEURON = register(
    OpSpec(
        target=torch.ops.ntc.leaky_integrate_fire.default, infer=_infer, count=_count, moves=fired, element="population", kind="neurons",
        traced=traced.leaky_integrate_fire, membrane=membrane,
        onnx="".join(_onnx(hard, is_timed) for hard in (False, True) for is_timed in (False, True)),
    )
)  # fmt: skip
