"""The two products of attention on digits in ONNX Runtime: the same numbers up to the order of sums."""

from __future__ import annotations

import pytest
import torch
from onnx_cases import run_op
from torch import Tensor

from ntc.ops import coded_scores, coded_values, digit_neuron, key_scale, token_step
from ntc.ops.digit_neuron import digit_thresholds, digit_weights

WEIGHTS = torch.tensor(digit_weights(3.0, 5))
THRESHOLDS = torch.tensor(digit_thresholds(WEIGHTS.tolist()))
CASES = [(4, 4, 0), (4, 2, 0), (6, 1, 3), (2, 2, 1)]  # H, Hk, window


def _coded(x: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    step = token_step(x, 1 / float(WEIGHTS.sum()), groups)
    return digit_neuron(x, step, WEIGHTS, THRESHOLDS, True), step


def _values(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "window"), CASES)
def test_scores(heads: int, kv_heads: int, window: int, per_token: bool) -> None:
    (q, dq), (k, dk) = (_coded(_values(2, 7, n * 8, seed=n), n) for n in (heads, kv_heads))
    if not per_token:
        dq, dk = torch.tensor([0.06]), torch.linspace(0.04, 0.08, kv_heads * 8)
    given = [q, k, dq, dk, WEIGHTS]
    numbers = {"heads": heads, "kv_heads": kv_heads, "scale": 0.35, "window": window, "per_token": int(per_token)}
    got = run_op(torch.ops.ntc.coded_scores.default, given, 3, "per_token" if per_token else "", **numbers)
    torch.testing.assert_close(got, coded_scores(*given, heads, kv_heads, 0.35, window, per_token), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("known", [None, (1,), (8,)])
@pytest.mark.parametrize(("heads", "kv_heads", "window"), CASES)
def test_values(heads: int, kv_heads: int, window: int, known: tuple[int] | None) -> None:
    p = coded_scores(*(_coded(_values(2, 7, n * 4, seed=n), n)[0] for n in (heads, kv_heads)), *[torch.tensor([0.06])] * 2, WEIGHTS, heads, kv_heads, 0.35, window).softmax(-1)
    v, step = _coded(_values(2, 7, kv_heads * 8, seed=5), kv_heads)
    sizes = {"heads": heads, "kv_heads": kv_heads}
    scaled = key_scale(p, step, heads, kv_heads)
    assert torch.equal(run_op(torch.ops.ntc.key_scale.default, [p, step], 3, **sizes), scaled)
    spikes, rows = _coded(scaled)
    given = [spikes, v, rows, scaled.sum(-1, keepdim=True), WEIGHTS, WEIGHTS]
    given += [] if known is None else [torch.linspace(0.04, 0.08, 1 if known == (1,) else kv_heads * 8)]
    got = run_op(torch.ops.ntc.coded_values.default, given, 3, "" if known is None else "value_step", window=window, **sizes)
    expected = coded_values(*given[:6], heads, kv_heads, window, *given[6:])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
