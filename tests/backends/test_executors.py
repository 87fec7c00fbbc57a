"""Artefacts in their executors: the program's spikes, and each kind of mistake in each artefact found and named."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from agreement_cases import CHANNELS, Named, changed, constant_of, floating, noise, ops, quantized, saved, set_element, tokens

from ntc.errors import ArtifactError
from ntc.ops import aten
from ntc.program import Program
from ntc.proof import prove
from ntc.recording import populations
from ntc.registry import backend, names_of
from ntc_backends.onnx_execute import OnnxExecutor
from ntc_backends.onnx_export import OnnxBackend

TARGETS = ("onnx", "netlist", "nir")
GRADES: dict[str, Callable[[], Program]] = {"float": cache(floating), "integer": cache(quantized), "dyadic": cache(lambda: floating(dyadic=True))}
_KEEP: list[tempfile.TemporaryDirectory[str]] = []


@cache
def folder_of(grade: str) -> Path:
    """A compiled folder with all artefacts; tests do not write here."""
    _KEEP.append(kept := tempfile.TemporaryDirectory(prefix="ntc-executors-"))
    folder = saved(program := GRADES[grade](), Path(kept.name) / grade)
    for name in TARGETS:
        backend(name).emit(program, folder, analog=None, tokens=program.example)
    return folder


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    return lambda grade: Path(shutil.copytree(folder_of(grade), tmp_path / grade))


def verified(folder: Path, target: str, program: Program, count: int = 1200) -> dict[str, Any]:
    found = prove(folder, tokens(count, program.info.vocab_size), targets=[target], program=program)["targets"][target]
    assert found["artefact"] == "folder"
    return found


def layer(result: dict[str, Any], node: str) -> dict[str, Any]:
    return next(x for x in result["layers"] if x["node"] == node)


def test_entry_points() -> None:
    assert set(TARGETS) <= set(names_of("executor"))


# --------------------------------------------------------------------------------------------------- right artefacts


@pytest.mark.parametrize("target", TARGETS)
def test_integer_artefacts_are_exact(target: str) -> None:
    result = verified(folder_of("integer"), target, GRADES["integer"]())
    assert (result["verdict"], result["spike_mismatches"], result["agrees"]) == ("exact", 0, True)
    assert result["max_logit_diff"] == (None if target == "nir" else 0.0)
    assert result["spikes"] > 10_000 and result["coverage"]["share"] == 1.0
    by = {x["node"]: x["by"] for x in result["layers"]}
    assert by == {"q": "spikes", "k": "spikes", "v": "spikes", "ffn": "counts" if target == "onnx" else "spikes"}
    assert ("spike counts" in result["reason"]) == (target == "onnx")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("grade", ["float", "dyadic"])
def test_float_artefacts_agree(grade: str, target: str) -> None:
    result = verified(folder_of(grade), target, GRADES[grade]())
    assert result["verdict"] in ("approximate", "exact") and result["agrees"]
    assert result["held"]["spike_mismatches"] == result["held"]["ties"]
    if target != "nir":
        assert 0 < result["held"]["max_logit_diff"] <= result["held"]["logit_limit"]


def test_nir_says_what_it_lacks() -> None:
    result = verified(folder_of("float"), "nir", GRADES["float"](), count=48)
    left = {x["node"]: x["reason"] for x in result["unsupported"]}
    assert "multiplies two signals" in left["attention"] and "head" in left and "ffn" not in left


def test_held_runs_give_the_logits_of_the_free_run() -> None:
    """With the spikes that the artefact fires itself, cutting it changes nothing."""
    for target in ("onnx", "netlist"):
        from ntc.registry import executor

        program = GRADES["integer"]()
        runner = executor(target)
        runner.prepare(folder_of("integer"), program)
        ids = tokens(24).windows
        free = runner.run(ids)
        trains = dict(verified_trains(program, ids))
        held = runner.held(ids, trains)
        assert torch.equal(free.logits, held.logits)
        zero = {name: torch.zeros_like(train) for name, train in trains.items()}
        assert not torch.equal(runner.held(ids, zero).logits, free.logits)  # what readers see is what they are given
        assert torch.equal(runner.run(ids).logits, free.logits)  # and holding leaves nothing behind


def verified_trains(program: Program, ids: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    from ntc.recording import record

    yield from record(program, ids, 0).trains.items()


def test_external_weights(tmp_path: Path) -> None:
    program = GRADES["float"]()
    folder = saved(program, tmp_path / "external")
    OnnxBackend(external_bytes=0).emit(program, folder, tokens=program.example)
    before = {p.name for p in folder.iterdir()}
    result = verified(folder, "onnx", program, count=48)
    assert result["agrees"] and "model.onnx.data" in result["files"]
    assert {p.name for p in folder.iterdir()} == before
    runner = OnnxExecutor()
    (folder / "model.onnx.data").write_bytes(b"")
    with pytest.raises(ArtifactError, match="cannot be run"):
        runner.prepare(folder, program)


# --------------------------------------------------------------------------------------------------- artefacts of another program


def _changed(program: Program, kind: str) -> tuple[str, Program]:
    weight = program.tensor(constant_of(program, "k_current", 1)).abs()
    place = tuple(int(i) for i in (weight == weight.max()).nonzero()[0])
    less = 1.01 if weight.is_floating_point() else 1 - 1 / 127
    node, name, change = {
        "weight": ("k", constant_of(program, "k_current", 1), set_element(place, less)),
        "threshold": ("v", constant_of(program, "v", 1), set_element(5, 1.01)),
        "bias": ("ffn", constant_of(program, "ffn_current", 2), torch.zeros_like),
    }[kind]
    return node, changed(program, name, change)


@pytest.mark.parametrize("kind", ["weight", "threshold", "bias"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("grade", ["float", "integer"])
def test_wrong_constants_are_found(grade: str, target: str, kind: str, tmp_path: Path) -> None:
    """One weight 1 % off, one threshold 1 % off, no bias."""
    program = GRADES[grade]()
    node, other = _changed(program, kind)
    folder = saved(program, tmp_path / "wrong")
    backend(target).emit(other, folder, analog=None, tokens=other.example)
    result = verified(folder, target, program, count=2400)
    assert (result["verdict"], result["agrees"]) == ("differs", False)
    assert f"node %{node}" in result["reason"] and layer(result, node)["unexplained"] > 0
    assert all(x["unexplained"] == 0 for x in result["layers"] if x["node"] != node)


def test_wrong_currents_behind_neurons_are_found_in_nir(tmp_path: Path) -> None:
    """What leaves a file reaches no neuron of it, so its values are compared."""
    program = GRADES["float"]()
    behind = next(n for n in program.find("ffn").users if n.target == aten.linear.default)
    for name, change in ((constant_of(program, behind.name, 1), set_element((3, 7), 1.01)), (constant_of(program, behind.name, 2), torch.zeros_like)):
        wrong = changed(program, name, change)
        folder = saved(program, tmp_path / name)
        backend("nir").emit(wrong, folder, analog=None, tokens=program.example)
        result = verified(folder, "nir", program, count=240)
        (current,) = result["currents"]
        assert result["verdict"] == "differs" and result["spike_mismatches"] == 0
        assert "a current is off by" in result["reason"] and f"node %{behind.name}" in result["reason"]
        assert current["node"] == behind.name and current["difference"] > current["limit"] > 0


def test_wrong_head_is_found(tmp_path: Path) -> None:
    for grade in ("float", "integer"):
        program = GRADES[grade]()
        other = changed(program, constant_of(program, "head", 1), lambda t: torch.roll(t, 1, 0))
        folder = saved(program, tmp_path / grade)
        for target in ("onnx", "netlist"):
            backend(target).emit(other, folder, analog=None, tokens=other.example)
            result = verified(folder, target, program, count=48)
            assert result["verdict"] == "differs" and "logits differ" in result["reason"] and result["spike_mismatches"] == 0


# --------------------------------------------------------------------------------------------------- damaged neurons


def _every(graph: Any) -> Iterator[onnx.NodeProto]:
    """The nodes of a function and of the graphs inside of it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _every(attribute.g)


