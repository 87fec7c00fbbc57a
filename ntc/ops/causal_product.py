r"""Causal products in chunks, with or without forgetting: the arithmetic of spiking attention and of its gradients.

Per head, with a decay ``lambda_d`` in (0, 1] (1 = nothing is forgotten):

    M_i = diag(lambda) M_{i-1} + K_i (x) V_i,    Y_i = Q_i M_i = sum_{j <= i} sum_d Q_id lambda_d^(i-j) K_jd V_j

(retention: Sun et al. 2023, arXiv 2307.08621; gated linear attention: Yang et al. 2023, arXiv 2312.06635). Of a chunk of c
tokens, numbered a, b = 0..c-1, that starts with the state M:

    Y_a = sum_{b <= a} A_ab V_b + sum_d lambda_d^(a+1) Q_ad M_d,    A_ab = sum_d Q_ad lambda_d^(a-b) K_bd
    M'  = diag(lambda^c) M + sum_b (lambda^(c-1-b) K_b) (x) V_b

With one lambda per head A is the scores times a matrix of decays, and nothing is divided. With one per channel the powers go to
the factors, centred at the middle m of the chunk: ``(Q_ad lambda_d^(a-m)) (K_bd lambda_d^(m-b))``. Gradients, with ``G = dL/dY``,
``S_ab = G_a . V_b`` for b <= a, and R, the gradient of the state that leaves the chunk:

    dQ_a = sum_b S_ab (lambda^(a-b) K_b) + lambda^(a+1) (M G_a)      dK_b = sum_a S_ab (lambda^(a-b) Q_a) + lambda^(c-1-b) (R V_b)
    dV_b = sum_a A_ab G_a + (lambda^(c-1-b) K_b) R                   R'   = diag(lambda^c) R + sum_a (lambda^(a+1) Q_a) (x) G_a
    dL/dlog lambda_d = sum_ab (a-b) S_ab Q_ad lambda_d^(a-b) K_bd + sum_a (a+1) Q_ad dQ'_ad + sum_b (c-1-b) K_bd dK'_bd
                       + c lambda_d^c sum_e M_de R_de                 (dQ', dK': the parts of dQ and dK that come through M and R)

The last is ``sum_i i dQ_i Q_i - sum_j j dK_j K_j`` over the sequence, written with distances in place of positions: the difference of
two large sums would drown in their rounding errors when little is remembered.

States and tables of powers are float32 or better, products are taken in the dtype of the inputs. Powers are made in float64 and
rounded once, so no error grows with the distance i - j. In a table centred at m <= 8 the smallest lambda whose powers fit into
float32 is about 2**-15 = 3e-5; a smaller one counts as that (what it leaves out is less than 3e-5 of a neighbouring token).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Decay", "causal_product", "causal_product_gradients", "decay_of"]

_SMALLEST = 2.0**-15
"""Of a decay per channel: its 8th power and the reciprocal of that are normal float32 numbers."""


@dataclass(frozen=True)
class Decay:
    """Powers of lambda for chunks of one size.

    Attributes:
        number: 0..chunk - 1.
        powers: ``lambda ** n`` for n = 0..chunk, ``[H, chunk + 1, 1]`` or ``[H, chunk + 1, D]``.
        matrix: ``lambda ** (a - b)`` for b <= a, else 0, ``[H, chunk, chunk]``; None if lambda is per channel.
        centred: ``lambda ** (a - chunk // 2)`` and the reciprocals, ``[H, chunk, D]``; None if lambda is per head.
    """

    number: Tensor
    powers: Tensor
    matrix: Tensor | None
    centred: tuple[Tensor, Tensor] | None


def decay_of(leak: Tensor, heads: int, kv_heads: int, chunk: int, dtype: torch.dtype) -> Decay:
    """Tables for one leak.

    Args:
        leak: lambda, ``[1]``, ``[Hk]`` or ``[Hk D]``.
        heads: H.
        kv_heads: Hk.
        chunk: Tokens per chunk.
        dtype: Of the tables.
    """
    rows = kv_heads if leak.shape[0] != 1 else 1
    wide = leak.detach().double().reshape(rows, -1).expand(kv_heads, -1).repeat_interleave(heads // kv_heads, dim=0)  # [H, D or 1]
    per_channel = wide.shape[1] > 1
    if per_channel:
        wide = wide.clamp(min=_SMALLEST)
    number = torch.arange(chunk + 1, dtype=torch.float64, device=leak.device)
    powers = wide.unsqueeze(1) ** number[:, None]
    if per_channel:
        centre = number[:-1] - chunk // 2
        up = wide.unsqueeze(1) ** centre[:, None]
        return Decay(number[:-1].to(dtype), powers.to(dtype), None, (up.to(dtype), up.reciprocal().to(dtype)))
    lag = number[:-1, None] - number[None, :-1]
    matrix = torch.where(lag >= 0, powers[:, :, 0][:, lag.clamp(min=0).long()], 0.0)
    return Decay(number[:-1].to(dtype), powers.to(dtype), matrix.to(dtype), None)


class _Heads:
    """``[..., L, H D] <-> [N, c, D]``, N = all leading axes times H, chunk by chunk and without a copy of the whole."""

    def __init__(self, heads: int, kv_heads: int, decay: Decay | None) -> None:
        self.heads, self.kv_heads, self.groups = heads, kv_heads, heads // kv_heads
        self.per_channel = decay is not None and decay.centred is not None

    def rows(self, x: Tensor, heads: int) -> Tensor:
        """View ``[lead, heads, L, D]``."""
        x = x.reshape(-1, *x.shape[-2:])
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    def query(self, rows: Tensor, start: int, stop: int) -> Tensor:
        return rows[:, :, start:stop].reshape(-1, stop - start, rows.shape[-1])

    def key(self, rows: Tensor, start: int, stop: int) -> Tensor:
        part = rows[:, :, start:stop]
        if self.groups > 1:
            part = part.unsqueeze(2).expand(-1, -1, self.groups, -1, -1)
        return part.reshape(-1, stop - start, rows.shape[-1])

    def scaled(self, x: Tensor, table: Tensor) -> Tensor:
        """``x [N, c, D]`` times a table ``[H, c, D or 1]``, in the dtype of x."""
        return (x.unflatten(0, (-1, self.heads)) * table).to(x.dtype).flatten(0, 1)

    def store(self, rows: Tensor, start: int, x: Tensor) -> None:
        rows[:, :, start : start + x.shape[1]] = x.unflatten(0, (-1, self.heads))

    def store_summed(self, rows: Tensor, start: int, x: Tensor) -> None:
        """The sum over the query heads that share a key head."""
        part = x.unflatten(0, (-1, self.kv_heads, self.groups))
        rows[:, :, start : start + x.shape[1]] = part.sum(2) if self.groups > 1 else part.squeeze(2)


    def weighted(self, x: Tensor, weight: Tensor) -> Tensor:
        """``sum over N and c of weight_c x[N, c, D]``, per key head ``[Hk, D]``."""
        return self.by_kv_head((weight.to(x.dtype) @ x).unflatten(0, (-1, self.heads)).sum(0, dtype=_state_type(x)))

    def by_kv_head(self, x: Tensor) -> Tensor:
        """``[H, ...] -> [Hk, width]``: summed over the heads of a group, and over all else if the decay is per head."""
        x = x.flatten(1).unflatten(0, (self.kv_heads, self.groups))
        return x.sum(1) if self.per_channel else x.sum((1, 2)).unsqueeze(1)


def _state_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _Chunk:
    """Queries, keys and values of one chunk with the powers that they are multiplied with."""

    def __init__(self, h: _Heads, decay: Decay | None, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.h, self.q, self.k, self.v, self.size = h, q, k, v, q.shape[1]
        self.decay, self.up, self.down, self.lag = decay, None, None, None
        if decay is not None:
            self.number = decay.number[: self.size]
            if decay.matrix is not None:
                self.lag = self.number[:, None] - self.number
        self.q_in, self.k_in = q, k
        if decay is not None and decay.centred is not None:
            self.up, self.down = (table[:, : self.size] for table in decay.centred)
            self.q_in, self.k_in = h.scaled(q, self.up), h.scaled(k, self.down)

    def masked(self, scores: Tensor) -> Tensor:
        """Decays and causality, in place."""
        if self.decay is None or self.decay.matrix is None:
            return scores.tril_()
        scores.unflatten(0, (-1, self.h.heads)).mul_(self.decay.matrix[:, : self.size, : self.size])
        return scores

    def since_start(self, x: Tensor) -> Tensor:
        """``lambda^(a+1) x_a``."""
        return x if self.decay is None else self.h.scaled(x, self.decay.powers[:, 1 : self.size + 1])

    def to_end(self, x: Tensor) -> Tensor:
        """``lambda^(c-1-b) x_b``."""
        return x if self.decay is None else self.h.scaled(x, self.decay.powers[:, : self.size].flip(1))

    def carried(self, state: Tensor | None, written: Tensor) -> Tensor:
        """``diag(lambda^c) state + written``."""
        written = written.to(_state_type(written))
        if state is None:
            return written
        if self.decay is None:
            return state + written
        whole = self.decay.powers[:, self.size].unsqueeze(-1)
        return written.add_((state.unflatten(0, (-1, self.h.heads)) * whole).flatten(0, 1))


def causal_product(
    query: Tensor, key: Tensor, value: Tensor, heads: int, kv_heads: int, chunk: int, decay: Decay | None
) -> Tensor:
    """``Y`` of the module's docstring.

    Args:
        query: ``[..., L, H D]``.
        key: ``[..., L, Hk D]``.
        value: ``[..., L, Hk Dv]``.
        heads: H.
        kv_heads: Hk.
        chunk: Tokens whose scores are held at once.
        decay: Tables for chunks of that size; None = nothing is forgotten.

    Returns:
        ``[..., L, H Dv]``, contiguous.
    """
    h, length = _Heads(heads, kv_heads, decay), query.shape[-2]
    y = query.new_empty((*query.shape[:-1], value.shape[-1] // kv_heads * heads))
    q_rows, k_rows, v_rows, y_rows = h.rows(query, heads), h.rows(key, kv_heads), h.rows(value, kv_heads), h.rows(y, heads)
    state: Tensor | None = None
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        part = _Chunk(h, decay, h.query(q_rows, start, stop), h.key(k_rows, start, stop), h.key(v_rows, start, stop))
        rows = part.masked(part.q_in @ part.k_in.mT) @ part.v
        if state is not None:
            rows = torch.baddbmm(rows, part.since_start(part.q), state.to(part.q.dtype))
        h.store(y_rows, start, rows)
        if stop < length:
            state = part.carried(state, part.to_end(part.k).mT @ part.v)
    return y


def causal_product_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, heads: int, kv_heads: int, chunk: int, decay: Decay | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``causal_product``.

    Args:
        grad: ``dL/dY``, ``[..., L, H Dv]``; the others as there.
        query: As there.
        key: As there.
        value: As there.
        heads: H.
        kv_heads: Hk.
        chunk: As there.
        decay: As there.

    Returns:
        ``dL/dQ``, ``dL/dK``, ``dL/dV`` in the shapes of the inputs, and ``dL/dlog lambda`` as ``[Hk, 1]`` (one per head) or
        ``[Hk, D]`` (one per channel); ``[0]`` without a decay.
    """
    h, length = _Heads(heads, kv_heads, decay), query.shape[-2]
    to_q, to_k, to_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    q_rows, k_rows, v_rows, g_rows = h.rows(query, heads), h.rows(key, kv_heads), h.rows(value, kv_heads), h.rows(grad, heads)
    q_out, k_out, v_out = h.rows(to_q, heads), h.rows(to_k, kv_heads), h.rows(to_v, kv_heads)
    starts = range(0, length, chunk)
    states: list[Tensor | None] = [None]
    parts: list[_Chunk] = []
    for start in starts:
        stop = min(start + chunk, length)
        part = _Chunk(h, decay, h.query(q_rows, start, stop), h.key(k_rows, start, stop), h.key(v_rows, start, stop))
        parts.append(part)
        states.append(part.carried(states[-1], part.to_end(part.k).mT @ part.v) if stop < length else None)
    to_log = decay.powers.new_zeros(kv_heads, decay.powers.shape[-1]) if decay is not None else query.new_empty(0)
    later: Tensor | None = None  # R
    for number in reversed(range(len(parts))):
        part, state, start = parts.pop(), states[number], starts[number]
        g = h.query(g_rows, start, start + part.size)
        a, s = part.masked(part.q_in @ part.k_in.mT), g @ part.v.mT
        if part.lag is not None:
            to_log += h.by_kv_head((a * s).unflatten(0, (-1, h.heads)).sum(0, dtype=to_log.dtype) * part.lag)
        s = part.masked(s)
        dv, dq, dk = a.mT @ g, s @ part.k_in, s.mT @ part.q_in
        if part.up is not None and part.down is not None:
            dq, dk = h.scaled(dq, part.up), h.scaled(dk, part.down)
            to_log += h.weighted(dq * part.q - dk * part.k, part.number)
        if state is not None:
            through = part.since_start(g @ state.to(g.dtype).mT)
            if decay is not None:
                to_log += h.weighted(through * part.q, part.number + 1)
            dq = dq.add_(through)
        if later is not None:
            r = later.to(g.dtype)
            through = part.to_end(part.v @ r.mT)
            if decay is not None:
                to_log += h.weighted(through * part.k, part.size - 1 - part.number)
            dk = dk.add_(through)
            dv = dv.add_(part.to_end(part.k) @ r)
        if decay is not None and state is not None and later is not None:
            both = (state * later).unflatten(0, (-1, h.heads)).sum((0, -1))  # [H, D]
            to_log += h.by_kv_head(part.size * both * decay.powers[:, part.size])
        h.store(q_out, start, dq)
        h.store_summed(k_out, start, dk)
        h.store_summed(v_out, start, dv)
        if start > 0:
            later = part.carried(later, part.since_start(part.q).mT @ g)
    return to_q, to_k, to_v, to_log
