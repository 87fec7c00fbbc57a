"""Read a netlist: validate it completely, and look at it as a ``networkx`` graph."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import networkx as nx
from pydantic import ValidationError

from ntc.errors import ArtifactError
from ntc_backends import netlist_schema as schema
from ntc_backends.netlist_blob import verify_blob

__all__ = ["check_graph", "load_netlist", "to_graph", "to_networkx"]

JSON_NAME = "netlist.json"
_TABLES = {
    "Population": "population", "Projection": "projection", "DynamicProduct": "dynamic_product", "Scale": "scale",
    "Decode": "decode", "HostIsland": "host",
}  # fmt: skip


def load_netlist(path: Path | str, *, verify_hashes: bool = True) -> schema.Netlist:
    """Read and validate a netlist.

    Args:
        path: ``netlist.json`` or the folder that holds it.
        verify_hashes: Read the whole tensor file and compare every SHA-256; without it only sizes, shapes and dtypes.

    Returns:
        The netlist; its tensors stay in the file.

    Raises:
        ArtifactError: One sentence with the first thing that is wrong.
    """
    file = Path(path)
    file = file / JSON_NAME if file.is_dir() else file
    netlist = _parse(file)
    check_graph(netlist)
    verify_blob(file.parent / netlist.blob.file, netlist.blob, netlist.tensors, hashes=verify_hashes)
    _check_shapes(netlist)
    return netlist


def _parse(file: Path) -> schema.Netlist:
    try:
        data: Any = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"there is no netlist at {file}: {error.strerror}") from error
    except ValueError as error:
        raise ArtifactError(f"{file.name} is no JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format") != schema.FORMAT:
        raise ArtifactError(f"{file.name} is no {schema.FORMAT} file")
    version = data.get("schema_version")
    if version not in schema.READABLE:
        known = " and ".join(map(repr, schema.READABLE))
        raise ArtifactError(f"{file.name} has schema version {version!r}, and this ntc reads {known}; use the ntc that wrote it")
    try:
        return schema.Netlist.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{file.name} does not fit schema {version} at {place}: {first['msg']}") from error


def check_graph(netlist: schema.Netlist) -> None:
    """Check names, references and order.

    Raises:
        ArtifactError: For a name used twice, a reference to nothing, a tensor that nobody uses, an element that comes before
            one that it reads, or one whose results do not reach the logits.
    """
    elements = {e.name: e for e in netlist.elements()}
    count = sum(1 for _ in netlist.elements())
    if len(elements) != count or {netlist.input.name, netlist.output.name} & elements.keys():
        raise ArtifactError("two elements of the netlist have the same name")
    if len(netlist.order) != count or set(netlist.order) != elements.keys():
        odd = sorted(set(netlist.order) ^ elements.keys())
        raise ArtifactError(f"the order of the netlist and its elements differ{': ' + ', '.join(odd[:3]) if odd else ''}")
    done = {f"{netlist.input.name}:ids"}
    for name in netlist.order:
        for port, endpoint in dict(elements[name].inputs).items():
            _known(endpoint, done, elements, f"input {port} of {name}")
        done |= {f"{name}:{port}" for port in dict(elements[name].outputs)}
    _known(netlist.output.logits, done, elements, f"input logits of {netlist.output.name}")
    for island in netlist.host:
        _check_island(island)
    used = {name for e in elements.values() for name in _tensors_of(e)}
    if missing := sorted(used - netlist.tensors.keys()):
        raise ArtifactError(f"the netlist refers to the tensor {missing[0]}, which its table does not have")
    if idle := sorted(netlist.tensors.keys() - used):
        raise ArtifactError(f"no element of the netlist uses the tensor {idle[0]}")
    graph: nx.DiGraph[object] = nx.DiGraph(to_graph(netlist).edges)
    if dead := {*elements, netlist.input.name} - nx.ancestors(graph, netlist.output.name):
        raise ArtifactError(f"the result of {min(dead)} never reaches the logits")


def _known(endpoint: str, done: set[str], elements: dict[str, schema.AnyElement], reader: str) -> None:
    if endpoint in done:
        return
    name, _, port = endpoint.partition(":")
    if name in elements and port in dict(elements[name].outputs):
        raise ArtifactError(f"{reader} reads {endpoint}, which comes later in the order: the order is wrong or the graph has a cycle")
    raise ArtifactError(f"{reader} reads {endpoint}, and the netlist has no such output")


def _check_island(island: schema.HostIsland) -> None:
    names = [op.name for op in island.ops]
    if len(set(names)) != len(names) or set(names) & island.inputs.keys():
        raise ArtifactError(f"two values of {island.name} have the same name")
    done, read = set(island.inputs), set[str]()
    for op in island.ops:
        here = {a.value for a in _references(op) if isinstance(a, schema.ValueRef)}
        if unknown := sorted(here - done):
            raise ArtifactError(f"op {op.name} of {island.name} reads {unknown[0]}, which is no earlier op and no input of the island")
        read |= here
        done.add(op.name)
    if odd := sorted(set(island.outputs) - set(names)) or sorted(done - read - set(island.outputs)):
        raise ArtifactError(f"{odd[0]} of {island.name} is an output without an op, or a value that nothing uses")


def _flat(value: schema.Argument) -> Iterator[schema.Argument]:
    if isinstance(value, list):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _references(op: schema.HostOp) -> Iterator[schema.Argument]:
    for value in op.arguments.values():
        yield from _flat(value)


def _tensors_of(element: schema.AnyElement) -> Iterator[str]:
    """Names of the tensors that an element refers to."""
    match element:
        case schema.Population():
            yield from (v.tensor for v in (element.threshold, element.v0, element.tau) if isinstance(v, schema.TensorRef))
        case schema.DynamicProduct(leak=schema.TensorRef(tensor=name)) | schema.Scale(factor=schema.TensorRef(tensor=name)):
            yield name
        case schema.Projection():
            yield element.weight
            if element.bias is not None:
                yield element.bias
        case schema.HostIsland():
            yield from (a.tensor for op in element.ops for a in _references(op) if isinstance(a, schema.TensorRef))


def _check_shapes(netlist: schema.Netlist) -> None:
    """Check that tensors and widths fit, from element to element."""
    width = {f"{e.name}:{port}": value for e in netlist.elements() for port, value in dict(e.outputs).items()}

    def expect(found: Any, wanted: Any, what: str) -> None:
        if found != wanted:
            raise ArtifactError(f"{what} has size {found}, and {wanted} is needed")

    def channels(endpoint: str) -> Any:
        port = width.get(endpoint, netlist.input.ids)
        return port.shape[-1] if port.shape else 1

    for projection in netlist.projections:
        post, pre = projection.shape
        expect(netlist.tensors[projection.weight].shape, [post, pre], f"weight {projection.weight} of {projection.name}")
        if projection.bias is not None:
            expect(netlist.tensors[projection.bias].shape, [post], f"bias {projection.bias} of {projection.name}")
        expect(projection.synapses, post * pre, f"the number of synapses of {projection.name}")
        expect(channels(projection.inputs.pre), pre, f"the input of {projection.name}")
    for population in netlist.populations:
        expect(channels(population.inputs.current), population.size, f"the input of {population.name}")
        for what, value in (("threshold", population.threshold), ("v0", population.v0), ("tau", population.tau)):
            if isinstance(value, schema.TensorRef):
                expect(netlist.tensors[value.tensor].shape, [population.size], f"the {what} of {population.name}")
    for product in netlist.dynamic_products:
        expect(channels(product.inputs.query), product.heads * product.head_size, f"the query of {product.name}")
        expect(channels(product.inputs.key), product.kv_heads * product.head_size, f"the key of {product.name}")
        expect(channels(product.inputs.value), product.kv_heads * product.value_size, f"the value of {product.name}")
        if isinstance(product.leak, schema.TensorRef):
            found = netlist.tensors[product.leak.tensor].shape
            per_row = [product.kv_heads * product.head_size]
            expect(found, per_row if found != [product.kv_heads] else found, f"the leak of {product.name}")
        if (product.leak is None) != (product.rule == "M += outer(K, V); Y = Q M"):
            raise ArtifactError(f"the rule of {product.name} is {product.rule!r}, and its leak is {product.leak}")
    for scale in netlist.scales:
        given = (scale.factor is not None, scale.heads is not None, scale.kv_heads is not None, scale.eps is not None)
        if given != _SCALE_FIELDS[scale.kind] or (scale.kind == "row-sum") != isinstance(scale.inputs, schema.RowSumInputs):
            raise ArtifactError(f"{scale.name} is a scale of kind {scale.kind!r}, and its fields are those of another kind")
        if scale.kind == "table":
            if not isinstance(scale.factor, schema.TensorRef):
                raise ArtifactError(f"{scale.name} scales by a table, and its factor is one number")
            found = netlist.tensors[scale.factor.tensor].shape
            expect(found[:-1], [scale.heads], f"the table of {scale.name}")
        if scale.heads is not None and channels(scale.inputs.train) % scale.heads:
            raise ArtifactError(f"{scale.heads} heads do not divide the {channels(scale.inputs.train)} channels of {scale.name}")


# Whether a scale of that kind has a factor, heads, key heads, eps.
_SCALE_FIELDS = {
    "position": (False, False, False, False), "constant": (True, False, False, False), "table": (True, True, False, False),
    "rms": (False, True, False, True), "row-sum": (False, True, True, False),
}  # fmt: skip


def to_graph(netlist: schema.Netlist) -> nx.DiGraph[str]:
    """The elements as nodes, with their fields as attributes and ``element`` for their kind; who reads whom as edges.

    An edge has ``ports``, pairs (output of the source, input of the target), ``shapes`` and ``kinds``, one for each of them, and
    ``synapses``: number of synapses through which the target takes it, 0 unless the target is a projection.
    """
    graph: nx.DiGraph[str] = nx.DiGraph(name=netlist.model.source, steps=netlist.time.steps)
    graph.add_node(netlist.input.name, element="input")
    outputs = {f"{netlist.input.name}:ids": netlist.input.ids}
    elements = {e.name: e for e in netlist.elements()}
    for name in netlist.order:
        element = elements[name]
        fields = element.model_dump(exclude={"name", "inputs", "outputs"})
        graph.add_node(name, element=_TABLES[type(element).__name__], **fields)
        outputs |= {f"{name}:{port}": value for port, value in dict(element.outputs).items()}
    graph.add_node(netlist.output.name, element="output")
    readers = [(name, dict(elements[name].inputs)) for name in netlist.order]
    readers.append((netlist.output.name, {"logits": netlist.output.logits}))
    for name, inputs in readers:
        for port, endpoint in inputs.items():
            source, _, output = endpoint.partition(":")
            if not graph.has_edge(source, name):
                graph.add_edge(source, name, ports=[], shapes=[], kinds=[], synapses=graph.nodes[name].get("synapses", 0))
            edge = graph.edges[source, name]
            edge["ports"].append((output, port))
            edge["shapes"].append(outputs[endpoint].shape)
            edge["kinds"].append(outputs[endpoint].kind)
    return graph


def to_networkx(path: Path | str) -> nx.DiGraph[str]:
    """The netlist in a file or folder as a graph (see ``to_graph``), fully validated before."""
    return to_graph(load_netlist(path))
