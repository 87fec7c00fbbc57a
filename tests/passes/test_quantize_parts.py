"""The parts of quantize: compensated rounding against the formula column by column, scales, tables of leaks, and every refusal."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from programs import CALIBRATION, CONTEXT, calibrated, spiking
from torch import Tensor

from ntc.errors import ConfigError, PassError
from ntc.meta import building
from ntc.ops import aten
from ntc.pipeline import Context, run_pipeline
from ntc.program import Program
from ntc.verify import verify
from ntc_passes.convert_ffn import ConvertFfn
from ntc_passes.fold_thresholds import FoldThresholds
from ntc_passes.insert_neurons import InsertNeurons
from ntc_passes.quantize import Quantize
from ntc_passes.quantize.activations import best_scale
from ntc_passes.quantize.attention import leak_in_integers
from ntc_passes.quantize.compensation import compensated, rounded, weight_scales
from ntc_passes.quantize.fixed_point import fixed_point, shift_for, short_scales, short_unit
from ntc_passes.replace_attention import ReplaceAttention


def correlated(channels: int, rows: int = 400) -> Tensor:
    """Second moments of inputs that move together."""
    x = torch.randn(rows, channels, dtype=torch.float64) @ torch.randn(channels, channels, dtype=torch.float64)
    return x.T @ x / rows


# ------------------------------------------------------------------------------------------------ rounding of weights


def one_by_one(weight: Tensor, hessian: Tensor, limit: int) -> Tensor:
    """Optimal brain quantization as it is defined: after each column the inverse of what is left of H, and an update of all others."""
    damped = hessian + torch.eye(len(hessian), dtype=torch.float64) * 0.01 * float(hessian.diagonal().mean())
    order = torch.argsort(damped.diagonal(), descending=True, stable=True).tolist()
    w, result = weight.clone(), torch.zeros_like(weight)
    for at, i in enumerate(order):
        left = order[at:]
        inverse = torch.linalg.inv(damped[left][:, left])
        result[:, i] = torch.floor(w[:, i] + 0.5).clamp(-limit, limit)
        error = (w[:, i] - result[:, i]) / inverse[0, 0]
        for k, j in enumerate(left):
            w[:, j] -= error * inverse[0, k]
    return result


def test_compensation_is_the_formula() -> None:
    weight, hessian = torch.randn(5, 9, dtype=torch.float64) * 3, correlated(9)
    assert torch.equal(compensated(weight, hessian, 7), one_by_one(weight, hessian, 7))


def test_compensation_over_blocks_of_columns_is_nearer_than_rounding() -> None:
    weight, hessian = torch.randn(6, 300, dtype=torch.float64) * 3, correlated(300, 900)

    def error(whole: Tensor) -> float:
        wrong = whole - weight
        return float(((wrong @ hessian) * wrong).sum())

    whole = compensated(weight, hessian, 127)
    assert torch.equal(whole, whole.round())
    assert error(whole) < 0.5 * error(rounded(weight, 127))
    assert torch.equal(whole, one_by_one(weight, hessian, 127))


def test_without_correlations_there_is_nothing_to_make_up_for() -> None:
    weight = torch.randn(4, 8, dtype=torch.float64) * 50
    hessian = torch.diag(torch.rand(8, dtype=torch.float64))
    hessian[3, 3] = 0.0  # an input that was never active
    assert torch.equal(compensated(weight, hessian, 127), rounded(weight, 127))


def test_scales_of_rows() -> None:
    weight, hessian = torch.randn(3, 256, dtype=torch.float64), torch.eye(256, dtype=torch.float64)
    weight[0, 0] = 6.0  # at 4 bits, clipping it costs less than rounding all others
    weight[2] = 0.0
    least = torch.tensor([1e-9, 0.9, 0.25], dtype=torch.float64)
    scale = weight_scales(weight, hessian, 7, least)
    assert float(scale[0]) < 6.0 / 7
    assert float(scale[1]) == pytest.approx(0.9)  # the least that fits its accumulator
    assert float(scale[2]) == 0.25
    losses = {}
    for ratio in (1.0, 0.75, 0.5):
        s = 6.0 / 7 * ratio
        losses[ratio] = float((rounded(weight[:1] / s, 7) * s - weight[:1]).square().sum())
    s = float(scale[0])
    assert float((rounded(weight[:1] / s, 7) * s - weight[:1]).square().sum()) <= min(losses.values())


def test_the_scale_of_an_activation_looks_at_what_reads_it() -> None:
    rows = torch.randn(1000, 4, dtype=torch.float64)
    rows[::100, 3] *= 40.0
    everywhere, ignoring = torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    ignoring[3, 3] = 0.0
    largest = float(rows.abs().max()) / 127
    assert best_scale(rows, ignoring, 127) < 0.25 * largest <= best_scale(rows, everywhere, 127)
    assert best_scale(torch.zeros(5, 4), everywhere, 127) == 1.0


def test_factors_as_multipliers() -> None:
    factors = torch.tensor([1e-7, 0.25, 0.75, 0.9999999999], dtype=torch.float64)
    multiplier, shift = fixed_point(factors)
    assert shift == 30
    torch.testing.assert_close(multiplier.double() / 2**shift, factors, rtol=0, atol=2.0**-31)
    assert int(multiplier.max()) == 1 << 30  # the last one rounds up to a power of two, and fits
    assert shift_for(2.0**-40) == 62
    with pytest.raises(ValueError, match="no multiplier of 31 bits"):
        fixed_point(torch.tensor([2.0**30], dtype=torch.float64))


def test_multipliers_are_in_lowest_terms() -> None:
    multiplier, shift = fixed_point(torch.tensor([0.25, 0.75, 0.0], dtype=torch.float64))
    assert (multiplier.tolist(), shift) == ([1, 3, 0], 2)
    assert fixed_point(torch.tensor([12.0], dtype=torch.float64))[1] == 0


def test_scales_of_layers_that_are_only_rescaled() -> None:
    """Small multiples of a power of two, none smaller than it was, with sums that float32 holds; as they were where that is coarse."""
    scale = torch.linspace(1.0, 2.5, 300, dtype=torch.float64) * 3e-6
    most = scale * 2**20
    short = short_scales(scale, most)
    unit = 2.0 ** short_unit(short)
    assert bool((short >= scale).all()) and bool((short % unit == 0).all())
    assert float(most.max()) < 2**24 * unit and float(short.max()) <= 16 * unit
    assert float((short / scale).square().mean()) < 1.3
    assert short_unit(scale) is None
    assert torch.equal(short_scales(scale, scale * 2**23), scale)
    zero = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert float(short_scales(torch.ones(2, dtype=torch.float64), zero * 2**20)[0]) == 2.0**-3


# ------------------------------------------------------------------------------------------------ tables of leaks


@pytest.mark.parametrize(("leak", "bits"), [([0.75, 0.996], 24), ([0.9, 0.97], 24), ([1.0, 0.95], 24), ([0.05, 0.9], 31), ([1.0, 0.5], 24)])
@pytest.mark.parametrize(("context", "key_size", "steps"), [(256, 64, 4), (512, 32, 8)])
def test_periods_fit_whatever_the_spikes(leak: list[float], bits: int, context: int, key_size: int, steps: int) -> None:
    """Short where the leaks of a layer allow it, else wide; by the recursion itself, all spikes at once."""
    decay = torch.tensor(leak, dtype=torch.float64)
    made = leak_in_integers(decay, context, key_size, steps, "here")
    if (leak, context) == ([1.0, 0.5], 512):  # with 8 tokens g of the first head would be 63, and 1 / 126 is too wrong: wide
        bits = 31
    assert made.period & (made.period - 1) == 0 and made.period >= 1
    most, renewed = [0, 0], [0, 0]
    for h in range(2):  # every spike meets every other
        memory = 0
        for i in range(context):
            if i and i % made.period == 0:
                renewed[h] = max(renewed[h], memory * int(made.renewal[h]))
                memory = (memory * int(made.renewal[h]) + (1 << made.shift >> 1)) >> made.shift
            memory += int(made.growth[h, i % made.period])
            most[h] = max(most[h], memory)
    assert 2 ** (bits - 2) < max(most) * key_size * steps < 2**bits or int(made.gain.max()) == 4096
    assert bits == 31 or 2 * max(renewed) + 1 < 2**24
    assert float(made.gain.min()) >= (64 if bits == 24 else 256) and made.error <= 0.5 / float(made.gain.min())
    horizon = (made.leak - decay).abs() / (1 - decay).clamp(min=1 / context)
    assert float(horizon.max()) <= (1 / 128 if bits == 24 else 0.0)
    # A renewal takes up where the growth ends.
    torch.testing.assert_close(made.renewal.double() / 2**made.shift, made.leak**made.period, rtol=0, atol=2.0**-31)
    torch.testing.assert_close(made.growth.double() * made.factors.T, torch.ones(2, made.period).double(), rtol=made.error * 1.01, atol=0)


def test_a_memory_that_grows_for_ever_is_refused() -> None:
    with pytest.raises(PassError, match=r"memory of here does not fit into 32 bits with unlimited tokens.*choose a leak below 1"):
        leak_in_integers(torch.tensor([1.0], dtype=torch.float64), 0, 64, 4, "here")
    assert leak_in_integers(torch.tensor([0.99], dtype=torch.float64), 0, 64, 4, "here").period >= 16


# ------------------------------------------------------------------------------------------------ refusals


def converted(**options: Any) -> Program:
    policy = [ReplaceAttention.configure(options), FoldThresholds(), InsertNeurons()]
    return run_pipeline(calibrated(n_layer=1), policy, CONTEXT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalizer": "rms"}, r'rms_scale has no integer form.*normalizer = "leak".*%h_0_attn_attention_scaled'),
        ({"normalizer": "row-sum"}, r"row_sum_scale has no integer form.*%h_0_attn_attention_scaled"),
        ({"normalizer": "channel-leak"}, r'leak for each key channel has no integer form.*%h_0_attn_attention_ssa.*normalizer = "leak"'),
        ({"neuron": "lif", "signed_value": False}, r'leaky_integrate_fire has no integer form.*neuron = "if".*%h_0_attn_attention_q_spikes'),
    ],
)
def test_kinds_of_attention_without_an_integer_form(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        run_pipeline(converted(**options), [Quantize()], CONTEXT)


def test_softmax_attention_is_refused() -> None:
    program = run_pipeline(calibrated(n_layer=1), [ConvertFfn(), FoldThresholds(), InsertNeurons()], CONTEXT)
    with pytest.raises(PassError, match=r"ntc.attention has no integer form: softmax attention.*%h_0_attn_attention"):
        run_pipeline(program, [Quantize()], CONTEXT)


def edited(edit: Callable[[Program, Any], None]) -> Program:
    program = spiking(n_layer=1).copy()
    edit(program, program.find("h_0_ln_2"))
    program.refresh()
    verify(program)
    return program


def _exponential(program: Program, norm: Any) -> None:
    with building(program.graph, before=next(iter(norm.users)), stands_for=[norm], by="test") as call:
        other = call(aten.exp.default, norm, name="unknown")
    norm.replace_all_uses_with(other, delete_user_cb=lambda user: user is not other)


def _product_of_values(program: Program, norm: Any) -> None:
    with building(program.graph, before=next(iter(norm.users)), stands_for=[norm], by="test") as call:
        other = call(aten.mul.Tensor, norm, norm, name="squared")
    norm.replace_all_uses_with(other, delete_user_cb=lambda user: user is not other)


def _sum_with_a_constant(program: Program, norm: Any) -> None:
    stream = norm.args[0]
    with building(program.graph, before=norm, stands_for=[norm], by="test") as call:
        norm.update_arg(0, call(aten.add.Tensor, stream, call(program.add_tensor("shift", torch.ones(32))), name="moved"))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_exponential, "exp has no integer form: the integer grade has no such op.*%unknown"),
        (_product_of_values, "a factor.*%squared.*computed"),
        (_sum_with_a_constant, "adds two values of the residual stream, and node %moved.*something else"),
    ],
)
def test_other_ops_are_refused(edit: Callable[[Program, Any], None], message: str) -> None:
    with pytest.raises(PassError, match=message):
        run_pipeline(edited(edit), [Quantize()], CONTEXT)


def test_position_scales_need_a_context() -> None:
    program = converted()
    program.info = type(program.info)(**{**vars(program.info), "context": 0})
    with pytest.raises(PassError, match=r"needs a table as long as the context.*%h_0_attn_attention_scaled"):
        run_pipeline(program, [Quantize()], CONTEXT)


def test_what_it_needs() -> None:
    program = spiking(n_layer=1)
    with pytest.raises(PassError, match="calibration text"):
        run_pipeline(program, [Quantize()], Context())
    with pytest.raises(PassError, match="needs a program that is spiking"):
        run_pipeline(calibrated(n_layer=1), [Quantize()], CONTEXT)
    once = run_pipeline(program, [Quantize()], CONTEXT)
    with pytest.raises(PassError, match="computes with integers already"):
        run_pipeline(once, [Quantize()], CONTEXT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 5}, "weight_bits must be 4, 8 or 16"), ({"weight_bits": True}, "weight_bits must be"),
        ({"activation_bits": 17}, "from 4 to 16"), ({"activation_bits": 8.0}, "whole number"), ({"tokens": 0}, "at least 1"),
        ({"bias_correction": 1}, "true or false"),
    ],
)  # fmt: skip
def test_options_that_do_not_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Quantize.configure(options)


def test_tokens_that_are_used() -> None:
    program = spiking(n_layer=1)
    for tokens, used in ((1, 12), (30, 24), (10**6, CALIBRATION.tokens)):
        after = run_pipeline(program, [Quantize.configure({"tokens": tokens})], CONTEXT)
        assert after.history[-1].notes["tokens"] == used


def test_sums_that_32_bits_do_not_hold() -> None:
    """So many steps that no scale of the weights makes the membrane fit: refused with the place, not wrapped around."""
    program = spiking(n_layer=1).copy()
    node = program.find("h_0_mlp_act_spikes")
    steps = 1 << 20
    node.update_arg(3, steps)
    with pytest.raises(PassError, match=r"does not fit into 32 bits together with the membrane behind it: node %h_0_mlp_c_fc"):
        _walked(program)
    assert math.log2(steps) == 20


def _walked(program: Program) -> None:
    """The pass without the run in floating point, which so many steps would take all day for."""
    from ntc_passes.quantize import Options
    from ntc_passes.quantize.linear import linear
    from ntc_passes.quantize.statistics import Statistics
    from ntc_passes.quantize.walk import Value, Work

    node = program.find("h_0_mlp_c_fc")
    work = Work(program, lambda _: Options(activation_bits=16), [program.example], Statistics(), -10)
    data = [torch.zeros(2, 9, 32, dtype=torch.int16)]
    work[node.args[0]] = Value(node.args[0], "activation", torch.ones(1, dtype=torch.float64), data, bound=(1 << 15) - 1)
    linear(work, node)
