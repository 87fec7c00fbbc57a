"""``ntc explain``: from any name in any artefact back to the line of the model that it came from."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ntc.cli.options import CompiledFolder
from ntc.cli.output import JsonFlag, VerboseFlag, session, table
from ntc.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from torch.fx import Node

    from ntc.program import Program

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(
        "explain",
        epilog="Examples:\n\n"
        "ntc explain build/demo h_0_mlp_act_spikes\n\n"
        "ntc explain build/demo host_3          (an element of netlist.json)\n\n"
        "ntc explain build/demo transformer.h.0.mlp.c_fc.weight --json",
    )(explain)


def explain(
    folder: CompiledFolder,
    name: Annotated[
        str, typer.Argument(metavar="NODE", help="A node of the program or of model.onnx, a tensor, or an element of netlist.json.",
                            show_default=False)
    ],
    as_json: JsonFlag = False,
    verbose: VerboseFlag = 0,
) -> None:  # fmt: skip
    """Say where a node came from: its module and line in the model, and the passes in between."""
    with session(as_json, verbose) as output:
        result = _explain(folder, name)
        output.result(result, lambda console: _show(console, result))


def _explain(folder: Path, name: str) -> dict[str, Any]:
    from ntc import artifact

    program = artifact.load(folder)
    wanted = name.removeprefix("%")
    kind, nodes = _find(folder, program, wanted)
    return {"folder": str(folder), "name": wanted, "kind": kind, "nodes": [_about(program, n) for n in nodes]}


def _find(folder: Path, program: Program, name: str) -> tuple[str, list[Node]]:
    """What a name means, and the program's nodes behind it.

    Raises:
        ConfigError: If it is nowhere; lists the nearest names.
    """
    from ntc.meta import ORIGIN

    nodes: dict[str, Node] = {n.name: n for n in program.graph.nodes}
    if name in nodes:
        return "node of the program", [nodes[name]]
    holders = [n for n in program.graph.nodes if n.op == "get_attr" and n.target == name]
    if holders:
        return "tensor", holders
    onnx = _onnx_names(folder)
    if name in onnx:  # parts of a node are called node.part
        owner = name
        while owner and owner not in nodes:
            owner = owner.rpartition(".")[0]
        return "node of model.onnx", [nodes[owner]] if owner else []
    elements = _netlist_elements(folder)
    element, _, port = name.partition(":")
    if element in elements:
        if port in elements[element]:
            element = port
        return "element of netlist.json", [nodes[n] for n in elements[element] if n in nodes]
    origin = [n for n in program.graph.nodes if name in n.meta.get(ORIGIN, ())]
    if origin:
        return "node of the captured model", origin
    known = [*nodes, *(str(n.target) for n in program.graph.nodes if n.op == "get_attr"), *elements, *onnx]
    near = list(dict.fromkeys(difflib.get_close_matches(name, known, n=8, cutoff=0.5)))[:4]
    hint = f"did you mean {', '.join(near)}?" if near else f"{folder}/program.json has the names"
    raise ConfigError(f"nothing in {folder} is called {name}; {hint}")


def _onnx_names(folder: Path) -> list[str]:
    path = folder / "model.onnx"
    if not path.is_file():
        return []
    import onnx

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error
    return list(dict.fromkeys(name for node in graph.node for name in (node.name, *node.output) if name))


def _netlist_elements(folder: Path) -> dict[str, list[str]]:
    """Names of elements and host ops, with the program's nodes that they are."""
    path = folder / "netlist.json"
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        found: dict[str, list[str]] = {}
        for table_name in ("populations", "projections", "dynamic_products", "scales", "decodes"):
            found |= {e["name"]: [e["name"]] for e in data[table_name]}
        for island in data["host"]:
            found[island["name"]] = [op["name"] for op in island["ops"]]
            found |= {op["name"]: [op["name"]] for op in island["ops"]}
        found[data["input"]["name"]] = [data["input"]["name"]]
        element, _, port = data["output"]["logits"].partition(":")  # the ports of an island are its ops
        found.setdefault(data["output"]["name"], [port] if port in found else [element])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error
    return found


def _about(program: Program, node: Node) -> dict[str, Any]:
    from ntc.meta import MADE_BY, NEURON, ORIGIN, TYPE, block_of, module_of, source_of
    from ntc.program import op_name

    neuron = node.meta.get(NEURON)
    return {
        "node": node.name,
        "op": op_name(node.target) if node.op == "call_function" else node.op,
        "text": f"{node.target}" if node.op == "get_attr" else program.line(node) if node.op != "output" else "",
        "type": str(node.meta.get(TYPE, "")),
        "shape": program.shape_text(node),
        "module": module_of(node),
        "block": block_of(node),
        "source": source_of(node),
        "origin": list(node.meta.get(ORIGIN, ())),
        "made_by": list(node.meta.get(MADE_BY, ())),
        "role": neuron.role if neuron is not None else "",
        "inputs": [a.name for a in node.all_input_nodes if a.op != "get_attr"],
        "tensors": [str(a.target) for a in node.all_input_nodes if a.op == "get_attr"],
        "users": [u.name for u in node.users],
    }


def _show(console: Console, result: dict[str, Any]) -> None:
    nodes = result["nodes"]
    console.print(Text(result["name"], "bold").append(f"  {result['kind']} in {result['folder']}", "not bold dim"))
    if not nodes:
        console.print("a constant that the back end made")
        return
    if len(nodes) > 1:
        rows = table("node", "op", "module", "line of the model", "passes")
        for n in nodes:
            rows.add_row(f"%{n['node']}", n["op"], n["module"], n["source"], " > ".join(n["made_by"]))
        console.print(rows)
        return
    node = nodes[0]
    rows = table("", "")
    rows.show_header = False
    for label, value in (
        ("does", node["op"]), ("gives", f"{node['type']} {node['shape']}".strip()), ("role", node["role"]), ("module", node["module"]),
        ("line of the model", node["source"]), ("passes", " > ".join(node["made_by"])),
        ("stands for", ", ".join(f"%{o}" for o in node["origin"])), ("takes", ", ".join(f"%{i}" for i in node["inputs"])),
        ("tensors", ", ".join(node["tensors"])), ("goes to", ", ".join(f"%{u}" for u in node["users"])),
    ):  # fmt: skip
        if value:
            rows.add_row(Text(label, "dim"), value)
    console.print(rows)
