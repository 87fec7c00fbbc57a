"""What the tests of the NIR back end share: small programs of a few neurons, and their files run by an interpreter of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from nir_interpreter import Array, Interpreter
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ntc.meta import stamp_captured
from ntc.ops import aten
from ntc.program import ModelInfo, Program, interpret
from ntc.verify import verify
from ntc_backends.nir_export import NirBackend
from ntc_backends.nir_index import NirIndex, load_index
from ntc_backends.nir_options import NirOptions

ops = torch.ops.ntc
FIRE, LEAKY, INTEGER = ops.integrate_fire.default, ops.leaky_integrate_fire.default, ops.integer_fire.default


class Toy:
    """A program put together by hand: ``toy(target, *args)`` adds a node, tensors among the arguments become constants."""

    def __init__(self, table: Tensor) -> None:
        """Begin with a lookup of activations ``[V, C]``."""
        self.graph, self.tensors = Graph(), {}
        ids = self.graph.placeholder("input_ids")
        self.last = self(aten.embedding.default, table, ids, name="x")
        self.vocab = len(table)

    def __call__(self, target: Any, *args: Any, name: str) -> Node:
        constants = []
        for i, value in enumerate(args):
            if isinstance(value, Tensor):
                key = f"{name}_{i}"
                self.tensors[key] = value
                value = self.graph.get_attr(key)
            constants.append(value)
        self.last = self.graph.create_node("call_function", target, tuple(constants), name=name)
        return self.last

    def fire(self, current: Node, theta: Tensor, v0: Tensor, steps: int, signed: bool = False, timed: bool = False, *, name: str) -> Node:
        return self(FIRE, current, theta, v0, steps, signed, timed, "atan", 1.0, name=name)

    def done(self) -> Program:
        """The program, verified; its result is the last node, decoded if it has steps."""
        self.graph.output(self.last)
        stamp_captured(self.graph)
        root = torch.nn.Module()
        for key, value in self.tensors.items():
            root.register_buffer(key, value)
        program = Program(GraphModule(root, self.graph), ModelInfo("toy", "Toy", self.vocab), torch.arange(self.vocab)[None])
        program.propagate()
        verify(program)
        return program


def emitted(program: Program, folder: Path, **options: Any) -> NirIndex:
    NirBackend(NirOptions(**options)).emit(program, folder, tokens=program.example)
    return load_index(folder)


def trains(program: Program, ids: Tensor | None = None) -> dict[str, Array]:
    """What every node of the program gives."""
    found: dict[str, Array] = {}

    def visit(node: Node, args: Any, value: Any) -> None:
        if isinstance(value, Tensor):
            found[node.name] = value.detach().numpy()

    with torch.no_grad():
        interpret(program, program.example if ids is None else ids, visit)
    return found


def interpreted(folder: Path, index: NirIndex, values: dict[str, Array]) -> dict[str, Array]:
    """Spikes and outputs of all files, each on the program's value at its input, ``[T, B, L, C]`` by node of the program."""
    found = {}
    for entry in index.files:
        port, value = entry.input, values[entry.input.value].astype(entry.dtype)
        train = np.repeat(value[None], entry.steps, axis=0) if port.held else value.copy()
        lead = train.shape[:-1]
        train = train.reshape(entry.steps, -1, train.shape[-1])
        if port.start == "channel":
            pulse = np.zeros((*train.shape[:-1], 1), train.dtype)
            pulse[0] = 1
            train = np.concatenate([train, pulse], axis=-1)
        if port.start == "add":
            train[0] += np.asarray(port.start_current, train.dtype)
        nodes = Interpreter(folder / "nir" / entry.file).run(train)
        found |= {p.name: nodes[p.spikes].reshape(*lead, -1) for p in entry.populations}
        found |= {o.value: nodes[o.port].reshape(*lead, -1) for o in entry.outputs}
    return found


def differing(program: Program, folder: Path, index: NirIndex, ids: Tensor | None = None) -> dict[str, int]:
    """Spikes of the interpreter that are not the program's, by population; there are spikes."""
    values = trains(program, ids)
    found = interpreted(folder, index, values)
    names = [p.name for f in index.files for p in f.populations]
    assert names
    assert any(values[n].any() for n in names)
    return {n: int((values[n] != found[n]).sum()) for n in names}
