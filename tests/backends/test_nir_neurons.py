"""Each form of a neuron in NIR is the program's neuron, spike for spike, where its label says exact.

Parameters are multiples of 1/8 and time constants 1 or 2, so that no sum rounds, in any order: what differs is no rounding. Currents meet the threshold exactly
in many of the cases.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nir_cases import INTEGER, LEAKY, Toy, differing, emitted, interpreted, trains
from nir_interpreter import Array, Interpreter

from ntc.ops import aten
from ntc.program import Program
from ntc_backends.nir_neurons import below

BLOCK = settings(max_examples=4)  # each runs 60 tokens through neurons with parameters of their own


def eighths(generator: torch.Generator, *shape: int, low: int, high: int) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, generator=generator).float() / 8


def two_layers(seed: int, steps: int, signed: bool, leaky: int = 0, hard: bool = False) -> Program:
    """Held current into neurons, their spikes through weights into timed neurons, and a weight behind; every number a multiple of 1/8."""
    g = torch.Generator().manual_seed(seed)
    toy = Toy(eighths(g, 60, 5, low=-8, high=8))
    current = toy(aten.linear.default, toy.last, eighths(g, 6, 5, low=-8, high=8) / 2, eighths(g, 6, low=-4, high=4), name="front")
    for name, timed in (("first", False), ("second", True)):
        theta, v0 = eighths(g, 6, low=2, high=12), torch.randint(0, 3, (6,), generator=g) / 2
        if leaky:
            tau = 2.0 ** torch.randint(0, leaky, (6,), generator=g)
            spikes = toy(LEAKY, current, theta, tau, v0, steps, hard, timed, "atan", 1.0, name=name)
        else:
            spikes = toy.fire(current, theta, v0, steps, signed, timed, name=name)
        weight = eighths(g, 6, 6, low=-8, high=8)
        current = toy(aten.linear.default, spikes, weight, eighths(g, 6, low=-2, high=2), name=f"behind_{name}")
    toy(torch.ops.ntc.decode.default, current, "rate", name="decoded")
    return toy.done()


def none_differ(program: Program, **options: object) -> None:
    values = trains(program)
    assume(any(values[name].any() for name in ("first", "second")))  # a seed may have thresholds that nothing reaches
    with tempfile.TemporaryDirectory() as folder:
        index = emitted(program, Path(folder), **options)
        assert {n.fidelity for n in index.nodes if n.file} == {"exact"}
        found = differing(program, Path(folder), index)
        assert set(found.values()) == {0}, found
        assert len(found) == 2


@given(st.floats(width=32, allow_nan=False), st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_the_lowered_threshold_is_the_same_comparison(u: float, theta: float) -> None:
    x, limit = np.float32([u, theta, np.nextafter(np.float32(theta), np.float32(-np.inf))]), np.full(3, theta, np.float32)
    np.testing.assert_array_equal(x > below(limit), x >= limit)
    assert below(limit).dtype == np.float32


@BLOCK
@given(st.integers(0, 10**6), st.integers(1, 9), st.booleans())
def test_loops_are_if_neurons(seed: int, steps: int, signed: bool) -> None:
    none_differ(two_layers(seed, steps, signed))


@BLOCK
@given(st.integers(0, 10**6), st.integers(1, 9))
def test_loops_are_leaky_neurons(seed: int, steps: int) -> None:
    none_differ(two_layers(seed, steps, False, leaky=2))


@BLOCK
@given(st.integers(0, 10**6), st.integers(1, 9), st.sampled_from(["explicit", "hard", "annotate"]))
def test_neurons_that_reset_to_zero_are_lif_nodes(seed: int, steps: int, reset: str) -> None:
    none_differ(two_layers(seed, steps, False, leaky=2, hard=True), reset=reset)


@BLOCK
@given(st.integers(0, 10**6), st.integers(1, 9), st.sampled_from([0, 2]))
def test_nodes_of_nir_1_0_4_subtract(seed: int, steps: int, leaky: int) -> None:
    none_differ(two_layers(seed, steps, False, leaky=leaky), reset="annotate", compat="1.0.4")


@BLOCK
@given(st.integers(0, 10**6), st.integers(1, 9))
def test_two_nodes_that_subtract_are_a_ternary_neuron_with_constant_current(seed: int, steps: int) -> None:
    program = two_layers(seed, steps, True)
    with tempfile.TemporaryDirectory() as folder:
        index = emitted(program, Path(folder), reset="annotate", compat="1.0.4")
        assert differing(program, Path(folder), index) == {"first": 0}
        labels = {n.name: (n.fidelity, n.file) for n in index.nodes}
        assert labels["first"] == ("exact", "front")
        assert labels["second"] == ("unsupported", None)  # its current changes its sign
        assert labels["behind_second"] == ("exact", "behind_second")


def test_why_two_nodes_are_no_ternary_neuron_when_the_current_changes_its_sign() -> None:
    """theta 1, v0 1/2, currents 3/4 and -1: the ternary neuron fires +1, then -1; the node for the negative sign is held back by the first."""
    toy = Toy(torch.tensor([[1.0]]))
    current = toy(aten.linear.default, toy.last, torch.tensor([[1.0]]), None, name="front")
    step = toy.fire(current, torch.tensor([1.0]), torch.tensor([0.0]), 2, name="first")
    toy(torch.ops.ntc.decode.default, step, "rate", name="decoded")
    x = torch.tensor([0.75, -1.0]).reshape(2, 1, 1, 1)
    one, half = torch.ones(1), torch.full((1,), 0.5)
    ternary = torch.ops.ntc.integrate_fire(x, one, half, 2, True, True, "atan", 1.0).flatten()
    on = torch.ops.ntc.integrate_fire(x, one, half, 2, False, True, "atan", 1.0).flatten()
    off = torch.ops.ntc.integrate_fire(-x, one, half, 2, False, True, "atan", 1.0).flatten()
    assert ternary.tolist() == [1, -1]
    assert (on - off).tolist() == [1, 0]


@pytest.mark.parametrize("reset", ["hard", "annotate"])
@pytest.mark.parametrize("signed", [False, True])
def test_if_nodes_by_their_own_definition_are_other_neurons_and_say_so(tmp_path: Path, reset: str, signed: bool) -> None:
    program = two_layers(3, 6, signed)
    index = emitted(program, tmp_path, reset=reset)
    found = differing(program, tmp_path, index)
    assert found["first"] > 0
    labels = {n.name: n.fidelity for n in index.nodes}
    assert labels["first"] == "approximate"
    # What the index says was measured is what the interpreter finds.
    front = next(f for f in index.files if f.name == "front")
    assert (front.measured[0].reading, front.measured[0].differing) == ("definition", found["first"])
    if reset == "annotate":
        assert (front.measured[1].reading, front.measured[1].differing) == ("subtract", 0)


def test_a_soft_reset_keeps_what_is_above_the_threshold_and_a_hard_one_does_not(tmp_path: Path) -> None:
    """theta 1, v0 0, x 3/4: by hand u = 3/4, 3/2 (fires), 5/4 (fires), 1 (fires); with a reset to 0 it is 3/4, 3/2, 3/4, 3/2."""
    toy = Toy(torch.tensor([[1.0]]))
    current = toy(aten.linear.default, toy.last, torch.tensor([[0.75]]), None, name="front")
    spikes = toy.fire(current, torch.tensor([1.0]), torch.tensor([0.0]), 4, name="first")
    toy(torch.ops.ntc.decode.default, spikes, "rate", name="decoded")
    program = toy.done()
    for options, expected in (({}, [0, 1, 1, 1]), ({"reset": "hard"}, [0, 1, 0, 1])):
        index = emitted(program, tmp_path, **options)
        assert interpreted(tmp_path, index, trains(program))["first"].flatten().tolist() == expected


def integer_toy(seed: int, steps: int, signed: bool, wide: bool) -> Program:
    g = torch.Generator().manual_seed(seed)
    weight_limit, dtype = (3000, torch.int16) if wide else (9, torch.int8)
    toy = Toy(torch.randint(-100, 101, (60, 30), generator=g, dtype=torch.int8))
    weight = torch.randint(-weight_limit, weight_limit + 1, (6, 30), generator=g, dtype=dtype)
    bias = torch.randint(-50, 51, (6,), generator=g, dtype=torch.int32)
    current = toy(torch.ops.ntc.integer_linear.default, toy.last, weight, bias, name="front")
    theta = torch.randint(1, 100 * weight_limit, (6,), generator=g, dtype=torch.int32)
    start = theta // torch.randint(1, 4, (6,), generator=g, dtype=torch.int32)
    spikes = toy(INTEGER, current, theta, start, steps, signed, False, name="first")
    toy(torch.ops.ntc.from_integer.default, toy(torch.ops.ntc.decode.default, spikes, "count", name="decoded"), 0, name="logits")
    return toy.done()


@BLOCK
@given(
    st.integers(0, 10**6), st.integers(1, 9), st.booleans(), st.booleans(),
    st.sampled_from([{}, {"compat": "1.0.4"}, {"reset": "annotate", "compat": "1.0.4"}]),
)  # fmt: skip
def test_integers_are_the_same_on_every_executor(seed: int, steps: int, signed: bool, wide: bool, options: dict[str, str]) -> None:
    program = integer_toy(seed, steps, signed, wide)
    with tempfile.TemporaryDirectory() as folder:
        index = emitted(program, Path(folder), **options)
        assert differing(program, Path(folder), index) == {"first": 0}
        (entry,) = index.files
        (population,) = entry.populations
        assert population.arithmetic == "integer"
        if not wide or steps > 2:  # 30 products of at most 100 x 3000 per step: float32 holds two steps of them
            assert entry.dtype == ("float64" if wide else "float32")
        assert {n.fidelity for n in index.nodes if n.file} == {"exact"}


@pytest.mark.parametrize(("high", "dtype"), [(5000, "float32"), (3_000_000, "float64")])
@pytest.mark.parametrize("compat", ["1.0.6", "1.0.4"])
def test_integers_that_differ_from_step_to_step(tmp_path: Path, high: int, dtype: str, compat: str) -> None:
    """Output neurons of spiking attention: a current of either sign per step, in the range of the requantization in front."""
    g = torch.Generator().manual_seed(2)
    toy = Toy(torch.randint(-100, 101, (60, 8), generator=g, dtype=torch.int8))
    x, one = toy.last, torch.ones(1, 1, dtype=torch.int32)
    trains_ = [
        toy(
            INTEGER,
            x,
            torch.randint(60, 200, (8,), generator=g, dtype=torch.int32),
            torch.full((1,), 30, dtype=torch.int32),
            6,
            True,
            False,
            name=n,
        )
        for n in "qkv"
    ]
    counts = toy(torch.ops.ntc.integer_attention.default, *trains_, 2, 2, one, None, 0, name="counts")
    factor = torch.randint(high // 40, high // 20, (8,), generator=g, dtype=torch.int32)
    current = toy(torch.ops.ntc.requantize.default, counts, factor, 0, -high, high, name="current")
    theta = torch.randint(high // 4, high, (8,), generator=g, dtype=torch.int32)
    spikes = toy(INTEGER, current, theta, theta // 2, 6, True, True, name="out")
    toy(torch.ops.ntc.from_integer.default, toy(torch.ops.ntc.decode.default, spikes, "count", name="decoded"), 0, name="logits")
    program = toy.done()
    index = emitted(program, tmp_path, compat=compat)
    assert differing(program, tmp_path, index) == {"q": 0, "k": 0, "v": 0, "out": 0}
    out = trains(program)["out"]
    assert {-1, 0, 1} == set(out.flatten().tolist())
    assert next(f.dtype for f in index.files if f.name == "out") == dtype


def test_thresholds_of_integers_lie_between_two_of_them(tmp_path: Path) -> None:
    program = integer_toy(0, 4, True, wide=False)
    index = emitted(program, tmp_path)
    nodes = Interpreter(tmp_path / "nir" / "front.nir").parameters
    theta, start = program.tensor("first_1").numpy(), program.tensor("first_2").numpy()
    np.testing.assert_array_equal(nodes["first_up"]["threshold"], theta - start - 0.5)
    np.testing.assert_array_equal(nodes["first_down"]["threshold"], start)
    np.testing.assert_array_equal(nodes["first_reset_up"]["scale"], -theta)
    np.testing.assert_array_equal(nodes["first_reset_down"]["scale"], theta)
    assert index.files[0].populations[0].v0 is None


def test_the_interpreter_follows_definitions(tmp_path: Path) -> None:
    """Its LIF against the closed form v(t) = x (1 - (1 - 1/tau)**t), its IF by hand."""
    import nir

    from ntc_backends.nir_files import write_file

    def run(node: object, x: float, steps: int) -> Array:
        graph = nir.NIRGraph.from_list(node)
        name = next(n for n, value in graph.nodes.items() if value is node)
        write_file(tmp_path / "one.nir", graph, "1.0.6")
        return Interpreter(tmp_path / "one.nir").run(np.full((steps, 1, 1), x))[name].flatten()

    def one(value: float) -> Array:
        return np.array([value])

    leak = run(nir.LI(tau=one(4.0), r=one(1.0), v_leak=one(0.0)), 2.0, 6)
    np.testing.assert_allclose(leak, 2 * (1 - 0.75 ** np.arange(1, 7)), rtol=1e-15)
    assert run(nir.IF(r=one(1.0), v_threshold=one(1.0), v_reset=one(-0.5)), 0.5, 6).tolist() == [0, 0, 1, 0, 0, 0]  # 1 > 1 is false
