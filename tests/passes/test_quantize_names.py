"""Names that quantize gives to the tensors of neurons."""

from __future__ import annotations

import torch
from programs import CONTEXT, spiking

from ntc.meta import building
from ntc.pipeline import run_pipeline
from ntc_passes.quantize import Quantize


def test_thresholds_may_be_called_anything() -> None:
    """A program of a stranger's: a parameter on its own, two of one module, one that only sounds like it."""
    program = spiking(n_layer=1).copy()
    names = ("theta", "neurons.threshold_1", "neurons.threshold_2", "start", "deep.inside.gate")
    fired = [n for n in program.graph.nodes if n.target is torch.ops.ntc.integrate_fire.default]
    for node, name in zip(fired, names, strict=True):
        old = node.args[1]
        with building(program.graph, before=node, stands_for=[old], by="test") as call:
            node.update_arg(1, call(program.add_tensor(name, program.tensor(old).detach().clone())))
    program.refresh()
    after = run_pipeline(program, [Quantize()], CONTEXT)
    made = [[str(a.target) for a in n.args[1:3]] for n in after.graph.nodes if n.target is torch.ops.ntc.integer_fire.default]
    assert made == [
        ["theta", "theta_start"], ["neurons.threshold_1", "neurons.start_1"], ["neurons.threshold_2", "neurons.start_2"],
        ["start", "start_start"], ["deep.inside.gate", "deep.inside.gate_start"],
    ]  # fmt: skip
    plain = run_pipeline(spiking(n_layer=1), [Quantize()], CONTEXT)
    assert torch.equal(after(after.example), plain(plain.example))
    made = [[str(a.target) for a in n.args[1:3]] for n in plain.graph.nodes if n.target is torch.ops.ntc.integer_fire.default]
    assert all(start == theta.removesuffix("threshold") + "start" for theta, start in made)
