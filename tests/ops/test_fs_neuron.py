"""Few-spikes neurons: against their dynamics step by step, number by number, in several intervals; and what their spikes count."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import CURRENT, RATE, SPIKES, Constant, counts, dyadics, infer, node_of, operand, random, same_layout

from ntc.ops import Counts, Traffic, TypeMismatch, decode, fs_neuron, fs_synapse, spec_of
from ntc.ops.fs_neuron import membrane
from ntc.rounding import margins
from ntc.spike_type import ANALOG, INDEX, SpikeType

NEURON, SYNAPSE = torch.ops.ntc.fs_neuron.default, torch.ops.ntc.fs_synapse.default

# Two neurons of three steps, on [-2, 1) and [1, 4]; the numbers are dyadic, so that membranes meet thresholds exactly.
INTERVALS = torch.tensor([[-2.0, 1.0], [1.0, 4.0]])
THETA = torch.tensor([[-8.0, 0.5, -0.5], [2.5, 2.0, 1.25]])
RESET = torch.tensor([[0.0, 1.5, 0.75], [1.5, 0.75, 0.25]])
WEIGHT = torch.tensor([[1.0, -2.0, 0.5], [4.0, 2.0, 1.0]])


def by_loop(x: float) -> tuple[list[int], list[float]]:
    """The docstring's neuron, one number: spikes and what they count."""
    v = min(max(x, -2.0), 4.0)
    g = 1 if v >= 1.0 else 0
    spikes, counted = [], []
    for t in range(3):
        fires = v >= THETA[g, t].item()
        v -= RESET[g, t].item() * fires
        spikes.append(int(fires))
        counted.append(WEIGHT[g, t].item() * fires)
    return spikes, counted


@given(dyadics(-32, 48, 6))
def test_equals_the_neuron(numbers):
    x = torch.tensor(numbers).reshape(1, 2, 3)
    spikes = fs_neuron(x, INTERVALS, THETA, RESET, 3)
    train = fs_synapse(spikes, x, INTERVALS, WEIGHT, 3)
    for i, number in enumerate(numbers):
        expected = by_loop(number)
        assert (spikes[:, 0, i // 3, i % 3].tolist(), train[:, 0, i // 3, i % 3].tolist()) == expected


def test_by_hand():
    x = torch.tensor([[[-9.0, 0.5, 1.0, 2.5, 9.0]]])
    spikes = fs_neuron(x, INTERVALS, THETA, RESET, 3)
    assert spikes[:, 0, 0].T.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0], [1, 1, 1]]
    train = fs_synapse(spikes, x, INTERVALS, WEIGHT, 3)
    assert decode(train, "count").tolist() == [[[1.0, -1.0, 0.0, 4.0, 7.0]]]


def test_neurons_that_never_and_always_fire_take_infinite_values():
    x = torch.tensor([[[-torch.inf, torch.inf, 0.0]]])  # -inf is a score that the mask hides
    theta = torch.tensor([[5.0], [-5.0]])
    spikes = fs_neuron(x, torch.tensor([[-1.0, 0.0], [0.0, 1.0]]), theta, torch.zeros(2, 1), 1)
    assert spikes.flatten().tolist() == [0.0, 1.0, 1.0]


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 100))
def test_any_number_of_axes_intervals_and_steps(groups, steps, seed):
    ends = random(groups + 1, grad=False, seed=seed).sort().values
    intervals = torch.stack([ends[:-1], ends[1:]], 1)
    theta, reset, weight = (random(groups, steps, grad=False, seed=seed + n) for n in (1, 2, 3))
    for shape in ((5,), (2, 3, 1), (2, 2, 3, 4)):
        x = random(*shape, grad=False, seed=seed + 4)
        spikes = fs_neuron(x, intervals, theta, reset, steps)
        train = fs_synapse(spikes, x, intervals, weight, steps)
        assert spikes.shape == train.shape == (steps, *shape)
        for place in range(x.numel()):
            v = float(x.flatten()[place].clamp(ends[0], ends[-1]))
            g = max((j for j in range(groups) if v >= float(ends[j])), default=0)
            for t in range(steps):
                fires = v >= float(theta[g, t])
                v -= float(reset[g, t]) * fires
                assert spikes[t].flatten()[place] == fires
                assert train[t].flatten()[place] == float(weight[g, t]) * fires


