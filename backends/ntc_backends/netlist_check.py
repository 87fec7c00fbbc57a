"""What must hold of a netlist beyond its schema: names, references and order; widths, steps and kinds from element to element."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from ntc.errors import ArtifactError
from ntc_backends import netlist_schema as schema
from ntc_backends.netlist_elements import LEAKY, PLAIN
from ntc_backends.netlist_json import one_line

__all__ = ["check_graph", "check_shapes", "tensors_of"]

INTEGERS = frozenset({"int8", "int16", "int32", "int64"})
FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})


def check_graph(netlist: schema.Netlist) -> None:
    """Check names, references and order.

    Raises:
        ArtifactError: For a name used twice, a reference to nothing, a tensor that nobody uses, an element that comes before
            one that it reads, or one whose results do not reach the logits.
    """
    elements = {e.name: e for e in netlist.elements()}
    _check_names(netlist)
    if len(netlist.order) != len(elements) or set(netlist.order) != elements.keys():
        odd = sorted(set(netlist.order) ^ elements.keys())
        raise ArtifactError(f"the order of the netlist and its elements differ{': ' + one_line(', '.join(odd[:3])) if odd else ''}")
    done = {f"{netlist.input.name}:ids"}
    for name in netlist.order:
        for port, endpoint in dict(elements[name].inputs).items():
            _known(endpoint, done, elements, f"input {one_line(port)} of {name}")
        done |= {f"{name}:{port}" for port in dict(elements[name].outputs)}
    _known(netlist.output.logits, done, elements, f"input logits of {netlist.output.name}")
    for island in netlist.host:
        _check_island(island)
    used = {name for e in elements.values() for name in tensors_of(e)}
    if missing := sorted(used - netlist.tensors.keys()):
        raise ArtifactError(f"the netlist refers to the tensor {one_line(missing[0])}, which its table does not have")
    if idle := sorted(netlist.tensors.keys() - used):
        raise ArtifactError(f"no element of the netlist uses the tensor {one_line(idle[0])}")
    needed = {netlist.output.logits.partition(":")[0]}
    for name in reversed(netlist.order):
        if name in needed:
            needed |= {endpoint.partition(":")[0] for endpoint in dict(elements[name].inputs).values()}
    if dead := {*elements, netlist.input.name} - needed:
        raise ArtifactError(f"the result of {min(dead)} never reaches the logits")


def _check_names(netlist: schema.Netlist) -> None:
    """An element and an op of an island are each one op of the graph: a name stands for one of them, wherever it is read.

    Input and output are no ops, and what they are called (``logits``) an op inside of an island may be called, too.
    """
    elements = [(e.name, "an element") for e in netlist.elements()]
    ops = [(op.name, f"an op of {island.name}") for island in netlist.host for op in island.ops]
    ends = [(netlist.input.name, "the input"), (netlist.output.name, "the output")]
    for named in (elements + ends, elements + ops):
        seen: dict[str, str] = {}
        for name, what in named:
            if name in seen:
                raise ArtifactError(f"two parts of the netlist have the same name, {one_line(name)}: {seen[name]} and {one_line(what)}")
            seen[name] = one_line(what)


def _known(endpoint: str, done: set[str], elements: dict[str, schema.AnyElement], reader: str) -> None:
    if endpoint in done:
        return
    name, _, port = endpoint.partition(":")
    if name in elements and port in dict(elements[name].outputs):
        raise ArtifactError(f"{reader} reads {endpoint}, which comes later in the order: the order is wrong or the graph has a cycle")
    raise ArtifactError(f"{reader} reads {endpoint}, and the netlist has no such output")


def _check_island(island: schema.HostIsland) -> None:
    names = [op.name for op in island.ops]
    if twice := sorted(set(names) & island.inputs.keys()):
        raise ArtifactError(f"an op and an input of {island.name} have the same name, {one_line(twice[0])}")
    done, read = set(island.inputs), set[str]()
    for op in island.ops:
        here = {a.value for a in _references(op) if isinstance(a, schema.ValueRef)}
        if unknown := sorted(here - done):
            raise ArtifactError(
                f"op {op.name} of {island.name} reads {one_line(unknown[0])}, which is no earlier op and no input of the island"
            )
        read |= here
        done.add(op.name)
    if odd := sorted(set(island.outputs) - set(names)) or sorted(done - read - set(island.outputs)):
        raise ArtifactError(f"{one_line(odd[0])} of {island.name} is an output without an op, or a value that nothing uses")


def _flat(value: schema.Argument) -> Iterator[schema.Argument]:
    if isinstance(value, list):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _references(op: schema.HostOp) -> Iterator[schema.Argument]:
    for value in op.arguments.values():
        yield from _flat(value)


def tensors_of(element: schema.AnyElement) -> Iterator[str]:
    """Names of the tensors that an element refers to."""
    ports: Iterable[Any] = dict(element.outputs).values()
    fields: Iterable[Any] = (port.scale for port in ports)
    match element:
        case schema.Population():
            fields = (*fields, element.threshold, element.v0, element.start, element.tau)
        case schema.DynamicProduct():
            fields = (*fields, element.leak, element.growth, element.renewal)
        case schema.Scale():
            fields = (*fields, element.factor, element.multiplier)
        case schema.Projection():
            yield element.weight
            if element.bias is not None:
                yield element.bias
        case schema.HostIsland():
            fields = (*fields, *(a for op in element.ops for a in _references(op)))
    yield from (value.tensor for value in fields if isinstance(value, schema.TensorRef))


def check_shapes(netlist: schema.Netlist) -> None:
    """Check that tensors, widths, steps and kinds fit, from element to element.

    Raises:
        ArtifactError: One sentence with the first thing that does not fit.
    """
    _Shapes(netlist).check()


def _expect(found: Any, wanted: Any, what: str) -> None:
    if found != wanted:
        raise ArtifactError(f"{what} has size {one_line(found)}, and {one_line(wanted)} is needed")


class _Shapes:
    def __init__(self, netlist: schema.Netlist) -> None:
        self.netlist = netlist
        self.ports = {f"{e.name}:{port}": value for e in netlist.elements() for port, value in dict(e.outputs).items()}
        self.ports[f"{netlist.input.name}:ids"] = netlist.input.ids
        self.integer = netlist.conventions.rounding == "integer"

    def check(self) -> None:
        for projection in self.netlist.projections:
            self.projection(projection)
        for population in self.netlist.populations:
            self.population(population)
        for product in self.netlist.dynamic_products:
            self.product(product)
        for scale in self.netlist.scales:
            self.scale(scale)
        for decode in self.netlist.decodes:
            self.decode(decode)
        for island in self.netlist.host:
            for endpoint in island.inputs.values():
                self.steps(endpoint, 0, f"an input of {island.name}")
        logits = self.netlist.output.logits
        self.steps(logits, 0, "the logits")
        if self.kind(logits) != "analog":
            raise ArtifactError(f"the logits are analog values, and {logits} is {self.kind(logits)}")
        if self.netlist.populations:
            _expect(self.netlist.time.steps, max(p.steps for p in self.netlist.populations), "the time axis")

    # What an endpoint carries.

    def kind(self, endpoint: str) -> str:
        return self.ports[endpoint].kind

    def channels(self, endpoint: str) -> Any:
        shape = self.ports[endpoint].shape
        return shape[-1] if shape else 1

    def steps(self, endpoint: str, wanted: int | None, what: str) -> int:
        """Time steps of an endpoint, 0 for a value; compared with what is wanted, unless that is None."""
        port = self.ports[endpoint]
        timed = port.kind in ("spikes", "current")
        if timed and (len(port.shape) < 2 or not isinstance(port.shape[0], int)):
            raise ArtifactError(f"{endpoint} is a train of shape {one_line(port.shape)}, whose first axis is no number of steps")
        found = int(port.shape[0]) if timed else 0
        if wanted is not None and found != wanted:
            said = [f"a train of {n} steps" if n else "a value without steps" for n in (found, wanted)]
            raise ArtifactError(f"{what} is {said[0]} ({endpoint}), and {said[1]} is needed")
        return found

    def output(self, element: schema.AnyElement, channels: int, steps: int) -> None:
        """The output of an element has that width and so many steps."""
        (port,) = dict(element.outputs)
        endpoint = f"{element.name}:{port}"
        _expect(self.channels(endpoint), channels, f"the output of {element.name}")
        self.steps(endpoint, steps, f"the output of {element.name}")

    def number(self, value: Any, shapes: list[list[int]], what: str, low: float = -math.inf, high: float = math.inf) -> None:
        """A constant has one of these shapes, a dtype of its grade, and, if it is a number, lies in a range."""
        if isinstance(value, schema.TensorRef):
            entry = self.netlist.tensors[value.tensor]
            _expect(entry.shape, entry.shape if entry.shape in shapes else shapes[-1], what)
            if entry.dtype not in (INTEGERS if self.integer else FLOATS):
                raise ArtifactError(f"{what} holds {one_line(entry.dtype)}, which is not of the {self.netlist.conventions.rounding} grade")
        elif value is not None:
            if self.integer and not isinstance(value, int):
                raise ArtifactError(f"{what} is {value}, and a netlist of the integer grade has integers only")
            if not low <= value <= high:
                raise ArtifactError(f"{what} is {value}, which lies outside of {low:g} ... {high:g}")

    # One method per kind of element.

    def projection(self, e: schema.Projection) -> None:
        post, pre = e.shape
        _expect(self.netlist.tensors[e.weight].shape, [post, pre], f"weight {one_line(e.weight)} of {e.name}")
        self.number(schema.TensorRef(tensor=e.weight), [[post, pre]], f"the weight of {e.name}")
        if e.bias is not None:
            self.number(schema.TensorRef(tensor=e.bias), [[post]], f"the bias of {e.name}")
        _expect(e.synapses, post * pre, f"the number of synapses of {e.name}")
        _expect(self.channels(e.inputs.pre), pre, f"the input of {e.name}")
        steps = self.steps(e.inputs.pre, None, "")
        if (e.synapse == "spikes") != bool(steps):
            raise ArtifactError(f"{e.name} has synapses for {e.synapse}, and {e.inputs.pre} is {self.kind(e.inputs.pre)}")
        self.output(e, post, steps)

    def population(self, e: schema.Population) -> None:
        _expect(self.channels(e.inputs.current), e.size, f"the input of {e.name}")
        shapes, theta = [[1], [e.size]], e.threshold if isinstance(e.threshold, int) else math.inf
        self.number(e.threshold, shapes, f"the threshold of {e.name}", low=1 if self.integer else 5e-324)
        self.number(e.start, shapes, f"the start of {e.name}", 0, theta)
        self.number(e.v0, shapes, f"the v0 of {e.name}", 0, 1)
        self.number(e.tau, shapes, f"the tau of {e.name}", 5e-324)
        if (e.start is not None, e.v0 is not None, e.tau is not None) != (self.integer, not self.integer, e.model == "lif"):
            grade = self.netlist.conventions.rounding
            raise ArtifactError(f"{e.name} is {e.model} of the {grade} grade, and its start, v0 and tau are those of another neuron")
        if self.integer and e.reset != "soft":
            raise ArtifactError(f"{e.name} resets to 0, and the integer grade has soft reset only")
        if (e.outputs.spikes.levels == "ternary") != e.signed:
            raise ArtifactError(f"{e.name} has signed = {e.signed}, and its spikes are {e.outputs.spikes.levels}")
        self.steps(e.inputs.current, e.steps if e.input == "timed" else 0, f"the input of {e.name}")
        self.output(e, e.size, e.steps)

    def product(self, e: schema.DynamicProduct) -> None:
        for what, endpoint, size in (
            ("query", e.inputs.query, e.heads * e.head_size), ("key", e.inputs.key, e.kv_heads * e.head_size),
            ("value", e.inputs.value, e.kv_heads * e.value_size),
        ):  # fmt: skip
            _expect(self.channels(endpoint), size, f"the {what} of {e.name}")
            self.steps(endpoint, e.steps, f"the {what} of {e.name}")
        if e.heads % e.kv_heads:
            raise ArtifactError(f"{e.kv_heads} key heads do not divide the {e.heads} heads of {e.name}")
        _expect(e.state_shape, [e.steps, e.kv_heads, e.head_size, e.value_size], f"the state of {e.name}")
        self.output(e, e.heads * e.value_size, e.steps)
        self.number(e.leak, [[e.kv_heads], [e.kv_heads * e.head_size]], f"the leak of {e.name}", 0, 1)
        if (e.leak is not None) != (e.rule == LEAKY):
            raise ArtifactError(f"the rule of {e.name} is {e.rule!r}, and its leak is {e.leak}")
        lazily = e.rule not in (PLAIN, LEAKY)
        given = (e.growth is not None, e.shift is not None, e.renewal is not None and not lazily)
        if given != (lazily, lazily, False) or lazily != self.integer:
            raise ArtifactError(f"the rule of {e.name} is {e.rule!r}, and its growth, renewal and shift are those of another one")
        period = self.netlist.tensors[e.growth.tensor].shape[-1:] if isinstance(e.growth, schema.TensorRef) else [1]
        if (period != [1] and e.renewal is None) or not period or period[0] < 1 or period[0] & (period[0] - 1):
            raise ArtifactError(f"the period of the growth of {e.name} is {period}: a power of two, and 1 without a renewal")
        self.number(e.growth, [[1, *period], [e.kv_heads, *period]], f"the growth of {e.name}", 1)
        self.number(e.renewal, [[1], [e.kv_heads]], f"the renewal of {e.name}", 0, 1 << (e.shift or 0))

    def scale(self, e: schema.Scale) -> None:
        given = (
            e.factor is not None, e.heads is not None, e.kv_heads is not None, e.eps is not None,
            all(v is not None for v in (e.multiplier, e.shift, e.low, e.high)),
        )  # fmt: skip
        some = any(v is not None for v in (e.multiplier, e.shift, e.low, e.high))
        row_sum = isinstance(e.inputs, schema.RowSumInputs)
        if given != _SCALE_FIELDS[e.kind] or some != given[-1] or (e.kind == "row-sum") != row_sum:
            raise ArtifactError(f"{e.name} is a scale of kind {e.kind!r}, and its fields are those of another kind")
        if (e.kind == "requantize") != self.integer:
            grade = self.netlist.conventions.rounding
            raise ArtifactError(f"{e.name} is a scale of kind {e.kind!r}, which the {grade} grade does not have")
        channels = self.channels(e.inputs.train)
        steps = self.steps(e.inputs.train, None, "")
        if not steps:
            raise ArtifactError(f"{e.name} scales a train, and {e.inputs.train} is {self.kind(e.inputs.train)}")
        self.output(e, channels, steps)
        if e.kind == "table":
            if not isinstance(e.factor, schema.TensorRef):
                raise ArtifactError(f"{e.name} scales by a table, and its factor is one number")
            found = self.netlist.tensors[e.factor.tensor].shape
            _expect(found[:-1], [e.heads], f"the table of {e.name}")
        if e.heads is not None and (not isinstance(channels, int) or channels % e.heads):
            raise ArtifactError(f"{e.heads} heads do not divide the {channels} channels of {e.name}")
        if e.kind == "requantize":
            rows = self.netlist.tensors[e.multiplier.tensor].shape[:-1] if isinstance(e.multiplier, schema.TensorRef) else []
            self.number(e.multiplier, [[1], [channels], [*rows[:1], channels]], f"the multiplier of {e.name}")
            assert e.low is not None and e.high is not None
            if e.low > e.high:
                raise ArtifactError(f"the results of {e.name} lie in {e.low} ... {e.high}, which is no range")
        if isinstance(e.inputs, schema.RowSumInputs):
            assert e.heads is not None and e.kv_heads is not None
            size = self.channels(e.inputs.query)
            if not isinstance(size, int) or size % e.heads or e.heads % e.kv_heads:
                raise ArtifactError(f"{e.heads} heads and {e.kv_heads} key heads do not fit the {size} channels of queries of {e.name}")
            _expect(self.channels(e.inputs.key), size // e.heads * e.kv_heads, f"the key of {e.name}")
            self.steps(e.inputs.query, steps, f"the query of {e.name}")
            self.steps(e.inputs.key, steps, f"the key of {e.name}")

    def decode(self, e: schema.Decode) -> None:
        steps = self.steps(e.inputs.train, None, "")
        _expect(len(e.step_weights), steps, f"the step weights of {e.name}")
        if self.integer and (e.code != "count" or any(w != 1 for w in e.step_weights)):
            raise ArtifactError(f"{e.name} decodes by {e.code}, and the integer grade has sums only")
        self.output(e, self.channels(e.inputs.train), 0)


# Whether a scale of that kind has a factor, heads, key heads, eps, and the fields of requantize.
_SCALE_FIELDS = {
    "position": (False, False, False, False, False), "constant": (True, False, False, False, False),
    "table": (True, True, False, False, False), "rms": (False, True, False, True, False), "row-sum": (False, True, True, False, False),
    "requantize": (False, False, False, False, True),
}  # fmt: skip
