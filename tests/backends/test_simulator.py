"""The simulator gives the spikes and logits of the program: for whole sequences, and token by token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from netlist_cases import VARIANTS, cached, changed, emitted
from netlist_executor import Executor
from simulator_cases import INTEGERS, differing, double_case, integer_case, reference

import ntc
from ntc.meta import building
from ntc.program import Program
from ntc.recipe import Settings
from ntc.testing import example_ids, tiny_gpt2
from ntc_backends.simulator import Simulator

TOLERANCE = 1e-10  # as in test_netlist_execution.py: float64 sums in another order


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stepwise", [False, True])
def test_it_agrees_with_the_program(variant: str, stepwise: bool) -> None:
    case, ids = double_case(variant), example_ids(batch=2, length=11, seed=7)
    expected, simulator = reference(case.program, ids), Simulator(case.folder)
    logits = simulator.run(ids.numpy(), stepwise=stepwise, rasters=True)
    assert simulator.activity["spikes"] > 0
    assert differing(simulator, expected) == 0
    assert logits.dtype == np.float64
    assert np.abs(logits - expected.logits).max() < TOLERANCE


def test_float32_differs_by_ties_only() -> None:
    case, ids = cached("spikes", 1), example_ids(batch=2, length=24, seed=7)
    expected, simulator = reference(case.program, ids), Simulator(case.folder)
    logits = simulator.run(ids.numpy(), rasters=True)
    assert logits.dtype == np.float32
    differ = differing(simulator, expected)
    assert differ <= simulator.activity["spikes"] * 1e-3
    assert np.abs(logits - expected.logits).max() < 1e-4 or differ


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("stepwise", [False, True])
def test_integer_programs_are_identical_bit_by_bit(name: str, stepwise: bool) -> None:
    case = integer_case(name)
    ids = torch.randint(0, 13, (3, 24), generator=torch.Generator().manual_seed(1))
    expected, simulator = reference(case.program, ids), Simulator(case.folder)
    logits = simulator.run(ids.numpy(), stepwise=stepwise, rasters=True)
    activity = simulator.activity
    assert activity["grade"] == "integer"
    assert sum(0 < p["rate"] < 1 for p in activity["populations"]) >= 3
    assert differing(simulator, expected) == 0
    assert logits.dtype == np.float32
    assert np.array_equal(logits, expected.logits)
    for p in activity["populations"]:  # what was proven holds
        assert -(2 ** (p["membrane_bits"] - 1)) <= p["membrane_minimum"] <= p["membrane_maximum"] < 2 ** (p["membrane_bits"] - 1)


@pytest.mark.parametrize("output", ["current", "spikes"])
def test_a_quantized_model_is_identical_in_all_readings(output: str, tmp_path: Path) -> None:
    calibration = ntc.Calibration((example_ids(batch=4, length=20, seed=5),), "random ids", "0")
    compiled = ntc.compile(tiny_gpt2(n_layer=1), calibration=calibration, quantize=8, settings=Settings({"output": output}))
    case, ids = emitted(compiled.program, tmp_path), example_ids(batch=2, length=24, seed=9)
    expected, simulator, executor = reference(case.program, ids), Simulator(tmp_path), Executor(tmp_path)
    for stepwise in (False, True):
        assert np.array_equal(simulator.run(ids.numpy(), stepwise=stepwise, rasters=True), expected.logits)
        assert differing(simulator, expected) == 0
    assert simulator.activity["spikes"] > 0
    assert np.array_equal(executor(ids).numpy(), expected.logits)


@pytest.mark.parametrize("name", INTEGERS)
def test_the_independent_reading_agrees_on_integers(name: str) -> None:
    case = integer_case(name)
    ids = torch.randint(0, 13, (2, 24), generator=torch.Generator().manual_seed(2))
    executor = Executor(case.folder)
    logits = executor(ids)
    expected = reference(case.program, ids)
    assert all(np.array_equal(executor.events[name].numpy(), train) for name, train in expected.spikes.items())
    assert np.array_equal(logits.numpy(), expected.logits)


def test_one_token_after_the_other_with_state() -> None:
    case, ids = integer_case("leaking"), [5, 9, 2, 12, 0, 1, 7]
    simulator = Simulator(case.folder)
    whole = simulator.run(ids)
    simulator.reset()
    for i, token in enumerate(ids):
        assert np.array_equal(simulator.step(token), whole[i])
    assert simulator.activity["tokens"] == len(ids)
    assert simulator.memory["state"] > 0
    assert np.array_equal(simulator.run(ids[:3]), whole[:3])  # a run begins anew
    simulator.reset()
    assert simulator.memory["state"] == 0


@pytest.mark.parametrize("stepwise", [False, True])
def test_spikes_are_seen_and_replaced_as_they_are_fired(stepwise: bool) -> None:
    case, ids = integer_case("leaking"), torch.randint(0, 13, (2, 7), generator=torch.Generator().manual_seed(4))
    expected, simulator = reference(case.program, ids), Simulator(case.folder)
    seen: dict[str, list[np.ndarray]] = {}
    logits = simulator.run(ids.numpy(), stepwise=stepwise, spikes=lambda name, train: seen.setdefault(name, []).append(train))
    assert np.array_equal(logits, expected.logits)
    assert {name: len(parts) for name, parts in seen.items()} == dict.fromkeys(expected.spikes, 7 if stepwise else 1)
    assert all(np.array_equal(np.concatenate(seen[name], axis=2), train) for name, train in expected.spikes.items())
    last = list(expected.spikes)[-1]
    silent = simulator.run(ids.numpy(), stepwise=stepwise, spikes=lambda name, train: np.zeros_like(train) if name == last else None)
    assert not np.array_equal(silent, expected.logits)
    assert np.array_equal(simulator.run(ids.numpy(), stepwise=stepwise), expected.logits)  # and nothing is left behind


def test_softmax_attention_on_the_host_goes_on_token_by_token() -> None:
    case, ids = double_case("ffn-only"), example_ids(batch=1, length=9, seed=3)[0]
    simulator = Simulator(case.folder)
    whole = simulator.run(ids.numpy())
    simulator.reset()
    for i, token in enumerate(ids.tolist()):
        assert np.abs(simulator.step(token) - whole[i]).max() < TOLERANCE


@pytest.mark.parametrize("hard", [False, True])
def test_leaky_neurons(tmp_path: Path, hard: bool) -> None:
    def leak(program: Program) -> None:
        for node in list(program.graph.nodes):
            if node.target is torch.ops.ntc.integrate_fire.default:
                current, theta, v0, steps, _, timed, surrogate, width = node.args
                size = node.meta["val"].shape[-1]
                with building(program.graph, before=node, stands_for=[node], by="test") as call:
                    taus = torch.linspace(1.2, 3.0, size, dtype=torch.float64)
                    tau = call(program.add_tensor(f"{node.name}.tau", taus))
                    target = torch.ops.ntc.leaky_integrate_fire.default
                    new = call(target, current, theta, tau, v0, steps, hard, timed, surrogate, width, name=node.name)
                node.replace_all_uses_with(new)
                program.graph.erase_node(node)

    case = emitted(changed(double_case("spikes").program, leak), tmp_path)
    ids = example_ids(seed=8)
    expected, simulator = reference(case.program, ids), Simulator(tmp_path)
    logits = simulator.run(ids.numpy(), rasters=True)
    assert simulator.activity["spikes"] > 0
    assert differing(simulator, expected) == 0
    assert np.abs(logits - expected.logits).max() < TOLERANCE


def test_gains_on_spikes_and_currents(tmp_path: Path) -> None:
    """Graded spikes into a projection, whose current is scaled before it is decoded: nothing may be merged."""

    def unfold(program: Program) -> None:
        neuron = next(n for n in program.graph.nodes if n.name.endswith("act_spikes"))
        (linear,) = neuron.users
        with building(program.graph, before=linear, stands_for=[neuron], by="test") as call:
            gain = call(program.add_tensor("test.gain", torch.linspace(-1.0, 2.0, 128, dtype=torch.float64)))
            linear.update_arg(0, call(torch.ops.aten.mul.Tensor, neuron, gain, name="graded"))
        decode = next(iter(linear.users))
        with building(program.graph, before=decode, stands_for=[linear], by="test") as call:
            one = call(program.add_tensor("test.one", torch.full((1,), 1.5, dtype=torch.float64)))
            decode.update_arg(0, call(torch.ops.aten.mul.Tensor, linear, one, name="current_gain"))

    case = emitted(changed(double_case("spikes").program, unfold), tmp_path)
    ids = example_ids(seed=8)
    expected = reference(case.program, ids)
    for stepwise in (False, True):
        logits = Simulator(tmp_path).run(ids.numpy(), stepwise=stepwise)
        assert np.abs(logits - expected.logits).max() < TOLERANCE


# What is counted.


def test_operations_are_those_of_the_spikes() -> None:
    case, ids = double_case("spikes"), example_ids(batch=2, length=11, seed=7)
    expected = reference(case.program, ids)
    for stepwise in (False, True):
        simulator = Simulator(case.folder)
        simulator.run(ids.numpy(), stepwise=stepwise)
        found = {o["name"]: o for o in simulator.activity["operations"]}
        for p in simulator.netlist.projections:
            pre = p.inputs.pre.partition(":")[0]
            events = int((expected.spikes[pre] != 0).sum()) if p.synapse == "spikes" else 0
            assert found[p.name]["synaptic_operations"] == events * p.shape[0]
            assert found[p.name]["macs"] == (0 if p.synapse == "spikes" else 22 * p.synapses)
        (product,) = simulator.netlist.dynamic_products
        q, k, v = (expected.spikes[getattr(product.inputs, n).partition(":")[0]] != 0 for n in ("query", "key", "value"))
        split = [x.reshape(*x.shape[:3], 4, 8).sum(-1) for x in (k, v)]
        assert found[product.name]["synaptic_operations"] == int((split[0] * split[1]).sum()) + int(q.sum()) * 8
        populations = {p["name"]: p for p in simulator.activity["populations"]}
        for name, train in expected.spikes.items():
            assert populations[name]["spikes"] == int((train != 0).sum())
            assert populations[name]["rate"] == pytest.approx(float((train != 0).mean()))


def test_membranes_are_those_of_the_equations() -> None:
    case, ids = double_case("spikes"), example_ids(batch=1, length=5, seed=7)
    simulator = Simulator(case.folder)
    simulator.run(ids.numpy())
    name = "h_0_mlp_act_spikes"
    node = next(n for n in case.program.graph.nodes if n.name == name)
    seen: dict[str, torch.Tensor] = {}
    from ntc.program import interpret

    interpret(case.program, ids, lambda n, args, value: seen.setdefault(n.name, value))
    x = seen[node.args[0].name].detach()
    v, lows, highs = torch.full_like(x, 0.5), [], []
    for _ in range(4):
        u = v + x
        lows.append(float(u.min()))
        highs.append(float(u.max()))
        v = u - (u >= 1).double()
    found = next(p for p in simulator.activity["populations"] if p["name"] == name)
    assert found["membrane_minimum"] == pytest.approx(min(lows))
    assert found["membrane_maximum"] == pytest.approx(max(highs))


# What is refused.


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([], "at least one"), ([61], "run from 0 to 60, and 61 is none"), ([-1], "and -1 is none"), ([1.5], "are integers"),
        ([[1, 2], [3]], "one list, or lists of one length"), ([0] * 25, "context of 24 tokens, and 25 are given"), ("abc", "are integers"),
    ],
)  # fmt: skip
def test_ids_that_are_none(ids: object, says: str) -> None:
    with pytest.raises(ntc.DataError, match=says):
        Simulator(cached("spikes", 1).folder).run(ids)


def test_a_sequence_ends_where_the_context_does() -> None:
    simulator = Simulator(integer_case("plain").folder)
    for _ in range(24):
        simulator.step(1)
    with pytest.raises(ntc.DataError, match="context of 24 tokens, and 25"):
        simulator.step(1)


def test_an_unknown_host_op_is_refused_by_name(tmp_path: Path) -> None:
    folder = cached("spikes", 1).edited(tmp_path, lambda d: d["host"][0]["ops"][-1].update(op="aten.mystery.default"))
    with pytest.raises(ntc.BackendError, match=r"does not know aten.mystery.default, which \w+ of host_0 is"):
        Simulator(folder)


def test_a_host_op_that_fails_is_named(tmp_path: Path) -> None:
    def wrong(d: dict) -> None:
        next(op for op in d["host"][0]["ops"] if "layer_norm" in op["op"])["arguments"]["normalized_shape"] = [7, 7, 7, 7]

    folder = cached("spikes", 1).edited(tmp_path, wrong)
    with pytest.raises(ntc.BackendError, match=r"of host_0 \(aten.layer_norm.default\) cannot be computed"):
        Simulator(folder).run([1, 2])