def test_tables_that_do_not_fit_are_refused():
    x = torch.ones(1, 2, 3)
    with pytest.raises(ValueError, match=r"intervals have shape \[G, 2\], low and high of each neuron, and not \[3\]"):
        fs_neuron(x, torch.ones(3), THETA, RESET, 3)
    with pytest.raises(ValueError, match=r"theta has shape \[2, 4\], one number per interval and step, and not \[2, 3\]"):
        fs_neuron(x, INTERVALS, THETA, RESET, 4)
    with pytest.raises(ValueError, match=r"reset has shape \[2, 3\], one number per interval and step, and not \[1, 3\]"):
        fs_neuron(x, INTERVALS, THETA, RESET[:1], 3)
    with pytest.raises(ValueError, match=r"weight has shape \[2, 3\]"):
        fs_synapse(torch.ones(3, 1, 2, 3), x, INTERVALS, WEIGHT[:, :2], 3)
    with pytest.raises(ValueError, match=r"spikes of a value \[1, 2, 3\] have shape \[3, 1, 2, 3\], and not \[3, 2, 3\]"):
        fs_synapse(torch.ones(3, 2, 3), x, INTERVALS, WEIGHT, 3)


def test_gradients_are_straight_through_and_exact_in_the_weights():
    x = random(2, 3, 8, low=-3.0, high=5.0)
    tables = [t.double() for t in (INTERVALS, THETA, RESET)]
    weight, to = WEIGHT.double().requires_grad_(), random(2, 3, 8, seed=1, grad=False)
    value = fs_synapse(fs_neuron(x, *tables, 3), x, tables[0], weight, 3).sum(0)
    to_x, to_weight = torch.autograd.grad((to * value).sum(), (x, weight))
    g = (x >= 1).long()
    slope = (WEIGHT * RESET).sum(1).double() / (RESET * RESET).sum(1).double()
    inside = (x >= -2) & (x <= 4)
    assert 0 < inside.double().mean() < 1
    torch.testing.assert_close(to_x, to * slope[g] * inside)
    spikes = fs_neuron(x, *tables, 3)
    expected = torch.stack([(to * spikes * (g == k)).flatten(1).sum(1) for k in (0, 1)])
    torch.testing.assert_close(to_weight, expected.detach())
    silent = fs_neuron(x, tables[0], tables[1], torch.zeros(2, 3, dtype=torch.float64), 3)
    assert not torch.autograd.grad(silent.sum(), x)[0].any(), "a neuron without resets has no slope"


def test_opcheck_and_layout():
    x = random(2, 3, 4, dtype=torch.float32)
    torch.library.opcheck(fs_neuron, (x, INTERVALS, THETA, RESET, 3))
    spikes = fs_neuron(x, INTERVALS, THETA, RESET, 3).detach().requires_grad_()
    torch.library.opcheck(fs_synapse, (spikes, x.detach(), INTERVALS, WEIGHT.clone().requires_grad_(), 3))
    turned = random(2, 4, 3, grad=False, dtype=torch.float32).transpose(-1, -2)
    assert same_layout(fs_neuron, turned, INTERVALS, THETA, RESET, 3)
    assert same_layout(fs_synapse, fs_neuron(turned, INTERVALS, THETA, RESET, 3), turned, INTERVALS, WEIGHT, 3)


def test_compiles_with_gradients():
    def f(x):
        return fs_synapse(fs_neuron(x, INTERVALS, THETA, RESET, 3), x, INTERVALS, WEIGHT, 3).sum(0) ** 2

    x = random(2, 3, 4, dtype=torch.float32)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(f(x), compiled)
    torch.testing.assert_close(torch.autograd.grad(f(x).sum(), x), torch.autograd.grad(compiled.sum(), x))


