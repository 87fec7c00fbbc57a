"""spike-functions: each kind by choice, off by no more than its neurons and codes are; refusals; what stays analog is said."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from family_cases import analog, model
from programs import CALIBRATION, CONTEXT, TOKENS, canonical, context
from test_fold_norms import tailed
from torch.nn import functional

import ntc
from ntc.errors import ConfigError, PassError
from ntc.meta import TYPE
from ntc.ops import aten, decode
from ntc.pipeline import LEFT_ANALOG, Calibration, Context, run_pipeline
from ntc.program import Program, interpret
from ntc.recipe import Step
from ntc.registry import recipe
from ntc.spike_type import SpikeType
from ntc.testing import check_pass, count_ops, example_ids
from ntc_passes.spike_functions import SpikeFunctions
from ntc_passes.spike_functions.fit import FUNCTIONS
from ntc_passes.spike_products import SpikeProducts

EPS = torch.finfo(torch.float32).eps
EVERYTHING = {"activation": "spiking", "gate": "spiking", "norm": "spiking", "softmax": "spiking"}


@cache
def spiking(name: str, **options) -> Program:
    return run_pipeline(canonical() if name == "gpt2" else analog(name), [SpikeFunctions.configure(options)], CONTEXT)


def values(program: Program, ids: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Every value of a run, by node; on calibration text unless told."""
    found: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        interpret(program, CALIBRATION.batches[0] if ids is None else ids, lambda node, args, value: found.update({node.name: value}))
    return found


def drift(program: Program, name: str) -> float:
    before = canonical() if name == "gpt2" else analog(name)
    with torch.no_grad():
        expected, got = before(CALIBRATION.batches[0]), program(CALIBRATION.batches[0])
    return float((got - expected).norm() / expected.norm())


# ------------------------------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize(("name", "function", "op"), [("llama", "silu", "silu"), ("gpt2", "gelu_tanh", "gelu")])
def test_activations_are_off_by_their_bound(name: str, function: str, op: str) -> None:
    before = canonical() if name == "gpt2" else analog(name)
    after = check_pass(
        SpikeFunctions.configure({"activation": "spiking"}), before, context=CONTEXT, sites=2, ops_before={op: 2},
        ops_after={op: 0, "ntc.fs_neuron": 2, "ntc.fs_synapse": 2, "ntc.decode": 2}, missed=[LEFT_ANALOG] * (9 if name == "llama" else 7),
    )  # fmt: skip
    found, fits = values(after), after.history[-1].notes["fits"]
    assert fits.keys() == {n.name for n in before.graph.nodes if n.target in (aten.silu.default, aten.gelu.default)}
    for site, (fitted,) in fits.items():
        spikes = after.find(f"{site}_spikes")
        assert spikes.meta[TYPE] == SpikeType(8, "fitted") and fitted["function"] == function and fitted["intervals"] == 32
        x = found[spikes.args[0].name]
        assert fitted["low"] < float(x.min()) and float(x.max()) < fitted["high"]
        expected = FUNCTIONS[function].value(x.double())
        off = (found[site] - expected).abs() / FUNCTIONS[function].allowed(expected)
        assert float(off.max()) <= fitted["largest_error_in_units"] + 16 * EPS
        assert float(off.max()) >= 0.2 * fitted["largest_error_in_units"], "and not by nothing"
        assert torch.equal(found[site], decode(found[f"{site}_train"], "count"))


def test_the_interval_is_what_the_text_reaches_and_a_margin() -> None:
    inputs = [
        torch.cat([values(analog("llama"), batch)["layers_0_mlp_gate_proj"].flatten() for batch in CALIBRATION.batches]),
        *(spiking("llama", activation="spiking", margin=margin).history[-1].notes["fits"]["layers_0_mlp_act_fn"][0] for margin in (0.0, 0.5)),
    ]
    x, exact, wide = inputs
    assert (exact["low"], exact["high"]) == (float(x.min()), float(x.max()))
    assert wide["high"] == pytest.approx(float(x.max() + (x.max() - x.min()) / 2))


def test_sigmoid_tanh_and_gelu_by_erf() -> None:
    def body(m, x):
        return torch.tanh(x) + torch.sigmoid(x) * 2.0 + functional.gelu(x)

    given = Context(Calibration.of(tailed(body).example))
    after = check_pass(SpikeFunctions.configure({"activation": "spiking"}), tailed(body), context=given, sites=3)
    assert sorted(f[0]["function"] for f in after.history[-1].notes["fits"].values()) == ["gelu", "sigmoid", "tanh"]


# ------------------------------------------------------------------------------------------------------------------- gates


