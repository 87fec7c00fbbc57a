r"""Causal spiking self-attention (SSA): no softmax, only spikes counted.

Parallel over tokens, per head and time step (Spikformer SSA, Zhou et al. 2023, made causal by a 0/1 mask):

    Y_i = sum_{j <= i} (Q_i . K_j) V_j

Streaming, one token at a time, with a state per head and time step:

    M_i = M_{i-1} + K_i (x) V_i,        Y_i = Q_i M_i

Both are the same sum in another order. With binary or ternary Q, K, V every term is an integer, so in float32 both are
exact, and equal to the last bit, while ``|Y| <= L D < 2**24`` (and as long as nobody lowers torch's float32 matmul
precision). The normaliser is a separate op (``position_scale``).

With a leak lambda in (0, 1], per head or per key channel, the memory forgets from token to token (retention: Sun et al. 2023,
arXiv 2307.08621; gated linear attention: Yang et al. 2023, arXiv 2312.06635):

    M_i = diag(lambda) M_{i-1} + K_i (x) V_i,        Y_i = sum_{j <= i} sum_d Q_id lambda_d^(i-j) K_jd V_j

The two forms then agree to rounding.

For long texts the parallel kernel takes some tokens at a time and carries M from chunk to chunk, with memory and work linear in
L: see ``causal_product``, which also has the gradients.

The kernel takes any leading axes: spikes ``[T, B, L, C]``, or firing rates ``[B, L, C]`` (then the products are those of
the mean rates, which the T-step form does not tend to: spikes of the same step meet each other).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.meta import TYPE
from ntc.ops.attention import ONNX_MERGE, ONNX_SIZES, ONNX_SPLIT
from ntc.ops.causal_product import Decay, causal_product, causal_product_from, causal_product_gradients, decay_of
from ntc.ops.events import scores_and_values, spikes_per_head
from ntc.ops.if_neuron import check_constant
from ntc.ops.spec import Counts, Operand, OpSpec, TypeMismatch, register
from ntc.ops.traffic import remembered, spiking_rows
from ntc.spike_type import ANALOG, Analog, CurrentType, NodeType, RateType, SpikeType

__all__ = [
    "CHANNEL_LEAK_CHUNK", "CHUNK", "HEAD_LEAK_CHUNK", "RECURRENT", "SPIKING_ATTENTION", "SPIKING_ATTENTION_STREAM",
    "spiking_attention", "spiking_attention_stream",
]  # fmt: skip

CHUNK = 128
"""Tokens whose scores the parallel kernel holds at once."""

HEAD_LEAK_CHUNK = 128
"""The same with one leak per head."""

CHANNEL_LEAK_CHUNK = 64
"""The same with one leak per key channel."""

RECURRENT = 16
"""Tokens that the streaming kernel takes one by one, without the tables that chunks need."""


def _check_leak(leak: Tensor | None, key: Tensor, kv_heads: int) -> None:
    """Refuse a leak that is not one number, one per key head or one per key channel. Looks at sizes only."""
    if leak is not None and (leak.dim() != 1 or all(leak.shape[0] != n for n in (1, kv_heads, key.shape[-1]))):
        raise ValueError(
            f"the leak of spiking attention has shape [1], [{kv_heads}] (one number per key head) or [{key.shape[-1]}] (one per key "
            f"channel), and not {list(leak.shape)}"
        )


def _wide(x: Tensor, leak: Tensor | None) -> Tensor:
    """Half precision has too few exponents for the powers of a leak."""
    return x.float() if leak is not None and x.dtype == torch.float16 else x


def _tables(leak: Tensor | None, query: Tensor, heads: int, kv_heads: int) -> tuple[int, Decay | None]:
    """The chunk and its powers of lambda."""
    if leak is None:
        return CHUNK, None
    chunk = min(HEAD_LEAK_CHUNK if leak.shape[0] in (1, kv_heads) else CHANNEL_LEAK_CHUNK, max(query.shape[-2], 1))
    return chunk, decay_of(leak, heads, kv_heads, chunk, query.dtype)


@torch.library.custom_op("ntc::spiking_attention", mutates_args=())
def spiking_attention(
    query: Tensor, key: Tensor, value: Tensor, heads: int, kv_heads: int, leak: Tensor | None = None
) -> Tensor:
    """Causal SSA, parallel form (see the module's docstring).

    Args:
        query: Spikes ``[T, B, L, H D]``.
        key: Spikes ``[T, B, L, Hk D]``.
        value: Spikes ``[T, B, L, Hk Dv]``.
        heads: H.
        kv_heads: Hk; divides H.
        leak: lambda in (0, 1], what is left of the memory after a token, ``[1]``, ``[Hk]`` or ``[Hk D]``; None = everything.

    Returns:
        Spike counts ``[T, B, L, H Dv]``: integers for spikes without a leak.

    Raises:
        ValueError: If the leak has another shape.
    """
    _check_leak(leak, key, kv_heads)
    q, k, v = (_wide(x, leak) for x in (query, key, value))
    return causal_product(q, k, v, heads, kv_heads, *_tables(leak, q, heads, kv_heads)).to(query.dtype)


@spiking_attention.register_fake
def _fake(query: Tensor, key: Tensor, value: Tensor, heads: int, kv_heads: int, leak: Tensor | None = None) -> Tensor:
    _check_leak(leak, key, kv_heads)
    return query.new_empty((*query.shape[:-1], value.shape[-1] // kv_heads * heads))


@torch.library.custom_op("ntc::spiking_attention_gradients", mutates_args=())
def _gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, heads: int, kv_heads: int, leak: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to query, key, value and leak (``[0]`` without one); an op, so that chunks are not traced one by one."""
    g, q, k, v = (_wide(x.to(query.dtype), leak) for x in (grad, query, key, value))
    *given, to_log = causal_product_gradients(g, q, k, v, heads, kv_heads, *_tables(leak, q, heads, kv_heads))
    to_leak = to_log if leak is None else (to_log.flatten().sum_to_size(leak.shape) / leak).to(leak.dtype)
    return given[0].to(query.dtype), given[1].to(key.dtype), given[2].to(value.dtype), to_leak


@_gradients.register_fake
def _fake_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, heads: int, kv_heads: int, leak: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    to_leak = query.new_empty(0) if leak is None else leak.new_empty(leak.shape)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), to_leak


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, ctx.heads, ctx.kv_heads, leak = inputs
    ctx.save_for_backward(query, key, value, leak)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *given, leak = ctx.saved_tensors
    to_query, to_key, to_value, to_leak = _gradients(grad, *given, ctx.heads, ctx.kv_heads, leak)
    return to_query, to_key, to_value, None, None, None if leak is None else to_leak


