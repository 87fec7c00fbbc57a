"""Both products of attention on digits, each an op of its own: against loops over spikes, against the whole op, and what is lost."""

from __future__ import annotations

import pytest
import torch
from op_cases import CURRENT, SPIKES, TERNARY, Constant, counts, infer, node_of, operand, random, same_layout
from test_coded_attention import DIGITS, coded
from test_digit_neuron import tables

from ntc.ops import (
    Counts,
    Traffic,
    TypeMismatch,
    coded_attention,
    coded_scores,
    coded_values,
    digit_neuron,
    key_scale,
    token_step,
    weighted_values,
)
from ntc.ops.coded_attention import CODED_ATTENTION
from ntc.ops.coded_scores import CODED_SCORES
from ntc.ops.coded_values import CODED_VALUES
from ntc.ops.spike_linear import weighted
from ntc.spike_type import ANALOG, SpikeType

SCORES, SCALE, VALUES = (getattr(torch.ops.ntc, name).default for name in ("coded_scores", "key_scale", "coded_values"))
SIZES = [(4, 4, 0), (4, 2, 0), (2, 1, 3), (4, 2, 1)]  # H, Hk, window
LENGTH = 5


def seen(i: int, window: int) -> range:
    return range(max(0, i + 1 - window) if window else 0, i + 1)


