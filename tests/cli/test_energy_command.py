"""``ntc energy``: its tables, its options, and what it refuses."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.conftest import run_ntc
from tests.cli.test_commands import check_keys, result, shown


def test_columns_baselines_and_sensitivity(compiled: Path, text: Path) -> None:
    data = result("energy", compiled, "--data", text, "--max-tokens", 48, "--sensitivity", "--quality")
    assert data["quality"]["perplexity_ann"] > 1
    check_keys("energy", data)
    compute, both, placed = data["total"]["columns"]
    assert compute["ann_pj"] < both["ann_pj"] and placed["ann_pj"] is None
    assert [b["baseline"] for b in data["baselines"]["total"]] == ["fp32", "int8", "3 bits"]
    assert data["phase"] == "decode" and data["quality"]["perplexity"] > 1
    assert data["data_file_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert 0 < data["neurobench"]["activation_sparsity"] < 1
    out = " ".join(shown("energy", compiled, "--data", text, "--max-tokens", 48, "--sensitivity").split())
    for part in (
        "decoding, a weight is read for each token", "(the NeurTransformer paper's savings: 0.75 to 1.80)", "perplexity of this very program", "compute and memory", "placed: not mapped",
        "Attention block against the original in other arithmetics", "even at rate", "3 bits", "Data moved", "membranes", "SRAM 32 KB",
        "With other constants", "One constant at a time", "partial sums", "Every multiply-accumulate of both networks is counted",
    ):  # fmt: skip
        assert part in out, part


def test_tables_by_name_and_reuse(compiled: Path, text: Path) -> None:
    options = ("energy", compiled, "--data", text, "--max-tokens", 48)
    plain = result(*options)
    other = result(*options, "--constants", "horowitz-45nm-int8", "--memory", "horowitz-45nm-dram", "--reuse", 16)
    assert other["constants"]["id"] == "horowitz-45nm-int8" and other["memory"]["id"] == "horowitz-45nm-dram"
    assert (other["phase"], other["memory"]["reuse_tokens"]) == ("prefill", 16)
    assert other["total"]["ann"] == plain["total"]["ann"], "counts do not depend on constants"
    assert other["total"]["ann_pj"] == pytest.approx(0.3 / 4.6 * plain["total"]["ann_pj"])
    assert next(m["level"] for m in other["moved"] if m["data"] == "weights") == "DRAM"
    read = [sum(n.get("weights_bytes", 0) for n in d["nodes"]["ann"] if n["kind"] != "embedding") for d in (other, plain)]
    assert read[0] == pytest.approx(read[1] / 4 / 16), "8 bits, once for 16 tokens"
    rows = [next(n["weights_bytes"] for n in d["nodes"]["ann"] if n["node"] == "wte") for d in (other, plain)]
    assert rows[0] == pytest.approx(rows[1] / 4), "each token has its own row of the embedding"
    assert "prefill, 16 tokens share one read of a weight" in shown(*options, "--reuse", 16)


def test_figures_of_a_chip(compiled: Path, text: Path, tmp_path: Path) -> None:
    options = ("energy", compiled, "--data", text, "--max-tokens", 24, "--constants", "loihi-1", "--report", tmp_path / "chip.html")
    data = result(*options)
    check_keys("energy", data)
    assert data["constants"]["device"] == "Loihi 1" and data["constants"]["mac"] is data["total"]["ann_pj"] is None
    assert data["total"]["snn_pj"] == pytest.approx(27.1 * data["total"]["snn"]["acs"] + 81 * data["total"]["snn"]["neuron_updates"])
    out = " ".join(shown(*options).split())
    for part in (
        "at figures published for Loihi 1: counts times constants. Nothing was mapped to that chip or run on it.", "neuron updates", "Wrote",
        "no saving is stated", "placed: not mapped", "before silicon", "Every multiply-accumulate of both networks is counted",
    ):  # fmt: skip
        assert part in out, part
    assert "less energy" not in out and "Loihi 1 energy" not in out


def test_the_list_of_constants() -> None:
    data = result("energy", "--list-constants")
    check_keys("energy --list-constants", data)
    assert {c["id"] for c in data["constants"]} >= {"horowitz-45nm-fp32", "horowitz-45nm-int8"}
    assert {m["id"] for m in data["memories"]} == {"horowitz-45nm-dram", "horowitz-45nm-sram", "spikingjelly-2.0"}
    out = shown("energy", "--list-constants")
    assert "horowitz-45nm-fp16" in out and "DRAM 1950" in out and "ISSCC" in out


def test_the_report(compiled: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "energy report.html"
    options = ("energy", compiled, "--data", text, "--max-tokens", 24, "--report", out)
    data = result(*options)
    check_keys("energy", data)
    assert data["report"] == str(out) and data["sensitivity"] is None
    html = out.read_text(encoding="utf-8")
    assert f"ntc energy {compiled} --data {text} --max-tokens 24 --constants horowitz-45nm-fp32 --memory horowitz-45nm-sram" in html
    assert "energy report.html" in html and "Sensitivity" in html
    assert "Wrote" in shown(*options)
    assert out.read_text(encoding="utf-8") == html, "the same report, the same bytes"
    assert [p.name for p in tmp_path.iterdir()] == [out.name]
    out.write_text("notes")
    refused(*options[1:], says="is no page of ntc energy: it is left as it is")
    assert out.read_text() == "notes"


def test_integers_costed_as_fp32_are_a_warning(compiled: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ntc import artifact

    loaded = artifact.load(compiled)
    loaded.facts = loaded.facts | {"integer"}
    monkeypatch.setattr(artifact, "load", lambda folder: loaded)
    options = ("energy", compiled, "--data", text, "--max-tokens", 24)
    says = "computes with integers and is costed as fp32: give --constants horowitz-45nm-int8"
    assert says in " ".join(run_ntc(*options).err.split())
    assert says not in " ".join(run_ntc(*options, "--constants", "horowitz-45nm-int8").err.split())


def test_an_original_that_is_gone(copied: Path, text: Path) -> None:
    import json

    from ntc.artifact import read_manifest

    manifest = copied / "manifest.json"
    manifest.write_text(manifest.read_text().replace(json.dumps(read_manifest(copied)["info"]["source"]), '"nowhere/model"'))
    options = (copied, "--data", text, "--max-tokens", 24)
    refused(*options, "--quality", says="the model nowhere/model that")
    assert result("energy", *options)["quality"]["perplexity_ann"] is None


def refused(*arguments: object, says: str) -> None:
    ran = run_ntc("energy", *arguments)
    assert ran.code == 2
    assert says in " ".join(ran.err.split()), ran.err
    assert "Traceback" not in ran.err


def test_refusals(compiled: Path) -> None:
    refused(says="ntc energy takes DIR, a folder that ntc compile wrote")
    refused(compiled, "--constants", "loihi", says="cannot read the energy constants loihi: No such file or directory; the tables that ship")
    refused(compiled, "--memory", "hbm", says="cannot read the memory energies hbm: No such file or directory; the tables that ship")
    for wrong in ("much", "-1%", "101%", "nan", ""):
        refused(compiled, "--strict", wrong, says="--strict takes a share such as 0.1% or 0.001")
    refused(compiled, "--reuse", 0, says="Invalid value for '--reuse'")


def test_strict(compiled: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ntc.ops import SPECS, aten

    options = (compiled, "--data", text, "--max-tokens", 24)
    assert result("energy", *options, "--strict", "0%")["uncounted_share"] == 0
    monkeypatch.setitem(SPECS, aten.linear.default, replace(SPECS[aten.linear.default], count=None))
    assert result("energy", *options)["uncounted_share"] > 0.5
    refused(*options, "--strict", "0.1%", says="are not counted, and 0.1 % are allowed: no counting rule is known of linear (%")
    ran = run_ntc("energy", *options, "--strict", "0.1%", "--json")
    assert ran.code == 2 and "more; register an OpSpec" in ran.json["error"]
    assert "Not counted" in shown("energy", *options)
