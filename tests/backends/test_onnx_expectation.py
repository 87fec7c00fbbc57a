"""Multi-threshold neurons and expectations in ONNX Runtime: events are the same bits as the kernels', values up to rounding."""

from __future__ import annotations

import pytest
import torch
from onnx_cases import numbers, run_op, thresholds

from ntc.ops import expectation, mt_neuron


@pytest.mark.parametrize("kind", ["random", "dyadic"])
@pytest.mark.parametrize("timed", [False, True])
def test_multi_threshold(kind: str, timed: bool) -> None:
    x, theta = numbers(kind, *([5] if timed else []), 2, 3, 12), thresholds(kind, 12) / 4
    got = run_op(torch.ops.ntc.mt_neuron.default, [x, theta], 4, "timed" if timed else "", steps=5, levels=4, timed=int(timed))
    assert torch.equal(got, mt_neuron(x, theta, 5, 4, timed)) and len(got.unique()) > 5


@pytest.mark.parametrize(("function", "tables"), [("silu", 0), ("gelu", 0), ("gelu_tanh", 0), ("softmax", 0), ("rms_norm", 0), ("rms_norm", 1),
                                                  ("layer_norm", 0), ("layer_norm", 1), ("layer_norm", 2)])  # fmt: skip
def test_expectation(function: str, tables: int) -> None:
    x, given = numbers("random", 5, 2, 3, 12), [numbers("random", 12) for _ in range(tables)]
    overload = ".".join((function, *("weight", "bias")[:tables]))
    got = run_op(torch.ops.ntc.expectation.default, [x, *given], 4, overload, function=function, eps=1e-5)
    torch.testing.assert_close(got, expectation(x, function, 1e-5, *given), rtol=1e-4, atol=2e-5)
