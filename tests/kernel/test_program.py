"""Program: copies share tensors and no graph, sizes stay dynamic, what is wrong with token ids is said."""

from __future__ import annotations

import pytest
import torch
from programs import canonical, rates, spiking

from ntc.errors import DataError, NtcError
from ntc.meta import NEURON, NeuronSpec, building
from ntc.ops import aten
from ntc.program import PassRecord, Program, interpret, op_name
from ntc.testing import example_ids


@pytest.fixture(scope="module")
def program() -> Program:
    return canonical(n_layer=1)


def test_a_copy_shares_tensors_and_not_the_graph(program: Program) -> None:
    copy = program.copy()
    assert copy.graph is not program.graph
    assert copy.tensors.keys() == program.tensors.keys()
    assert all(copy.tensors[n] is t for n, t in program.tensors.items())
    assert str(copy) == str(program)
    copy.find("h_0_mlp_act").meta["ntc.module"] = "elsewhere"
    copy.graph.erase_node(next(n for n in copy.graph.nodes if n.op == "output"))
    assert program.find("h_0_mlp_act").meta["ntc.module"] == "transformer.h.0.mlp.act"
    assert program(example_ids()).shape == (2, 9, 61)
    copy.facts |= {"x"}
    assert "x" not in program.facts


def test_the_fingerprint_sees_wiring_values_and_annotations(program: Program) -> None:
    same = program.copy()
    assert same.fingerprint() == program.fingerprint()

    def constant(work: Program) -> None:
        work.find("ln_f").update_arg(4, 1e-4)

    def rewired(work: Program) -> None:
        work.find("h_0_mlp_c_fc").update_arg(0, work.find("h_0_add"))

    def annotated(work: Program) -> None:
        work.find("h_0_mlp_act").meta[NEURON] = NeuronSpec(steps=9)

    def other_tensor(work: Program) -> None:
        node = next(n for n in work.graph.nodes if n.op == "get_attr" and n.target == "transformer.ln_f.weight")
        node.target = work.add_tensor("transformer.ln_f.weight", work.tensor(node).detach().clone())
        work.refresh()

    found = {program.fingerprint()}
    for act in (constant, rewired, annotated, other_tensor):
        work = program.copy()
        act(work)
        found.add(work.fingerprint())
    assert len(found) == 5


def test_printing_groups_by_block_and_names_weights(program: Program) -> None:
    text = str(program)
    assert "\ntransformer.h.0:\n" in text
    assert "  %h_0_mlp_c_fc: analog [B, L, 128] = linear(%h_0_ln_2, mlp.c_fc.weight, mlp.c_fc.bias)\n" in text
    assert text.endswith("return %lm_head\n")
    assert program.shape_text(program.find("wpe")) == "[1, L, 32]"
    assert program.line(program.find("input_ids")) == "%input_ids: index [B, L]"
    assert str(spiking(n_layer=1)).count("spikes T=4") == 5


