"""The one noun between the stages: a typed graph with its weights, facts and history.

A ``Program`` is a ``torch.fx`` graph in the dialect of ``ntc.ops``: one input ``input_ids [B, L]``, one output, the logits
``[B, L, V]``, weights as ``get_attr`` nodes. A streaming program also takes and returns a state (``ntc.state``). Capture makes
one, passes turn one into another, back ends and analyses read one. Nothing downstream reaches back to the ``nn.Module``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import networkx as nx
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from ntc.errors import NtcError
from ntc.info import ModelInfo, PassRecord, check_ids
from ntc.meta import NAME, NEURON, STATE, TYPE, block_of, module_of
from ntc.scratch import is_mapped, kept, released
from ntc.shapes import Shapes
from ntc.state import StateSpec

__all__ = ["ModelInfo", "PassRecord", "Program", "check_ids", "interpret", "op_name"]


class Program:
    """A captured or compiled network.

    Attributes:
        module: The ``GraphModule``: run it, train it, compile it with ``torch.compile``.
        info: What was captured.
        facts: What is known to hold (``captured``, ``canonical``, ``spiking`` ...): passes require and provide facts.
        history: The passes that ran, oldest first.
        example: Token ids ``[2, L]`` on which exactness is checked.
    """

    def __init__(
        self,
        module: GraphModule,
        info: ModelInfo,
        example: Tensor,
        facts: frozenset[str] = frozenset(),
        history: tuple[PassRecord, ...] = (),
    ) -> None:
        self.module = module
        self.info = info
        self.example = example
        self.facts = facts
        self.history = history
        self._wanted: dict[str, str] = {}  # tensor name -> the name it should have once that is free

    @property
    def graph(self) -> Graph:
        """The graph; after editing it call ``refresh``."""
        return self.module.graph

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Weights, thresholds and other constants by the target name of their ``get_attr`` nodes, in graph order."""
        return {str(n.target): self.tensor(n) for n in self.graph.nodes if n.op == "get_attr"}

    @property
    def state(self) -> tuple[StateSpec, ...]:
        """What it carries from one piece of a sequence to the next, in the order of the module's arguments; empty if nothing."""
        return tuple(n.meta[STATE] for n in self.graph.find_nodes(op="placeholder") if STATE in n.meta)

    @property
    def results(self) -> tuple[Node, ...]:
        """The node of the logits, and behind it those of the new state in the order of ``state``."""
        (returned,) = next(n for n in reversed(self.graph.nodes) if n.op == "output").args
        return cast(tuple[Node, ...], tuple(returned) if isinstance(returned, list | tuple) else (returned,))

    @property
    def steps(self) -> int:
        """T, the largest number of time steps of a spike train; 0 if nothing spikes."""
        from ntc.spike_type import SpikeType

        types = (n.meta.get(TYPE) for n in self.graph.nodes)
        return max((t.steps for t in types if isinstance(t, SpikeType)), default=0)

    def tensor(self, name: Node | str) -> Tensor:
        """The tensor of a ``get_attr`` node or target name."""
        found: Any = self.module
        for part in str(name.target if isinstance(name, Node) else name).split("."):
            found = getattr(found, part)
        assert isinstance(found, Tensor)
        return found

    def tensor_or_none(self, name: str) -> Tensor | None:
        """The tensor of that target name, or None if there is none."""
        found: Any = self.module
        for part in name.split("."):
            found = getattr(found, part, None)
        return found if isinstance(found, Tensor) else None

    def add_tensor(self, name: str, value: Tensor, *, trainable: bool = True) -> str:
        """Give a new constant a name that is not taken yet; returns the name for ``get_attr``.

        Floating-point tensors become parameters (so that fine-tuning finds them) unless ``trainable`` is false.
        """
        unique, number = name, 1
        while self.tensor_or_none(unique) is not None:
            unique, number = f"{name}_{number}", number + 1
        owner: nn.Module = self.module
        *parents, last = unique.split(".")
        for part in parents:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        value = kept(value.detach().contiguous())
        if trainable and value.is_floating_point():
            owner.register_parameter(last, nn.Parameter(value))
        else:
            owner.register_buffer(last, value)
        self._wanted[unique] = name
        return unique

    def copy(self) -> Program:
        """An independent graph over the same tensors: cheap, and passes never write into a tensor."""
        graph = Graph()
        mapping: dict[Node, Node] = {}
        output = graph.graph_copy(self.graph, mapping)
        graph.output(output)
        for old, new in mapping.items():
            new.meta = dict(old.meta)
        return self.with_graph(graph)

    def with_graph(self, graph: Graph, extra: Mapping[str, Tensor] | None = None) -> Program:
        """The same program with another graph over the same tensors (and ``extra`` ones)."""
        tensors = {**self.tensors, **(extra or {})}
        targets = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
        module = GraphModule({t: tensors[t] for t in sorted(targets)}, graph, "Program")
        module.eval()
        return Program(module, self.info, self.example, self.facts, self.history)

    def refresh(self) -> None:
        """After an edit: drop dead nodes and unused tensors, propagate shapes anew, recompile."""
        self.graph.eliminate_dead_code()
        self.module = self.with_graph(self.graph, self._settle_names()).module
        self.propagate()

    def _settle_names(self) -> dict[str, Tensor]:
        """Give nodes and tensors the names that they asked for, where those have become free; returns renamed tensors."""
        live = {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}
        renamed: dict[str, Tensor] = {}
        given: dict[str, str] = {}  # new name -> old name: of two tensors that ask for one name the first gets it
        for node in self.graph.nodes:
            old = str(node.target)
            wanted = self._wanted.get(old, old)
            if node.op == "get_attr" and wanted != old and (wanted not in live or given.get(wanted) == old):
                renamed[wanted], given[wanted] = self.tensor(old), old
                node.target = wanted
                live.discard(old)
                live.add(wanted)
        names = {n.name for n in self.graph.nodes}
        for node in self.graph.nodes:
            wanted = node.meta.pop(NAME, node.name)
            if wanted != node.name and wanted not in names:
                names.discard(node.name)
                names.add(wanted)
                node.name = wanted  # the namespace still knows the name from the node that had it, so nobody else takes it
        self._wanted = {}
        return renamed

    def propagate(self) -> None:
        """Fill ``val`` of every node by running the graph on fake tensors with symbolic batch and length."""
        shapes = Shapes()
        ids, past = shapes.dynamic(self.example), shapes.dynamic(torch.empty(5)).shape[0]  # any number of tokens may have gone before
        for node in self.graph.nodes:
            if node.op != "placeholder":
                self._infer(node, shapes)
            elif STATE not in node.meta:
                node.meta["val"] = ids
            else:
                spec: StateSpec = node.meta[STATE]
                with shapes:
                    node.meta["val"] = torch.empty(spec.sizes(ids.shape[0], past), dtype=spec.dtype)

    def infer(self, node: Node) -> None:
        """Fill ``val`` of a new node from those of its arguments, without running the rest of the graph again."""
        placeholder = next(n for n in self.graph.nodes if n.op == "placeholder")
        self._infer(node, Shapes.of(placeholder.meta["val"]))

    def _infer(self, node: Node, shapes: Shapes) -> None:
        if node.op == "get_attr":
            node.meta["val"] = shapes.constant(self.tensor(node))
        elif node.op == "call_function":
            node.meta["val"] = shapes.call(node)

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Logits ``[B, L, V]`` of token ids ``[B, L]``; a streaming program begins a sequence (to go on with one: ``ntc.Stream``).

        Raises:
            DataError: If the ids have another rank, are not in the vocabulary, or are more than the context holds.
        """
        check_ids(input_ids, self.info)
        logits: Tensor
        if "streaming" in self.facts:
            logits = self.module(input_ids, *(part.initial(len(input_ids)) for part in self.state))[0]
        else:
            logits = interpret(self, input_ids, lambda *_: None) if self.on_disk else self.module(input_ids)
        return logits

    @property
    def on_disk(self) -> bool:
        """Whether weights are kept on disk (``ntc.scratch``): then it runs node by node, and each is in memory while it is used."""
        return any(is_mapped(value) for value in self.tensors.values())

    def size(self, symbol: Any) -> str:
        """A dimension as text: ``B`` and ``L`` for the dynamic ones, ``P`` for the tokens before these."""
        names: dict[str, str] = {}
        for node in (n for n in self.graph.find_nodes(op="placeholder") if "val" in n.meta):
            known = node.meta[STATE].shape if STATE in node.meta else ("B", "L")
            names |= {str(s): name for s, name in zip(node.meta["val"].shape, known, strict=False) if isinstance(name, str)}
        text = re.sub(r"[A-Za-z_]\w*", lambda found: names.get(found[0], found[0]), str(symbol))
        return " + ".join(sorted(text.split(" + ")))

    def shape_text(self, node: Node) -> str:
        """Shape of a node such as ``[4, B, L, 256]``; empty for what is no tensor."""
        value = node.meta.get("val")
        return f"[{', '.join(self.size(s) for s in value.shape)}]" if isinstance(value, Tensor) else ""

    def __str__(self) -> str:
        """The graph as text that a person reads: one line per node, grouped by block, weights by their names."""
        lines, block = [], None
        for node in self.graph.nodes:
            if node.op in ("get_attr", "output"):
                continue
            here = block_of(node) if node.op == "call_function" else ""
            if here != block and node.op == "call_function":
                lines.append(f"{here or '-'}:")
                block = here
            lines.append("  " + self.line(node))
        return "\n".join([*lines, "return " + ", ".join(f"%{n.name}" for n in self.results)]) + "\n"

    def line(self, node: Node) -> str:
        """One node as text."""
        kind = node.meta.get(TYPE)
        result = f"%{node.name}: {' '.join(filter(None, (str(kind) if kind else '', self.shape_text(node))))}"
        if node.op == "placeholder":
            return result
        here = block_of(node)

        def show(value: Any) -> str:
            if isinstance(value, Node):
                if value.op == "get_attr":
                    name = str(value.target)
                    return name.removeprefix(here + ".") if here else name
                return f"%{value.name}"
            if isinstance(value, list | tuple):
                return "[" + ", ".join(map(show, value)) + "]"
            return repr(value)

        arguments = [*map(show, node.args), *(f"{k}={show(v)}" for k, v in node.kwargs.items())]
        return f"{result} = {op_name(node.target)}({', '.join(arguments)})"

    def fingerprint(self) -> str:
        """Hash of the graph, its annotations and the identities of its tensors: equal before and after a pass that did nothing."""
        digest = hashlib.sha256(str(self.graph).encode())
        for node in self.graph.nodes:
            digest.update(f"{node.args} {node.kwargs} {node.meta.get(NEURON)} {node.meta.get(STATE)}".encode())
        for name, value in self.tensors.items():  # the version counts writes in place
            digest.update(f"{name} {value.data_ptr()} {tuple(value.shape)} {value._version}".encode())
        return digest.hexdigest()

    def with_record(self, record: PassRecord) -> None:
        """Append a line to the history."""
        self.history = (*self.history, record)

    def named(self, source: str) -> Program:
        """The same program under another source name."""
        return Program(self.module, replace(self.info, source=source), self.example, self.facts, self.history)

    def to_networkx(self) -> nx.DiGraph[str]:
        """The graph for ``networkx``: one node per op, with ``op``, ``module``, ``block``, ``type`` and ``shape``; constants left out."""
        result: nx.DiGraph[str] = nx.DiGraph()
        for node in self.graph.nodes:
            if node.op in ("placeholder", "call_function"):
                kind = str(node.meta.get(TYPE, ""))
                kind_of_input = "state" if STATE in node.meta else "input"
                label = kind_of_input if node.op == "placeholder" else op_name(node.target)
                result.add_node(
                    node.name, op=label, module=module_of(node), block=block_of(node), type=kind, shape=self.shape_text(node)
                )
                result.add_edges_from((a.name, node.name) for a in node.all_input_nodes if a.op != "get_attr")
        return result

    def parameters(self) -> Iterator[nn.Parameter]:
        """Trainable tensors, each once."""
        return self.module.parameters()

    def find(self, name: str) -> Node:
        """The node of that name (a leading ``%`` is allowed).

        Raises:
            NtcError: If there is none; lists the nearest names.
        """
        import difflib

        wanted = name.removeprefix("%")
        names: dict[str, Node] = {n.name: n for n in self.graph.nodes}
        if wanted not in names:
            near = difflib.get_close_matches(wanted, names, n=4, cutoff=0.4)
            raise NtcError(f"no node is called %{wanted}" + (f"; did you mean {', '.join('%' + n for n in near)}?" if near else ""))
        return names[wanted]


def op_name(target: Any) -> str:
    """Short name of an op: ``linear``, ``ntc.integrate_fire``."""
    if isinstance(target, torch._ops.OpOverload):
        namespace, name = target._schema.name.split("::")
        return name if namespace == "aten" else f"{namespace}.{name}"
    return getattr(target, "__name__", str(target))


def interpret(
    program: Program,
    input_ids: Tensor,
    visit: Callable[[Node, tuple[Any, ...], Any], Any | None],
    last: Node | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    state: Sequence[Tensor] | None = None,
) -> Tensor:
    """Run a program node by node, freeing each value and each weight on disk after its last use; returns the logits.

    ``visit(node, args, value)`` is called for every ``call_function`` node; what it returns, unless None, replaces the
    value downstream. With ``last`` the run stops after that node and returns its value: whoever only watches the middle
    of a network need not pay for its head. ``tensors`` stand in for the program's own, by name. A streaming program goes on from
    ``state``, by default from its initial one; ``visit`` sees the new one (``Program.results``).
    """
    parts = iter([part.initial(len(input_ids)) for part in program.state] if state is None else state)
    last_use: dict[Node, Node] = {}
    for node in program.graph.nodes:
        for used in node.all_input_nodes:
            last_use[used] = node
    done: dict[Node, list[Node]] = {}
    for used, user in last_use.items():
        done.setdefault(user, []).append(used)
    values: dict[Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(parts) if STATE in node.meta else input_ids
        elif node.op == "get_attr":
            values[node] = tensors[str(node.target)] if tensors is not None else program.tensor(node)
        elif node.op == "call_function":
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: values[n])
            value = node.target(*args, **kwargs)
            other = visit(node, args, value)
            value = values[node] = value if other is None else other
            if node is last:
                return cast(Tensor, value)
        else:
            return cast(Tensor, values[program.results[0]])
        for used in done.get(node, ()):
            value = values.pop(used)
            if used.op == "get_attr":
                released([value])
    raise AssertionError("a graph ends with an output node")