spiking_attention.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("ntc::spiking_attention_stream", mutates_args=())
def spiking_attention_stream(
    query: Tensor, key: Tensor, value: Tensor, state: Tensor, heads: int, kv_heads: int, leak: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Causal SSA, streaming form: the tokens given are the next ones of the sequence.

    A few tokens are taken one by one, many (a prompt) in chunks as by the parallel form.

    Args:
        query: Spikes ``[T, B, L, H D]``, L >= 1 new tokens.
        key: Spikes ``[T, B, L, Hk D]``.
        value: Spikes ``[T, B, L, Hk Dv]``.
        state: M after the tokens so far, ``[T, B, Hk, D, Dv]``, float32 or better; zeros at the start.
        heads: H.
        kv_heads: Hk.
        leak: As of the parallel form.

    Returns:
        Counts ``[T, B, L, H Dv]`` and the new state. Cost per token does not depend on the length so far.

    Raises:
        ValueError: If the leak has another shape.
    """
    _check_leak(leak, key, kv_heads)
    if query.shape[-2] > RECURRENT:
        q, k, v = (_wide(x, leak) for x in (query, key, value))
        y, memory = causal_product_from(state, q, k, v, heads, kv_heads, *_tables(leak, q, heads, kv_heads))
        return y.to(query.dtype), memory
    keep = None if leak is None else leak.reshape(1 if leak.shape[0] == 1 else kv_heads, -1, 1).to(state.dtype)
    k, v = (x.to(state.dtype).reshape(*x.shape[:-1], kv_heads, -1) for x in (key, value))
    q = query.to(state.dtype).reshape(*query.shape[:-1], kv_heads, heads // kv_heads, -1)
    memory, rows = state, []
    for i in range(query.shape[-2]):
        memory = memory if keep is None else memory * keep
        memory = torch.addcmul(memory, k[..., i, :, :, None], v[..., i, :, None, :])
        rows.append(q[..., i, :, :, :] @ memory)
    return torch.stack(rows, dim=-4).flatten(-3).to(query.dtype).contiguous(), memory.contiguous()


@spiking_attention_stream.register_fake
def _fake_stream(
    query: Tensor, key: Tensor, value: Tensor, state: Tensor, heads: int, kv_heads: int, leak: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _check_leak(leak, key, kv_heads)
    return query.new_empty((*query.shape[:-1], value.shape[-1] // kv_heads * heads)), state.new_empty(state.shape)


def _check_leak_value(node: Node, type_of: Callable[[Node], NodeType], position: int) -> None:
    """Refuse a leak that is no analog value, or a constant out of (0, 1]."""
    leak = node.args[position] if len(node.args) > position else node.kwargs.get("leak")
    if isinstance(leak, Node) and not isinstance(type_of(leak), Analog):
        raise TypeMismatch(f"the leak of spiking attention is an analog value, and %{leak.name} is {type_of(leak)}", leak)
    check_constant(node, leak, lambda x: (x > 0) & (x <= 1), "a leak is what is left after a token and lies in (0, 1]")


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    _check_leak_value(node, type_of, 5)
    return _products(node, type_of)


def _products(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    arguments = [a for a in node.args[:3] if isinstance(a, Node)]
    given = [type_of(a) for a in arguments]
    if all(isinstance(t, RateType) for t in given):
        return ANALOG
    for argument, value in zip(arguments, given, strict=True):
        if not isinstance(value, SpikeType) or value.levels == "graded":
            raise TypeMismatch(f"spiking attention takes binary or ternary spikes, and %{argument.name} is {value}", argument)
    first = given[0]
    assert isinstance(first, SpikeType)
    for argument, value in zip(arguments[1:], given[1:], strict=True):
        assert isinstance(value, SpikeType)
        if (value.steps, value.code) != (first.steps, first.code):
            raise TypeMismatch(
                f"spiking attention multiplies spikes of the same step: %{arguments[0].name} is {first}, "
                f"%{argument.name} is {value}", argument,
            )  # fmt: skip
    return CurrentType(first.steps, first.code)


def _measure(tensors: Sequence[Tensor], result: Tensor, node: Node) -> dict[str, float]:
    """Operations that the spikes cause, exactly.

    Parallel: each spike of Q_i reaches the i + 1 keys it sees (``scores``); each non-zero score is added to the active channels of
    V_j (``values``). A leak multiplies each non-zero score, or, per channel, each coincidence of Q_i and K_j (``decays``).
    Streaming: each coincidence of K_j and V_j changes one entry of M (``write``); each spike of Q_i adds one row of M (``read``); a
    leak multiplies the whole of M (``leak``).
    """
    heads, kv_heads = node.args[3], node.args[4]
    assert isinstance(heads, int) and isinstance(kv_heads, int)
    query, key, value = (t.detach().float() for t in tensors[:3])
    leak = tensors[3] if len(tensors) > 3 else None
    q, k, v = _per_head(tensors, node, heads, kv_heads)
    per_channel = leak is not None and leak.shape[0] not in (1, kv_heads)
    values, scores, coincidences = scores_and_values(query, key, v, heads, kv_heads, per_channel)
    entries = float(key.numel() * (value.shape[-1] // kv_heads))
    leaking = {} if leak is None else {"decays": coincidences if per_channel else scores, "leak": entries}
    position = torch.arange(1, query.shape[-2] + 1, dtype=torch.float64, device=query.device)
    scored = float(position @ q.sum(-1).flatten(0, -2).sum(0, dtype=torch.float64))
    return {"scores": scored, "values": values, **_stream_work(q, k, v, value.shape[-1] // kv_heads), **leaking}


def _per_head(tensors: Sequence[Tensor], node: Node, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Spikes of Q, K and V per token and head."""
    kinds = [a.meta.get(TYPE) for a in node.args[:3] if isinstance(a, Node)]
    query, key, value = (kind.levels if isinstance(kind, SpikeType) else "ternary" for kind in kinds)  # which are binary ones, too
    q, k, v = (t.detach() for t in tensors[:3])
    return spikes_per_head(q, heads, query), spikes_per_head(k, kv_heads, key), spikes_per_head(v, kv_heads, value)


def _stream_work(query: Tensor, key: Tensor, value: Tensor, width: int) -> dict[str, float]:
    """Additions that spikes cause in the streaming form, from their numbers per token and head; there is one M per key head, of ``width``
    columns.
    """
    return {"write": float((key * value).sum(dtype=torch.float64)), "read": float(query.sum(dtype=torch.float64)) * width}


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    shape, width = operands[0].shape, operands[0].shape[-1] + result.shape[-1]
    length = shape[-2]
    is_spiking = isinstance(operands[0].type, SpikeType)
    # The dense computation that spikes replace is the one of a single pass, whatever T is.
    tokens = operands[0].numel // shape[-1] // (operands[0].type.steps if isinstance(operands[0].type, SpikeType) else 1)
    dense = tokens * length * width
    if is_spiking:
        return Counts(dense_macs=dense, acs=measured["scores"] + measured["values"], macs=measured.get("decays", 0.0))
    seen = tokens * (length + 1) / 2
    decayed = 0
    if len(operands) > 3:
        heads, kv_heads = node.args[3], node.args[4]
        assert isinstance(heads, int)
        decayed = heads if operands[3].numel in (1, kv_heads) else shape[-1]
    return Counts(dense_macs=dense, macs=seen * (width + decayed))


_ONNX_SCAN = """
    numbers = Shape(leak)
    rows = Min(numbers, hk)
    decay_shape = Concat <axis = 0> (rows, any, single)
    decay = Reshape(leak, decay_shape)
    end, counts = Scan <
        num_scan_inputs = 3, scan_input_axes = [1, 1, 1], scan_output_axes = [1],
        body = token (m, q, k, v) => (m_next, counted) {{
        kept = Mul(m, decay)
        column = Transpose <perm = [0, 1, 3, 2]> (k)
        written = Mul(column, v)
        m_next = Add(kept, written)
        counted = MatMul(q, m_next)
    }}> ({start}, query_split, key_split, value_split)
    merged = Concat <axis = 0> (lead, any)
    y = Reshape(counts, merged)
"""
_ONNX = f"""
<domain: "ntc", opset_import: ["": 20]>
SpikingAttention <heads, kv_heads> (query, key, value) => (y)
{{{ONNX_SPLIT}
    causal = Trilu <upper = 0> (scores)
    products = MatMul(causal, v)
{ONNX_MERGE}}}

<domain: "ntc", overload: "leak", opset_import: ["": 20]>
SpikingAttention <heads, kv_heads> (query, key, value, leak) => (y)
{{{ONNX_SIZES}
    key_sizes = Shape(key_split)
    batch = Slice(key_sizes, axis, single)
    state_shape = Concat <axis = 0> (batch, hk, key_size, value_size)
    nought_value = Constant <value_float = 0.0> ()
    nought = CastLike(nought_value, query)
    empty = Expand(nought, state_shape)
{_ONNX_SCAN.format(start="empty")}
}}
"""
# With a leak the function is the streaming form: one body for a leak per head and per channel, and no power of a leak.

SPIKING_ATTENTION = register(
    OpSpec(
        target=torch.ops.ntc.spiking_attention.default, infer=_infer, count=_count, moves=spiking_rows, measure=_measure,
        element="dynamic_product", kind="attention", onnx=_ONNX,
    )
)  # fmt: skip


def _infer_stream(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    """The type that both results have: ``Y`` and ``M`` are integers per time step. M may enter as a plain tensor of zeros."""
    _check_leak_value(node, type_of, 6)
    result, state = _products(node, type_of), node.args[3]
    assert isinstance(state, Node)
    given = type_of(state)
    if given != result and not isinstance(given, Analog):
        raise TypeMismatch(f"the state of spiking attention on {result} cannot be %{state.name}, which is {given}", state)
    return result


def _measure_stream(tensors: Sequence[Tensor], result: Tensor, node: Node) -> dict[str, float]:
    """As ``_measure``, of this form alone; a leak multiplies the whole of M at every token and step."""
    heads, kv_heads = node.args[4], node.args[5]
    assert isinstance(heads, int) and isinstance(kv_heads, int)
    width = tensors[2].shape[-1] // kv_heads
    leaking = {"leak": float(tensors[1].numel() * width)} if len(tensors) > 4 else {}
    return {**_stream_work(*_per_head(tensors, node, heads, kv_heads), width), **leaking}


def _count_stream(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    query, key = operands[0], operands[1]
    heads, kv_heads = node.args[4], node.args[5]
    assert isinstance(heads, int) and isinstance(kv_heads, int)
    entries = key.numel * (result.shape[-1] // heads)  # of M, over tokens and steps: each is written once ...
    dense = entries + query.numel * (result.shape[-1] // heads)  # ... and read by each query head
    if isinstance(query.type, SpikeType):
        return Counts(dense_macs=dense / query.type.steps, acs=measured["write"] + measured["read"], macs=measured.get("leak", 0.0))
    return Counts(dense_macs=dense, macs=dense + (entries if len(operands) > 4 else 0))


_ONNX_STREAM = f"""
<domain: "ntc", opset_import: ["": 20]>
SpikingAttentionStream <heads, kv_heads> (query, key, value, state) => (y, state_next)
{{{ONNX_SPLIT}
    state_shape = Concat <axis = 0> (any, hk, single, key_size, value_size)
    start = Reshape(state, state_shape)
    causal = Trilu <upper = 0> (scores)
    within = MatMul(causal, v)
    before = MatMul(q, start)
    products = Add(within, before)
{ONNX_MERGE}
    written = MatMul(kt, v)
    after = Add(start, written)
    whole_state = Shape(state)
    state_next = Reshape(after, whole_state)
}}

<domain: "ntc", overload: "leak", opset_import: ["": 20]>
SpikingAttentionStream <heads, kv_heads> (query, key, value, state, leak) => (y, state_next)
{{{ONNX_SIZES}
    state_shape = Concat <axis = 0> (any, hk, key_size, value_size)
    start = Reshape(state, state_shape)
{_ONNX_SCAN.format(start="start")}
    whole_state = Shape(state)
    state_next = Reshape(end, whole_state)
}}
"""
SPIKING_ATTENTION_STREAM = register(
    OpSpec(
        target=torch.ops.ntc.spiking_attention_stream.default, infer=_infer_stream, count=_count_stream, moves=remembered,
        measure=_measure_stream, element="dynamic_product", kind="attention", onnx=_ONNX_STREAM,
    )
)  # fmt: skip