def edit_onnx(folder: Path, kind: str) -> None:
    path = folder / "model.onnx"
    model = onnx.load(path)
    functions = [f for f in model.functions if f.name in ("IntegrateFire", "IntegerFire") and "count" not in f.overload]
    done = 0
    for function in functions:
        for node in _every(function):
            if kind == "comparison" and node.op_type == "GreaterOrEqual":
                node.op_type, done = "Greater", done + 1
            elif kind == "reset" and node.op_type == "Sub" and node.input[0].startswith("u") and node.output[0].startswith("v"):
                node.op_type, done = "Identity", done + 1  # the membrane keeps what it has fired
                del node.input[1:]
            elif kind == "comparison" and node.op_type == "Add" and node.output[0] == "start_half":
                node.op_type, done = "Sub", done + 1  # of a train in closed form: (start - 1/2) / theta is what u > theta is said with
            elif kind == "reset" and node.op_type == "Sub" and node.input[0].startswith("c_") and node.output[0].startswith("s_"):
                node.op_type, done = "Identity", done + 1
                del node.input[1:]
    assert done
    path.write_bytes(model.SerializeToString())


def edit_netlist(folder: Path, kind: str) -> None:
    assert kind == "reset"
    path = folder / "netlist.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    for population in data["populations"]:
        population["reset"] = "hard"
    data["conventions"]["reset"] = "hard"
    path.write_text(json.dumps(data), encoding="utf-8")


