"""To-streaming: any split of a sequence gives the parallel program's spikes and logits; what cannot stream is refused and named."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import CALIBRATION, canonical, nano, quantized, rates, spiking
from streaming_cases import LENGTH, VARIANTS, in_pieces, streaming, trains, variant
from torch import Tensor

from ntc.artifact import load, read_manifest, save, seal
from ntc.errors import ArtifactError, BackendError, ConfigError, DataError, VerifyError
from ntc.meta import MODULE, SCALE, STATE
from ntc.pipeline import exact_limit
from ntc.program import Program, interpret
from ntc.spike_type import ANALOG, INDEX, CurrentType
from ntc.state import StateSpec
from ntc.streaming import Stream
from ntc.testing import check_pass, count_ops, example_ids
from ntc.verify import verify
from ntc_passes.to_streaming import ToStreaming

EXACT = {"position", "learned-position", "rms", "row-sum", "ternary", "current"}
"""Without a leak spiking attention adds integers, and everything else of one piece has the shapes of the parallel program."""


def doubled(program: Program) -> Program:
    """The same network in float64, where no two orders of a sum differ enough to move a spike."""
    work = program.copy()
    work = work.with_graph(work.graph, {name: t.detach().double() for name, t in work.tensors.items() if t.is_floating_point()})
    work.propagate()
    verify(work)
    return work


@cache
def pair(name: str) -> tuple[Program, Program]:
    """A variant and its streaming form, in float64."""
    parallel = doubled(variant(name))
    return parallel, streaming(parallel)


def spikes_and_logits(program: Program, ids: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    found: dict[str, Tensor] = {}

    def visit(node: torch.fx.Node, args: tuple[Any, ...], value: Any) -> None:
        if node.name in names:
            found[node.name] = value

    names = set(trains(program))
    with torch.no_grad():
        return found, interpret(program, ids, visit)


some_cuts = st.one_of(st.sets(st.integers(1, LENGTH - 1)), st.sampled_from([set(), set(range(LENGTH)), {1}, {LENGTH - 1}, {19}]))


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=8)
@given(cuts=some_cuts, seed=st.integers(0, 2**16), batch=st.integers(1, 3))
def test_any_split_gives_the_same_spikes_and_logits(name: str, cuts: set[int], seed: int, batch: int) -> None:
    parallel, stream = pair(name)
    ids = example_ids(length=LENGTH, batch=batch, seed=seed)
    expected, logits = spikes_and_logits(parallel, ids)
    found, streamed = in_pieces(stream, ids, cuts)
    assert expected.keys() == found.keys()
    assert expected
    for population, train in expected.items():
        assert torch.equal(found[population], train), population
    torch.testing.assert_close(streamed, logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(EXACT))
def test_a_prompt_in_one_piece_is_bit_equal_without_a_leak(name: str) -> None:
    ids = example_ids(length=LENGTH)
    with torch.no_grad():
        assert torch.equal(streaming(variant(name))(ids), variant(name)(ids))


@pytest.mark.parametrize("given_program", [canonical, rates, spiking, lambda: nano(layout="separate", kv_heads=2)])
@pytest.mark.parametrize("cuts", [set(), {5, 6, 7}, {20, 21}])
def test_single_precision_agrees_to_rounding(given_program: Any, cuts: set[int]) -> None:
    """Softmax attention too, with grouped heads; a cache of keys is read in the parallel program's order, not in its blocks."""
    parallel = given_program()
    ids = example_ids(length=LENGTH)
    with torch.no_grad():
        expected = parallel(ids)
    _, found = in_pieces(streaming(parallel), ids, cuts)
    assert float((found - expected).abs().max()) <= exact_limit(float(expected.abs().max()))


@pytest.mark.parametrize("name", ["position, spikes", "learned position, current, not folded", "leak, current", "leak, ternary, spikes"])
def test_programs_of_integers_are_identical(name: str) -> None:
    """Also where a cut lies within a renewal period: the memory is renewed at the same tokens."""
    parallel, ids = quantized(name), example_ids(length=LENGTH)
    after = streaming(parallel)
    assert {part.dtype for part in after.state} == {torch.int64, torch.int32}
    expected, logits = spikes_and_logits(parallel, ids)
    for cuts in (set(), {1, 2, 3}, {7, 16}, {20}, set(range(LENGTH))):
        found, streamed = in_pieces(after, ids, cuts)
        assert torch.equal(streamed, logits)
        assert all(torch.equal(found[n], train) for n, train in expected.items())
    scales = [n.meta.get(SCALE) for n in parallel.graph.nodes]
    assert [after.find(n.name).meta.get(SCALE) for n in parallel.graph.nodes if n.op == "call_function"] == [
        s for s, n in zip(scales, parallel.graph.nodes, strict=True) if n.op == "call_function"
    ]


