"""The comparer: it finds each kind of mistake and names its place, and lets pass what rounding explains and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from agreement_cases import (
    Fire,
    ProgramExecutor,
    changed,
    constant_of,
    fire_with,
    floating,
    in_double,
    quantized,
    set_element,
    tokens,
)
from programs import CONTEXT, canonical
from torch import Tensor

from ntc.agreement import Agreement
from ntc.errors import DisagreementError
from ntc.executors import Execution
from ntc.pipeline import run_pipeline
from ntc.program import Program, interpret
from ntc.recording import grade_of, populations, record
from ntc.rounding import limits, margins
from ntc_passes.multi_threshold import MultiThreshold

float_program = cache(floating)
integer_program = cache(quantized)


def compared(program: Program, executor: ProgramExecutor, count: int = 240, rows: int = 8) -> dict[str, Any]:
    text, first = tokens(count, program.info.vocab_size), 0
    agreement = Agreement(program, executor, text.windows.shape[1])
    for ids in text.batches(rows):
        agreement.add(record(program, ids, first, (*executor.inputs, *executor.outputs)))
        first += len(ids)
    return agreement.result()


def layer(result: dict[str, Any], node: str) -> dict[str, Any]:
    return next(x for x in result["layers"] if x["node"] == node)


# --------------------------------------------------------------------------------------------------- what is the same


@pytest.mark.parametrize("make", [float_program, integer_program])
def test_program_agrees_with_itself(make: Callable[[], Program]) -> None:
    program = make()
    result = compared(program, ProgramExecutor(program))
    assert (result["verdict"], result["agrees"], result["spike_mismatches"], result["max_logit_diff"]) == ("exact", True, 0, 0.0)
    assert result["top1_agreement"] == 1.0 and result["coverage"]["share"] == 1.0
    assert result["spikes"] == sum(x["spikes"] for x in result["layers"]) > 1000
    for row in result["layers"]:
        assert row["compared"] == 240 * row["neurons"] * row["steps"] and row["first"] is None


def test_figures_do_not_depend_on_batches() -> None:
    program = float_program()
    wrong = ProgramExecutor(changed(program, constant_of(program, "q", 1), set_element(3, 1.01)))
    whole, parts = compared(program, wrong, rows=20), compared(program, wrong, rows=3)
    for rows in (whole, parts):
        for x in rows["layers"]:  # how far rounding reaches is measured on the first sequence, whatever the batch
            x.pop("resolution"), x.pop("margin_limit")
    assert [x["first"] for x in whole["layers"]] == [x["first"] for x in parts["layers"]]
    assert [x["spike_mismatches"] for x in whole["layers"]] == [x["spike_mismatches"] for x in parts["layers"]]
    assert whole["max_logit_diff"] == parts["max_logit_diff"]


def test_grades() -> None:
    assert (grade_of(float_program()), grade_of(integer_program())) == ("float", "integer")


# --------------------------------------------------------------------------------------------------- mistakes are found

WEIGHT, BIAS, THRESHOLD = 1, 2, 1


def _mistakes(program: Program) -> dict[str, tuple[str, ProgramExecutor]]:
    """Where each is, and an executor that makes it."""
    floats = grade_of(program) == "float"
    node = "k_current"

    def other(name: str, change: Callable[[Tensor], Tensor | None]) -> ProgramExecutor:
        return ProgramExecutor(changed(program, name, change))

    weight = program.tensor(constant_of(program, node, WEIGHT)).abs()
    place = tuple(int(i) for i in (weight == weight.max()).nonzero()[0])
    return {
        "one weight 1 % off": ("k", other(constant_of(program, node, WEIGHT), set_element(place, 1.01 if floats else 1 - 1 / 127))),
        "one threshold 1 % off": ("v", other(constant_of(program, "v", THRESHOLD), set_element(5, 1.01))),
        "no bias": ("k", other(constant_of(program, node, BIAS), torch.zeros_like)),
        "another reset": ("q", ProgramExecutor(program, fire_with(hard=True, node="q"))),
        "behind the attention": ("ffn", other(constant_of(program, "ffn", THRESHOLD), set_element(slice(None), 1.01))),
    }


@pytest.mark.parametrize("kind", ["one weight 1 % off", "one threshold 1 % off", "no bias", "another reset", "behind the attention"])
@pytest.mark.parametrize("make", [float_program, integer_program])
def test_mistakes_are_found_and_named(make: Callable[[], Program], kind: str) -> None:
    program = make()
    node, executor = _mistakes(program)[kind]
    result = compared(program, executor, count=2400)
    assert (result["verdict"], result["agrees"]) == ("differs", False)
    assert f"node %{node}" in result["reason"]
    found = layer(result, node)
    assert found["held_mismatches"] > 0 and found["unexplained"] > 0 and found["first"] is not None
    for row in result["layers"]:  # given equal spikes, nothing but that population fires anything else
        assert row["node"] == node or row["unexplained"] == 0
    if grade_of(program) == "float":
        assert found["margin"] > found["margin_limit"] > 0


def test_first_difference_is_the_first() -> None:
    program = float_program()
    ids = tokens(240).windows
    agreement = Agreement(program, executor := ProgramExecutor(program, fire_with(hard=True, node="v")), ids.shape[1])
    agreement.add(given := record(program, ids, 100))
    first = layer(agreement.result(), "v")["first"]
    differ = (executor.run(ids).spikes["v"] != given.trains["v"]).nonzero().tolist()
    sequence, position, step, neuron = min((b, i, t, c) for t, b, i, c in differ)
    assert first == {"sequence": 100 + sequence, "position": position, "step": step, "neuron": neuron}


def test_wrong_head_shows_in_the_logits_only() -> None:
    program = float_program()
    weight = constant_of(program, "head", WEIGHT)
    result = compared(program, ProgramExecutor(changed(program, weight, set_element((3, 3), 1.01))))
    assert result["verdict"] == "differs" and result["spike_mismatches"] == 0
    assert "given equal spikes, logits differ by" in result["reason"]
    assert result["held"]["max_logit_diff"] > result["held"]["logit_limit"] > 0


def test_wrong_integer_head() -> None:
    program = integer_program()
    head = next(n for n in reversed(program.graph.nodes) if "integer_linear" in str(n.target))
    result = compared(program, ProgramExecutor(changed(program, str(head.args[1].target), lambda t: torch.roll(t, 1, 0))))
    assert result["verdict"] == "differs" and result["spike_mismatches"] == 0
    assert "logits differ by" in result["reason"] and "integers leave no room" in result["reason"]


def test_another_comparison_of_integers() -> None:
    program = integer_program()
    result = compared(program, ProgramExecutor(program, fire_with(torch.gt, node="ffn")), count=2400)
    assert result["verdict"] == "differs" and "node %ffn" in result["reason"]


@pytest.mark.parametrize("signed", [False, True])
def test_another_comparison_in_floating_point(signed: bool) -> None:
    """At a threshold that is met exactly, ``>`` looks like rounding; that every such neuron differs does not."""
    program = float_program(dyadic=True, signed=signed)
    result = compared(program, ProgramExecutor(program, fire_with(torch.gt, node="q")))
    found = layer(result, "q")
    assert found["strict"] and found["margin"] == 0
    assert result["verdict"] == "differs" and "compares with > instead of >=" in result["reason"] and "node %q" in result["reason"]
    assert not any(row["strict"] for row in result["layers"] if row["node"] != "q")


def test_logits_that_are_no_numbers() -> None:
    program = float_program()

    class Broken(ProgramExecutor):
        def run(self, ids: Tensor) -> Execution:
            found = super().run(ids)
            return Execution(found.logits.masked_fill(ids[..., None] % 7 == 3, float("nan")), found.spikes)

    result = compared(program, Broken(program))
    assert result["verdict"] == "differs" and "no numbers" in result["reason"] and result["max_logit_diff"] is None


def test_missing_population_and_wrong_shape() -> None:
    program = float_program()

    class Silent(ProgramExecutor):
        def run(self, ids: Tensor) -> Execution:
            found = super().run(ids)
            return Execution(found.logits, {n: s for n, s in found.spikes.items() if n != "v"})

    class Short(ProgramExecutor):
        def run(self, ids: Tensor) -> Execution:
            found = super().run(ids)
            return Execution(found.logits, {n: s[:2] for n, s in found.spikes.items()})

    for executor, sentence in ((Silent(program), "no spikes of node %v"), (Short(program), "spikes of shape")):
        with pytest.raises(DisagreementError, match=sentence):
            compared(program, executor)


# --------------------------------------------------------------------------------------------------- rounding


def tied() -> Program:
    """The program with thresholds that the membranes of many neurons meet, but for rounding: theta = 4 x, v0 = 1/2, after two steps."""
    program = float_program(signed=False)
    ids = tokens(48).windows
    currents: dict[str, Tensor] = {}
    interpret(program, ids, lambda node, args, value: currents.__setitem__(node.name, value))
    found = program
    for name in ("q", "k", "v"):
        best = currents[f"{name}_current"].flatten(0, 1).amax(0).clamp(min=0.01)
        found = changed(found, constant_of(found, name, THRESHOLD), lambda t, best=best: 4 * best.detach())
    return found


def test_ties_are_proven() -> None:
    program = tied()
    result = compared(program, ProgramExecutor(in_double(program)), count=480)
    held = result["held"]
    assert result["verdict"] == "approximate" and result["agrees"] and result["reason"].startswith("threshold ties: given equal spikes")
    assert held["spike_mismatches"] == held["ties"] > 0 and held["margin"] < held["margin_limit"]
    assert all(0 < row["resolution"] < 1e-4 for row in result["layers"])


def test_beside_ties_a_mistake_is_found() -> None:
    program = tied()
    wrong = changed(in_double(program), constant_of(program, "v", THRESHOLD), set_element(slice(None), 1.01))
    result = compared(program, ProgramExecutor(wrong), count=480)
    assert result["verdict"] == "differs" and "node %v" in result["reason"]
    assert layer(result, "v")["ties"] < layer(result, "v")["held_mismatches"]
    assert layer(result, "q")["unexplained"] == 0


@cache
def multi_threshold() -> Program:
    """Neurons with events of several sizes, -64 ... 64."""
    return run_pipeline(canonical(n_layer=1), [MultiThreshold.configure({"scale": "channel"})], CONTEXT)


def test_ties_of_several_thresholds_are_proven_and_mistakes_found() -> None:
    program = multi_threshold()
    vocabulary = program.info.vocab_size
    one = record(program, tokens(96, vocabulary).windows, 0)
    node = populations(program)["h_0_mlp_act_spikes"]
    # Of one value in each channel the first membrane lies on a threshold but for rounding: x = (2^2 - 1/2) theta.
    largest = one.arguments[node.name][0].abs().flatten(0, 1).amax(0)
    tied = changed(program, constant_of(program, node.name, THRESHOLD), lambda theta: largest / 3.5)
    result = compared(tied, ProgramExecutor(in_double(tied)), count=96)
    assert result["agrees"] and result["held"]["spike_mismatches"] == result["held"]["ties"] > 0
    wrong = changed(in_double(tied), constant_of(tied, node.name, THRESHOLD), set_element(slice(None), 1.01))
    result = compared(tied, ProgramExecutor(wrong), count=96)
    assert result["verdict"] == "differs" and f"node %{node.name}" in result["reason"]


VARIANTS: list[dict[str, Any] | str] = [{}, {"signed": False}, {"tau": 2.0}, {"tau": 2.0, "hard": True}, "multi-threshold"]


def variant(options: dict[str, Any] | str) -> Program:
    return multi_threshold() if isinstance(options, str) else float_program(**options)


@pytest.mark.parametrize("options", VARIANTS)
def test_membranes_explain_the_spikes_of_the_op(options: dict[str, Any] | str) -> None:
    program = variant(options)
    given = record(program, tokens(48, program.info.vocab_size).windows, 0)
    for name, node in populations(program).items():
        train = given.trains[name]
        every = torch.ones_like(train[0]).nonzero(as_tuple=True)
        found = margins(node, given.arguments[name], train, every)
        assert found is not None and found.numel() == train.numel() and float(found.max()) == 0
        other = margins(node, given.arguments[name], torch.roll(train, 1, 0), every)
        changed_trains = (train != torch.roll(train, 1, 0)).any(0).flatten()
        assert other is not None
        worst = other.amax(0)
        assert bool((worst[changed_trains] > 0).all()) and bool((worst[~changed_trains] == 0).all())


@pytest.mark.parametrize("options", VARIANTS)
def test_limits_hold_and_are_sharp(options: dict[str, Any] | str) -> None:
    """Float32 against float64: rounding stays below the limit at every neuron, and the limit is below a thousandth of a threshold."""
    program = variant(options)
    double = in_double(program)
    given = record(program, tokens(96, program.info.vocab_size).windows, 0)
    found = limits(program, given.one())
    potentials: dict[str, Tensor] = {}

    def visit(node: Any, args: Any, value: Any) -> Any:
        if node.name not in given.trains:
            return None
        from ntc.ops import spec_of

        train = given.trains[node.name]
        u, levels = spec_of(node).membrane(args, train.double())
        mine, _ = spec_of(node).membrane(given.arguments[node.name], train.float())
        potentials[node.name] = ((u - mine).abs() / levels[0]).amax((1, 2))
        return train.double()

    with torch.no_grad():
        logits = interpret(double, given.ids, visit)
    assert potentials.keys() == populations(program).keys() == found.membranes.keys()
    for name, deviation in potentials.items():
        assert bool((deviation <= found.membranes[name]).all()), name
        assert float(found.membranes[name].median()) < 1e-4
    assert float((logits - given.logits).abs().max()) <= found.logits < 1e-3


def test_population_that_does_not_tell_its_membrane(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from ntc.ops import SPECS
    from ntc.ops.if_neuron import IF_NEURON

    monkeypatch.setitem(SPECS, IF_NEURON.target, replace(IF_NEURON, membrane=None))
    program = tied()
    result = compared(program, ProgramExecutor(in_double(program)), count=480)
    assert result["verdict"] == "differs" and "does not tell its membrane" in result["reason"]


# --------------------------------------------------------------------------------------------------- parts of a program


def piecewise(program: Program, fire: Fire | None = None, **attributes: Any) -> ProgramExecutor:
    """Runs held only, as NIR files do."""

    class Pieces(ProgramExecutor):
        free = False

        def run(self, ids: Tensor) -> Execution:
            raise AssertionError("it cannot run freely")

        def held(self, ids: Tensor, values: Any) -> Execution:
            assert set(self.inputs) <= values.keys()
            found = super().held(ids, values)
            left = dict(self.unsupported)
            return Execution(None, {n: s for n, s in found.spikes.items() if n not in left})

    executor = Pieces(program, fire)
    for name, value in attributes.items():
        setattr(executor, name, value)
    return executor


def test_what_is_not_covered_is_said() -> None:
    program = integer_program()
    result = compared(program, piecewise(program, unsupported=(("v", "too hard"), ("attention", "two signals")), inputs=("attention",)))
    assert result["verdict"] == "exact" and result["max_logit_diff"] is None
    assert "it has no %v" in result["reason"] and "80.0% of the neurons" in result["reason"]
    assert result["coverage"] == {"populations": 3, "of_populations": 4, "neurons": 64, "of_neurons": 80, "share": 0.8}
    assert (layer(result, "v")["by"], layer(result, "v")["reason"]) == ("nothing", "too hard")
    assert result["unsupported"] == [{"node": "v", "reason": "too hard"}, {"node": "attention", "reason": "two signals"}]


def test_nothing_covered_is_unsupported() -> None:
    program = float_program()
    left = tuple((name, "no words") for name in populations(program))
    result = compared(program, piecewise(program, unsupported=left))
    assert (result["verdict"], result["agrees"], result["compared"]) == ("unsupported", True, 0)
    assert result["reason"].endswith("no words")


def test_held_only_finds_mistakes_too() -> None:
    for program in (float_program(), integer_program()):
        result = compared(program, piecewise(program, fire_with(hard=True, node="k")))
        assert result["verdict"] == "differs" and "node %k" in result["reason"]
        assert result["spike_mismatches"] == layer(result, "k")["held_mismatches"] > 0


def test_declared_approximation_is_no_mistake_and_not_exact() -> None:
    for program, agrees in ((float_program(), True), (integer_program(), False)):
        executor = piecewise(program, fire_with(hard=True, node="k"), approximate=(("k", "its reset is another one"),))
        result = compared(program, executor)
        assert (result["verdict"], result["agrees"]) == ("approximate", agrees)
        assert result["reason"].startswith("its reset is another one: node %k")


def test_consequences_inside_of_a_piece() -> None:
    """Where a population in front of it differs, in the same piece, a difference is no mistake of its own."""
    program = integer_program()
    wrong = fire_with(hard=True, node="q")

    def fire(node: Any, args: Any) -> Tensor:
        return fire_with(hard=True)(node, args) if node.name in ("q", "k") else wrong(node, args)

    alone = compared(program, piecewise(program, fire))
    inside = compared(program, piecewise(program, fire, behind={"k": ("q",)}))
    assert layer(alone, "k")["consequences"] == 0 < layer(inside, "k")["consequences"]
    assert layer(inside, "k")["held_mismatches"] == layer(alone, "k")["held_mismatches"]
    assert "node %q" in inside["reason"]
