r"""Few-spikes neurons: functions of one value as short trains of weighted spikes, by local dynamics.

A neuron has T steps with a threshold theta(t), a reset h(t) and a weight d(t) each (Stöckl and Maass 2021, 10.1038/s42256-021-00311-4):

    v(0) = x;   z(t) = 1[v(t) >= theta(t)];   v(t+1) = v(t) - h(t) z(t);   f(x) ~ sum_t d(t) z(t)

Several of them stand side by side, each with numbers of its own, and each for one interval of x (LAS, arXiv 2505.09659): the neuron g
with ``low_g <= x < high_g`` integrates, the others rest. Intervals touch, and x is clamped to their ends before anything else:

    x <- min(max(x, low_0), high_(G-1));   g = #{j > 0: x >= low_j}                 G - 1 comparisons per value

Nothing is looked up by x: what is known of it is which interval it lies in and what the membrane is. Spikes are binary, and mean nothing
without the weights: their type has the code ``fitted``, which no decode reads. ``ntc::fs_synapse`` gives each spike the weight of the
neuron that fired it, one accumulate per spike; its graded train has the code ``count`` and sums to f(x). h, theta and d come from
``ntc_passes.spike_functions.fit`` or from anywhere else.

Gradients are straight through: inside the intervals x is taken for ``sum_t h(t) z(t)`` plus a constant, so that
``dz(t)/dx = h(t) / sum_u h(u)^2``, and outside of them for a constant; thresholds and resets have none, weights the exact one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops.if_neuron import check_constant
from ntc.ops.spec import Counts, Operand, OpSpec, Traffic, TypeMismatch, register
from ntc.ops.traffic import values
from ntc.spike_type import Analog, NodeType, SpikeType

__all__ = ["FS_NEURON", "FS_SYNAPSE", "fs_neuron", "fs_synapse", "membrane"]


def _check(intervals: Tensor, steps: int, **tables: Tensor) -> None:
    if intervals.dim() != 2 or intervals.shape[1] != 2 or intervals.shape[0] < 1:
        raise ValueError(f"intervals have shape [G, 2], low and high of each neuron, and not {list(intervals.shape)}")
    for name, table in tables.items():
        if tuple(table.shape) != (intervals.shape[0], steps):
            raise ValueError(
                f"{name} has shape [{intervals.shape[0]}, {steps}], one number per interval and step, and not {list(table.shape)}"
            )


def _in_charge(x: Tensor, intervals: Tensor) -> Tensor:
    """Which neuron each value is for, ``[...]``."""
    return torch.bucketize(x.contiguous(), intervals[1:, 0].to(x.dtype).contiguous(), right=True)


def _clamped(x: Tensor, intervals: Tensor) -> Tensor:
    return x.clamp(intervals[0, 0], intervals[-1, 1])


def _each(table: Tensor, t: int, index: Tensor) -> Tensor:
    """The number of step t for each value; that of all if there is one neuron only."""
    return table[:, t] if table.shape[0] == 1 else table[:, t].take(index)


@torch.library.custom_op("ntc::fs_neuron", mutates_args=())
def fs_neuron(x: Tensor, intervals: Tensor, theta: Tensor, reset: Tensor, steps: int) -> Tensor:
    """Run few-spikes neurons (see the module's docstring).

    Args:
        x: Value, ``[...]``.
        intervals: Low and high end of each neuron's, ``[G, 2]``, in the units of x, ascending and touching.
        theta: Thresholds, ``[G, T]``, in the units of x.
        reset: h, ``[G, T]``, in the units of x.
        steps: T.

    Returns:
        Spikes ``[T, ...]`` in {0, 1}, in the dtype of x.

    Raises:
        ValueError: If a table has another shape.
    """
    _check(intervals, steps, theta=theta, reset=reset)
    index, v = _in_charge(x, intervals), _clamped(x, intervals)
    spikes = x.new_empty((steps, *x.shape))
    for t in range(steps):
        s = torch.ge(v, _each(theta, t, index), out=spikes[t])
        v = v - s * _each(reset, t, index)
    return spikes


@fs_neuron.register_fake
def _fake(x: Tensor, intervals: Tensor, theta: Tensor, reset: Tensor, steps: int) -> Tensor:
    _check(intervals, steps, theta=theta, reset=reset)
    return x.new_empty((steps, *x.shape))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, intervals, _, reset, ctx.steps = inputs
    ctx.save_for_backward(x, intervals, reset)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, intervals, reset = ctx.saved_tensors
    index, share = _in_charge(x, intervals), reset / (reset * reset).sum(-1, keepdim=True).clamp(min=torch.finfo(reset.dtype).tiny)
    to_x = torch.zeros_like(x)
    for t in range(ctx.steps):
        to_x = to_x + grad[t] * _each(share, t, index)
    inside = (x >= intervals[0, 0]) & (x <= intervals[-1, 1])
    return to_x * inside.to(grad.dtype), None, None, None, None


fs_neuron.register_autograd(_backward, setup_context=_setup)


def membrane(arguments: Sequence[Any], spikes: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    """Where a neuron that has fired ``spikes`` stands to its thresholds: 1 at them, in units of its largest reset.

    A value at the end of an interval is the next neuron's after the slightest change, and that fires another train altogether. So no
    membrane counts as farther from its threshold than the value is from the nearest end.
    """
    x, intervals, theta, reset, steps = arguments[:5]
    index, v = _in_charge(x, intervals), _clamped(x, intervals)
    index, v = index.expand(spikes.shape[1:]).contiguous(), v.expand(spikes.shape[1:])
    unit = reset.abs().amax(1)
    unit = torch.where(unit > 0, unit, torch.ones_like(unit))[index]
    reach = torch.full_like(v, torch.inf)
    if len(intervals) > 1:
        ends = intervals[1:, 0].to(v.dtype).contiguous()
        after = torch.bucketize(v, ends, right=True)
        below, above = ends[(after - 1).clamp(min=0)], ends[after.clamp(max=len(ends) - 1)]
        reach = torch.minimum((v - below).abs(), (v - above).abs())
    found = []
    for t in range(steps):
        over = v - theta[:, t][index]
        found.append(1 + over.sign() * torch.minimum(over.abs(), reach) / unit)
        v = v - spikes[t] * reset[:, t][index]
    return torch.stack(found), (torch.ones(1, dtype=v.dtype, device=v.device),)


def _touching(ends: Tensor) -> Tensor:
    """Which of the ends low, high, low, ... are where they should be."""
    fits = torch.ones_like(ends, dtype=torch.bool)
    fits[1:] = ends[1:] >= ends[:-1]
    fits[2::2] &= ends[2::2] == ends[1:-1:2]
    return fits


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    x, *tables, steps = node.args
    assert isinstance(x, Node) and isinstance(steps, int)
    for what, argument in (("a value", x), *(("numbers", t) for t in tables if isinstance(t, Node))):
        if not isinstance(type_of(argument), Analog):
            raise TypeMismatch(f"few-spikes neurons take {what} that is analog, and %{argument.name} is {type_of(argument)}", argument)
    check_constant(node, tables[0], _touching, "intervals ascend and touch")
    return SpikeType(steps, "fitted", "binary")


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    """One update per step of the neuron in charge; a comparison with the end of an interval is a subtraction."""
    neurons = result.numel / result.shape[0]
    return Counts(neuron_updates=result.numel, acs=(operands[1].shape[0] - 1) * neurons, spikes=result.nonzero, neurons=neurons)


def _moves(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Traffic:
    """A membrane read and written at each step, and of the tables a threshold and a reset for it; an end for each comparison."""
    neurons = result.numel // result.shape[0]
    read, tables = 2 * result.numel + (operands[1].shape[0] - 1) * neurons, sum(o.numel for o in operands[1:])
    own = Traffic(membranes=2 * result.numel, weights=read, sweep=neurons // max(1, result.shape[-1]) * tables)
    return values(operands[0]) + values(result) + own


_GATE = """
    lower_column = Constant <value_int = 0> ()
    upper_column = Constant <value_int = 1> ()
    lower = Gather <axis = 1> (intervals, lower_column)
    upper = Gather <axis = 1> (intervals, upper_column)
    lowest = ReduceMin <keepdims = 0> (lower)
    highest = ReduceMax <keepdims = 0> (upper)
    floored = Max(x, lowest)
    start = Min(floored, highest)
    whole = Shape(x)
    none = ConstantOfShape <value = int64[1] {-1}> (whole)
    index = Scan <num_scan_inputs = 1, body = gate (below, low) => (below_next) {
        reached = GreaterOrEqual(start, low)
        one_more = Cast <to = 7> (reached)
        below_next = Add(below, one_more)
    }> (none, lower)
"""
_ONNX = f"""
<domain: "ntc", opset_import: ["": 20]>
FewSpikes <steps, comparison> (x, intervals, theta, reset) => (spikes)
{{
{_GATE}
    theta_rows = Transpose <perm = [1, 0]> (theta)
    reset_rows = Transpose <perm = [1, 0]> (reset)
    left, spikes = Scan <num_scan_inputs = 2, body = step (v, at, drop) => (v_next, s) {{
        level = Gather(at, index)
        fires = GreaterOrEqual(v, level)
        s = CastLike(fires, v)
        size = Gather(drop, index)
        fall = Mul(s, size)
        v_next = Sub(v, fall)
    }}> (start, theta_rows, reset_rows)
}}
"""
FS_NEURON = register(
    OpSpec(
        target=torch.ops.ntc.fs_neuron.default, infer=_infer, count=_count, moves=_moves, element="population", kind="neurons",
        membrane=membrane, onnx=_ONNX,
    )
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- what a spike counts


@torch.library.custom_op("ntc::fs_synapse", mutates_args=())
def fs_synapse(spikes: Tensor, x: Tensor, intervals: Tensor, weight: Tensor, steps: int) -> Tensor:
    """``d_g(t) z(t)``: each spike of few-spikes neurons with the weight of the one that fired it.

    Args:
        spikes: Of ``fs_neuron``, ``[T, ...]``.
        x: The value that they were made of, ``[...]``: only which interval it lies in is used, which the neurons have found out.
        intervals: Those of the neurons, ``[G, 2]``.
        weight: d, ``[G, T]``, in the units of the function.
        steps: T.

    Returns:
        ``[T, ...]``; its sum over the steps is the function's value.

    Raises:
        ValueError: If a table or the train has another shape.
    """
    _check(intervals, steps, weight=weight)
    if spikes.shape != (steps, *x.shape):
        raise ValueError(f"spikes of a value {list(x.shape)} have shape {[steps, *x.shape]}, and not {list(spikes.shape)}")
    index = _in_charge(x, intervals)
    return torch.stack([spikes[t] * _each(weight, t, index) for t in range(steps)])


@fs_synapse.register_fake
def _fake_synapse(spikes: Tensor, x: Tensor, intervals: Tensor, weight: Tensor, steps: int) -> Tensor:
    _check(intervals, steps, weight=weight)
    return spikes.new_empty((steps, *x.shape))


def _setup_synapse(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    spikes, x, intervals, weight, ctx.steps = inputs
    ctx.save_for_backward(spikes, x, intervals, weight)


def _backward_synapse(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    spikes, x, intervals, weight = ctx.saved_tensors
    index = _in_charge(x, intervals)
    to_spikes = torch.stack([grad[t] * _each(weight, t, index) for t in range(ctx.steps)])
    moved = (grad * spikes).flatten(1).to(weight.dtype)  # [T, values]
    to_weight = torch.zeros_like(weight).index_add(0, index.flatten(), moved.T)
    return to_spikes, None, None, to_weight, None


fs_synapse.register_autograd(_backward_synapse, setup_context=_setup_synapse)


def _infer_synapse(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    spikes, x, *_, steps = node.args
    assert isinstance(spikes, Node) and isinstance(x, Node) and isinstance(steps, int)
    if type_of(spikes) != SpikeType(steps, "fitted", "binary"):
        raise TypeMismatch(f"fs_synapse takes spikes of few-spikes neurons, T={steps}, and %{spikes.name} is {type_of(spikes)}", spikes)
    if not isinstance(type_of(x), Analog):
        raise TypeMismatch(f"few-spikes neurons are made of a value that is analog, and %{x.name} is {type_of(x)}", x)
    return SpikeType(steps, "count", "graded")


def _count_synapse(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    """A spike adds its weight to the sum."""
    return Counts(acs=operands[0].nonzero)


def _moves_synapse(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Traffic:
    """The train in and a weight for each spike; the payload of a graded spike is that weight, read here and stored nowhere."""
    tokens = operands[1].numel // max(1, operands[1].shape[-1])
    return values(operands[0]) + Traffic(weights=operands[0].nonzero, sweep=tokens * operands[3].numel)


_ONNX_SYNAPSE = f"""
<domain: "ntc", opset_import: ["": 20]>
FewSpikesSynapse <steps> (spikes, x, intervals, weight) => (train)
{{
{_GATE}
    weight_rows = Transpose <perm = [1, 0]> (weight)
    train = Scan <num_scan_inputs = 2, body = step (s, weights) => (e) {{
        each = Gather(weights, index)
        e = Mul(s, each)
    }}> (spikes, weight_rows)
}}
"""
FS_SYNAPSE = register(
    OpSpec(
        target=torch.ops.ntc.fs_synapse.default, infer=_infer_synapse, count=_count_synapse, moves=_moves_synapse, element="scale",
        kind="neurons", onnx=_ONNX_SYNAPSE, source=1,
    )
)  # fmt: skip
