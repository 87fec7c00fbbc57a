"""The recipes that ship: their order, what they leave, the printed graph."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from programs import CONTEXT, canonical, spiking

import ntc
from ntc.errors import PassError
from ntc.meta import NEURON
from ntc.pipeline import Context, Pass, run_pipeline
from ntc.program import Program
from ntc.recipe import Settings
from ntc.registry import find_pass
from ntc.testing import NanoGPT, count_ops, example_ids, tiny_gpt2
from ntc_passes.recipes import FFN_ONLY, NEURTRANSFORMER


def passes(recipe: ntc.Recipe = NEURTRANSFORMER, **options: object) -> list[Pass]:
    return recipe.build(Settings(options), find_pass)


def compiled(model: torch.nn.Module, recipe: ntc.Recipe = NEURTRANSFORMER, given: Context = CONTEXT, **options: object) -> Program:
    return run_pipeline(ntc.capture(model, example_ids() if isinstance(model, NanoGPT) else None), passes(recipe, **options), given)


def test_printed_graph(golden: Callable[[str, str], None]) -> None:
    golden("gpt2_neurtransformer", str(compiled(tiny_gpt2(n_layer=1))))


@pytest.mark.parametrize(("layout", "output"), [
    ({}, "current"), ({}, "spikes"), ({"layout": "separate", "kv_heads": 2}, "current"), ({"layout": "interleaved", "bias": False}, "spikes"),
])  # fmt: skip
def test_every_threshold_in_front_of_a_linear_layer_is_one(layout: dict[str, object], output: str) -> None:
    program = compiled(NanoGPT(layers=1, **layout) if layout else tiny_gpt2(n_layer=1), output=output)
    spikes = [n for n in program.graph.nodes if n.target is torch.ops.ntc.integrate_fire.default]
    assert [n.meta[NEURON].role for n in spikes] == ["q", "k", "v", *(["ssa"] if output == "spikes" else []), "ffn"]
    for node in spikes:
        is_one = bool((program.tensor(node.args[1]) == 1).all())
        assert is_one == (node.meta[NEURON].role != "ssa"), node.name
    assert count_ops(program)["mul"] == 0, "no scale is left in front of a linear layer"


def test_a_second_compile_of_the_same_program_gives_the_same() -> None:
    program = canonical(n_layer=1)
    before = program.fingerprint()
    first, second = (run_pipeline(program, passes()[1:], CONTEXT) for _ in range(2))
    assert str(first) == str(second)
    assert torch.equal(first(program.example), second(program.example))
    assert program.fingerprint() == before


def test_compiling_what_is_compiled_is_an_error() -> None:
    with pytest.raises(PassError, match="replace-attention found none of its sites"):
        run_pipeline(spiking(n_layer=1), passes(), CONTEXT)


class Watched(Exception):
    """A pass ran."""


@pytest.mark.parametrize(
    ("recipe", "first", "missing"),
    [
        (NEURTRANSFORMER, "canonicalize", "calibrate needs a program that is canonical: run canonicalize before it"),
        (NEURTRANSFORMER, "calibrate", "replace-attention needs a program that is calibrated: run calibrate before it"),
        (FFN_ONLY, "calibrate", "convert-ffn needs a program that is calibrated: run calibrate before it"),
    ],
)
def test_a_swap_fails_before_anything_runs(recipe: ntc.Recipe, first: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [s.name for s in recipe.steps]
    at = names.index(first)
    swapped = passes(recipe)
    swapped[at : at + 2] = reversed(swapped[at : at + 2])

    def ran(self: Pass, program: Program, context: Context) -> None:
        raise Watched(type(self).name)

    for step in swapped:
        monkeypatch.setattr(type(step), "run", ran)
    with pytest.raises(PassError, match=missing):
        run_pipeline(ntc.capture(tiny_gpt2(n_layer=1)), swapped, CONTEXT)


def test_a_missing_policy_pass_is_named() -> None:
    with pytest.raises(PassError, match="insert-neurons needs a program that is neurons-annotated: no pass in this recipe provides it"):
        run_pipeline(canonical(n_layer=1), passes(FFN_ONLY.without("convert-ffn"))[1:], CONTEXT)


def test_folding_before_the_conversion_leaves_no_false_fact() -> None:
    """This order runs, since a fold may find nothing; but then the program does not claim to be folded."""
    order = FFN_ONLY.without("fold-thresholds").insert_before("convert-ffn", FFN_ONLY.steps[3])
    program = run_pipeline(canonical(n_layer=1), passes(order)[1:], CONTEXT)
    assert "thresholds-folded" not in program.facts
    assert "thresholds-folded" in spiking(n_layer=1).facts


def test_one_setting_reaches_every_pass_that_has_it() -> None:
    steps = {p.name: p.options.steps for p in passes(steps=9) if "steps" in p.option_names()}
    assert steps == {"replace-attention": 9, "convert-ffn": 9}
    percentiles = {p.name: p.options.percentile for p in passes(percentile=95.0) if "percentile" in p.option_names()}
    assert percentiles == {"replace-attention": 95.0, "convert-ffn": 95.0}
    assert spiking(2, n_layer=1).steps == 2


def test_ffn_only_leaves_attention_analog() -> None:
    program = compiled(tiny_gpt2(n_layer=1), FFN_ONLY)
    counts = count_ops(program)
    assert counts["ntc.attention"] == 1
    assert counts["ntc.integrate_fire"] == 1
    assert counts["ntc.spiking_attention"] == 0


def test_the_history_names_every_pass_and_its_drift() -> None:
    history = spiking(n_layer=1).history
    assert [r.name for r in history] == ["capture", *(s.name for s in NEURTRANSFORMER.steps)]
    by_name = {r.name: r for r in history}
    assert by_name["fold-thresholds"].drift < 1e-4 < by_name["replace-attention"].drift
    for before, after in pairwise(history):
        assert after.seconds > 0, (before.name, after.name)
