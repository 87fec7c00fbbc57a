"""Tables of constants, baselines, break-even, sensitivity: closed forms, and properties of made-up networks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from energy_cases import linear, neurons, pricing
from hypothesis import given
from hypothesis import strategies as st
from programs import TOKENS, canonical, spiking

from ntc.energy import Pricing, list_constants, list_memories, load_constants, load_memory, measure_energy
from ntc.energy.baselines import at_rate, at_steps, baselines_of, break_even, compare, equivalent_bits
from ntc.energy.numbers import LEVELS
from ntc.energy.pricing import COLUMNS
from ntc.energy.sensitivity import sensitivity
from ntc.errors import ConfigError
from ntc.observe import NodeCounts
from ntc.ops import Counts

SIZES = st.integers(1, 64)
RATES = st.floats(0.01, 1)
STEPS = st.integers(1, 16)
TABLES = st.sampled_from([pricing(c.id, m.id, tokens=t, steps=s) for c in list_constants() if not c.device for m in list_memories()
                          for t, s in ((1, False), (4, True))])  # fmt: skip


def network(inputs: int, outputs: int, steps: int, rate: float) -> list[NodeCounts]:
    """One layer of neurons and the layer behind it."""
    return [linear(inputs, inputs, name="in"), neurons(inputs, steps, rate), linear(inputs, outputs, steps, rate, "out")]


# ------------------------------------------------------------------------------------------------ properties


@given(TABLES, SIZES, SIZES, STEPS, RATES)
def test_energy_adds_up_over_nodes(price: Pricing, inputs: int, outputs: int, steps: int, rate: float) -> None:
    nodes = network(inputs, outputs, steps, rate)
    for column in COLUMNS:
        assert price.column(column, nodes) == pytest.approx(sum(price.column(column, [n]) for n in nodes))


@given(TABLES, SIZES, SIZES, STEPS, RATES, st.floats(1, 3))
def test_energy_rises_with_rate_and_steps(price: Pricing, inputs: int, outputs: int, steps: int, rate: float, more: float) -> None:
    nodes = network(inputs, outputs, steps, rate)
    for column in COLUMNS:
        before = price.column(column, nodes)
        for scaled in (at_rate, at_steps):
            assert price.column(column, [scaled(n, more) for n in nodes]) >= before * (1 - 1e-12)


@given(TABLES, SIZES, SIZES, STEPS)
def test_without_spikes_nothing_is_accumulated(price: Pricing, inputs: int, outputs: int, steps: int) -> None:
    nodes = [at_rate(n, 0) for n in network(inputs, outputs, steps, 0.5)]
    assert sum(n.counts.acs + n.counts.spikes + n.traffic.weights for n in nodes[1:]) == pytest.approx(0, abs=1e-9)
    assert price.compute(nodes) == pytest.approx(price.compute(nodes[:2]))


@given(SIZES, SIZES, STEPS, RATES, st.floats(0.1, 4))
def test_scaling_is_counting(inputs: int, outputs: int, steps: int, rate: float, factor: float) -> None:
    """A network at another rate, or with twice the steps, is what scaling its counts gives."""
    nodes, price = network(inputs, outputs, steps, rate), pricing()
    for made, scaled in (
        (network(inputs, outputs, steps, rate * factor), [at_rate(n, factor) for n in nodes]),
        (network(inputs, outputs, 2 * steps, rate), [at_steps(n, 2) for n in nodes]),
    ):
        for column in COLUMNS:
            assert price.column(column, made) == pytest.approx(price.column(column, scaled))


@given(st.sampled_from(list_memories()), st.floats(0, 1e6))
def test_units_convert(memory: Any, elements: float) -> None:
    """pJ per access of so many bits, elements of so many bits: joules do not depend on how accesses are cut."""
    halved = replace(memory, levels={n: replace(m, bits=m.bits // 2, picojoules=m.picojoules / 2) for n, m in memory.levels.items()})
    moved = dict.fromkeys(memory.holds, elements)
    assert halved.cost(moved) == pytest.approx(memory.cost(moved))
    level = memory.levels[memory.holds["weights"]]
    assert memory.cost({"weights": level.bits / 8 * elements}) == pytest.approx(level.picojoules * elements)


@given(TABLES, SIZES, SIZES, STEPS, RATES)
def test_break_even_substituted_back(price: Pricing, inputs: int, outputs: int, steps: int, rate: float) -> None:
    ann = [linear(inputs, inputs, name="in"), linear(inputs, outputs, name="out")]
    snn = network(inputs, outputs, steps, rate)
    for row in compare(ann, snn, price, steps, rate):
        for column in COLUMNS:
            cell = row[column.replace(" ", "_")]
            for key, scaled, unit in (("break_even_rate", at_rate, rate), ("break_even_steps", at_steps, steps)):
                if (found := cell[key]) is not None:
                    there = price.column(column, [scaled(n, found / unit) for n in snn])
                    assert there == pytest.approx(cell["ann_pj"], rel=1e-9)
                else:
                    silent = price.column(column, [scaled(n, 0) for n in snn])
                    loudest = price.column(column, [scaled(n, 1e9) for n in snn])
                    assert silent > cell["ann_pj"] or loudest < cell["ann_pj"] or silent == loudest


def test_break_even_in_closed_form() -> None:
    """N inputs to M neurons: 4.6 N M = 0.9 (T r N M + T N) where the layer in front is left out."""
    nodes = network(64, 32, 4, 0.25)[1:]
    (row, *_) = compare([linear(64, 32)], nodes, pricing(), 4, 0.25)
    assert row["baseline"] == "fp32"
    assert row["compute"]["break_even_rate"] == pytest.approx((4.6 * 64 * 32 / 0.9 - 4 * 64) / (4 * 64 * 32))
    assert row["compute"]["break_even_steps"] == pytest.approx(4.6 * 64 * 32 / 0.9 / (0.25 * 64 * 32 + 64))


def test_break_even_on_pieces_and_none() -> None:
    def concave(f: float) -> float:
        return 1 + min(4 * f, 1 + f, 3.0)

    for target in (1.0, 1.5, 2.2, 2.5, 3.9):
        found = break_even(concave, target)
        assert found is not None and concave(found) == pytest.approx(target)
    assert break_even(concave, 0.5) is None, "even silence costs more"
    assert break_even(concave, 4.5) is None, "no rate costs as much"
    assert break_even(lambda f: 1.0, 1.0) is None, "nothing depends on it"


# ------------------------------------------------------------------------------------------------ baselines


def test_bits_of_steps() -> None:
    assert [equivalent_bits(t) for t in (1, 2, 3, 4, 7, 8, 15, 16)] == [1, 2, 2, 3, 3, 4, 4, 5]


def test_baselines_of_a_program() -> None:
    report = measure_energy(spiking(), canonical(), TOKENS)
    data = report.to_json()
    rows = data["baselines"]["total"]
    assert [r["baseline"] for r in rows] == ["fp32", "int8", "3 bits"]
    macs = report.ann.total().macs
    assert rows[0]["compute"]["ann_pj"] == pytest.approx(4.6 * macs) == data["total"]["ann_pj"]
    assert rows[1]["compute"]["ann_pj"] == pytest.approx(0.3 * macs)
    assert rows[2]["compute"]["ann_pj"] == pytest.approx((0.2 * 3 / 8 + 0.1) * macs)
    for row in rows:
        assert row["compute"]["snn_pj"] == data["total"]["snn_pj"], "the program is costed as it is"
        assert row["compute"]["reduction"] == pytest.approx(1 - row["compute"]["snn_pj"] / row["compute"]["ann_pj"])
    # In SRAM all three read as many weights, of 32 and 8 bits.
    wide, narrow, narrowest = (r["compute_and_memory"]["ann_pj"] - r["compute"]["ann_pj"] for r in rows)
    assert wide == pytest.approx(4 * narrow)
    assert narrowest < narrow


def test_constants_without_a_multiplier_have_no_narrow_baseline() -> None:
    price = pricing("horowitz-45nm-fp32")
    alone = replace(price, constants=replace(price.constants, baselines=("horowitz-45nm-fp32",)))
    assert [b.name for b in baselines_of(alone, 4)] == ["fp32"]
    assert baselines_of(replace(price, constants=replace(price.constants, baselines=())), 4) == []
    assert [b.name for b in baselines_of(price, 0)] == ["fp32", "int8"], "nothing spikes"
    with pytest.raises(ConfigError, match=r"horowitz-45nm-fp32 do not say what a multiplication takes"):
        price.constants.quantised(3)


# ------------------------------------------------------------------------------------------------ sensitivity


def test_sensitivity_of_levels_and_numbers() -> None:
    ann, snn, price = [linear(64, 32)], network(64, 32, 4, 0.25), pricing()
    found = sensitivity(ann, snn, price)
    assert [(r["column"], r["level"]) for r in found["levels"]] == [(c, level) for c in COLUMNS for level in LEVELS]
    by = {(r["column"], r["level"]): r for r in found["levels"]}
    for column in COLUMNS:
        energies = [by[column, level]["snn_pj"] for level in LEVELS]
        assert energies == sorted(energies)
        assert by[column, "nominal"]["snn_pj"] == price.column(column, snn)
    one = {(r["number"], r["column"]): r for r in found["numbers"]}
    sums = one["partial sums", "compute and memory"]
    assert (sums["low"], sums["nominal"], sums["high"]) == (0, 0, 2)
    assert sums["reduction_high"] < sums["reduction_low"], "spikes that write their sums to memory cost more"
    dear = Pricing(price.constants, replace(price.memory, accesses=2.0))
    before, after = (dear.column("compute and memory", nodes) for nodes in (ann, snn))
    assert sums["reduction_high"] == pytest.approx(1 - after / before)
    moves = [abs(r["reduction_high"] - r["reduction_low"]) for r in found["numbers"]]
    assert moves == sorted(moves, reverse=True)


# ------------------------------------------------------------------------------------------------ tables


def test_the_tables_that_ship() -> None:
    found = {c.id: c for c in list_constants() if not c.device}
    horowitz = {f"horowitz-45nm-{kind}" for kind in ("fp16", "fp32", "int8", "int32")}
    assert set(found) == horowitz | {f"spikingjelly-2.0-{kind}" for kind in ("fp32", "int8")}
    assert (found["horowitz-45nm-int8"].mac, found["horowitz-45nm-int8"].ac) == (0.3, 0.1)
    assert found["horowitz-45nm-int8"].at("low").mac == pytest.approx(0.23)
    assert found["horowitz-45nm-fp16"].at("high").ac == pytest.approx(0.9)
    for name, table in found.items():
        assert "ISSCC 2014" in table.source and table.scope and table.elementwise == 0
        assert set(table.baselines) <= found.keys()
        assert table.at("high").elementwise == pytest.approx(3.7 if name in horowitz else 0)
    for memory in list_memories():
        assert memory.tokens == 1 and not memory.steps and memory.source and memory.scope
        if "Horowitz" not in memory.source:
            continue
        assert memory.at("high").per_byte("weights") > memory.per_byte("weights") > memory.at("low").per_byte("weights")


GOOD = """id = "m"
title = "t"
source = "s"
scope = "c"
[levels.near]
bits = 32
picojoules = { nominal = 5, high = 7, source = "mine" }
[holds]
weights = "near"
membranes = "near"
activations = "near"
spikes = "near"
cache = "near"
state = "near"
partial_sums = "near"
[reuse]
tokens = 2
"""


def test_a_hierarchy_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text(GOOD)
    memory = load_memory(path)
    assert (memory.tokens, memory.steps, memory.accesses) == (2, False, 0)
    assert memory.per_byte("cache") == 1.25 and memory.at("high").per_byte("cache") == 1.75
    assert load_memory(path, reuse=64).tokens == 64
    assert [r["name"] for r in memory.to_json()["ranges"]] == ["near", "partial sums"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("id =", "name =", "is no table of memory energies: 'id'"),
        ("bits = 32", "bits = 0", "the width of near is 0, and no whole number from 1 on"),
        ("nominal = 5", "nominal = -5", "give -5.0 pJ for near"),
        ("high = 7", "high = 3", r"give near as 5 \(low\), 5 \(nominal\), 3 \(high\): they must rise"),
        ("high = 7", "higher = 7", "near has nominal, low, high and source, and no higher"),
        ('cache = "near"', "", "it does not say where cache lie"),
        ('cache = "near"', 'cache = "far"', "it has no level far"),
        ("tokens = 2", "tokens = 0.5", "reuse.tokens is 0.5"),
        ("tokens = 2", 'steps = "no"', "steps is 'no', and neither true nor false"),
        ("[levels.near]", "[near]", "is no table of memory energies: 'levels'"),
    ],
)
def test_bad_hierarchies(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "m.toml"
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        load_memory(path)


def test_names_that_are_no_table(tmp_path: Path) -> None:
    for load in (load_constants, load_memory):
        with pytest.raises(ConfigError, match=r"cannot read the .*loihi: No such file .*; the tables that ship with ntc are horowitz-45nm"):
            load("loihi")
        with pytest.raises(ConfigError, match="Is a directory"):
            load(tmp_path)


def test_ranges_of_constants(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    head = 'id = "x"\ntitle = "t"\nsource = "s"\nscope = "c"\n[picojoules]\nac = 1\ngraded_mac = 2\nupdate = 0\n'
    path.write_text(head + 'mac = { low = 1, nominal = 2, high = 4, source = "mine" }\n[bits]\nweights = 4\n[multiplier]\npicojoules = 0.5\nbits = 4\n')
    table = load_constants(path)
    assert [table.at(level).mac for level in LEVELS] == [1, 2, 4]
    assert table.at("high", "ac").mac == 2
    assert table.bits.weights == 4 and table.bits.activations == 32
    assert table.quantised(2).mac == pytest.approx(0.5 * 2 / 4 + 1)
    assert table.cost(Counts(macs=3)) == 6
    for bad, message in (
        ("weights = 0", "the width of weights is 0, and no whole number from 1 on"),
        ("colours = 3", "is no table of energy constants"),
    ):
        path.write_text(f"{head}mac = 1\n[bits]\n{bad}\n")
        with pytest.raises(ConfigError, match=message):
            load_constants(path)
