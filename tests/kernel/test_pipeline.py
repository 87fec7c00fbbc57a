"""The pass contract: what a pass declares is checked, and the message names the pass and what to do."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from programs import canonical, context, spiking
from torch.fx import Node

from ntc.errors import ConfigError, PassError, VerifyError
from ntc.meta import NEURON, NeuronSpec, building
from ntc.ops import aten
from ntc.pipeline import Calibration, Context, Override, Pass, PassResult, exact_limit, facts_after, rounding_sensitivity, run_pipeline
from ntc.program import Program
from ntc.testing import check_pass
from ntc.verify import max_difference


def edit(
    act: Callable[[Program, Context], PassResult | None],
    *,
    requires: frozenset[str] = frozenset(),
    provides: frozenset[str] = frozenset(),
    removes: frozenset[str] = frozenset(),
    refuses: Mapping[str, str] | None = None,
    exact: bool = False,
    required: bool = False,
    name: str = "edit",
) -> Pass:
    """A pass made of a function; None stands for "one site rewritten"."""
    declared = {
        "name": name, "requires": requires, "provides": provides, "removes": removes, "refuses": refuses or {}, "exact": exact,
        "required": required,
    }  # fmt: skip

    def run(self: Pass, program: Program, context: Context) -> PassResult:
        return act(program, context) or PassResult(True, 1)

    return type("Edit", (Pass,), {**declared, "run": run, "__doc__": "Edit a program.\n\nMore."})()


def nothing(program: Program, context: Context) -> PassResult:
    return PassResult(False)


def double(program: Program, context: Context) -> None:
    """Twice the MLP's input projection: not exact."""
    fc = program.find("h_0_mlp_c_fc")
    stored = program.add_tensor("doubled", program.tensor(fc.args[1]).detach() * 2)
    with building(program.graph, before=fc, stands_for=[fc], by="edit") as call:
        fc.update_arg(1, call(stored))


@pytest.fixture(scope="module")
def program() -> Program:
    return canonical(n_layer=1)


def run(program: Program, *passes: Pass, given: Context | None = None) -> Program:
    return run_pipeline(program, passes, given)


# ------------------------------------------------------------------------------------------------ facts


def test_facts_are_required_provided_and_removed(program: Program) -> None:
    after = run(program, edit(nothing, provides=frozenset({"x", "y"})), edit(nothing, requires=frozenset({"x"}), removes=frozenset({"x"})))
    assert after.facts - program.facts == {"y"}
    assert program.facts == {"captured", "canonical"}


def test_facts_that_a_pass_refuses_are_found_before_anything_runs(program: Program) -> None:
    ran: list[int] = []
    first = edit(lambda p, c: ran.append(1), provides=frozenset({"wet"}), name="hose")
    picky = edit(nothing, refuses={"wet": "it has to be dry"}, name="picky")
    with pytest.raises(PassError, match=r"^pass picky cannot take what hose makes: it has to be dry$"):
        run(program, first, picky)
    assert ran == []
    wet = run(program, first)
    with pytest.raises(PassError, match=r"^pass picky cannot take this program: it has to be dry$"):
        run(wet, picky)
    assert facts_after([first, edit(nothing, removes=frozenset({"wet"})), picky], program.facts) == program.facts


def test_the_whole_order_is_checked_before_anything_runs(program: Program) -> None:
    ran: list[int] = []
    first = edit(lambda p, c: ran.append(1))
    needy = edit(nothing, requires=frozenset({"lit", "warm"}), name="needy")
    with pytest.raises(PassError, match="pass needy needs a program that is lit and warm: no pass in this recipe provides it"):
        run(program, first, needy)
    later = edit(nothing, provides=frozenset({"lit", "warm"}), name="heater")
    with pytest.raises(PassError, match="run heater before it"):
        run(program, first, needy, later)
    gone = edit(nothing, removes=frozenset({"canonical"}), name="undo")
    with pytest.raises(PassError, match="needs a program that is canonical"):
        run(program, first, gone, edit(nothing, requires=frozenset({"canonical"})))
    assert not ran


# ------------------------------------------------------------------------------------------------ declarations


def test_a_pass_that_is_not_exact_and_says_so_is_recorded(program: Program) -> None:
    record = run(program, edit(double)).history[-1]
    assert (record.name, record.sites) == ("edit", 1)
    assert record.drift is not None and record.drift > 0.1


