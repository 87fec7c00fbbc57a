"""What the NIR back end writes of a whole program: files that do what the program does, an index that leaves nothing out, and refusals."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nir_cases import Toy, emitted, interpreted, trains

from ntc.errors import ArtifactError, BackendError, DataError
from ntc.ops import aten
from ntc.program import Program
from ntc.recipe import Settings
from ntc.testing import example_ids, tiny_gpt2
from ntc.verify import verify
from ntc_backends import nir_graph
from ntc_backends.nir_execute import Machine, nir_execute
from ntc_backends.nir_export import NirBackend
from ntc_backends.nir_index import NirIndex, load_index
from ntc_backends.nir_options import NirOptions

# Said in full, so that these tests do not depend on what the recipe chooses.
OPTIONS = {
    "ternary": {"normalizer": "leak", "signed_query": True, "signed_key": True, "signed_value": True, "output": "spikes"},
    "binary": {"normalizer": "rms", "signed_query": False, "signed_key": False, "signed_value": False, "output": "current"},
}
IDS = example_ids(batch=2, length=12, seed=7)


@functools.cache
def program(kind: str) -> Program:
    """In float64: there no membrane of a random model comes within rounding of its threshold, on any machine."""
    import ntc
    from ntc.registry import find_pass, recipe

    passes = recipe("neurtransformer").build(Settings(OPTIONS[kind]), find_pass)
    calibration = ntc.Calibration((example_ids(batch=4, length=20, seed=5),), "random ids", "0")
    single = ntc.run_pipeline(ntc.capture(tiny_gpt2(n_layer=1)), passes, ntc.Context(calibration))
    double = single.with_graph(single.copy().graph, {name: tensor.double() for name, tensor in single.tensors.items()})
    double.refresh()
    verify(double)
    return double


@functools.cache
def exported(kind: str) -> tuple[Path, dict[str, Any]]:
    folder = tempfile.TemporaryDirectory(prefix="ntc-nir-")
    _KEEP.append(folder)
    return Path(folder.name), NirBackend().emit(program(kind), Path(folder.name), tokens=IDS)


_KEEP: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


def toy(double: bool = False) -> Program:
    made = Toy(torch.tensor([[1.0, -0.5], [0.25, 2.0]], dtype=torch.float64 if double else torch.float32))
    dtype = made.tensors["x_0"].dtype
    current = made(aten.linear.default, made.last, torch.tensor([[0.5, 0.25], [-0.5, 1.0]], dtype=dtype), None, name="fc")
    theta, v0 = torch.tensor([1.0, 0.5], dtype=dtype), torch.tensor([0.5], dtype=dtype)
    spikes = made.fire(current, theta, v0, 4, name="act")
    back = made(aten.linear.default, spikes, torch.eye(2, dtype=dtype), torch.tensor([0.25, 0.0], dtype=dtype), name="proj")
    made(torch.ops.ntc.decode.default, back, "rate", name="decoded")
    return made.done()


# ------------------------------------------------------------------------------------------------ the same spikes


@pytest.mark.parametrize("kind", OPTIONS)
def test_files_have_the_spikes_and_currents_of_the_program(kind: str) -> None:
    folder, said = exported(kind)
    index, values = load_index(folder), trains(program(kind), IDS)
    by_interpreter = interpreted(folder, index, values)
    by_executor = nir_execute(folder, {f.input.value: values[f.input.value] for f in index.files})
    assert by_interpreter.keys() == by_executor.keys()
    spiking = {p.name for f in index.files for p in f.populations}
    assert len(spiking) == (5 if kind == "ternary" else 4)
    for name, got in by_interpreter.items():
        expected = values[name]
        if name in spiking:
            assert expected.any()
            np.testing.assert_array_equal(got, expected, err_msg=name)
            np.testing.assert_array_equal(by_executor[name], expected, err_msg=name)
        else:  # sums of at most 128 terms in another order
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-13 * np.abs(expected).max(), err_msg=name)
            np.testing.assert_allclose(by_executor[name], expected, rtol=0, atol=1e-13 * np.abs(expected).max(), err_msg=name)
    assert said["differing"] == 0
    assert said["events"] == sum(int(np.count_nonzero(values[name])) for name in spiking)


def test_float32_differs_by_rounding_only(tmp_path: Path) -> None:
    """The export fails for any spike whose membrane is not within rounding of its threshold; few are."""
    double = program("ternary")
    single = double.with_graph(double.copy().graph, {name: tensor.float() for name, tensor in double.tensors.items()})
    single.refresh()
    verify(single)
    said = NirBackend().emit(single, tmp_path, tokens=IDS)
    assert said["differing"] == said["by_rounding"] <= 1e-3 * said["events"]
    assert {f.dtype for f in load_index(tmp_path).files} == {"float32"}


# ------------------------------------------------------------------------------------------------ the index


@pytest.mark.parametrize("kind", OPTIONS)
def test_index_holds_every_node_and_every_way(kind: str) -> None:
    folder, _ = exported(kind)
    index, given = load_index(folder), program(kind)
    nodes = [n for n in given.graph.nodes if n.op == "call_function"]
    assert [n.name for n in index.nodes] == [n.name for n in nodes]
    assert {n.name: n.reads for n in index.nodes} == {n.name: [a.name for a in n.all_input_nodes if a.op != "get_attr"] for n in nodes}
    held = {n.name: n for n in index.nodes if n.file}
    for entry in index.files:
        path = folder / "nir" / entry.file
        assert entry.bytes == path.stat().st_size
        inside = {n.name for n in held.values() if n.file == entry.name}
        assert entry.name in inside
        leaving = {n: [u.name for u in node.users if u.name not in inside] for n in inside for node in nodes if node.name == n}
        assert {o.value: o.used_by for o in entry.outputs} == {n: users for n, users in leaving.items() if users}
        assert {r for n in inside for r in held[n].reads} - inside == {entry.input.value}
    assert {n.fidelity for n in held.values()} == {"exact"}
    assert all(n.parts for n in held.values())
    host = [n for n in index.nodes if not n.file]
    assert {n.fidelity for n in host} == {"unsupported"}
    reasons = {n.op: n.reason for n in host}
    assert "multiplies two signals" in reasons["ntc.spiking_attention"]
    assert "no end of a token" in reasons["ntc.decode"]
    assert reasons["layer_norm"] == "NIR has no layer_norm"
    assert index.sources == ["input_ids"]
    assert index.results == ["lm_head"]
    assert (index.steps, index.nir_version) == (given.steps, "1.0.6")


def test_what_hangs_together_is_one_file() -> None:
    index = load_index(exported("ternary")[0])
    held = {f.name: [n.name for n in index.nodes if n.file == f.name] for f in index.files}
    assert held["h_0_mlp_c_fc"] == ["h_0_mlp_c_fc", "h_0_mlp_act_spikes", "h_0_mlp_c_proj"]
    assert held["h_0_attn_attention_ssa_spikes"] == ["h_0_attn_attention_ssa_spikes", "h_0_attn_c_proj"]
    assert len(index.files) == 5
    inputs = {f.name: (f.input.value, f.input.held, f.input.start) for f in index.files}
    assert inputs["h_0_attn_c_attn_q"] == ("h_0_ln_1", True, "none")
    assert inputs["h_0_attn_attention_ssa_spikes"] == ("h_0_attn_attention_ssa", False, "none")


def test_same_program_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        emitted(toy(), tmp_path / name)
        time.sleep(1.1)  # a time in HDF5 is in seconds
    for path in (tmp_path / "one" / "nir").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / "nir" / path.name).read_bytes(), path.name


def test_an_older_export_is_replaced_and_nothing_else_is_touched(tmp_path: Path) -> None:
    (tmp_path / "nir").mkdir()
    (tmp_path / "nir" / "stale.nir").write_text("")
    (tmp_path / "manifest.json").write_text("{}")
    emitted(toy(), tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["manifest.json", "nir", "nir/fc.nir", "nir/index.json"]


def test_how_v0_gets_in(tmp_path: Path) -> None:
    """theta 1 and 1/2, v0 1/2: in the threshold of a loop; as a channel of the layer in front; added to the first step."""
    index = emitted(toy(double=True), tmp_path)
    nodes = nir_read(tmp_path / "nir" / "fc.nir").nodes
    np.testing.assert_array_equal(nodes["act_spikes"].threshold, np.nextafter([0.5, 0.25], 0))
    np.testing.assert_array_equal(nodes["act_reset"].scale, [-1, -0.5])
    assert (index.files[0].input.channels, index.files[0].input.start) == (2, "none")
    index = emitted(toy(double=True), tmp_path, reset="hard")
    nodes = nir_read(tmp_path / "nir" / "fc.nir").nodes
    np.testing.assert_array_equal(nodes["fc"].weight, [[0.5, 0.25, 0.5], [-0.5, 1, 0.25]])
    np.testing.assert_array_equal(nodes["act"].v_threshold, np.nextafter([1, 0.5], 0))
    assert (index.files[0].input.channels, index.files[0].input.start) == (3, "channel")
    (population,) = index.files[0].populations
    assert (population.threshold, population.start, population.v0) == (None, None, 0.5)
    folder = tmp_path / "ternary"
    folder.mkdir()
    NirBackend(NirOptions(reset="hard")).emit(without_sign(program("ternary")), folder, tokens=IDS)
    timed = next(f for f in load_index(folder).files if not f.input.held and f.populations)
    assert timed.input.start == "add"
    assert len(timed.input.start_current) == timed.input.channels  # type: ignore[arg-type]


def nir_read(path: Path) -> Any:
    import nir

    return nir.read(path)


def without_sign(given: Program) -> Program:
    """A copy whose neurons are binary: those have IF nodes also where their current changes its sign."""
    other = given.copy()
    for node in other.graph.nodes:
        if node.target is torch.ops.ntc.integrate_fire.default:
            node.update_arg(4, False)
    other.refresh()
    verify(other)
    return other


def test_gains_and_two_readers_of_one_train(tmp_path: Path) -> None:
    made = Toy(torch.tensor([[1.0, -0.5], [0.25, 2.0]]))
    current = made(aten.linear.default, made.last, torch.tensor([[0.5, 0.25], [-0.5, 1.0]]), None, name="fc")
    spikes = made.fire(current, torch.tensor([1.0, 0.5]), torch.tensor([0.5]), 4, name="act")
    per_channel = made(aten.mul.Tensor, torch.tensor([[[2.0, -0.5]]]), spikes, name="gain")
    one = made(torch.ops.ntc.decode.default, made(aten.linear.default, per_channel, torch.eye(2), None, name="left"), "rate", name="a")
    whole = made(aten.mul.Tensor, spikes, 3.0, name="three")
    two = made(torch.ops.ntc.decode.default, made(aten.linear.default, whole, torch.eye(2), None, name="right"), "rate", name="b")
    made(aten.add.Tensor, one, two, name="sum")
    given = made.done()
    index, values = emitted(given, tmp_path), trains(given)
    assert {o.value for o in index.files[0].outputs} == {"left", "right"}
    found = interpreted(tmp_path, index, values)
    for name in ("act", "left", "right"):
        np.testing.assert_array_equal(found[name], values[name])
    assert nir_execute(tmp_path, {"x": values["x"]}).keys() == {"act", "left", "right"}


def test_a_gain_per_token_stays_on_the_host(tmp_path: Path) -> None:
    made = Toy(torch.tensor([[1.0, -0.5], [0.25, 2.0]]))
    current = made(aten.linear.default, made.last, torch.tensor([[0.5, 0.25], [-0.5, 1.0]]), None, name="fc")
    spikes = made.fire(current, torch.tensor([1.0, 0.5]), torch.tensor([0.5]), 4, name="act")
    made(torch.ops.ntc.decode.default, made(aten.mul.Tensor, spikes, torch.ones(2, 1), name="gain"), "rate", name="a")
    index = emitted(made.done(), tmp_path)
    assert [n.reason for n in index.nodes if n.name == "gain"] == ["a factor per token, and NIR has no tokens"]


# ------------------------------------------------------------------------------------------------ mistakes are found


@pytest.mark.parametrize("what", ["front weight", "back weight", "bias", "threshold", "reset", "edge"])
def test_a_wrong_parameter_is_found_at_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """One number by 1 %, or the reset that goes nowhere."""
    original = nir_graph.draw

    def wrong(*args: Any) -> Any:
        drawn = original(*args)
        nodes = drawn.nodes
        if "act_reset" in nodes:
            target = {
                "front weight": lambda: nodes["fc"].weight, "back weight": lambda: nodes["proj"].weight, "bias": lambda: nodes["proj"].bias,
                "threshold": lambda: nodes["act_spikes"].threshold, "reset": lambda: nodes["act_reset"].scale,
            }.get(what)  # fmt: skip
            if target is None:
                drawn.edges.remove(("act_reset", "act_membrane"))
            else:
                array = target()
                array *= 1.01
        return drawn

    made = Toy(torch.rand(200, 8, generator=torch.Generator().manual_seed(1)))
    current = made(aten.linear.default, made.last, torch.rand(4, 8, generator=torch.Generator().manual_seed(2)), None, name="fc")
    spikes = made.fire(current, torch.full((4,), 3.0), torch.tensor([0.5]), 4, name="act")
    back = made(aten.linear.default, spikes, torch.rand(3, 4, generator=torch.Generator().manual_seed(3)), torch.ones(3), name="proj")
    made(torch.ops.ntc.decode.default, back, "rate", name="decoded")
    given = made.done()
    emitted(given, tmp_path)
    monkeypatch.setattr(nir_graph, "draw", wrong)
    with pytest.raises(BackendError, match=r"NIR file of fc .*(rounding does not explain|rounding explains)"):
        emitted(given, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["nir"]  # the one before, whole


def test_a_streaming_program_is_refused(tmp_path: Path) -> None:
    from integer_programs import block, streaming

    from ntc.artifact import save, seal
    from tests.cli.conftest import run_ntc

    made, says = streaming(block()), "export the parallel program, without to-streaming"
    program = made.with_graph(made.copy().graph, {name: tensor.clone() for name, tensor in made.tensors.items()})  # files hold no tensor twice
    program.refresh()
    with pytest.raises(BackendError, match=says):
        NirBackend().emit(program, tmp_path)
    save(program, tmp_path)
    seal(tmp_path)
    before = sorted(tmp_path.iterdir())
    ran = run_ntc("export", tmp_path, "--emit", "nir")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.splitlines()[-1] == f"error: nir cannot be written of this program: NIR has no state that goes on from token to token: {says}"
    assert sorted(tmp_path.iterdir()) == before


def test_programs_without_neurons_are_refused(tmp_path: Path) -> None:
    import ntc

    with pytest.raises(BackendError, match="holds no neurons"):
        NirBackend().emit(ntc.capture(tiny_gpt2(n_layer=1)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_rates_are_refused(tmp_path: Path) -> None:
    made = Toy(torch.tensor([[1.0, -0.5], [0.25, 2.0]]))
    rate = made(torch.ops.ntc.if_rate.default, made.last, torch.tensor([1.0]), False, name="rate")
    made(aten.linear.default, rate, torch.eye(2), None, name="fc")
    with pytest.raises(BackendError, match=r"is a firing rate: run insert-neurons first"):
        NirBackend().emit(made.done(), tmp_path)


def test_inputs_that_do_not_fit(tmp_path: Path) -> None:
    index = emitted(toy(), tmp_path)
    assert index.files[0].input.value == "x"
    with pytest.raises(DataError, match="no NIR file reads y; they read x"):
        nir_execute(tmp_path, {"y": np.zeros((1, 2, 2))})
    with pytest.raises(DataError, match="nothing to run"):
        nir_execute(tmp_path, {})
    for shape in ((2, 2), (1, 2, 3), (4, 1, 2, 2)):
        with pytest.raises(DataError, match=r"x has shape \[B, L, 2\] in fc.nir, not"):
            nir_execute(tmp_path, {"x": np.zeros(shape)})


def test_damage_is_found(tmp_path: Path) -> None:
    emitted(toy(), tmp_path)

    def damaged(name: str) -> Path:
        return Path(shutil.copytree(tmp_path / "nir", tmp_path / name / "nir")).parent

    def refused(folder: Path, says: str) -> None:
        with pytest.raises(ArtifactError, match=says):
            nir_execute(folder, {"x": np.zeros((1, 2, 2), np.float32)})

    refused(tmp_path / "nowhere", "cannot read .*index.json: No such file.*--emit nir")
    folder = damaged("gone")
    (folder / "nir" / "fc.nir").unlink()
    refused(folder, "fc.nir is missing or has changed")
    folder = damaged("changed")
    with (folder / "nir" / "fc.nir").open("ab") as file:
        file.write(b"x")
    refused(folder, "fc.nir is missing or has changed")
    for edit, says in (
        ({"steps": -1}, "index.json is damaged: steps"), ({"schema_version": "2.0"}, "schema version 2.0; this ntc reads 1.0"),
        ({"more": 1}, "damaged: more"),
    ):  # fmt: skip
        folder = damaged(f"edited_{next(iter(edit))}")
        data = json.loads((folder / "nir" / "index.json").read_text())
        (folder / "nir" / "index.json").write_text(json.dumps(data | edit))
        refused(folder, says)


def test_graphs_that_have_no_meaning_are_refused() -> None:
    import nir

    def graph(nodes: dict[str, Any], edges: list[tuple[str, str]]) -> Any:
        return nir.NIRGraph(nodes=nodes, edges=edges, type_check=False)

    one = np.ones(1)
    ends = {"input": nir.Input(np.array([1])), "output": nir.Output(np.array([1]))}
    with pytest.raises(ArtifactError, match="no integrator"):
        Machine(graph({**ends, "a": nir.Scale(one), "b": nir.Scale(one)}, [("input", "a"), ("a", "b"), ("b", "a"), ("b", "output")]))
    with pytest.raises(ArtifactError, match="nothing drives node a"):
        Machine(graph({**ends, "a": nir.I(one), "b": nir.Scale(one)}, [("a", "b"), ("b", "a"), ("b", "output")]))
    with pytest.raises(ArtifactError, match="of type CubaLI"):
        Machine(graph({**ends, "a": nir.CubaLI(one, one, one, one)}, [("input", "a"), ("a", "output")]))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"cannot write .*nir: Not a directory"):
        NirBackend().emit(toy(), tmp_path / "file")


def test_index_text_is_the_model(tmp_path: Path) -> None:
    index = emitted(toy(), tmp_path)
    assert NirIndex.model_validate_json(index.text()) == index
