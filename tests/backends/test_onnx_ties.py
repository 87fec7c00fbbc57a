"""What the check of an ONNX file takes for ties where more of them differ than usual: rounding, and nothing that is larger."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.numpy_helper
import pytest
import torch
from programs import CONTEXT, canonical

from ntc.errors import BackendError
from ntc.ops import digit_neuron
from ntc.pipeline import run_pipeline
from ntc.program import Program
from ntc.recording import populations, record
from ntc.rounding import limits
from ntc.testing import example_ids
from ntc_backends.onnx_check import _no_ties, check
from ntc_backends.onnx_export import OnnxBackend
from ntc_passes.encode_linears import EncodeLinears
from ntc_passes.spike_functions import SpikeFunctions
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


IDS = example_ids(batch=1, length=16, seed=3)


def at_the_end_of_an_interval() -> tuple[Program, str]:
    """A network one of whose few-spikes neurons gets the first value of an interval, and the weights that this value comes from."""
    program = run_pipeline(canonical(), [SpikeFunctions.configure({"activation": "spiking"})], CONTEXT)
    node = next(n for n in populations(program).values() if n.target is torch.ops.ntc.fs_neuron.default)
    x, intervals = record(program, IDS, 0).arguments[node.name][:2]
    ends = intervals[1:, 0].clone()
    found = x[(x > ends[0]) & (x < ends[-1])]
    value = found[(found[:, None] - ends).abs().amin(1).argmin()]  # it is near one already: the functions hardly change
    place = int((ends - value).abs().argmin())
    with torch.no_grad():
        intervals[place, 1] = intervals[place + 1, 0] = value
    assert program.tensor(node.args[1]) is intervals
    return program, next(str(a.target) for a in node.args[0].all_input_nodes if a.op == "get_attr" and "weight" in str(a.target))


def test_a_spike_is_read_as_that_of_the_neuron_that_fired_it(tmp_path: Path) -> None:
    """Another order of sums moves a value over the end of its interval: another neuron fires, and that is a tie and no mistake."""
    program, weight = at_the_end_of_an_interval()
    OnnxBackend().emit(program, tmp_path, tokens=IDS)
    model = onnx.load(tmp_path / "model.onnx")
    (tensor,) = [t for t in model.graph.initializer if t.name == weight]
    kept = onnx.numpy_helper.to_array(tensor)
    for factor in (1 - 2e-7, 1 + 2e-7):  # one of them moves it downwards
        tensor.CopyFrom(onnx.numpy_helper.from_array(kept * kept.dtype.type(factor), weight))
        onnx.save(model, tmp_path / "moved.onnx")
        report = check(tmp_path / "moved.onnx", program, IDS)["held"]
        assert report["max_abs_logit_difference"] < 1e-5


def test_a_synapse_that_reads_another_value_is_found(tmp_path: Path) -> None:
    program, _ = at_the_end_of_an_interval()
    OnnxBackend().emit(program, tmp_path, tokens=IDS)
    model = onnx.load(tmp_path / "model.onnx")
    first, second = (n for n in model.graph.node if n.op_type == "FewSpikesSynapse")
    second.input[1] = first.input[1]
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(BackendError, match=f"node {second.name} of the model reads {first.input[1]} beside spikes that are made of"):
        check(tmp_path / "model.onnx", program, IDS)
