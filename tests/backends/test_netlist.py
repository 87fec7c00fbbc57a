"""The netlist back end: complete, deterministic, described by its schema."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import jsonschema
import networkx as nx
import pytest
import torch
from netlist_cases import VARIANTS, Case, cached, compiled, emitted, masked
from safetensors import safe_open

from ntc.registry import Backend, backend
from ntc_backends import netlist_schema
from ntc_backends.netlist import NetlistBackend, to_networkx


@pytest.fixture(scope="module", params=VARIANTS)
def case(request: pytest.FixtureRequest) -> Case:
    return cached(request.param)


@pytest.fixture(scope="module")
def tiny() -> Case:
    return cached("spikes", 1)


# Nothing is dropped.


def test_every_node_is_in_exactly_one_element(case: Case) -> None:
    data = case.json
    placed = [op["name"] for island in data["host"] for op in island["ops"]]
    for table in ("populations", "projections", "dynamic_products", "scales", "decodes"):
        placed += [element["name"] for element in data[table]]
    assert sorted(placed) == sorted(n.name for n in case.program.graph.nodes if n.op == "call_function")
    assert case.counts["host_ops"] == sum(len(island["ops"]) for island in data["host"])


def test_tensors_are_complete_and_their_hashes_right(case: Case) -> None:
    table = case.json["tensors"]
    missing = {n: t for n, t in case.program.tensors.items() if n not in table}
    assert all(bool((t == t.flatten()[0]).all()) for t in missing.values())  # thresholds that became one number
    assert set(table) <= set(case.program.tensors)
    with safe_open(case.folder / "netlist.safetensors", "pt") as file:
        assert set(file.keys()) == {entry["key"] for entry in table.values()}
        for name, entry in table.items():
            stored = file.get_tensor(entry["key"])
            assert torch.equal(stored, case.program.tensor(name))
            assert entry["shape"] == list(stored.shape)
            assert entry["sha256"] == hashlib.sha256(stored.numpy().tobytes()).hexdigest()


def test_tied_weights_are_stored_once(case: Case) -> None:
    text, size = (case.folder / "netlist.json").read_text(), case.program.tensor("transformer.wte.weight").numel() * 4
    assert text.count('"tensor": "transformer.wte.weight"') == 2  # embedding and lm_head
    blob = case.folder / "netlist.safetensors"
    assert blob.read_bytes().count(case.program.tensor("transformer.wte.weight").detach().numpy().tobytes()) == 1
    assert blob.stat().st_size > size


def test_the_projections_are_those_of_the_neurons(tiny: Case) -> None:
    data = tiny.json
    synapses = {p["name"].removeprefix("h_0_"): p["synapse"] for p in data["projections"]}
    assert synapses == {
        "attn_c_attn_q": "analog", "attn_c_attn_k": "analog", "attn_c_attn_v": "analog", "mlp_c_fc": "analog",
        "attn_c_proj": "spikes", "mlp_c_proj": "spikes",
    }  # fmt: skip
    assert {p["role"]: (p["size"], p["input"], p["signed"]) for p in data["populations"]} == {
        "q": (32, "constant", False), "k": (32, "constant", False), "v": (32, "constant", True),
        "ssa": (32, "timed", True), "ffn": (128, "constant", False),
    }  # fmt: skip
    assert all(p["threshold"] == 1.0 for p in data["populations"] if p["role"] != "ssa")
    assert [op["op"].split(".")[1] for op in data["host"][-1]["ops"]] == ["add", "layer_norm", "linear"]
    assert tiny.counts["neurons"] == 4 * 32 + 128
    assert tiny.counts["synapses"] == 4 * 32 * 32 + 2 * 32 * 128


# The graph.


def test_networkx_graph(case: Case) -> None:
    graph = to_networkx(case.folder)
    assert nx.is_directed_acyclic_graph(graph)
    assert [n for n in graph if graph.in_degree(n) == 0] == ["input_ids"]
    assert [n for n in graph if graph.out_degree(n) == 0] == ["logits"]
    assert nx.descendants(graph, "input_ids") == set(graph) - {"input_ids"}
    per_kind = [graph.nodes[n]["element"] for n in graph]
    assert per_kind.count("population") == case.counts["populations"]
    assert per_kind.count("host") == case.counts["host_islands"]
    assert sum(d["synapses"] for _, _, d in graph.edges(data=True)) == case.counts["synapses"]
    shapes = [d["shapes"][0] for _, _, d in graph.in_edges("logits", data=True)]
    assert shapes == [["B", "L", 61]]


def test_islands_are_as_few_as_crossings_allow(case: Case) -> None:
    """One before the first part on the chip, one between any two, one at the end."""
    parts = 4 if case.counts["dynamic_products"] else 2  # two blocks, each with attention and FFN or FFN only
    assert case.counts["host_islands"] == parts + 1


# The schema.


def test_schema_file_is_up_to_date() -> None:
    assert netlist_schema.SCHEMA_FILE.read_text(encoding="utf-8") == netlist_schema.schema_text(), (
        "run python -m ntc_backends.netlist_schema"
    )


def test_every_field_says_what_it_means_and_in_which_unit() -> None:
    published = json.loads(netlist_schema.schema_text())
    for definition in [published, *published["$defs"].values()]:
        for name, entry in definition.get("properties", {}).items():
            target = published["$defs"].get(entry.get("$ref", "").rpartition("/")[2], {})  # there if the sentence is the same
            assert entry.get("description") or target.get("description"), f"{definition['title']}.{name}"
            assert entry.get("unit"), f"{definition['title']}.{name}"


def test_jsonschema_takes_what_is_emitted_and_nothing_else(case: Case) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(netlist_schema.SCHEMA_FILE.read_text(encoding="utf-8")))
    jsonschema.Draft202012Validator.check_schema(validator.schema)
    data = case.json
    validator.validate(data)
    for path, value in {"schema_version": "9.9", "time": {"steps": 0, "dt": "step"}, "extra": 1, "blob": None}.items():
        assert not validator.is_valid(data | {path: value})
    typo = copy.deepcopy(data)
    typo["populations"][0]["tresh"] = 1
    assert not validator.is_valid(typo)


# The files.


def test_same_program_same_bytes(case: Case, tmp_path: Path) -> None:
    assert emitted(case.program, tmp_path).counts["sha256"] == case.counts["sha256"]
    for name, sha in case.counts["sha256"].items():
        assert hashlib.sha256((case.folder / name).read_bytes()).hexdigest() == sha
        assert (case.folder / name).stat().st_size == case.counts["bytes"][name]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["netlist.json", "netlist.safetensors"]


def test_same_model_compiled_again_gives_the_same_bytes(tiny: Case, tmp_path: Path) -> None:
    assert emitted(compiled("spikes", layers=1), tmp_path).counts["sha256"] == tiny.counts["sha256"]


@pytest.mark.parametrize("source", ["/home/someone/models/gpt2", "C:\\models\\gpt2", "~/gpt2", "org/gpt2"])
def test_no_local_path(tiny: Case, tmp_path: Path, source: str) -> None:
    model = emitted(tiny.program.named(source), tmp_path).json["model"]
    assert model["source"] == ("org/gpt2" if source == "org/gpt2" else "gpt2")


def test_registered() -> None:
    found = backend("netlist")
    assert isinstance(found, Backend)
    assert isinstance(found, NetlistBackend)


def test_golden(tiny: Case, golden: Callable[[str, str], None]) -> None:
    golden("netlist_tiny", masked((tiny.folder / "netlist.json").read_text(encoding="utf-8")))
