"""One part of a program as a ``NIRGraph``: an ``input``, its layers and neurons, and an ``output`` for each value that leaves.

Names of nodes are those of the program, with a suffix where one node becomes several; letters, digits and ``_`` only, because ``/``
breaks the file and ``.`` some readers. Metadata are one JSON string under ``ntc``: nothing else survives every reader.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import nir
import numpy as np
from torch.fx import Node

from ntc.program import Program
from ntc_backends.nir_neurons import Array, Neuron, arguments, full, loop_threshold, neuron_of, node_threshold, numpy_of, start_current
from ntc_backends.nir_options import NirOptions
from ntc_backends.nir_parts import Part, is_scale, source_of_part

__all__ = ["Drawn", "draw"]


@dataclass
class Drawn:
    """A part in NIR's words.

    Attributes:
        nodes: NIR nodes by name.
        edges: Pairs of names.
        made: For each node of the program, the NIR nodes that it became.
        exits: For each node of the program, the NIR node that carries its value.
        ports: The Output node of each value that leaves.
        channels: Width of the input.
        start: For ``start`` = ``add``, what is added to the first step, ``[C]``.
    """

    nodes: dict[str, Any] = field(default_factory=dict)
    edges: list[tuple[str, str]] = field(default_factory=list)
    made: dict[str, list[str]] = field(default_factory=dict)
    exits: dict[str, str] = field(default_factory=dict)
    ports: dict[str, str] = field(default_factory=dict)
    channels: int = 0
    start: Array | None = None

    def graph(self, metadata: dict[str, Any]) -> Any:
        """The graph, its types checked by the nir package."""
        return nir.NIRGraph(nodes=self.nodes, edges=self.edges, metadata={"ntc": json.dumps(metadata, sort_keys=True)})


def draw(program: Program, part: Part, options: NirOptions) -> Drawn:
    """Write a part down in NIR's primitives."""
    return _Pen(program, part, options).run()


