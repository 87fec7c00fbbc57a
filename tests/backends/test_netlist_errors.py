"""What is wrong with a netlist is found: by its reader, by the golden text, or by running it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from netlist_cases import Case, agreement, cached, element, masked
from safetensors.torch import load_file, save_file

import ntc
from ntc.recipe import Settings
from ntc.registry import find_pass, recipe
from ntc.testing import example_ids, tiny_gpt2
from ntc_backends.netlist import NetlistBackend, load_netlist


@pytest.fixture(scope="module")
def tiny() -> Case:
    return cached("spikes", 1)


def swap_query_and_key(data: dict[str, Any]) -> None:
    inputs = data["dynamic_products"][0]["inputs"]
    inputs["query"], inputs["key"] = inputs["key"], inputs["query"]


def half_start(data: dict[str, Any]) -> None:
    element(data, "populations", role="ffn")["v0"] = 0.0


def binary_value(data: dict[str, Any]) -> None:
    element(data, "populations", role="v")["signed"] = False


def other_residual(data: dict[str, Any]) -> None:
    add = next(op for op in data["host"][-1]["ops"] if op["op"] == "aten.add.Tensor")
    add["arguments"]["self"] = add["arguments"]["other"]


def no_eps(data: dict[str, Any]) -> None:
    next(op for op in data["host"][0]["ops"] if "layer_norm" in op["op"])["arguments"]["eps"] = 0.1


@pytest.mark.parametrize("edit", [swap_query_and_key, half_start, binary_value, other_residual, no_eps])
def test_a_change_of_meaning_changes_golden_text_and_result(tiny: Case, tmp_path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    folder = tiny.edited(tmp_path, edit)
    before, after = (masked(json.dumps(d)) for d in (tiny.json, json.loads((folder / "netlist.json").read_text())))
    assert before != after
    error, _, _ = agreement(tiny.program, folder, example_ids(batch=2, length=20, seed=7))
    assert error > 1e-3


def test_one_percent_of_a_weight_is_found(tiny: Case, tmp_path: Path) -> None:
    shutil.copytree(tiny.folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "netlist.safetensors")
    tensors["transformer.h.0.mlp.c_proj.weight"] *= 1.01
    save_file(tensors, tmp_path / "netlist.safetensors")
    error, _, _ = agreement(tiny.program, tmp_path, example_ids(seed=7))
    assert error > 1e-3
    with pytest.raises(ntc.ArtifactError):
        load_netlist(tmp_path)


def flip_bit(folder: Path) -> None:
    data = bytearray((folder / "netlist.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "netlist.safetensors").write_bytes(bytes(data))


def cut(folder: Path) -> None:
    file = folder / "netlist.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def edit_json(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = json.loads((folder / "netlist.json").read_text())
        change(data)
        (folder / "netlist.json").write_text(json.dumps(data))

    return apply


def rename(data: dict[str, Any]) -> None:
    data["projections"][0]["name"] = data["projections"][1]["name"]


def op_of_two_islands(data: dict[str, Any]) -> None:
    """Each island is right by itself: the op's readers are renamed with it."""
    first, *others = data["host"]
    at, old = next((i, op["name"]) for i, island in enumerate(others, 1) for op in island["ops"] if op["name"] not in island["outputs"])
    new = next(op["name"] for op in first["ops"] if op["name"] not in data["host"][at]["inputs"])
    data["host"][at] = json.loads(json.dumps(data["host"][at]).replace(f'"{old}"', f'"{new}"'))


def op_like_an_element(data: dict[str, Any]) -> None:
    first = data["host"][0]
    old = next(op["name"] for op in first["ops"] if op["name"] not in first["outputs"])
    data["host"][0] = json.loads(json.dumps(first).replace(f'"{old}"', f'"{data["populations"][0]["name"]}"'))


def cycle(data: dict[str, Any]) -> None:
    element(data, "projections", synapse="analog")["inputs"]["pre"] = data["output"]["logits"]


def another_tensor(table: str, field: str) -> Callable[[dict[str, Any]], None]:
    """A tensor of the netlist that has another shape than the field needs."""

    def change(data: dict[str, Any]) -> None:
        data[table][0][field] = {"tensor": next(name for name, entry in data["tensors"].items() if len(entry["shape"]) == 2)}

    return change


def leak_without_rule(data: dict[str, Any]) -> None:
    data["dynamic_products"][0]["leak"] = 0.5


def leak_of_another_shape(data: dict[str, Any]) -> None:
    data["dynamic_products"][0]["rule"] = "M = leak M + outer(K, V); Y = Q M"
    another_tensor("dynamic_products", "leak")(data)


