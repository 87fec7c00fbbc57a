r"""Causal softmax attention whose two products are made of spikes.

Queries, keys, values and the softmax's numerators are coded by digit neurons (``ntc.ops.digit_neuron``), so that neither product multiplies
two activations:

    Q = d^Q sum_t w(t) q(t),  K, V likewise                                trains [T, B, L, C], a step per token and head, or known
    S_ij = scale Q_i . K_j                                                 each spike of Q_i adds the stored K_j: accumulates
    e_ij = exp(S_ij - max_j S_ij),   j <= i                                the analog island
    p_ij = digits of e_ij a_j, step max_j(e_ij a_j) / N,  a_j = d^V_j      neurons [T', H, L, L], all on the positive side
    P_ij = sum_t w'(t) p_ij(t),   E_ij = e_ij a_j in the same steps        each spike adds the stored V_j / a_j, and 1
    r_i  = sum_j (E_ij - P_ij) / i                                         what coding has lost, spread over the keys of the row
    y_i  = (sum_j P_ij V_j / a_j + r_i sum_j V_j / a_j) / (sum_j E_ij / a_j)

K and V are stored as the whole numbers that their spikes count; so the cache is one of small integers. What is coded is ``e a`` and not
e: the error of a numerator counts as much as the value that it is multiplied with is large, and tokens that attention rests on when it
has nothing to do have large numerators and small values (attention sinks). Where the steps of V are known, ``a = 1``.

Most numerators are small, and what is below half a step is lost, always on one side. ``r_i`` gives the row back what it has lost in all,
evenly: one running sum of the values, ``sum_{j<=i} V_j / a_j``, and one product per result. The sum below the fraction is that of the
softmax itself, and the step of a row cancels. In steps of the row, with ``u_j = V_j / a_j``, the error is at most

    |y_i - exact| <= (sum_j |u_j - mean_{j<=i} u| / 2) / sum_j E_ij / a_j       beside those of Q, K and V

Small numerators are silent: most of a row is. Events per numerator are what makes this product cheap; ``ntc energy`` measures them.

Gradients are straight through: those of ``ntc::attention`` at the decoded Q, K and V.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops.attention import attention_gradients, merge_heads, split_heads
from ntc.ops.digit_neuron import ONNX_DIGITS, spread
from ntc.ops.spec import Counts, Operand, OpSpec, Traffic, TypeMismatch, register
from ntc.ops.spike_linear import ONNX_SUM, fitted_train, weighted
from ntc.ops.traffic import causal, values
from ntc.spike_type import ANALOG, Analog, NodeType

__all__ = ["CODED_ATTENTION", "check_step", "coded_attention", "coded_probabilities", "train_gradients"]

_TRAINS, _STEPS, _TABLES = slice(0, 3), slice(3, 6), slice(6, 9)


def _check(trains: Sequence[Tensor], steps: Sequence[Tensor], tables: Sequence[Tensor], heads: int, kv_heads: int, per_token: bool) -> None:
    weights, levels, thresholds = tables
    if weights.dim() != 1 or weights.shape[0] != trains[0].shape[0]:
        raise ValueError(f"weights of {trains[0].shape[0]} time steps have shape [{trains[0].shape[0]}], and not {list(weights.shape)}")
    if levels.dim() != 1 or levels.shape != thresholds.shape:
        shapes = f"{list(levels.shape)} and {list(thresholds.shape)}"
        raise ValueError(f"weights and thresholds of the numerators have shape [T], and not {shapes}")
    if heads % kv_heads:
        raise ValueError(f"{kv_heads} key heads do not divide {heads} query heads")
    for name, train, step, groups in zip(("queries", "keys", "values"), trains, steps, (heads, kv_heads, kv_heads), strict=True):
        check_step(name, train, step, groups, per_token)


def check_step(name: str, train: Tensor, step: Tensor, groups: int, per_token: bool) -> None:
    """Refuse a step that a train of queries, keys or values ``[T, B, L, H D]`` cannot have.

    Raises:
        ValueError: If it has another shape.
    """
    wanted = [[*train.shape[1:-1], groups]] if per_token else [[1], [train.shape[-1]]]
    if list(step.shape) not in wanted:
        raise ValueError(f"steps of the {name} have shape {' or '.join(map(str, wanted))}, and not {list(step.shape)}")


def _digits(x: Tensor, levels: Sequence[float], thresholds: Sequence[float], count: bool) -> tuple[Tensor, float]:
    """Coded x >= 0 in steps, and the number of its spikes if they are counted."""
    left, spikes = x.clone(), 0.0
    for w, theta in zip(levels, thresholds, strict=True):
        fired = torch.nn.functional.hardshrink(left, theta)
        spikes += float(fired.count_nonzero()) if count else 0.0
        left.sub_(fired.sign_(), alpha=w)
    return x - left, spikes


def _below(thresholds: Tensor, dtype: torch.dtype) -> list[float]:
    """The numbers that a membrane has to exceed: one floating-point step below each threshold."""
    at = thresholds.to(dtype)
    return torch.nextafter(at, torch.zeros_like(at)).tolist()


def coded_probabilities(
    scores: Tensor, sizes: Tensor, levels: Tensor, thresholds: Tensor, count: bool = False
) -> tuple[Tensor, Tensor, float]:
    """Numerators, as they are and as their spikes tell them, and the spikes.

    Args:
        scores: S, ``[..., L, L]``, minus infinity for j > i.
        sizes: a, ``[..., 1, L]``.
        levels: w', ``[T']``.
        thresholds: theta', ``[T']``.
        count: Whether to count spikes.

    Returns:
        E and P, ``[..., L, L]`` in steps of the row, and the number of spikes.
    """
    numerators = (scores - scores.amax(-1, keepdim=True)).exp_() * sizes
    numerators *= levels.sum().to(scores.dtype) / numerators.amax(-1, keepdim=True)
    return numerators, *_digits(numerators, levels.tolist(), _below(thresholds, scores.dtype), count)


@torch.library.custom_op("ntc::coded_attention", mutates_args=())
def coded_attention(
    query: Tensor, key: Tensor, value: Tensor, query_step: Tensor, key_step: Tensor, value_step: Tensor, weights: Tensor, levels: Tensor,
    thresholds: Tensor, heads: int, kv_heads: int, scale: float, per_token: bool = False,
) -> Tensor:  # fmt: skip
    """Causal softmax attention on spikes (see the module's docstring).

    Args:
        query: Digits ``[T, B, L, H D]``.
        key: ``[T, B, L, Hk D]``.
        value: ``[T, B, L, Hk Dv]``.
        query_step: ``[B, L, H]`` per token, else ``[1]`` or ``[H D]``.
        key_step: ``[B, L, Hk]``, or ``[1]`` or ``[Hk D]``.
        value_step: ``[B, L, Hk]``, or ``[1]`` or ``[Hk Dv]``.
        weights: w of the three trains, ``[T]``.
        levels: w' of the numerators, ``[T']``.
        thresholds: theta', ``[T']``.
        heads: H.
        kv_heads: Hk; divides H.
        scale: Factor of the scores.
        per_token: Whether the steps are made while the network runs.

    Returns:
        y, ``[B, L, H Dv]``.

    Raises:
        ValueError: If an argument has another shape.
    """
    _check((query, key, value), (query_step, key_step, value_step), (weights, levels, thresholds), heads, kv_heads, per_token)
    return _run((query, key, value, query_step, key_step, value_step, weights, levels, thresholds, heads, kv_heads, scale, per_token))


def _heads(
    query: Tensor, key: Tensor, value: Tensor, query_step: Tensor, key_step: Tensor, value_step: Tensor, weights: Tensor, levels: Tensor,
    thresholds: Tensor, heads: int, kv_heads: int, scale: float, per_token: bool = False, count: bool = False,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]]:  # fmt: skip
    """E, P, the sum below the fraction, values, means of the values up to each token, and spikes; one head at a time, whose scores stay in
    the cache of a core.
    """
    q, k, v = weighted(query, weights), weighted(key, weights), weighted(value, weights)
    q, k = split_heads(q * spread(query_step, q), heads) * scale, split_heads(k * spread(key_step, k), kv_heads)
    sizes = value_step.transpose(-1, -2).unsqueeze(-2) if per_token else None  # [B, Hk, 1, L]
    v = split_heads(v if per_token else v * value_step, kv_heads)
    length, group = q.shape[-2], heads // kv_heads
    hidden = torch.full((length, length), float("-inf"), dtype=q.dtype, device=q.device).triu_(1)
    means = v.cumsum(-2) / torch.arange(1, length + 1, dtype=q.dtype, device=q.device).unsqueeze(-1)
    for head in range(heads):
        own = head // group
        scores = (q[..., head, :, :] @ k[..., own, :, :].transpose(-1, -2)).add_(hidden)
        a = torch.ones((), dtype=q.dtype, device=q.device) if sizes is None else sizes[..., own, :, :]
        exact, coded, found = coded_probabilities(scores, a, levels, thresholds, count)
        below = exact.sum(-1, keepdim=True) if sizes is None else exact @ a.reciprocal().transpose(-1, -2)
        yield exact, coded, below, v[..., own, :, :], means[..., own, :, :], found


def _run(arguments: tuple[Any, ...]) -> Tensor:
    results = []
    for exact, coded, below, v, means, _ in _heads(*arguments):
        lost = exact.sum(-1, keepdim=True) - coded.sum(-1, keepdim=True)
        results.append((coded @ v + lost * means) / below)
    return merge_heads(torch.stack(results, -3)).contiguous()


def _one_spike(arguments: Sequence[Any], result: Tensor) -> Tensor:
    """How far one spike of a numerator's last digit, fired or not, moves each result: ``max_{j<=i} |u_j - mean u|`` over the sum below."""
    found = []
    for _, _, below, v, means, _ in _heads(*arguments):
        found.append(torch.maximum(v.cummax(-2).values - means, means - v.cummin(-2).values) / below)
    return merge_heads(torch.stack(found, -3)).contiguous()


