r"""Causal products in chunks, with or without forgetting: the arithmetic of spiking attention and of its gradients.

Per head, with a decay ``lambda_d`` in (0, 1] (1 = nothing is forgotten):

    M_i = diag(lambda) M_{i-1} + K_i (x) V_i,    Y_i = Q_i M_i = sum_{j <= i} sum_d Q_id lambda_d^(i-j) K_jd V_j

(retention: Sun et al. 2023, arXiv 2307.08621; gated linear attention: Yang et al. 2023, arXiv 2312.06635). Of a chunk of c
tokens, numbered a, b = 0..c-1, that starts with the state M:

    Y_a = sum_{b <= a} A_ab V_b + sum_d lambda_d^(a+1) Q_ad M_d,    A_ab = sum_d Q_ad lambda_d^(a-b) K_bd
    M'  = diag(lambda^c) M + sum_b (lambda^(c-1-b) K_b) (x) V_b

With one lambda per head A is the scores times a matrix of decays, and nothing is divided. With one per channel the powers go to
the factors, for 16 rows of A at a time, centred at their middle m: ``(Q_ad lambda_d^(a-m)) (K_bd lambda_d^(m-b))``. Gradients, with
``G = dL/dY``, ``S_ab = G_a . V_b`` for b <= a, and R, the gradient of the state that leaves the chunk:

    dQ_a = sum_b S_ab (lambda^(a-b) K_b) + lambda^(a+1) (M G_a)      dK_b = sum_a S_ab (lambda^(a-b) Q_a) + lambda^(c-1-b) (R V_b)
    dV_b = sum_a A_ab G_a + (lambda^(c-1-b) K_b) R                   R'   = diag(lambda^c) R + sum_a (lambda^(a+1) Q_a) (x) G_a
    dL/dlog lambda_d = sum_ab (a-b) S_ab Q_ad lambda_d^(a-b) K_bd + sum_a (a+1) Q_ad dQ'_ad + sum_b (c-1-b) K_bd dK'_bd
                       + c lambda_d^c sum_e M_de R_de                 (dQ', dK': the parts of dQ and dK that come through M and R)

The last is ``sum_i i dQ_i Q_i - sum_j j dK_j K_j`` over the sequence, written with distances in place of positions: the difference of
two large sums would drown in their rounding errors when little is remembered.

States are float32 or better; products, and the tables of powers that go into them, are in the dtype of the inputs. Powers are made
in float64 and rounded once, so no error grows with the distance i - j. In the tables centred at 8 of 16 rows the smallest lambda
whose powers fit into float32 is about 2**-15 = 3e-5; a smaller one counts as that (what it leaves out is less than 3e-5 of a
neighbouring token).

The work is cut twice, into chunks of tokens and into blocks of the leading axes, so that what one product reads and writes stays in
the cache of a core: on batches of training that halves the time (measured at T = 4, B = 16, L = 256, 4 heads of 64).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Decay", "causal_product", "causal_product_from", "causal_product_gradients", "decay_of"]

_BLOCK_BYTES = 1 << 21
"""Of the largest value of one product, per thread: the second-level cache of a core."""

_ROWS = 16
"""Of the scores that are made at once with a decay per channel."""

_SMALLEST = 2.0**-15
"""Of a decay per channel: its 8th power and the reciprocal of that are normal float32 numbers."""

_NOTHING = 2.0**-121
"""A smaller power is 0: it would be lost anyway, and denormal numbers slow a product down a hundred times."""


@dataclass(frozen=True)
class Decay:
    """Powers of lambda for chunks of c tokens.

    Attributes:
        number: 0..c - 1, float32 or better.
        whole: ``lambda ** c``, ``[H, 1, 1]`` or ``[H, D, 1]``, float32 or better.
        since_start: ``lambda ** (a + 1)``, ``[H, c, 1]`` or ``[H, c, D]``.
        to_end: ``lambda ** (c - 1 - b)``, likewise.
        matrix: ``lambda ** (a - b)`` for b <= a, else 0, ``[H, c, c]``; None if lambda is per channel.
        up: ``lambda ** (a % 16 - 8)``, ``[H, c, D]``; None if lambda is per head.
        down: ``lambda ** (m - b)`` for the middle m of the last 16 rows, likewise; its end is the table of other rows.
    """

    number: Tensor
    whole: Tensor
    since_start: Tensor
    to_end: Tensor
    matrix: Tensor | None
    up: Tensor | None = None
    down: Tensor | None = None

    @property
    def per_channel(self) -> bool:
        """Whether there is a lambda for each channel."""
        return self.matrix is None


def decay_of(leak: Tensor, heads: int, kv_heads: int, chunk: int, dtype: torch.dtype) -> Decay:
    """Tables for one leak.

    Args:
        leak: lambda, ``[1]``, ``[Hk]`` or ``[Hk D]``.
        heads: H.
        kv_heads: Hk.
        chunk: c, tokens per chunk.
        dtype: Of the inputs of the products.
    """
    rows, state = kv_heads if leak.shape[0] != 1 else 1, torch.promote_types(dtype, torch.float32)
    # [H, 1, D or 1]
    wide = leak.detach().double().reshape(rows, 1, -1).expand(kv_heads, 1, -1).repeat_interleave(heads // kv_heads, dim=0)
    per_channel = wide.shape[2] > 1
    if per_channel:
        wide = wide.clamp(min=_SMALLEST)
    number = torch.arange(chunk + 1, dtype=torch.float64, device=leak.device)
    powers = wide ** number[:, None]
    powers = powers.where(powers > _NOTHING, 0.0)
    number, whole = number[:-1], powers[:, -1].unsqueeze(-1)
    tables = number.to(state), whole.to(state), powers[:, 1:].to(dtype), powers[:, :-1].flip(1).to(dtype)
    if per_channel:
        padded = -(-chunk // _ROWS) * _ROWS
        down = wide ** (padded - _ROWS // 2 - torch.arange(padded, dtype=torch.float64, device=leak.device))[:, None]
        return Decay(*tables, None, (wide ** _from_middle(number)[:, None]).to(dtype), down.where(down > _NOTHING, 0.0).to(dtype))
    lag = number[:, None] - number
    return Decay(*tables, powers[:, :, 0][:, lag.clamp(min=0).long()].where(lag >= 0, 0.0).to(dtype))


def _from_middle(number: Tensor) -> Tensor:
    return number % _ROWS - _ROWS // 2


class _Part:
    """Queries, keys and values of one chunk of one block, ``[N, c, D]`` with N = leading axes times H."""

    def __init__(self, product: _Product, lead: slice, start: int) -> None:
        self.lead, self.start, self.stop = lead, start, min(start + product.chunk, product.length)
        self.size, self.heads, self.decay = self.stop - start, product.heads, product.decay
        self.q, self.k, self.v = (self.cut(rows, product.groups) for rows in (product.query, product.key, product.value))
        self.k_end = self.k if self.decay is None else self.scaled(self.k, self.decay.to_end[:, -self.size :])

    def cut(self, rows: Tensor, groups: int) -> Tensor:
        """``[N, c, D]`` of ``[lead, heads, L, D]``; heads that several query heads share are repeated."""
        part = rows[self.lead, :, self.start : self.stop]
        if part.shape[1] != self.heads:
            part = part.unsqueeze(2).expand(-1, -1, groups, -1, -1)
        return part.reshape(-1, self.size, rows.shape[-1])

    def store(self, rows: Tensor, x: Tensor) -> None:
        """Inverse of ``cut``: what was repeated is added up."""
        groups = self.heads // rows.shape[1]
        x = x.view(-1, rows.shape[1], groups, *x.shape[1:])
        rows[self.lead, :, self.start : self.stop] = x.sum(2) if groups > 1 else x.squeeze(2)

    def by_head(self, x: Tensor) -> Tensor:
        """View ``[lead, H, ...]`` of ``[N, ...]``."""
        return x.view(-1, self.heads, *x.shape[1:])

    def scaled(self, x: Tensor, table: Tensor) -> Tensor:
        """``x [N, c, D]`` times a table ``[H, c, D or 1]``."""
        return (self.by_head(x) * table).view(x.shape)

    def scaled_(self, x: Tensor, table: Tensor) -> Tensor:
        """The same in place."""
        self.by_head(x).mul_(table)
        return x

    def masked_(self, scores: Tensor) -> Tensor:
        """Causality, and decays per head, in place."""
        if self.decay is None or self.decay.matrix is None:
            return scores.tril_()
        return self.scaled_(scores, self.decay.matrix[:, : self.size, : self.size])

    def scores(self) -> Tensor:
        """A of the module's docstring."""
        if self.decay is None or self.decay.up is None:
            return self.masked_(self.q @ self.k.mT)
        a = self.q.new_zeros(*self.q.shape[:2], self.size)
        q = self.scaled(self.q, self.decay.up[:, : self.size])
        for rows, columns, table in self.strips():
            a[:, rows, columns] = q[:, rows] @ self.scaled(self.k[:, columns], table).mT
        return self.masked_(a)

    def strips(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows of the scores with a decay per channel, the columns that they see, and the powers for the keys of those."""
        assert self.decay is not None and self.decay.down is not None
        for start in range(0, self.size, _ROWS):
            stop, first = min(start + _ROWS, self.size), self.decay.down.shape[1] - start - _ROWS
            yield slice(start, stop), slice(0, stop), self.decay.down[:, first : first + stop]

    def gradients_per_channel(self, product: _Product, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``dQ`` and ``dK`` through the scores of this chunk, and their share of ``dL/dlog lambda``, with a decay per channel."""
        assert self.decay is not None and self.decay.up is not None
        up, number = self.decay.up[:, : self.size], self.decay.number[: self.size]
        q, dq, dk = self.scaled(self.q, up), torch.empty_like(self.q), torch.zeros_like(self.k)
        share = torch.zeros_like(self.decay.whole[: product.kv_heads, :, 0])
        for rows, columns, table in self.strips():
            strip = s[:, rows, columns]
            dq[:, rows] = strip @ self.scaled(self.k[:, columns], table)
            through = self.scaled_(strip.mT @ q[:, rows], table)
            dk[:, columns] += through
            share += product.weighted(through, self.k[:, columns], rows.start + _ROWS // 2 - number[columns])
        dq = self.scaled_(dq, up)
        return dq, dk, share + product.weighted(dq, self.q, _from_middle(number))

    def q_start(self) -> Tensor:
        """``lambda^(a+1) Q_a``."""
        return self.q if self.decay is None else self.scaled(self.q, self.decay.since_start[:, : self.size])

    def carried(self, state: Tensor | None, written: Tensor) -> Tensor:
        """``diag(lambda^c) state + written``, float32 or better; c is the size of this chunk."""
        written = written.to(torch.promote_types(written.dtype, torch.float32))
        if state is None:
            return written
        return written.add_(state if self.decay is None else self.scaled(state, self.kept()))

    def kept(self) -> Tensor:
        """``lambda^c``, ``[H, 1 or D, 1]``."""
        assert self.decay is not None
        if self.size == self.decay.since_start.shape[1]:
            return self.decay.whole
        return self.decay.since_start[:, self.size - 1 : self.size].mT.to(self.decay.whole.dtype)  # the last chunk may be a short one

    def spread(self, state: Tensor) -> Tensor:
        """M per query head, ``[N, D, Dv]``, of M per key head ``[lead, Hk, D, Dv]``."""
        return state[self.lead].repeat_interleave(self.heads // state.shape[1], dim=1).flatten(0, 1)


class _Product:
    """The inputs as views ``[lead, heads, L, D]``, cut into blocks and chunks."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, heads: int, kv_heads: int, chunk: int, decay: Decay | None) -> None:
        self.heads, self.kv_heads, self.groups, self.chunk, self.decay = heads, kv_heads, heads // kv_heads, chunk, decay
        self.length = query.shape[-2]
        self.query, self.key, self.value = self.rows(query, heads), self.rows(key, kv_heads), self.rows(value, kv_heads)

    @staticmethod
    def rows(x: Tensor, heads: int) -> Tensor:
        """View ``[lead, heads, L, D]`` of ``[..., L, heads D]``."""
        *lead, length, width = x.shape
        return x.reshape(math.prod(lead), length, heads, width // heads).transpose(1, 2)

    def blocks(self) -> Iterator[list[_Part]]:
        """The chunks of each block; a block holds as many of the leading axes as a cache does."""
        lead, tokens = self.query.shape[0], min(self.chunk, self.length)
        widest = self.heads * tokens * max(tokens, self.query.shape[-1], self.value.shape[-1]) * self.query.element_size()
        size = max(1, _BLOCK_BYTES * torch.get_num_threads() // max(widest, 1))
        for first in range(0, lead, size):
            yield [_Part(self, slice(first, first + size), start) for start in range(0, self.length, self.chunk)]

    def by_kv_head(self, x: Tensor) -> Tensor:
        """``[H, ...]`` summed over the query heads of each key head and, if lambda is per head, over all else: ``[Hk, D or 1]``."""
        x = x.reshape(self.kv_heads, self.groups, -1)
        return x.sum(1) if self.decay is not None and self.decay.per_channel else x.sum((1, 2)).unsqueeze(1)

    def weighted(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """``sum_c weight_c x_c y_c`` of ``[N, c, D]``, ``[Hk, D or 1]``, in the dtype of the weight."""
        sums = weight.to(x.dtype) @ (x * y)
        return self.by_kv_head(sums.view(-1, self.heads, x.shape[-1]).sum(0).to(weight.dtype))


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
    return _run(_Product(query, key, value, heads, kv_heads, chunk, decay), query, value, None, None)


def causal_product_from(
    state: Tensor, query: Tensor, key: Tensor, value: Tensor, heads: int, kv_heads: int, chunk: int, decay: Decay | None
) -> tuple[Tensor, Tensor]:
    """``Y`` of tokens before which others went, and the new M.

    Args:
        state: M after the tokens before these, ``[..., Hk, D, Dv]``, float32 or better.
        query: As of ``causal_product``, and so the rest.
        key: As there.
        value: As there.
        heads: H.
        kv_heads: Hk.
        chunk: As there.
        decay: As there.

    Returns:
        ``[..., L, H Dv]`` and ``[..., Hk, D, Dv]``, contiguous.
    """
    new = torch.empty_like(state, memory_format=torch.contiguous_format)
    product = _Product(query, key, value, heads, kv_heads, chunk, decay)
    y = _run(product, query, value, state.reshape(-1, *state.shape[-3:]), new.view(-1, *state.shape[-3:]))
    return y, new


def _run(product: _Product, query: Tensor, value: Tensor, start: Tensor | None, end: Tensor | None) -> Tensor:
    """``Y`` from the state ``start``; M after the last token goes into ``end``. Both are ``[lead, Hk, D, Dv]``."""
    y = query.new_empty((*query.shape[:-1], value.shape[-1] // product.kv_heads * product.heads))
    out = product.rows(y, product.heads)
    for parts in product.blocks():
        state = None if start is None else parts[0].spread(start)
        for part in parts:
            rows = part.scores() @ part.v
            if state is not None:
                rows = torch.baddbmm(rows, part.q_start(), state.to(rows.dtype))
            part.store(out, rows)
            if part.stop < product.length or end is not None:
                state = part.carried(state, part.k_end.mT @ part.v)
        if end is not None and state is not None:
            end[parts[0].lead] = parts[0].by_head(state)[:, :: product.groups]  # the query heads of a key head have the same
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
    product = _Product(query, key, value, heads, kv_heads, chunk, decay)
    results = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    out = [product.rows(x, n) for x, n in zip(results, (heads, kv_heads, kv_heads), strict=True)]
    grads = product.rows(grad, heads)
    to_log = query.new_empty(0) if decay is None else decay.whole.new_zeros(kv_heads, decay.whole.shape[1])
    for parts in product.blocks():
        states: list[Tensor | None] = [None]
        for part in parts[:-1]:
            states.append(part.carried(states[-1], part.k_end.mT @ part.v))
        later: Tensor | None = None  # R
        while parts:
            part, state = parts.pop(), states.pop()
            g = part.cut(grads, 1)
            given, share = _gradients_of(product, part, g, state, later)
            to_log += share
            for rows, x in zip(out, given, strict=True):
                part.store(rows, x)
            if part.start > 0:
                later = part.carried(later, part.q_start().mT @ g)
    return results[0], results[1], results[2], to_log


def _gradients_of(
    product: _Product, part: _Part, g: Tensor, state: Tensor | None, later: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | float]:
    """``dQ``, ``dK``, ``dV`` of one chunk and its share of ``dL/dlog lambda``; M comes in, R is the gradient of what goes out."""
    decay = part.decay
    share: Tensor | float = 0.0
    a, s = part.scores(), g @ part.v.mT
    if decay is not None and decay.matrix is not None:
        number = decay.number[: part.size]
        met = part.by_head(a * s).sum(0).to(number.dtype)
        share = share + product.by_kv_head(met * (number[:, None] - number))
    s, dv = part.masked_(s), a.mT @ g
    if decay is not None and decay.per_channel:
        dq, dk, share = part.gradients_per_channel(product, s)
    else:
        dq, dk = s @ part.k, s.mT @ part.q
    if state is not None:
        through = g @ state.to(g.dtype).mT
        if decay is not None:
            through = part.scaled_(through, decay.since_start[:, : part.size])
            share = share + product.weighted(through, part.q, decay.number[: part.size] + 1)
        dq = dq.add_(through)
    if later is not None:
        r = later.to(g.dtype)
        through = part.v @ r.mT
        if decay is not None:
            through = part.scaled_(through, decay.to_end[:, -part.size :])
            share = share + product.weighted(through, part.k, decay.number[: part.size].flip(0))
        dk, dv = dk.add_(through), torch.baddbmm(dv, part.k_end, r)
        if decay is not None and state is not None:
            both = part.by_head(state * later).sum((0, -1))  # [H, D]
            share = share + product.by_kv_head(part.size * both * decay.whole[..., 0])
    return (dq, dk, dv), share
