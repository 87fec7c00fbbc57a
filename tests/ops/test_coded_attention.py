"""Linear layers and attention that read digits: against the loop over spikes that a chip would run, and against the analog ops."""

from __future__ import annotations

import math

import pytest
import torch
from op_cases import CURRENT, SPIKES, TERNARY, Constant, counts, infer, operand, random, same_layout
from test_digit_neuron import tables

from ntc.ops import TypeMismatch, attention, coded_attention, digit_neuron, spike_linear, token_step
from ntc.ops.coded_attention import CODED_ATTENTION, _heads, coded_probabilities
from ntc.spike_type import ANALOG, SpikeType

LINEAR, ATTENTION = torch.ops.ntc.spike_linear.default, torch.ops.ntc.coded_attention.default
DIGITS = SpikeType(3, "fitted", "ternary")


def coded(x: torch.Tensor, steps: int = 4, groups: int = 1, base: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Spikes and their steps."""
    w, theta = tables(base, steps, dtype=x.dtype)
    step = token_step(x, 1 / float(w.sum()), groups)
    return digit_neuron(x, step, w, theta, True), step


def test_a_linear_layer_adds_columns():
    """Event by event: ``y += w(t) d W_c`` for each spike of channel c, times its sign."""
    x, matrix, bias = random(2, 3, 5, grad=False), random(4, 5, grad=False, seed=1), random(4, grad=False, seed=2)
    spikes, step = coded(x)
    w = tables(3.0, 4, dtype=x.dtype)[0]
    y = torch.zeros(2, 3, 4, dtype=x.dtype)
    for t, b, i, c in spikes.nonzero().tolist():
        y[b, i] += w[t] * step[b, i, 0] * spikes[t, b, i, c] * matrix[:, c]
    torch.testing.assert_close(spike_linear(spikes, w, matrix, step, bias), y + bias)
    torch.testing.assert_close(spike_linear(spikes, w, matrix), y / step)
    torch.testing.assert_close(spike_linear(spikes, w, matrix, None, bias), y / step + bias)


def _by_events(trains, steps, w, levels, thetas, heads, kv_heads, scale, per_token):
    """The docstring, one head, query and key at a time."""
    parts = [t.unflatten(-1, (n, -1)) for t, n in zip(trains, (heads, kv_heads, kv_heads), strict=True)]
    _, batch, length, _, width = parts[0].shape
    result, spikes = torch.zeros(batch, length, heads, parts[2].shape[-1], dtype=w.dtype), 0
    for b in range(batch):
        for h in range(heads):
            own = h // (heads // kv_heads)

            def number(role, head, token, b=b):
                n = sum(float(w[t]) * parts[role][t, b, token, head] for t in range(len(w)))
                d = steps[role][b, token, head] if per_token else steps[role].expand(trains[role].shape[-1]).unflatten(0, (-1, width))[head]
                return n, d

            for i in range(length):
                q, dq = number(0, h, i)
                stored = [(number(1, own, j), number(2, own, j)) for j in range(i + 1)]
                scores = torch.stack([scale * (q * dq) @ (k * dk) for (k, dk), _ in stored])
                sizes = torch.stack([dv if per_token else torch.ones((), dtype=w.dtype) for _, (_, dv) in stored])
                e = (scores - scores.max()).exp() * sizes
                v, above, coded_sum = e * (levels.sum() / e.max()), torch.zeros(width, dtype=w.dtype), 0.0
                exact, under = v.sum(), (v / sizes).sum()
                for level, theta in zip(levels, thetas, strict=True):
                    fires = v >= theta
                    falls = v <= -theta
                    s = fires.to(w.dtype) - falls.to(w.dtype)
                    v = v - level * s
                    spikes += int(s.abs().sum())
                    for j in s.nonzero().flatten().tolist():
                        n, dv = stored[j][1]
                        above = above + level * s[j] * (n if per_token else n * dv)
                        coded_sum = coded_sum + level * s[j]
                everything = sum(n if per_token else n * dv for _, (n, dv) in stored)
                result[b, i, h] = (above + (exact - coded_sum) / (i + 1) * everything) / under
    return result.flatten(-2), spikes


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (2, 1)])
def test_attention_is_what_its_spikes_add_up_to(heads, kv_heads, per_token):
    q, k, v = (random(2, 5, n * 4, grad=False, seed=i, low=-2, high=2) for i, n in enumerate((heads, kv_heads, kv_heads)))
    (w, theta), (levels, thetas) = tables(3.0, 4, dtype=q.dtype), tables(2.5, 3, dtype=q.dtype)
    if per_token:
        trains, steps = zip(*(coded(x, groups=n) for x, n in zip((q, k, v), (heads, kv_heads, kv_heads), strict=True)), strict=True)
    else:
        steps = (torch.full((heads * 4,), 0.06, dtype=q.dtype), torch.tensor([0.05], dtype=q.dtype), torch.linspace(0.03, 0.06, kv_heads * 4, dtype=q.dtype))
        trains = tuple(digit_neuron(x, d, w, theta) for x, d in zip((q, k, v), steps, strict=True))
    y = coded_attention(*trains, *steps, w, levels, thetas, heads, kv_heads, 0.5, per_token)
    expected, spikes = _by_events(trains, steps, w, levels, thetas, heads, kv_heads, 0.5, per_token)
    torch.testing.assert_close(y, expected)
    node, _ = _node(heads, kv_heads, per_token)
    measured = CODED_ATTENTION.measure([*trains, *steps, w, levels, thetas], y, node)
    meetings = sum(float(trains[0][:, :, i].abs().sum()) * (i + 1) for i in range(5))
    assert measured == {"meetings": meetings, "numerator_spikes": spikes}


def _node(heads, kv_heads, per_token):
    from op_cases import node_of

    kinds = [DIGITS] * 3 + ([ANALOG] * 3 if per_token else [Constant((1,))] * 3) + [Constant((3,))] * 3
    return node_of(ATTENTION, *kinds, heads, kv_heads, 0.5, per_token)


@pytest.mark.parametrize("steps", [6, 9])
def test_with_many_digits_it_is_softmax_attention(steps):
    """Errors fall threefold with each digit; values of one token a thousand times smaller than the others' do no harm."""
    q, k, v = (random(1, 12, 8, grad=False, seed=i, low=-2, high=2) for i in range(3))
    v[:, 0] *= 1e-3
    w, theta = tables(3.0, steps, dtype=q.dtype)
    (a, da), (b, db), (c, dc) = (coded(x, steps, 2) for x in (q, k, v))
    y = coded_attention(a, b, c, da, db, dc, w, w, theta, 2, 2, 0.5, True)
    exact = attention(q, k, v, 2, 2, 0.5)
    assert float((y - exact).abs().max()) < 12 * 3.0**-steps * float(exact.abs().max())
    assert float((y - exact).abs().max()) > 1e-3 * 3.0**-steps, "and not by nothing"


def test_rows_of_numerators():
    """The largest one is N steps, digits are within half a step, and what lies above the diagonal is silent."""
    scores = random(2, 3, 6, 6, grad=False, low=-3, high=3).masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -math.inf)
    levels, thetas = tables(3.0, 4, dtype=scores.dtype)
    sizes = random(2, 3, 1, 6, grad=False, low=0.5, high=2.0, seed=1)
    same, found, spikes = coded_probabilities(scores, sizes, levels, thetas, True)
    assert coded_probabilities(scores, sizes, levels, thetas)[2] == 0.0
    exact = (scores - scores.amax(-1, keepdim=True)).exp() * sizes
    exact = exact * (40 / exact.amax(-1, keepdim=True))
    torch.testing.assert_close(same, exact)
    assert float((found - exact).abs().max()) <= 0.5
    torch.testing.assert_close(found.amax(-1), torch.full((2, 3, 6), 40.0, dtype=scores.dtype))
    assert not found.triu(1).any()
    assert spikes == float(digit_neuron(exact, torch.ones(1, dtype=scores.dtype), levels, thetas).abs().sum())


