"""What checks a pass can fail: the pipeline's own rules, ``check_pass`` and the golden comparison, with edits that break them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden_texts import compare_golden

import ntc
from ntc.errors import PassError, VerifyError
from ntc.meta import building
from ntc.ops import aten
from ntc.pipeline import Context, Pass, PassResult, run_pipeline
from ntc.program import Program
from ntc.testing import check_pass, tiny_gpt2
from ntc_passes.canonicalize import Canonicalize


class _Edit(Pass):
    """A pass whose edit is given: for breaking the rules on purpose."""

    name = "edit"
    exact = True

    def __init__(self, edit, modified: bool = True) -> None:
        super().__init__()
        self.edit, self.modified = edit, modified

    def run(self, program: Program, context: Context) -> PassResult:
        self.edit(program)
        return PassResult(modified=self.modified, sites=int(self.modified))


@pytest.fixture(scope="module")
def canonical() -> Program:
    return run_pipeline(ntc.capture(tiny_gpt2(n_layer=1)), [Canonicalize()])


def scale_a_weight(program: Program, factor: float = 1.01) -> None:
    node = program.find("h_0_mlp_c_fc")
    name = program.add_tensor("scaled", program.tensor(node.args[1]) * factor)
    with building(program.graph, before=node, stands_for=[node.args[1]], by="edit") as call:
        node.update_arg(1, call(name))


def test_one_percent_of_one_weight_is_found(canonical: Program) -> None:
    with pytest.raises(PassError, match="claims to be exact, but the logits moved"):
        run_pipeline(canonical, [_Edit(scale_a_weight)])


def test_a_weight_scaled_in_place_is_found() -> None:
    program = run_pipeline(ntc.capture(tiny_gpt2(n_layer=1)), [Canonicalize()])

    def in_place(work: Program) -> None:
        with torch.no_grad():
            work.tensor("transformer.h.0.mlp.c_fc.weight").mul_(1.01)

    with pytest.raises(PassError, match="wrote into a tensor of the program that it was given"):
        check_pass(_Edit(in_place), program, idempotent=False)


def test_forgotten_metadata_is_found(canonical: Program) -> None:
    def forget(program: Program) -> None:
        node = program.find("h_0_mlp_act")
        with program.graph.inserting_after(node):
            new = program.graph.call_function(aten.relu.default, (node,))
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    with pytest.raises(VerifyError, match="does not say where it comes from"):
        run_pipeline(canonical, [_Edit(forget)])


@pytest.mark.parametrize(
    "edit",
    [
        scale_a_weight,
        lambda program: program.find("ln_f").update_arg(4, 1e-6),
        lambda program: program.find("h_0_mlp_act").update_kwarg("approximate", "none"),
        lambda program: program.find("h_0_add").meta.update({"ntc.neuron": ntc.meta.NeuronSpec(role="q")}),
    ],
)
def test_an_edit_that_is_kept_quiet_is_found(canonical: Program, edit) -> None:
    with pytest.raises(PassError, match="says that it changed nothing"):
        run_pipeline(canonical, [_Edit(edit, modified=False)])


def test_check_pass_accepts_a_pass_that_does_nothing(canonical: Program) -> None:
    check_pass(_Edit(lambda program: None, modified=False), canonical, sites=0, missed=[])


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"ops_after": {"linear": 6}}, "7 linear instead of 6"), ({"ops_before": {"linear": 3}}, "before canonicalize"),
        ({"not_after": ["gelu"]}, "1 gelu instead of 0"), ({"sites": 1}, "expected 1"), ({"missed": ["mask"]}, "missed"),
    ],
)  # fmt: skip
def test_check_pass_can_fail(expected, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_pass(Canonicalize(), ntc.capture(tiny_gpt2(n_layer=1)), **expected)


def test_check_pass_finds_a_pass_that_is_not_idempotent(canonical: Program) -> None:
    with pytest.raises(AssertionError, match="a second run"):
        check_pass(_Edit(lambda program: scale_a_weight(program, 1.0)), canonical)


def test_check_pass_compares_within_the_tolerance_that_is_given(canonical: Program) -> None:
    class Inexact(_Edit):
        exact = False

    check_pass(Inexact(scale_a_weight), canonical, idempotent=False)
    check_pass(Inexact(scale_a_weight), canonical, idempotent=False, atol=1.0)
    with pytest.raises(AssertionError, match="more than allowed"):
        check_pass(Inexact(scale_a_weight), canonical, idempotent=False, atol=1e-4)


@pytest.mark.parametrize(
    "edit",
    [
        lambda p: p.find("h_0_add_1").replace_input_with(p.find("h_0_add"), p.find("add") if "add" in names(p) else p.find("transformer_add")),
        lambda p: p.find("h_0_mlp_act").update_kwarg("approximate", "none"),
        lambda p: p.find("h_0_attn_attention").update_arg(5, 0.25),
    ],
)
def test_the_golden_comparison_can_fail(canonical: Program, edit) -> None:
    work = canonical.copy()
    golden = Path(__file__).parents[1] / "golden" / "gpt2_canonical.txt"
    compare_golden(golden, str(canonical))
    edit(work)
    with pytest.raises(pytest.fail.Exception, match="differs from the golden one"):
        compare_golden(golden, str(work))


def names(program: Program) -> set[str]:
    return {n.name for n in program.graph.nodes}
