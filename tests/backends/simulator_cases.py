"""What the tests of the simulator share: a program's own spikes and logits beside those of its netlist."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from netlist_cases import Case, cached, doubled, emitted

from ntc.program import Program, interpret
from ntc_backends.netlist_elements import Population
from ntc_backends.simulator.engine import Simulator
from ntc_backends.simulator.raster import raster_arrays
from tests.integer_programs import block

_KEEP: list[tempfile.TemporaryDirectory[str]] = []

INTEGERS: dict[str, dict[str, Any]] = {
    "leaking": {}, "plain": {"leak": False, "signed": False}, "decoded": {"neuron": False, "centre": False}, "grouped": {"heads": 2, "kv_heads": 1},
}  # fmt: skip


def _folder() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="ntc-simulator-")
    _KEEP.append(folder)
    return Path(folder.name)


@functools.cache
def integer_case(name: str) -> Case:
    return emitted(block(**INTEGERS[name]), _folder())


@functools.cache
def double_case(variant: str, layers: int = 1) -> Case:
    """In float64 no membrane of a random model comes within rounding of its threshold: spikes are equal whatever the order of sums."""
    return emitted(doubled(cached(variant, layers).program), _folder())


@dataclass
class Reference:
    logits: np.ndarray
    spikes: dict[str, np.ndarray]


def reference(program: Program, ids: torch.Tensor) -> Reference:
    """What the program itself computes."""
    spikes: dict[str, np.ndarray] = {}

    def visit(node: Any, args: Any, value: Any) -> None:
        if "fire" in str(node.target):
            spikes[node.name] = value.numpy()

    with torch.no_grad():
        logits = interpret(program, ids, visit)
    return Reference(logits.numpy(), spikes)


def trains(simulator: Simulator, batch: int, length: int) -> dict[str, np.ndarray]:
    """Whether each neuron fired, as trains [T, B, L, C], from the rasters of a run."""
    arrays, found = raster_arrays(simulator.counter.rasters or {}), {}
    for p in simulator.netlist.populations:
        assert isinstance(p, Population)
        train = np.zeros((p.steps, batch, length, p.size), dtype=bool)
        train[tuple(arrays[f"{p.name}.{axis}"] for axis in ("step", "sequence", "token", "neuron"))] = True
        found[p.name] = train
    return found


def differing(simulator: Simulator, expected: Reference) -> int:
    """Number of spikes that differ from the program's."""
    _, batch, length, _ = next(iter(expected.spikes.values())).shape
    found = trains(simulator, batch, length)
    assert found.keys() == expected.spikes.keys()
    return sum(int((found[name] != (train != 0)).sum()) for name, train in expected.spikes.items())
