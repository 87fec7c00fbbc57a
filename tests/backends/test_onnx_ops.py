"""Each op's ONNX function, alone in stock ONNX Runtime, gives what its kernel gives."""

from __future__ import annotations

import pytest
import torch
from onnx_cases import KINDS, SHAPES, numbers, run_op, thresholds, words

import ntc.ops as ops
import ntc_backends.onnx_export  # noqa: F401  registers the handlers of the integer grade, whatever ran before
from ntc_backends.onnx_writer import HANDLERS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("signed", [False, True])
def test_integrate_fire_gives_the_bits_of_the_kernel(signed: bool, timed: bool, kind: str) -> None:
    for b, length, c in SHAPES:
        for steps, v0 in ((1, torch.tensor([0.5])), (4, torch.full((c,), 0.5)), (7, torch.linspace(0.1, 0.9, c))):
            x, theta = numbers(kind, *([steps] if timed else []), b, length, c), thresholds(kind, c)
            expected = ops.integrate_fire(x, theta, v0, steps, signed, timed, "atan", 1.0)
            got = run_op(torch.ops.ntc.integrate_fire.default, [x, theta, v0], 4, words(signed=signed, timed=timed),
                         steps=steps, signed=int(signed), timed=int(timed))  # fmt: skip
            assert torch.equal(got, expected)
            assert expected.any()


def test_integrate_fire_counts_are_those_of_the_closed_form() -> None:
    from ntc.ops.if_neuron import count_oracle

    x, theta, v0 = numbers("dyadic", 2, 5, 16), torch.tensor([0.25, 0.5, 1.0, 2.0] * 4), torch.arange(16) / 16
    for signed in (False, True):
        got = run_op(torch.ops.ntc.integrate_fire.default, [x, theta, v0], 4, words(signed=signed),
                     steps=8, signed=int(signed), timed=0)  # fmt: skip
        assert torch.equal(got.sum(0).double(), count_oracle(x, theta, v0, 8, signed))


