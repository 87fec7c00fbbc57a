"""Integers on the command line: ``ntc quantize``, ``ntc compile --quantize``, ``ntc check --quantize``, and what other commands do with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ntc import artifact
from tests.cli.conftest import content, run_ntc
from tests.cli.test_commands import check_keys, result, shown


@pytest.fixture(scope="module")
def integers(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled tiny model, quantized; tests must not write here."""
    folder = tmp_path_factory.mktemp("integers") / "tiny"
    ran = run_ntc("quantize", compiled, "-o", folder, "--no-measure", "--json")
    assert ran.code == 0, ran.err
    return folder


def test_a_compiled_folder(compiled: Path, tmp_path: Path) -> None:
    data = result("quantize", compiled, "-o", tmp_path / "q", "--weight-bits", "4", "--activation-bits", "10")
    check_keys("quantize", data)
    assert data["options"]["weight_bits"] == 4
    assert data["calibration"]["data"].startswith("calibration.txt")
    assert {s["weight_bits"] for s in data["sites"]} == {4, None}
    assert 8 < data["bits"]["membrane"] <= 32
    assert data["perplexity"] > 1
    program = artifact.load(tmp_path / "q")
    manifest = artifact.read_manifest(tmp_path / "q")
    assert manifest["recipe"]["passes"][-1] == "quantize" == program.history[-1].name
    assert {p.name for p in (tmp_path / "q").iterdir()} == {"analog.json", "manifest.json", "program.json", "program.safetensors", "tokenizer"}


def test_what_lies_beside_the_program_comes_along_and_artefacts_do_not(copied: Path, tmp_path: Path) -> None:
    """``ntc evaluate`` finds the baseline of a fine-tuned program beside the quantized one, too."""
    (copied / "baseline" / "tokenizer").mkdir(parents=True)
    (copied / "baseline" / "tokenizer" / "vocab.json").write_text("{}")
    for name in ("training.jsonl", "curve.png", "curve.svg", "baseline/manifest.json", "notes-of-mine.txt"):
        (copied / name).write_text(name)
    result("quantize", copied, "-o", tmp_path / "q", "--no-measure")
    taken, all_of_it = content(tmp_path / "q"), content(copied)
    assert (copied / "netlist.json").is_file()
    beside = {"training.jsonl", "curve.png", "curve.svg", "baseline/manifest.json", "baseline/tokenizer/vocab.json", "analog.json"}
    assert {name for name in taken if "/" in name or taken[name] == all_of_it.get(name)} >= beside
    assert not {"netlist.json", "netlist.safetensors", "energy.json", "notes-of-mine.txt"} & taken.keys()
    assert artifact.read_manifest(tmp_path / "q")["files"] == {n: h for n, h in taken.items() if n != "manifest.json"}
    assert "targets" not in artifact.read_manifest(tmp_path / "q")


def test_compile_gives_the_same_as_quantize_afterwards(model: Path, integers: Path, tmp_path: Path) -> None:
    data = result("compile", model, "-o", tmp_path / "q", "--quantize", "8", "--no-measure")
    check_keys("compile", data)
    assert data["passes"][-1]["name"] == "quantize"
    one, other = artifact.load(tmp_path / "q"), artifact.load(integers)
    ids = torch.arange(20).view(2, 10)
    assert torch.equal(one(ids), other(ids))
    assert str(one) == str(other)


def test_settings_of_the_pass_are_settings_of_the_recipe(model: Path, tmp_path: Path) -> None:
    result("compile", model, "-o", tmp_path / "q", "--quantize", "16", "--set", "activation_bits=12", "--no-measure")
    assert artifact.load(tmp_path / "q").history[-1].options["activation_bits"] == 12
    ran = run_ntc("compile", model, "-o", tmp_path / "p", "--set", "activation_bits=12", "--no-measure")
    assert (ran.code, (tmp_path / "p").exists()) == (2, False)
    assert "no setting 'activation_bits'" in ran.err


def test_check_shows_widths(model: Path) -> None:
    data = result("check", model, "--quantize", "8")
    check_keys("check", data)
    assert data["ok"]
    assert {w["what"] for w in data["widths"]} >= {"membrane", "accumulator", "memory", "result"}
    plain = result("check", model)
    assert plain["widths"] == []
    assert plain["counts"] == data["counts"]  # integers change no node's class
    text = shown("check", model, "--quantize", "8")
    assert "Widths" in text
    assert "membrane" in text


def test_what_cannot_be_quantized_is_a_finding(model: Path) -> None:
    ran = run_ntc("check", model, "--quantize", "8", "--set", "normalizer=rms", "--json")
    assert ran.code == 1
    (finding,) = [f for f in ran.json["findings"] if f["stage"] == "quantize"]
    assert "rms_scale has no integer form" in finding["reason"]


def test_figures_of_integers(integers: Path, model: Path) -> None:
    text = model / "calibration.txt"
    quality = result("evaluate", integers, "--data", text, "--max-tokens", "96")
    assert quality["cosine_hidden"] > 0.3
    assert len(quality["layers"]) == 6
    assert all(layer["relative_error"] < 3 for layer in quality["layers"])  # of values, not of the integers that stand for them
    energy = result("energy", integers, "--max-tokens", "96")
    assert energy["uncounted_share"] == 0
    alone, with_projections = energy["attention"]["ssa_pj"], energy["attention"]["with_projections"]["ssa_pj"]
    assert with_projections > 3 * alone > 0  # the integer layers around attention are found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--weight-bits", "5"), "weight_bits must be 4, 8 or 16"), (("--set", "weights=8"), "no option 'weights'"),
        (("--data", "nowhere.txt"), "cannot read the text nowhere.txt"),
    ],
)  # fmt: skip
def test_bad_input(compiled: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    ran = run_ntc("quantize", compiled, "-o", tmp_path / "q", *arguments)
    assert (ran.code, (tmp_path / "q").exists()) == (2, False)
    assert message in ran.err


def test_integers_are_neither_quantized_again_nor_trained(integers: Path, model: Path, tmp_path: Path) -> None:
    ran = run_ntc("quantize", integers, "-o", tmp_path / "q")
    assert (ran.code, (tmp_path / "q").exists()) == (2, False)
    assert "computes with integers already" in ran.err
    ran = run_ntc("finetune", integers, "--data", model / "calibration.txt", "-o", tmp_path / "t", "--max-tokens", "100")
    assert ran.code == 2
    assert "a program of integers has no gradients" in ran.err


def test_tables_for_people(compiled: Path, tmp_path: Path) -> None:
    text = shown("quantize", compiled, "-o", tmp_path / "q")
    for part in ("What rounding costs", "Widths", "residual stream", "Perplexity", "before"):
        assert part in text
    assert "h_*_mlp_c_fc" in text
    again = json.loads((tmp_path / "q" / "manifest.json").read_text(encoding="utf-8"))
    assert again["history"][-1]["notes"]["sites"]
