"""Tests of the pass, with the harness that ntc uses for its own."""

import pytest
import torch
from ntc_share_thresholds import Options, ShareThresholds

import ntc
from ntc.pipeline import Context
from ntc.program import Program
from ntc.recipe import Recipe, Settings, Step
from ntc.registry import find_pass
from ntc.testing import check_pass, example_ids, tiny_gpt2


def annotated(headroom: float = 1.0) -> Program:
    """A tiny GPT-2 with spiking attention, ready for the pass; ``headroom`` widens the output thresholds so that nothing clips."""
    program = ntc.capture(tiny_gpt2(n_layer=1))
    ids = example_ids()
    steps = (Step("canonicalize"), Step("calibrate"), Step("replace-attention"))
    passes = Recipe("test", "", "", "", "", steps).build(Settings(), find_pass)
    program = ntc.run_pipeline(program, passes, Context(ntc.Calibration((ids,), "random", "")))
    for name, value in program.tensors.items():
        if ".ssa." in name:  # rate and gain together: r(x, a theta) a g = r(x, theta) g where nothing clips
            value.data.mul_(headroom)
    return program


def test_shares_the_output_neuron_and_leaves_the_rest_to_folding() -> None:
    """Number of ops, sites, misses; ``check_pass`` adds facts, types, the untouched input, and a second run."""
    after = check_pass(
        ShareThresholds(), annotated(), ops_before={"ntc.if_rate": 4, "mul": 1}, ops_after={"ntc.if_rate": 4, "mul": 1},
        sites=1, missed=["comes from a linear layer"] * 3,
    )  # fmt: skip
    assert after.tensor("transformer.h.0.attn.ssa.threshold").shape == (1,)


def test_is_exact_where_nothing_clips() -> None:
    """Numbers: a gain that is 1 % off moves the logits more than that."""
    check_pass(ShareThresholds(Options("max")), annotated(headroom=1e3), rtol=1e-4, atol=1e-4, sites=1)


def test_after_folding_there_is_no_gain_left() -> None:
    """The refusal."""
    folded = ntc.run_pipeline(annotated(), [find_pass("fold-thresholds")()])
    with pytest.raises(ntc.PassError, match="run before fold-thresholds"):
        ntc.run_pipeline(folded, [ShareThresholds()])


@pytest.mark.parametrize("how", ["median", None])
def test_unknown_option_is_refused(how: object) -> None:
    """Values that the pass does not take are told when it is made."""
    with pytest.raises(ntc.ConfigError, match="'mean' or 'max'"):
        ShareThresholds.configure({"shared_threshold": how})


def test_option_can_differ_per_module() -> None:
    """``self.at`` reads the overrides."""
    override = ntc.Override("transformer.h.0.*", {"shared_threshold": "max"})
    program = annotated()
    largest = program.tensor("transformer.h.0.attn.ssa.threshold").max()
    after = check_pass(ShareThresholds(), program, context=Context(overrides=(override,)), sites=1)
    assert torch.equal(after.tensor("transformer.h.0.attn.ssa.threshold"), largest.reshape(1))
