"""The ATen ops of the dialect: what types they take and what they cost.

After ``canonicalize`` a GPT-2 consists of these and ``ntc::attention``. An ATen op that is not listed here is kept as an
analog op on the host, takes no spikes, and is named in every report as uncounted if it holds multiply-accumulates.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from ntc.meta import TYPE
from ntc.ops.events import nonzero_products, products_with_zero_weights
from ntc.ops.interval import Bound, BoundRule, Interval, as_interval
from ntc.ops.spec import Counts, Operand, OpSpec, Traffic, TypeMismatch, host_rule, register, timed
from ntc.ops.traffic import looked_up, matrix, rows_of, still, streamed
from ntc.spike_type import ANALOG, Analog, CurrentType, NodeType, RateType, Scale, SpikeType

__all__ = ["aten"]

aten = torch.ops.aten


def _linear_type(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    x = node.args[0]
    assert isinstance(x, Node)
    given = type_of(x)
    for constant in (a for a in node.args[1:3] if isinstance(a, Node)):
        if not isinstance(type_of(constant), Analog):
            raise TypeMismatch(f"weight and bias of a linear layer are analog, and %{constant.name} is {type_of(constant)}", constant)
    if isinstance(given, SpikeType):
        # The bias is added at every step. Only the mean over the steps gives it back as it is; a sum would give T times it.
        if given.code != "rate" and len(node.args) > 2 and node.args[2] is not None:
            raise TypeMismatch(f"a bias can be added to rate-coded spikes only, and %{x.name} is {given}; add it after decode", x)
        return CurrentType(given.steps, given.code)
    if isinstance(given, Analog | RateType):
        return ANALOG
    raise TypeMismatch(f"a linear layer takes spikes or analog values, and %{x.name} is {given}", x)


def _linear_count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    x, fan_out = operands[0], operands[1].shape[0]
    if not isinstance(x.type, SpikeType):
        dense = x.numel * fan_out
        return Counts(dense_macs=dense, macs=dense)
    dense, events = x.numel // x.type.steps * fan_out, x.nonzero * fan_out
    if x.type.levels == "graded":
        return Counts(dense_macs=dense, graded_macs=events)
    return Counts(dense_macs=dense, acs=events)


def _linear_measure(tensors: Sequence[Tensor], result: Tensor, node: Node) -> dict[str, float]:
    """What the counting rule does not ask: which factors are zero. It knows the spikes, and takes no weight for zero."""
    x = node.args[0]
    if isinstance(x, Node) and timed(x.meta.get(TYPE, ANALOG)):
        return {"zero_weight_acs": products_with_zero_weights(*tensors[:2])}
    return {"effective_macs": nonzero_products(*tensors[:2])}


def _linear_moves(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Traffic:
    return matrix(operands, result, _linear_count(node, operands, result, measured))


def _scale_type(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    """Multiplication by a constant keeps a train a train: spikes become graded, currents stay currents."""
    # Not all_input_nodes: it holds each node once, and a train times itself is no scaling.
    inputs = [a for a in node.args if isinstance(a, Node)]
    moving = [(a, t) for a in inputs if isinstance(t := type_of(a), SpikeType | CurrentType | RateType)]
    if not moving:
        return host_rule(node, type_of)
    train, value = moving[0]
    constants = [a for a in inputs if a is not train]
    if len(moving) > 1 or any(a.op != "get_attr" for a in constants):
        other = constants[0] if constants else train
        raise TypeMismatch(f"%{train.name} is {value}: scaled by a constant only, not by %{other.name}: {type_of(other)}", other)
    if isinstance(value, RateType):
        return ANALOG
    shape = tuple(constants[0].meta["val"].shape) if constants else ()
    rank = train.meta["val"].dim()
    if len(shape) > rank or (len(shape) == rank and shape[0] != 1):
        factor_per_step = constants[0]
        raise TypeMismatch(f"%{factor_per_step.name}, a factor per step, changes the code of %{train.name}: {value}", factor_per_step)
    if isinstance(value, CurrentType):
        return value
    factor: Scale = "token" if any(n != 1 for n in shape[:-1]) else "channel" if shape and shape[-1] != 1 else "tensor"
    return replace(value, levels="graded", scale=max(value.scale, factor, key=("none", "tensor", "channel", "token").index))


def _getitem_type(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    """One result of an op that has several: of its type, if that has time steps (as of ``spiking_attention_stream``)."""
    given = type_of(node.all_input_nodes[0])
    return given if timed(given) else host_rule(node, type_of)


def _per_element(factor: float) -> Callable[[Node, Sequence[Operand], Operand, dict[str, float]], Counts]:
    def count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
        return Counts(elementwise=factor * result.numel)

    return count


def _mean_count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    return Counts(elementwise=operands[0].numel)


def _free(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    return Counts()


def _matmul_count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    dense = result.numel * operands[0].shape[-1]
    return Counts(dense_macs=dense, macs=dense)


def _addmm_count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    dense = result.numel * operands[1].shape[-1]
    return Counts(dense_macs=dense, macs=dense)


def _matmul_moves(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Traffic:
    """A matrix of the program is one of a linear layer; two values that meet are each read once."""
    factor = node.args[1]
    if isinstance(factor, Node) and factor.op == "get_attr":
        return matrix(operands, result, _matmul_count(node, operands, result, measured))
    return streamed(node, operands, result, measured)


def _addmm_moves(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Traffic:
    return matrix((operands[1], operands[2], operands[0]), result, _addmm_count(node, operands, result, measured))


def _sdpa_count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    length = operands[1].shape[-2]
    dense = operands[0].numel * length + result.numel * length
    return Counts(dense_macs=dense, macs=dense, elementwise=3 * operands[0].numel // operands[0].shape[-1] * length)


def _sdpa_moves(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Traffic:
    return rows_of(operands, result, operands[1].shape[-2])


def _add_bound(node: Node, context: int, self: Interval | Tensor, other: Interval | Tensor | int, alpha: int) -> Bound:
    return Bound(as_interval(self) + as_interval(other) * Interval.of(alpha, alpha))


def _embedding_bound(node: Node, context: int, weight: Tensor, **_: object) -> Bound:
    """Any row can be looked up."""
    return Bound(Interval.over_rows(weight))


_BOUNDS: dict[object, BoundRule] = {aten.add.Tensor: _add_bound}

register(
    OpSpec(
        aten.linear.default, _linear_type, _linear_count, _linear_moves, _linear_measure, element="projection", kind="projection",
    )
)  # fmt: skip
register(OpSpec(aten.mul.Tensor, _scale_type, _per_element(1), element="scale"))
for _op in (aten.matmul.default, aten.mm.default, aten.bmm.default):
    register(OpSpec(_op, host_rule, _matmul_count, _matmul_moves, kind="projection"))
register(OpSpec(aten.addmm.default, host_rule, _addmm_count, _addmm_moves, kind="projection"))
register(OpSpec(aten.scaled_dot_product_attention.default, host_rule, _sdpa_count, _sdpa_moves, kind="attention"))

# Elementwise arithmetic per output element: counted, never costed (see Counts.elementwise).
for _op, _factor, _kind in (
    (aten.layer_norm.default, 8, "norm"), (aten.rms_norm.default, 5, "norm"), (aten.gelu.default, 8, "activation"),
    (aten.relu.default, 1, "activation"), (aten.silu.default, 5, "activation"), (aten.tanh.default, 5, "activation"),
    (aten.sigmoid.default, 4, "activation"), (aten.erf.default, 5, "activation"), (aten.softmax.int, 3, "attention"),
    (aten._softmax.default, 3, "attention"), (aten.add.Tensor, 1, "elementwise"), (aten.sub.Tensor, 1, "elementwise"),
    (aten.div.Tensor, 1, "elementwise"), (aten.pow.Tensor_Scalar, 1, "elementwise"), (aten.rsqrt.default, 2, "norm"),
    (aten.masked_fill.Scalar, 1, "attention"), (aten.exp.default, 3, "elementwise"),
    (aten.cumsum.default, 1, "elementwise"), (aten.reciprocal.default, 1, "elementwise"),
    (aten.cos.default, 3, "elementwise"), (aten.sin.default, 3, "elementwise"), (aten.neg.default, 1, "elementwise"),
):  # fmt: skip
    register(OpSpec(_op, host_rule, _per_element(_factor), kind=_kind, bound=_BOUNDS.get(_op)))

register(OpSpec(aten.mean.dim, host_rule, _mean_count, kind="norm"))  # every element of the input is added once
for _op in (aten.sum.dim_IntList, aten.amax.default):  # and compared once
    register(OpSpec(_op, host_rule, _mean_count, kind="attention"))
register(OpSpec(operator.getitem, _getitem_type, _free, still, kind="layout"))

# A look-up or a change of layout computes nothing; the look-up moves rows.
register(OpSpec(aten.embedding.default, host_rule, _free, looked_up, kind="embedding", bound=_embedding_bound))
for _op in (
    aten.arange.default, aten.arange.start, aten.unsqueeze.default, aten.view.default, aten.reshape.default,
    aten.transpose.int, aten.permute.default, aten.expand.default, aten.slice.Tensor, aten.sym_size.int, aten.split.Tensor,
    aten.split_with_sizes.default, aten.cat.default, aten.contiguous.default, aten.clone.default, aten.select.int,
    aten.unflatten.int, aten.flatten.using_ints, aten.t.default, aten.to.dtype, aten._to_copy.default, aten.chunk.default,
    aten.index.Tensor, aten.squeeze.dim, aten.full.default, aten.ones.default, aten.zeros.default, aten.tril.default,
    aten._unsafe_view.default, aten.index_select.default, aten.repeat.default, aten.repeat_interleave.self_int, aten.stack.default,
    aten.to.dtype_layout, aten.to.device, aten.gather.default, aten.expand_as.default, aten.reshape_as.default,
):  # fmt: skip
    register(OpSpec(_op, host_rule, _free, still, kind="layout"))
for _arithmetic in (operator.add, operator.mul, operator.sub, operator.floordiv):  # on sizes
    register(OpSpec(_arithmetic, host_rule, _free, still, kind="layout"))