def edit_nir(folder: Path, kind: str) -> None:
    from ntc_backends.nir_files import read_file, write_file

    path = folder / "nir" / "index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    done = 0
    for entry in index["files"]:
        file = folder / "nir" / entry["file"]
        graph, version = read_file(file)
        integer = entry["populations"][0]["arithmetic"] == "integer"
        for node in graph.nodes.values():
            what = type(node).__name__
            if kind == "comparison" and what == "Threshold":  # the next number is what u >= theta is said with
                node.threshold = node.threshold + 1 if integer else np.nextafter(node.threshold, np.float32(np.inf))
                done += 1
            elif kind == "reset" and what == "Scale" and (node.scale < 0).all():
                node.scale, done = node.scale * 0, done + 1
        write_file(file, graph, version)
        entry["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    assert done
    path.write_text(json.dumps(index), encoding="utf-8")


EDITS = {"onnx": edit_onnx, "netlist": edit_netlist, "nir": edit_nir}


@pytest.mark.parametrize(("grade", "target"), [(g, t) for g in ("float", "integer") for t in TARGETS if (g, t) != ("integer", "netlist")])
def test_another_reset_is_found(grade: str, target: str, copy: Callable[[str], Path]) -> None:
    folder = copy(grade)
    EDITS[target](folder, "reset")
    result = verified(folder, target, GRADES[grade](), count=240)
    assert result["verdict"] == "differs" and "node %q" in result["reason"]
    neurons = [x for x in result["layers"] if x["by"] == "spikes"]
    assert all(x["unexplained"] > 0 for x in neurons) and neurons


@pytest.mark.parametrize("target", ["onnx", "nir"])
@pytest.mark.parametrize(("grade", "node"), [("dyadic", "q"), ("integer", "")])
def test_another_comparison_is_found(grade: str, node: str, target: str, copy: Callable[[str], Path]) -> None:
    folder = copy(grade)
    EDITS[target](folder, "comparison")
    result = verified(folder, target, GRADES[grade](), count=4800)
    assert result["verdict"] == "differs" and f"node %{node}" in result["reason"]
    if grade == "dyadic":
        assert "compares with > instead of >=" in result["reason"]


@pytest.mark.parametrize(("grade", "node"), [("dyadic", "q"), ("integer", "")])
def test_another_comparison_in_the_simulator_is_found(grade: str, node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ntc_backends.simulator import neurons

    monkeypatch.setattr(neurons, "np", SimpleNamespace(**{**vars(np), "greater_equal": np.greater}))
    result = verified(folder_of(grade), "netlist", GRADES[grade](), count=4800)
    assert result["verdict"] == "differs" and f"node %{node}" in result["reason"]


def test_netlist_that_says_something_else_is_refused(copy: Callable[[str], Path]) -> None:
    path = (folder := copy("integer")) / "netlist.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"comparison": ">="', '"comparison": ">"'), encoding="utf-8")
    with pytest.raises(ArtifactError, match="comparison"):
        verified(folder, "netlist", GRADES["integer"]())
    path.write_text(text, encoding="utf-8")
    edit_netlist(folder, "reset")
    with pytest.raises(ArtifactError, match="soft reset only"):
        verified(folder, "netlist", GRADES["integer"]())


def test_damaged_artefacts_are_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("float")
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:5000])
    (folder / "netlist.safetensors").write_bytes(b"")
    next((folder / "nir").glob("*.nir")).write_bytes(b"")
    for target, sentence in (("onnx", "cannot be run"), ("netlist", "cut off"), ("nir", "has changed")):
        with pytest.raises(ArtifactError, match=sentence):
            verified(folder, target, GRADES["float"]())


