r"""Causal spiking self-attention on integers, with a leak that is applied lazily: once in R tokens.

A leak lambda per head would multiply every entry of the memory M at every token, and rounding there would make the parallel and the
streaming form differ. Instead keys are written with growing weight while the memory stays as it is, and once in R tokens the memory is
renewed. For the token at position i, with ``r = i mod R``, per key head h and time step t:

    if r = 0 and i > 0:  M = round(M renewal_h / 2^shift)          renewal_h / 2^shift ~ lambda^R
    M   = M + growth[h, r] outer(K_i, V_i)                         growth[h, r] ~ g lambda^-r
    Y_i = Q_i M                                                    the retained sum of spiking attention is lambda^r / g times that

The factor ``lambda^r / g`` is part of the multiplier of the ``requantize`` behind. Between two renewals products are exact, so all their
tokens are taken at once:

    Y_a = Q_a M + sum_{b <= a} growth[h, b] (Q_a . K_b) V_b

and the renewal, one rounding in R tokens, is the same in both forms: they agree to the last bit. Without a leak there is no renewal,
R = 1 and growth = 1: the op counts as ``ntc::spiking_attention`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops.attention import merge_heads, split_heads
from ntc.ops.if_neuron import check_constant
from ntc.ops.integer import (
    MOST_SHIFT,
    as_int32,
    check_integers,
    check_shift,
    exact_matmul,
    holds_integers,
    integer_constants,
    largest,
    round_shift,
)
from ntc.ops.interval import Bound, Inside, Integers, Interval
from ntc.ops.spec import Counts, Operand, OpSpec, Traffic, TypeMismatch, register
from ntc.ops.spiking_attention import SPIKING_ATTENTION, SPIKING_ATTENTION_STREAM
from ntc.ops.traffic import spiking_rows, tokens_of, values
from ntc.spike_type import INTEGER, CurrentType, NodeType, SpikeType

__all__ = ["CHUNK", "INTEGER_ATTENTION", "INTEGER_ATTENTION_STREAM", "integer_attention", "integer_attention_stream"]

CHUNK = 128
"""Most tokens whose scores the parallel kernel holds at once; a divisor of every longer renewal period."""


def _check(
    query: Tensor, key: Tensor, value: Tensor, heads: int, kv_heads: int, growth: Tensor, renewal: Tensor | None, shift: int
) -> None:
    check_integers(query=query, key=key, value=value, growth=growth, renewal=renewal)
    check_shift(shift)
    if growth.dim() != 2 or growth.shape[0] not in (1, kv_heads) or growth.shape[1] & (growth.shape[1] - 1) or not growth.shape[1]:
        raise ValueError(f"growth has shape [1, R] or [{kv_heads}, R] with R a power of two, and not {list(growth.shape)}")
    if renewal is None and growth.shape[1] != 1:
        raise ValueError(f"growth over R = {growth.shape[1]} tokens needs a renewal; without one R = 1")
    if renewal is not None and (renewal.dim() != 1 or renewal.shape[0] not in (1, kv_heads)):
        raise ValueError(f"the renewal has shape [1] or [{kv_heads}], one number per key head, and not {list(renewal.shape)}")


def _check_position(position: Tensor) -> None:
    if tuple(position.shape) != (1,) or position.dtype != torch.int64:
        raise ValueError(f"the number of tokens so far is one int64 number, shape [1], and not {position.dtype} of {list(position.shape)}")


def _renewed(memory: Tensor, renewal: Tensor, shift: int) -> Tensor:
    """M of ``[..., Hk, D, Dv]``, int64."""
    return round_shift(memory * renewal.to(torch.int64).view(-1, 1, 1), shift)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """Repeat key heads for the query heads that share them."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=-3)


@torch.library.custom_op("ntc::integer_attention", mutates_args=())
def integer_attention(
    query: Tensor, key: Tensor, value: Tensor, heads: int, kv_heads: int, growth: Tensor, renewal: Tensor | None, shift: int
) -> Tensor:
    """Causal SSA on integers, parallel form (see the module's docstring).

    Args:
        query: Spikes ``[T, B, L, H D]``, integers.
        key: Spikes ``[T, B, L, Hk D]``.
        value: Spikes ``[T, B, L, Hk Dv]``.
        heads: H.
        kv_heads: Hk; divides H.
        growth: Weight of a key by its position in the renewal period, ``[Hk, R]`` or ``[1, R]``, R a power of two.
        renewal: What is left of the memory after R tokens, times ``2^shift``, ``[Hk]`` or ``[1]``; None = everything.
        shift: Binary places of the renewal, 0 to 62.

    Returns:
        Counts ``[T, B, L, H Dv]``, int32.

    Raises:
        ValueError: For shapes and dtypes that do not fit, or counts that int32 does not hold.
    """
    _check(query, key, value, heads, kv_heads, growth, renewal, shift)
    return _run(query, key, value, None, heads, kv_heads, growth, renewal, shift, 0)[0]