def test_a_gate_is_the_product_of_two_trains() -> None:
    after = check_pass(
        SpikeFunctions.configure({"gate": "spiking"}), analog("llama"), sites=2,
        ops_after={"silu": 2, "ntc.train_product": 2, "ntc.encode": 4, "ntc.token_step": 4},
    )  # fmt: skip
    found = values(after)
    for layer in (0, 1):
        a, b = (found[f"layers_{layer}_mlp_{part}"] for part in ("act_fn", "up_proj"))
        half = [x.abs().amax(-1, keepdim=True) / 255 / 2 for x in (a, b)]
        limit = half[0] * b.abs() + half[1] * a.abs() + half[0] * half[1]
        off = (found[f"layers_{layer}_mlp_mul_scaled"] - a * b).abs()
        assert bool((off <= limit * (1 + 1e-5) + 1e-6).all()) and float((off / limit).max()) > 0.3


def test_a_gate_takes_the_train_of_the_activation_as_it_is() -> None:
    after = spiking("llama", activation="spiking", gate="spiking", steps=12)
    assert count_ops(after)["ntc.encode"] == 2, "the other factor"
    found = values(after)
    assert "layers_0_mlp_act_fn" not in found, "nobody reads the value"
    factors = [decode(found["layers_0_mlp_up_proj_spikes"], "phase"), decode(found["layers_0_mlp_act_fn_train"], "count")]
    product = factors[0] * factors[1] * found["layers_0_mlp_up_proj_step"] * 4096
    torch.testing.assert_close(found["layers_0_mlp_mul_scaled"], product, rtol=1e-5, atol=1e-5)
    given = context(**{"*.act_fn": {"activation": "spiking", "steps": 6}, "*.mlp": {"gate": "spiking", "steps": 8}})
    mixed = check_pass(SpikeFunctions(), analog("llama"), context=given, sites=4)
    assert count_ops(mixed)["ntc.encode"] == 4, "trains of other lengths do not meet"


# ------------------------------------------------------------------------------------------------------------------- norms


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("steps", [6, 12])
def test_norms_are_those_of_the_coded_input_up_to_the_root(name: str, steps: int) -> None:
    """``y = w q / sqrt(mean q^2 + eps)`` of the coded value q, off by the neuron's relative error; q is off by half a step."""
    before = canonical() if name == "gpt2" else analog(name)
    after = spiking(name, norm="spiking", steps=steps)
    assert count_ops(after)["rms_norm"] + count_ops(after)["layer_norm"] == 0 and after.history[-1].sites == 5
    found, fits = values(after), after.history[-1].notes["fits"]
    for node in (n for n in before.graph.nodes if n.name in fits):
        weight = before.tensor(node.args[2]).detach()
        bias, eps = (before.tensor(node.args[3]).detach(), node.args[4]) if name == "gpt2" else (torch.zeros(()), node.args[3])
        x = found[after.find(f"{node.name}_spikes").args[0].name]
        if name == "gpt2":
            assert float(x.mean(-1).abs().max()) < 1e-5
        step = found[f"{node.name}_step"]
        q = decode(found[f"{node.name}_spikes"], "phase") * 2.0**steps * step
        assert bool(((q - x).abs() <= step / 2 * (1 + 1e-4)).all())
        q = q.double()
        expected = q / (q.square().mean(-1, keepdim=True) + eps).sqrt() * weight
        (root,) = fits[node.name]
        off = (found[node.name] - bias - expected).abs()
        assert bool((off <= expected.abs() * (root["largest_error_in_units"] + 64 * EPS) + 8 * EPS * bias.abs().max()).all())
        assert float(off.max()) > 0.01 * float(expected.abs().max()) * root["largest_error_in_units"]


def test_a_norm_needs_no_text_and_takes_tokens_of_any_size() -> None:
    after = run_pipeline(analog("llama"), [SpikeFunctions.configure({"norm": "spiking", "steps": 12})])

    def grown(factor: float) -> tuple[torch.Tensor, torch.Tensor]:
        found = {}

        def visit(node, args, value):
            found[node.name] = value * factor if node.name == "embed_tokens" else value
            return found[node.name]

        with torch.no_grad():
            interpret(after, CALIBRATION.batches[0], visit)
        weight = after.tensor("model.layers.0.input_layernorm.weight")
        return found["layers_0_input_layernorm"], functional.rms_norm(found["embed_tokens"], [32], weight, 1e-6).detach()

    assert torch.equal(grown(2.0**15)[0], grown(2.0**20)[0]), "a power of two is no other number to it"
    for factor in (1e4, 1.0, 3e-3):  # at the last one eps is more than half of the sum
        got, expected = grown(factor)
        assert float((got - expected).norm() / expected.norm()) < 1e-3
    assert float(grown(3e-3)[1].norm()) < 0.7 * float(grown(1.0)[1].norm())
    assert not grown(0.0)[0].any() and bool(grown(1e-12)[0].isfinite().all())


