"""Replace-attention: thresholds, gain and rewrite against an independent simulation; overrides; refusals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from programs import CALIBRATION, CONTEXT, calibrated, canonical, context, nano

import ntc
from ntc.errors import ConfigError, PassError
from ntc.meta import NEURON, STATS, NeuronSpec
from ntc.pipeline import Context, run_pipeline
from ntc.program import Program, interpret
from ntc.testing import NanoGPT, check_pass, count_ops, example_ids
from ntc_passes.calibrate import Calibrate
from ntc_passes.canonicalize import Canonicalize
from ntc_passes.insert_neurons import InsertNeurons
from ntc_passes.replace_attention import ReplaceAttention

Array = np.ndarray


def replaced(program: Program, given: Context = CONTEXT, **options: Any) -> Program:
    return run_pipeline(program, [ReplaceAttention.configure(options)], given)


def neurons(program: Program) -> dict[str, NeuronSpec]:
    return {n.name: n.meta[NEURON] for n in program.graph.nodes if NEURON in n.meta}


# --------------------------------------------- the same in numpy with plain loops, in float32 so that ties fall alike


def fire(currents: Array, theta: Array, signed: bool) -> Array:
    """IF neurons on ``[T, ..., C]``, soft reset, v0 = theta / 2."""
    v, spikes = np.zeros_like(currents[0]) + np.float32(0.5) * theta, []
    for current in currents:
        u = v + current
        s = (u >= theta).astype(np.float32) - (signed & (u < 0)).astype(np.float32)
        spikes.append(s)
        v = u - theta * s
    return np.stack(spikes)


def mean_ssa(q: Array, k: Array, v: Array, heads: int, kv_heads: int) -> Array:
    """``sum_{j<=i} (q_i . k_j) v_j / (i + 1)`` on ``[T, B, L, C]``, one query at a time."""
    steps, batch, length, width = q.shape
    size, value_size = width // heads, v.shape[-1] // kv_heads
    y = np.zeros((steps, batch, length, heads * value_size), dtype=q.dtype)
    for h in range(heads):
        g = h // (heads // kv_heads)
        mine, theirs, values = slice(h * size, (h + 1) * size), slice(g * size, (g + 1) * size), slice(g * value_size, (g + 1) * value_size)
        for i in range(length):
            scores = np.einsum("tbd,tbjd->tbj", q[:, :, i, mine], k[:, :, : i + 1, theirs])
            sums = np.einsum("tbj,tbjd->tbd", scores, v[:, :, : i + 1, values])
            y[:, :, i, h * value_size : (h + 1) * value_size] = sums / np.float32(i + 1)
    return y


def inputs_and_results(program: Program) -> list[tuple[list[Array], Array]]:
    """Q, K, V and the softmax attention of the first block, for each calibration batch."""
    found: list[tuple[list[Array], Array]] = []

    def visit(node: torch.fx.Node, args: tuple[Any, ...], value: Any) -> None:
        if node.target is torch.ops.ntc.attention.default:
            found.append(([a.numpy() for a in args[:3]], value.numpy()))

    with torch.no_grad():
        for batch in CALIBRATION.batches:
            interpret(program, batch, visit)
    return found


def rows(parts: list[Array]) -> Array:
    return np.concatenate([p.reshape(-1, p.shape[-1]) for p in parts])


@pytest.mark.parametrize("output", ["current", "spikes"])
@pytest.mark.parametrize(("kv_heads", "signed_value"), [(4, True), (2, True), (4, False)])
def test_thresholds_and_gain_against_numpy(output: str, kv_heads: int, signed_value: bool) -> None:
    program = calibrated(n_layer=1) if kv_heads == 4 else nano(layout="separate", kv_heads=2)
    prefix = "transformer.h.0.attn" if kv_heads == 4 else "h.0.attn"
    after = replaced(program, steps=3, percentile=80.0, output=output, signed_value=signed_value, output_percentile=95.0)
    seen = inputs_and_results(program)
    thetas = []
    for i, role in enumerate("qkv"):
        x = rows([given[i] for given, _ in seen])
        signed = role == "v" and signed_value
        theta = np.percentile(np.abs(x) if signed else np.maximum(x, 0), 80.0, axis=0)
        theta = np.maximum(theta, theta.max() * 1e-3)
        np.testing.assert_allclose(after.tensor(f"{prefix}.{role}.threshold").numpy(force=True), theta, rtol=1e-5)
        thetas.append(after.tensor(f"{prefix}.{role}.threshold").numpy(force=True))  # to the last bit: ties
    currents = []
    for given, _ in seen:
        trains = [fire(np.stack([x] * 3), th, s) for x, th, s in zip(given, thetas, (False, False, signed_value), strict=True)]
        currents.append(mean_ssa(*trains, 4, kv_heads))
    results = [c.mean(0) for c in currents]
    if output == "spikes":
        first = currents[0].reshape(-1, currents[0].shape[-1])  # the output neuron's threshold is that of the first batch
        output_theta = np.percentile(np.abs(first) if signed_value else np.maximum(first, 0), 95.0, axis=0)
        output_theta = np.maximum(output_theta, output_theta.max() * 1e-3)
        stored = after.tensor(f"{prefix}.ssa.threshold").numpy(force=True)
        np.testing.assert_allclose(stored, output_theta, rtol=1e-5)
        results = [fire(c, stored, signed_value).mean(0) for c in currents]
    y, o = rows(results).astype(float), rows([value for _, value in seen]).astype(float)
    expected = np.array([np.linalg.lstsq(y[:, [c]], o[:, c], rcond=None)[0][0] for c in range(y.shape[1])])
    gain = after.tensor(f"{prefix}.ssa.gain").numpy(force=True)
    np.testing.assert_allclose(gain, expected, rtol=1e-4, atol=1e-5)
    (explained,) = after.history[-1].notes["explained_variance"].values()
    assert explained == pytest.approx(1 - ((expected * y - o) ** 2).sum() / (o**2).sum(), abs=1e-5)
    assert 0 < explained < 1


def test_ops_before_and_after() -> None:
    before = {"ntc.attention": 2, "linear": 13, "ntc.if_rate": 0, "mul": 0}
    counts = {"ntc.spiking_attention": 2, "ntc.position_scale": 2, "ntc.if_rate": 8, "mul": 2, "linear": 13, "gelu": 2}
    after = check_pass(
        ReplaceAttention(), calibrated(), context=CONTEXT, ops_before=before, ops_after=counts, not_after=["ntc.attention"],
        sites=2, missed=[],
    )  # fmt: skip
    assert "neurons-annotated" in after.facts
    assert set(after.history[-1].notes["explained_variance"]) == {"transformer.h.0", "transformer.h.1"}
    assert after.history[-1].drift > 0, "a pass that is not exact records how far the logits moved"
    check_pass(
        ReplaceAttention.configure({"output": "current"}), calibrated(), context=CONTEXT, sites=2,
        ops_after={"ntc.spiking_attention": 2, "ntc.if_rate": 6, "mul": 2},
    )  # fmt: skip


def test_annotations_say_what_the_options_said() -> None:
    after = replaced(calibrated(n_layer=1), steps=7, signed_value=False)
    assert neurons(after) == {
        f"h_0_attn_attention_{role}_rate": NeuronSpec(steps=7, signed=False, v0=0.5, role=role) for role in ("q", "k", "v", "ssa")
    }
    signed = replaced(calibrated(n_layer=1))
    assert {n.role: n.signed for n in neurons(signed).values()} == {"q": False, "k": False, "v": True, "ssa": True}


def test_overrides_reach_one_block_and_the_later_one_wins() -> None:
    given = context(**{"transformer.h.*": {"steps": 6}, "transformer.h.1.*": {"steps": 9, "percentile": 50.0, "activation": "relu"}})
    after = replaced(calibrated(), given, percentile=90.0)
    plain = replaced(calibrated(), percentile=90.0)
    steps = {name: spec.steps for name, spec in neurons(after).items()}
    assert {s for name, s in steps.items() if name.startswith("h_0")} == {6}
    assert {s for name, s in steps.items() if name.startswith("h_1")} == {9}
    for block, percentile in ((0, 90.0), (1, 50.0)):
        sample = calibrated().find(f"h_{block}_attn_c_attn_q").meta[STATS]["rows"].clamp(min=0).numpy()
        theta = np.percentile(sample, percentile, axis=0)
        found = after.tensor(f"transformer.h.{block}.attn.q.threshold").numpy(force=True)
        np.testing.assert_allclose(found, np.maximum(theta, theta.max() * 1e-3), rtol=1e-5)
    same = torch.equal(after.tensor("transformer.h.1.attn.q.threshold"), plain.tensor("transformer.h.1.attn.q.threshold"))
    assert not same


def test_a_wrong_override_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"override for transformer\.h\.0\.\*: steps must be a whole number"):
        replaced(calibrated(n_layer=1), context(**{"transformer.h.0.*": {"steps": 0}}))


def test_queries_and_keys_of_different_steps_are_an_error_that_names_both() -> None:
    """Options are looked up for the attention as a whole; only an annotation edited by hand can differ."""
    program = replaced(calibrated(n_layer=1)).copy()
    node = program.find("h_0_attn_attention_k_rate")
    node.meta[NEURON] = NeuronSpec(steps=8, role="k")
    with pytest.raises(PassError, match=r"spikes of the same step: .*_q_spikes is spikes T=4.*_k_spikes is spikes T=8.*transformer\.h\.0\.attn"):
        run_pipeline(program, [InsertNeurons()])


OPTIONS: list[tuple[Mapping[str, Any], str]] = [
    ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
    ({"steps": -4}, "steps must be"),
    ({"steps": 2.0}, "steps must be a whole number"),
    ({"steps": True}, "steps must be a whole number"),
    ({"steps": "4"}, "steps must be a whole number of at least 1, got '4'"),
    ({"percentile": 0}, r"a percentile lies in \(0, 100\], got 0"),
    ({"percentile": 101}, "got 101"),
    ({"percentile": float("nan")}, "got nan"),
    ({"percentile": "90"}, "got '90'"),
    ({"output_percentile": 0.0}, "a percentile lies in"),
    ({"output": "spike"}, "output must be 'current' or 'spikes', got 'spike'"),
    ({"signed_value": "no"}, "signed_value must be true or false, got 'no'"),
    ({"signed_query": 1}, "signed_query must be true or false, got 1"),
    ({"signed_key": None}, "signed_key must be true or false, got None"),
    ({"normalizer": "softmax"}, "normalizer must be 'position', .* or 'row-sum', got 'softmax'"),
    ({"gain": "tensor"}, "gain must be 'channel' or 'head', got 'tensor'"),
    ({"neuron": "izhikevich"}, "neuron must be 'if' or 'lif', got 'izhikevich'"),
    ({"tau": 0.5}, "tau must be a number of steps of at least 1, got 0.5"),
    ({"tau": float("inf")}, "tau must be a number of steps"),
    ({"neuron": "lif"}, "leaky neurons are binary, and signed_value would be ternary: set to false for 'lif'"),
    ({"neuron": "lif", "signed_key": True}, "signed_key and signed_value would be ternary"),
    ({"percentiles": 90}, "has no option 'percentiles'; did you mean percentile"),
    ({"leak": 0.9}, "has no option 'leak'; it has steps, percentile"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_options_are_checked(options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"pass replace-attention.*{message}"):
        ReplaceAttention.configure(options)


def test_a_percentile_of_100_is_the_largest_activation() -> None:
    after = replaced(calibrated(n_layer=1), percentile=100)
    x = rows([given[1] for given, _ in inputs_and_results(calibrated(n_layer=1))])
    np.testing.assert_allclose(after.tensor("transformer.h.0.attn.k.threshold").numpy(force=True), x.max(0).clip(x.max() * 1e-3), rtol=1e-5)


def test_no_site_is_an_error_that_shows_the_nearest_miss() -> None:
    program = run_pipeline(ntc.capture(NanoGPT(layers=1, mask="none"), example_ids()), [Canonicalize(), Calibrate()], CONTEXT)
    assert count_ops(program)["ntc.attention"] == 0
    with pytest.raises(PassError, match=r"replace-attention found none of its sites in NanoGPT: nearest miss %\w+: "):
        replaced(program)


def test_a_second_run_finds_no_site() -> None:
    with pytest.raises(PassError, match="found none of its sites"):
        replaced(replaced(calibrated(n_layer=1)))


def test_needs_statistics_and_the_text_they_came_from() -> None:
    with pytest.raises(PassError, match="needs a program that is calibrated: no pass in this recipe provides it"):
        replaced(canonical(n_layer=1))
    program = canonical(n_layer=1).copy()
    program.facts |= {"calibrated"}  # as after loading: statistics are not saved
    with pytest.raises(PassError, match=r"no calibration statistics at node %h_0_attn_c_attn_q \(transformer\.h\.0\.attn\.c_attn.*run calibrate"):
        replaced(program)
    with pytest.raises(PassError, match="fits its gains on calibration text"):
        replaced(calibrated(n_layer=1), Context())


def test_the_float_limit_is_a_function_of_the_rates() -> None:
    """Before insert-neurons the graph computes SSA on clipped, scaled activations: the same by hand."""
    program = calibrated(n_layer=1)
    after = replaced(program, output="current")
    logits: list[Array] = []

    def visit(node: torch.fx.Node, args: tuple[Any, ...], value: Any) -> torch.Tensor | None:
        if node.target is not torch.ops.ntc.attention.default:
            return None
        thetas = [after.tensor(f"transformer.h.0.attn.{r}.threshold").double().numpy(force=True) for r in "qkv"]
        parts = [np.clip(a.double().numpy() / th, low, 1)[None] for a, th, low in zip(args[:3], thetas, (0, 0, -1), strict=True)]
        gain = after.tensor("transformer.h.0.attn.ssa.gain").double().numpy(force=True)
        return torch.from_numpy(mean_ssa(*parts, 4, 4)[0] * gain).float()

    with torch.no_grad():
        logits.append(interpret(program, program.example, visit).numpy())
        np.testing.assert_allclose(after(program.example).numpy(), logits[0], rtol=0, atol=2e-4)