@coded_attention.register_fake
def _fake(
    query: Tensor, key: Tensor, value: Tensor, query_step: Tensor, key_step: Tensor, value_step: Tensor, weights: Tensor, levels: Tensor,
    thresholds: Tensor, heads: int, kv_heads: int, scale: float, per_token: bool = False,
) -> Tensor:  # fmt: skip
    _check((query, key, value), (query_step, key_step, value_step), (weights, levels, thresholds), heads, kv_heads, per_token)
    return query.new_empty((*query.shape[1:-1], value.shape[-1] // kv_heads * heads))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.heads, ctx.kv_heads, ctx.scale = inputs[9:12]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *trains, query_step, key_step, value_step, weights = ctx.saved_tensors
    sums, steps = [weighted(train, weights) for train in trains], (query_step, key_step, value_step)
    query, key, value = (x * spread(step, x) for x, step in zip(sums, steps, strict=True))
    given = attention_gradients(grad, query, key, value, ctx.heads, ctx.kv_heads, ctx.scale)
    found = [train_gradients(to_x, x, step, weights) for to_x, x, step in zip(given, sums, steps, strict=True)]
    return *(to_train for to_train, _ in found), *(to_step for _, to_step in found), *[None] * 7


def train_gradients(grad: Tensor, whole: Tensor, step: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients with respect to a train of digits and its step, from that of what it decodes to.

    Args:
        grad: With respect to ``d sum_t w(t) s(t)``, ``[B, L, C]``.
        whole: ``sum_t w(t) s(t)``.
        step: d, ``[1]``, ``[C]`` or ``[B, L, G]``.
        weights: w, ``[T]``.
    """
    to_train = weights.to(grad.dtype).reshape(-1, *[1] * grad.dim()) * (grad * spread(step, whole))
    to_step = grad * whole
    if step.dim() > 1:
        to_step = to_step.reshape(*step.shape, -1).sum(-1)
    return to_train, to_step.sum_to_size(step.shape)


coded_attention.register_autograd(_backward, setup_context=_setup)


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    arguments = [a for a in node.args if isinstance(a, Node)]
    first, *others = [fitted_train(a, type_of, "coded_attention") for a in arguments[_TRAINS]]
    for argument, kind in zip(arguments[1:3], others, strict=True):
        if kind.steps != first.steps:
            raise TypeMismatch(f"queries have T={first.steps} time steps, and %{argument.name} is {kind}", argument)
    for argument in arguments[3:]:
        if not isinstance(type_of(argument), Analog):
            raise TypeMismatch(f"steps and tables of coded_attention are analog, and %{argument.name} is {type_of(argument)}", argument)
    return ANALOG


def _measure(tensors: Sequence[Tensor], result: Tensor, node: Node) -> dict[str, float]:
    """Spikes of Q times the keys that they meet, and spikes of the numerators, which the result does not show."""
    query = tensors[0]
    per_token = query.abs().sum((0, -1), dtype=torch.float64)  # [B, L]
    seen = torch.arange(1, query.shape[-2] + 1, dtype=torch.float64, device=query.device)
    numbers: tuple[Any, ...] = (*node.args[9:], False)[:4]
    given: tuple[Any, ...] = (*tensors[:9], *numbers, True)
    spikes = sum(found for *_, found in _heads(*given))
    return {"meetings": float((per_token * seen).sum()), "numerator_spikes": spikes}


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    """Q: an accumulate for each spike and key that it meets. Numerators: neurons of their own, Dv + 1 accumulates per spike. Softmax, the
    decoding of the trains, the running sum of the values, and a product, a sum and a division per result are elementwise.
    """
    query, key, value = operands[_TRAINS]
    steps, batch, length, width = query.shape
    heads, kv_heads = node.args[9:11]
    assert isinstance(heads, int) and isinstance(kv_heads, int)
    tokens, places = batch * length, batch * length * causal(length) * heads
    head = value.shape[-1] // kv_heads
    digits = operands[7].shape[0]
    decoded = query.numel + key.numel + value.numel
    return Counts(
        dense_macs=tokens * length * (width + heads * head), acs=measured["meetings"] + measured["numerator_spikes"] * (head + 1),
        neuron_updates=places * digits, spikes=measured["numerator_spikes"], neurons=places,
        elementwise=decoded + places * 5 + steps * places + value.numel // steps + result.numel * (digits + 3),
    )  # fmt: skip


def _moves(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Traffic:
    """Each spike of Q reads an entry of a stored key per key that it meets, each spike of a numerator a row of stored values; keys and
    values are written once, membranes of the numerators are read and written at each step.
    """
    query, key, value = operands[_TRAINS]
    kv_heads = node.args[10]
    assert isinstance(kv_heads, int)
    heads = node.args[9]
    assert isinstance(heads, int)
    tokens = query.numel // query.shape[0] // query.shape[-1]
    updates = tokens * causal(query.shape[-2]) * heads * operands[7].shape[0]
    read = measured["meetings"] + measured["numerator_spikes"] * (value.shape[-1] // kv_heads + 1)
    written = tokens * (key.shape[-1] + value.shape[-1])
    total = Traffic(cache=read + written, membranes=2 * updates) + values(query) + values(key) + values(value) + values(result)
    for step in operands[_STEPS]:
        if len(step.shape) > 1:
            total = total + values(step)
    return total


def _onnx(per_token: bool) -> str:
    split = {name: f"""
        {ONNX_SUM.format(name, "weights")}
        {name}_hd = Constant <value_int: int = @{"heads" if name == "query" else "kv_heads"}> ()
        {name}_h = Unsqueeze({name}_hd, zero_axis)
        {name}_batch = Shape <start = 1, end = 3> ({name})
        {name}_split_shape = Concat <axis = 0> ({name}_batch, {name}_h, any)
        {"".join((f"{name}_parts = Reshape({name}_value, {name}_split_shape)  {name}_column = Unsqueeze({name}_step, any)",
                  "" if name == "value" else f"  {name}_scaled = Mul({name}_parts, {name}_column)")) if per_token else
         f"{name}_known = Mul({name}_value, {name}_step)  {name}_scaled = Reshape({name}_known, {name}_split_shape)"}
    """ for name in ("query", "key", "value")}  # fmt: skip
    rows = "value_parts" if per_token else "value_scaled"
    sizes = """
        a_rows = Transpose <perm = [0, 2, 1]> (value_step)
        a_axes = Constant <value_ints = [2, 3]> ()
        a = Unsqueeze(a_rows, a_axes)
        weighed = Mul(numerators, a)
    """
    under = """
        inverse = Reciprocal(a)
        shares = Mul(x, inverse)
        under = ReduceSum <keepdims = 1> (shares, any)
    """
    return f"""
    <domain: "ntc", overload: "{"per_token" if per_token else ""}", opset_import: ["": 20]>
    CodedAttention <heads, kv_heads, scale, per_token>
        (query, key, value, query_step, key_step, value_step, weights, levels, thresholds) => (y)
    {{
        zero_axis = Constant <value_ints = [0]> ()
        any = Constant <value_ints = [-1]> ()
        {split["query"]}{split["key"]}{split["value"]}
        heads_of_key = Constant <value_int: int = @kv_heads> ()
        heads_of_query = Constant <value_int: int = @heads> ()
        group_size = Div(heads_of_query, heads_of_key)
        hk = Unsqueeze(heads_of_key, zero_axis)
        group = Unsqueeze(group_size, zero_axis)
        one_axis = Constant <value_ints = [1]> ()
        grouped_shape = Concat <axis = 0> (query_batch, hk, group, any)
        single_shape = Concat <axis = 0> (query_batch, hk, one_axis, any)
        q_grouped = Reshape(query_scaled, grouped_shape)
        k_single = Reshape(key_scaled, single_shape)
        v_single = Reshape({rows}, single_shape)
        q = Transpose <perm = [0, 2, 3, 1, 4]> (q_grouped)
        kt = Transpose <perm = [0, 2, 3, 4, 1]> (k_single)
        v = Transpose <perm = [0, 2, 3, 1, 4]> (v_single)
        factor_value = Constant <value_float: float = @scale> ()
        factor = CastLike(factor_value, q)
        q_factor = Mul(q, factor)
        products = MatMul(q_factor, kt)
        hidden_value = Constant <value_float = -inf> ()
        hidden = CastLike(hidden_value, q)
        length = Shape <start = 1, end = 2> (query_value)
        square = Concat <axis = 0> (length, length)
        all_hidden = Expand(hidden, square)
        diagonal = Constant <value_int = 1> ()
        mask = Trilu <upper = 1> (all_hidden, diagonal)
        scores = Add(products, mask)
        top = ReduceMax <keepdims = 1> (scores, any)
        lowered = Sub(scores, top)
        numerators = Exp(lowered)
        {sizes if per_token else "weighed = Identity(numerators)"}
        largest = ReduceMax <keepdims = 1> (weighed, any)
        whole = ReduceSum <keepdims = 0> (levels)
        unit = Div(whole, largest)
        x = Mul(weighed, unit)
        v0 = Identity(x)
        {ONNX_DIGITS.replace("(v0, weights", "(v0, levels")}
        {ONNX_SUM.format("spikes", "levels")}
        coded = Identity(spikes_value)
        {under if per_token else "under = ReduceSum <keepdims = 1> (x, any)"}
        above = MatMul(coded, v)
        all_exact = ReduceSum <keepdims = 1> (x, any)
        all_coded = ReduceSum <keepdims = 1> (coded, any)
        missing = Sub(all_exact, all_coded)
        first = Constant <value_int = 0> ()
        single = Constant <value_int = 1> ()
        rows = Squeeze(length)
        positions = Range(first, rows, single)
        next_positions = Add(positions, single)
        seen = CastLike(next_positions, x)
        seen_column = Unsqueeze(seen, any)
        lost = Div(missing, seen_column)
        token_axis = Constant <value_int = 3> ()
        running = CumSum(v, token_axis)
        given_back = Mul(lost, running)
        whole_sums = Add(above, given_back)
        quotient = Div(whole_sums, under)
        back = Transpose <perm = [0, 3, 1, 2, 4]> (quotient)
        lead = Shape <end = 2> (query_value)
        merged = Concat <axis = 0> (lead, any)
        y = Reshape(back, merged)
    }}
    """


CODED_ATTENTION = register(
    OpSpec(
        target=torch.ops.ntc.coded_attention.default, infer=_infer, count=_count, moves=_moves, measure=_measure, element="host",
        kind="attention", onnx=_onnx(False) + _onnx(True), one_spike=_one_spike,
    )
)  # fmt: skip
