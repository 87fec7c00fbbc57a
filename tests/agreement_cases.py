"""What the tests of ``ntc verify`` share: small programs, and an executor that runs a program as an artefact of another one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from integer_programs import Builder
from torch import Tensor
from torch.fx import Node

from ntc import artifact
from ntc.executors import Execution, Executor
from ntc.ops import aten
from ntc.pipeline import Context, run_pipeline
from ntc.program import Program, interpret
from ntc.recording import populations
from ntc.text import Tokens, calibration_from, random_tokens
from ntc_passes.quantize import Quantize

ops = torch.ops.ntc
CHANNELS, HEADS, STEPS, VOCABULARY, WINDOW = 16, 2, 4, 997, 12


class Named(Builder):
    """Its constants have names as thresholds of a model, so that quantize can put others beside them."""

    def constant(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        name = f"part_{len(self.tensors)}.threshold"
        self.tensors[name] = value
        return self._marked(self.graph.create_node("get_attr", name))


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def floating(*, signed: bool = True, tau: float | None = None, hard: bool = False, dyadic: bool = False) -> Program:
    """A block of spiking attention and a feed-forward layer in float32, weights random.

    With ``dyadic`` all numbers in front of the first neurons are multiples of 1/8: membranes meet their thresholds exactly, whatever the
    order of sums.
    """
    c = CHANNELS
    b = Named((noise(VOCABULARY, c, seed=0) * 4).round() / 4 if dyadic else noise(VOCABULARY, c, seed=0), context=WINDOW)

    def norm(x: Node, seed: int) -> Node:
        return b.call(aten.layer_norm.default, x, [c], 1 + 0.2 * noise(c, seed=seed), 0.2 * noise(c, seed=seed + 1), 1e-5, False)

    def fired(x: Node, size: int, seed: int, name: str) -> Node:
        weight, bias = noise(size, c, seed=seed) / 4, noise(size, seed=seed + 1) / 4
        if dyadic:
            weight, bias = (weight * 2).round() / 2, (bias * 4).round() / 4
        current = b.call(aten.linear.default, x, weight, bias, name=f"{name}_current")
        theta = torch.ones(size) if dyadic else 0.5 + torch.rand(size, generator=torch.Generator().manual_seed(seed + 2))
        if tau is not None:
            args = (theta, torch.tensor([tau]), torch.zeros(1), STEPS, hard, False, "atan", 1.0)
            return b.call(ops.leaky_integrate_fire.default, current, *args, name=name)
        return b.call(ops.integrate_fire.default, current, theta, torch.tensor([0.5]), STEPS, signed, False, "atan", 1.0, name=name)

    x = b.embedded if dyadic else norm(b.embedded, 10)
    trains = [fired(x, c, 20 + 5 * i, name) for i, name in enumerate(("q", "k", "v"))]
    y = b.call(ops.spiking_attention.default, *trains, HEADS, HEADS, torch.tensor([0.75, 0.875]), name="attention")
    attended = b.call(aten.linear.default, b.call(ops.decode.default, y, "rate"), noise(c, c, seed=40) / 8, noise(c, seed=41) / 8)
    stream = b.call(aten.add.Tensor, b.embedded, attended)
    hidden = b.call(aten.linear.default, fired(norm(stream, 42), 2 * c, 45, "ffn"), noise(c, 2 * c, seed=50) / 4, noise(c, seed=51))
    stream = b.call(aten.add.Tensor, stream, b.call(ops.decode.default, hidden, "rate"))
    return b.program(b.call(aten.linear.default, norm(stream, 52), noise(VOCABULARY, c, seed=55), None, name="head"))


def quantized(**options: Any) -> Program:
    """The same in integers."""
    program = floating(**options)
    program.facts |= {"spiking"}
    return run_pipeline(program, [Quantize()], Context(calibration_from(tokens(600))))


def constant_of(program: Program, node: str, argument: int) -> str:
    """Name of the tensor that a node takes."""
    return str(program.find(node).args[argument].target)


def changed(program: Program, name: str, change: Callable[[Tensor], Tensor | None]) -> Program:
    """The program with one tensor changed, in its values only; ``change`` may work in place."""
    tensors = {key: value.detach().clone() for key, value in program.tensors.items()}
    other = change(tensors[name])
    tensors[name] = tensors[name] if other is None else other
    return program.with_graph(program.copy().graph, tensors)


def set_element(index: Any, factor: float) -> Callable[[Tensor], None]:
    def change(tensor: Tensor) -> None:
        tensor[index] = tensor[index] * factor

    return change


def in_double(program: Program) -> Program:
    """The same in float64, to run: other roundings."""
    return program.with_graph(program.copy().graph, {n: t.double() if t.is_floating_point() else t for n, t in program.tensors.items()})


def tokens(count: int = 240, vocabulary: int = VOCABULARY) -> Tokens:
    return random_tokens(vocabulary, WINDOW, count)


def saved(program: Program, folder: Path) -> Path:
    """A compiled folder of the program."""
    folder.mkdir(parents=True)
    artifact.save(program.with_graph(program.copy().graph, {n: t.detach().clone() for n, t in program.tensors.items()}), folder)
    artifact.seal(folder)
    return folder


Fire = Callable[[Node, tuple[Any, ...]], Tensor]


def fire_with(compare: Callable[[Tensor, Tensor], Tensor] = torch.ge, *, hard: bool = False, node: str = "") -> Fire:
    """IF neurons by their equations, with another comparison or reset in one population (or in all)."""

    def fire(at: Node, args: tuple[Any, ...]) -> Tensor:
        if node and at.name != node:
            return at.target(*args)  # type: ignore[operator]
        current, threshold, start, steps, signed, timed = args[:6]
        start = start * threshold if current.is_floating_point() else start
        v, train = torch.zeros_like(current[0] if timed else current) + start, []
        for t in range(steps):
            u = v + (current[t] if timed else current)
            s = compare(u, threshold).to(u.dtype) - (signed * (u < 0)).to(u.dtype)
            v = u * (1 - s) if hard else u - s * threshold
            train.append(s)
        return torch.stack(train).to(at.meta["val"].dtype)

    return fire


class ProgramExecutor(Executor):
    """Runs a program as if it were the artefact of another one."""

    name = "program"
    about = "torch"

    def __init__(self, program: Program, fire: Fire | None = None) -> None:
        self.program, self.fire, self.nodes = program, fire, populations(program)

    def prepare(self, folder: Path, program: Program) -> None:
        pass

    def run(self, ids: Tensor) -> Execution:
        return self._run(ids, {})

    def held(self, ids: Tensor, values: Mapping[str, Tensor]) -> Execution:
        return self._run(ids, values)

    def _run(self, ids: Tensor, held: Mapping[str, Tensor]) -> Execution:
        spikes: dict[str, Tensor] = {}

        def visit(node: Node, args: tuple[Any, ...], value: Any) -> Any:
            if node.name not in self.nodes:
                return None
            train = value if self.fire is None else self.fire(node, args)
            spikes[node.name] = train.to(torch.int8)
            return held[node.name].to(train.dtype) if held else train

        with torch.no_grad():
            logits = interpret(self.program, ids, visit)
        return Execution(logits, spikes)
