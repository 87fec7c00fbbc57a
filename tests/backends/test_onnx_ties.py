"""What the check of an ONNX file takes for ties where more of them differ than usual: rounding, and nothing that is larger."""

from __future__ import annotations

import pytest
import torch
from programs import canonical

from ntc.ops import digit_neuron
from ntc.pipeline import run_pipeline
from ntc.recording import populations, record
from ntc.rounding import limits
from ntc.testing import example_ids
from ntc_backends.onnx_check import _no_ties
from ntc_passes.encode_linears import EncodeLinears
from ntc_passes.spike_products import SpikeProducts


@pytest.mark.parametrize("eps", [3e-7, 1e-4])
def test_rounding_explains_ties_and_no_more(eps: float) -> None:
    """Twelve digits of base 3 tell 531,441 values: many lie within rounding of a tie, and a ten-thousandth is fifty steps."""
    digits = {"steps": 12, "base": 3.0}
    program = run_pipeline(canonical(), [SpikeProducts.configure(digits), EncodeLinears.configure({"code": "digits", **digits})])
    one = record(program, example_ids(batch=1, length=16, seed=3), 0)
    reach = limits(program, one).membranes
    nodes = [n for n in populations(program).values() if n.target is torch.ops.ntc.digit_neuron.default]
    differing = wrong = 0
    for node in nodes:
        x, *rest = one.arguments[node.name]
        signs = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
        got = digit_neuron(x * (1 + eps * signs), *rest)
        differing += int((got != one.trains[node.name]).any(0).sum())
        wrong += _no_ties(node, one, got, reach)
    assert differing > 20
    assert (wrong == 0) == (eps < 1e-6)