def test_a_false_claim_of_exactness_is_found(program: Program) -> None:
    with pytest.raises(PassError, match=r"pass edit claims to be exact, but the logits moved by [\d.]+ \(limit .*\): declare exact = False"):
        run(program, edit(double, exact=True))


def test_a_weight_error_of_one_percent_is_found(program: Program) -> None:
    def slightly(work: Program, context: Context) -> None:
        fc = work.find("h_0_mlp_c_fc")
        with building(work.graph, before=fc, stands_for=[fc], by="edit") as call:
            fc.update_arg(1, call(work.add_tensor("w", work.tensor(fc.args[1]).detach() * 1.01)))

    with pytest.raises(PassError, match="claims to be exact"):
        run(program, edit(slightly, exact=True))


def test_not_a_number_is_no_exact_result(program: Program) -> None:
    def spoil(work: Program, context: Context) -> None:
        fc = work.find("h_0_mlp_c_fc")
        with building(work.graph, before=fc, stands_for=[fc], by="edit") as call:
            fc.update_arg(1, call(work.add_tensor("w", work.tensor(fc.args[1]).detach() * float("nan"))))

    with pytest.raises(PassError, match="claims to be exact, but the logits moved by nan"):
        run(program, edit(spoil, exact=True))


def test_a_changed_shape_is_no_exact_result(program: Program) -> None:
    def cut(work: Program, context: Context) -> None:
        output = next(n for n in work.graph.nodes if n.op == "output")
        with building(work.graph, before=output, stands_for=[output.args[0]], by="edit") as call:
            output.args = (call(aten.slice.Tensor, output.args[0], 2, 0, 7),)

    with pytest.raises(PassError, match="logits moved by inf"):
        run(program, edit(cut, exact=True))


def test_edits_that_are_denied_are_found(program: Program) -> None:
    def rewires(work: Program, context: Context) -> PassResult:
        double(work, context)
        return PassResult(False)

    def annotates(work: Program, context: Context) -> PassResult:
        work.find("h_0_mlp_act").meta[NEURON] = NeuronSpec()
        return PassResult(False)

    for act in (rewires, annotates, lambda p, c: PassResult(False, sites=1)):
        with pytest.raises(PassError, match="pass edit says that it changed nothing, but it did"):
            run(program, edit(act))


def test_a_write_in_place_is_found(program: Program) -> None:
    name = "transformer.h.0.mlp.c_fc.weight"
    kept = program.tensor(name).detach().clone()

    def writes(work: Program, context: Context) -> None:
        with torch.no_grad():
            work.tensor(name).mul_(1.01)

    try:
        with pytest.raises(PassError, match="pass edit wrote into a tensor of the program that it was given"):
            run(program, edit(writes))
    finally:
        with torch.no_grad():
            program.tensor(name).copy_(kept)


def test_the_given_program_is_left_as_it_was(program: Program) -> None:
    before, text = program.fingerprint(), str(program)
    run(program, edit(double))
    assert program.fingerprint() == before
    assert str(program) == text


def test_a_required_pass_without_sites_shows_the_nearest_miss(program: Program) -> None:
    with pytest.raises(PassError, match="pass edit found none of its sites in GPT2LMHeadModel: nothing looked like one"):
        run(program, edit(nothing, required=True))
    misses = (("h_0_mlp_act", "it is round"), ("lm_head", "it is square"))
    with pytest.raises(PassError, match=r"nearest miss %h_0_mlp_act: it is round$"):
        run(program, edit(lambda p, c: PassResult(False, missed=misses), required=True))
    assert run(program, edit(lambda p, c: PassResult(False, missed=misses))).history[-1].missed == misses


# ------------------------------------------------------------------------------------------------ broken passes


