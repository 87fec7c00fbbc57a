"""Digits in the passes: what linear layers read, and the products of attention."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from family_cases import analog
from programs import CONTEXT, canonical

from ntc.energy import measure_energy
from ntc.errors import ConfigError, PassError
from ntc.meta import TYPE
from ntc.pipeline import Context, Override, run_pipeline
from ntc.program import Program
from ntc.spike_type import SpikeType
from ntc.testing import check_pass, count_ops, example_ids
from ntc.text import Tokens
from ntc_passes.digits import BASES, Digits, learned_base, range_of
from ntc_passes.encode_linears import EncodeLinears
from ntc_passes.spike_functions import KINDS, SpikeFunctions
from ntc_passes.spike_products import SpikeProducts

NEURON, LINEAR, ATTENTION = (getattr(torch.ops.ntc, n).default for n in ("digit_neuron", "spike_linear", "coded_attention"))


def source(name: str) -> Program:
    return canonical() if name == "gpt2" else analog(name)


@cache
def made(name: str, *passes: type, **options: object) -> Program:
    given = [p.configure({**options, **({"code": "digits"} if p is EncodeLinears else {})}) for p in passes]
    return run_pipeline(source(name), given, CONTEXT)


def drift(program: Program, name: str) -> float:
    ids = example_ids(length=12, seed=3)
    with torch.no_grad():
        expected, got = source(name)(ids), program(ids)
    return float((got - expected).norm() / expected.norm())


def test_every_attention_is_driven_by_spikes() -> None:
    after = check_pass(
        SpikeProducts(), analog("llama"), ops_before={"ntc.attention": 2},
        ops_after={"ntc.coded_attention": 2, "ntc.digit_neuron": 6, "ntc.token_step": 6, "ntc.hadamard": 4, "ntc.attention": 0}, sites=2,
        missed=[],
    )  # fmt: skip
    node = after.find("layers_0_self_attn_attention")
    assert node.target is ATTENTION
    assert [a.name for a in node.args[:3]] == [f"{node.name}_{r}_spikes" for r in "qkv"]
    assert all(a.meta[TYPE] == SpikeType(4, "fitted", "ternary") for a in node.args[:3])
    assert node.args[3].meta["val"].shape[-1] == node.args[9], "a step per token and head"


def test_every_linear_layer_reads_digits() -> None:
    after = made("llama", EncodeLinears)
    ops = count_ops(after)
    assert (ops["ntc.spike_linear"], ops["ntc.digit_neuron"], ops["ntc.token_step"]) == (15, 9, 9) and "linear" not in ops
    assert after.history[-1].notes == {"layers": 15, "encoders": 9}
    tables = [n for n in after.tensors if n.startswith("digits.")]
    assert len(tables) == 2, "all sites share one number system"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("passes", [(EncodeLinears,), (SpikeProducts,), (SpikeProducts, EncodeLinears)])
def test_errors_fall_threefold_with_each_digit(name: str, passes: tuple[type, ...]) -> None:
    few, more = (drift(made(name, *passes, steps=t), name) for t in (4, 8))
    assert more < few / 3**4 * 2, "two times what the step says"
    assert few > 1e-3, "four digits are an approximation"


@pytest.mark.parametrize("scale", ["static", "channel"])
def test_steps_that_are_known_measure_nothing(scale: str) -> None:
    after = made("llama", SpikeProducts, EncodeLinears, steps=8, scale=scale)
    ops = count_ops(after)
    assert not {"ntc.token_step", "ntc.hadamard"} & set(ops)
    node = after.find("layers_0_self_attn_attention")
    assert len(node.args) == 12 and node.args[3].meta["val"].shape[0] == (1 if scale == "static" else 32)
    weight, plain = after.tensor("model.layers.0.self_attn.q_proj.weight"), analog("llama").tensor("model.layers.0.self_attn.q_proj.weight")
    step = after.tensor("layers_0_input_layernorm.step")
    torch.testing.assert_close(weight, plain * step)


def test_outliers_have_neurons_of_their_own() -> None:
    one = made("gpt2", EncodeLinears, steps=4, scale="static", split=95.0)
    two = made("gpt2", EncodeLinears, steps=4, scale="static", ranges=2, split=95.0)
    ops = count_ops(two)
    assert ops["ntc.spike_linear"] == 2 * count_ops(one)["ntc.spike_linear"] and ops["ntc.digit_neuron"] == 2 * count_ops(one)["ntc.digit_neuron"]
    neuron = two.find("h_0_ln_1_spikes")
    outlier = two.find("h_0_ln_1_outlier_spikes")
    assert neuron.args[6] == outlier.args[5] > 0 and outlier.args[6] == 0.0
    assert float(two.tensor("h_0_ln_1.step")) < 0.7 * float(one.tensor("h_0_ln_1.step")), "normal values are told more finely"
    assert drift(two, "gpt2") < drift(one, "gpt2")


def test_a_learned_base_has_the_least_error() -> None:
    generator = torch.Generator().manual_seed(0)
    even = torch.rand(512, 16, generator=generator) * 2 - 1
    gathered = torch.randn(512, 16, generator=generator) ** 3
    for rows in (even, gathered):
        top = range_of(rows, "static", 100.0, 1.0)
        chosen = learned_base([(rows, top)], 4, 0.0)
        errors = {b: Digits(b, 4).error(rows, top / Digits(b, 4).most) for b in BASES}
        assert errors[chosen] == min(errors.values())
    assert learned_base([(even, range_of(even, "static", 100.0, 1.0))], 4, 0.0) == 3.0, "evenly spread values: the most levels"
    after = made("llama", SpikeProducts, EncodeLinears, steps=3, base="learned")
    assert set(after.history[-1].notes["bases"].values()) <= set(BASES) and len(after.history[-1].notes["bases"]) == 9
    assert drift(after, "llama") <= drift(made("llama", SpikeProducts, EncodeLinears, steps=3), "llama") * 1.1


def test_a_price_saves_spikes() -> None:
    def events(price: float) -> float:
        after = made("llama", EncodeLinears, steps=6, base=2.0, price=price)
        return measure_energy(after, analog("llama"), Tokens(example_ids(length=12, seed=3), "some", "")).snn.total().spikes

    assert events(1.0) < 0.95 * events(0.0)


# ------------------------------------------------------------------------------------------------------- attention that is open


@cache
def opened(name: str, **options: object) -> Program:
    """Softmax of few-spikes neurons, fine enough not to be what is seen."""
    given = {"softmax": "spiking", "steps": 14, "intervals": 256, **options}
    return run_pipeline(source(name), [SpikeFunctions.configure(given)], CONTEXT)


@pytest.mark.parametrize("scale", ["token", "static", "channel"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_open_attention_is_coded_product_by_product(name: str, scale: str) -> None:
    n = 2 if name == "llama" else 1
    token = n if scale == "token" else 0
    after = check_pass(
        SpikeProducts.configure({"steps": 8, "scale": scale}), opened(name), context=CONTEXT, sites=2 * n, missed=[],
        ops_before={"ntc.causal_scores": n, "ntc.weighted_values": n, "ntc.fs_neuron": 2 * n},
        ops_after={
            "ntc.causal_scores": 0, "ntc.weighted_values": 0, "ntc.fs_neuron": 2 * n, "ntc.coded_scores": n, "ntc.coded_values": n,
            "ntc.digit_neuron": 4 * n, "ntc.token_step": n + 3 * token, "ntc.key_scale": token, "ntc.hadamard": 2 * token,
        },
    )  # fmt: skip
    node = next(n for n in after.graph.nodes if n.target is torch.ops.ntc.coded_values.default)
    assert [a.name for a in node.args[:2]] == [f"{node.name}_p_spikes", f"{node.name}_v_spikes"]
    assert node.args[0].meta[TYPE] == SpikeType(8, "fitted", "ternary") and node.args[8] == (4 if name == "mistral" else 0)
    assert 1e-5 < drift(after, name) < (3e-3 if scale == "token" else 0.3)


def test_with_open_attention_the_network_is_that_of_coded_attention() -> None:
    """The same digits of queries, keys, values and numerators, but for numerators that neurons moved over a threshold."""
    whole, parts = made("llama", SpikeProducts, steps=6), run_pipeline(opened("llama"), [SpikeProducts.configure({"steps": 6})])
    ids = example_ids(length=12, seed=3)
    with torch.no_grad():
        apart = float((whole(ids) - parts(ids)).norm() / whole(ids).norm())
    assert apart < drift(whole, "llama") / 2
    for role in "qk":  # in front of the first softmax nothing differs
        names = [f"layers_0_self_attn_attention_{role}_{what}" for what in ("hadamard", "step", "spikes")]
        assert [str(whole.find(n).args) for n in names] == [str(parts.find(n).args) for n in names]


def test_windows_are_opened_and_caps_are_not() -> None:
    after = check_pass(
        SpikeProducts.configure({"steps": 10}), analog("mistral"), ops_before={"ntc.windowed_attention": 1}, sites=1, missed=[],
        ops_after={"ntc.windowed_attention": 0, "ntc.coded_scores": 1, "softmax": 1, "ntc.coded_values": 1, "ntc.digit_neuron": 4},
    )  # fmt: skip
    assert drift(after, "mistral") < 1e-3
    exact = check_pass(SpikeFunctions.configure({"softmax": "spiking", "steps": 12, "intervals": 64}), after, ops_after={"softmax": 0, "ntc.coded_scores": 1})
    assert drift(exact, "mistral") < 1e-2
    with pytest.raises(PassError, match="spike-products found none of its sites"):
        run_pipeline(analog("gemma2"), [SpikeProducts()])
    mixed = Context(CONTEXT.calibration, [Override("model.layers.0.self_attn", {"convert": False})])
    left = run_pipeline(opened("llama"), [SpikeProducts()], mixed)
    stem = "layers_0_self_attn_attention"
    assert [name for name, _ in left.history[-1].missed] == [f"{stem}_scores", stem]
    assert count_ops(left)["ntc.causal_scores"] == count_ops(left)["ntc.coded_scores"] == 1


def test_learned_bases_of_open_attention() -> None:
    after = run_pipeline(opened("llama"), [SpikeProducts.configure({"steps": 3, "base": "learned"})], CONTEXT)
    stems = [f"layers_{i}_self_attn_attention" for i in (0, 1)]
    assert after.history[-1].notes["bases"].keys() == {f"{s}{part}" for s in stems for part in ("", "_scores")}, "values apart from queries and keys"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_everything_may_be_spiking(name: str) -> None:
    """No dense product, no exp, root, division or gate is left; finer is nearer, through all of them."""
    errors = []
    for steps, intervals in ((6, 32), (10, 128)):
        passes = [
            SpikeFunctions.configure({**dict.fromkeys(KINDS, "spiking"), "steps": steps, "intervals": intervals}),
            SpikeProducts.configure({"steps": steps}), EncodeLinears.configure({"steps": steps, "code": "digits"}),
        ]  # fmt: skip
        after = run_pipeline(source(name), passes, CONTEXT)
        errors.append(drift(after, name))
    assert errors[1] < errors[0] / 8 and errors[1] < 5e-3
    left = {"linear", "rms_norm", "layer_norm", "silu", "gelu", "softmax", "exp", "rsqrt", "div", "ntc.attention", "ntc.causal_scores", "ntc.weighted_values"}
    assert not left & count_ops(after).keys()
    report = measure_energy(after, source(name), Tokens(example_ids(length=12, seed=3), "some", ""))
    assert report.uncounted() == [] and report.snn.total().macs == 0
    weights = next(n for n in report.to_json()["nodes"]["snn"] if n["op"] == "ntc.digit_neuron" and n["node"].endswith("_attention_p_spikes"))
    assert weights["spikes"] > 0 and weights["neurons"] > 0, "numerators are a population like all others"


def test_everything_is_counted() -> None:
    after = made("llama", SpikeProducts, EncodeLinears)
    ids = example_ids(length=12, seed=3)
    report = measure_energy(after, analog("llama"), Tokens(ids, "some", ""))
    assert report.to_json()["uncounted_share"] == 0
    ann, snn = report.ann.total(), report.snn.total()
    assert snn.dense_macs == pytest.approx(ann.dense_macs) and snn.macs == 0 and snn.acs > 0


def test_overrides_and_what_is_left() -> None:
    context = Context(CONTEXT.calibration, [Override("model.layers.1.self_attn", {"convert": False})])
    after = run_pipeline(analog("llama"), [SpikeProducts()], context)
    assert count_ops(after)["ntc.attention"] == count_ops(after)["ntc.coded_attention"] == 1
    assert [name for name, _ in after.history[-1].missed] == ["layers_1_self_attn_attention"]


def test_bad_settings() -> None:
    for options, said in (
        ({"base": 3.5}, "larger than 1 and at most 3"), ({"base": "best"}, "or 'learned', got 'best'"), ({"price": -1.0}, "at least 0, got -1.0"),
        ({"steps": 0}, "steps must be a whole number of at least 1"), ({"steps": 16}, "have 1 to 15 time steps, got 16"),
        ({"scale": "head"}, "'token', 'channel' or 'static', got 'head'"), ({"ratio": 0}, "ratio must be a positive number"),
    ):  # fmt: skip
        for one in (SpikeProducts, EncodeLinears):
            with pytest.raises(ConfigError, match=said):
                one.configure({**options, **({"code": "digits"} if one is EncodeLinears else {})})
    with pytest.raises(ConfigError, match="two ranges need code = digits and a scale that is known in advance"):
        EncodeLinears.configure({"ranges": 2})
    with pytest.raises(ConfigError, match="probability_steps must be a whole number of at least 0"):
        SpikeProducts.configure({"probability_steps": -1})
    with pytest.raises(PassError, match="spike-products measures on calibration text: give --calibration FILE"):
        run_pipeline(analog("llama"), [SpikeProducts.configure({"scale": "static"})])
