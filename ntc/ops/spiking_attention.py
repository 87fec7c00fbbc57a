r"""Causal spiking self-attention (SSA): no softmax, only spikes counted.

Parallel over tokens, per head and time step (Spikformer SSA, Zhou et al. 2023, made causal by a 0/1 mask):

    Y_i = sum_{j <= i} (Q_i . K_j) V_j

Streaming, one token at a time, with a state per head and time step:

    M_i = M_{i-1} + K_i (x) V_i,        Y_i = Q_i M_i

Both are the same sum in another order. With binary or ternary Q, K, V every term is an integer, so in float32 both are
exact, and equal to the last bit, while ``|Y| <= L D < 2**24`` (and as long as nobody lowers torch's float32 matmul
precision). The normaliser is a separate op (``position_scale``).

For long texts the parallel kernel takes ``CHUNK`` tokens at a time and carries M from chunk to chunk: the same integers
again, with memory and work linear in L. The gradients are three more products of the same kind:

    dL/dQ_i = sum_{j <= i} (G_i . V_j) K_j,    dL/dK_j = sum_{i >= j} (V_j . G_i) Q_i,    dL/dV_j = sum_{i >= j} (K_j . Q_i) G_i

The kernel takes any leading axes: spikes ``[T, B, L, C]``, or firing rates ``[B, L, C]`` (then the products are those of
the mean rates, which the T-step form does not tend to: spikes of the same step meet each other).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops.attention import ONNX_MERGE, ONNX_SPLIT, merge_heads, split_heads
from ntc.ops.spec import Counts, Operand, OpSpec, TypeMismatch, register
from ntc.spike_type import ANALOG, Analog, CurrentType, NodeType, RateType, SpikeType

__all__ = ["CHUNK", "SPIKING_ATTENTION", "SPIKING_ATTENTION_STREAM", "spiking_attention", "spiking_attention_stream"]

CHUNK = 256
"""Tokens whose scores the parallel kernel holds at once."""


def _grouped(x: Tensor, heads: int, kv_heads: int) -> Tensor:
    return split_heads(x, kv_heads).repeat_interleave(heads // kv_heads, dim=-3)


@torch.library.custom_op("ntc::spiking_attention", mutates_args=())
def spiking_attention(query: Tensor, key: Tensor, value: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Causal SSA, parallel form (see the module's docstring).

    Args:
        query: Spikes ``[T, B, L, H D]``.
        key: Spikes ``[T, B, L, Hk D]``.
        value: Spikes ``[T, B, L, Hk Dv]``.
        heads: H.
        kv_heads: Hk; divides H.

    Returns:
        Spike counts ``[T, B, L, H Dv]``: integers for spikes.
    """
    q, k, v = split_heads(query, heads), _grouped(key, heads, kv_heads), _grouped(value, heads, kv_heads)
    rows: list[Tensor] = []
    memory: Tensor | None = None
    for start in range(0, max(q.shape[-2], 1), CHUNK):
        q_part, k_part, v_part = (x[..., start : start + CHUNK, :] for x in (q, k, v))
        y = (q_part @ k_part.transpose(-2, -1)).tril() @ v_part
        rows.append(y if memory is None else y + q_part @ memory)
        if start + CHUNK < q.shape[-2]:
            written = k_part.transpose(-2, -1) @ v_part
            memory = written if memory is None else memory + written
    return merge_heads(torch.cat(rows, dim=-2)).contiguous()