def test_a_crash_names_the_pass_and_keeps_its_cause(program: Program) -> None:
    with pytest.raises(PassError, match=r"pass edit failed: ZeroDivisionError: .*by zero") as caught:
        run(program, edit(lambda p, c: 1 // 0))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_our_own_errors_pass_through(program: Program) -> None:
    def refuse(work: Program, context: Context) -> PassResult:
        raise ConfigError("no such thing")

    with pytest.raises(ConfigError, match=r"^no such thing$"):
        run(program, edit(refuse))


def test_a_result_of_another_kind_is_named(program: Program) -> None:
    with pytest.raises(PassError, match=r"pass edit returned int: run\(\) returns a PassResult"):
        run(program, edit(lambda p, c: 3))


def test_a_dropped_edge_is_found(program: Program) -> None:
    def drop(work: Program, context: Context) -> None:
        add = work.find("h_0_add_1")
        add.replace_all_uses_with(add.args[0])

    with pytest.raises(PassError, match="claims to be exact"):
        run(program, edit(drop, exact=True))


def test_forgotten_metadata_is_found_and_the_pass_named(program: Program) -> None:
    def forget(work: Program, context: Context) -> None:
        act = work.find("h_0_mlp_act")
        with work.graph.inserting_after(act):
            new = work.graph.call_function(aten.relu.default, (act,))
        act.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    with pytest.raises(VerifyError, match=r"pass edit left a program that breaks a rule: node %relu.* does not say where it comes from"):
        run(program, edit(forget))


def test_shapes_that_do_not_fit_are_found_and_the_pass_named(program: Program) -> None:
    def cross(work: Program, context: Context) -> None:
        fc, proj = work.find("h_0_mlp_c_fc"), work.find("h_0_mlp_c_proj")
        with building(work.graph, before=fc, stands_for=[fc], by="edit") as call:
            fc.update_arg(1, call(str(proj.args[1].target)))

    with pytest.raises(PassError, match="pass edit left a program that does not run: "):
        run(program, edit(cross))


def test_a_node_used_before_it_is_made_is_found(program: Program) -> None:
    def shuffle(work: Program, context: Context) -> None:
        work.find("h_0_mlp_act").append(work.find("h_0_mlp_c_fc"))

    with pytest.raises((VerifyError, PassError), match="pass edit left a program that"):
        run(program, edit(shuffle))


# ------------------------------------------------------------------------------------------------ options, context, log


@dataclass(frozen=True)
class Options:
    steps: int = 4
    mode: str = "a"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be positive, got {self.steps}")


class Asks(Pass):
    """Ask for the options of every node."""

    name = "asks"
    Options = Options

    def run(self, program: Program, context: Context) -> PassResult:
        found = {n.name: (self.at(n, context).steps, self.at(n, context).mode) for n in program.graph.nodes if n.op == "call_function"}
        return PassResult(False, notes={"found": found})


def test_configure_checks_names_and_values() -> None:
    assert Asks.configure({}).options == Options()
    assert Asks.configure({"steps": 8}).options.steps == 8
    with pytest.raises(ConfigError, match="pass asks has no option 'stepz'; did you mean steps"):
        Asks.configure({"stepz": 8})
    with pytest.raises(ConfigError, match="pass asks has no option 'zzz'; it has steps, mode"):
        Asks.configure({"zzz": 8})
    with pytest.raises(ConfigError, match="pass asks: steps must be positive, got 0"):
        Asks.configure({"steps": 0})
    with pytest.raises(ConfigError, match="pass edit has no option 'x'; it has none"):
        type(edit(nothing)).configure({"x": 1})
    assert Asks.option_names() == ["steps", "mode"]
    assert Asks.summary() == "Ask for the options of every node."


def test_overrides_apply_in_order_and_to_matching_modules_only(program: Program) -> None:
    given = context(**{"transformer.h.0.*": {"steps": 6, "percentile": 3}, "*.mlp.*": {"steps": 7}, "*.act": {"mode": "b"}})
    record = run(program, Asks.configure({"steps": 5}), given=given).history[-1]
    found = record.notes["found"]
    assert found["lm_head"] == (5, "a")
    assert found["h_0_attn_c_proj"] == (6, "a")
    assert found["h_0_mlp_c_fc"] == (7, "a")
    assert found["h_0_mlp_act"] == (7, "b")
    assert record.options == {"steps": 5, "mode": "a"}
    assert given.used == {("transformer.h.0.*", "asks"), ("*.mlp.*", "asks"), ("*.act", "asks")}
    given = context(**{"*.c_fc": {"asks.steps": 7, "steps": 6, "other.mode": "b"}, "lm_head": {"other.steps": 9}})
    found = run(program, Asks.configure({"steps": 5}), given=given).history[-1].notes["found"]
    assert found["h_0_mlp_c_fc"] == (7, "a"), "the name with the pass goes over the name alone; that of another pass is not meant"
    assert found["lm_head"] == (5, "a")
    assert given.used == {("*.c_fc", "asks")}
    with pytest.raises(ConfigError, match=r"override for \*\.mlp\.\*: steps must be positive, got 0"):
        run(program, Asks(), given=Context(overrides=(Override("*.mlp.*", {"steps": 0}),)))


def test_progress_counts_passes_and_ends(program: Program) -> None:
    calls: list[tuple[str, int, int]] = []
    run(program, edit(nothing), Asks(), given=Context(progress=lambda *a: calls.append(a)))
    assert calls == [("edit", 0, 2), ("asks", 1, 2), ("done", 2, 2)]


def test_the_log_has_one_line_per_pass_and_the_misses_at_debug(program: Program, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="ntc.passes")
    run(program, edit(lambda p, c: PassResult(False, missed=(("lm_head", "it is tied"),))), Asks())
    lines = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "ntc.passes"]
    assert [level for level, _ in lines] == ["INFO", "DEBUG", "INFO"]
    assert lines[0][1].startswith("00 edit sites=0 missed=1 drift=0")
    assert lines[1][1] == "edit left %lm_head alone: it is tied"


def test_calibration_counts_its_tokens() -> None:
    assert Calibration((torch.zeros(2, 3), torch.zeros(1, 3)), "x", "").tokens == 9


def test_calibration_data_is_known_by_its_hash() -> None:
    ids = torch.arange(6).reshape(2, 3)
    assert Calibration.of(ids).sha256 == Calibration.of(ids.clone()).sha256
    assert Calibration.of(ids).sha256 != Calibration.of(ids + 1).sha256


def test_rounding_moves_the_logits_a_little_and_a_wrong_weight_far_more(program: Program) -> None:
    sensitivity = rounding_sensitivity(program)
    assert 0 < sensitivity < 1e-5
    wrong = program.copy()
    weight = next(n for n in wrong.graph.nodes if n.op == "call_function" and n.target is aten.linear.default).args[1]
    name = wrong.add_tensor("wrong", wrong.tensor(weight).detach() * 1.01)
    weight.target = name
    wrong.refresh()
    assert max_difference(program, wrong)[0] > 10 * sensitivity


def test_the_limit_of_exactness_follows_the_logits() -> None:
    assert exact_limit(0.0) == 1e-5
    assert exact_limit(99.0) == pytest.approx(1e-3)


def test_an_empty_pipeline_returns_the_program(program: Program) -> None:
    assert run_pipeline(program, []) is program


# ------------------------------------------------------------------------------------------------ the public harness


def test_the_harness_finds_what_it_promises(program: Program) -> None:
    with pytest.raises(AssertionError, match="before edit there are 1 gelu instead of 2"):
        check_pass(edit(nothing), program, ops_before={"gelu": 2})
    with pytest.raises(AssertionError, match="after edit there are 1 gelu instead of 0"):
        check_pass(edit(nothing), program, not_after=["gelu"])
    with pytest.raises(AssertionError, match="edit reports 0 sites, expected 1"):
        check_pass(edit(nothing), program, sites=1)
    with pytest.raises(AssertionError, match=r"edit missed \[\], expected \['x'\]"):
        check_pass(edit(nothing), program, missed=["x"])
    with pytest.raises(AssertionError, match="a second run of edit still reports 1 sites"):
        check_pass(edit(double), program)
    with pytest.raises(AssertionError, match="edit moved the logits of"):
        check_pass(edit(double), program, atol=1e-3, idempotent=False)
    check_pass(edit(double), program, atol=100.0, idempotent=False)


def test_nodes_of_a_spiking_program_lead_back_to_the_model() -> None:
    """Pick any node: it names a module, a line of the model, the captured nodes it stands for and the passes between."""
    nodes: list[Node] = [n for n in spiking(n_layer=1).graph.nodes if n.op == "call_function" and n.meta["ntc.module"].startswith("transformer.h")]
    assert len(nodes) > 10
    for node in nodes:
        assert re.fullmatch(r"\w+\.py:\d+ in \w+", node.meta["ntc.source"]), node.name
        assert node.meta["ntc.origin"]
        assert node.meta["ntc.made_by"][0] == "capture"
    made: Any = {n.name: n.meta["ntc.made_by"] for n in nodes}
    assert made["h_0_attn_attention_ssa"][-1] == "replace-attention"