def test_what_the_pass_does_to_the_graph() -> None:
    after = check_pass(
        ToStreaming(), spiking(), ops_before={"ntc.spiking_attention": 2}, sites=5, missed=[], not_after=["ntc.spiking_attention"],
        ops_after={"ntc.spiking_attention_stream": 2, "ntc.position_scale": 2, "add": 7, "linear": 13},
    )  # fmt: skip
    assert [n.name for n in after.graph.find_nodes(op="placeholder")] == [
        "input_ids", "position", "h_0_attn_attention_ssa_memory", "h_1_attn_attention_ssa_memory"
    ]  # fmt: skip
    assert [n.name for n in after.results] == [
        "lm_head", "position_next", "h_0_attn_attention_ssa_memory_next", "h_1_attn_attention_ssa_memory_next"
    ]  # fmt: skip
    text = str(after)
    assert "%h_0_attn_attention_ssa_memory: current T=4 rate [4, B, 4, 8, 8]" in text
    assert text.endswith("return %lm_head, %position_next, %h_0_attn_attention_ssa_memory_next, %h_1_attn_attention_ssa_memory_next\n")
    assert {n.name for n in spiking().graph.nodes} - {n.name for n in after.graph.nodes} == set(), "every name still means the same"
    notes = dict(after.history[-1].notes)
    with torch.no_grad():
        largest = float(spiking()(spiking().example).abs().max())
    assert notes.pop("max_abs_logit_difference") <= exact_limit(largest)  # sums in another order: 0 on some processors, not on others
    assert notes == {
        "tokens": 24, "spikes": 24 * 4 * 2 * (4 * 32 + 128), "spike_mismatches": 0,
        "state_bytes": 8 + 2 * 4 * 4 * 8 * 8 * 4, "state_bytes_per_token": 0,
    }  # fmt: skip


def test_the_state_of_softmax_attention_grows() -> None:
    after = streaming(canonical(n_layer=1))
    assert after.state == (
        StateSpec("position", INDEX, (1,), torch.int64),
        StateSpec("h_0_attn_attention_keys", ANALOG, ("B", "P", 32), torch.float32),
        StateSpec("h_0_attn_attention_values", ANALOG, ("B", "P", 32), torch.float32),
    )
    assert after.shape_text(after.results[2]) == "[B, L + P, 32]"
    assert after.find("h_0_attn_attention_keys").meta[MODULE] == "transformer.h.0.attn"
    assert after.history[-1].notes["state_bytes_per_token"] == 2 * 32 * 4
    keys = after.state[1]
    assert keys.grows
    assert keys.initial(3).shape == (3, 0, 32)
    stream = Stream(after, 2)
    stream(example_ids(length=5))
    assert {name: tuple(t.shape) for name, t in stream.named().items()} == {
        "position": (1,), "h_0_attn_attention_keys": (2, 5, 32), "h_0_attn_attention_values": (2, 5, 32)
    }  # fmt: skip
    assert int(stream.named()["position"]) == 5


def test_the_state_of_each_normalizer() -> None:
    current, kinds = CurrentType(4), {}
    for name in VARIANTS:
        kinds[name] = {part.name.removeprefix("h_0_attn_attention_"): part.shape for part in streaming(variant(name)).state}
        assert all(part.type in (INDEX, current) and not part.grows for part in streaming(variant(name)).state)
    plain = {"position": (1,), "ssa_memory": (4, "B", 4, 8, 8)}
    sums = {**plain, "scaled_key_sums": (4, "B", 32)}
    assert kinds == {name: sums if VARIANTS[name]["normalizer"] == "row-sum" else plain for name in VARIANTS}


def broken_state(change: Any) -> Program:
    work = streaming(canonical(n_layer=1)).copy()
    change(work)
    return work


def test_the_verifier_knows_the_state() -> None:
    def output(work: Program) -> torch.fx.Node:
        (node,) = work.graph.find_nodes(op="output")
        return node

    def short(work: Program) -> None:
        output(work).args = (work.results[:-1],)

    def swapped(work: Program) -> None:
        logits, position, keys, values = work.results
        output(work).args = ((logits, keys, position, values),)

    def not_grown(work: Program) -> None:
        logits, position, _, values = work.results
        output(work).args = ((logits, position, work.find("h_0_attn_attention_keys"), values),)

    def unknown(work: Program) -> None:
        del work.find("position").meta[STATE]

    def quiet(work: Program) -> None:
        work.facts -= {"streaming"}

    for change, message in (
        (short, "3 parts come in, 2 go out"),
        (swapped, r"the state %position is index of torch.int64, \['1'\] .* comes back as analog of torch.float32, \[B, L \+ P, 32\]"),
        (not_grown, r"the state %h_0_attn_attention_keys .* comes back as analog of torch.float32, \[B, P, 32\]"),
        (unknown, "takes token ids and its state, and the input %position is neither"),
        (quiet, "a program has a state if it is streaming, and only then"),
    ):
        with pytest.raises(VerifyError, match=message):
            verify(broken_state(change))


