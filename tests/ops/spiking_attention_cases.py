"""What the tests of spiking attention share: cases, the op in Python integers, and its recurrence token by token."""

import importlib
from unittest.mock import patch

import torch
from hypothesis import strategies as st

MODULE = importlib.import_module("ntc.ops.spiking_attention")  # ntc.ops has the op under this name
OP = torch.ops.ntc.spiking_attention.default
STREAM = torch.ops.ntc.spiking_attention_stream.default
GROUPS = [(1, 1), (2, 2), (2, 1), (4, 2), (3, 1)]


@st.composite
def spike_cases(draw, longest=7):
    """Binary or ternary q, k, v of any small shape, with grouped-query heads."""
    steps, batch, length = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, longest))
    heads, kv_heads = draw(st.sampled_from(GROUPS))
    d, dv = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    low, density = draw(st.sampled_from([0, -1])), draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))

    def spikes(width):
        shape = (steps, batch, length, width)
        sign = 1 if low == 0 else torch.randint(0, 2, shape, generator=generator) * 2 - 1
        return (torch.rand(shape, generator=generator) < density).float() * sign

    return spikes(heads * d), spikes(kv_heads * d), spikes(kv_heads * dv), heads, kv_heads


def naive(query, key, value, heads, kv_heads, leak_is=None):
    """``Y_i = sum_{j <= i} (Q_i . K_j) V_j`` in Python integers, and the operations that each form makes."""
    steps, batch, length, width = query.shape
    d, dv, groups = width // heads, value.shape[-1] // kv_heads, heads // kv_heads
    q, k, v = (x.long().tolist() for x in (query, key, value))
    out = torch.zeros(steps, batch, length, heads * dv, dtype=torch.int64).tolist()
    work = {"scores": 0, "values": 0, "write": 0, "read": 0, "decays": 0, "leak": steps * batch * length * kv_heads * d * dv}
    for t in range(steps):
        for b in range(batch):
            for i in range(length):
                for h in range(heads):
                    kv, q_i = h // groups, q[t][b][i][h * d : (h + 1) * d]
                    work["read"] += sum(map(abs, q_i)) * dv
                    for j in range(i + 1):
                        k_j, v_j = k[t][b][j][kv * d : (kv + 1) * d], v[t][b][j][kv * dv : (kv + 1) * dv]
                        score = sum(x * y for x, y in zip(q_i, k_j, strict=True))
                        work["scores"] += sum(map(abs, q_i))
                        met = sum(abs(x * y) for x, y in zip(q_i, k_j, strict=True))
                        work["values"] += sum(map(abs, v_j)) if (met if leak_is == "channel" else score) else 0
                        work["decays"] += met if leak_is == "channel" else bool(score)
                        for c in range(dv):
                            out[t][b][i][h * dv + c] += score * v_j[c]
                for kv in range(kv_heads):
                    k_i, v_i = k[t][b][i][kv * d : (kv + 1) * d], v[t][b][i][kv * dv : (kv + 1) * dv]
                    work["write"] += sum(1 for x in k_i for y in v_i if x * y)
    if leak_is is None:
        del work["decays"], work["leak"]
    return torch.tensor(out), work


def sequential(query, key, value, heads, kv_heads, leak, dtype=torch.float64):
    """``M_i = diag(lambda) M_{i-1} + K_i (x) V_i``, ``Y_i = Q_i M_i``, token by token; any shape of leak; differentiable."""
    q, k, v = (x.to(dtype).unflatten(-1, (n, -1)) for x, n in ((query, heads), (key, kv_heads), (value, kv_heads)))
    keep = leak.to(dtype)
    keep = keep.expand(kv_heads, 1) if keep.shape[0] == 1 else keep.view(kv_heads, -1)
    memory, rows = 0.0, []
    for i in range(query.shape[-2]):
        memory = keep.unsqueeze(-1) * memory + k[..., i, :, :, None] * v[..., i, :, None, :]
        read = memory.repeat_interleave(heads // kv_heads, dim=-3)
        rows.append((q[..., i, :, None, :] @ read).squeeze(-2).flatten(-2))
    return torch.stack(rows, -2)


def leaks(kv_heads, d):
    """Sizes of a leak: one number, one per key head, one per key channel."""
    return sorted({1, kv_heads, kv_heads * d})


def chunked(head=3, channel=19):
    """The kernels with small chunks, so that a few tokens are several."""
    return patch.multiple(MODULE, CHUNK=head, HEAD_LEAK_CHUNK=head, CHANNEL_LEAK_CHUNK=channel)
