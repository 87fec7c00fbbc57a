"""Encoder neurons and Hadamard transforms in ONNX Runtime: the same bits as the kernels."""

from __future__ import annotations

import pytest
import torch
from onnx_cases import run_op

from ntc.ops import encode, hadamard, token_step
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
    assert torch.equal(run_op(torch.ops.ntc.token_step.default, [x], 3, factor=0.03), token_step(x, 0.03))


@pytest.mark.parametrize("n", [1, 8, 4, 24, 16, 12])
def test_hadamard(n: int) -> None:
    core, k = hadamard_core(n)
    x = torch.randint(-8, 9, (2, 3, 48), generator=torch.Generator().manual_seed(0)).float()  # whole numbers: sums are exact
    assert torch.equal(run_op(torch.ops.ntc.hadamard.default, [x, core], 3, doublings=k), hadamard(x, core, k))
