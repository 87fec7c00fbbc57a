"""NIR files run by somebody who knows neither ntc nor the nir package: HDF5 and the definitions of NIR's documents, nothing else.

https://neuroir.org/docs/primitives.html: continuous time, here by Euler's method with dt = 1, from v = 0. The value that an edge into an
integrator brings is of the same step, unless it comes from the integrator itself: then of the step before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

Array = np.ndarray[Any, Any]


class Interpreter:
    def __init__(self, path: Path) -> None:
        with h5py.File(path) as file:
            self.version = file["version"][()].decode()
            graph = file["node"]
            assert graph["type"][()] == b"NIRGraph"
            self.edges = [(a.decode(), b.decode()) for a, b in graph["edges"][()]]
            self.kind = {name: node["type"][()].decode() for name, node in graph["nodes"].items()}
            self.parameters = {
                name: {key: value[()] for key, value in node.items() if key not in ("type", "metadata")}
                for name, node in graph["nodes"].items()
            }
        self.subtracts = self.version in ("1.0.4", "1.0.5")  # their documents: v = v - v_threshold

    def run(self, train: Array) -> dict[str, Array]:
        """``[T, N, C]`` into the only input; what every node gives, ``[T, N, ...]``."""
        (source,) = (name for name, kind in self.kind.items() if kind == "Input")
        assert train.shape[-1] == int(self.parameters[source]["shape"][0])
        self.membranes: dict[str, Array] = {}
        last: dict[str, Array] = {}
        steps = []
        for x in train:
            now = {source: x}
            for name in self.kind:
                self._value(name, now, last)
            steps.append(now)
            last = now
        return {name: np.stack([step[name] for step in steps]) for name in self.kind}

    def _value(self, name: str, now: dict[str, Array], last: dict[str, Array]) -> Array | None:
        if name not in now:
            arriving = [
                last.get(a) if self._integrates(name) and self._leads(name, a) else self._value(a, now, last)
                for a, b in self.edges
                if b == name
            ]
            now[name] = self._apply(name, sum(x for x in arriving if x is not None))
        return now[name]

    def _integrates(self, name: str) -> bool:
        return self.kind[name] in ("I", "LI", "IF", "LIF")

    def _leads(self, start: str, end: str) -> bool:
        found, todo = {start}, [start]
        while todo:
            here = todo.pop()
            todo += [b for a, b in self.edges if a == here and b not in found]
            found |= {b for a, b in self.edges if a == here}
        return end in found

    def _apply(self, name: str, x: Any) -> Array:
        p, kind = self.parameters[name], self.kind[name]
        if kind in ("Affine", "Linear"):
            assert p["weight"].shape == (p["weight"].shape[0], x.shape[-1])
            return np.einsum("oc,nc->no", p["weight"], x) + p.get("bias", 0)
        if kind == "Scale":
            return p["scale"] * x
        if kind == "Threshold":
            return np.where(x > p["threshold"], 1, 0).astype(x.dtype)
        if kind == "Output":
            assert x.shape[-1] == int(p["shape"][0])
            return x
        v = self.membranes.get(name, np.zeros_like(x))
        v = v + (p["r"] * x if kind in ("I", "IF") else (p["v_leak"] - v + p["r"] * x) / p["tau"])
        z = v
        if kind in ("IF", "LIF"):
            z = np.where(v > p["v_threshold"], 1, 0).astype(x.dtype)
            v = v - z * p["v_threshold"] if self.subtracts else v * (1 - z) + z * p["v_reset"]
        self.membranes[name] = v
        return z
