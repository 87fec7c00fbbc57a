"""The recipes that code operands, end to end on small networks: compiled, saved, loaded, in ONNX Runtime, counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from family_cases import analog, model
from programs import CALIBRATION, CONTEXT, tiny_gpt2

import ntc
from ntc.energy import measure_energy
from ntc.pipeline import run_pipeline
from ntc.quality import evaluate
from ntc.testing import example_ids
from ntc.text import Tokens
from ntc_backends.onnx_check import _unequal
from ntc_passes.encode_linears import EncodeLinears

TOKENS = Tokens(example_ids(batch=2, length=12, seed=3), "drawn", "")

# Cosine of the logits with the original's: these networks are random, so each recipe is held to what its steps say and to no more.
LEAST = {"lossless": 0.999, "lossless-sparse": 0.97, "phase": 0.99999, "las": 0.99, "sdllm": 0.9}


@pytest.mark.parametrize("network", ["llama", "gpt2"])
@pytest.mark.parametrize("name", sorted(LEAST))
def test_end_to_end(name: str, network: str, tmp_path: Path) -> None:
    source = tiny_gpt2() if network == "gpt2" else model(network)
    made = ntc.compile(source, recipe=name, calibration=CALIBRATION)
    written = ntc.write(made, tmp_path / "out", emit=("onnx",), tokens=TOKENS.windows)
    held = written["onnx"]["held"]  # the same spikes from the same input, up to ties: what differs more is an error
    assert held["spikes"] > 5_000 and held["spike_mismatches"] <= 30
    program = ntc.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(program(TOKENS.windows), made.program(TOKENS.windows))
    assert evaluate(program, made.analog, TOKENS).cosine > LEAST[name]
    report = measure_energy(program, made.analog, TOKENS)
    assert report.to_json()["uncounted_share"] == 0
    dense = report.snn.total().dense_macs, report.ann.total().dense_macs
    assert dense[0] == pytest.approx(dense[1]) if name != "las" else dense[0] > dense[1], "outliers have layers of their own"


def test_a_wrong_digit_is_found() -> None:
    """Ties move a number by a step: that is let pass a few times; a spike more at the first digit is not, not once."""
    program = run_pipeline(analog("llama"), [EncodeLinears.configure({"code": "digits", "steps": 6})], CONTEXT)
    node = program.find("layers_0_input_layernorm_spikes")
    ours = torch.zeros(6, 1, 50, 32)
    tie, wrong = ours.clone(), ours.clone()
    tie[-1, 0, 0, 0] = 1.0
    wrong[0, 0, 0, 0] = 1.0
    count, total, share, _ = _unequal(program, node, ours, tie)
    assert (count, total) == (1, 1600) and 0 < share < 1e-3
    count, total, _, what = _unequal(program, node, ours, wrong)
    assert (count, total) == (1, 0) and "more than two steps" in what
    same = ours.clone()
    same[-2:, 0, 0, 0] = torch.tensor([1.0, -3.0])  # not a train, but the same number
    assert _unequal(program, node, ours, same)[0] == 0
