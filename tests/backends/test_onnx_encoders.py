"""Encoder neurons and Hadamard transforms in ONNX Runtime: the same bits as the kernels."""

from __future__ import annotations

import pytest
import torch
from onnx_cases import run_op

from ntc.ops import coded_attention, digit_neuron, encode, hadamard, spike_linear, token_step
from ntc.ops.digit_neuron import digit_thresholds, digit_weights
from ntc.ops.hadamard import hadamard_core

X = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("code", ["count", "phase"])
@pytest.mark.parametrize("shape", [(1,), (48,), (2, 3, 1)])
def test_encode(code: str, shape: tuple[int, ...]) -> None:
    step = torch.full(shape, 0.07)
    assert torch.equal(run_op(torch.ops.ntc.encode.default, [X, step], 4, code, steps=5, code=code), encode(X, step, 5, code))


def test_token_step() -> None:
    x = X.clone()
    x[0, 0] = 0
    assert torch.equal(run_op(torch.ops.ntc.token_step.default, [x], 3, factor=0.03, groups=1), token_step(x, 0.03))


@pytest.mark.parametrize("n", [1, 8, 4, 24, 16, 12])
def test_hadamard(n: int) -> None:
    core, k = hadamard_core(n)
    x = torch.randint(-8, 9, (2, 3, 48), generator=torch.Generator().manual_seed(0)).float()  # whole numbers: sums are exact
    assert torch.equal(run_op(torch.ops.ntc.hadamard.default, [x, core], 3, doublings=k), hadamard(x, core, k))


@pytest.mark.parametrize(("base", "price"), [(3.0, 0.0), (2.0, 1.0), (2.5, 0.0)])
@pytest.mark.parametrize("shape", [(1,), (48,), (2, 3, 1), (2, 3, 6)])
@pytest.mark.parametrize("bounds", [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5)])
def test_digit_neuron(base: float, price: float, shape: tuple[int, ...], bounds: tuple[float, float]) -> None:
    step, w = torch.full(shape, 0.0625), digit_weights(base, 4)
    tables, per_token = (torch.tensor(w), torch.tensor(digit_thresholds(w, price))), len(shape) > 1
    overload, given = "per_token" if per_token else "", {"per_token": int(per_token), "low": bounds[0], "high": bounds[1]}
    got = run_op(torch.ops.ntc.digit_neuron.default, [X, step, *tables], 4, overload, **given)
    assert torch.equal(got, digit_neuron(X, step, *tables, per_token, *bounds))


def test_token_step_of_heads() -> None:
    assert torch.equal(run_op(torch.ops.ntc.token_step.default, [X], 3, factor=0.03, groups=6), token_step(X, 0.03, 6))


def _digits(x: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    w = digit_weights(3.0, 4)
    weights, thresholds = torch.tensor(w), torch.tensor(digit_thresholds(w))
    step = token_step(x, 1 / sum(w), groups)
    return digit_neuron(x, step, weights, thresholds, True), step, weights, thresholds


@pytest.mark.parametrize("has_step", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_spike_linear(has_step: bool, has_bias: bool) -> None:
    spikes, step, weights, _ = _digits(X, 1)
    matrix, bias = torch.randn(7, 48, generator=torch.Generator().manual_seed(1)), torch.arange(7.0)
    given = [spikes, weights, matrix, *[step] * has_step, *[bias] * has_bias]
    overload = ".".join(word for word, on in (("bias", has_bias), ("step", has_step)) if on)
    got = run_op(torch.ops.ntc.spike_linear.default, given, 3, overload)
    expected = spike_linear(spikes, weights, matrix, step if has_step else None, bias if has_bias else None)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("per_token", [True, False])
def test_coded_attention(heads: int, kv_heads: int, per_token: bool) -> None:
    """The same numbers where no numerator lies within rounding of a threshold: these do not."""
    generator = torch.Generator().manual_seed(2)
    values = [torch.randn(2, 9, n * 8, generator=generator) for n in (heads, kv_heads, kv_heads)]
    coded = [_digits(x, n) for x, n in zip(values, (heads, kv_heads, kv_heads), strict=True)]
    trains, steps, (weights, thresholds) = [c[0] for c in coded], [c[1] for c in coded], coded[0][2:]
    if not per_token:
        steps = [torch.full((heads * 8,), 0.05), torch.tensor([0.06]), torch.linspace(0.04, 0.08, kv_heads * 8)]
    given = [*trains, *steps, weights, weights, thresholds]
    numbers = {"heads": heads, "kv_heads": kv_heads, "scale": 0.35, "per_token": int(per_token)}
    got = run_op(torch.ops.ntc.coded_attention.default, given, 3, "per_token" if per_token else "", **numbers)
    expected = coded_attention(*given, heads, kv_heads, 0.35, per_token)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