def _run(
    query: Tensor, key: Tensor, value: Tensor, state: Tensor | None, heads: int, kv_heads: int, growth: Tensor, renewal: Tensor | None,
    shift: int, position: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Counts, and M after the last token; the tokens stand behind ``position`` others, after which M is ``state``."""
    period, length, groups = growth.shape[1], query.shape[-2], heads // kv_heads
    size = CHUNK if renewal is None else min(period, CHUNK)
    q, k, v = split_heads(query, heads), split_heads(key, kv_heads), split_heads(value, kv_heads)
    # What one key can add to a count, and to an entry of the memory.
    written = largest(key) * largest(value)
    scored = largest(query) * key.shape[-1] // kv_heads
    memory = torch.zeros((*k.shape[:-2], k.shape[-1], v.shape[-1]), dtype=torch.int64, device=query.device)
    memory = memory if state is None else state.to(torch.int64)
    counts = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=torch.int64, device=query.device)
    for start, stop in pairwise([0, *range(size - position % size, length, size), length]):  # chunks end where periods do
        first = (position + start) % period
        weight = growth[:, first : first + stop - start] if renewal is not None else growth.expand(-1, stop - start)
        sum_of_weights = int(weight.abs().sum(1, dtype=torch.int64).max())
        if renewal is not None and first == 0 and position + start:
            memory = _renewed(memory, renewal, shift)
        q_part, k_part, v_part = (x[..., start:stop, :] for x in (q, k, v))
        grown = k_part.to(torch.int64) * weight.to(torch.int64).unsqueeze(-1)  # [..., Hk, c, D]
        scores = exact_matmul(q_part, _grouped(grown, groups).mT, scored * largest(key) * largest(weight)).tril_()
        inner = exact_matmul(scores, _grouped(v_part, groups), scored * written * sum_of_weights)
        if position + start:
            inner += exact_matmul(q_part, _grouped(memory, groups), scored * largest(memory))
        counts[..., start:stop, :] = inner
        if stop < length or state is not None:
            memory = memory + exact_matmul(grown.mT, v_part, written * sum_of_weights)
    return as_int32(merge_heads(counts), "a count of spiking attention").contiguous(), memory


@integer_attention.register_fake
def _fake(
    query: Tensor, key: Tensor, value: Tensor, heads: int, kv_heads: int, growth: Tensor, renewal: Tensor | None, shift: int
) -> Tensor:
    _check(query, key, value, heads, kv_heads, growth, renewal, shift)
    return query.new_empty((*query.shape[:-1], value.shape[-1] // kv_heads * heads), dtype=torch.int32)


@torch.library.custom_op("ntc::integer_attention_stream", mutates_args=())
def integer_attention_stream(
    query: Tensor, key: Tensor, value: Tensor, state: Tensor, heads: int, kv_heads: int, growth: Tensor, renewal: Tensor | None,
    shift: int, position: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Causal SSA on integers, streaming form: the tokens given are the next ones of the sequence.

    Args:
        query: Spikes ``[T, B, L, H D]``, L >= 1 new tokens.
        key: Spikes ``[T, B, L, Hk D]``.
        value: Spikes ``[T, B, L, Hk Dv]``.
        state: M after the tokens so far, ``[T, B, Hk, D, Dv]``, int32; zeros at the start.
        heads: H.
        kv_heads: Hk.
        growth: As of the parallel form.
        renewal: As of the parallel form.
        shift: As of the parallel form.
        position: Number of tokens so far, int64 ``[1]``.

    Returns:
        Counts ``[T, B, L, H Dv]`` and the new state, int32. Cost per token does not depend on the length so far.

    Raises:
        ValueError: As the parallel form, or for a state that int32 does not hold.
    """
    _check(query, key, value, heads, kv_heads, growth, renewal, shift)
    _check_position(position)
    counts, memory = _run(query, key, value, state, heads, kv_heads, growth, renewal, shift, int(position))
    return counts, as_int32(memory, "the memory of spiking attention").contiguous()


@integer_attention_stream.register_fake
def _fake_stream(
    query: Tensor, key: Tensor, value: Tensor, state: Tensor, heads: int, kv_heads: int, growth: Tensor, renewal: Tensor | None,
    shift: int, position: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(query, key, value, heads, kv_heads, growth, renewal, shift)
    _check_position(position)
    counts = query.new_empty((*query.shape[:-1], value.shape[-1] // kv_heads * heads), dtype=torch.int32)
    return counts, state.new_empty(state.shape, dtype=torch.int32)


def _products(node: Node, type_of: Callable[[Node], NodeType]) -> CurrentType:
    """Three trains of integer spikes of as many steps."""
    first: SpikeType | None = None
    for argument in node.args[:3]:
        assert isinstance(argument, Node)
        given = type_of(argument)
        if not isinstance(given, SpikeType) or given.levels == "graded" or given.code != "count" or not holds_integers(argument):
            raise TypeMismatch(
                f"{node.target} takes binary or ternary integer spikes of the count code, and %{argument.name} is {given}", argument
            )
        first = first or given
        if given.steps != first.steps:
            raise TypeMismatch(
                f"spiking attention multiplies spikes of the same step: T={first.steps}, and %{argument.name} is {given}", argument
            )
    assert first is not None
    return CurrentType(first.steps, "count")


def _constants(node: Node, growth: int) -> None:
    integer_constants(node, growth, growth + 1)
    check_constant(node, node.args[growth], lambda x: x > 0, "keys are written with a weight > 0")
    shift = node.args[growth + 2]
    assert isinstance(shift, int)
    whole = 1 << min(shift, MOST_SHIFT)

    def kept(renewal: Tensor) -> Tensor:
        wide = renewal.to(torch.int64)  # int32 cannot be compared with 2^36
        return (wide >= 0) & (wide <= whole)

    check_constant(node, node.args[growth + 1], kept, f"a renewal by 2^-{shift} keeps 0 to 2^{shift}")


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    _constants(node, 5)
    return _products(node, type_of)


def _measure(tensors: Sequence[Tensor], result: Tensor, node: Node) -> dict[str, float]:
    """Operations that the spikes cause, as of ``ntc::spiking_attention``; a renewal multiplies the whole of M once in R tokens."""
    assert SPIKING_ATTENTION.measure is not None
    query, key, value, growth = tensors[:4]
    found = SPIKING_ATTENTION.measure([x.to(torch.float32) for x in (query, key, value)], result, node)
    if len(tensors) > 4:
        kv_heads = node.args[4]
        assert isinstance(kv_heads, int)
        found["leak"] = _renewed_entries(key, value, kv_heads, growth.shape[1], 0)
    return found


def _renewed_entries(key: Tensor, value: Tensor, kv_heads: int, period: int, position: int) -> float:
    """Entries of all memories that renewals multiply at tokens ``position`` ... ``position + L - 1``; there is none at token 0."""
    renewals = (position + key.shape[-2] - 1) // period - (max(position, 1) - 1) // period
    memories = key.numel() // key.shape[-1] // key.shape[-2]  # time steps and sequences
    return float(memories * renewals * key.shape[-1] * (value.shape[-1] // kv_heads))


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    """The weight of a key is a constant of its position: it is added, not multiplied. Renewals multiply the memory."""
    shape, kind = operands[0].shape, operands[0].type
    assert isinstance(kind, SpikeType)
    tokens = operands[0].numel // shape[-1] // kind.steps
    dense = tokens * shape[-2] * (shape[-1] + result.shape[-1])
    return Counts(dense_macs=dense, acs=measured["scores"] + measured["values"], macs=measured.get("leak", 0.0))


def _written(operands: Sequence[Operand], growth: Operand) -> Traffic:
    """The weights that keys are written with: one per token and head."""
    query = operands[0]
    read = tokens_of(query, query.type) * growth.shape[0]
    return Traffic(weights=read, sweep=read)


def _moves(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Traffic:
    """As of ``ntc::spiking_attention``; a renewal reads and writes the whole of M."""
    rows = spiking_rows(node, operands[:3], result, measured)
    return rows + _written(operands, operands[3]) + Traffic(state=2 * measured.get("leak", 0.0))


def _peak(weights: Sequence[int], renewal: int | None, shift: int, context: int) -> tuple[int, int]:
    """Largest ``|M|`` of one head, and the largest that a renewal multiplies, after ``context`` tokens (0 = not limited)."""
    if renewal is None or (renewal == 1 << shift and not context):
        return sum(weights) * (context or 1 << 31), 0
    period, whole, half = len(weights), 1 << shift, (1 << shift) >> 1
    if not context:  # the fixed point of M = M renewal / whole + 1/2 + sum of weights
        most = (2 * sum(weights) + 1) * whole // (2 * (whole - renewal))
        return most, most
    peak, renewed = sum(weights[:context]), 0
    for done in range(period, context, period):
        before, renewed = peak, max(renewed, peak)
        peak = max(peak, (peak * renewal + half >> shift) + sum(weights[: context - done]))
        if peak == before:
            break
    return peak, renewed


def _fires(x: Interval, heads: int) -> Integers:
    """Per head and channel 1 if it can be other than 0, ``[heads, D]``."""
    active: Integers = ((x.low != 0) | (x.high != 0)).astype(int).astype(object).reshape(heads, -1)
    return active


def _bound(
    node: Node, context: int, query: Interval, key: Interval, value: Interval, heads: int, kv_heads: int, growth: Tensor,
    renewal: Tensor | None, shift: int,
) -> Bound:  # fmt: skip
    """The recursion of M, over the renewals of a whole context or to its fixed point; the count reads D rows of it."""
    weights = growth.expand(kv_heads, -1).tolist()
    kept = [None] * kv_heads if renewal is None else renewal.expand(kv_heads).tolist()
    peaks = [_peak(w, k, shift, context) for w, k in zip(weights, kept, strict=True)]
    memory, renewed = max(p[0] for p in peaks), max(p[1] for p in peaks)
    groups = heads // kv_heads
    rows = (_fires(query, heads) * _fires(key, kv_heads).repeat(groups, axis=0)).sum(1)
    most = np.array([p[0] for p in peaks], dtype=object).repeat(groups) * rows
    count = (most[:, None] * _fires(value, kv_heads).repeat(groups, axis=0)).flatten()
    signed = min(x.ends[0] for x in (query, key, value)) < 0
    result = Interval(-count if signed else count * 0, count)
    entry = Interval.of(-memory if signed else 0, memory)
    remedy = "use fewer bits for growth" if context or renewal is not None else "state the model's context: without one M grows for ever"
    inside = [Inside.over("memory", entry, 32, remedy), Inside.over("count", result, 32, remedy)]
    if renewal is not None:
        product = renewed * max(kept) + ((1 << shift) >> 1)
        interval = Interval.of(-product if signed else 0, product)
        inside.append(Inside.over("memory times renewal", interval, 63, "use a smaller shift of the renewal"))
    return Bound(result, tuple(inside))


INTEGER_ATTENTION = register(
    OpSpec(
        target=torch.ops.ntc.integer_attention.default, infer=_infer, count=_count, moves=_moves, measure=_measure,
        element="dynamic_product", kind="attention", bound=_bound,
    )
)  # fmt: skip


def _infer_stream(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    """The type that both results have. M may enter as a plain tensor of zeros."""
    _constants(node, 6)
    result, state = _products(node, type_of), node.args[3]
    assert isinstance(state, Node)
    if type_of(state) not in (result, INTEGER):
        raise TypeMismatch(f"the state of spiking attention on {result} cannot be %{state.name}, which is {type_of(state)}", state)
    return result


def _measure_stream(tensors: Sequence[Tensor], result: Tensor, node: Node) -> dict[str, float]:
    """As of ``ntc::spiking_attention_stream``; a renewal multiplies the whole of M at the first token of each period but token 0."""
    assert SPIKING_ATTENTION_STREAM.measure is not None
    query, key, value, _, growth, *more = tensors
    found = SPIKING_ATTENTION_STREAM.measure([x.to(torch.float32) for x in (query, key, value)], result, node)
    if len(more) > 1:
        kv_heads = node.args[5]
        assert isinstance(kv_heads, int)
        found["leak"] = _renewed_entries(key, value, kv_heads, growth.shape[1], int(more[-1]))
    return found


def _count_stream(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    assert SPIKING_ATTENTION_STREAM.count is not None
    return SPIKING_ATTENTION_STREAM.count(node, operands, result, measured)


def _moves_stream(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Traffic:
    state = measured["read"] + 2 * measured["write"] + 2 * measured.get("leak", 0.0)
    given = values(operands[0]) + values(operands[1]) + values(operands[2]) + values(result)
    return given + _written(operands, operands[4]) + Traffic(state=state)


def _bound_stream(
    node: Node, context: int, query: Interval, key: Interval, value: Interval, state: None, heads: int, kv_heads: int, growth: Tensor,
    renewal: Tensor | None, shift: int, position: None,
) -> Bound:  # fmt: skip
    """Wherever tokens begin, their memory is one that the parallel form goes through; the state behind them is one more."""
    parallel = _bound(node, context, query, key, value, heads, kv_heads, growth, renewal, shift)
    memory = parallel.inside[0]
    return Bound(parallel.result, parallel.inside, (Interval.of(memory.low, memory.high),))


INTEGER_ATTENTION_STREAM = register(
    OpSpec(
        target=torch.ops.ntc.integer_attention_stream.default, infer=_infer_stream, count=_count_stream, moves=_moves_stream,
        measure=_measure_stream, element="dynamic_product", kind="attention", bound=_bound_stream,
    )
)  # fmt: skip
