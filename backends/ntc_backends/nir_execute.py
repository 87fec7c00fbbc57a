"""Runs NIR files on numbers: the nodes as NIR defines them, one time step after another, in numpy.

Nothing of the compiler's graph is used, only the files and their index. Time is discrete, one unit of NIR's time per step:

    I        v += r x;                      z = v
    LI       v += (v_leak - v + r x) / tau; z = v
    IF, LIF  as I, LI, then z = 1[v > v_threshold] and v = v_reset where z = 1    (NIR 1.0.4 and 1.0.5: v = v - v_threshold)
    Threshold, Scale, Affine, Linear: z = 1[x > threshold],  x * scale,  W x + b,  W x

Several edges into a node are added. Integrators begin at 0, also those that leak to something else. An edge that closes a loop delivers
what its source gave at the step before, 0 at the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from ntc.errors import ArtifactError, DataError
from ntc_backends.nir_index import FOLDER, FileEntry, NirIndex, load_index
from ntc_backends.nir_options import require_nir

__all__ = ["Machine", "nir_execute", "run_file"]

Array = NDArray[Any]
Reading = Literal["definition", "subtract"]

_SUBTRACTING = ("1.0.4", "1.0.5")
_INTEGRATORS = ("I", "LI", "IF", "LIF")


def nir_execute(folder: Path | str, inputs: Mapping[str, Array], *, reading: Reading = "definition") -> dict[str, Array]:
    """Run the NIR files of a compiled folder on the values that a program has at their inputs.

    Args:
        folder: A folder with ``nir/index.json``.
        inputs: Values by node of the program: ``[B, L, C]``, or ``[T, B, L, C]`` where the index says that the input is not held.
            Files whose input is not given are not run.
        reading: ``definition`` as NIR defines IF and LIF in the version of the file; ``subtract`` as readers do that always subtract.

    Returns:
        For each population in these files its spikes, and each value that leaves a file, ``[T, B, L, C]`` by node of the program.

    Raises:
        ArtifactError: If a file is missing, damaged, or not the one in the index.
        DataError: If an input is unknown, has another shape, or none is given.
    """
    require_nir()
    from ntc_backends.nir_files import digest_of, read_file

    folder = Path(folder)
    index = load_index(folder)
    _check_names(index, inputs)
    result: dict[str, Array] = {}
    for entry in index.files:
        if entry.input.value not in inputs:
            continue
        path = folder / FOLDER / entry.file
        if not path.is_file() or digest_of(path) != entry.sha256:
            raise ArtifactError(f"{path} is missing or has changed since its index was written: export it again")
        graph, version = read_file(path)
        result |= run_file(entry, graph, version, inputs[entry.input.value], reading)
    return result


def _check_names(index: NirIndex, inputs: Mapping[str, Array]) -> None:
    known = {entry.input.value for entry in index.files}
    unknown = sorted(set(inputs) - known)
    if unknown:
        raise DataError(f"no NIR file reads {unknown[0]}; they read {', '.join(sorted(known))}")
    if not inputs:
        raise DataError(f"nothing to run: give a value for at least one of {', '.join(sorted(known))}")


def run_file(entry: FileEntry, graph: Any, version: str, value: Array, reading: Reading = "definition") -> dict[str, Array]:
    """Run one file; see ``nir_execute``."""
    port = entry.input
    rank = 3 if port.held else 4
    channels = port.channels - (port.start == "channel")
    if value.ndim != rank or value.shape[-1] != channels or (not port.held and value.shape[0] != entry.steps):
        steps = "" if port.held else f"{entry.steps}, "
        raise DataError(f"{port.value} has shape [{steps}B, L, {channels}] in {entry.file}, not {list(value.shape)}")
    machine = Machine(graph, subtract=version in _SUBTRACTING or reading == "subtract")
    train = value.astype(entry.dtype, copy=False).reshape(1 if port.held else entry.steps, -1, channels)
    watched = {p.name: p.spikes for p in entry.populations}
    watched |= {o.value: next(a for a, b in graph.edges if b == o.port) for o in entry.outputs}
    seen: dict[str, list[Array]] = {name: [] for name in watched}
    for x in _by_step(entry, train):
        values = machine.step({port.port: x})
        for name, node in watched.items():
            seen[name].append(values[node])
    lead = value.shape[-3:-1]
    return {name: np.stack(steps).reshape(entry.steps, *lead, -1) for name, steps in seen.items()}


def _by_step(entry: FileEntry, train: Array) -> list[Array]:
    """The input of each step, with what sets the initial potentials; a held input is the same array again."""
    port = entry.input
    steps = [train[0]] * entry.steps if port.held else list(train)
    if port.start == "add":
        return [steps[0] + np.asarray(port.start_current, train.dtype), *steps[1:]]
    if port.start == "none":
        return steps
    one = np.ones((train.shape[1], 1), train.dtype)
    first = np.concatenate([steps[0], one], axis=1)
    if port.held:
        return [first] + [np.concatenate([steps[0], 0 * one], axis=1)] * (entry.steps - 1)
    return [first, *(np.concatenate([x, 0 * one], axis=1) for x in steps[1:])]


class Machine:
    """A NIR graph with its state, for a batch of independent runs.

    Args:
        graph: A flat ``NIRGraph`` of the primitives in the module's docstring.
        subtract: Whether IF and LIF subtract their threshold when they fire.

    Raises:
        ArtifactError: For another primitive, or a loop without an integrator.
    """

    def __init__(self, graph: Any, *, subtract: bool = False) -> None:
        self.nodes, self.subtract = graph.nodes, subtract
        forward: nx.DiGraph[str] = nx.DiGraph()
        forward.add_nodes_from(sorted(graph.nodes))
        forward.add_edges_from(graph.edges)
        component = {n: i for i, group in enumerate(nx.strongly_connected_components(forward)) for n in group}
        self.sources: dict[str, list[str]] = {n: [a for a, b in graph.edges if b == n] for n in graph.nodes}
        self.late = {(a, b) for a, b in graph.edges if component[a] == component[b] and self._kind(b) in _INTEGRATORS}
        forward.remove_edges_from(self.late)
        if not nx.is_directed_acyclic_graph(forward):
            raise ArtifactError("a loop of this NIR graph has no integrator, so its value is not defined")
        self.order = list(nx.lexicographical_topological_sort(forward))
        for name in self.order:
            if self._kind(name) not in _RULES:
                raise ArtifactError(f"node {name} is of type {self._kind(name)}, which is not run here")
            if self._kind(name) != "Input" and all((a, name) in self.late for a in self.sources[name]):
                raise ArtifactError(f"nothing drives node {name}: no way leads to it from an input")
        self.state: dict[str, Array] = {}
        self.before: dict[str, Array] = {}
        # A held input gives the same current at every step: the product of the last step, if its input is the same array.
        self.kept: dict[str, tuple[Array, Array]] = {}

    def _kind(self, name: str) -> str:
        return type(self.nodes[name]).__name__

    def step(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """One time step.

        Args:
            inputs: For each Input node an array ``[N, C]``.

        Returns:
            What each node gives.
        """
        now: dict[str, Array] = {}
        for name in self.order:
            if self._kind(name) == "Input":
                now[name] = inputs[name]
                continue
            arriving = [self.before.get(a) if (a, name) in self.late else now[a] for a in self.sources[name]]
            there = [x for x in arriving if x is not None]
            total = there[0]
            for x in there[1:]:
                total = total + x
            now[name] = _RULES[self._kind(name)](self, name, self.nodes[name], total)
        self.before = now
        return now

    def _matrix(self, name: str, node: Any, x: Array) -> Array:
        held = self.kept.get(name)
        if held is not None and held[0] is x:
            return held[1]
        y: Array = x @ node.weight.T
        if hasattr(node, "bias"):
            y = y + node.bias
        self.kept[name] = x, y
        return y

    def _integrate(self, name: str, node: Any, x: Array) -> Array:
        v = self.state.get(name, np.zeros_like(x))
        drive = node.r * x
        if hasattr(node, "tau"):
            drive = (node.v_leak - v + drive) / node.tau
        u: Array = v + drive
        self.state[name] = u
        return u

    def _fire(self, name: str, node: Any, x: Array) -> Array:
        v = self._integrate(name, node, x)
        fired: Array = v > node.v_threshold
        self.state[name] = np.where(fired, v - node.v_threshold if self.subtract else node.v_reset, v)
        spikes: Array = fired.astype(v.dtype)
        return spikes


def _plain(rule: Callable[[Any, Array], Array]) -> Callable[[Machine, str, Any, Array], Array]:
    return lambda machine, name, node, x: rule(node, x)


_RULES: dict[str, Callable[[Machine, str, Any, Array], Array]] = {
    "Input": _plain(lambda node, x: x),
    "Output": _plain(lambda node, x: x),
    "Affine": Machine._matrix, "Linear": Machine._matrix,
    "Scale": _plain(lambda node, x: x * node.scale),
    "Threshold": _plain(lambda node, x: (x > node.threshold).astype(x.dtype)),
    "I": Machine._integrate, "LI": Machine._integrate, "IF": Machine._fire, "LIF": Machine._fire,
}  # fmt: skip