def test_types():
    tables = (Constant((2, 2)), Constant((2, 4)), Constant((2, 4)))
    fitted = SpikeType(4, "fitted")
    assert infer(NEURON, ANALOG, *tables, 4) == fitted
    assert infer(SYNAPSE, fitted, ANALOG, *tables[:2], 4) == SpikeType(4, "count", "graded")
    for kind in (SPIKES, RATE, INDEX, CURRENT):
        with pytest.raises(TypeMismatch, match="take a value that is analog, and %x0 is"):
            infer(NEURON, kind, *tables, 4)
        with pytest.raises(TypeMismatch, match="take numbers that is analog, and %x1 is"):
            infer(NEURON, ANALOG, kind, *tables[1:], 4)
        with pytest.raises(TypeMismatch, match="takes spikes of few-spikes neurons, T=4, and %x0 is"):
            infer(SYNAPSE, kind, ANALOG, *tables[:2], 4)
        with pytest.raises(TypeMismatch, match="made of a value that is analog, and %x1 is"):
            infer(SYNAPSE, fitted, kind, *tables[:2], 4)
    with pytest.raises(TypeMismatch, match="T=4, and %x0 is spikes T=3 binary fitted"):
        infer(SYNAPSE, SpikeType(3, "fitted"), ANALOG, *tables[:2], 4)
    with pytest.raises(TypeMismatch, match="decode reads the count code"):  # the weights are missing
        infer(torch.ops.ntc.decode.default, fitted, "count")


def test_intervals_that_do_not_ascend_or_touch_are_refused():
    node, types = node_of(NEURON, ANALOG, Constant((2, 2)), Constant((2, 3)), Constant((2, 3)), 3)
    module = torch.nn.Module()
    node.graph.owning_module = module
    for intervals, value in ((INTERVALS.flip(0), "-2"), (INTERVALS + torch.tensor([[0.0, 0.0], [1.0, 1.0]]), "2")):
        module.c1 = intervals
        with pytest.raises(TypeMismatch, match=f"intervals ascend and touch, and element 2 of %c1 is {value}"):
            spec_of(node).infer(node, types.__getitem__)
    module.c1 = INTERVALS
    assert spec_of(node).infer(node, types.__getitem__) == SpikeType(3, "fitted")


def test_counting():
    x = random(2, 3, 5, grad=False, low=-3.0, high=5.0)
    spikes = fs_neuron(x, INTERVALS, THETA, RESET, 3)
    events = float(spikes.sum())
    operands = [operand(x), *map(operand, (INTERVALS, THETA, RESET))]
    result = operand(spikes, SpikeType(3, "fitted"))
    assert counts(NEURON, operands, result) == Counts(neuron_updates=90, acs=30, spikes=events, neurons=30)
    # 30 values and 90 bits of spikes; membranes read and written; two numbers for each update, one for each comparison.
    moved = spec_of(node_of(NEURON, ANALOG)[0]).moves(None, operands, result, {})
    assert moved == Traffic(activations=30, spikes=90, membranes=180, weights=210, sweep=6 * 16)
    given = [result, operand(x), operand(INTERVALS), operand(WEIGHT)]
    graded = operand(fs_synapse(spikes, x, INTERVALS, WEIGHT, 3), SpikeType(3, "count", "graded"))
    assert counts(SYNAPSE, given, graded) == Counts(acs=events)
    assert spec_of(node_of(SYNAPSE, ANALOG)[0]).moves(None, given, graded, {}) == Traffic(spikes=90, weights=events, sweep=36)


def test_the_membrane_tells_what_was_fired():
    x = random(2, 3, 50, grad=False, seed=5, low=-3.0, high=5.0)
    spikes = fs_neuron(x, INTERVALS, THETA, RESET, 3)
    u, (level,) = membrane((x, INTERVALS, THETA, RESET, 3), spikes)
    assert torch.equal((u >= level).double(), spikes)


def test_another_train_is_a_tie_only_at_a_threshold_or_at_the_end_of_an_interval():
    """Value 0 lies 1e-6 below a threshold, 1 as far below the end of its interval, where the next neuron fires otherwise, 2 nowhere near."""
    x = torch.tensor([[[2.5 - 1e-6, 1.0 - 1e-6, 0.0]]], dtype=torch.float64)
    tables = [t.double() for t in (INTERVALS, THETA, RESET)]
    node, _ = node_of(NEURON, ANALOG, *(Constant(tuple(t.shape)) for t in tables), 3)
    node.meta["val"] = fs_neuron(x, *tables, 3)
    other = fs_neuron(x + torch.tensor([2e-6, 2e-6, 1.0], dtype=torch.float64), *tables, 3)
    assert bool((other != node.meta["val"]).any(0).all())
    places = (torch.tensor([0, 0, 0]), torch.tensor([0, 0, 0]), torch.tensor([0, 1, 2]))
    found = margins(node, (x, *tables, 3), other, places).amax(0)
    assert found[0] < 2e-6 and found[1] < 2e-6 and found[2] > 0.1