# ------------------------------------------------------------------------------------------------ running and saving


def test_a_stream_stops_at_the_context_and_forks() -> None:
    program, ids = streaming(spiking()), example_ids(length=24)
    stream = Stream(program, 2)
    stream(ids[:, :20])
    other = stream.fork()
    with pytest.raises(DataError, match=r"5 token\(s\) after the first 20 are more than the model's context of 24"):
        stream(ids[:, 19:])
    assert stream.position == 20, "nothing has moved"
    last = stream(ids[:, 20:])
    with torch.no_grad():
        torch.testing.assert_close(last, spiking()(ids)[:, 20:])
    torch.testing.assert_close(other(ids[:, 20:]), last)
    assert (stream.position, other.position) == (24, 24)
    with pytest.raises(DataError, match="1 token"):
        stream(ids[:, :1])


def test_a_stream_goes_on_from_a_state() -> None:
    program, ids = streaming(spiking()), example_ids(length=12)
    first = Stream(program, 2)
    first(ids[:, :7])
    expected = first.fork()(ids[:, 7:])
    for state in (first.state, first.named()):
        again = Stream(program, 2, state)
        assert again.position == 7
        assert torch.equal(again(ids[:, 7:]), expected)
    with pytest.raises(DataError, match="the state lacks h_1_attn_attention_ssa_memory; it has position, "):
        Stream(program, 2, first.state[:-1])
    with pytest.raises(DataError, match=r"the state h_0_attn_attention_ssa_memory is .* after 7 tokens of 1 sequence\(s\) it is .*\[4, 1, 4, 8, 8\]"):
        Stream(program, 1, first.state)
    with pytest.raises(DataError, match=r"the state is that of 2 sequence\(s\), and tokens of 1 were given"):
        first(ids[:1, :1])
    with pytest.raises(ConfigError, match="keeps no state: run the pass to-streaming"):
        Stream(spiking())


def test_a_streaming_program_is_saved_with_its_state(tmp_path: Path) -> None:
    program = streaming(variant("row-sum"))
    save(program, tmp_path)
    seal(tmp_path)
    again = load(tmp_path)
    assert str(again) == str(program)
    assert again.state == program.state
    assert read_manifest(tmp_path)["state"][0] == {"name": "position", "type": {"kind": "index"}, "shape": [1], "dtype": "int64"}
    ids = example_ids(length=12)
    assert torch.equal(in_pieces(again, ids, {3, 4})[1], in_pieces(program, ids, {3, 4})[1])
    for wrong in ({"dtype": "int65"}, {"shape": ["Q"]}):
        with pytest.raises(ValueError, match="no state has the dtype"):
            StateSpec.from_json({**program.state[0].to_json(), **wrong})
    text = (tmp_path / "program.json").read_text()
    (tmp_path / "program.json").write_text(text.replace('"int64"', '"double_or_nothing"', 1))
    with pytest.raises(ArtifactError):
        load(tmp_path)


def test_a_stream_can_be_watched_and_changed() -> None:
    """``visit`` sees the state go out, and what it returns is what the next piece gets."""
    program, ids = streaming(spiking()), example_ids(length=4)
    stream = Stream(program, 2)

    def forget(node: torch.fx.Node, args: tuple[Any, ...], value: Any) -> Tensor | None:
        return torch.zeros_like(value) if node.name.endswith("memory_next") else None

    stream(ids[:, :3], forget)
    assert not any(part.any() for part in stream.state[1:])
    assert not torch.equal(stream(ids[:, 3:]), in_pieces(program, ids, {3})[1][:, 3:])


def test_training_and_the_netlist_take_the_parallel_form(tmp_path: Path) -> None:
    from ntc.registry import backend
    from ntc.training.form import TrainingForm

    program = streaming(variant("leak"))
    with pytest.raises(ConfigError, match="a streaming program is not trained: train the parallel one"):
        TrainingForm(program)
    with pytest.raises(BackendError, match="write it from the parallel program"):
        backend("netlist").emit(program, tmp_path, analog=None, tokens=None)


def test_counting_what_a_stream_does() -> None:
    """The additions of the streaming form: what the parallel form's formula says it would make."""
    from ntc.observe import Activity, observe

    ids, counts = CALIBRATION.batches[0], {}
    for program in (variant("leak"), streaming(variant("leak"))):
        activity = Activity()
        observe(program, [ids], activity)
        (row,) = (r for r in activity.nodes.values() if "spiking_attention" in r.op)
        counts[row.op] = row
    whole, stream = counts["ntc.spiking_attention"], counts["ntc.spiking_attention_stream"]
    assert stream.counts.acs == whole.measured["write"] + whole.measured["read"] > 0
    assert stream.counts.macs == whole.measured["leak"] == ids.numel() * 4 * 4 * 8 * 8
    assert count_ops(streaming(variant("leak")))["ntc.spiking_attention_stream"] == 1
