"""mixed-steps: the budget holds on the text that it was chosen on, ranges stay, the predicted loss is the measured one, and no uniform
choice of as many events is predicted to be better."""

from __future__ import annotations

import math

import pytest
import torch
from family_cases import analog
from programs import CONTEXT, canonical

from ntc.energy import measure_energy
from ntc.errors import ConfigError, PassError
from ntc.pipeline import Calibration, Context, run_pipeline
from ntc.program import Program
from ntc.testing import example_ids
from ntc.text import Tokens
from ntc_passes.encode_linears import EncodeLinears
from ntc_passes.mixed_steps import MixedSteps, _site, _totals, _widest
from ntc_passes.sensitivity import sensitivities
from ntc_passes.spike_products import SpikeProducts

IDS = example_ids(batch=2, length=16, seed=3)
TEXT = Context(Calibration((IDS,), "some", ""))


def source(name: str) -> Program:
    return canonical() if name == "gpt2" else analog(name)


def coded(name: str, scale: str = "token", attention: bool = False) -> Program:
    digits = {"steps": 8, "base": 2.0, "scale": scale, "price": 0.5}
    passes = [EncodeLinears.configure({"code": "digits", **digits})]
    return run_pipeline(source(name), [SpikeProducts.configure(digits), *passes] if attention else passes, TEXT)


def mixed(name: str, scale: str = "token", attention: bool = False, **options: object) -> Program:
    return run_pipeline(coded(name, scale, attention), [MixedSteps.configure(options)], TEXT)


def divergence(program: Program, other: Program) -> float:
    with torch.no_grad():
        p, q = program(IDS).log_softmax(-1), other(IDS).log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(("name", "scale"), [("llama", "token"), ("gpt2", "static"), ("gpt2", "channel")])
def test_the_budget_is_what_is_fired(name: str, scale: str) -> None:
    """The sites see these very tokens: what was predicted in front of the first layer is what happens, behind it nearly."""
    after = mixed(name, scale, events=1.5)
    notes = after.history[-1].notes
    assert 1.45 < notes["events_per_value"] <= 1.5
    total = measure_energy(after, source(name), Tokens(IDS, "some", "")).snn.total()
    assert total.spikes / total.neurons == pytest.approx(notes["events_per_value"], rel=0.05)
    for node in after.graph.find_nodes(op="call_function", target=torch.ops.ntc.digit_neuron.default):
        assert node.meta["val"].shape[0] == notes["steps"][node.name]


@pytest.mark.parametrize(("name", "scale", "attention"), [("llama", "static", True), ("llama", "token", True), ("gpt2", "channel", True)])
def test_the_predicted_change_is_the_measured_one(name: str, scale: str, attention: bool) -> None:
    """At small losses the divergence is quadratic, and what was predicted; numerators, which are no sites, have fine digits here."""
    before = source(name)
    fine = divergence(before, coded(name, scale, attention))
    after = mixed(name, scale, attention, events=0, change=0.01)
    predicted = after.history[-1].notes["predicted_change"]
    assert 0.0095 < predicted <= 0.01
    assert fine < 0.2 * math.log1p(predicted)
    assert divergence(before, after) == pytest.approx(math.log1p(predicted), rel=0.4)


@pytest.mark.parametrize("scale", ["token", "static"])
def test_ranges_stay(scale: str) -> None:
    """No fewer steps would reach as far as the range, and these do."""
    before, after = coded("llama", scale, True), mixed("llama", scale, True, events=1.2)
    for node in before.graph.find_nodes(op="call_function", target=torch.ops.ntc.digit_neuron.default):
        twin, most, d = after.find(node.name), [], []
        for program, one in ((before, node), (after, twin)):
            most.append(float(program.tensor(one.args[2]).sum()))
            d.append(one.args[1].args[1] if scale == "token" else float(program.tensor(one.args[1]).detach()))
        assert (most[1] + 0.5) * d[1] >= most[0] * d[0] * (1 - 1e-6)
        if not node.name.endswith(("_q_spikes", "_k_spikes", "_v_spikes")):  # which have the most steps of three
            grown = 1.0 if scale == "token" else 1.1  # the text may have more than the rows whose range it was
            assert ((most[1] - 1) / 2 + 0.5) * d[1] < most[0] * d[0] * grown


