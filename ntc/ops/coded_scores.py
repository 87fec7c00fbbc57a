r"""Scores of causal attention on spikes: the first of its two products as an op of its own, so that anything may stand behind it.

    Q = d^Q sum_t w(t) q(t),  K likewise                                  trains [T, B, L, C], a step per token and head, or known
    S_ij = scale Q_i . K_j   for j <= i, and i - w < j with a window of w;   minus infinity elsewhere        [B, H L, L]

Each spike of Q_i adds the stored K_j of every key that it meets: accumulates. K is stored as the whole numbers that its spikes count. It is
``ntc::causal_scores`` of what the trains decode to, and ``ntc::coded_values`` is the other product; between them stands a softmax, of
few-spikes neurons (``spike-functions``) or on the host. ``ntc::coded_attention`` is all of it in one op, with its softmax on the host.

Gradients are those of ``ntc::causal_scores``, every step of a train has the share of its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops.coded_attention import check_step, train_gradients
from ntc.ops.digit_neuron import spread
from ntc.ops.open_attention import masked_scores, onnx_scores, score_gradients
from ntc.ops.spec import Counts, Operand, OpSpec, Traffic, TypeMismatch, register
from ntc.ops.spike_linear import ONNX_SUM, fitted_train, weighted
from ntc.ops.traffic import causal, values
from ntc.spike_type import ANALOG, Analog, NodeType

__all__ = ["CODED_SCORES", "all_analog", "check_heads", "check_table", "coded_scores"]


def check_heads(heads: int, kv_heads: int) -> None:
    """Refuse heads that are no groups.

    Raises:
        ValueError: If they are not.
    """
    if heads % kv_heads:
        raise ValueError(f"{kv_heads} key heads do not divide {heads} query heads")


def check_table(name: str, table: Tensor, train: Tensor) -> None:
    """Refuse weights that are not one for each time step of a train.

    Raises:
        ValueError: If they are not.
    """
    if table.dim() != 1 or table.shape[0] != train.shape[0]:
        raise ValueError(f"{name} of {train.shape[0]} time steps have shape [{train.shape[0]}], and not {list(table.shape)}")


def all_analog(op: str, arguments: Sequence[Node], type_of: Callable[[Node], NodeType]) -> NodeType:
    """The type of an op whose other arguments are all analog, or a mismatch."""
    for argument in arguments:
        if not isinstance(type_of(argument), Analog):
            raise TypeMismatch(f"steps, sums and tables of {op} are analog, and %{argument.name} is {type_of(argument)}", argument)
    return ANALOG


@torch.library.custom_op("ntc::coded_scores", mutates_args=())
def coded_scores(
    query: Tensor, key: Tensor, query_step: Tensor, key_step: Tensor, weights: Tensor, heads: int, kv_heads: int, scale: float, window: int,
    per_token: bool = False,
) -> Tensor:  # fmt: skip
    """Scores of causal attention on digits (see the module's docstring).

    Args:
        query: Digits ``[T, B, L, H D]``.
        key: ``[T, B, L, Hk D]``.
        query_step: ``[B, L, H]`` per token, else ``[1]`` or ``[H D]``.
        key_step: ``[B, L, Hk]``, or ``[1]`` or ``[Hk D]``.
        weights: w, ``[T]``.
        heads: H.
        kv_heads: Hk; divides H.
        scale: Factor of the scores.
        window: w, most tokens that a token sees, itself among them; 0 = all.
        per_token: Whether the steps are made while the network runs.

    Returns:
        ``[B, H L, L]``, minus infinity for what a token does not see.

    Raises:
        ValueError: If an argument has another shape.
    """
    _check(query, key, query_step, key_step, weights, heads, kv_heads, per_token)
    q, k = weighted(query, weights), weighted(key, weights)
    return masked_scores(q * spread(query_step, q), k * spread(key_step, k), heads, kv_heads, scale, window)


def _check(
    query: Tensor, key: Tensor, query_step: Tensor, key_step: Tensor, weights: Tensor, heads: int, kv_heads: int, per_token: bool
) -> None:
    check_heads(heads, kv_heads)
    for name, train, step, groups in (("queries", query, query_step, heads), ("keys", key, key_step, kv_heads)):
        check_table(f"weights of {name}", weights, train)
        check_step(name, train, step, groups, per_token)


@coded_scores.register_fake
def _fake(
    query: Tensor, key: Tensor, query_step: Tensor, key_step: Tensor, weights: Tensor, heads: int, kv_heads: int, scale: float, window: int,
    per_token: bool = False,
) -> Tensor:  # fmt: skip
    _check(query, key, query_step, key_step, weights, heads, kv_heads, per_token)
    length = query.shape[-2]
    return query.new_empty((*query.shape[1:-2], heads * length, length))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.numbers = inputs[5:9]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    query, key, query_step, key_step, weights = ctx.saved_tensors
    q, k = weighted(query, weights), weighted(key, weights)
    to_q, to_k = score_gradients(grad, q * spread(query_step, q), k * spread(key_step, k), *ctx.numbers)
    to_query, to_query_step = train_gradients(to_q, q, query_step, weights)
    to_key, to_key_step = train_gradients(to_k, k, key_step, weights)
    return to_query, to_key, to_query_step, to_key_step, *[None] * 6


coded_scores.register_autograd(_backward, setup_context=_setup)


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    query, key, *others = [a for a in node.args if isinstance(a, Node)]
    first, second = (fitted_train(a, type_of, "coded_scores") for a in (query, key))
    if first.steps != second.steps:
        raise TypeMismatch(f"queries have T={first.steps} time steps, and %{key.name} is {second}", key)
    return all_analog("coded_scores", others, type_of)


def _measure(tensors: Sequence[Tensor], result: Tensor, node: Node) -> dict[str, float]:
    """Spikes of Q times the keys that they meet."""
    window = node.args[8]
    assert isinstance(window, int)
    per_token = tensors[0].abs().sum((0, -1), dtype=torch.float64)  # [B, L]
    seen = torch.arange(1, per_token.shape[-1] + 1, dtype=torch.float64, device=per_token.device)
    return {"meetings": float((per_token * (seen.clamp(max=window) if window else seen)).sum())}


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    """An accumulate for each spike of Q and key that it meets. Elementwise: decoding keys and scaling queries, the sum of a pair from step
    to step, and once more by its steps.
    """
    query, key = operands[:2]
    heads, window = node.args[5], node.args[8]
    assert isinstance(heads, int) and isinstance(window, int)
    tokens = query.numel // query.shape[0] // query.shape[-1]
    pairs = tokens * heads * causal(query.shape[-2], window)
    return Counts(
        dense_macs=tokens * query.shape[-2] * query.shape[-1], acs=measured["meetings"],
        elementwise=query.numel + key.numel + (query.shape[0] + 1) * pairs,
    )  # fmt: skip


def _moves(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Traffic:
    """Each spike of Q reads an entry of a stored key per key that it meets; keys are written once, scores are used where they are made."""
    query, key = operands[:2]
    written = key.numel // key.shape[0]
    total = Traffic(cache=measured["meetings"] + written) + values(query) + values(key)
    for step in operands[2:4]:
        if len(step.shape) > 1:  # made while the network runs
            total = total + values(step)
    return total


def _known(name: str, per_token: bool) -> str:
    """``known_{name}``: what a train decodes to times its step, in the text of ONNX functions."""
    if not per_token:
        return f"known_{name} = Mul({name}_value, {name}_step)"
    return f"""
        known_{name}_heads = Shape({name}_step)
        known_{name}_rest = Constant <value_ints = [-1]> ()
        known_{name}_split = Concat <axis = 0> (known_{name}_heads, known_{name}_rest)
        known_{name}_parts = Reshape({name}_value, known_{name}_split)
        known_{name}_column = Unsqueeze({name}_step, known_{name}_rest)
        known_{name}_scaled = Mul(known_{name}_parts, known_{name}_column)
        known_{name}_whole = Shape({name}_value)
        known_{name} = Reshape(known_{name}_scaled, known_{name}_whole)
    """


def _onnx(per_token: bool) -> str:
    return f"""
    <domain: "ntc", overload: "{"per_token" if per_token else ""}", opset_import: ["": 20]>
    CodedScores <heads, kv_heads, scale, window, per_token> (query, key, query_step, key_step, weights) => (scores)
    {{
        {ONNX_SUM.format("query", "weights")}
        {ONNX_SUM.format("key", "weights")}
        {_known("query", per_token)}
        {_known("key", per_token)}
        {onnx_scores("known_query", "known_key")}
    }}
    """


CODED_SCORES = register(
    OpSpec(
        target=torch.ops.ntc.coded_scores.default, infer=_infer, count=_count, moves=_moves, measure=_measure,
        kind="attention", onnx=_onnx(False) + _onnx(True),
    )
)  # fmt: skip