def rows_of(heads: int, window: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Weights of attention that are no softmax: any numbers, zero where a token does not see."""
    x = random(2, heads, LENGTH, LENGTH, seed=7, grad=False, low=0.01, high=2.0, dtype=dtype) ** 3
    for i in range(LENGTH):
        x[:, :, i, [j for j in range(LENGTH) if j not in seen(i, window)]] = 0
    return x.flatten(1, 2)


def numerators(x: torch.Tensor, steps: int = 3, base: float = 2.5) -> tuple[torch.Tensor, ...]:
    """Digits of rows as the pass codes them: spikes, step, sum, weights."""
    w, theta = tables(base, steps, dtype=x.dtype)
    step = token_step(x, 1 / float(w.sum()))
    return digit_neuron(x, step, w, theta, True), step, x.sum(-1, keepdim=True), w


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "window"), SIZES)
def test_scores_are_what_the_spikes_of_queries_add_up_to(heads, kv_heads, window, per_token):
    q, k = (random(2, LENGTH, n * 3, grad=False, seed=i) for i, n in enumerate((heads, kv_heads)))
    w, theta = tables(3.0, 4, dtype=q.dtype)
    (sq, dq), (sk, dk) = coded(q, groups=heads), coded(k, groups=kv_heads)
    if not per_token:
        dq, dk = torch.tensor([0.06], dtype=q.dtype), torch.linspace(0.03, 0.06, kv_heads * 3, dtype=q.dtype)
        sq, sk = digit_neuron(q, dq, w, theta), digit_neuron(k, dk, w, theta)
    expected, meetings = torch.full((2, heads, LENGTH, LENGTH), -torch.inf, dtype=q.dtype), 0
    for b in range(2):
        for h in range(heads):
            for i in range(LENGTH):
                for j in seen(i, window):
                    total = 0.0
                    for t, c in sq[:, b, i, 3 * h : 3 * h + 3].nonzero().tolist():
                        own = h // (heads // kv_heads)
                        stored = sum(float(w[u]) * float(sk[u, b, j, 3 * own + c]) for u in range(4))  # the key's whole number
                        steps = dq[b, i, h] * dk[b, j, own] if per_token else dq[0] * dk[3 * own + c]
                        total = total + float(sq[t, b, i, 3 * h + c]) * float(w[t]) * stored * steps
                        meetings += 1
                    expected[b, h, i, j] = 0.7 * total
    given = (sq, sk, dq, dk, w)
    got = coded_scores(*given, heads, kv_heads, 0.7, window, per_token)
    torch.testing.assert_close(got, expected.flatten(1, 2))
    kinds = [DIGITS, DIGITS, ANALOG, ANALOG, Constant((4,))]
    node, _ = node_of(SCORES, *kinds, heads, kv_heads, 0.7, window, per_token)
    assert CODED_SCORES.measure(given, got, node) == {"meetings": meetings}


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "window"), SIZES)
def test_values_are_what_the_spikes_of_weights_add_up_to(heads, kv_heads, window, per_token):
    v = random(2, LENGTH, kv_heads * 2, grad=False, seed=3)
    train, step = coded(v, groups=kv_heads)
    known = None if per_token else torch.linspace(0.02, 0.05, kv_heads * 2, dtype=v.dtype)
    if known is not None:
        train = digit_neuron(v, known, *tables(3.0, 4, dtype=v.dtype))
    p, w = rows_of(heads, window), tables(3.0, 4, dtype=v.dtype)[0]
    x = key_scale(p, step, heads, kv_heads) if per_token else p
    spikes, d, mass, levels = numerators(x)
    got = coded_values(spikes, train, d, mass, levels, w, heads, kv_heads, window, known)
    u = weighted(train, w) * (1.0 if known is None else known)
    exact = torch.zeros_like(got)
    for b in range(2):
        for h in range(heads):
            own = slice(h // (heads // kv_heads) * 2, h // (heads // kv_heads) * 2 + 2)
            for i in range(LENGTH):
                row, keys = h * LENGTH + i, seen(i, window)
                above, told = torch.zeros(2, dtype=v.dtype), 0.0
                for t, j in spikes[:, b, row].nonzero().tolist():
                    assert j in keys
                    above = above + levels[t] * spikes[t, b, row, j] * u[b, j, own]
                    told = told + levels[t] * spikes[t, b, row, j]
                mean = sum(u[b, j, own] for j in keys) / len(keys)
                y = d[b, row, 0] * above + (x[b, row].sum() - d[b, row, 0] * told) * mean
                torch.testing.assert_close(got[b, i, 2 * h : 2 * h + 2], y)
                exact[b, i, 2 * h : 2 * h + 2] = sum(x[b, row, j] * u[b, j, own] for j in keys)
                limit = float(d[b, row, 0]) / 2 * sum((u[b, j, own] - mean).abs() for j in keys)
                assert bool(((got - exact)[b, i, 2 * h : 2 * h + 2].abs() <= limit + 1e-12).all()), "the bound of the docstring"
    assert float((got - exact).abs().max()) > 1e-3 or window == 1, "and not by nothing; one key alone has a mean that is itself"


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (2, 1)])
def test_with_a_softmax_they_are_the_whole_op(heads, kv_heads, per_token):
    """Numerator by numerator: the same spikes, and the same result."""
    q, k, v = (random(2, 9, n * 4, grad=False, seed=i, low=-2, high=2) for i, n in enumerate((heads, kv_heads, kv_heads)))
    v[:, 0] *= 1e-2  # a token that attention rests on when it has nothing to do
    (w, theta), (levels, thetas) = tables(3.0, 5, dtype=q.dtype), tables(2.5, 4, dtype=q.dtype)
    sizes = (heads, kv_heads, kv_heads)
    if per_token:
        trains, steps = zip(*(coded(x, 5, groups=n) for x, n in zip((q, k, v), sizes, strict=True)), strict=True)
    else:
        steps = tuple(torch.full((n * 4,), 0.02, dtype=q.dtype) for n in sizes)
        trains = tuple(digit_neuron(x, d, w, theta) for x, d in zip((q, k, v), steps, strict=True))
    whole = (*trains, *steps, w, levels, thetas, heads, kv_heads, 0.5, per_token)
    p = coded_scores(*trains[:2], *steps[:2], w, heads, kv_heads, 0.5, 0, per_token).softmax(-1)
    x = key_scale(p, steps[2], heads, kv_heads) if per_token else p
    spikes, d, mass, _ = numerators(x, 4)
    y = coded_values(spikes, trains[2], d, mass, levels, w, heads, kv_heads, 0, None if per_token else steps[2])
    torch.testing.assert_close(y, coded_attention(*whole))
    node, _ = node_of(
        torch.ops.ntc.coded_attention.default, *[DIGITS] * 3, *[ANALOG] * 3, *[Constant((4,))] * 3, heads, kv_heads, 0.5, per_token
    )
    assert CODED_ATTENTION.measure(whole[:9], y, node)["numerator_spikes"] == float(spikes.abs().sum())


def test_gradients_are_those_of_the_equations():
    w, levels = tables(3.0, 3, dtype=torch.float64)[0], tables(2.5, 2, dtype=torch.float64)[0]
    trains = [random(3, 1, 4, n * 2, seed=i) for i, n in enumerate((4, 2))]
    for steps in ([random(1, 4, n, seed=5) for n in (4, 2)], [random(1, seed=5), random(4, seed=6)]):
        per_token = steps[0].dim() > 1

        def scores(sq, sk, dq, dk, per_token=per_token):
            found = coded_scores(sq, sk, dq, dk, w, 4, 2, 0.7, 3, per_token)
            return found.masked_fill(found == -torch.inf, 0.0)

        torch.autograd.gradcheck(scores, (*trains, *steps))
    torch.autograd.gradcheck(lambda p, a: key_scale(p, a, 4, 2), (random(1, 16, 4), random(1, 4, 2, seed=1)))
    hidden = torch.ones(4, 4, dtype=torch.bool).tril().triu(-1).repeat(4, 1)
    given = [random(2, 1, 16, 4, seed=1), random(3, 1, 4, 4, seed=2), random(1, 16, 1, seed=3), random(1, 16, 1, seed=4)]
    for known in ((), (random(4, seed=5),), (random(1, seed=5),)):

        def product(p, v, d, m, *known):
            return coded_values(p * hidden, v, d, m, levels, w, 4, 2, 2, *known)

        torch.autograd.gradcheck(product, (*given, *known))


def test_straight_through_the_digits_they_are_those_of_the_product():
    """``dy / dp`` of all together is the value that is weighted: what digits and step lose of it, the sum of the row gives back."""
    p, v = random(1, 8, 4, seed=1, low=0.1, high=1.0), random(1, 4, 4, seed=2, grad=False)
    visible = torch.ones(4, 4, dtype=torch.float64).tril().repeat(2, 1)
    (train, _), w, to = coded(v, groups=2), tables(3.0, 4, dtype=v.dtype)[0], random(1, 4, 4, seed=9, grad=False)
    levels, thetas = tables(3.0, 6, dtype=v.dtype)
    step = token_step((p * visible).detach(), 1 / float(levels.sum()))

    def ours(x):
        return coded_values(digit_neuron(x, step, levels, thetas, True), train, step, x.sum(-1, keepdim=True), levels, w, 2, 2, 0)

    found = [torch.autograd.grad((y * to).sum(), p)[0] for y in (ours(p * visible), weighted_values(p * visible, weighted(train, w), 2, 2, 0))]
    torch.testing.assert_close(*found)


def test_opcheck_and_layout():
    w, levels = tables(3.0, 3)[0], tables(3.0, 2)[0]
    q, k, v = (random(3, 2, 4, n * 2, seed=i, dtype=torch.float32) for i, n in enumerate((4, 2, 2)))
    dq, dk = (random(2, 4, n, dtype=torch.float32, seed=4) for n in (4, 2))
    p, rows = random(2, 2, 16, 4, dtype=torch.float32), random(2, 16, 1, dtype=torch.float32)
    known = random(4, dtype=torch.float32)
    torch.library.opcheck(coded_scores, (q, k, dq, dk, w, 4, 2, 0.5, 0, True))
    torch.library.opcheck(key_scale, (p[0], dk, 4, 2))
    torch.library.opcheck(coded_values, (p, v, rows, rows, levels, w, 4, 2, 0))
    torch.library.opcheck(coded_values, (p, v, rows, rows, levels, w, 4, 2, 3, known))
    q, k, v, dq, dk, p, rows = (x.detach() for x in (q, k, v, dq, dk, p, rows))
    assert same_layout(coded_scores, q.transpose(1, 2).contiguous().transpose(1, 2), k, dq, dk, w, 4, 2, 0.5, 2, True)
    assert same_layout(key_scale, p[0], dk, 4, 2) and same_layout(coded_values, p, v, rows, rows, levels, w, 4, 2, 0)


def test_shapes_that_do_not_fit():
    w, train = torch.ones(3), torch.ones(3, 2, 4, 8)
    dq, p, rows = torch.ones(2, 4, 4), torch.ones(3, 2, 16, 4), torch.ones(2, 16, 1)
    for call, said in (
        (lambda: coded_scores(train, train, dq, dq, w, 4, 3, 1.0, 0, True), "3 key heads do not divide 4 query heads"),
        (lambda: coded_scores(train, train, dq, dq, w[:2], 4, 4, 1.0, 0, True), r"weights of queries of 3 time steps have shape \[3\], and not \[2\]"),
        (lambda: coded_scores(train, train, w[:1], dq, w, 4, 4, 1.0, 0, True), r"steps of the queries have shape \[2, 4, 4\], and not \[1\]"),
        (lambda: coded_scores(train, train, w[:1], dq, w, 4, 4, 1.0, 0), r"steps of the keys have shape \[1\] or \[8\], and not \[2, 4, 4\]"),
        (lambda: key_scale(p[0], torch.ones(2, 4, 4), 4, 2), r"sizes of 4 keys have shape \[2, 4, 2\], and not \[2, 4, 4\]"),
        (lambda: coded_values(p, train, rows, rows, w[:2], w, 4, 4, 0), r"levels of weights of 3 time steps have shape \[3\], and not \[2\]"),
        (lambda: coded_values(p, train, rows, rows, w, w, 2, 2, 0), r"digits of weights have shape \['T', 2, 8, 4\], and not \[3, 2, 16, 4\]"),
        (lambda: coded_values(p, train, rows[:1], rows, w, w, 4, 4, 0), r"steps of the rows have shape \[2, 16, 1\], and not \[1, 16, 1\]"),
        (lambda: coded_values(p, train, rows, rows[:1], w, w, 4, 4, 0), r"sums of the rows have shape \[2, 16, 1\], and not \[1, 16, 1\]"),
        (lambda: coded_values(p, train, rows, rows, w, w, 4, 4, 0, dq), r"known steps of the values have shape \[1\] or \[8\], and not \[2, 4, 4\]"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            call()


def test_types():
    table, step = Constant((3,)), Constant((1,))
    assert infer(SCORES, DIGITS, DIGITS, ANALOG, ANALOG, table, 2, 2, 1.0, 0, True) == ANALOG
    assert infer(VALUES, SpikeType(5, "fitted", "ternary"), DIGITS, ANALOG, ANALOG, table, table, 2, 2, 0, step) == ANALOG
    assert infer(SCALE, ANALOG, ANALOG, 2, 2) == ANALOG
    for kind in (SPIKES, TERNARY, CURRENT, ANALOG, SpikeType(3, "fitted", "binary"), SpikeType(3, "count", "graded")):
        with pytest.raises(TypeMismatch, match="coded_scores reads spikes of digit neurons, and %x1 is"):
            infer(SCORES, DIGITS, kind, step, step, table, 2, 2, 1.0, 0)
        for given in ((kind, DIGITS), (DIGITS, kind)):
            with pytest.raises(TypeMismatch, match=f"coded_values reads spikes of digit neurons, and %x{given.index(kind)} is"):
                infer(VALUES, *given, ANALOG, ANALOG, table, table, 2, 2, 0)
    with pytest.raises(TypeMismatch, match="queries have T=3 time steps, and %x1 is"):
        infer(SCORES, DIGITS, SpikeType(4, "fitted", "ternary"), step, step, table, 2, 2, 1.0, 0)
    for op, given in ((SCORES, (DIGITS, DIGITS, step, CURRENT, table, 2, 2, 1.0, 0)), (VALUES, (DIGITS, DIGITS, ANALOG, CURRENT, table, table, 2, 2, 0))):
        with pytest.raises(TypeMismatch, match=r"steps, sums and tables of coded_\w+ are analog, and %x3 is"):
            infer(op, *given)
    with pytest.raises(TypeMismatch, match="takes analog values, and %x1 is"):
        infer(SCALE, ANALOG, SPIKES, 2, 2)


def test_operations_and_traffic_by_hand():
    """H = 4, Hk = 2, D = Dv = 2, T = 3, T' = 5; two texts of four tokens, which see 2.5 keys in the mean, with a window of two 1.75."""
    query, key = (operand(torch.ones(3, 2, 4, n), DIGITS) for n in (8, 4))
    step, table, rows = operand(torch.ones(2, 4, 4)), operand(torch.ones(3)), operand(torch.ones(2, 16, 1))
    scores, y = operand(torch.ones(2, 16, 4)), operand(torch.ones(2, 4, 8))
    kinds = [DIGITS, DIGITS, ANALOG, ANALOG, Constant((3,))]
    for window, pairs in ((0, 80), (2, 56)):
        given = (SCORES, [query, key, step, step, table], scores, *kinds, 4, 2, 0.5, window, True)
        found = counts(*given, measured={"meetings": 77.0})
        assert found == Counts(dense_macs=2 * 4 * 4 * 8, acs=77.0, elementwise=3 * 2 * 4 * (8 + 4) + 4 * pairs)
        node, _ = node_of(SCORES, *kinds, 4, 2, 0.5, window, True)
        moved = CODED_SCORES.moves(node, given[1], scores, {"meetings": 77.0})
        assert moved == Traffic(cache=77 + 32, spikes=2 * 3 * 2 * 4 * (8 + 4), activations=2 * 32)
    digits = torch.zeros(5, 2, 16, 4)
    digits.view(-1)[:30] = 1.0
    spikes = operand(digits, DIGITS)
    kinds = [SpikeType(5, "fitted", "ternary"), DIGITS, ANALOG, ANALOG, Constant((5,)), Constant((3,))]
    given = [spikes, key, rows, rows, table, table]
    found = counts(VALUES, given, y, *kinds, 4, 2, 0)
    assert found == Counts(dense_macs=2 * 4 * 4 * 8, acs=30 * 3, elementwise=3 * 32 + 32 + 64 * 8)
    node, _ = node_of(VALUES, *kinds, 4, 2, 0)
    moved = CODED_VALUES.moves(node, given, y, {})
    assert moved == Traffic(cache=30 * 2 + 32, spikes=2 * (5 * 128 + 3 * 32), activations=2 * 32 + 64)
    assert counts(SCALE, [operand(digits[0]), step], scores, ANALOG, ANALOG, 4, 2) == Counts(elementwise=30)