def test_norms_without_weights() -> None:
    after = check_pass(
        SpikeFunctions.configure({"norm": "spiking"}), tailed(lambda m, x: functional.rms_norm(x, [16], None, 1e-6) + functional.layer_norm(x, [16])),
        sites=2, ops_after={"mul": 0},
    )  # fmt: skip
    assert not {"rms_norm", "layer_norm"} & count_ops(after).keys()


# ------------------------------------------------------------------------------------------------------------------- softmax


@pytest.mark.parametrize("steps", [8, 14])
def test_softmax_is_off_by_what_its_two_neurons_are(steps: int) -> None:
    program = tailed(lambda m, x: functional.softmax(x * 3.0, -1))
    after = check_pass(
        SpikeFunctions.configure({"softmax": "spiking", "steps": steps}), program, sites=1,
        ops_before={"softmax": 1}, ops_after={"softmax": 0, "ntc.fs_neuron": 2, "ntc.train_product": 1, "amax": 1, "sum": 1},
    )  # fmt: skip
    (site, (exponential, reciprocal)), found = next(iter(after.history[-1].notes["fits"].items())), values(after, after.example)
    below = found[f"{site}_below"].double()
    exact = below.exp()
    off = torch.where(below < exponential["low"], exact, exponential["largest_error_in_units"] * exact.sqrt())
    assert bool(((found[f"{site}_exp"] - exact).abs() <= off * (1 + 1e-4) + 4 * EPS).all())
    mass = exact.sum(-1, keepdim=True)
    p, moved = exact / mass, off.sum(-1, keepdim=True)
    limit = (off + p * moved) / (mass - moved) + (p + off / mass) * reciprocal["largest_error_in_units"] * 1.1
    assert bool(((found[site] - p).abs() <= limit + 8 * EPS).all())
    assert float((found[site] - p).abs().max()) > 0.02 * float(limit.max()) and reciprocal["high"] > 16 and reciprocal["low"] < 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_attention_keeps_its_rows(name: str) -> None:
    """Scores and weighted values are the op's own: with an exact softmax between them nothing changes; with neurons, what they are off."""
    before = canonical() if name == "gpt2" else analog(name)
    after = check_pass(
        SpikeFunctions.configure({"softmax": "spiking", "steps": 12}), before, missed=[LEFT_ANALOG] * (9 if name == "llama" else 7 if name == "gpt2" else 5),
        ops_after={"ntc.causal_scores": (n := 1 if name == "mistral" else 2), "ntc.weighted_values": n, "ntc.train_product": n, "ntc.attention": 0},
    )  # fmt: skip
    found, rows = values(after), []

    def exact(node, args, value):
        if node.name.endswith("_softmax"):
            rows.append((value - found[node.name.removesuffix("_softmax") + "_scores"].softmax(-1)).abs().max())
            return found[node.name.removesuffix("_softmax") + "_scores"].softmax(-1)
        return None

    with torch.no_grad():
        first = next(iter(n for n in after.graph.nodes if n.target is torch.ops.ntc.weighted_values.default))
        got = interpret(after, CALIBRATION.batches[0], exact, last=first)
        expected = interpret(before, CALIBRATION.batches[0], lambda node, args, value: None, last=before.find(first.name))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert 1e-5 < float(rows[0]) < 5e-3
    notes = after.history[-1].notes
    assert "the products of attention, Q K and P V, unless spike-products runs behind" in notes["islands"]
    assert notes["fits"][first.name][1]["high"] == pytest.approx(4 if name == "mistral" else 24, rel=0.01), "the window, or the context"


def test_hidden_scores_are_silent() -> None:
    program = tailed(lambda m, x: functional.softmax(x.masked_fill(x < 0, float("-inf")), -1))
    found = values(run_pipeline(program, [SpikeFunctions.configure({"softmax": "spiking"})]), program.example)
    (name,) = (n for n in found if n.endswith("_exp_spikes"))
    hidden = found[name.removesuffix("_exp_spikes") + "_below"] == -torch.inf
    assert bool(hidden.any()) and not found[name][:, hidden].any() and not found[name.removesuffix("_exp_spikes")][hidden].any()


