"""To-streaming: any split of a sequence gives the parallel program's spikes and logits; what cannot stream is refused and named."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import CALIBRATION, CONTEXT, calibrated, canonical, nano, rates, spiking
from test_quantize import quantized
from torch import Tensor, nn

import ntc
import ntc_passes.to_streaming as module
from ntc.artifact import load, read_manifest, save, seal
from ntc.errors import ArtifactError, BackendError, ConfigError, DataError, PassError, VerifyError
from ntc.meta import MODULE, SCALE, STATE, TYPE
from ntc.ops import spec_of
from ntc.pipeline import exact_limit, run_pipeline
from ntc.program import Program, interpret
from ntc.spike_type import ANALOG, INDEX, CurrentType, SpikeType
from ntc.state import StateSpec
from ntc.streaming import Stream
from ntc.testing import NanoGPT, check_pass, count_ops, example_ids
from ntc.verify import verify
from ntc_passes.canonicalize import Canonicalize
from ntc_passes.insert_neurons import InsertNeurons
from ntc_passes.replace_attention import ReplaceAttention
from ntc_passes.to_streaming import ToStreaming

LENGTH = 22  # of a context of 24, and more than the streaming kernel takes one by one

VARIANTS: dict[str, dict[str, Any]] = {
    **{n: {"normalizer": n} for n in ("position", "learned-position", "leak", "channel-leak", "rms", "leak-rms", "row-sum")},
    "ternary": {"normalizer": "position", "signed_query": True, "signed_key": True},
    "current": {"normalizer": "row-sum", "output": "current"},
    "lif": {"neuron": "lif", "signed_value": False, "normalizer": "leak", "percentile": 70.0},
}
EXACT = {"position", "learned-position", "rms", "row-sum", "ternary", "current"}
"""Without a leak spiking attention adds integers, and everything else of one piece has the shapes of the parallel program."""


def streaming(program: Program) -> Program:
    return run_pipeline(program, [ToStreaming()])


def doubled(program: Program) -> Program:
    """The same network in float64, where no two orders of a sum differ enough to move a spike."""
    work = program.copy()
    work = work.with_graph(work.graph, {name: t.detach().double() for name, t in work.tensors.items() if t.is_floating_point()})
    work.propagate()
    verify(work)
    return work


@cache
def variant(name: str) -> Program:
    replaced = run_pipeline(calibrated(n_layer=1), [ReplaceAttention.configure(VARIANTS[name])], CONTEXT)
    return run_pipeline(replaced, [InsertNeurons()], CONTEXT)


@cache
def pair(name: str) -> tuple[Program, Program]:
    """A variant and its streaming form, in float64."""
    parallel = doubled(variant(name))
    return parallel, streaming(parallel)


def trains(program: Program) -> list[str]:
    return [n.name for n in program.graph.nodes if isinstance(n.meta.get(TYPE), SpikeType) and spec_of(n).element == "population"]


def spikes_and_logits(program: Program, ids: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    found: dict[str, Tensor] = {}

    def visit(node: torch.fx.Node, args: tuple[Any, ...], value: Any) -> None:
        if node.name in names:
            found[node.name] = value

    names = set(trains(program))
    with torch.no_grad():
        return found, interpret(program, ids, visit)


def pieces(length: int, cuts: set[int]) -> Iterator[tuple[int, int]]:
    yield from pairwise(sorted({0, length, *cuts}))


def in_pieces(program: Program, ids: Tensor, cuts: set[int]) -> tuple[dict[str, Tensor], Tensor]:
    stream, found, rows = Stream(program, len(ids)), {}, []
    names = set(trains(program))

    def visit(node: torch.fx.Node, args: tuple[Any, ...], value: Any) -> None:
        if node.name in names:
            found.setdefault(node.name, []).append(value)

    for start, stop in pieces(ids.shape[1], cuts):
        rows.append(stream(ids[:, start:stop], visit))
    return {name: torch.cat(parts, -2) for name, parts in found.items()}, torch.cat(rows, 1)


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
    assert after.history[-1].notes == {
        "tokens": 24, "max_abs_logit_difference": 0.0, "spikes": 24 * 4 * 2 * (4 * 32 + 128), "spike_mismatches": 0,
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


# ------------------------------------------------------------------------------------------------ positions


class Decoder(nn.Module):
    """A small decoder that makes positions in its own way."""

    def __init__(self, positions: str) -> None:
        super().__init__()
        self.inner, self.positions = NanoGPT(layers=1, mask="sdpa"), positions
        self.register_buffer("table", torch.randn(1, 24, 32, generator=torch.Generator().manual_seed(3)))

    def forward(self, ids: Tensor) -> Tensor:
        length, x = ids.shape[1], self.inner.wte(ids)
        if self.positions == "arange":
            x = x + self.inner.wpe(torch.arange(0, length).unsqueeze(0))
        elif self.positions == "cumsum":
            x = x + self.inner.wpe(torch.ones(1, length, dtype=torch.long).cumsum(1) - 1)
        elif self.positions == "from one":
            x = x + torch.sin(0.3 * torch.ones(1, length).cumsum(1))[..., None]
        elif self.positions == "slice":
            x = x + self.inner.wpe.weight[:length]
        elif self.positions == "buffer":
            x = x + self.table[:, :length, :]
        elif self.positions == "angles":
            x = x + torch.sin(torch.arange(length, dtype=torch.float32)[:, None] * torch.linspace(0.01, 1, 32))
        elif self.positions == "twice":
            numbers = torch.arange(length)
            x = x + self.inner.wpe(numbers) + self.table[0, :length] * torch.cos(numbers * 0.3)[:, None]
        elif self.positions == "share":
            x = x + (torch.arange(length) / length)[None, :, None]
        elif self.positions == "backwards":
            x = x + self.inner.wpe(length - 1 - torch.arange(length))
        elif self.positions == "mean":
            x = x + x.cumsum(1)
        for block in self.inner.h:
            x = block(x, ids)
        return self.inner.lm_head(self.inner.ln_f(x))


@cache
def decoder(positions: str) -> Program:
    return run_pipeline(ntc.capture(Decoder(positions).eval(), example_ids()), [Canonicalize()])


@pytest.mark.parametrize("positions", ["none", "arange", "cumsum", "from one", "slice", "buffer", "angles", "twice"])
def test_positions_are_recognized_by_what_they_are(positions: str) -> None:
    after = streaming(decoder(positions))
    assert after.history[-1].sites == 1 + {"none": 0, "twice": 2}.get(positions, 1)
    ids = example_ids(length=LENGTH)
    with torch.no_grad():
        expected = decoder(positions)(ids)
    for cuts in ({1, 2, 3}, {20}):
        _, found = in_pieces(after, ids, cuts)
        assert float((found - expected).abs().max()) <= exact_limit(float(expected.abs().max()))


def test_rotary_embeddings_move_on() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                         vocab_size=61, max_position_embeddings=24)  # fmt: skip
    parallel = run_pipeline(ntc.capture(LlamaForCausalLM(config).eval()), [Canonicalize()])
    after, ids = streaming(parallel), example_ids(length=LENGTH)
    with torch.no_grad():
        expected = parallel(ids)
    _, found = in_pieces(after, ids, {4, 5, 19})
    assert float((found - expected).abs().max()) <= exact_limit(float(expected.abs().max()))


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("positions", "node"), [("mean", r"aten\.cumsum"), ("share", r"aten\.div"), ("backwards", r"aten\.(sub|rsub|add)")]
)
def test_what_mixes_tokens_otherwise_is_refused_where_it_stands(positions: str, node: str) -> None:
    with pytest.raises(PassError, match=rf"({node})\S* has no streaming form: given the next tokens alone it differs .* at node %\w+"):
        streaming(decoder(positions))


def test_attention_that_is_not_causal_is_refused() -> None:
    program = run_pipeline(ntc.capture(NanoGPT(layers=1, mask="none"), example_ids()), [Canonicalize()])
    with pytest.raises(PassError, match=r"has no streaming form: .* at node %\w+ \(h\.0\.attn"):
        streaming(program)


def test_a_program_that_is_not_canonical_is_refused() -> None:
    with pytest.raises(PassError, match="to-streaming needs a program that is canonical"):
        streaming(ntc.capture(NanoGPT(layers=1), example_ids()))


FORMS = torch.ops.ntc


@pytest.mark.parametrize("lost", [FORMS.position_scale.default, FORMS.spiking_attention.default, FORMS.row_sum_scale.default, None])
def test_the_check_finds_what_the_pass_forgets(lost: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the rewrites left out, and the positions: the check names the node that lacks it."""
    program = variant("row-sum" if lost is FORMS.row_sum_scale.default else "position")
    if lost is None:
        monkeypatch.setattr(module, "shift_positions", lambda *_: 0)
        where = "wpe"
    else:
        monkeypatch.setattr(module, "_FORMS", {k: v for k, v in module._FORMS.items() if k is not lost})
        where = "ssa" if lost is FORMS.spiking_attention.default else "scaled"
    with pytest.raises(PassError, match=rf"has no streaming form: .* at node %\w*{where}"):
        streaming(program)


def test_the_check_finds_a_wrong_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    def slightly(edit: Any, node: torch.fx.Node) -> None:
        *rest, leak = node.args
        wrong = edit.program.tensor(leak).detach() * 0.99
        with ntc.meta.building(edit.program.graph, before=node, stands_for=[node], by="test") as call:
            node.args = (*rest, call(edit.program.add_tensor("wrong", wrong)))
        module._spiking_attention(edit, node)

    monkeypatch.setitem(module._FORMS, FORMS.spiking_attention.default, slightly)
    with pytest.raises(PassError, match=r"given the next tokens alone it differs .* at node %h_0_attn_attention_ssa"):
        streaming(variant("leak"))


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
