"""A network as boxes with edges, section by section along its residual stream.

Elements on the chip are boxes as they are. Host islands are opened: each op is a box that knows its island, because the residual
stream runs *through* islands. A sum ``x + f(x)``, one side of which is computed from the other, is where a branch returns to the stream
``x``; the sums and what lies between them are the stream.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import networkx as nx

from ntc.meta import block_in
from ntc_backends import netlist_schema as schema
from ntc_backends.inspect_page import host_ops
from ntc_backends.inspect_page.subject import Subject

__all__ = ["Box", "Branch", "Flow", "Section", "flow_of"]

_LOGITS = "logits output"  # a space: no element can have this name


@dataclass(frozen=True)
class Box:
    """One thing in the picture.

    Attributes:
        name: Of the element, or of the (first) host op.
        kind: ``population``, ``projection``, ``product``, ``scale``, ``decode``, ``host``, ``stream`` (a sum of the residual stream),
            ``input`` or ``output``.
        title: What it is called.
        block: Transformer block; empty outside of blocks.
        module: Module of the model.
        island: Host island, empty on the chip.
        element: The element, if it is one.
        ops: Host ops in it.
        tensors: Constants of the host ops in it.
    """

    name: str
    kind: str
    title: str
    block: str = ""
    module: str = ""
    island: str = ""
    element: schema.AnyElement | None = None
    ops: tuple[str, ...] = ()
    tensors: frozenset[str] = frozenset()


@dataclass
class Branch:
    """What lies between leaving the residual stream and returning to it.

    Attributes:
        boxes: In an order in which they can run.
        edges: (from, to, kind) between them; kind is ``spikes``, ``current``, ``value`` or ``index``.
        taps: Boxes that read the stream.
        joins: The box whose result returns, or starts the stream; empty in the last branch of the network.
        sum: The sum with which it returns; empty if it starts the stream or never returns.
        inlets: (from outside, to) for values of other sections that are not the stream.
    """

    boxes: list[Box] = field(default_factory=list)
    edges: list[tuple[str, str, str]] = field(default_factory=list)
    taps: list[str] = field(default_factory=list)
    joins: str = ""
    sum: str = ""
    inlets: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Section:
    """A transformer block, or what comes before or after all of them.

    Attributes:
        name: Block, or ``input`` and ``head``, or ``network`` where there are no blocks.
        branches: In the order of the stream.
    """

    name: str
    branches: list[Branch]

    @property
    def boxes(self) -> list[Box]:
        """All boxes but the sums."""
        return [box for branch in self.branches for box in branch.boxes]


@dataclass
class Flow:
    """The whole picture.

    Attributes:
        sections: In the order of the stream.
        boxes: All boxes by name.
        has_stream: Whether there is a residual stream.
    """

    sections: list[Section]
    boxes: dict[str, Box]
    has_stream: bool


_KINDS: dict[type, str] = {
    schema.Population: "population", schema.Projection: "projection", schema.DynamicProduct: "product", schema.Scale: "scale",
    schema.Decode: "decode",
}  # fmt: skip


class _Graph:
    """Boxes and who reads whom, before they are sorted into sections."""

    def __init__(self, subject: Subject) -> None:
        self.boxes: dict[str, Box] = {subject.input: Box(subject.input, "input", "token ids")}
        self.inputs: dict[str, list[str]] = {subject.input: []}
        self.kinds: dict[str, str] = {subject.input: "index"}
        self.plumbing: set[str] = set()
        self.adds: set[str] = set()
        at = {f"{subject.input}:ids": subject.input}
        self.taken = {subject.input, *(element.name for element in subject.elements)}
        for element in subject.elements:
            if isinstance(element, schema.HostIsland):
                self._island(element, at)
            else:
                self._element(element, at)
        self.boxes[_LOGITS] = Box(_LOGITS, "output", "logits")
        self.inputs[_LOGITS] = [at[subject.logits]]
        self.kinds[_LOGITS] = "value"

    def _element(self, element: schema.AnyElement, at: dict[str, str]) -> None:
        name = element.name
        block = element.block or block_in(element.module)
        self.boxes[name] = Box(name, _KINDS[type(element)], name, block, element.module, element=element)
        self.inputs[name] = list(dict.fromkeys(at[endpoint] for endpoint in dict(element.inputs).values()))
        for port, value in dict(element.outputs).items():
            at[f"{name}:{port}"] = name
            self.kinds[name] = value.kind if value.kind in ("spikes", "current") else "value"

    def _island(self, island: schema.HostIsland, at: dict[str, str]) -> None:
        known = {name: at[endpoint] for name, endpoint in island.inputs.items()}
        for op in island.ops:
            block = block_in(op.module) or island.block
            tensors = frozenset(host_ops.tensors_of(op))
            name = op.name if op.name not in self.taken else f"{island.name} {op.name}"  # ops of two islands may share a name
            self.taken.add(name)
            self.boxes[name] = Box(name, "host", host_ops.title_of(op), block, op.module, island.name, ops=(op.op,), tensors=tensors)
            self.inputs[name] = [known[value] for value in host_ops.values_of(op)]
            self.kinds[name] = "value"
            known[op.name] = name
            if host_ops.is_plumbing(op):
                self.plumbing.add(name)
            if op.op.startswith("aten.add.") and len(self.inputs[name]) == 2 and not tensors:
                self.adds.add(name)
        for port, value in island.outputs.items():
            at[f"{island.name}:{port}"] = known[port]
            if value.kind == "index":
                self.kinds[known[port]] = "index"

    def digraph(self) -> nx.DiGraph[str]:
        """Who reads whom."""
        graph: nx.DiGraph[str] = nx.DiGraph()
        graph.add_nodes_from(self.boxes)
        graph.add_edges_from((a, name) for name, read in self.inputs.items() for a in read)
        return graph

    def merge_plumbing(self) -> None:
        """Let ops without a name share boxes (``host_ops.gathered``)."""
        owner = host_ops.gathered(
            self.boxes, self.inputs, self.plumbing.__contains__, lambda name: (self.boxes[name].block, self.boxes[name].island)
        )
        members: dict[str, list[str]] = {}
        for name, first in owner.items():
            members.setdefault(first, []).append(name)
        for first, names in members.items():
            if len(names) > 1:
                ops = tuple(op for name in names for op in self.boxes[name].ops)
                tensors = frozenset(t for name in names for t in self.boxes[name].tensors)
                self.boxes[first] = replace(self.boxes[first], title=f"{len(names)} host ops", ops=ops, tensors=tensors)
        merged: dict[str, list[str]] = {}
        for name, read in self.inputs.items():
            mine = owner.get(name, name)
            merged.setdefault(mine, []).extend(o for a in read if (o := owner.get(a, a)) != mine)
        self.inputs = {name: list(dict.fromkeys(read)) for name, read in merged.items()}
        self.boxes = {name: box for name, box in self.boxes.items() if name in self.inputs}


def flow_of(subject: Subject) -> Flow:
    """The picture of a network."""
    made = _Graph(subject)
    stream = _streams(made)
    made.plumbing -= {value for pair in stream.values() for value in pair}
    made.merge_plumbing()
    graph = made.digraph()
    for name in stream:
        made.boxes[name] = replace(made.boxes[name], kind="stream", title="sum")
    place = {name: i for i, name in enumerate(made.boxes)}
    order = list(nx.lexicographical_topological_sort(graph, key=place.__getitem__))
    home = _sections(made, graph, order)
    return Flow(_branches(made, graph, order, home, stream), made.boxes, bool(stream))


def _streams(made: _Graph) -> dict[str, tuple[str, str]]:
    """Sums of the residual stream: for each the stream that enters it and what is added."""
    found = {}
    graph = made.digraph()
    above: dict[str, set[str]] = {}
    for name in made.adds:
        a, b = made.inputs[name]
        for value in (a, b):
            above.setdefault(value, nx.ancestors(graph, value))
        if a in above[b]:
            found[name] = (a, b)
        elif b in above[a]:
            found[name] = (b, a)
    return {name: found[name] for name in made.boxes if name in found}


def _sections(made: _Graph, graph: nx.DiGraph[str], order: list[str]) -> dict[str, str]:
    """Section of each box. What belongs to no block is ``input``, part of the block before it, or ``head``, by where it lies."""
    last: dict[str, str] = {}  # the latest block above each box
    rank = {block: i for i, block in enumerate(dict.fromkeys(made.boxes[n].block for n in order if made.boxes[n].block))}
    for name in order:
        above = [last[a] for a in graph.predecessors(name) if last[a]]
        last[name] = made.boxes[name].block or max(above, key=rank.__getitem__, default="")
    leads: set[str] = set()  # whether a block comes after it
    for name in reversed(order):
        if any(made.boxes[u].block or u in leads for u in graph.successors(name)):
            leads.add(name)
    if not rank:
        return dict.fromkeys(order, "network")
    return {
        name: made.boxes[name].block or ("input" if not last[name] else last[name] if name in leads else "head") for name in order
    }


def _branches(
    made: _Graph, graph: nx.DiGraph[str], order: list[str], home: dict[str, str], stream: dict[str, tuple[str, str]]
) -> list[Section]:
    """Sections with their branches: a box belongs to the first sum of its section that it leads to, else to the section's end."""
    on_stream = set(stream) | {entering for entering, _ in stream.values()}
    sections: list[Section] = []
    for title in _ordered(home[name] for name in order):
        mine = [name for name in order if home[name] == title]
        sums = [name for name in mine if name in stream]
        branches, taken = [], set(sums)
        for total in sums:
            source = stream[total][1]
            members = ({source} | nx.ancestors(graph, source)) & set(mine) - taken
            # Where a stream begins in the section itself (no blocks at all), what leads to its beginning is no part of the branch.
            entering = stream[total][0]
            begins = entering in mine and entering not in stream and entering not in taken
            if begins:
                first = ({entering} | nx.ancestors(graph, entering)) & members
                taken |= first
                members -= first
                if first:
                    branches.append(_branch(made, [n for n in mine if n in first], on_stream, joins=entering))
            taken |= members
            branches.append(_branch(made, [n for n in mine if n in members], on_stream, joins=source, total=total))
        rest = [name for name in mine if name not in taken]
        if rest:
            start = next((name for name in rest if name in on_stream), "")
            branches.append(_branch(made, rest, on_stream, joins=start))
        sections.append(Section(title, [b for b in branches if b.boxes or b.sum]))
    return sections


def _ordered(names: Iterable[str]) -> list[str]:
    """Each once, ``input`` first and ``head`` last."""
    found = list(dict.fromkeys(names))
    return sorted(found, key=lambda name: (name != "input", name == "head", found.index(name)))


def _branch(made: _Graph, names: list[str], on_stream: set[str], *, joins: str = "", total: str = "") -> Branch:
    inside = set(names)
    branch = Branch([made.boxes[name] for name in names], joins=joins, sum=total)
    for name in names:
        for source in made.inputs[name]:
            if source in inside:
                branch.edges.append((source, name, made.kinds.get(source, "value")))
            elif source in on_stream:
                if name not in branch.taps:
                    branch.taps.append(name)
            else:
                branch.inlets.append((source, name))
    return branch
