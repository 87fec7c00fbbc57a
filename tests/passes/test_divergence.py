"""Measured divergences: nothing where numbers are exact, the program's own where all sites code, the closed form behind the last layer; and
steps that were predicted wrongly are corrected by them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from test_mixed_steps import IDS, TEXT, coded, divergence, source
from torch import Tensor
from torch.fx import Node

from ntc.ops import digit_neuron
from ntc.ops.digit_neuron import spread
from ntc.ops.spike_linear import weighted
from ntc.pipeline import Calibration, run_pipeline
from ntc.program import Program, interpret
from ntc_passes import mixed_steps
from ntc_passes.divergence import divergences
from ntc_passes.mixed_steps import MixedSteps

CALIBRATION = Calibration((IDS,), "some", "")


def sites_of(program: Program) -> list[Node]:
    return list(program.graph.find_nodes(op="call_function", target=torch.ops.ntc.digit_neuron.default))


def measured(program: Program, **groups: Any) -> dict[str, float]:
    return divergences(program, sites_of(program), groups, CALIBRATION, 32, TEXT.progress)


@pytest.mark.parametrize("scale", ["token", "static"])
def test_exact_numbers_lose_nothing_and_all_sites_what_the_program_loses(scale: str) -> None:
    """Linear layers alone are coded here: the exact numbers of all sites are the network as it was."""
    program = coded("llama", scale)
    own = {}
    for site in sites_of(program):
        w, theta = (program.tensor(a) for a in site.args[2:4])
        own[site] = lambda n, w=w, theta=theta: weighted(digit_neuron(n, torch.ones(1), w, theta), w)
    found = measured(program, same=dict.fromkeys(own, torch.clone), own=own)
    assert found["same"] == 0.0
    assert found["own"] == pytest.approx(divergence(source("llama"), program), rel=1e-2)
    assert found["own"] > 1e-5


def test_errors_in_front_of_the_last_layer_have_a_closed_form() -> None:
    """logits = W d (n + e): KL = 1/2 e^T d W^T (diag p - p p^T) W d e for small e."""
    program = coded("gpt2", "static")
    last = list(program.graph.find_nodes(op="call_function", target=torch.ops.ntc.spike_linear.default))[-1]
    off = torch.randn(last.args[0].meta["val"].shape[-1], generator=torch.Generator().manual_seed(1))
    found = measured(program, last={last.args[0]: off.mul(0.5).add})["last"]

    numbers: dict[Node, Tensor] = {}

    def exact(node: Node, args: tuple[Any, ...], value: Any) -> Tensor | None:
        if node.target is not torch.ops.ntc.digit_neuron.default:
            return None
        numbers[node] = args[0] / spread(args[1], args[0])
        return torch.cat([torch.zeros_like(value[1:]), numbers[node].unsqueeze(0)])

    with torch.no_grad():
        p = interpret(program, IDS, exact).double().softmax(-1).flatten(0, 1)
    moved = program.tensor(last.args[2]).detach().double() @ (0.5 * off).double()
    exact_loss = ((p @ moved.square()) - (p @ moved).square()).mean() / 2
    assert found == pytest.approx(float(exact_loss), rel=0.02)


def test_a_kind_that_was_predicted_wrongly_is_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries whose sensitivity comes out ten times too small get the steps that they have otherwise."""
    program, options = coded("llama", "token", True), {"events": 0, "change": 0.01, "rounds": 2}
    queries = {n.name for n in sites_of(program) if n.name.endswith("_q_spikes")}
    assert queries
    right = run_pipeline(program, [MixedSteps.configure(options)], TEXT)
    honest = mixed_steps.sensitivities

    def wrong(*args: Any) -> Any:
        found = honest(*args)
        return {n: dataclasses.replace(s, fisher=s.fisher * 0.1) if n.name in queries else s for n, s in found.items()}

    monkeypatch.setattr(mixed_steps, "sensitivities", wrong)
    believed, mended = (run_pipeline(program, [MixedSteps.configure(options | {"rounds": n})], TEXT) for n in (0, 2))

    def step(done: Program) -> float:
        return sum(done.find(name).args[1].args[1] for name in queries)

    assert step(believed) > 2 * step(right)
    assert step(mended) == pytest.approx(step(right), rel=0.15)
    notes = [p.history[-1].notes["corrections"] for p in (right, mended)]
    (kind,) = (k for k in notes[0] if k.endswith("operand 0"))
    assert kind == "model.layers.*.self_attn, operand 0"
    assert notes[1][kind] == pytest.approx(10 * notes[0][kind], rel=0.3)
