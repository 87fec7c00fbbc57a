"""The variants of replace-attention: what each puts into the graph, what it fits, and that the spiking program computes what was fitted."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs import CALIBRATION, CONTEXT, calibrated, context, nano
from torch import Tensor

from ntc.artifact import load, save, seal
from ntc.errors import PassError
from ntc.meta import NEURON, NeuronSpec
from ntc.ops import spiking_attention
from ntc.pipeline import Calibration, run_pipeline
from ntc.program import Program, interpret
from ntc.testing import check_pass, count_ops
from ntc_passes.fold_thresholds import FoldThresholds
from ntc_passes.insert_neurons import InsertNeurons
from ntc_passes.replace_attention import ReplaceAttention
from ntc_passes.replace_attention.leaks import LEAKS, best_decays, products_by_decay, spread_windows

PREFIX = "transformer.h.0.attn"

NORMALIZERS: dict[str, tuple[dict[str, int], set[str]]] = {  # ops and tensors that are not those of "leak"
    "position": ({"ntc.position_scale": 1}, set()),
    "learned-position": ({"ntc.position_scale": 1}, {"position"}),
    "leak": ({}, {"leak"}),
    "channel-leak": ({}, {"leak"}),
    "rms": ({"ntc.rms_scale": 1}, set()),
    "leak-rms": ({"ntc.rms_scale": 1}, {"leak"}),
    "row-sum": ({"ntc.row_sum_scale": 1}, set()),
}
MORE: dict[str, dict[str, Any]] = {
    "all ternary": {"signed_query": True, "signed_key": True, "normalizer": "leak-rms"},
    "binary": {"signed_value": False, "output": "current", "gain": "head"},
    "lif": {"neuron": "lif", "signed_value": False, "normalizer": "leak", "percentile": 70.0},
    "lif current": {"neuron": "lif", "tau": 1.5, "signed_value": False, "normalizer": "row-sum", "output": "current"},
}
VARIANTS: dict[str, dict[str, Any]] = {**{n: {"normalizer": n} for n in NORMALIZERS}, **MORE}


@cache
def replaced(variant: str) -> Program:
    return run_pipeline(calibrated(n_layer=1), [ReplaceAttention.configure(VARIANTS[variant])], CONTEXT)


def tensors(program: Program) -> set[str]:
    return {name.removeprefix(f"{PREFIX}.ssa.") for name in program.tensors if name.startswith(f"{PREFIX}.ssa.")}


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_each_normalizer_has_its_op_and_its_tensors(normalizer: str) -> None:
    ops, names = NORMALIZERS[normalizer]
    scales = dict.fromkeys(("ntc.position_scale", "ntc.rms_scale", "ntc.row_sum_scale"), 0)
    after = replaced(normalizer)
    assert {k: count_ops(after)[k] for k in scales} == {**scales, **ops}
    assert tensors(after) == {"threshold", "gain", *names}
    leaks = after.history[-1].notes.get("leaks")
    assert (leaks is not None) == ("leak" in names)


def test_the_pass_keeps_its_contract_with_another_normalizer() -> None:
    given = ReplaceAttention.configure({"normalizer": "channel-leak", "output": "current"})
    after = check_pass(given, calibrated(n_layer=1), context=CONTEXT, ops_after={"ntc.spiking_attention": 1, "ntc.if_rate": 3}, sites=1)
    assert after.history[-1].drift > 0


def spiking_output(program: Program, spiking: Program, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention of the analog program, and what the spiking one puts in its place given the same Q, K, V."""
    found: dict[str, Tensor] = {}
    given: list[Tensor] = []

    def analog(node: torch.fx.Node, args: tuple[Any, ...], value: Any) -> None:
        if node.target is torch.ops.ntc.attention.default:
            given.extend(args[:3])
            found["analog"] = value

    def watch(node: torch.fx.Node, args: tuple[Any, ...], value: Any) -> Any:
        if node.name in names:
            return given[names.index(node.name)]
        if node.name == "h_0_attn_c_proj":
            found["spiking"] = args[0]
        return None

    with torch.no_grad():
        interpret(program, batch, analog)
        names = [f"h_0_attn_c_attn_{r}" for r in "qkv"]
        interpret(spiking, batch, watch)
    return found["analog"], found["spiking"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_spiking_program_explains_what_the_history_says(variant: str) -> None:
    """What was fitted on tensors is what the graph computes: thresholds, leaks, normaliser, neurons and gain."""
    after = replaced(variant)
    spiking = run_pipeline(after, [InsertNeurons()], CONTEXT)
    error = power = 0.0
    for batch in CALIBRATION.batches:
        o, y = spiking_output(calibrated(n_layer=1), spiking, batch)
        y = y.mean(0) if y.dim() == 4 else y
        error, power = error + float((o - y).double().square().sum()), power + float(o.double().square().sum())
    (explained,) = after.history[-1].notes["explained_variance"].values()
    assert 1 - error / power == pytest.approx(explained, abs=1e-5)
    assert 0 < explained < 1


def test_a_table_starts_as_the_division_by_the_position() -> None:
    table = replaced("learned-position").tensor(f"{PREFIX}.ssa.position")
    assert table.requires_grad
    assert table.shape == (4, calibrated(n_layer=1).info.context)
    torch.testing.assert_close(table[:, :9], (1 / torch.arange(1.0, 10)).expand(4, 9))
    gains = [replaced(n).tensor(f"{PREFIX}.ssa.gain") for n in ("learned-position", "position")]
    torch.testing.assert_close(*gains, rtol=0.02, atol=1e-3)  # a product is not a quotient to the last bit, and ties fall otherwise


def test_a_table_needs_a_limited_context() -> None:
    program = calibrated(n_layer=1).copy()
    program.info = replace(program.info, context=0)
    with pytest.raises(PassError, match=r"learned-position needs a model with a limited context, and this one has none: node %\w+ \(trans"):
        run_pipeline(program, [ReplaceAttention.configure({"normalizer": "learned-position"})], CONTEXT)


def test_signs_reach_their_neurons_and_the_output_follows() -> None:
    for signs in itertools.product((False, True), repeat=3):
        options = dict(zip(("signed_query", "signed_key", "signed_value"), signs, strict=True))
        neurons = {role: ReplaceAttention.configure(options).options.neuron_of(role).signed for role in ("q", "k", "v", "ssa")}
        assert neurons == {**dict(zip("qkv", signs, strict=True)), "ssa": any(signs)}


# --------------------------------------------------------------------------------------------------- gains


def ungained(program: Program, after: Program) -> tuple[Tensor, Tensor]:
    """Analog and ungained spiking results of the first block, one row per token."""
    spiking = run_pipeline(after, [InsertNeurons()], CONTEXT)
    name = f"{PREFIX}.ssa.gain"
    bare = spiking.with_graph(spiking.copy().graph, {name: torch.ones_like(spiking.tensor(name))})
    with torch.no_grad():
        pairs = [spiking_output(program, bare, b) for b in CALIBRATION.batches]
    return torch.cat([o.flatten(0, -2) for o, _ in pairs]), torch.cat([(y.mean(0) if y.dim() == 4 else y).flatten(0, -2) for _, y in pairs])


def test_a_gain_per_head_is_the_least_squares_factor_of_the_head() -> None:
    program = calibrated(n_layer=1)
    after = run_pipeline(program, [ReplaceAttention.configure({"gain": "head"})], CONTEXT)
    gain = after.tensor(f"{PREFIX}.ssa.gain").detach().clone()
    o, y = ungained(program, after)
    for target, bare, factor in zip(o.chunk(4, -1), y.chunk(4, -1), gain.chunk(4), strict=True):
        assert bool((factor == factor[0]).all())
        expected = np.linalg.lstsq(bare.double().numpy().reshape(-1, 1), target.double().numpy().ravel(), rcond=None)[0][0]
        assert float(factor[0]) == pytest.approx(expected, rel=1e-4)


# --------------------------------------------------------------------------------------------------- leaks


def with_leak(after: Program, leak: Tensor, gain: str) -> float:
    """Power of the attention that other leaks would explain, with the thresholds that there are and the best gain."""
    given = []

    def visit(node: torch.fx.Node, args: tuple[Any, ...], value: Any) -> None:
        if node.target is torch.ops.ntc.attention.default:
            given.append((args[:3], value))

    spiking = run_pipeline(after, [InsertNeurons()], CONTEXT)
    nodes = {n.name: n for n in spiking.graph.nodes}
    cross = power = 0.0
    with torch.no_grad():
        for batch in CALIBRATION.batches:
            interpret(calibrated(n_layer=1), batch, visit)
            (inputs, o) = given.pop()
            trains = []
            for x, role in zip(inputs, "qkv", strict=True):
                node = nodes[f"h_0_attn_attention_{role}_spikes"]
                constants = [spiking.tensor(a) if isinstance(a, torch.fx.Node) else a for a in node.args[1:]]
                trains.append(node.target(x, *constants))
            y = spiking_attention(*trains, 4, 4, leak).mean(0).flatten(0, -2).double()
            o = o.flatten(0, -2).double()
            cross, power = cross + (y * o).sum(0), power + (y * y).sum(0)
    if gain == "head":
        cross, power = (x.view(4, -1).sum(-1) for x in (cross, power))
    return (cross.square() / power.clamp(min=1e-30)).view(4, -1).sum(-1)


@pytest.mark.parametrize("gain", ["channel", "head"])
def test_each_head_takes_the_decay_that_explains_most(gain: str) -> None:
    after = run_pipeline(calibrated(n_layer=1), [ReplaceAttention.configure({"normalizer": "leak", "gain": gain})], CONTEXT)
    chosen = after.tensor(f"{PREFIX}.ssa.leak").detach()
    assert chosen.shape == (4,)
    table = torch.stack([with_leak(after, torch.full((4,), leak), gain) for leak in LEAKS])  # by an op run of its own for each decay
    torch.testing.assert_close(chosen, torch.tensor(LEAKS)[table.argmax(0)])
    assert after.history[-1].notes["leaks"] == {"transformer.h.0": chosen.tolist()}
    assert len(set(chosen.tolist())) > 1, "or the test could not tell heads apart"


def test_channels_explain_at_least_what_their_head_did() -> None:
    options = {"normalizer": "leak", "gain": "head"}
    heads = run_pipeline(calibrated(n_layer=1), [ReplaceAttention.configure(options)], CONTEXT)
    channels = run_pipeline(calibrated(n_layer=1), [ReplaceAttention.configure({**options, "normalizer": "channel-leak"})], CONTEXT)
    one, many = heads.tensor(f"{PREFIX}.ssa.leak").detach(), channels.tensor(f"{PREFIX}.ssa.leak").detach()
    assert many.shape == (32,)
    assert set(many.tolist()) <= set(torch.tensor(LEAKS).tolist())
    before, now = with_leak(channels, one, "head"), with_leak(channels, many, "head")
    assert bool((now >= before * (1 - 1e-6)).all())
    assert bool((now > before * 1.01).any())
    (noted,) = channels.history[-1].notes["leaks"].values()
    assert noted == [[float(f(row)) for f in (torch.min, torch.median, torch.max)] for row in many.view(4, 8)]


@pytest.mark.parametrize("normalizer", ["leak", "channel-leak", "leak-rms", "learned-position", "row-sum"])
def test_shared_key_heads(normalizer: str) -> None:
    program = nano(layout="separate", kv_heads=2)
    after = run_pipeline(program, [ReplaceAttention.configure({"normalizer": normalizer}), InsertNeurons()], CONTEXT)
    leak = after.tensor_or_none("h.0.attn.ssa.leak")
    size = after.tensor("h.0.attn.k.threshold").shape[0] if normalizer == "channel-leak" else 2
    assert (tuple(leak.shape) if leak is not None else None) == ((size,) if "leak" in normalizer else None)
    assert after(program.example).isfinite().all()


@given(st.integers(0, 999), st.sampled_from([1, 2, 5]), st.sampled_from([3, 16, 21, 40]))
def test_products_by_decay_add_up_to_spiking_attention(seed: int, steps: int, length: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randint(-1, 2, (steps, length, n), generator=generator).double() for n in (3, 3, 2))
    o = torch.randn(length, 2, generator=generator, dtype=torch.float64)
    parts = list(products_by_decay(q, k, v, o))
    z = torch.cat([z.view(len(LEAKS), 3, -1, 2) for z, _ in parts], dim=2)
    assert torch.equal(torch.cat([seen for _, seen in parts]).view(length, 2), o)
    chosen = torch.randint(0, len(LEAKS), (3,), generator=generator)
    leak = torch.tensor(LEAKS, dtype=torch.float64)[chosen]
    expected = spiking_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), 1, 1, leak).mean(0)[0]
    torch.testing.assert_close(z[chosen, torch.arange(3)].sum(0), expected, rtol=1e-9, atol=1e-9)