def test_one_threshold_for_all_channels() -> None:
    x, theta = numbers("random", 2, 3, 8), torch.tensor([0.7])
    for v0 in (torch.tensor([0.5]), torch.linspace(0.0, 1.0, 8)):
        got = run_op(torch.ops.ntc.integrate_fire.default, [x, theta, v0], 4, steps=4, signed=0, timed=0)
        assert torch.equal(got, ops.integrate_fire(x, theta, v0, 4, False, False, "atan", 1.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("hard", [False, True])
def test_leaky_integrate_fire_gives_the_bits_of_the_kernel(hard: bool, timed: bool, kind: str) -> None:
    for b, length, c in SHAPES:
        for steps, tau in ((1, 2.0), (4, 1.0), (4, 2.0), (7, 2.7)):
            x, theta = numbers(kind, *([steps] if timed else []), b, length, c), thresholds(kind, c)
            constants = [theta, torch.full((c,), tau), torch.full((1,), 0.25)]
            expected = ops.leaky_integrate_fire(x, *constants, steps, hard, timed, "atan", 1.0)
            got = run_op(torch.ops.ntc.leaky_integrate_fire.default, [x, *constants], 4, words(hard_reset=hard, timed=timed),
                         steps=steps, hard_reset=int(hard), timed=int(timed))  # fmt: skip
            assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_rates_and_position_scale_give_the_bits_of_the_kernel(kind: str) -> None:
    for b, length, c in SHAPES:
        x, theta = numbers(kind, b, length, c), thresholds(kind, c)
        for signed in (False, True):
            got = run_op(torch.ops.ntc.if_rate.default, [x, theta], 3, signed=int(signed))
            assert torch.equal(got, ops.if_rate(x, theta, signed))
        for y in (x, numbers(kind, 4, b, length, c)):
            assert torch.equal(run_op(torch.ops.ntc.position_scale.default, [y], y.dim()), ops.position_scale(y))


@pytest.mark.parametrize("code", ["rate", "count", "phase"])
def test_decode_is_exact_for_spikes_and_to_rounding_for_currents(code: str) -> None:
    for steps in (1, 3, 4, 8, 16):
        for b, length, c in SHAPES:
            spikes = torch.randint(-1, 2, (steps, b, length, c)).float()
            assert torch.equal(run_op(torch.ops.ntc.decode.default, [spikes], 3, code, code=code), ops.decode(spikes, code))
            current = torch.randn(steps, b, length, c)
            got, expected = run_op(torch.ops.ntc.decode.default, [current], 3, code, code=code), ops.decode(current, code)
            # T rounding errors of half an ulp at most; torch itself adds in an order that depends on the shape.
            assert float((got - expected).abs().max()) <= steps * 2**-24 * float(current.abs().sum(0).max())
            if code == "rate" and steps <= 4:
                assert torch.equal(got, expected)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_spiking_attention_is_exact_on_integers(kv_heads: int) -> None:
    for lead in ((4, 2), (3,)):  # spikes [T, B, L, C] and rates [B, L, C]
        for length in (1, 6, 300):  # 300 tokens: the kernel works in chunks, the function does not
            q, k, v = (torch.randint(-1, 2, (*lead, length, 5 * n)).float() for n in (4, kv_heads, kv_heads))
            got = run_op(torch.ops.ntc.spiking_attention.default, [q, k, v], q.dim(), heads=4, kv_heads=kv_heads)
            assert torch.equal(got, ops.spiking_attention(q, k, v, 4, kv_heads))


def test_values_may_be_wider_than_keys() -> None:
    q, k, v = (torch.randint(-1, 2, (2, 2, 6, n)).float() for n in (12, 6, 10))
    got = run_op(torch.ops.ntc.spiking_attention.default, [q, k, v], 4, heads=4, kv_heads=2)
    assert torch.equal(got, ops.spiking_attention(q, k, v, 4, 2))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_spiking_attention_with_a_leak_agrees_to_rounding(kv_heads: int) -> None:
    for lead in ((4, 2), (3,)):
        for size, length in ((1, 70), (kv_heads, 70), (kv_heads * 5, 70), (kv_heads * 5, 1)):
            leak = torch.linspace(0.05, 0.99, size)
            q, k, v = (torch.randint(-1, 2, (*lead, length, n)).float() for n in (20, 5 * kv_heads, 3 * kv_heads))
            got = run_op(torch.ops.ntc.spiking_attention.default, [q, k, v, leak], q.dim(), "leak", heads=4, kv_heads=kv_heads)
            expected = ops.spiking_attention(q, k, v, 4, kv_heads, leak)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_agrees_to_rounding(kv_heads: int) -> None:
    for length in (1, 7):
        q, k, v = (torch.randn(2, length, 5 * n) for n in (4, kv_heads, kv_heads))
        got = run_op(torch.ops.ntc.attention.default, [q, k, v], 3, heads=4, kv_heads=kv_heads, scale=0.3)
        torch.testing.assert_close(got, ops.attention(q, k, v, 4, kv_heads, 0.3), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (1, 0.0), (3, 0.0), (99, 0.0), (0, 0.6), (3, 0.6)])
def test_windowed_attention_agrees_to_rounding(window: int, softcap: float) -> None:
    for length in (1, 7):
        q, k, v = (torch.randn(2, length, 5 * n) for n in (4, 2, 2))
        got = run_op(
            torch.ops.ntc.windowed_attention.default, [q, k, v], 3, heads=4, kv_heads=2, scale=0.3, window=window, softcap=softcap
        )
        torch.testing.assert_close(got, ops.windowed_attention(q, k, v, 4, 2, 0.3, window, softcap), rtol=0, atol=2e-6)


def test_every_op_of_a_finished_program_has_a_function() -> None:
    without = {str(s.target) for s in ops.SPECS.values() if s.onnx is None and s.target not in HANDLERS}
    assert not {target for target in without if target.startswith("ntc.")}
