"""Energy of streaming programs: the additions of the memory, and the same projections as in the parallel form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from integer_programs import VOCABULARY, block
from integer_programs import streaming as by_hand
from programs import TOKENS, canonical, quantized, spiking

from ntc.energy import measure_energy
from ntc.observe import Activity, count_by_shape, observe
from ntc.pipeline import run_pipeline
from ntc.program import Program
from ntc.text import random_tokens
from ntc_passes.to_streaming import ToStreaming


def streaming(program: Program) -> Program:
    return run_pipeline(program, [ToStreaming()])


@pytest.mark.parametrize("make", [lambda: spiking(n_layer=1), lambda: quantized("leak, current")])
def test_a_streaming_program_costs_what_the_parallel_one_says_of_it(make: Callable[[], Program]) -> None:
    analog = canonical(n_layer=1)
    parallel, stream = (measure_energy(program, analog, TOKENS, batch=3) for program in (make(), streaming(make())))
    before, after = parallel.attention(), stream.attention()
    assert after["ssa_pj"] == pytest.approx(before["ssa_streaming_pj"]) == pytest.approx(after["ssa_streaming_pj"])
    assert after["ssa_acs"] > 0
    assert stream.snn.attention_projections == parallel.snn.attention_projections
    assert len(stream.snn.attention_projections) == 4
    with_projections = before["with_projections"]["ssa_pj"] - before["ssa_pj"]
    assert after["with_projections"]["ssa_pj"] - after["ssa_pj"] == pytest.approx(with_projections) != 0
    assert after["steps_times_rate"] is None
    assert stream.uncounted() == []
    rest = [report.snn.total(lambda n: n.kind != "attention") for report in (parallel, stream)]
    assert (rest[0].acs, rest[0].macs, rest[0].neuron_updates) == (rest[1].acs, rest[1].macs, rest[1].neuron_updates)


def test_the_analog_network_may_stream_too() -> None:
    """Softmax attention with a cache multiplies as often as without one; a whole text has no tokens before it."""
    whole, stream = canonical(n_layer=1), streaming(canonical(n_layer=1))
    counts = [count_by_shape(program, [(2, 9)]).nodes["h_0_attn_attention" + end].counts for program, end in ((whole, ""), (stream, "_stream"))]
    assert counts[0] == counts[1]
    program = spiking(n_layer=1)
    reports = [measure_energy(program, analog, TOKENS) for analog in (whole, stream)]
    assert reports[0].ann.attention_projections == reports[1].ann.attention_projections != frozenset()
    assert reports[0].attention() == reports[1].attention()


def test_renewals_of_the_memory_are_multiplications() -> None:
    activity = Activity()
    observe(by_hand(block()), random_tokens(VOCABULARY, 11, 22).batches(2), activity)
    row = activity.nodes["attention_stream"]
    assert row.counts.macs == 2 * 2 * (4 * 2 * 4 * 4)  # windows; renewals at 4 and 8; steps, heads, entries of M
    assert row.counts.acs == row.measured["write"] + row.measured["read"] > 0
