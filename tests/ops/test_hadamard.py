"""The Hadamard transform: against the matrix, for every order that models have, its additions, and its executors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import RATE, SPIKES, Constant, counts, infer, operand, random, same_layout

from ntc.ops import SPECS, Counts, TypeMismatch
from ntc.ops.hadamard import hadamard, hadamard_core, hadamard_matrix
from ntc.spike_type import ANALOG

OP = torch.ops.ntc.hadamard.default

ORDERS = (1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 40, 44, 48, 56, 60, 64, 68, 72, 76, 80, 84, 108, 140, 148, 192)
WIDTHS = {64: 1, 576: 36, 768: 12, 896: 28, 1536: 12, 2048: 1, 2560: 20, 3072: 12, 4864: 76, 8960: 140, 13824: 108, 14336: 28, 18944: 148}
"""Widths of SmolLM2, GPT-2, Qwen2.5, Llama, and the order of the core that each takes."""


@pytest.mark.parametrize("n", ORDERS)
def test_rows_are_orthogonal(n: int) -> None:
    h = hadamard_matrix(n)
    assert torch.equal(h.abs(), torch.ones(n, n))
    assert torch.equal(h @ h.T, n * torch.eye(n)), "integers: exact"


@pytest.mark.parametrize("width", WIDTHS)
def test_widths_of_models(width: int) -> None:
    core, k = hadamard_core(width)
    assert len(core) == WIDTHS[width] and len(core) << k == width
    assert torch.equal(core @ core.T, len(core) * torch.eye(len(core)))


@pytest.mark.parametrize("n", [0, 3, 6, 9, 18, 22, 172, 11008])
def test_sizes_without_a_known_matrix(n: int) -> None:
    assert hadamard_core(n) is None
    with pytest.raises(ValueError, match=f"no Hadamard matrix of size {n} is known here"):
        hadamard_matrix(n)


@given(st.sampled_from([1, 2, 8, 12, 24, 20, 36]), st.integers(1, 3), st.integers(0, 99))
def test_the_fast_form_is_the_dense_one(n, blocks, seed):
    core, k = hadamard_core(n)
    x = torch.randint(-8, 9, (2, 3, n * blocks), generator=torch.Generator().manual_seed(seed)).double()
    dense = torch.block_diag(*[hadamard_matrix(n)] * blocks).double()
    y = hadamard(x, core, k)
    assert torch.equal(y, x @ dense), "whole numbers: exact"
    assert torch.equal(y @ dense.T, n * x)


def test_additions_are_those_of_the_butterflies():
    x = torch.ones(2, 3, 24)
    assert counts(OP, [operand(x), operand(torch.ones(12, 12))], operand(x), ANALOG, Constant((12, 12)), 1) == Counts(acs=144 * (11 + 1))
    assert counts(OP, [operand(x), operand(torch.ones(1, 1))], operand(x), ANALOG, Constant((1, 1)), 3) == Counts(acs=144 * 3)


def test_gradient_opcheck_and_layout():
    for n in (4, 24):
        core, k = hadamard_core(n)
        torch.autograd.gradcheck(lambda x: hadamard(x, core, k), (random(2, 2, n),))  # noqa: B023
        torch.library.opcheck(hadamard, (random(2, 2, n, dtype=torch.float32), core, k))
        assert same_layout(hadamard, random(2, n, 3, grad=False).transpose(-1, -2), core, k)
    one = torch.ones(1, 1)
    torch.library.opcheck(hadamard, (random(2, 2, 4, dtype=torch.float32), one, 0))  # nothing to do is a copy, no view


def test_compiles_with_gradients_and_the_traced_form_is_the_same_function():
    core, k = hadamard_core(24)
    x = random(2, 3, 24, dtype=torch.float32)
    compiled = torch.compile(lambda x: hadamard(2 * x, core, k) ** 2, backend="aot_eager", fullgraph=True)(x)
    plain = hadamard(2 * x, core, k) ** 2
    assert torch.equal(plain, compiled)
    torch.testing.assert_close(torch.autograd.grad(plain.sum(), x), torch.autograd.grad(compiled.sum(), x))
    assert torch.equal(SPECS[OP].traced(x, core, k), hadamard(x, core, k))


def test_refusals():
    with pytest.raises(ValueError, match=r"square, and not \[2, 3\]"):
        hadamard(torch.ones(1, 6), torch.ones(2, 3), 0)
    with pytest.raises(ValueError, match=r"blocks of 1 x 2\^2 channels needs a multiple of them, and not 6"):
        hadamard(torch.ones(1, 6), torch.ones(1, 1), 2)
    assert infer(OP, ANALOG, Constant((1, 1)), 2) == ANALOG
    for kind in (SPIKES, RATE):
        with pytest.raises(TypeMismatch, match="takes analog values, and %x0 is"):
            infer(OP, kind, Constant((1, 1)), 2)
