r"""A linear layer that reads digits: what spikes with weights of their own are worth behind a matrix.

    y = d (sum_t w(t) W s(t)) + c

A spike adds or takes away a column of W; from step to step what has been summed is scaled by ``w(t) / w(t+1)``, a shift in base 2, and once
a token the step d comes in, if it was measured there (``[B, L, 1]``); a step that is known is in W already, ``W diag(d)``.

The kernel brings the sum over t in front of the product, ``W (sum_t w(t) s(t))``: the same number to rounding, for the price of one product
and not of T. What is counted are the spikes: ``dense_macs`` once, an accumulate for each spike and row of W.

    %s = ntc.digit_neuron(%x, %d, w, theta)
    %y = ntc.spike_linear(%s, w, W, %d, c)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.meta import TYPE
from ntc.ops.events import products_with_zero_weights
from ntc.ops.spec import Counts, Operand, OpSpec, Traffic, TypeMismatch, register
from ntc.ops.traffic import constants, tokens_of, values
from ntc.spike_type import ANALOG, Analog, NodeType, SpikeType

__all__ = ["ONNX_SUM", "SPIKE_LINEAR", "fitted_train", "spike_linear", "weighted"]


def weighted(train: Tensor, weights: Tensor) -> Tensor:
    """``sum_t w(t) s(t)``, from ``[T, ...]`` to ``[...]``."""
    value: Tensor = torch.mv(train.reshape(train.shape[0], -1).T, weights.to(train.dtype)).reshape(train.shape[1:])
    return value


def _check(spikes: Tensor, weights: Tensor, matrix: Tensor, step: Tensor | None, bias: Tensor | None) -> None:
    if weights.dim() != 1 or weights.shape[0] != spikes.shape[0]:
        raise ValueError(f"weights of {spikes.shape[0]} time steps have shape [{spikes.shape[0]}], and not {list(weights.shape)}")
    if matrix.dim() != 2 or matrix.shape[1] != spikes.shape[-1]:
        raise ValueError(f"a matrix that reads {spikes.shape[-1]} neurons has shape [N, {spikes.shape[-1]}], and not {list(matrix.shape)}")
    if step is not None and (step.dim() != spikes.dim() - 1 or step.shape[-1] != 1):
        raise ValueError(f"the step of a token has shape {[*spikes.shape[1:-1], 1]}, and not {list(step.shape)}")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != matrix.shape[0]):
        raise ValueError(f"a bias has shape [{matrix.shape[0]}], and not {list(bias.shape)}")


@torch.library.custom_op("ntc::spike_linear", mutates_args=())
def spike_linear(spikes: Tensor, weights: Tensor, matrix: Tensor, step: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """A linear layer on a train of weighted spikes (see the module's docstring).

    Args:
        spikes: Digits ``[T, ..., C]`` in {-1, 0, 1}.
        weights: w, ``[T]``.
        matrix: W, ``[N, C]``.
        step: d, ``[..., 1]``; None = it is in W.
        bias: c, ``[N]``.

    Returns:
        ``[..., N]``, analog.

    Raises:
        ValueError: If an argument has another shape.
    """
    _check(spikes, weights, matrix, step, bias)
    value = weighted(spikes, weights)
    y = torch.nn.functional.linear(value if step is None else value * step, matrix, bias)
    return y.contiguous()


@spike_linear.register_fake
def _fake(spikes: Tensor, weights: Tensor, matrix: Tensor, step: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    _check(spikes, weights, matrix, step, bias)
    return spikes.new_empty((*spikes.shape[1:-1], matrix.shape[0]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    spikes, weights, matrix, step, _ = inputs
    reread = any(ctx.needs_input_grad[1:4])  # a train is the largest tensor of a network: it is kept only for what needs it
    ctx.save_for_backward(spikes if reread else None, weights, matrix, step)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Only what is asked for: where only the spikes' gradients are wanted, that of the matrix would double the work."""
    spikes, weights, matrix, step = ctx.saved_tensors
    given = (*ctx.needs_input_grad, False, False)[:5]  # torch leaves out what a call leaves to its default
    wanted = dict(zip(("spikes", "weights", "matrix", "step", "bias"), given, strict=True))
    to_scaled = grad @ matrix
    to_value = to_scaled if step is None else to_scaled * step
    to_spikes = to_weights = to_matrix = to_step = to_bias = None
    if wanted["spikes"]:
        to_spikes = weights.to(grad.dtype).reshape(-1, *[1] * grad.dim()) * to_value
    if wanted["weights"]:
        to_weights = torch.mv(spikes.flatten(1), to_value.flatten()).to(weights.dtype)
    if wanted["matrix"] or wanted["step"]:
        value = weighted(spikes, weights)
        if wanted["matrix"]:
            to_matrix = grad.flatten(0, -2).T @ (value if step is None else value * step).flatten(0, -2)
        if wanted["step"]:
            to_step = (to_scaled * value).sum(-1, keepdim=True)
    if wanted["bias"]:
        to_bias = grad.flatten(0, -2).sum(0)
    return to_spikes, to_weights, to_matrix, to_step, to_bias


spike_linear.register_autograd(_backward, setup_context=_setup)


def fitted_train(node: Node, type_of: Callable[[Node], NodeType], what: str) -> SpikeType:
    """The type of a train of digits, or a mismatch: neurons fitted to a function have weights of their own, too, and binary spikes."""
    given = type_of(node)
    if not isinstance(given, SpikeType) or given.code != "fitted" or given.levels != "ternary":
        raise TypeMismatch(f"{what} reads spikes of digit neurons, and %{node.name} is {given}", node)
    return given


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    spikes, *others = [a for a in node.args if isinstance(a, Node)]
    fitted_train(spikes, type_of, "spike_linear")
    for other in others:
        if not isinstance(type_of(other), Analog):
            raise TypeMismatch(f"weights, matrix, step and bias of a linear layer are analog, and %{other.name} is {type_of(other)}", other)
    return ANALOG


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    """Sums are scaled once per step and result: elementwise."""
    spikes, rows = operands[0], operands[2].shape[0]
    steps = spikes.shape[0]
    scaled = result.numel * (steps - 1 + sum(isinstance(a, Node) for a in node.args[3:]))
    return Counts(dense_macs=spikes.numel // steps * rows, acs=spikes.nonzero * rows, elementwise=scaled)


def _measure(tensors: Sequence[Tensor], result: Tensor, node: Node) -> dict[str, float]:
    return {"zero_weight_acs": products_with_zero_weights(tensors[0], tensors[2])}


def _moves(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Traffic:
    """Each spike reads a column of the matrix; a step is read once per token, a bias too."""
    spikes, weights, matrix = operands[:3]
    named = dict(zip(("step", "bias"), (*node.args[3:], None, None), strict=False))
    rest = iter(operands[3:])
    own = {name: next(rest) for name, given in named.items() if isinstance(given, Node)}
    kind = node.args[0].meta.get(TYPE, spikes.type) if isinstance(node.args[0], Node) else spikes.type
    tokens = tokens_of(spikes, kind)
    total = Traffic(weights=spikes.nonzero * matrix.shape[0], sweep=tokens * matrix.numel) + values(spikes) + values(result)
    total = total + constants(tokens, [weights, *([own["bias"]] if "bias" in own else [])])
    return total + values(own["step"]) if "step" in own else total


ONNX_SUM = """
    {0}_train_shape = Shape({0})
    {0}_steps = Shape <end = 1> ({0})
    {0}_rest = Shape <start = 1> ({0})
    {0}_any = Constant <value_ints = [-1]> ()
    {0}_flat_shape = Concat <axis = 0> ({0}_steps, {0}_any)
    {0}_flat = Reshape({0}, {0}_flat_shape)
    {0}_sum = MatMul({1}, {0}_flat)
    {0}_value = Reshape({0}_sum, {0}_rest)
"""
"""``{0}_value``, the weighted sum of the train {0} with the weights {1}, in the text of ONNX functions."""


def _onnx(has_step: bool, has_bias: bool) -> str:
    words = ".".join(word for word, on in (("bias", has_bias), ("step", has_step)) if on)
    inputs = ", ".join(["spikes", "weights", "matrix", *["step"] * has_step, *["bias"] * has_bias])
    return f"""
    <domain: "ntc", overload: "{words}", opset_import: ["": 20]>
    SpikeLinear ({inputs}) => (y)
    {{
        {ONNX_SUM.format("spikes", "weights")}
        {"value = Mul(spikes_value, step)" if has_step else "value = Identity(spikes_value)"}
        columns = Transpose <perm = [1, 0]> (matrix)
        {"product = MatMul(value, columns)  y = Add(product, bias)" if has_bias else "y = MatMul(value, columns)"}
    }}
    """


SPIKE_LINEAR = register(
    OpSpec(
        target=torch.ops.ntc.spike_linear.default, infer=_infer, count=_count, moves=_moves, measure=_measure, element="projection",
        kind="projection", onnx="".join(_onnx(s, b) for s in (False, True) for b in (False, True)),
    )
)  # fmt: skip