@spiking_attention.register_fake
def _fake(query: Tensor, key: Tensor, value: Tensor, heads: int, kv_heads: int) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1] // kv_heads * heads))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, ctx.heads, ctx.kv_heads = inputs
    ctx.save_for_backward(query, key, value)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The products of the module's docstring; a sum over later tokens is a causal one read backwards."""
    query, key, value = ctx.saved_tensors
    heads, kv_heads = ctx.heads, ctx.kv_heads

    def backwards(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        y: Tensor = spiking_attention(a.flip(-2), b.flip(-2), c.flip(-2), heads, heads)
        y = y.flip(-2)
        return y.reshape(*y.shape[:-1], kv_heads, heads // kv_heads, y.shape[-1] // heads).sum(-2).flatten(-2)

    k, v = (merge_heads(_grouped(x, heads, kv_heads)) for x in (key, value))
    return spiking_attention(grad, value, key, heads, kv_heads), backwards(v, grad, query), backwards(k, query, grad), None, None


spiking_attention.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("ntc::spiking_attention_stream", mutates_args=())
def spiking_attention_stream(
    query: Tensor, key: Tensor, value: Tensor, state: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor]:
    """Causal SSA, streaming form: the tokens given are the next ones of the sequence.

    Args:
        query: Spikes ``[T, B, L, H D]``, L >= 1 new tokens.
        key: Spikes ``[T, B, L, Hk D]``.
        value: Spikes ``[T, B, L, Hk Dv]``.
        state: M after the tokens so far, ``[T, B, Hk, D, Dv]``; zeros at the start.
        heads: H.
        kv_heads: Hk.

    Returns:
        Counts ``[T, B, L, H Dv]`` and the new state. Cost per token does not depend on the length so far.
    """
    q = split_heads(query, heads)
    k, v = split_heads(key, kv_heads), split_heads(value, kv_heads)
    memory, rows = state.clone(), []
    for i in range(query.shape[-2]):
        memory = memory + k[..., i, :].unsqueeze(-1) * v[..., i, :].unsqueeze(-2)
        spread = memory.repeat_interleave(heads // kv_heads, dim=-3)
        rows.append((q[..., i, :].unsqueeze(-2) @ spread).squeeze(-2))
    return merge_heads(torch.stack(rows, dim=-2)).contiguous(), memory.contiguous()


@spiking_attention_stream.register_fake
def _fake_stream(
    query: Tensor, key: Tensor, value: Tensor, state: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor]:
    return query.new_empty((*query.shape[:-1], value.shape[-1] // kv_heads * heads)), state.new_empty(state.shape)


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
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
    """Accumulates that the spikes cause, exactly.

    Parallel: each spike of Q_i reaches the i + 1 keys it sees; each non-zero score (an integer) is added to the active
    channels of V_j. Streaming: each coincidence of K_j and V_j changes one entry of M; each spike of Q_i adds one row of M.
    """
    query, key, value = (t.detach() for t in tensors[:3])
    heads, kv_heads = node.args[3], node.args[4]
    assert isinstance(heads, int) and isinstance(kv_heads, int)
    q, k, v = split_heads(query, heads), _grouped(key, heads, kv_heads), _grouped(value, heads, kv_heads)
    # Spikes of either sign per token, in float64: sums over a corpus exceed 2**24.
    q_spikes, k_spikes, v_spikes = (x.abs().sum(-1, dtype=torch.float64) for x in (q, k, v))
    position = torch.arange(1, q.shape[-2] + 1, dtype=torch.float64, device=q.device)
    values = 0.0
    for start in range(0, q.shape[-2], CHUNK):
        stop = min(start + CHUNK, q.shape[-2])
        # Signed: coincidences that cancel leave a score of zero, and nothing is added.
        scores = (q[..., start:stop, :] @ k[..., :stop, :].transpose(-2, -1)).tril(start)
        values += float(((scores != 0).sum(-2) * v_spikes[..., :stop]).sum())
    return {
        "scores": float((q_spikes * position).sum()),
        "values": values,
        "write": float((k_spikes * v_spikes).sum()) / (heads // kv_heads),  # one M per key head
        "read": float(q_spikes.sum()) * v.shape[-1],
    }


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    shape, width = operands[0].shape, operands[0].shape[-1] + result.shape[-1]
    length = shape[-2]
    is_spiking = isinstance(operands[0].type, SpikeType)
    # The dense computation that spikes replace is the one of a single pass, whatever T is.
    tokens = operands[0].numel // shape[-1] // (operands[0].type.steps if isinstance(operands[0].type, SpikeType) else 1)
    dense = tokens * length * width
    if not is_spiking:
        return Counts(dense_macs=dense, macs=tokens * (length + 1) / 2 * width)
    return Counts(dense_macs=dense, acs=measured["scores"] + measured["values"])


_ONNX = f"""
<domain: "ntc", opset_import: ["": 20]>
SpikingAttention <heads, kv_heads> (query, key, value) => (y)
{{{ONNX_SPLIT}
    causal = Trilu <upper = 0> (scores)
    products = MatMul(causal, v)
{ONNX_MERGE}}}
"""

SPIKING_ATTENTION = register(
    OpSpec(
        target=torch.ops.ntc.spiking_attention.default, infer=_infer, count=_count, measure=_measure,
        element="dynamic_product", kind="attention", onnx=_ONNX,
    )
)  # fmt: skip


def _infer_stream(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    """The type that both results have: ``Y`` and ``M`` are integers per time step. M may enter as a plain tensor of zeros."""
    result, state = _infer(node, type_of), node.args[3]
    assert isinstance(state, Node)
    given = type_of(state)
    if given != result and not isinstance(given, Analog):
        raise TypeMismatch(f"the state of spiking attention on {result} cannot be %{state.name}, which is {given}", state)
    return result


SPIKING_ATTENTION_STREAM = register(
    OpSpec(
        target=torch.ops.ntc.spiking_attention_stream.default, infer=_infer_stream, element="dynamic_product", kind="attention",
    )
)  # fmt: skip
