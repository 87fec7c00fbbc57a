"""Verify: complete metadata, types that fit, the dialect of each fact; messages name node, module and line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from programs import canonical, rates, spiking

import ntc
from ntc.errors import VerifyError
from ntc.meta import TYPE, building
from ntc.ops import aten
from ntc.program import Program
from ntc.spike_type import ANALOG, INDEX, CurrentType, RateType, SpikeType
from ntc.testing import tiny_gpt2
from ntc.verify import FORBIDDEN, infer_type, max_difference, verify


def broken(program: Program, act: Callable[[Program], None], refresh: bool = True) -> Program:
    work = program.copy()
    act(work)
    if refresh:
        work.refresh()
    return work


def test_types_are_written() -> None:
    program = spiking(n_layer=1)
    types = program.find("input_ids").meta[TYPE], program.find("wte").meta[TYPE], program.find("h_0_attn_attention_q_spikes").meta[TYPE]
    assert types == (INDEX, ANALOG, SpikeType(4))
    assert program.find("h_0_attn_attention_ssa").meta[TYPE] == CurrentType(4)
    assert rates(n_layer=1).find("h_0_attn_attention_v_rate").meta[TYPE] == RateType(signed=True)


def test_a_train_into_a_host_op_is_refused_with_both_nodes() -> None:
    def act(work: Program) -> None:
        decoded = work.find("h_0_mlp_c_proj_decoded")
        decoded.replace_all_uses_with(decoded.args[0])

    message = r"add.* takes analog values, and %h_0_mlp_c_proj is current T=4 rate; decode it first: at node %h_0_add_1 .*; the argument is node %h_0_mlp_c_proj \("
    with pytest.raises(VerifyError, match=message):
        verify(broken(spiking(n_layer=1), act))


def test_the_wrong_code_is_refused() -> None:
    def act(work: Program) -> None:
        work.find("h_0_mlp_c_proj_decoded").update_arg(1, "count")

    with pytest.raises(VerifyError, match="decode reads the count code, and %h_0_mlp_c_proj is current T=4 rate"):
        verify(broken(spiking(n_layer=1), act))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_threshold_that_is_not_positive_is_refused(value: float) -> None:
    def act(work: Program) -> None:
        neuron = work.find("h_0_mlp_act_spikes")
        theta = work.tensor(neuron.args[1]).detach().clone()
        theta[5] = value
        with building(work.graph, before=neuron, stands_for=[neuron], by="test") as call:
            neuron.update_arg(1, call(work.add_tensor("theta", theta)))

    with pytest.raises(VerifyError, match=r"a neuron needs thresholds > 0, .*node %h_0_mlp_act_spikes \(transformer.h.0.mlp.act"):
        verify(broken(spiking(n_layer=1), act))


def test_missing_provenance_shape_or_output_are_refused() -> None:
    def no_origin(work: Program) -> None:
        del work.find("ln_f").meta["ntc.origin"]

    def no_shape(work: Program) -> None:
        del work.find("ln_f").meta["val"]

    def index_output(work: Program) -> None:
        next(n for n in work.graph.nodes if n.op == "output").args = (work.find("input_ids"),)

    for act, message in (
        (no_origin, r"node %ln_f \(transformer.ln_f, .*\) does not say where it comes from"),
        (no_shape, r"node %ln_f .* has no shape; call program.refresh\(\)"),
        (index_output, "a program returns analog logits, and .*input_ids.* is index"),
    ):
        with pytest.raises(VerifyError, match=message):
            verify(broken(canonical(n_layer=1), act, refresh=False))


def test_a_malformed_graph_is_refused() -> None:
    def late(work: Program) -> None:
        work.find("ln_f").append(work.find("wte"))

    with pytest.raises(VerifyError, match=r"the graph is malformed: .*wte"):
        verify(broken(canonical(n_layer=1), late, refresh=False))


def test_a_fact_forbids_ops() -> None:
    captured = ntc.capture(tiny_gpt2(n_layer=1)).copy()
    captured.facts |= {"canonical"}
    with pytest.raises(VerifyError, match=r"a canonical program holds no aten\._assert_tensor_metadata\.default \(it only checks\): node %\w+ \(transformer"):
        verify(captured)
    floating = rates(n_layer=1).copy()
    verify(floating)
    floating.facts |= {"spiking"}
    with pytest.raises(VerifyError, match=r"a spiking program holds no ntc.if_rate.*insert-neurons"):
        verify(floating)
    assert set(FORBIDDEN) == {"canonical", "spiking"}


def test_an_unknown_op_is_an_analog_op_of_the_host() -> None:
    def act(work: Program) -> None:
        node = work.find("ln_f")
        with building(work.graph, before=node.next, stands_for=[node], by="test") as call:
            new = call(aten.cumprod.default, node, 1)
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    work = broken(canonical(n_layer=1), act)
    verify(work)
    assert infer_type(next(n for n in work.graph.nodes if n.target is aten.cumprod.default)) == ANALOG


def test_largest_difference() -> None:
    program = canonical(n_layer=1)
    assert max_difference(program, program) == (0.0, float(program(program.example).abs().max()))
    drift, largest = max_difference(program, spiking(n_layer=1))
    with torch.no_grad():
        assert drift == float((program(program.example) - spiking(n_layer=1)(program.example)).abs().max())
    assert largest > 0
