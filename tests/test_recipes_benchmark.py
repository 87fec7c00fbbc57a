"""The benchmark of recipes: tables from stored lines, the page, and that it runs; its figures are in docs/comparison.md."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from ntc import artifact
from ntc.artifact import seal
from ntc.ops import Counts
from ntc.program import PassRecord, Program
from ntc.testing import tiny_gpt2
from ntc.training.config import TrainingConfig
from tests.programs import canonical, spiking

ROOT = Path(__file__).parents[1]
BENCHMARK = ROOT / "benchmarks" / "recipes.py"
REFERENCE, SAMPLE = ROOT / "examples" / "gpt2-books", ROOT / "examples" / "data" / "books-sample.txt"


@pytest.fixture(scope="module")
def recipes() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:  # dataclasses look their module up
        patch.setitem(sys.modules, "recipes", type(sys)("recipes"))
        return runpy.run_path(str(BENCHMARK), run_name="recipes")


def line(label: str = "lossless", steps: int = 4, **changed: Any) -> dict[str, Any]:
    """A stored line of round numbers: 1000 MACs in the original, 2000 ACs and 100 updates in the program, per token."""
    ann, snn = Counts(dense_macs=1000, macs=1000), Counts(dense_macs=1000, macs=50, acs=2000, neuron_updates=100, spikes=60, neurons=25)
    columns = [
        {"column": "compute", "ann_pj": 4.6e6, "snn_pj": 2.3e6}, {"column": "compute and memory", "ann_pj": 10.6e6, "snn_pj": 15.3e6},
        {"column": "placed", "ann_pj": None, "snn_pj": None},
    ]  # fmt: skip
    return {
        "key": f"{label}, T = {steps}", "label": label, "steps": steps, "data": "a.txt, 64 tokens in windows of 16", "counted_tokens": 32,
        "perplexity": 41.0, "perplexity_ann": 40.0, "change": 0.025, "change_interval": [0.02, 0.03], "firing_rate": 0.6,
        "events_per_value": {"all": 2.4, "linear layers": 2.4}, "analog_share": 0.05, "acs_per_mac": 2.0,
        "total": {"ann": asdict(ann), "snn": asdict(snn), "columns": columns}, **changed,
    }  # fmt: skip


def cells(markdown: str) -> list[dict[str, str]]:
    """Rows of the first table; a heading that stands twice counts from the left."""
    lines = [[c.strip() for c in row.strip("|").split("|")] for row in markdown.splitlines() if row.startswith("|")]
    heads = [f"{h} {lines[0][:i].count(h)}".removesuffix(" 0") for i, h in enumerate(lines[0])]
    return [dict(zip(heads, row, strict=True)) for row in lines[2:]]


def test_the_table_says_what_the_line_says(recipes: dict[str, Any]) -> None:
    (row,) = cells(recipes["table"]([line()]))
    assert row == {
        "recipe": "lossless", "T": "4", "perplexity": "41.00", "change": "+2.50 %", "95 %": "+2.00 ... +3.00", "events per value": "2.40",
        "of linear layers": "2.40", "of attention": "–", "firing rate": "0.600", "ACs per MAC": "2.00", "analog MACs": "5.0 %",
        "zero-train": "100 %",
    }  # fmt: skip
    graded = line(zero_train_share=0.25)
    graded["total"]["snn"]["graded_macs"] = 1500.0
    (row,) = cells(recipes["table"]([graded]))
    assert (row["ACs per MAC"], row["zero-train"]) == ("2.00 + 1.50 graded", "25 %")


def test_energy_is_that_of_the_columns_and_of_the_same_counts_in_integers(recipes: dict[str, Any]) -> None:
    (row,) = cells(recipes["energy_table"]([line()]))
    assert (row["compute"], row["change"]) == ("4.6 → 2.3", "-50.0 %")
    assert row["memory"] == "6.0 → 13.0"
    assert (row["compute and memory"], row["change 1"]) == ("10.6 → 15.3", "+44.3 %")
    # Horowitz: an int8 MAC is 0.2 + 0.1 pJ, an AC and an update 0.1 pJ; T = 4 tells five values apart, which takes 3 bits.
    snn = 50 * 0.3 + 2000 * 0.1 + 100 * 0.1
    assert row["compute, int8"] == f"{100 * (snn / (1000 * 0.3) - 1):+.1f} %"
    assert (row["compute, b bits"], row["b"]) == (f"{100 * (snn / (1000 * (0.2 * 3 / 8 + 0.1)) - 1):+.1f} %", "3")


def test_lines_of_different_texts_or_originals_make_no_section(recipes: dict[str, Any]) -> None:
    with pytest.raises(SystemExit, match=r"one text, and these lines have 2: a\.txt.*; b\.txt"):
        recipes["section"]([line(), line("las", data="b.txt")])
    with pytest.raises(SystemExit, match=r"different originals: .* 40\.0 to 41\.0"):
        recipes["section"]([line(), line("las", perplexity_ann=41.0)])
    with pytest.raises(SystemExit, match="no line at all"):
        recipes["section"]([])


def test_rows_of_the_page_stay_until_they_are_measured_anew(recipes: dict[str, Any]) -> None:
    section, order = recipes["section"], ["lossless, T = 4", "las, T = 4"]
    page = section([line(), line("mine")], "", order)
    later = section([line("las"), line(perplexity=40.5)], f"\n\n{page}\n\n", order)
    for table in (later.split("\n\n")[1], later.split("\n\n")[3]):
        assert [row["recipe"] for row in cells(table)] == ["lossless", "las", "mine"]
    assert [row["perplexity"] for row in cells(later.split("\n\n")[1])] == ["40.50", "41.00", "41.00"]
    with pytest.raises(SystemExit, match=r"these lines are of b\.txt.* Rows of the page are not"):
        section([line(data="b.txt")], page, order)


@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct.Q4_1.gguf", "gpt2-books"])
def test_the_page_has_tables_of_this_form(recipes: dict[str, Any], name: str) -> None:
    page = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    written = page.split(f"<!-- begin {name} -->")[1].split(f"<!-- end {name} -->")[0]
    for made in (recipes["table"], recipes["energy_table"]):
        assert f"\n{made([])}\n| lossless | 4 |" in written


def test_zero_train_share_is_what_no_group_of_the_history_reaches(recipes: dict[str, Any]) -> None:
    program = spiking()
    share = recipes["zero_train_share"]
    assert share(program) == 1

    def tuned(*groups: str) -> Program:
        result = program.copy()
        for group in groups:
            result.with_record(PassRecord("finetune", TrainingConfig(group=group).to_json(), sites=1))
        return result

    sizes = {name: t.numel() for name, t in program.tensors.items() if t.is_floating_point()}
    attention = sum(n for name, n in sizes.items() if ".attn." in name)
    assert share(tuned("ssa")) == pytest.approx(1 - attention / sum(sizes.values()))
    assert share(tuned("ssa", "ffn")) < share(tuned("ssa")) < 1
    assert share(tuned("all")) == 0


def test_it_measures_what_is_missing_and_writes_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, page, lines = tmp_path / "tiny", tmp_path / "page.md", tmp_path / "rows.jsonl"
    network = tiny_gpt2(n_layer=1, vocab_size=4096)
    network.save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REFERENCE / name, model)
    (tmp_path / "compiled").mkdir()
    one = spiking(n_layer=1, vocab_size=4096)
    artifact.save(one, tmp_path / "compiled", analog=canonical(n_layer=1, vocab_size=4096), about={"recipe": {"name": "neurtransformer"}})
    seal(tmp_path / "compiled")

    def run(*more: object) -> None:
        monkeypatch.setattr(sys, "argv", ["recipes.py", str(model), "--output", str(lines), "--page", str(page), *map(str, more)])
        runpy.run_path(str(BENCHMARK), run_name="__main__")

    text = ["--data", SAMPLE, "--calibration", SAMPLE, "--window", 16, "--windows", 8]
    page.write_text("before\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"page\.md has no marks <!-- begin tiny --> and <!-- end tiny -->: put them"):
        run(*text, "--only", "lossless", "--steps", "4")
    measured = lines.read_text(encoding="utf-8")
    page.write_text("before\n<!-- begin tiny -->\nold\n<!-- end tiny -->\nafter\n", encoding="utf-8")
    run(*text, "--only", "lossless", "--steps", "4", "--compiled", f"tuned={tmp_path / 'compiled'}")
    assert lines.read_text(encoding="utf-8").startswith(measured)  # the row that was there is not measured again
    found = [json.loads(one) for one in lines.read_text(encoding="utf-8").splitlines()]
    assert [(d["key"], d["recipe"]) for d in found] == [("lossless, T = 4", "lossless"), ("tuned, T = 4", "neurtransformer")]
    written = page.read_text(encoding="utf-8")
    assert written.startswith("before\n<!-- begin tiny -->\n") and written.endswith("<!-- end tiny -->\nafter\n") and "old" not in written
    assert [(r["recipe"], r["T"], r["analog MACs"] == "0.0 %") for r in cells(written.split("Energy")[0])] == [
        ("lossless", "4", True), ("tuned", "4", False),
    ]  # fmt: skip
    low, high = found[0]["change_interval"]
    assert low < high and found[0]["events_per_value"]["attention"] > 0

    capsys.readouterr()
    run("--stored", "--markdown")
    assert page.read_text(encoding="utf-8") == written
    assert [r["recipe"] for r in cells(capsys.readouterr().out)] == ["lossless", "tuned"]
    with pytest.raises(SystemExit, match="--compiled takes LABEL=DIR, got 'nothing'"):
        run(*text, "--only", "lossless", "--steps", "4", "--compiled", "nothing")
    with pytest.raises(SystemExit):
        run("--only", "lossless")
    assert "give the text to measure on, --data FILE, or --stored" in capsys.readouterr().err
