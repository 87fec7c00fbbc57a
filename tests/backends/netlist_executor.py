"""A second reading of the netlist format: runs ``netlist.json`` and ``netlist.safetensors`` and nothing else.

It imports neither ntc nor its back ends, so what it computes is what the files say. Plain and slow on purpose; docs/netlist.md
describes each rule that it follows.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

Values = dict[str, Any]


class Executor:
    integer = False

    def __init__(self, folder: Path) -> None:
        self.net: dict[str, Any] = json.loads((folder / "netlist.json").read_text(encoding="utf-8"))
        stored = load_file(folder / self.net["blob"]["file"])
        self.tensors = {name: stored[entry["key"]] for name, entry in self.net["tensors"].items()}
        self.elements: dict[str, tuple[str, dict[str, Any]]] = {}
        for table in ("populations", "projections", "dynamic_products", "scales", "decodes", "host"):
            self.elements |= {element["name"]: (table, element) for element in self.net[table]}
        self.events: dict[str, Tensor] = {}
        self.integer = self.net["conventions"]["rounding"] == "integer"

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Logits [B, L, V] of token ids [B, L]; keeps the spikes of every population in ``events``."""
        values: Values = {f"{self.net['input']['name']}:ids": input_ids}
        self.events = {}
        for name in self.net["order"]:
            table, element = self.elements[name]
            given = {port: values[endpoint] for port, endpoint in element["inputs"].items()}
            if table == "host":
                for port, value in self.host(element, given).items():
                    values[f"{name}:{port}"] = value
            else:
                (port,) = element["outputs"]
                values[f"{name}:{port}"] = getattr(self, table)(element, **given)
        return values[self.net["output"]["logits"]]

    def number(self, value: Any) -> Any:
        return self.tensors[value["tensor"]] if isinstance(value, dict) else value

    def populations(self, element: dict[str, Any], current: Tensor) -> Tensor:
        theta, timed = self.number(element["threshold"]), element["input"] == "timed"
        if self.integer:
            current, theta, start = current.long(), torch.as_tensor(theta), self.number(element["start"])
        else:
            start = self.number(element["v0"]) * theta
        v = torch.zeros_like(current[0] if timed else current) + start
        tau, train = self.number(element["tau"]), []
        for t in range(element["steps"]):
            x = current[t] if timed else current
            u = v + x if element["model"] == "if" else v + (x - v) / tau
            if self.integer and element["membrane_bits"]:
                assert fits(u, element["membrane_bits"])
            s = (u >= theta).to(u.dtype)
            if element["signed"]:
                s = s - (u < 0).to(u.dtype)
            v = u - s * theta if element["reset"] == "soft" else u * (1 - s)
            train.append(s)
        self.events[element["name"]] = torch.stack(train)
        return self.events[element["name"]]

    def projections(self, element: dict[str, Any], pre: Tensor) -> Tensor:
        weight = self.tensors[element["weight"]]
        assert list(weight.shape) == element["shape"]
        if self.integer:
            pre, weight = pre.long(), weight.long()
        current = pre @ weight.T
        current = current if element["bias"] is None else current + self.tensors[element["bias"]]
        if self.integer:
            assert fits(weight, element["weight_bits"])
            assert element["accumulator_bits"] is None or fits(current, element["accumulator_bits"])
        return current

    def dynamic_products(self, element: dict[str, Any], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads, kv_heads, d, dv = (element[k] for k in ("heads", "kv_heads", "head_size", "value_size"))
        steps, batch, length, _ = query.shape
        q, k = query.view(steps, batch, length, heads, d), key.view(steps, batch, length, kv_heads, d)
        v = value.view(steps, batch, length, kv_heads, dv)
        memory = torch.zeros(batch, *element["state_shape"], dtype=query.dtype).transpose(0, 1)  # [T, B, Hk, D, Dv]
        if self.integer:
            return self.lazy_product(element, q.long(), k.long(), v.long())
        leak = 1.0 if element.get("leak") is None else self.number(element["leak"])
        if isinstance(leak, Tensor):  # per M, or per row of M
            leak = leak.view(kv_heads, -1, 1)
        counts = torch.zeros(steps, batch, length, heads, dv, dtype=query.dtype)
        for i in range(length):
            memory = leak * memory + k[:, :, i, :, :, None] * v[:, :, i, :, None, :]
            for h in range(heads):
                counts[:, :, i, h] = torch.einsum("tbd,tbde->tbe", q[:, :, i, h], memory[:, :, h * kv_heads // heads])
        assert element["max_state"] is None or memory.abs().max() <= element["max_state"]
        assert element["max_count"] is None or counts.abs().max() <= element["max_count"]
        return counts.reshape(steps, batch, length, heads * dv)

    def lazy_product(self, element: dict[str, Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Token by token, head by head; [T, B, L, heads, channels]."""
        growth, shift = torch.atleast_2d(torch.as_tensor(self.number(element["growth"]))).long(), element["shift"]
        growth = growth.expand(element["kv_heads"], -1)
        period = growth.shape[1]
        renewal = None if element["renewal"] is None else torch.as_tensor(self.number(element["renewal"])).long().expand(element["kv_heads"])
        steps, batch, length, heads, _ = q.shape
        memory = torch.zeros(steps, batch, *element["state_shape"][1:], dtype=torch.long)
        counts = torch.zeros(steps, batch, length, heads, element["value_size"], dtype=torch.long)
        for i in range(length):
            r = i % period
            for h in range(element["kv_heads"]):
                if r == 0 and i > 0 and renewal is not None:
                    memory[:, :, h] = shifted(memory[:, :, h] * renewal[h], shift)
                memory[:, :, h] += growth[h, r] * k[:, :, i, h, :, None] * v[:, :, i, h, None, :]
            for h in range(heads):
                counts[:, :, i, h] = (q[:, :, i, h, :, None] * memory[:, :, h * element["kv_heads"] // heads]).sum(-2)
            assert fits(memory, element["state_bits"])
        assert fits(counts, element["count_bits"])
        return counts.reshape(steps, batch, length, -1)

    def scales(self, element: dict[str, Any], train: Tensor, query: Tensor | None = None, key: Tensor | None = None) -> Tensor:
        if element["kind"] == "position":
            return train / torch.arange(1, train.shape[-2] + 1, dtype=train.dtype)[:, None]
        if element["kind"] == "requantize":
            return requantized(train, torch.as_tensor(self.number(element["multiplier"])), element["shift"], element["low"], element["high"])
        if element["kind"] == "constant":
            return train * self.number(element["factor"])
        heads = element["heads"]
        steps, batch, length, width = train.shape
        parts = train.clone().view(steps, batch, length, heads, width // heads)
        divisor = torch.ones(batch, length, heads, dtype=train.dtype)
        for h in range(heads):
            if element["kind"] == "table":
                parts[:, :, :, h] *= self.number(element["factor"])[h, :length, None]
            elif element["kind"] == "rms":
                mean = parts[:, :, :, h].mean(0)
                divisor[:, :, h] = torch.sqrt((mean * mean).mean(-1) + element["eps"])
            else:
                g = h * element["kv_heads"] // heads
                q, k = query.view(steps, batch, length, heads, -1)[..., h, :], key.view(steps, batch, length, element["kv_heads"], -1)[..., g, :]
                for i in range(length):
                    z = torch.einsum("tbd,tbjd->b", q[:, :, i], k[:, :, : i + 1]) / steps
                    divisor[:, i, h] = z.abs().clamp(min=1)
        return (parts / divisor[..., None]).reshape(train.shape)

    def decodes(self, element: dict[str, Any], train: Tensor) -> Tensor:
        return sum(weight * step for weight, step in zip(element["step_weights"], train, strict=True))

    def host(self, element: dict[str, Any], values: Values) -> Values:
        values = dict(values)

        def argument(given: Any) -> Any:
            if isinstance(given, list):
                return [argument(g) for g in given]
            if isinstance(given, dict):
                ((kind, name),) = given.items()
                return {"value": values.get, "tensor": self.tensors.get, "float": float}[kind](name)
            return given

        for op in element["ops"]:
            values[op["name"]] = OPS[op["op"]](**{k: argument(v) for k, v in op["arguments"].items()})
        return {port: values[port] for port in element["outputs"]}


def fits(x: Tensor, bits: int) -> bool:
    return -(1 << bits - 1) <= int(x.min()) and int(x.max()) < 1 << bits - 1


def shifted(x: Tensor, shift: int) -> Tensor:
    """round(x / 2^shift), halves up, by floor division."""
    return torch.div(x + 2 ** (shift - 1), 2**shift, rounding_mode="floor") if shift else x


def requantized(x: Tensor, multiplier: Tensor, shift: int, low: int, high: int) -> Tensor:
    if multiplier.dim() == 2:
        multiplier = torch.stack([multiplier[i % len(multiplier)] for i in range(x.shape[-2])])
    return shifted(x.long() * multiplier.long(), shift).clamp(low, high)


def integer_norm(
    x: Tensor, gain: Tensor, offset: Tensor, epsilon: int, guard: int, shift: int, low: int, high: int, centre: bool
) -> Tensor:
    """docs/integers.md in Python's own integers, element by element."""
    rows = []
    for row in x.reshape(-1, x.shape[-1]).tolist():
        c = len(row)
        mean = (sum(row) + c // 2) // c if centre else 0
        d = [value - mean for value in row]
        root = max(math.isqrt((sum(v * v for v in d) // c + epsilon) << 2 * guard), 1)
        n = [((v << guard + 16) + root // 2) // root for v in d]
        gains, offsets = (p.expand(c).tolist() for p in (gain, offset))
        wide = [v * g + o for v, g, o in zip(n, gains, offsets, strict=True)]
        rows.append([min(max((w + (1 << shift >> 1)) >> shift, low), high) for w in wide])
    return torch.tensor(rows).view(x.shape)


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


def _attention(query: Tensor, key: Tensor, value: Tensor, heads: int, kv_heads: int, scale: float) -> Tensor:
    """docs/netlist.md: causal softmax attention over heads of consecutive channels."""
    split = lambda x, n: x.view(*x.shape[:2], n, -1).transpose(1, 2)  # noqa: E731
    q, k, v = split(query, heads), split(key, kv_heads), split(value, kv_heads)
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-2, -1)) * scale
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)


OPS: dict[str, Any] = {
    "aten.sym_size.int": lambda self, dim: self.shape[dim],
    "aten.arange.default": lambda end, dtype: torch.arange(end, dtype=_dtype(dtype)),
    "aten.arange.start": lambda start, end, dtype: torch.arange(start, end, dtype=_dtype(dtype)),
    "aten.unsqueeze.default": lambda self, dim: self.unsqueeze(dim),
    "aten.embedding.default": lambda weight, indices, padding_idx, scale_grad_by_freq, sparse: weight[indices],
    "aten.layer_norm.default": lambda input, normalized_shape, weight, bias, eps: functional.layer_norm(
        input, normalized_shape, weight, bias, eps
    ),
    "aten.linear.default": lambda input, weight, bias: input @ weight.T if bias is None else input @ weight.T + bias,
    "aten.add.Tensor": lambda self, other, alpha: self + alpha * other,
    "aten.mul.Tensor": lambda self, other: self * other,
    "ntc.attention.default": _attention,
    "ntc.integer_norm.default": integer_norm,
    "ntc.integer_linear.default": lambda x, weight, bias: x.long() @ weight.long().T + (0 if bias is None else bias.long()),
    "ntc.requantize.default": requantized,
    "ntc.integer_lookup.default": lambda x, table, low: table[x.long() - low],
    "ntc.from_integer.default": lambda x, exponent: x.double() * 2.0**exponent,
}

