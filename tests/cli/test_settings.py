"""Settings of a recipe on the command line: for every pass that has them, for one pass, for some modules, from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.cli.conftest import run_ntc
from tests.cli.test_commands import check_keys, result


def steps_by_block(folder: Path) -> dict[str, set[int]]:
    import ntc
    from ntc.meta import NEURON, block_of

    found: dict[str, set[int]] = {}
    for node in ntc.load(folder).graph.nodes:
        if NEURON in node.meta and "integrate_fire" in str(node.target):
            found.setdefault(block_of(node), set()).add(node.meta[NEURON].steps)
    return found


def test_settings_file_overrides_one_block(model: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text('[recipe]\nsteps = 5\n[[override]]\nmodule = "transformer.h.1.*"\nsteps = 2\n')
    data = result("compile", model, "-o", tmp_path / "out", "--settings", settings, "--no-measure")
    assert steps_by_block(tmp_path / "out") == {"transformer.h.0": {5}, "transformer.h.1": {2}}
    assert data["steps"] == 5


def test_command_line_wins_over_file(model: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text("[recipe]\nsteps = 5\npercentile = 99\n")
    result("compile", model, "-o", tmp_path / "out", "--settings", settings, "--set", "percentile=95.5", "--steps", 3, "--no-measure")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["settings"]["options"] == {"steps": 3, "percentile": 95.5}


def test_set_takes_words_and_numbers(model: Path, tmp_path: Path) -> None:
    result("compile", model, "-o", tmp_path / "out", "--set", "activation=relu", "--set", "output=spikes", "--no-measure")
    records = {r["name"]: r["options"] for r in json.loads((tmp_path / "out" / "manifest.json").read_text())["history"]}
    assert records["convert-ffn"]["activation"] == "relu"
    assert records["replace-attention"]["output"] == "spikes"


def options_of(folder: Path) -> dict[str, Any]:
    """Options of the passes that ran, by name."""
    return {r["name"]: r["options"] for r in json.loads((folder / "manifest.json").read_text())["history"]}


def test_an_option_of_one_pass(model: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text('[recipe]\nreplace-attention.percentile = 97\n[[override]]\nmodule = "transformer.h.1.*"\nconvert-ffn.convert = false\n')
    out = tmp_path / "out"
    data = result("compile", model, "-o", out, "--settings", settings, "--set", "convert-ffn.percentile=98", "--no-measure")
    assert data["warnings"] == []
    ran = options_of(out)
    assert (ran["replace-attention"]["percentile"], ran["convert-ffn"]["percentile"]) == (97, 98)
    assert {p["name"]: p["sites"] for p in data["passes"]}["convert-ffn"] == 1  # of two
    quantized = result("quantize", out, "-o", tmp_path / "q", "--set", "quantize.bias-correction=false", "--no-measure")
    assert quantized["options"]["bias_correction"] is False


def test_an_option_of_several_passes_is_remarked(model: Path) -> None:
    said = "percentile=90 sets replace-attention (default 90.0) and convert-ffn (default 99.9): to set it for one of them alone, write"
    ran = run_ntc("check", model, "--set", "percentile=90", "--json")
    assert ran.code == 0
    check_keys("check", ran.json)
    assert ran.json["warnings"][0].startswith(said)
    assert said in " ".join(ran.err.split())
    assert result("check", model, "--set", "percentile=90", "--set", "convert-ffn.percentile=99")["warnings"] == []


def test_names_that_no_pass_has(model: Path, tmp_path: Path) -> None:
    for pair, says in (
        ("replace-atention.percentile=90", "that recipe neurtransformer does not have; did you mean replace-attention?"),
        ("replace-attention.percentil=90", "pass replace-attention has no option 'percentil'; did you mean percentile?"),
    ):
        for command in (("check", model), ("compile", model, "-o", tmp_path / "out")):
            ran = run_ntc(*command, "--set", pair)
            assert (ran.code, ran.out) == (2, "") and says in ran.err
