"""The tables of docs/energy.md: expected counts against spikes that are drawn, the paper's range, and the page itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ntc.energy import load_constants
from ntc.ops import SPECS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    import sys

    spec = importlib.util.spec_from_file_location("energy_tables", ROOT / "benchmarks" / "energy_tables.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["energy_tables"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_expected_coincidences_are_those_of_drawn_spikes(tables: ModuleType) -> None:
    """Additions of the op on independent spikes, against the closed form; 2 % are about three standard deviations of these draws."""
    from torch.fx import Graph

    steps, tokens, width, heads, rate = 16, 128, 128, 4, 0.2
    torch.manual_seed(0)
    trains = [(torch.rand(steps, 1, tokens, width) < rate).float() for _ in range(3)]
    graph = Graph()
    node = graph.call_function(tables.SSA, (*(graph.placeholder(n) for n in "qkv"), heads, heads))
    measure = SPECS[tables.SSA].measure
    assert measure is not None
    found = measure(trains, trains[0], node)
    product = tables.spiking_attention(tokens, width, heads, steps, rate)[0]
    assert product.counts.acs == pytest.approx(found["scores"] + found["values"], rel=0.02)


def test_the_papers_range_is_that_of_accumulates_alone() -> None:
    fp32 = load_constants("horowitz-45nm-fp32")
    assert 1 - 1.80 * fp32.ac / fp32.mac == pytest.approx(0.6471, abs=2e-3)
    assert 1 - 0.752 * fp32.ac / fp32.mac == pytest.approx(0.8528, abs=2e-3)


def test_counts_by_shape(tables: ModuleType) -> None:
    attention = tables.softmax_attention(10, 64, 4).counts
    assert (attention.dense_macs, attention.macs) == (2 * 64 * 100, 2 * 64 * 55)
    layer = tables.linear(10, 64, 32, steps=4, rate=0.25)
    assert (layer.counts.dense_macs, layer.counts.acs, layer.steps) == (10 * 64 * 32, 10 * 64 * 32, 4)
    assert layer.traffic.weights == layer.counts.acs
    ternary = tables.neurons(10, 64, 4, 0.5, "ternary")
    assert (ternary.counts.neuron_updates, ternary.traffic.spikes, ternary.traffic.membranes) == (2560, 5120, 5120)


def test_sdllms_dense_row_to_the_last_digit(tables: ModuleType) -> None:
    joules = 4.6e-12 * tables.llama_macs(1024, causal=False, head=False)
    assert (round(joules, 2), round(joules / 8, 2)) == (31.77, 3.97)
    by_hand = 32 * 1024 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096 * 1024)
    assert tables.llama_macs(1024, causal=False, head=False) == by_hand
    events = tables.needed_events(0.67, 1024, 0.9)
    assert events * 0.9e-12 * by_hand == pytest.approx(0.67)


def test_the_page_has_what_the_script_writes(tables: ModuleType) -> None:
    page = (ROOT / "docs" / "energy.md").read_text(encoding="utf-8")
    assert tables.shapes_text() in page, "run python benchmarks/energy_tables.py --write docs/energy.md"
    assert "### Measured: the reference GPT-2" in page


def test_writing_between_the_marks(tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    monkeypatch.setattr("sys.argv", ["energy_tables.py", "--shapes-only", "--write", str(page)])
    for _ in range(2):
        tables.main()
    assert page.read_text() == f"before\n{tables.BEGIN}\n\n{tables.shapes_text()}\n\n{tables.END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="has no marks"):
        tables.main()
