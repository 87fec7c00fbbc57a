"""A second reading of the netlist format: runs ``netlist.json`` and ``netlist.safetensors`` and nothing else.

It imports neither ntc nor its back ends, so what it computes is what the files say. Plain and slow on purpose; docs/netlist.md
describes each rule that it follows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

Values = dict[str, Any]


class Executor:
    def __init__(self, folder: Path) -> None:
        self.net: dict[str, Any] = json.loads((folder / "netlist.json").read_text(encoding="utf-8"))
        stored = load_file(folder / self.net["blob"]["file"])
        self.tensors = {name: stored[entry["key"]] for name, entry in self.net["tensors"].items()}
        self.elements: dict[str, tuple[str, dict[str, Any]]] = {}
        for table in ("populations", "projections", "dynamic_products", "scales", "decodes", "host"):
            self.elements |= {element["name"]: (table, element) for element in self.net[table]}
        self.events: dict[str, Tensor] = {}

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
        v = torch.zeros_like(current[0] if timed else current) + self.number(element["v0"]) * theta
        tau, train = self.number(element["tau"]), []
        for t in range(element["steps"]):
            x = current[t] if timed else current
            u = v + x if element["model"] == "if" else v + (x - v) / tau
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
        current = pre @ weight.T
        return current if element["bias"] is None else current + self.tensors[element["bias"]]

    def dynamic_products(self, element: dict[str, Any], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads, kv_heads, d, dv = (element[k] for k in ("heads", "kv_heads", "head_size", "value_size"))
        steps, batch, length, _ = query.shape
        q, k = query.view(steps, batch, length, heads, d), key.view(steps, batch, length, kv_heads, d)
        v = value.view(steps, batch, length, kv_heads, dv)
        memory = torch.zeros(batch, *element["state_shape"], dtype=query.dtype).transpose(0, 1)  # [T, B, Hk, D, Dv]
        leak = 1.0 if element["leak"] is None else self.number(element["leak"])
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

    def scales(self, element: dict[str, Any], train: Tensor, query: Tensor | None = None, key: Tensor | None = None) -> Tensor:
        if element["kind"] == "position":
            return train / torch.arange(1, train.shape[-2] + 1, dtype=train.dtype)[:, None]
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
}

