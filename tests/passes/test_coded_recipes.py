"""The recipes that code operands, end to end on small networks: compiled, saved, loaded, in ONNX Runtime, counted."""

from __future__ import annotations

from collections import Counter
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from agreement_cases import ProgramExecutor, changed, set_element
from family_cases import analog, model
from programs import CALIBRATION, CONTEXT, tiny_gpt2

import ntc
from ntc.agreement import Agreement
from ntc.artifact import load_analog
from ntc.compiler import Compilation
from ntc.emit import check_recipe, emit_all, emitters
from ntc.energy import measure_energy
from ntc.errors import BackendError, PassError
from ntc.pipeline import run_pipeline
from ntc.proof import prove
from ntc.quality import evaluate
from ntc.recipe import Settings
from ntc.recording import populations, record, role_of
from ntc.registry import recipe as find_recipe
from ntc.rounding import limits
from ntc.testing import example_ids
from ntc.text import Tokens
from ntc_backends.onnx_check import _unequal
from ntc_passes.encode_linears import EncodeLinears

TOKENS = Tokens(example_ids(batch=2, length=11, seed=3), "drawn", "")  # not as long as the example that programs are captured with

# Cosine of the logits with the original's: these networks are random, so each recipe is held to what its steps say and to no more.
LEAST = {
    "ecmt": 0.9, "las": 0.99, "lossless": 0.999, "lossless, static": 0.99, "lossless-sparse": 0.9, "lossless-spiking": 0.99, "phase": 0.99999,
    "sdllm": 0.9,
}  # fmt: skip
STATIC = Settings({"scale": "static"})


@cache
def compiled(name: str, network: str) -> Compilation:
    recipe, _, static = name.partition(", ")
    source = tiny_gpt2() if network == "gpt2" else model(network)
    return ntc.compile(source, recipe=recipe, settings=STATIC if static else None, calibration=CALIBRATION)


@pytest.mark.parametrize(("name", "network"), [(n, w) for n in sorted(LEAST) for w in ("llama", "gpt2") if (n, w) != ("lossless-spiking", "gpt2")])
def test_end_to_end(name: str, network: str, tmp_path: Path) -> None:
    """Written with its ONNX file, read back, evaluated, counted, and every spike of the file compared with the program's."""
    made = compiled(name, network)
    written = ntc.write(made, tmp_path / "out", emit=("onnx",), tokens=TOKENS.windows)
    held = written["onnx"]["held"]  # the same spikes from the same input, up to ties: what differs more is an error
    assert held["spikes"] > 2_500 and held["spike_mismatches"] <= held["spikes"] / 100
    program, analog = ntc.load(tmp_path / "out"), load_analog(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(program(TOKENS.windows), made.program(TOKENS.windows))
    assert evaluate(program, made.analog, TOKENS).cosine > LEAST[name]
    assert analog is not None, "what energy is compared with"
    report = measure_energy(program, analog, TOKENS)
    assert report.uncounted() == [] and report.to_json()["uncounted_share"] == 0
    spiking, dense = report.snn.total(), report.ann.total().dense_macs
    assert spiking.spikes > 0 and (spiking.acs > 0 or spiking.graded_macs > 0)
    if name == "las":  # outliers have layers of their own
        assert spiking.dense_macs > dense
    elif name != "lossless-spiking":  # whose products of trains are more than the original has
        assert spiking.dense_macs == pytest.approx(dense)
    proof = prove(tmp_path / "out", TOKENS, targets=["onnx"], program=program)
    row = proof["targets"]["onnx"]
    assert proof["agrees"] and row["verdict"] in ("exact", "approximate"), row["reason"]
    assert row["coverage"]["share"] == 1 and row["compared"] > 10_000
    assert row["held"]["spike_mismatches"] == row["held"]["ties"] + row["held"]["consequences"]
    assert sum(layer["neurons"] for layer in row["layers"]) == proof["neurons"], "rows of attention are as long as the text"


@pytest.mark.parametrize("name", sorted(LEAST))
def test_what_cannot_be_written_is_known_before(name: str, tmp_path: Path) -> None:
    """A back end refuses a recipe ahead if, and only if, it refuses the program that the recipe has made."""
    made, refused = compiled(name, "llama"), list[str]()
    for target in ("netlist", "nir", "onnx", "onnx-streaming"):
        verdicts = []
        chosen, ahead = emitters([target]), partial(check_recipe, find_recipe(made.recipe.name), made.settings)
        for attempt in (ahead, lambda chosen: emit_all(chosen, made.program, tmp_path, None, TOKENS.windows, lambda *_: None)):
            try:
                attempt(chosen)
                verdicts.append(False)
            except (BackendError, PassError):
                verdicts.append(True)
        assert verdicts[0] is verdicts[1], target
        refused += [target] * verdicts[0]
    assert refused == ["netlist", "nir"] + ["onnx-streaming"] * (name not in ("ecmt", "sdllm"))


@pytest.mark.parametrize(("name", "digit"), [("lossless", 0), ("lossless", 4), ("las", 0), ("las", 8)])
def test_a_wrong_threshold_of_one_digit_is_no_tie(name: str, digit: int, tmp_path: Path) -> None:
    """However far rounding reaches in the last digit, it excuses no other one."""
    ntc.write(compiled(name, "llama"), tmp_path / "out", tokens=TOKENS.windows)
    program = ntc.load(tmp_path / "out")
    thresholds = str(program.find("layers_0_input_layernorm_spikes").args[3].target)
    wrong = changed(program, thresholds, set_element(digit, 1.1))
    with torch.no_grad():
        agreement = Agreement(program, ProgramExecutor(wrong), TOKENS.windows.shape[1])
        agreement.add(record(program, TOKENS.windows, 0))
    found = agreement.result()
    assert found["verdict"] == "differs" and "are no ties" in found["reason"]


def test_how_far_rounding_reaches_is_a_number_also_where_scores_are_infinite() -> None:
    """Scores of keys that a token does not see are minus infinity: moved by rounding, they are so still."""
    program = compiled("lossless-spiking", "llama").program
    found = limits(program, record(program, TOKENS.windows[:1], 0))
    assert len(found.membranes) == len(populations(program)) and any("softmax_exp" in name for name in found.membranes)
    assert all(bool(limit.isfinite().all()) for limit in found.membranes.values()) and found.logits < 0.1


def test_populations_have_the_roles_that_their_readers_give_them() -> None:
    program = compiled("lossless", "llama").program
    roles = Counter(role_of(node) for node in populations(program).values())
    assert roles == {"input": 9, "q": 2, "k": 2, "v": 2}
    report = measure_energy(program, compiled("lossless", "llama").analog, TOKENS)
    _, block = report.block()
    assert sum(node.op == "ntc.digit_neuron" for node in block) == 6, "neurons of Q, K and V belong to attention"


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
