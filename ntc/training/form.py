r"""A program as it is trained: the same graph, differentiable and quick.

Nothing is defined a second time. The graph of the program is copied and edited:

- ``decode(W s + b)`` becomes ``W decode(s) + b`` (the rate decode is a mean over the steps, which a linear layer lets through):
  one matrix product instead of T;
- ops that have a traced form (``OpSpec.traced``: the same arithmetic in plain torch operations) run that, so that
  ``torch.compile`` fuses neurons with what is around them; any other op runs its kernel and its own gradient;
- a trained threshold or leak is computed from its unconstrained number (``ntc.training.legal``);
- besides the logits the graph returns the residual stream behind every block and the firing rates of every population.

Forward results equal those of the program up to rounding in float32, so up to threshold ties; what is measured and shipped is
always the program itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import checkpoint

from ntc.blocks import block_outputs, layer_outputs
from ntc.errors import ConfigError
from ntc.meta import NEURON, block_of
from ntc.ops import aten, spec_of
from ntc.program import Program
from ntc.surrogate import surrogate as find_surrogate
from ntc.training.groups import TensorRole, roles_of
from ntc.training.legal import from_raw, to_raw

__all__ = ["Outputs", "Population", "TrainingForm"]

_DECODE = torch.ops.ntc.decode.default


class Outputs(NamedTuple):
    """What one forward pass gives.

    Attributes:
        logits: ``[B, L, V]``.
        hidden: The residual stream behind every block, ``[B, L, C]`` each; of a form ``by_layer``, what every attention and FFN
            adds to it.
        rates: Spikes per token and step of every neuron, ``[C]`` per population; those of ``populations``.
        stream: Of a form ``by_layer``: the residual stream behind every one of these, ``[B, L, C]``.
    """

    logits: Tensor
    hidden: tuple[Tensor, ...]
    rates: tuple[Tensor, ...]
    stream: tuple[Tensor, ...] = ()


class Population(NamedTuple):
    """A population of the program: its node, transformer block and role (``q``, ``k``, ``v``, ``ssa``, ``ffn``)."""

    name: str
    block: str
    role: str
    signed: bool

    @property
    def label(self) -> str:
        """Short name for logs: ``h.0.q``."""
        block = ".".join(self.block.rsplit(".", 2)[-2:])
        return f"{block}.{self.role}" if self.block and self.role else self.name


class TrainingForm(nn.Module):
    """The differentiable form of a program.

    Args:
        program: Spiking or analog; it is not changed, and its tensors are not shared.
        trained: Target names of the tensors to train; all others are frozen.
        surrogate: Surrogate gradient for all neurons; None keeps the one of each node.
        width: Width of the surrogate, as a fraction of the threshold; None likewise.
        bf16: Run matrix products in bfloat16 (autocast). Membranes stay in float32.
        checkpointing: Do not keep the membrane potentials of the T steps for the backward pass, compute them again.
        by_layer: Let ``hidden`` be what every attention and FFN adds to the residual stream, and ``stream`` that stream.
        forced: ``forward`` takes the streams of a teacher (its ``Outputs.stream``), and every attention and FFN reads those: no
            layer then sees the errors of the ones before it, and none learns from those behind it.
    """

    def __init__(
        self,
        program: Program,
        trained: frozenset[str] = frozenset(),
        *,
        surrogate: str | None = None,
        width: float | None = None,
        bf16: bool = False,
        checkpointing: bool = False,
        by_layer: bool = False,
        forced: bool = False,
    ) -> None:
        super().__init__()
        if program.state:
            raise ConfigError("a streaming program is not trained: train the parallel one, and run to-streaming on the result")
        self.program = program
        self.bf16 = bf16
        self.roles: dict[str, TensorRole] = roles_of(program)
        self.trained = trained
        self._keys = {name: name.replace(".", "/") for name in program.tensors}  # a ParameterDict takes no dots
        self.raw = nn.ParameterDict()
        for name, tensor in program.tensors.items():
            if name in trained:
                self.raw[self._keys[name]] = nn.Parameter(to_raw(tensor, self.roles[name].domain))
            else:
                self.register_buffer(self._keys[name], tensor.detach().clone(), persistent=False)
        work = program.copy()
        blocks = block_outputs(work)
        hidden = list(blocks.values())
        stream: list[Node] = []
        self.blocks: tuple[str, ...] = tuple(blocks)
        if by_layer:
            layers, hidden, stream = _layers(work)
            self.blocks = tuple(layers)
        populations = [n for n in work.graph.nodes if n.op == "call_function" and _is_population(n)]
        self.populations = tuple(_population(n) for n in populations)
        _set_surrogate(populations, surrogate, width)
        _return_more(work.graph, hidden, populations, stream)  # first: from then on the graph itself keeps track of its results
        _decode_early(work.graph)
        if forced:
            _force(work.graph, stream)
        _trace(work.graph, checkpointing)
        self._inputs = _tensors_to_inputs(work.graph)
        self._run = GraphModule(nn.Module(), work.graph, "TrainingForm")

    def constants(self) -> dict[str, Tensor]:
        """Every tensor of the program with its present, legal value, by target name."""
        return {name: self._value(name) for name in self._keys}

    def _value(self, name: str) -> Tensor:
        key = self._keys[name]
        if name in self.trained:
            return from_raw(self.raw[key], self.roles[name].domain)
        value = getattr(self, key)
        assert isinstance(value, Tensor)
        return value

    def forward(self, input_ids: Tensor, forced: tuple[Tensor, ...] = ()) -> Outputs:
        """Token ids ``[B, L]`` (and, if the form is forced, a teacher's streams) to logits, hidden states and rates."""
        context = torch.autocast("cpu", dtype=torch.bfloat16) if self.bf16 else nullcontext()
        with context:
            found = self._run(input_ids, *forced, *[self._value(name) for name in self._inputs])
        return Outputs(*found)

    def to_program(self) -> Program:
        """The program with the trained values: its own graph, exact kernels, new tensors."""
        result = self.program.copy()
        values = self.constants()
        extra: dict[str, Tensor] = {}
        for name in self.trained:
            old = self.program.tensor(name)
            value = values[name].detach().to(old.dtype).contiguous()
            extra[name] = nn.Parameter(value) if isinstance(old, nn.Parameter) else value
        return result.with_graph(result.graph, extra)


def _is_population(node: Node) -> bool:
    spec = spec_of(node)
    return spec is not None and spec.element == "population"


def _population(node: Node) -> Population:
    neuron = node.meta.get(NEURON)
    return Population(node.name, block_of(node), neuron.role if neuron else "", bool(neuron and neuron.signed))


def _set_surrogate(populations: list[Node], surrogate: str | None, width: float | None) -> None:
    """Write name and width of the surrogate into every neuron that has such arguments."""
    if surrogate is not None:
        find_surrogate(surrogate)
    if width is not None and not width > 0:
        raise ConfigError(f"the width of a surrogate gradient is positive, got {width}")
    for node in populations:
        schema = getattr(node.target, "_schema", None)
        names = [a.name for a in schema.arguments] if schema is not None else []
        for argument, value in (("surrogate", surrogate), ("width", width)):
            if value is not None and argument in names:
                node.update_arg(names.index(argument), value)


def _decode_early(graph: Graph) -> None:
    """Take the mean over the steps before a linear layer instead of behind it, where nothing else reads the current."""
    for decode in [n for n in graph.nodes if n.target is _DECODE and n.args[1] == "rate"]:
        train = decode.args[0]
        assert isinstance(train, Node)
        while _is_linear(train) and len(train.users) == 1:
            source = train.args[0]
            assert isinstance(source, Node)
            with graph.inserting_before(train):
                early = graph.call_function(_DECODE, (source, "rate"))
            train.update_arg(0, early)
            decode.replace_all_uses_with(train)
            graph.erase_node(decode)
            decode, train = early, source


def _is_linear(node: Node) -> bool:
    """Linear (or affine) in its first operand, with the same constants at every step."""
    if node.target is aten.linear.default:
        return True
    other = node.args[1] if node.target is aten.mul.Tensor else None
    return isinstance(other, Node) and other.op == "get_attr"


def _layers(work: Program) -> tuple[list[str], list[Node], list[Node]]:
    """What every attention and FFN adds to the residual stream, by name, and the sum behind each."""
    names: list[str] = []
    added: list[Node] = []
    stream: list[Node] = []
    for layer in layer_outputs(work):
        if layer.where != "block":
            names.append(f"{layer.block}.{layer.where}")
            added.append(layer.node)
            stream.append(next(u for u in layer.node.users if u.target is aten.add.Tensor))
    return names, added, stream


def _force(graph: Graph, stream: list[Node]) -> None:
    """Put a teacher's residual stream, a new input, in place of each of these sums."""
    last = next(n for n in graph.nodes if n.op == "placeholder")
    given: list[Node] = []
    for number in range(len(stream)):
        with graph.inserting_after(last):
            last = graph.placeholder(f"stream_{number}")
        given.append(last)
    for node, value in zip(stream, given, strict=True):
        node.replace_all_uses_with(value)


def _return_more(graph: Graph, hidden: list[Node], populations: list[Node], stream: list[Node]) -> None:
    """Let the graph return what ``Outputs`` holds."""
    output = next(n for n in graph.nodes if n.op == "output")
    with graph.inserting_before(output):
        rates = [graph.call_function(_rate_of, (n,)) for n in populations]
    output.args = ((output.args[0], tuple(hidden), tuple(rates), tuple(stream)),)


def _rate_of(spikes: Tensor) -> Tensor:
    """Spikes per token and step, of either sign, per neuron."""
    return spikes.abs().float().flatten(0, -2).mean(0)


def _trace(graph: Graph, checkpointing: bool) -> None:
    """Put the traced form of every op that has one in place of its kernel."""
    for node in graph.nodes:
        spec = spec_of(node) if node.op == "call_function" else None
        if spec is not None and spec.traced is not None:
            is_repeated = checkpointing and spec.element == "population"
            node.target = _recomputed(spec.traced) if is_repeated else spec.traced


def _recomputed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: Any) -> Tensor:
        result: Tensor = checkpoint(function, *args, use_reentrant=False)
        return result

    run.__name__ = f"{function.__name__}_recomputed"
    return run


def _tensors_to_inputs(graph: Graph) -> list[str]:
    """Turn constants into inputs behind the token ids, so that they may be computed ones; returns their names in order."""
    inputs: dict[str, Node] = {}
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        name = str(node.target)
        if name not in inputs:
            with graph.inserting_after(last):
                inputs[name] = last = graph.placeholder(f"tensor_{len(inputs)}")
        node.replace_all_uses_with(inputs[name])
        graph.erase_node(node)
    graph.eliminate_dead_code()
    graph.lint()
    return list(inputs)