def dead_end(data: dict[str, Any]) -> None:
    last = data["output"]["logits"].split(":")[0]
    data["output"]["logits"] = next(iter(element(data, "host", name=last)["inputs"].values()))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit": (flip_bit, "SHA-256 differs"),
    "cut": (cut, "cut off or replaced"),
    "no blob": (lambda f: (f / "netlist.safetensors").unlink(), "is missing"),
    "no json": (lambda f: (f / "netlist.json").unlink(), "there is no netlist at"),
    "no JSON": (lambda f: (f / "netlist.json").write_text("{"), "is no JSON"),
    "other format": (edit_json(lambda d: d.update(format="nir")), "is no ntc-netlist file"),
    "version": (edit_json(lambda d: d.update(schema_version="7.0")), "schema version '7.0'"),
    "type": (edit_json(lambda d: d["populations"][0].update(size="many")), "at populations.0.size"),
    "unknown field": (edit_json(lambda d: d["time"].update(tau=1)), "at time.tau"),
    "dangling edge": (edit_json(lambda d: d["projections"][0]["inputs"].update(pre="nobody:value")), "no such output"),
    "dangling value": (edit_json(lambda d: d["host"][0]["ops"][-1]["arguments"].update(input={"value": "nobody"})), "no earlier op"),
    "dangling tensor": (edit_json(lambda d: d["projections"][0].update(weight="nothing")), "which its table does not have"),
    "unused tensor": (edit_json(lambda d: d["projections"][0].update(bias=None)), "no element of the netlist uses"),
    "same name": (edit_json(rename), "the same name, h_0_attn_c_attn_k: an element and an element"),
    "called like the output": (edit_json(lambda d: d["populations"][0].update(name="logits")), "the same name, logits: an element and the output"),
    "op of two islands": (edit_json(op_of_two_islands), "an op of host_0 and an op of host_"),
    "op like an element": (edit_json(op_like_an_element), "the same name, h_0_attn_attention_q_spikes: an element and an op of host_0"),
    "order": (edit_json(lambda d: d["order"].pop()), "the order of the netlist"),
    "cycle": (edit_json(cycle), "the graph has a cycle"),
    "dead end": (edit_json(dead_end), "never reaches the logits"),
    "shape": (edit_json(lambda d: d["projections"][0].update(shape=[32, 31], synapses=992)), "is needed"),
    "size": (edit_json(lambda d: d["populations"][0].update(size=31)), "is needed"),
    "tensor shape": (edit_json(lambda d: next(iter(d["tensors"].values()))["shape"].append(1)), "is needed"),
    "tensor dtype": (edit_json(lambda d: next(iter(d["tensors"].values())).update(dtype="float64")), "F32 [32] in netlist.safetensors"),
    "potentials": (edit_json(another_tensor("populations", "v0")), "the v0 of h_0_attn_attention_q_spikes has size"),
    "time constants": (edit_json(another_tensor("populations", "tau")), "the tau of h_0_attn_attention_q_spikes has size"),
    "leaks": (edit_json(leak_of_another_shape), "the leak of h_0_attn_attention_ssa has size"),
    "rule": (edit_json(leak_without_rule), "and its leak is 0.5"),
    "heads": (edit_json(lambda d: d["dynamic_products"][0].update(head_size=9)), "is needed"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_broken_netlists_are_refused_with_one_sentence(tiny: Case, tmp_path: Path, what: str) -> None:
    shutil.copytree(tiny.folder, tmp_path, dirs_exist_ok=True)
    load_netlist(tmp_path)
    breaking, message = BROKEN[what]
    breaking(tmp_path)
    with pytest.raises(ntc.ArtifactError, match=re.escape(message)) as raised:
        load_netlist(tmp_path)
    assert "\n" not in str(raised.value)


def test_an_op_may_be_called_like_the_output(tiny: Case, tmp_path: Path) -> None:
    def rename_op(data: dict[str, Any]) -> None:
        first = data["host"][0]
        old = next(op["name"] for op in first["ops"] if op["name"] not in first["outputs"])
        data["host"][0] = json.loads(json.dumps(first).replace(f'"{old}"', '"logits"'))

    assert "logits" in [op.name for op in load_netlist(tiny.edited(tmp_path, rename_op)).host[0].ops]


def test_a_file_of_version_1_0_is_read(tiny: Case, tmp_path: Path) -> None:
    """Its products do not leak, and have no field for that."""

    def older(data: dict[str, Any]) -> None:
        data["schema_version"] = "1.0"
        del data["dynamic_products"][0]["leak"]

    assert load_netlist(tiny.edited(tmp_path, older)).dynamic_products[0].leak is None


def test_a_program_without_neurons_is_refused(tmp_path: Path) -> None:
    passes = recipe("ffn-only").build(Settings({}), find_pass)
    context = ntc.Context(ntc.Calibration((example_ids(),), "random ids", "0"))
    captured = ntc.capture(tiny_gpt2(n_layer=1))
    analog = ntc.run_pipeline(captured, passes[:1], context)
    with pytest.raises(ntc.BackendError, match="no neurons"):
        NetlistBackend().emit(analog, tmp_path, analog=None, tokens=None)
    rates = ntc.run_pipeline(captured, passes[:-1], context)
    with pytest.raises(ntc.BackendError, match=r"firing rate: run insert-neurons first"):
        NetlistBackend().emit(rates, tmp_path, analog=None, tokens=None)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(tiny: Case, tmp_path: Path) -> None:
    with pytest.raises(ntc.ArtifactError, match="cannot write"):
        NetlistBackend().emit(tiny.program, tmp_path / "none", analog=None, tokens=None)