@pytest.mark.parametrize("scale", ["token", "static", "channel"])
def test_queries_keys_and_values_have_their_steps_in_common(scale: str) -> None:
    after = mixed("llama", scale, True, events=1.5)
    steps = after.history[-1].notes["steps"]
    attentions = list(after.graph.find_nodes(op="call_function", target=torch.ops.ntc.coded_attention.default))
    assert attentions
    for node in attentions:
        assert len({steps[train.name] for train in node.args[:3]}) == 1
        assert {train.args[2].target for train in node.args[:3]} == {node.args[6].target}
        assert [train.args[1] for train in node.args[:3]] == [*node.args[3:6]]


def test_more_events_are_less_error() -> None:
    off = [divergence(analog("llama"), mixed("llama", "static", events=e)) for e in (1.0, 1.5, 2.0)]
    assert off[0] > 2 * off[1] > 4 * off[2]


def test_no_uniform_choice_is_predicted_to_be_better() -> None:
    """Against the same factor of all steps, with as many events; the prediction itself is tested above."""
    program = coded("llama", "static", True)
    nodes = list(program.graph.find_nodes(op="call_function", target=torch.ops.ntc.digit_neuron.default))
    assert TEXT.calibration is not None
    known = sensitivities(program, nodes, TEXT.calibration, 32, 32, TEXT.progress)
    sites = [_site(program, n, known[n]) for n in nodes]
    for events in (1.0, 1.4, 1.8):
        ours = _totals(sites, _widest(sites, MixedSteps.configure({"events": events}).options, 24, TEXT.progress), 24)
        low, high = -5.0, 12.0
        for _ in range(30):
            k = torch.tensor([2.0 ** ((low + high) / 2)])
            fired = [s.fires(k, 24) for s in sites]
            mean = sum(e * s.values for (e, _), s in zip(fired, sites, strict=True)) / sum(s.values for s in sites)
            low, high = ((low + high) / 2, high) if mean > ours[0] else (low, (low + high) / 2)
        assert math.log1p(ours[1]) < 0.9 * sum(loss for _, loss in fired)


def test_sensitivity_of_the_last_layer_has_a_closed_form() -> None:
    """logits = W x: F = sum_c d^2 (W^T (diag p - p p^T) W)_cc, here with the labels that were drawn in its place, on enough tokens."""
    program = coded("llama", "static")
    last = list(program.graph.find_nodes(op="call_function", target=torch.ops.ntc.spike_linear.default))[-1]
    text = Calibration((example_ids(batch=64, length=16, seed=5),), "some", "")
    found = sensitivities(program, [last.args[0]], text, 1024, 8, TEXT.progress)[last.args[0]]
    matrix = program.tensor(last.args[2]).detach().double()
    with torch.no_grad():
        p = program(text.batches[0]).double().softmax(-1).flatten(0, 1)
    exact = p @ matrix.square() - (p @ matrix).square()
    assert float(found.fisher.sum()) == pytest.approx(float(exact.mean(0).sum()), rel=0.05)
    torch.testing.assert_close(found.fisher, exact.mean(0), rtol=0.25, atol=0)
    assert found.sample.shape == (64, 32) and (found.sample.abs() <= found.largest).all()  # a row of each window, at least
    assert found.largest.max() > 200  # of the 255 of eight digits of base 2


def test_bad_settings_and_nothing_to_do() -> None:
    for options, said in (
        ({"events": -1}, "events must be a number of at least 0"), ({"events": 0}, "one budget is given, events or change"),
        ({"change": 0.1}, "one budget is given, events or change"), ({"most": 0}, "most must be a whole number of at least 1"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            MixedSteps.configure(options)
    phase = run_pipeline(analog("llama"), [EncodeLinears()], CONTEXT)
    with pytest.raises(PassError, match="mixed-steps found none of its sites"):
        run_pipeline(phase, [MixedSteps()], CONTEXT)
    digits = run_pipeline(analog("llama"), [EncodeLinears.configure({"code": "digits"})])
    with pytest.raises(PassError, match="mixed-steps measures on calibration text"):
        run_pipeline(digits, [MixedSteps()])
    with pytest.raises(PassError, match=r"a budget of 1e-07 % and is predicted to lose .* raise change or most"):
        mixed("llama", "static", events=0, change=1e-9, most=3)
