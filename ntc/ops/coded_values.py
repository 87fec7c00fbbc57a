r"""Values weighted by spikes: the second product of attention as an op of its own, with neurons for its weights in front.

    x_ij = p_ij a_j,   a_j = d^V_j                                        ntc::key_scale: a weight of attention times the size behind it
    n_ij = sum_t w'(t) s_ij(t)                                            digit neurons with the step of a row, d_i = max_j x_ij / N'
    y_i  = d_i sum_j n_ij u_j + (m_i - d_i sum_j n_ij) mean_j u_j         ntc::coded_values: each spike adds the stored u_j, and 1
           u_j = V_j / a_j = sum_t w(t) v_j(t),   m_i = sum_j x_ij        sums and mean over the keys that i sees

Nothing is said of how p comes from the scores (``ntc::coded_scores``). With a softmax this is what ``ntc::coded_attention`` computes,
neuron by neuron: p is its numerator times a number of the row, which the step of the row takes out and puts in again behind the sum. Its
docstring says why x is coded and not p, and why what a row has lost is given back evenly. In range,

    |y_i - sum_j p_ij V_j| <= d_i / 2 sum_j |u_j - mean_j u|              beside the error of V

Where the steps of V are known, ``a = 1``: there is no ``key_scale``, and u is V itself, with ``value_step``. Rows stand one after the
other, all heads, ``[B, H L, L]``, as those of the scores.

The op is linear in the weights' spikes, in V, in d and in m, so its gradients are exact; straight through are those of the neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops.attention import ONNX_GROUPED_HEADS, grouped, merge_heads, per_head, seen_by, split_heads
from ntc.ops.coded_scores import all_analog, check_heads, check_table
from ntc.ops.open_attention import by_head
from ntc.ops.spec import Counts, Operand, OpSpec, Traffic, host_rule, register
from ntc.ops.spike_linear import ONNX_SUM, fitted_train, weighted
from ntc.ops.traffic import values
from ntc.spike_type import NodeType

__all__ = ["CODED_VALUES", "KEY_SCALE", "coded_values", "key_scale"]


def _check_scale(rows: Tensor, size: Tensor, heads: int, kv_heads: int) -> None:
    check_heads(heads, kv_heads)
    wanted = [*rows.shape[:-2], rows.shape[-1], kv_heads]
    if list(size.shape) != wanted:
        raise ValueError(f"sizes of {rows.shape[-1]} keys have shape {wanted}, and not {list(size.shape)}")


def _sizes(size: Tensor, heads: int, kv_heads: int) -> Tensor:
    """``[B, L, Hk]`` as ``[B, H, 1, L]``."""
    return size.transpose(-1, -2).repeat_interleave(heads // kv_heads, dim=-2).unsqueeze(-2)


@torch.library.custom_op("ntc::key_scale", mutates_args=())
def key_scale(probabilities: Tensor, size: Tensor, heads: int, kv_heads: int) -> Tensor:
    """``p_ij a_j``: weights of attention, each times a number of its key.

    Args:
        probabilities: p, ``[B, H L, L]``.
        size: a, ``[B, L, Hk]``.
        heads: H.
        kv_heads: Hk; divides H.

    Returns:
        ``[B, H L, L]``.

    Raises:
        ValueError: If the sizes have another shape.
    """
    _check_scale(probabilities, size, heads, kv_heads)
    return (by_head(probabilities, heads) * _sizes(size, heads, kv_heads)).flatten(-3, -2).contiguous()


@key_scale.register_fake
def _fake_scale(probabilities: Tensor, size: Tensor, heads: int, kv_heads: int) -> Tensor:
    _check_scale(probabilities, size, heads, kv_heads)
    return probabilities.new_empty(probabilities.shape)


def _setup_scale(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    probabilities, size, ctx.heads, ctx.kv_heads = inputs
    ctx.save_for_backward(probabilities, size)


def _backward_scale(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    probabilities, size = ctx.saved_tensors
    given = by_head(grad, ctx.heads)
    to_rows = (given * _sizes(size, ctx.heads, ctx.kv_heads)).flatten(-3, -2)
    each = (given * by_head(probabilities, ctx.heads)).sum(-2)  # [B, H, L]
    to_size = each.reshape(*each.shape[:-2], ctx.kv_heads, -1, each.shape[-1]).sum(-2).transpose(-1, -2)
    return to_rows, to_size, None, None


key_scale.register_autograd(_backward_scale, setup_context=_setup_scale)


def _count_scale(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    """A product for each weight that is not zero."""
    return Counts(elementwise=operands[0].nonzero)


_ONNX_SCALE = f"""
<domain: "ntc", opset_import: ["": 20]>
KeyScale <heads, kv_heads> (probabilities, size) => (y)
{{{ONNX_GROUPED_HEADS}
    length = Shape <start = -1> (probabilities)
    split_shape = Concat <axis = 0> (any, hk, g, length, length)
    p = Reshape(probabilities, split_shape)
    a_rows = Transpose <perm = [0, 2, 1]> (size)
    a_axes = Constant <value_ints = [2, 3]> ()
    a = Unsqueeze(a_rows, a_axes)
    scaled = Mul(p, a)
    whole = Shape(probabilities)
    y = Reshape(scaled, whole)
}}
"""
KEY_SCALE = register(
    OpSpec(target=torch.ops.ntc.key_scale.default, infer=host_rule, count=_count_scale, kind="attention", onnx=_ONNX_SCALE)
)


# ------------------------------------------------------------------------------------------------------------------- the product


def _check(
    probabilities: Tensor, value: Tensor, row_step: Tensor, mass: Tensor, levels: Tensor, weights: Tensor, heads: int, kv_heads: int,
    value_step: Tensor | None,
) -> None:  # fmt: skip
    check_heads(heads, kv_heads)
    check_table("levels of weights", levels, probabilities)
    check_table("weights of values", weights, value)
    length = value.shape[-2]
    if list(probabilities.shape[1:]) != [*value.shape[1:-2], heads * length, length]:
        wanted = [*value.shape[1:-2], heads * length, length]
        raise ValueError(f"digits of weights have shape {['T', *wanted]}, and not {list(probabilities.shape)}")
    for name, rows in (("steps", row_step), ("sums", mass)):
        if list(rows.shape) != [*probabilities.shape[1:-1], 1]:
            raise ValueError(f"{name} of the rows have shape {[*probabilities.shape[1:-1], 1]}, and not {list(rows.shape)}")
    if value_step is not None and list(value_step.shape) not in ([1], [value.shape[-1]]):
        raise ValueError(f"known steps of the values have shape [1] or [{value.shape[-1]}], and not {list(value_step.shape)}")


def _stored(value: Tensor, weights: Tensor, value_step: Tensor | None) -> Tensor:
    whole = weighted(value, weights)
    return whole if value_step is None else whole * value_step


def _means(length: int, window: int, like: Tensor) -> Tensor:
    """``mean_j`` over the keys that each query sees, ``[L, L]``."""
    seen = seen_by(length, window, like.device).to(like.dtype)
    return seen / seen.sum(-1, keepdim=True)


@torch.library.custom_op("ntc::coded_values", mutates_args=())
def coded_values(
    probabilities: Tensor, value: Tensor, row_step: Tensor, mass: Tensor, levels: Tensor, weights: Tensor, heads: int, kv_heads: int,
    window: int, value_step: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Values summed with weights that are digits (see the module's docstring).

    Args:
        probabilities: Digits of x, ``[T', B, H L, L]``; silent for what a token does not see.
        value: Digits ``[T, B, L, Hk Dv]``.
        row_step: d, ``[B, H L, 1]``.
        mass: m, ``[B, H L, 1]``.
        levels: w', ``[T']``.
        weights: w, ``[T]``.
        heads: H.
        kv_heads: Hk; divides H.
        window: w, most tokens that a token sees, itself among them; 0 = all.
        value_step: ``[1]`` or ``[Hk Dv]``, if the steps of V are known; None = they are in x.

    Returns:
        ``[B, L, H Dv]``.

    Raises:
        ValueError: If an argument has another shape.
    """
    _check(probabilities, value, row_step, mass, levels, weights, heads, kv_heads, value_step)
    n, u = by_head(weighted(probabilities, levels), heads), _stored(value, weights, value_step)
    d, m = by_head(row_step, heads), by_head(mass, heads)
    mean = (_means(u.shape[-2], window, u) @ split_heads(u, kv_heads)).repeat_interleave(heads // kv_heads, dim=-3)
    return merge_heads(n @ per_head(u, heads, kv_heads) * d + (m - d * n.sum(-1, keepdim=True)) * mean).contiguous()


@coded_values.register_fake
def _fake(
    probabilities: Tensor, value: Tensor, row_step: Tensor, mass: Tensor, levels: Tensor, weights: Tensor, heads: int, kv_heads: int,
    window: int, value_step: Tensor | None = None,
) -> Tensor:  # fmt: skip
    _check(probabilities, value, row_step, mass, levels, weights, heads, kv_heads, value_step)
    return value.new_empty((*value.shape[1:-1], value.shape[-1] // kv_heads * heads))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.heads, ctx.kv_heads, ctx.window, value_step = inputs
    ctx.save_for_backward(*tensors, value_step)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    probabilities, value, row_step, mass, levels, weights, value_step = ctx.saved_tensors
    heads, kv_heads, g = ctx.heads, ctx.kv_heads, split_heads(grad, ctx.heads)
    n, whole = by_head(weighted(probabilities, levels), heads), weighted(value, weights)
    u = per_head(whole if value_step is None else whole * value_step, heads, kv_heads)
    d, m, means = by_head(row_step, heads), by_head(mass, heads), _means(u.shape[-2], ctx.window, u)
    told = n.sum(-1, keepdim=True)
    to_mass = (g * (means @ u)).sum(-1, keepdim=True)
    to_step = (g * (n @ u)).sum(-1, keepdim=True) - told * to_mass
    to_n = (d * (g @ u.transpose(-2, -1) - to_mass) * (means > 0)).flatten(-3, -2)
    to_u = grouped(n.transpose(-2, -1) @ (d * g) + means.transpose(-2, -1) @ ((m - d * told) * g), heads, kv_heads)
    to_whole = to_u if value_step is None else to_u * value_step
    trains = [w.to(grad.dtype).reshape(-1, *[1] * to_x.dim()) * to_x for w, to_x in ((levels, to_n), (weights, to_whole))]
    to_value_step = None if value_step is None else (to_u * whole).sum_to_size(value_step.shape)
    return *trains, to_step.flatten(-3, -2), to_mass.flatten(-3, -2), *[None] * 5, to_value_step


coded_values.register_autograd(_backward, setup_context=_setup)


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    first, second, *others = [a for a in node.args if isinstance(a, Node)]
    for train in (first, second):
        fitted_train(train, type_of, "coded_values")
    return all_analog("coded_values", others, type_of)


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    """Dv + 1 accumulates per spike of a weight: a row of stored values, and the sum of the weights. Elementwise: decoding the values, their
    running sum, and per result the sum from step to step, a product with the step, and what is given back.
    """
    probabilities, value = operands[:2]
    kv_heads = node.args[7]
    assert isinstance(kv_heads, int)
    whole = value.numel // value.shape[0]
    return Counts(
        dense_macs=result.numel * value.shape[-2], acs=probabilities.nonzero * (value.shape[-1] // kv_heads + 1),
        elementwise=value.numel + whole + result.numel * (probabilities.shape[0] + 3),
    )  # fmt: skip


def _moves(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Traffic:
    """Each spike of a weight reads a row of stored values, which are written once."""
    probabilities, value, step, mass = operands[:4]
    kv_heads = node.args[7]
    assert isinstance(kv_heads, int)
    cache = probabilities.nonzero * (value.shape[-1] // kv_heads) + value.numel // value.shape[0]
    return Traffic(cache=cache) + values(probabilities) + values(value) + values(step) + values(mass) + values(result)


def _onnx(known: bool) -> str:
    inputs = f"probabilities, value, row_step, mass, levels, weights{', value_step' if known else ''}"
    return f"""
    <domain: "ntc", overload: "{"value_step" if known else ""}", opset_import: ["": 20]>
    CodedValues <heads, kv_heads, window> ({inputs}) => (y)
    {{{ONNX_GROUPED_HEADS}
        {ONNX_SUM.format("probabilities", "levels")}
        {ONNX_SUM.format("value", "weights")}
        {"stored = Mul(value_value, value_step)" if known else "stored = Identity(value_value)"}
        length = Shape <start = -1> (probabilities)
        lead = Shape <end = -1> (stored)
        value_width = Shape <start = -1> (stored)
        value_size = Div(value_width, hk)
        split_shape = Concat <axis = 0> (any, hk, g, length, length)
        n = Reshape(probabilities_value, split_shape)
        row_shape = Concat <axis = 0> (any, hk, g, length, single)
        d = Reshape(row_step, row_shape)
        m = Reshape(mass, row_shape)
        value_shape = Concat <axis = 0> (any, length, hk, single, value_size)
        value_split = Reshape(stored, value_shape)
        u = Transpose <perm = [0, 2, 3, 1, 4]> (value_split)
        unit_value = Constant <value_float = 1.0> ()
        unit = CastLike(unit_value, stored)
        square = Concat <axis = 0> (length, length)
        ones = Expand(unit, square)
        diagonal = Constant <value_int = 0> ()
        earlier = Trilu <upper = 0> (ones, diagonal)
        given_window = Constant <value_int: int = @window> ()
        has_window = Greater(given_window, diagonal)
        whole = Squeeze(length)
        reach = Where(has_window, given_window, whole)
        one = Constant <value_int = 1> ()
        first = Sub(one, reach)
        seen = Trilu <upper = 1> (earlier, first)
        number = ReduceSum <keepdims = 1> (seen, any)
        means = Div(seen, number)
        mean = MatMul(means, u)
        sums = MatMul(n, u)
        told = ReduceSum <keepdims = 1> (n, any)
        scaled = Mul(sums, d)
        told_mass = Mul(told, d)
        lost = Sub(m, told_mass)
        back = Mul(lost, mean)
        products = Add(scaled, back)
        rows = Transpose <perm = [0, 3, 1, 2, 4]> (products)
        merged = Concat <axis = 0> (lead, any)
        y = Reshape(rows, merged)
    }}
    """


CODED_VALUES = register(
    OpSpec(
        target=torch.ops.ntc.coded_values.default,
        infer=_infer,
        count=_count,
        moves=_moves,
        kind="attention",
        onnx=_onnx(False) + _onnx(True),
    )
)
