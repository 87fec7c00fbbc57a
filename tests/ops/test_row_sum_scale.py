import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import CURRENT, GRADED, RATE, SPIKES, TERNARY, counts, infer, operand, random, same_layout
from torch import Tensor

from ntc.ops import SPECS, Counts, TypeMismatch, decode, row_sum_scale, spiking_attention
from ntc.spike_type import ANALOG, INDEX, CurrentType, SpikeType

OP = torch.ops.ntc.row_sum_scale.default


def spikes(*shape: int, seed: int, low: int = -1) -> Tensor:
    return torch.randint(low, 2, shape, generator=torch.Generator().manual_seed(seed)).float()


def by_loop(x: Tensor, q: Tensor, k: Tensor, heads: int, kv_heads: int) -> Tensor:
    """The docstring's equations on ``[T, B, L, C]``, one score at a time."""
    size, width, y = q.shape[-1] // heads, x.shape[-1] // heads, x.clone()
    for b in range(x.shape[1]):
        for i in range(x.shape[2]):
            for h in range(heads):
                g = h // (heads // kv_heads)
                mine, theirs = slice(h * size, (h + 1) * size), slice(g * size, (g + 1) * size)
                z = sum((q[t, b, i, mine] * k[t, b, j, theirs]).sum() for t in range(len(x)) for j in range(i + 1)) / len(x)
                y[:, b, i, h * width : (h + 1) * width] /= max(abs(z), 1.0)
    return y


@given(st.integers(1, 4), st.integers(1, 6), st.sampled_from([(1, 1), (4, 4), (4, 2), (3, 1)]), st.sampled_from([0, -1]), st.integers(0, 99))
def test_equals_the_loop(steps, length, heads, low, seed):
    q, k = (spikes(steps, 2, length, 3 * n, seed=seed + n, low=low) for n in heads)
    x = random(steps, 2, length, 2 * heads[0], grad=False, seed=seed, dtype=torch.float32)
    torch.testing.assert_close(row_sum_scale(x, q, k, *heads), by_loop(x, q, k, *heads))
    torch.testing.assert_close(row_sum_scale(x[0], q[0], k[0], *heads), by_loop(x[:1], q[:1], k[:1], *heads)[0])


@given(st.integers(0, 99))
def test_makes_weights_that_sum_to_one(seed):
    """With values of one everywhere the decoded attention is the sum of its weights."""
    q, k = (spikes(4, 2, 9, 8, seed=seed + n, low=0) for n in (0, 1))
    y = spiking_attention(q, k, torch.ones(4, 2, 9, 4), 2, 2)
    sums = decode(row_sum_scale(y, q, k, 2, 2), "rate")
    raw = decode(y, "rate")
    torch.testing.assert_close(sums, torch.where(raw >= 1, torch.ones_like(raw), raw))
    assert bool((raw >= 1).any())


def test_commutes_with_the_decode():
    q, k, x = spikes(4, 2, 5, 6, seed=0), spikes(4, 2, 5, 6, seed=1), random(4, 2, 5, 4, grad=False, dtype=torch.float32)
    scale = row_sum_scale(torch.ones_like(x), q, k, 2, 2)
    assert bool((scale == scale[:1]).all()), "one factor for all steps"
    torch.testing.assert_close(decode(row_sum_scale(x, q, k, 2, 2), "rate"), decode(x, "rate") * scale[0])


def test_counts_beyond_256_are_exact_in_bfloat16():
    q = k = torch.ones(1, 1, 300, 1, dtype=torch.bfloat16)
    y = row_sum_scale(torch.ones_like(q), q, k, 1, 1)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y.flatten(), (1 / torch.arange(1, 301)).bfloat16())


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_gradient(heads):
    # Scores of about 1 at few tokens: some rows are divided and some are not, none is at the border.
    q, k = (random(2, 2, 3, 2 * n, seed=n, low=-1.0, high=1.5) for n in heads)
    x = random(2, 2, 3, 3 * heads[0], seed=7)
    torch.autograd.gradcheck(lambda *a: row_sum_scale(*a, *heads), (x, q, k))
    torch.autograd.gradcheck(lambda *a: row_sum_scale(*a, *heads), (x[0], q[0], k[0]))
    divided = row_sum_scale(torch.ones_like(x), q, k, *heads) < 1
    assert bool(divided.any()) and not bool(divided.all())