def test_gradients_are_those_of_attention_at_the_decoded_values():
    q, k, v = (random(2, 5, n, seed=i) for i, n in enumerate((8, 4, 4)))
    w, theta = tables(3.0, 10, dtype=q.dtype)

    def run(function):
        out = function()
        weight = random(2, 5, 8, seed=9, grad=False)
        return torch.autograd.grad((out * weight).sum(), (q, k, v))

    def through_spikes():
        steps = [token_step(x.detach(), 1 / float(w.sum()), n) for x, n in ((q, 2), (k, 1), (v, 1))]
        trains = [digit_neuron(x, d, w, theta, True) for x, d in zip((q, k, v), steps, strict=True)]
        return coded_attention(*trains, *steps, w, w, theta, 2, 1, 0.5, True)

    for ours, theirs in zip(run(through_spikes), run(lambda: attention(q, k, v, 2, 1, 0.5)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)  # ten digits: the values agree to 1e-4


def test_gradients_of_a_linear_layer():
    spikes, step = coded(random(2, 3, 5, grad=False))
    matrix, bias = random(4, 5, seed=1), random(4, seed=2)
    spikes, step, w = (x.double().requires_grad_() for x in (spikes, step, tables(3.0, 4, dtype=torch.float64)[0]))
    torch.autograd.gradcheck(spike_linear, (spikes, w, matrix, step, bias))
    torch.autograd.gradcheck(spike_linear, (spikes, w, matrix))


@pytest.mark.parametrize("stepped", [False, True])
def test_a_linear_layer_keeps_its_train_only_for_what_needs_it(stepped):
    """With matrix and weights as they are, a run backwards keeps no train, and the gradient of the spikes is the same."""
    spikes, step = coded(random(2, 3, 5, grad=False))
    matrix, w, weight = random(4, 5, grad=False, seed=1), tables(3.0, 4, dtype=torch.float64)[0], random(2, 3, 4, grad=False, seed=3)
    rest = (matrix, step.double()) if stepped else (matrix,)

    def gradient(*others):
        kept, train = [], spikes.double().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
            (spike_linear(train, *others) * weight).sum().backward()
        return train.grad, tuple(spikes.shape) in kept

    alone, kept = gradient(w, *rest)
    whole, kept_by_training = gradient(w, *(r.clone().requires_grad_() for r in rest))
    assert torch.equal(alone, whole)
    assert (kept, kept_by_training) == (False, True)


def test_shapes_that_do_not_fit():
    spikes, step = coded(random(2, 3, 8, grad=False, dtype=torch.float32))
    w, theta = tables(3.0, 4)
    with pytest.raises(ValueError, match=r"weights of 4 time steps have shape \[4\], and not \[3\]"):
        spike_linear(spikes, w[:3], torch.ones(4, 8))
    with pytest.raises(ValueError, match=r"a matrix that reads 8 neurons has shape \[N, 8\], and not \[4, 7\]"):
        spike_linear(spikes, w, torch.ones(4, 7))
    with pytest.raises(ValueError, match=r"the step of a token has shape \[2, 3, 1\], and not \[1\]"):
        spike_linear(spikes, w, torch.ones(4, 8), torch.ones(1))
    with pytest.raises(ValueError, match=r"a bias has shape \[4\]"):
        spike_linear(spikes, w, torch.ones(4, 8), None, torch.ones(5))
    one = [torch.ones(1)] * 3
    with pytest.raises(ValueError, match=r"steps of the queries have shape \[1\] or \[8\], and not \[2, 3, 1\]"):
        coded_attention(spikes, spikes, spikes, step, *one[:2], w, w, theta, 2, 2, 1.0)
    with pytest.raises(ValueError, match=r"steps of the keys have shape \[2, 3, 2\], and not \[1\]"):
        coded_attention(spikes, spikes, spikes, torch.ones(2, 3, 2), *one[:2], w, w, theta, 2, 2, 1.0, True)
    with pytest.raises(ValueError, match="3 key heads do not divide 4 query heads"):
        coded_attention(spikes, spikes, spikes, *one, w, w, theta, 4, 3, 1.0)
    with pytest.raises(ValueError, match=r"numerators have shape \[T\], and not \[4\] and \[3\]"):
        coded_attention(spikes, spikes, spikes, *one, w, w, theta[:3], 2, 2, 1.0)


def test_opcheck_and_layout():
    spikes, step = coded(random(2, 3, 8, grad=False, dtype=torch.float32))
    w, theta = tables(3.0, 4)
    matrix, bias = random(4, 8, dtype=torch.float32), random(4, dtype=torch.float32)
    torch.library.opcheck(spike_linear, (spikes, w, matrix, step, bias))
    torch.library.opcheck(coded_attention, (spikes, spikes, spikes, step, step, step, w, w, theta, 1, 1, 0.5, True))
    assert same_layout(spike_linear, spikes.transpose(1, 2), w, matrix.detach())


def test_types():
    table = Constant((3,))
    assert infer(LINEAR, DIGITS, table, Constant((4, 8))) == ANALOG
    assert infer(ATTENTION, DIGITS, DIGITS, DIGITS, *[Constant((1,))] * 3, table, table, table, 2, 2, 1.0) == ANALOG
    for kind in (SPIKES, TERNARY, CURRENT, ANALOG, SpikeType(3, "fitted", "binary"), SpikeType(3, "fitted", "graded")):
        with pytest.raises(TypeMismatch, match="spike_linear reads spikes of digit neurons, and %x0 is"):
            infer(LINEAR, kind, table, Constant((4, 8)))
        with pytest.raises(TypeMismatch, match="coded_attention reads spikes of digit neurons, and %x1 is"):
            infer(ATTENTION, DIGITS, kind, DIGITS, *[Constant((1,))] * 3, table, table, table, 2, 2, 1.0)
    with pytest.raises(TypeMismatch, match="queries have T=3 time steps, and %x2 is"):
        infer(ATTENTION, DIGITS, DIGITS, SpikeType(4, "fitted", "ternary"), *[Constant((1,))] * 3, table, table, table, 2, 2, 1.0)


def test_counting():
    spikes, step = coded(random(2, 3, 8, grad=False, dtype=torch.float32), 3)
    w, theta = tables(3.0, 3)
    events, table = float(spikes.abs().sum()), operand(w)
    matrix, bias, y = torch.ones(4, 8), torch.ones(4), torch.ones(2, 3, 4)
    found = counts(LINEAR, [operand(spikes, DIGITS), table, operand(matrix), operand(step), operand(bias)], operand(y), DIGITS, Constant((3,)), Constant((4, 8)), ANALOG, Constant((4,)))
    assert (found.dense_macs, found.acs, found.macs, found.elementwise) == (2 * 3 * 8 * 4, events * 4, 0, 24 * (2 + 2))
    given = [operand(spikes, DIGITS)] * 3 + [operand(step)] * 3 + [table] * 3
    kinds = [DIGITS] * 3 + [ANALOG] * 3 + [Constant((3,))] * 3
    out = operand(torch.ones(2, 3, 8))
    found = counts(ATTENTION, given, out, *kinds, 1, 1, 0.5, True, measured={"meetings": 50.0, "numerator_spikes": 20.0})
    assert found.dense_macs == 2 * 6 * 3 * 8 and found.macs == 0
    assert found.acs == 50 + 20 * 9 and found.spikes == 20 and found.neurons == 6 * 2 and found.neuron_updates == 6 * 2 * 3
    assert coded_attention(spikes, spikes, spikes, step, step, step, w, w, theta, 1, 1, 0.5, True).shape == (2, 3, 8)


@pytest.mark.parametrize("per_token", [True, False])
def test_one_spike_of_a_numerator_moves_no_result_further(per_token: bool) -> None:
    """A threshold of the last digit that few numerators cross more: rows move by no more than their number of spikes, some by nearly one."""
    heads, kv_heads = 4, 2
    x = [random(2, 12, n * 6, grad=False, seed=s) for s, n in ((1, heads), (2, kv_heads), (3, kv_heads))]
    w, theta = tables(3.0, 6, dtype=x[0].dtype)
    trains, steps = [], []
    for value, groups in zip(x, (heads, kv_heads, kv_heads), strict=True):
        step = token_step(value, 1 / float(w.sum()), groups) if per_token else torch.full((1,), float(value.abs().max() / w.sum()))
        step = step.to(value.dtype)
        trains.append(digit_neuron(value, step, w, theta, per_token))
        steps.append(step)
    levels, at = tables(3.0, 4, dtype=w.dtype)
    lower = at.clone()
    lower[-1] *= 0.98  # a few more of them fire
    arguments = [*trains, *steps, w, levels, at, heads, kv_heads, 0.5, per_token]
    other = [*arguments[:8], lower, *arguments[9:]]
    before, after = coded_attention(*arguments), coded_attention(*other)
    reach = CODED_ATTENTION.one_spike(arguments, before)
    more = [(b[1] - a[1]).abs().sum(-1) for a, b in zip(_heads(*arguments), _heads(*other), strict=True)]  # [B, L] of each head
    flips = torch.stack(more, -1).repeat_interleave(6, -1)
    assert 0 < (flips > 0).double().mean() < 0.5
    moved = (after - before).abs()
    assert (moved <= reach * flips + 1e-12).all()
    once = (flips == 1) & (reach > 1e-6)  # a first token has one key, and what its numerator loses it gets back
    assert (moved[once] / reach[once]).max() > 0.5