@given(st.integers(0, 999))
def test_best_decays_end_where_no_single_channel_gains(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    decays, size, rows = 4, 3, 30
    z = torch.randn(decays * size, rows, generator=generator, dtype=torch.float64)
    o = torch.randn(rows, generator=generator, dtype=torch.float64) + z[[1, 7, 11]].sum(0)

    def explained(chosen: Tensor) -> float:
        y = z[chosen * size + torch.arange(size)].sum(0)
        return float((y @ o) ** 2 / (y @ y))

    chosen = best_decays(z @ o, z @ z.T, decays, 0)
    best = explained(chosen)
    assert best >= explained(torch.zeros(size, dtype=torch.long))
    for d in range(size):
        for other in range(decays):
            moved = chosen.clone()
            moved[d] = other
            assert explained(moved) <= best * (1 + 1e-9)


def test_windows_are_spread_over_the_text() -> None:
    batches = [torch.arange(n * 100, n * 100 + 24).view(3, 8) for n in range(4)]  # 12 windows of 8 tokens
    chosen = spread_windows(Calibration.of(*batches), 40)
    assert [int(w[0, 0]) for w in chosen] == [0, 100, 200, 216, 316]
    assert len(spread_windows(Calibration.of(*batches), 10**6)) == 12
    assert [w.shape for w in spread_windows(Calibration.of(*batches), 1)] == [(1, 8)]


def test_leaks_are_chosen_for_the_blocks_that_have_one() -> None:
    given = context(**{"transformer.h.1.*": {"normalizer": "leak"}})
    after = run_pipeline(calibrated(), [ReplaceAttention()], given)
    assert set(after.history[-1].notes["leaks"]) == {"transformer.h.1"}
    assert count_ops(after)["ntc.position_scale"] == 1
    assert after.tensor_or_none("transformer.h.0.attn.ssa.leak") is None


# --------------------------------------------------------------------------------------------------- leaky neurons


def test_lif_neurons_with_their_time_constants() -> None:
    after = replaced("lif current")
    assert {n.meta[NEURON] for n in after.graph.nodes if NEURON in n.meta} == {
        NeuronSpec("lif", steps=4, v0=0.0, tau=1.5, role=role) for role in "qkv"
    }
    plain = run_pipeline(calibrated(n_layer=1), [ReplaceAttention.configure({"signed_value": False})], CONTEXT)
    for role in "qkv":  # fires at every step from the same current on: theta of IF, tau theta of LIF
        theta = plain.tensor(f"{PREFIX}.{role}.threshold")
        torch.testing.assert_close(after.tensor(f"{PREFIX}.{role}.threshold") * 1.5, theta)
    folded = run_pipeline(after, [FoldThresholds()])
    spiking = check_pass(InsertNeurons(), folded, sites=3, ops_after={"ntc.leaky_integrate_fire": 3, "ntc.integrate_fire": 0})
    for role in "qkv":
        tau, v0 = spiking.tensor(f"{PREFIX}.{role}.tau"), spiking.tensor(f"{PREFIX}.{role}.v0")
        assert torch.equal(tau, torch.full((32,), 1.5))
        assert torch.equal(v0, torch.zeros(32))
        assert tau.requires_grad
        assert bool((spiking.tensor(f"{PREFIX}.{role}.threshold") == 1).all())
    with torch.no_grad():
        unfolded = run_pipeline(after, [InsertNeurons()])
        torch.testing.assert_close(spiking(spiking.example), unfolded(spiking.example), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (NeuronSpec("lif", signed=True, tau=2.0, role="v"), "a leaky neuron is binary, and node %h_0_attn_attention_v_rate .* asks for a ternary one"),
        (NeuronSpec("lif", role="v"), "needs a time constant of at least one step, and node %h_0_attn_attention_v_rate .* has tau = None"),
        (NeuronSpec("lif", tau=0.5, role="v"), "has tau = 0.5"),
    ],
)
def test_a_leaky_annotation_that_cannot_be_is_an_error(spec: NeuronSpec, message: str) -> None:
    program = replaced("position").copy()
    program.find("h_0_attn_attention_v_rate").meta[NEURON] = spec
    with pytest.raises(PassError, match=message):
        run_pipeline(program, [InsertNeurons()])


@pytest.mark.parametrize("variant", ["learned-position", "channel-leak", "leak-rms", "row-sum", "lif"])
def test_a_compiled_folder_holds_every_variant(variant: str, tmp_path: Path) -> None:
    spiking = run_pipeline(replaced(variant), [InsertNeurons()])
    save(spiking, tmp_path, analog=calibrated(n_layer=1), about={})
    seal(tmp_path)
    back = load(tmp_path)
    assert torch.equal(back(spiking.example), spiking(spiking.example))
    specs = [{n.name: n.meta[NEURON] for n in p.graph.nodes if NEURON in n.meta} for p in (back, spiking)]
    assert specs[0] == specs[1] != {}