def test_opcheck_and_layout():
    x, q, k = (random(2, 2, 3, n, dtype=torch.float32) for n in (8, 4, 2))
    torch.library.opcheck(row_sum_scale, (x, q, k, 4, 2))
    torch.library.opcheck(row_sum_scale, (x[0].detach(), q[0].detach(), k[0].detach(), 4, 2))
    assert same_layout(row_sum_scale, random(2, 2, 4, 3, grad=False).transpose(-1, -2), x[..., :2, :].new_ones(2, 2, 3, 8), torch.ones(2, 2, 3, 4), 4, 2)


def test_compiles_with_gradients():
    def f(x, q, k):
        return row_sum_scale(x, 2 * q, k, 2, 2) ** 2

    given = [random(3, 2, 3, 4, dtype=torch.float32, seed=n) for n in range(3)]
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)(*given)
    assert torch.equal(f(*given), compiled)
    torch.testing.assert_close(torch.autograd.grad(f(*given).sum(), given), torch.autograd.grad(compiled.sum(), given))


def test_shapes_that_do_not_fit_are_refused():
    x, q, k = torch.ones(2, 5, 8), torch.ones(2, 5, 4), torch.ones(2, 5, 4)
    with pytest.raises(ValueError, match="same T, B and L"):
        row_sum_scale(x, q, k[:, :4], 4, 4)
    with pytest.raises(ValueError, match="same T, B and L"):
        row_sum_scale(x[0], q[0], k[0], 4, 4)
    with pytest.raises(ValueError, match="3 key heads must divide 4 heads"):
        row_sum_scale(x, q, k, 4, 3)
    with pytest.raises(ValueError, match="4 query channels in 4 heads do not fit 4 key channels in 2"):
        row_sum_scale(x, q, k, 4, 2)


def test_types():
    assert infer(OP, CURRENT, SPIKES, TERNARY, 2, 2) == CURRENT
    assert infer(OP, ANALOG, RATE, RATE, 2, 2) == ANALOG
    for kind in (SPIKES, RATE, INDEX, CurrentType(4, "count"), ANALOG):
        with pytest.raises(TypeMismatch, match="takes a rate-coded current, or an analog value made of rates, and %x0"):
            infer(OP, kind, SPIKES, SPIKES, 2, 2)
    for kind in (GRADED, RATE, ANALOG, CURRENT):
        with pytest.raises(TypeMismatch, match="takes binary or ternary queries and keys, and %x2"):
            infer(OP, CURRENT, SPIKES, kind, 2, 2)
    with pytest.raises(TypeMismatch, match=r"sums spikes of the same steps: %x0 is current T=4 rate, %x1 is spikes T=8"):
        infer(OP, CURRENT, SpikeType(8), SPIKES, 2, 2)


def test_counting():
    x, q, k = torch.ones(4, 2, 3, 8), spikes(4, 2, 3, 8, seed=0), spikes(4, 2, 3, 4, seed=1)
    given = [operand(x, CURRENT), operand(q, SPIKES), operand(k, SPIKES)]
    assert counts(OP, given, operand(x, CURRENT), 4, 2) == Counts(elementwise=192, acs=float(q.count_nonzero() + k.count_nonzero()))
    assert counts(OP, [operand(x[0]), operand(q[0]), operand(k[0])], operand(x[0]), 4, 2) == Counts(elementwise=48 + 24, macs=48)


def test_the_traced_form_is_the_same_function():
    given, traced = [random(3, 2, 3, 4, seed=n) for n in range(3)], SPECS[OP].traced
    assert torch.equal(traced(*given, 2, 2), row_sum_scale(*given, 2, 2))
    for a, b in zip(*(torch.autograd.grad((f(*given, 2, 2) ** 2).sum(), given) for f in (traced, row_sum_scale)), strict=True):
        torch.testing.assert_close(a, b)
