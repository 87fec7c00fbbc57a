"""mixed-steps: the budget holds on the text that it was chosen on, ranges stay, and the choice is the best that the sites allow."""

from __future__ import annotations

from itertools import product

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
from ntc_passes.digits import Digits
from ntc_passes.encode_linears import EncodeLinears
from ntc_passes.mixed_steps import MixedSteps, _mean, _Site, _within

IDS = example_ids(batch=2, length=16, seed=3)
TEXT = Context(Calibration((IDS,), "some", ""))


def mixed(name: str, events: float, scale: str = "token", **options: object) -> Program:
    source = canonical() if name == "gpt2" else analog(name)
    digits = EncodeLinears.configure({"code": "digits", "steps": 6, "base": 2.0, "scale": scale})
    return run_pipeline(source, [digits, MixedSteps.configure({"events": events, **options})], TEXT)


@pytest.mark.parametrize(("name", "scale"), [("llama", "token"), ("gpt2", "static"), ("gpt2", "channel")])
def test_the_budget_is_what_is_fired(name: str, scale: str) -> None:
    """The sites see these very tokens: what was predicted in front of the first layer is what happens, behind it nearly."""
    after = mixed(name, 1.5, scale)
    notes = after.history[-1].notes
    assert 1.3 < notes["events_per_value"] <= 1.5
    source = canonical() if name == "gpt2" else analog(name)
    report = measure_energy(after, source, Tokens(IDS, "some", ""))
    total = report.snn.total()
    assert total.spikes / total.neurons == pytest.approx(notes["events_per_value"], rel=0.05)
    for node in after.graph.find_nodes(op="call_function", target=torch.ops.ntc.digit_neuron.default):
        assert node.meta["val"].shape[0] == notes["steps"][node.name]


@pytest.mark.parametrize("scale", ["token", "static"])
def test_ranges_stay(scale: str) -> None:
    before = run_pipeline(analog("llama"), [EncodeLinears.configure({"code": "digits", "steps": 6, "base": 2.0, "scale": scale})], TEXT)
    after = mixed("llama", 1.2, scale)
    changed = 0
    for node in before.graph.find_nodes(op="call_function", target=torch.ops.ntc.digit_neuron.default):
        twin = after.find(node.name)
        tops = []
        for program, one in ((before, node), (after, twin)):
            most = float(program.tensor(one.args[2]).sum())
            tops.append(one.args[1].args[1] * most if scale == "token" else float(program.tensor(one.args[1])) * most)
        assert tops[0] == pytest.approx(tops[1], rel=1e-6)
        changed += node.meta["val"].shape[0] != twin.meta["val"].shape[0]
    assert changed


def test_more_events_are_less_error() -> None:
    with torch.no_grad():
        expected = analog("llama")(IDS)
        off = [float((mixed("llama", e)(IDS) - expected).norm()) for e in (1.2, 1.6, 2.0)]
    assert off[0] > off[1] > off[2]


def site(errors: tuple[float, ...], events: tuple[float, ...], values: int) -> _Site:
    return _Site(None, (), tuple(Digits(2.0, t + 1) for t in range(len(errors))), errors, events, values)  # type: ignore[arg-type]


def test_the_choice_against_all_choices() -> None:
    """Convex sites: what the price finds has the least error of all choices that fire no more than it."""
    sites = [
        site((8.0, 4.0, 2.0, 1.0), (0.5, 1.0, 1.5, 2.0), 10), site((3.0, 1.0, 0.3, 0.1), (0.4, 0.9, 1.3, 1.8), 30),
        site((20.0, 9.0, 4.0, 2.0), (0.3, 0.8, 1.4, 2.0), 5),
    ]  # fmt: skip
    for budget in (0.6, 0.9, 1.2, 1.6, 3.0):
        chosen = _within(sites, budget)
        mine = sum(s.errors[i] for s, i in zip(sites, chosen, strict=True))
        assert _mean(sites, chosen) <= budget
        others = [c for c in product(range(4), repeat=3) if _mean(sites, c) <= _mean(sites, chosen) + 1e-12]
        assert mine == min(sum(s.errors[i] for s, i in zip(sites, c, strict=True)) for c in others)
    with pytest.raises(PassError, match=r"a budget of 0\.1 events per value, and the fewest steps fire 0\.4"):
        _within(sites, 0.1)


def test_bad_settings_and_nothing_to_do() -> None:
    for options, said in (({"events": 0}, "events must be a positive number"), ({"fewest": 5, "most": 4}, "must not be above most, got 5 and 4")):
        with pytest.raises(ConfigError, match=said):
            MixedSteps.configure(options)
    phase = run_pipeline(analog("llama"), [EncodeLinears()], CONTEXT)
    with pytest.raises(PassError, match="mixed-steps found none of its sites"):
        run_pipeline(phase, [MixedSteps()], CONTEXT)
    digits = run_pipeline(analog("llama"), [EncodeLinears.configure({"code": "digits"})])
    with pytest.raises(PassError, match="mixed-steps measures on calibration text"):
        run_pipeline(digits, [MixedSteps()])
