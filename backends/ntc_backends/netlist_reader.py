"""Read a netlist: validate it completely, and look at it as a ``networkx`` graph. Imports neither torch nor the compiler.

Whatever a file holds, reading it ends with a netlist in which every reference, size and hash is right, or with one sentence; no file
but the two of the netlist is opened.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ntc.errors import ArtifactError
from ntc_backends import netlist_schema as schema
from ntc_backends.netlist_check import check_graph, check_shapes
from ntc_backends.netlist_json import one_line, parse, read_text
from ntc_backends.netlist_store import TensorFile, verify_blob

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["JSON_NAME", "check_graph", "load_netlist", "open_netlist", "to_graph", "to_networkx"]

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
    return open_netlist(path, verify_hashes=verify_hashes)[0]


def open_netlist(path: Path | str, *, verify_hashes: bool = True) -> tuple[schema.Netlist, TensorFile]:
    """``load_netlist``, with what reads its tensors."""
    file = Path(path)
    try:
        is_folder = file.is_dir()
    except ValueError as error:  # a zero byte
        raise ArtifactError(f"there is no netlist at {one_line(path)}: {error}") from error
    if is_folder and not (file / JSON_NAME).exists() and (file / "manifest.json").is_file():
        raise ArtifactError(f"there is no netlist at {file / JSON_NAME}: write one with ntc export {file} --emit netlist")
    file = file / JSON_NAME if is_folder else file
    netlist = _validated(parse(read_text(file), file.name), file.name)
    check_graph(netlist)
    check_shapes(netlist)
    blob = file.parent / netlist.blob.file
    stored = verify_blob(blob, netlist.blob, netlist.tensors, hashes=verify_hashes)
    return netlist, TensorFile(blob, stored, netlist.tensors)


def _validated(data: Any, name: str) -> schema.Netlist:
    if not isinstance(data, dict) or data.get("format") != schema.FORMAT:
        raise ArtifactError(f"{name} is no {schema.FORMAT} file")
    version = data.get("schema_version")
    if not isinstance(version, str) or version not in schema.READABLE:
        known = " and ".join(map(repr, schema.READABLE))
        raise ArtifactError(f"{name} has schema version {one_line(repr(version))}, and this ntc reads {known}; use the ntc that wrote it")
    try:
        return schema.Netlist.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = one_line(_place(first["loc"]))
        raise ArtifactError(f"{name} does not fit schema {version} at {place}: {one_line(first['msg'])}") from error


def _place(parts: Iterable[object]) -> str:
    """Where in the file, without the names of alternatives that pydantic tried."""
    return ".".join(str(part) for part in parts if not str(part).startswith(("constrained-", "function-")))


def to_graph(netlist: schema.Netlist) -> nx.DiGraph[str]:
    """The elements as nodes, with their fields as attributes and ``element`` for their kind; who reads whom as edges.

    An edge has ``ports``, pairs (output of the source, input of the target), ``shapes`` and ``kinds``, one for each of them, and
    ``synapses``: number of synapses through which the target takes it, 0 unless the target is a projection.
    """
    import networkx as nx

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
