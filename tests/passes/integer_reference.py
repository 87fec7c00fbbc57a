"""The integer grade in plain numpy, written from docs/integers.md: no op of ntc is run."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntc.program import Program, op_name

Array = NDArray[np.int64]


def run(program: Program, ids: Array) -> NDArray[np.float32]:
    """Logits of token ids ``[B, L]``."""
    values: dict[str, Any] = {}

    def value(argument: Any) -> Any:
        if hasattr(argument, "op"):
            return program.tensor(argument).numpy() if argument.op == "get_attr" else values[argument.name]
        return argument

    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node.name] = ids
        elif node.op == "call_function":
            values[node.name] = OPS[op_name(node.target)](*[value(a) for a in node.args])
        elif node.op == "output":
            return values[node.args[0].name]
    raise AssertionError


def shifted(a: Array, shift: int) -> Array:
    return (a + (1 << shift - 1)) >> shift if shift else a


def norm(x: Array, gain: Array, offset: Array, epsilon: int, guard: int, shift: int, low: int, high: int, centre: bool) -> Array:
    x, channels = x.astype(np.int64), x.shape[-1]
    d = x - (x.sum(-1, keepdims=True) + channels // 2) // channels if centre else x
    v = (d * d).sum(-1, keepdims=True) // channels + epsilon
    root = np.vectorize(lambda n: max(math.isqrt(int(n)), 1), otypes=[np.int64])(v << 2 * guard)
    n = ((d << guard + 16) + root // 2) // root
    return np.clip(shifted(n * gain.astype(np.int64) + offset, shift), low, high)


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    y = np.einsum("...c,oc->...o", x.astype(np.int64), weight.astype(np.int64))
    return y if bias is None else y + bias


def requantize(x: Array, multiplier: Array, shift: int, low: int, high: int) -> Array:
    m = multiplier.astype(np.int64)
    if m.ndim == 2:
        m = m[np.arange(x.shape[-2]) % len(m)]
    return np.clip(shifted(x.astype(np.int64) * m, shift), low, high)


def fire(x: Array, threshold: Array, start: Array, steps: int, signed: bool, timed: bool) -> Array:
    v, spikes = np.zeros((x[0] if timed else x).shape, dtype=np.int64) + start, []
    for t in range(steps):
        u = v + (x[t] if timed else x)
        s = (u >= threshold).astype(np.int64) - ((u < 0) if signed else 0)
        v = u - threshold * s
        spikes.append(s)
    return np.stack(spikes)


def attention(
    q: Array, k: Array, v: Array, heads: int, kv_heads: int, growth: Array, renewal: Array | None, shift: int
) -> Array:  # fmt: skip
    """One token after the other."""
    steps, batch, length, _ = q.shape
    q, k, v = (x.reshape(steps, batch, length, n, -1) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    result = np.zeros((steps, batch, length, heads, v.shape[-1]), dtype=np.int64)
    for h in range(heads):
        g = h // (heads // kv_heads)
        memory = np.zeros((steps, batch, k.shape[-1], v.shape[-1]), dtype=np.int64)
        for i in range(length):
            r = i % growth.shape[1]
            if r == 0 and i and renewal is not None:
                memory = shifted(memory * int(renewal[g]), shift)
            memory = memory + int(growth[g, r]) * np.einsum("tbd,tbe->tbde", k[:, :, i, g], v[:, :, i, g])
            result[:, :, i, h] = np.einsum("tbd,tbde->tbe", q[:, :, i, h], memory)
    return result.reshape(steps, batch, length, -1)


OPS: dict[str, Any] = {
    "sym_size": lambda x, axis: x.shape[axis],
    "arange": lambda n, *_: np.arange(n),
    "unsqueeze": np.expand_dims,
    "embedding": lambda table, ids: table[ids].astype(np.int64),
    "add": lambda a, b: a + b,
    "ntc.integer_norm": norm,
    "ntc.integer_linear": linear,
    "ntc.requantize": requantize,
    "ntc.integer_lookup": lambda x, table, low: table[x - low],
    "ntc.integer_fire": fire,
    "ntc.integer_attention": attention,
    "ntc.decode": lambda train, code: train.sum(0),
    "ntc.from_integer": lambda x, exponent: (x * 2.0**exponent).astype(np.float32),
}