# --------------------------------------------------------------------------------------------------------------- whole networks


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_more_steps_and_intervals_are_nearer(name: str) -> None:
    errors = [drift(spiking(name, **EVERYTHING, steps=steps, intervals=intervals), name) for steps, intervals in ((5, 8), (8, 32), (12, 128))]
    assert all(finer < coarser / 3 for coarser, finer in pairwise(errors)) and errors[-1] < 2e-3


def test_nothing_is_chosen_by_default() -> None:
    program = analog("llama")
    after = check_pass(SpikeFunctions(), program, sites=0, missed=[LEFT_ANALOG] * 11)
    assert str(after) == str(program) and after.history[-1].notes == {}


def test_modules_may_be_left_analog_and_islands_are_stated() -> None:
    given = context(**{"model.layers.0.*": {"activation": "analog"}, "model.norm": {"norm": "spiking", "steps": 10}})
    after = check_pass(SpikeFunctions.configure({"activation": "spiking"}), analog("llama"), context=given, sites=2, missed=[LEFT_ANALOG] * 9)
    assert after.find("norm_spikes").meta[TYPE].steps == 10 and after.find("layers_0_mlp_act_fn").target is aten.silu.default
    notes = after.history[-1].notes
    assert notes["spiking"] == {"activation": 1, "norm": 1}
    assert notes["islands"] == [
        "activation of 1 nodes, altogether", "gate of 2 nodes, altogether", "norm of 4 nodes, altogether", "softmax of 2 nodes, altogether",
        "the step of each token: its largest channel", "the mean of the squares, and LayerNorm's of the channels: sums of real values",
        "gains and biases",
    ]  # fmt: skip


def test_what_cannot_be_computed_is_left_alone() -> None:
    after = check_pass(SpikeFunctions.configure(EVERYTHING), analog("qwen3"), context=CONTEXT, missed=["as norms of single heads have"] * 2)
    assert count_ops(after)["rms_norm"] == 2
    check_pass(SpikeFunctions.configure({"softmax": "spiking"}), analog("gemma2"), sites=0, missed=[LEFT_ANALOG, "its scores are capped"] + [LEFT_ANALOG] * 7)
    check_pass(SpikeFunctions.configure(EVERYTHING), tailed(lambda m, x: functional.softmax(x, 1)), missed=["along axis 1, and not the last one"])


def test_attention_of_coded_products_is_left_alone() -> None:
    program = run_pipeline(analog("llama"), [SpikeProducts()])
    after = run_pipeline(program, [SpikeFunctions.configure({"softmax": "spiking", "gate": "spiking"})])
    assert [reason.endswith("run this pass in front of spike-products") for _, reason in after.history[-1].missed if reason != LEFT_ANALOG] == [True, True]
    assert "softmax of 2 nodes, altogether" in after.history[-1].notes["islands"]


def test_activations_need_calibration_text() -> None:
    with pytest.raises(PassError, match=r"give --calibration FILE .* or leave activation = analog; node %layers_0_mlp_act_fn"):
        run_pipeline(analog("llama"), [SpikeFunctions.configure({"activation": "spiking"})])


def test_options() -> None:
    for options, sentence in (
        ({"softmax": True}, "softmax must be 'analog' or 'spiking', got True"),
        ({"norm": "host"}, "norm must be 'analog' or 'spiking', got 'host'"),
        ({"steps": 17}, "steps must be a whole number from 2 to 16, got 17"),
        ({"steps": 1}, "steps must be a whole number from 2 to 16, got 1"),
        ({"intervals": 0}, "intervals must be a whole number from 1 to 1024, got 0"),
        ({"margin": -0.1}, "margin must be a number of at least 0, got -0.1"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            SpikeFunctions.configure(options)


def test_events_and_operations_are_counted() -> None:
    program = spiking("llama", **EVERYTHING)
    report = ntc.measure_energy(program, analog("llama"), TOKENS)
    assert report.uncounted() == []


def test_in_a_recipe_saved_and_in_onnx(tmp_path: Path) -> None:
    steps = recipe("sdllm").insert_before("encode-linears", Step(SpikeFunctions, EVERYTHING))
    found = ntc.compile(model("llama"), recipe=steps, calibration=CALIBRATION)
    ops = count_ops(found.program)
    assert ops["ntc.fs_neuron"] == 11 and ops["ntc.train_product"] == 14 and not {"rms_norm", "silu", "ntc.attention"} & ops.keys()
    report = ntc.write(found, tmp_path / "made", emit=("onnx",), tokens=TOKENS.windows[:2])
    held = report["onnx"]["held"]
    assert held["spikes"] > 10_000 and held["spike_mismatches"] <= 3 * 30
    ids = example_ids(length=11)
    assert torch.equal(ntc.load(tmp_path / "made")(ids), found.program(ids))
