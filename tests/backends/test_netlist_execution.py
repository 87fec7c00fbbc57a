"""The netlist says everything: an executor that knows only its files gives the spikes and logits of the program."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from netlist_cases import VARIANTS, Case, agreement, cached, changed, doubled, element, emitted

from ntc.meta import building
from ntc.program import Program
from ntc.testing import example_ids
from ntc_backends.netlist import load_netlist

TOLERANCE = 1e-10  # float64 sums of at most 128 terms in another order, logits up to about 10: some hundred ulps of 2e-15


@pytest.fixture(scope="module", params=VARIANTS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return emitted(doubled(cached(request.param).program), tmp_path_factory.mktemp("double"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return emitted(doubled(cached("spikes", 1).program), tmp_path_factory.mktemp("double"))


@pytest.mark.parametrize(("batch", "length"), [(2, 9), (1, 1), (3, 24)])
def test_executor_agrees_with_the_program(case: Case, batch: int, length: int) -> None:
    error, differ, fired = agreement(case.program, case.folder, example_ids(batch=batch, length=length, seed=7))
    assert fired > 0
    assert differ == 0
    assert error < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_differs_by_ties_only(variant: str) -> None:
    single = cached(variant)
    error, differ, fired = agreement(single.program, single.folder, example_ids(batch=3, length=24, seed=7))
    assert differ <= fired * 1e-3  # a membrane within rounding of its threshold; seldom one, and mostly none
    assert error < 1e-4 or differ


@pytest.mark.parametrize("hard", [False, True])
def test_lif_neurons(tiny: Case, tmp_path: Path, hard: bool) -> None:
    def leak(program: Program) -> None:
        for node in list(program.graph.nodes):
            if node.target is torch.ops.ntc.integrate_fire.default:
                current, theta, v0, steps, _, timed, surrogate, width = node.args
                with building(program.graph, before=node, stands_for=[node], by="test") as call:
                    target = torch.ops.ntc.leaky_integrate_fire.default
                    tau = call(program.add_tensor(f"{node.name}.tau", torch.full((1,), 1.5, dtype=torch.float64)))
                    new = call(target, current, theta, tau, v0, steps, hard, timed, surrogate, width, name=node.name)
                node.replace_all_uses_with(new)
                program.graph.erase_node(node)

    leaky = emitted(changed(tiny.program, leak), tmp_path)
    assert {(p["model"], p["tau"], p["reset"]) for p in leaky.json["populations"]} == {("lif", 1.5, "hard" if hard else "soft")}
    assert leaky.json["conventions"]["reset"] == ("hard" if hard else "soft")
    error, differ, fired = agreement(leaky.program, tmp_path, example_ids(seed=8))
    assert fired > 0
    assert differ == 0
    assert error < TOLERANCE


def test_grouped_heads(tiny: Case, tmp_path: Path) -> None:
    """Keys and values with half as many heads as queries."""

    def group(program: Program) -> None:
        product = next(n for n in program.graph.nodes if n.target is torch.ops.ntc.spiking_attention.default)
        for neuron in product.args[1:3]:
            linear = neuron.args[0]
            for node, at in ((linear, 1), (linear, 2), (neuron, 1), (neuron, 2)):
                half = program.tensor(node.args[at]).detach()[:16]
                with building(program.graph, before=linear, stands_for=[linear], by="test") as call:
                    node.update_arg(at, call(program.add_tensor(f"half_{node.name}_{at}", half)))
        product.update_arg(4, 2)

    grouped = emitted(changed(tiny.program, group), tmp_path)
    (product,) = grouped.json["dynamic_products"]
    assert (product["heads"], product["kv_heads"], product["state_shape"]) == (4, 2, [4, 2, 8, 8])
    error, differ, fired = agreement(grouped.program, tmp_path, example_ids(seed=8))
    assert fired > 0
    assert differ == 0
    assert error < TOLERANCE
    load_netlist(tmp_path)


def test_potentials_and_time_constants_of_each_neuron(tiny: Case, tmp_path: Path) -> None:
    def spread(program: Program) -> None:
        for node in [n for n in program.graph.nodes if n.target is torch.ops.ntc.integrate_fire.default]:
            current, theta, v0, steps, signed, timed, surrogate, width = node.args
            size = node.meta["val"].shape[-1]
            with building(program.graph, before=node, stands_for=[node], by="test") as call:
                start = call(program.add_tensor(str(v0.target), torch.linspace(0.1, 0.9, size, dtype=torch.float64)))
                if signed:
                    node.update_arg(2, start)
                    continue
                tau = call(program.add_tensor(f"{node.name}.tau", torch.linspace(1.0, 2.0, size, dtype=torch.float64)))
                target = torch.ops.ntc.leaky_integrate_fire.default
                new = call(target, current, theta, tau, start, steps, False, timed, surrogate, width, name=node.name)
            node.replace_all_uses_with(new)
            program.graph.erase_node(node)

    spread_out = emitted(changed(tiny.program, spread), tmp_path)
    assert spread_out.program.tensor("transformer.h.0.attn.q.v0").unique().numel() > 1  # took the name of the one it replaced
    queries = element(spread_out.json, "populations", name="h_0_attn_attention_q_spikes")
    assert queries["v0"] == {"tensor": "transformer.h.0.attn.q.v0"}
    error, differ, fired = agreement(spread_out.program, tmp_path, example_ids(seed=8))
    assert fired > 0
    assert differ == 0
    assert error < TOLERANCE
    load_netlist(tmp_path)


@pytest.mark.parametrize("size", [1, 4, 32])
def test_attention_that_forgets(tiny: Case, tmp_path: Path, size: int) -> None:
    """One leak for all, one per key head, one per key channel."""

    def forget(program: Program) -> None:
        product = next(n for n in program.graph.nodes if n.target is torch.ops.ntc.spiking_attention.default)
        leak = torch.linspace(0.3, 0.9, size, dtype=torch.float64)
        with building(program.graph, before=product, stands_for=[product], by="test") as call:
            product.args = (*product.args[:5], call(program.add_tensor("test.leak", leak)))

    leaky = emitted(changed(tiny.program, forget), tmp_path)
    (product,) = leaky.json["dynamic_products"]
    assert product["rule"] == "M = leak M + outer(K, V); Y = Q M"
    assert product["leak"] == (pytest.approx(0.3) if size == 1 else {"tensor": "test.leak"})
    assert product["max_state"] == (2 if size == 1 else 10)  # 1 / (1 - largest leak), 24 tokens of context: 1.43 and 9.2
    error, differ, fired = agreement(leaky.program, tmp_path, example_ids(batch=2, length=24, seed=8))
    assert fired > 0
    assert differ == 0
    assert error < TOLERANCE
    load_netlist(tmp_path)


def test_thresholds_and_scales_that_are_not_folded(tiny: Case, tmp_path: Path) -> None:
    """One threshold per neuron, a factor per channel and one for all on spikes, one on a current."""

    def unfold(program: Program) -> None:
        neuron = next(n for n in program.graph.nodes if n.name.endswith("act_spikes"))
        (linear,) = neuron.users
        with building(program.graph, before=neuron, stands_for=[neuron], by="test") as call:
            neuron.update_arg(1, call(program.add_tensor("test.threshold", torch.linspace(0.5, 2.0, 128))))
        with building(program.graph, before=linear, stands_for=[neuron], by="test") as call:
            per_channel = call(program.add_tensor("test.gain", torch.linspace(-1.0, 2.0, 128)))
            graded = call(torch.ops.aten.mul.Tensor, per_channel, neuron, name="graded")
            one = call(program.add_tensor("test.one", torch.full((1,), 1.5)))
            linear.update_arg(0, call(torch.ops.aten.mul.Tensor, graded, one, name="more"))
        decode = next(iter(linear.users))
        with building(program.graph, before=decode, stands_for=[linear], by="test") as call:
            decode.update_arg(0, call(torch.ops.aten.mul.Tensor, linear, one, name="current_gain"))

    scaled = emitted(changed(tiny.program, unfold), tmp_path)
    factors = {e["name"]: e["factor"] for e in scaled.json["scales"]}
    assert factors.pop("h_0_attn_attention_scaled") is None
    assert factors == {"graded": {"tensor": "test.gain"}, "more": 1.5, "current_gain": 1.5}
    assert element(scaled.json, "populations", role="ffn")["threshold"] == {"tensor": "test.threshold"}
    assert element(scaled.json, "scales", name="more")["outputs"]["train"]["levels"] == "graded"
    error, differ, fired = agreement(scaled.program, tmp_path, example_ids(seed=8))
    assert fired > 0
    assert differ == 0
    assert error < TOLERANCE
    load_netlist(tmp_path)
