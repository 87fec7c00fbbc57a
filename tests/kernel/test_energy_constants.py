"""Tables of energies per operation: what is read, what is refused, and what a table of a chip lets one say."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from programs import TOKENS, canonical, spiking

import ntc
from ntc.energy import Constants, EnergyReport, list_constants, load_constants, measure_energy
from ntc.energy.document import page
from ntc.energy.headline import headline
from ntc.errors import ConfigError, DataError
from ntc.observe import count_by_shape
from ntc.ops import Counts
from ntc.pipeline import run_pipeline
from ntc.testing import NanoGPT, example_ids
from ntc.text import random_tokens
from ntc_passes.canonicalize import Canonicalize

V = 61  # vocabulary of the tiny models


@pytest.fixture(scope="module")
def report() -> EnergyReport:
    return measure_energy(spiking(), canonical(), TOKENS, batch=3)


def test_the_constants_that_ship() -> None:
    constants = load_constants()
    assert (constants.mac, constants.ac, constants.graded_mac, constants.update) == (4.6, 0.9, 4.6, 0.9)
    assert "ISSCC 2014" in constants.source
    assert constants.cost(Counts(macs=1, acs=10, graded_macs=100, neuron_updates=1000, elementwise=1e9)) == pytest.approx(4.6 + 9 + 460 + 900)


GOOD = 'id = "x"\ntitle = "t"\nsource = "s"\nscope = "c"\n[picojoules]\nmac = 2\nac = 1\ngraded_mac = 2\nupdate = 0\n'


def test_other_constants(tmp_path: Path, report: EnergyReport) -> None:
    path = tmp_path / "c.toml"
    path.write_text(GOOD)
    assert load_constants(path) == Constants("x", "t", "s", "c", 2, 1, 2, 0)
    other = measure_energy(spiking(), canonical(), TOKENS, load_constants(path))
    assert other.to_json()["total"]["ann_pj"] == pytest.approx(2 * report.ann.total().macs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[x", "is no table of energy constants"),
        ("", "is no table of energy constants: 'picojoules'"),
        (GOOD.replace("ac = 1\n", "", 1), "is no table of energy constants"),
        (GOOD + "leak = 3\n", "is no table of energy constants"),
        (GOOD.replace("mac = 2", 'mac = "much"', 1), "is no table of energy constants"),
        (GOOD.replace("mac = 2", "mac = -2", 1), "give -2.0 pJ for mac: it must be finite and not negative"),
        (GOOD.replace("mac = 2", "mac = nan", 1), "give nan pJ for mac"),
        (GOOD.replace("update = 0", "update = inf"), "give inf pJ for update"),
        ('picojoules = 3\nid = "x"', "is no table of energy constants"),
    ],
)
def test_bad_constants(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_constants(path)


def test_constants_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the energy constants .*absent.toml: No such file"):
        load_constants(tmp_path / "absent.toml")


def test_the_report_has_the_keys_that_are_promised(report: EnergyReport) -> None:
    data: dict[str, Any] = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert {"asa_pj", "ssa_pj", "reduction", "with_projections"} <= data["attention"].keys()
    assert {"ann_pj", "snn_pj", "reduction"} <= data["total"].keys()
    assert (data["steps"], data["tokens"], data["window"], data["unit"]) == (4, 96, 12, "pJ per token")
    assert data["data_sha256"] == TOKENS.sha256
    assert data["constants"]["id"] == "horowitz-45nm-fp32"


def test_windows_that_do_not_fit_and_progress() -> None:
    with pytest.raises(DataError, match="25 tokens are more than the model's context of 24"):
        measure_energy(spiking(), canonical(), random_tokens(V, 25, 50))
    calls: list[tuple[int, int]] = []
    measure_energy(spiking(n_layer=1), canonical(n_layer=1), TOKENS, batch=3, progress=lambda *a: calls.append(a))
    assert calls == [(3, 8), (6, 8), (8, 8)]


def test_a_hand_written_network_counts_as_the_same_gpt2() -> None:
    ours, theirs = (count_by_shape(p, [(2, 9)]) for p in (run_pipeline(ntc.capture(NanoGPT(), example_ids()), [Canonicalize()]), canonical()))
    assert sum(n.counts.macs for n in ours.nodes.values()) == sum(n.counts.macs for n in theirs.nodes.values())


# ------------------------------------------------------------------------------------------------ tables of chips

CHIPS = ("loihi-1", "spinnaker-1", "spinnaker-2", "truenorth")
CHIP = GOOD.replace('id = "x"', 'id = "x"\ndevice = "Chip"').replace("mac = 2\n", "", 1).replace("graded_mac = 2\n", "")


def at_figures_of(report: EnergyReport, name: str) -> EnergyReport:
    return replace(report, constants=load_constants(name))


def test_the_chips_that_ship_say_what_they_are() -> None:
    found = {c.id: c for c in list_constants() if c.device}
    assert set(found) == set(CHIPS)
    for table in found.values():
        assert "static power" in table.scope or "average of the whole chip" in table.title
        assert table.title.startswith("figures published for") and table.device.split()[0] in table.title
        assert table.mac is table.graded_mac is table.elementwise is None and table.baselines == ()
        assert "energy" not in table.title
    assert (found["loihi-1"].ac, found["loihi-1"].update) == (27.1, 81)
    assert "before silicon" in found["loihi-1"].title


@pytest.mark.parametrize("name", CHIPS)
def test_a_chip_has_figures_for_spikes_only(report: EnergyReport, name: str) -> None:
    chip, total = at_figures_of(report, name), report.snn.total()
    data = chip.to_json(sensitivity=True)
    assert data["total"]["snn_pj"] == pytest.approx((chip.constants.ac or 0) * total.acs + (chip.constants.update or 0) * total.neuron_updates)
    assert data["total"]["ann_pj"] is data["attention"]["asa_pj"] is data["total"]["reduction"] is data["attention"]["reduction"] is None
    compute, both, placed = data["total"]["columns"]
    assert compute["ann_pj"] is None and compute["snn_pj"] == data["total"]["snn_pj"]
    assert both["snn_pj"] is both["ann_pj"] is None and "count it twice" in both["remark"]
    assert placed["snn_pj"] is data["mapped"] is None
    assert data["baselines"] == {"attention": [], "total": []}, "nothing else is costed with a chip's figures"
    assert all(row["snn_pj"] == row["pj_per_byte"] == 0 for row in data["moved"]), "memory is in the figures"
    levels = data["sensitivity"]["total"]["levels"]
    assert [row["column"] for row in levels] == ["compute"] * 3 and all(row["reduction"] is None for row in levels)
    unpriced = {(row["side"], row["operation"]): row for row in data["unpriced"]}
    assert set(unpriced) == {(side, operation) for side in ("ann", "snn") for operation in ("macs", "elementwise")}
    assert unpriced["snn", "macs"]["number"] == total.macs
    assert unpriced["snn", "macs"]["share_of_dense_macs"] == pytest.approx(total.macs / total.dense_macs)
    assert report.to_json()["unpriced"] == []


@pytest.mark.parametrize("name", CHIPS)
def test_the_headline_of_a_chip_is_no_claim_about_the_chip(report: EnergyReport, name: str) -> None:
    chip = at_figures_of(report, name)
    data = chip.to_json(sensitivity=True)
    first, second = headline(data)
    assert first.startswith("What spikes cause in this program comes to ") and first.endswith("Nothing was mapped to that chip or run on it.")
    assert f"at figures published for {chip.constants.device}: counts times constants" in first
    for part in ("multiply-accumulates (", "of the dense ones", "elementwise operations, which the table has no figures for", chip.constants.scope, "no saving is stated"):
        assert part in second, part
    text = page(data, "demo", "ntc energy demo", {"ntc-compiler": "1"})
    visible = re.sub(r"<[^>]*>", "", text)
    for claim in (f"{chip.constants.device} energy", f"energy of {chip.constants.device}", f"energy on {chip.constants.device}", "less energy"):
        assert claim not in visible, claim
    assert "Counted, and without a figure" in text and "With memory, by what is moved" not in text and "SRAM" not in visible


def test_a_silent_program_has_no_figure_of_a_chip() -> None:
    same = measure_energy(canonical(n_layer=1), canonical(n_layer=1), TOKENS, load_constants("loihi-1"))
    data = same.to_json()
    assert data["total"]["snn_pj"] is None
    assert headline(data)[0] == "Nothing in this program has a figure published for Loihi 1."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CHIP.replace("ac = 1\n", ""), "it has no energy of ac"),
        (CHIP.replace("[picojoules]", 'baselines = ["horowitz-45nm-int8"]\n[picojoules]'), "figures of Chip contain its memory .* may name no baselines"),
        (GOOD.replace("mac = 2\n", "", 1), "it has no energy of mac"),
        (CHIP + "hop = 3\n", "there are no operations called hop"),
    ],
)
def test_bad_tables_of_chips(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(CHIP)
    assert load_constants(path).unpriced(Counts(macs=2, acs=3)) == {"macs": 2}
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_constants(path)