def test_artefact_of_another_network_differs(copy: Callable[[str], Path]) -> None:
    """A population that it does not have at all."""
    program = floating(signed=False)
    other = program.copy()
    other.find("q").name = "queries"
    folder = copy("float")
    for target in TARGETS:
        result = verified(folder, target, other, count=48)
        assert result["verdict"] == "differs" and "queries" in result["reason"]


# --------------------------------------------------------------------------------------------------- a chain inside of one NIR file


def chain() -> Program:
    """Neurons that drive neurons through synapses, with nothing in between: one NIR file."""
    b = Named(noise(97, CHANNELS, seed=1), context=12)
    settings = (torch.zeros(1), 4, False)

    def fire(current: Any, timed: bool, name: str) -> Any:
        return b.call(ops.integrate_fire.default, current, torch.ones(1), *settings, timed, "atan", 1.0, name=name)

    first = fire(b.call(aten.linear.default, b.embedded, noise(CHANNELS, CHANNELS, seed=2) / 3, None), False, "first")
    second = fire(b.call(aten.linear.default, first, noise(CHANNELS, CHANNELS, seed=3) / 2, None), True, "second")
    value = b.call(ops.decode.default, second, "rate")
    return b.program(b.call(aten.linear.default, value, noise(97, CHANNELS, seed=4), None))


def test_chain_of_populations_in_one_file(tmp_path: Path) -> None:
    from ntc_backends.nir_verify import NirExecutor

    program = chain()
    folder = saved(program, tmp_path / "chain")
    backend("nir").emit(program, folder, analog=None, tokens=program.example)
    runner = NirExecutor()
    runner.prepare(folder, program)
    assert runner.behind == {"first": (), "second": ("first",)} and populations(program).keys() == runner.behind.keys()
    assert verified(folder, "nir", program)["agrees"]
    wrong = changed(program, constant_of(program, "first", 1), set_element(slice(None), 1.05))
    shutil.rmtree(folder / "nir")
    backend("nir").emit(wrong, folder, analog=None, tokens=program.example)
    result = verified(folder, "nir", program)
    assert result["verdict"] == "differs" and "node %first" in result["reason"]
    assert layer(result, "second")["consequences"] == layer(result, "second")["held_mismatches"] > 0