class _Pen:
    def __init__(self, program: Program, part: Part, options: NirOptions) -> None:
        self.program, self.part, self.options = program, part, options
        self.drawn = Drawn()
        self.taken = {"input", "output"} | {n.name for n in part.nodes}

    def run(self) -> Drawn:
        part, drawn = self.part, self.drawn
        drawn.channels = int(part.source.meta["val"].shape[-1]) + (part.start == "channel")
        drawn.nodes["input"] = nir.Input(input_type={"input": np.array([drawn.channels])})
        for node in part.nodes:
            entry = "input" if node is part.nodes[0] else drawn.exits.get(source_of_part(node).name, "")
            if node in part.forms:
                exit_ = self._population(node, entry)
            elif is_scale(node):
                exit_ = self._scale(node, entry)
            elif any(part.forms.get(user) == "pair" for user in node.users):
                drawn.made[node.name] = []  # drawn with its neurons
                continue
            else:
                exit_ = self._linear(node, entry)
            drawn.exits[node.name] = exit_
        for node in part.outputs:
            port = "output" if len(part.outputs) == 1 else self._free(f"output_{node.name}")
            drawn.nodes[port] = nir.Output(output_type={"output": np.array([int(node.meta["val"].shape[-1])])})
            drawn.edges.append((drawn.exits[node.name], port))
            drawn.ports[node.name] = port
        return drawn

    def _free(self, name: str) -> str:
        found, number = name, 1
        while found in self.taken:
            found, number = f"{name}_{number}", number + 1
        self.taken.add(found)
        return found

    def _put(self, node: Node, value: Any, suffix: str = "", entries: tuple[str, ...] = (), **more: Any) -> str:
        """One NIR node of a node of the program."""
        name = self._free(f"{node.name}_{suffix}") if suffix else node.name
        value.metadata["ntc"] = json.dumps({"node": node.name, "part": suffix, **more}, sort_keys=True)
        self.drawn.nodes[name] = value
        self.drawn.edges += [(entry, name) for entry in entries]
        self.drawn.made.setdefault(node.name, []).append(name)
        return name

    def _linear(self, node: Node, entry: str) -> str:
        weight, bias = self._weights(node)
        starting = next((u for u in node.users if self.part.start == "channel" and u in self.part.forms), None)
        if starting is not None and node is self.part.nodes[0]:
            weight = np.column_stack([weight, start_current(self._neuron(starting)).astype(weight.dtype)])
        return self._put(node, _layer(weight, bias), entries=(entry,))

    def _weights(self, node: Node) -> tuple[Array, Array | None]:
        given = arguments(node)
        bias = given["bias"]
        weight = numpy_of(self.program.tensor(given["weight"]), self.part.dtype)
        return weight, None if bias is None else numpy_of(self.program.tensor(bias), self.part.dtype)

    def _scale(self, node: Node, entry: str) -> str:
        train = source_of_part(node)
        factor = next(a for a in node.args if a is not train)
        size = int(node.meta["val"].shape[-1])
        return self._put(node, nir.Scale(scale=full(self.program, factor, size, self.part.dtype)), entries=(entry,))

    # Neurons: see nir_neurons for why these are the program's.

    def _neuron(self, node: Node) -> Neuron:
        return neuron_of(self.program, node, self.part.dtype)

    def _population(self, node: Node, entry: str) -> str:
        neuron = self._neuron(node)
        form = self.part.forms[node]
        if form == "loop":
            return self._loop(node, neuron, entry)
        if form == "pair":
            return self._pair(node, neuron)
        if self.part.start == "add" and node is self.part.nodes[0]:
            self.drawn.start = start_current(neuron)
        return self._put(node, self._cell(neuron, node_threshold(neuron)), entries=(entry,), **self._said(neuron))

    def _loop(self, node: Node, neuron: Neuron, entry: str) -> str:
        theta, one = neuron.threshold, np.ones_like(neuron.threshold)
        if neuron.tau is None:
            membrane: Any = nir.I(r=one)
            back = -theta
        else:
            membrane = nir.LI(tau=neuron.tau, r=one.copy(), v_leak=-neuron.start)
            back = -theta * (neuron.tau - 1)
        v = self._put(node, membrane, "membrane", (entry,))
        fires = loop_threshold(neuron)
        ways: tuple[tuple[str, str, Array], ...]
        if neuron.signed:
            # Two ways back, and the sum outside of the loop: nirtorch delays one of two edges into any node of a loop.
            up = self._put(node, nir.Threshold(threshold=fires), "up", (v,))
            flipped = self._put(node, nir.Scale(scale=-one), "flipped", (v,))
            down = self._put(node, nir.Threshold(threshold=neuron.start), "down", (flipped,))
            negative = self._put(node, nir.Scale(scale=-one), "negative", (down,))
            ways = ((up, "reset_up", back), (down, "reset_down", -back))
            spikes = self._put(node, nir.Scale(scale=one.copy()), "spikes", (up, negative))
        else:
            spikes = self._put(node, nir.Threshold(threshold=fires), "spikes", (v,))
            ways = ((spikes, "reset", back),)
        for source, suffix, weight in ways:
            self.drawn.edges.append((self._put(node, nir.Scale(scale=weight), suffix, (source,)), v))
        return spikes

    def _pair(self, node: Node, neuron: Neuron) -> str:
        """The layer in front and its ternary neurons, twice: once for each sign."""
        layer = source_of_part(node)
        weight, bias = self._weights(layer)
        one = np.ones_like(neuron.threshold)
        self.drawn.made[layer.name] = []
        ends = []
        for suffix, sign, start, threshold in (
            ("on", 1, start_current(neuron), node_threshold(neuron)),
            ("off", -1, start_current(neuron, off=True), neuron.threshold),  # u < 0 is strict, as NIR's comparison
        ):
            rows = np.column_stack([sign * weight, start.astype(weight.dtype)])
            current = self._put(layer, _layer(rows, None if bias is None else sign * bias), suffix, ("input",))
            ends.append(self._put(node, self._cell(neuron, threshold), suffix, (current,), **self._said(neuron)))
        negative = self._put(node, nir.Scale(scale=-one), "negative", (ends[1],))
        return self._put(node, nir.Scale(scale=one), "spikes", (ends[0], negative))

    def _cell(self, neuron: Neuron, threshold: Array) -> Any:
        one, zero = np.ones_like(threshold), np.zeros_like(threshold)
        if neuron.tau is None:
            return nir.IF(r=one, v_threshold=threshold, v_reset=zero)
        return nir.LIF(tau=neuron.tau, r=one, v_leak=zero, v_threshold=threshold, v_reset=zero.copy())

    def _said(self, neuron: Neuron) -> dict[str, Any]:
        """Metadata of an IF or LIF node."""
        return {"reset": "soft"} if not neuron.hard and self.options.reset == "annotate" else {}


def _layer(weight: Array, bias: Array | None) -> Any:
    weight = np.ascontiguousarray(weight)
    return nir.Linear(weight=weight) if bias is None else nir.Affine(weight=weight, bias=np.ascontiguousarray(bias, dtype=weight.dtype))