def test_find_suggests_near_names(program: Program) -> None:
    assert program.find("%ln_f") is program.find("ln_f")
    with pytest.raises(NtcError, match=r"no node is called %h_0_mlp_fc; did you mean .*%h_0_mlp_c_fc"):
        program.find("h_0_mlp_fc")
    with pytest.raises(NtcError, match=r"no node is called %§§§$"):
        program.find("§§§")


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 24), (5, 1), (3, 17)])
def test_batch_and_length_are_dynamic_at_every_stage(batch: int, length: int) -> None:
    ids = example_ids(batch=batch, length=length, seed=batch)
    for stage in (canonical(n_layer=1), rates(n_layer=1), spiking(n_layer=1)):
        whole = stage(ids)
        assert whole.shape == (batch, length, 61)
        torch.testing.assert_close(whole[:1], stage(ids[:1]), rtol=1e-4, atol=1e-4)
        shorter = stage(ids[:, : max(1, length - 1)])
        torch.testing.assert_close(whole[:, : shorter.shape[1]], shorter, rtol=1e-4, atol=1e-4)  # later tokens do not matter


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2]], r"takes a tensor of token ids of shape \[B, L\], not a list"),
        (torch.zeros(3, dtype=torch.long), r"got torch.int64 of shape \(3,\)"),
        (torch.zeros(1, 3), "got torch.float32"),
        (torch.zeros(1, 3, dtype=torch.bool), "got torch.bool"),
        (torch.zeros(1, 0, dtype=torch.long), "at least one token"),
        (torch.zeros(1, 25, dtype=torch.long), "25 tokens are more than the model's context of 24"),
        (torch.full((1, 3), 61), "token id 61 is outside the vocabulary of 61 tokens"),
        (torch.full((1, 3), -1), "token id -1 is outside"),
    ],
)
def test_ids_that_do_not_fit_are_refused(program: Program, ids: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        program(ids)


def test_steps_are_those_of_the_longest_train() -> None:
    assert canonical(n_layer=1).steps == rates(n_layer=1).steps == 0
    assert spiking(n_layer=1).steps == 4


def test_new_tensors_take_free_names(program: Program) -> None:
    work = program.copy()
    one = work.add_tensor("transformer.ln_f.weight", torch.ones(32))
    assert one == "transformer.ln_f.weight_1"
    assert work.add_tensor("fresh.deep.name", torch.arange(3)) == "fresh.deep.name"
    assert isinstance(work.tensor(one), torch.nn.Parameter)
    assert not isinstance(work.tensor("fresh.deep.name"), torch.nn.Parameter)
    assert work.tensor_or_none("fresh.deep.other") is None
    norm = work.find("ln_f")
    with building(work.graph, before=norm, stands_for=[norm], by="test") as call:
        norm.update_arg(2, call(one))
    work.refresh()
    assert torch.equal(work.tensor("transformer.ln_f.weight"), torch.ones(32)), "the name was free after the edit"
    assert "fresh.deep.name" not in work.tensors, "what no node uses is gone"
    assert not torch.equal(program.tensor("transformer.ln_f.weight"), torch.ones(32))


def test_two_tensors_that_ask_for_one_name_stay_two(program: Program) -> None:
    """Both replace a norm's weight; only one of them can have its name."""
    work = program.copy()
    for number, norm in enumerate((work.find("h_0_ln_1"), work.find("h_0_ln_2"))):
        name = work.add_tensor("transformer.ln_f.weight", torch.full((32,), float(number + 2)))
        with building(work.graph, before=norm, stands_for=[norm], by="test") as call:
            norm.update_arg(2, call(name))
    work.find("ln_f").update_arg(2, None)  # so that the name becomes free
    work.refresh()
    values = [work.tensor(work.find(name).args[2]) for name in ("h_0_ln_1", "h_0_ln_2")]
    assert [v[0].item() for v in values] == [2.0, 3.0]
    assert "transformer.ln_f.weight" in work.tensors


def test_every_parameter_once(program: Program) -> None:
    assert sum(p.numel() for p in program.parameters()) == program.info.parameters


def test_interpreting_equals_running_and_can_replace_and_stop(program: Program) -> None:
    ids, seen = example_ids(), []
    with torch.no_grad():
        result = interpret(program, ids, lambda node, args, value: seen.append(node.name))
        assert torch.equal(result, program(ids))
        zeroed = interpret(program, ids, lambda n, a, v: torch.zeros_like(v) if n.name == "ln_f" else None)
        assert not zeroed.any()
        seen.clear()
        stop = program.find("h_0_mlp_c_fc")
        middle = interpret(program, ids, lambda node, args, value: seen.append(node.name), last=stop)
        assert middle.shape == (2, 9, 128)
        assert seen[-1] == "h_0_mlp_c_fc"
        other = {n: torch.zeros_like(t) for n, t in program.tensors.items()}
        assert not interpret(program, ids, lambda *_: None, tensors=other).any()


def test_short_names_of_ops() -> None:
    assert op_name(aten.linear.default) == "linear"
    assert op_name(torch.ops.ntc.if_rate.default) == "ntc.if_rate"
    assert op_name(max) == "max"


def test_records_as_plain_data_hold_no_timings() -> None:
    record = PassRecord("x", {"steps": 4}, 2, (("a", "b"),), seconds=1.5, drift=0.25, notes={"k": 1})
    assert record.to_json() == {
        "name": "x", "options": {"steps": 4}, "sites": 2, "missed": [["a", "b"]], "drift": 0.25, "notes": {"k": 1},
    }  # fmt: skip


def test_a_renamed_program_is_the_same_program(program: Program) -> None:
    other = program.named("elsewhere")
    assert other.info.source == "elsewhere"
    assert program.info.source == "GPT2LMHeadModel"
    assert other.module is program.module
