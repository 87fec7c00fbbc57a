"""Options and texts that are wrong: one clear sentence, exit code 2, nothing half-written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import content, run_ntc, save_tokenizer
from tests.cli.refusals import nothing_left, refused

# ------------------------------------------------------------------------------------------------ options


def test_steps_0(model: Path, tmp_path: Path) -> None:
    refused("compile", model, "-o", tmp_path / "out", "--steps", 0, says="steps must be .* at least 1, got 0")
    nothing_left(tmp_path)


def test_steps_that_are_no_number(model: Path, tmp_path: Path) -> None:
    refused("compile", model, "-o", tmp_path / "out", "--steps", "four", says=r"--steps.*integer.*ntc compile --help")


def test_percentile_out_of_range(model: Path, tmp_path: Path) -> None:
    refused("compile", model, "-o", tmp_path / "out", "--percentile", 101, says=r"percentile lies in \(0, 100\], got 101")


def test_unknown_recipe(model: Path, tmp_path: Path) -> None:
    refused("compile", model, "-o", tmp_path / "out", "--recipe", "neurtransfomer", says="did you mean neurtransformer")
    refused("check", model, "--recipe", "nothing-like-it", says="no recipe called 'nothing-like-it'; there are")
    refused("recipes", "show", "ffn", says="no recipe called 'ffn'")


def test_unknown_pass(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ntc.compiler
    from ntc import Recipe, Step

    recipe = Recipe("typo", "", "", "", "", (Step("canonicalise"),))
    monkeypatch.setattr(ntc.compiler, "find_recipe", lambda name: recipe)
    refused("compile", model, "-o", tmp_path / "out", "--recipe", "typo", says="no pass called 'canonicalise'; did you mean canonicalize")


def test_unknown_target(model: Path, compiled: Path, tmp_path: Path) -> None:
    refused("compile", model, "-o", tmp_path / "out", "--emit", "netlist,onyx", says="no backend called 'onyx'; did you mean onnx")
    nothing_left(tmp_path)
    before = content(compiled)
    refused("export", compiled, "--emit", "netlst", says="did you mean netlist")
    refused("export", compiled, "--emit", "", says="nothing to export")
    assert content(compiled) == before


def test_unknown_setting(model: Path, tmp_path: Path) -> None:
    refused("compile", model, "-o", tmp_path / "out", "--set", "percentil=90", says="no setting 'percentil'; did you mean percentile")
    refused("compile", model, "-o", tmp_path / "out", "--set", "steps", says="--set takes KEY=VALUE, got 'steps'")
    refused("compile", model, "-o", tmp_path / "out", "--set", "activation=tanh", says="activation must be 'fit' or 'relu', got 'tanh'")


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("steps = ", "is no TOML"),
        ("[recipes]\nsteps = 4\n", r"table \[recipes\]"),
        ("[[override]]\nsteps = 4\n", "no module"),
        ("[recipe]\nstep = 4\n", "no setting 'step'; did you mean steps"),
        ('[[override]]\nmodule = "transformer.h.*"\nsteps = 0\n', "steps must be .* got 0"),
        ('[[override]]\nmodule = "transformer.layer.7.*"\nsteps = 2\n', "matches no module of"),
    ],
)
def test_bad_settings_files(model: Path, tmp_path: Path, toml: str, says: str) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(toml)
    refused("compile", model, "-o", tmp_path / "out", "--settings", file, says=says)
    nothing_left(tmp_path, "settings.toml")


def test_missing_settings_file(model: Path, tmp_path: Path) -> None:
    refused("compile", model, "-o", tmp_path / "out", "--settings", tmp_path / "none.toml", says="cannot read the settings .*No such file")


def test_unknown_options_and_commands() -> None:
    refused("compile", "x", "-o", "y", "--stps", 4, says="--stps")
    refused("compil", says="compil")
    refused("compile", "x", says="--out")


# ------------------------------------------------------------------------------------------------ texts


def test_bad_texts(model: Path, tmp_path: Path) -> None:
    empty, blank, binary = tmp_path / "empty.txt", tmp_path / "blank.txt", tmp_path / "latin.txt"
    empty.write_text("")
    blank.write_text(" \n\n")
    binary.write_bytes("Fähre".encode("latin-1") * 100)
    out = tmp_path / "out"
    refused("compile", model, "-o", out, "--calibration", empty, says="the text .*empty.txt is empty")
    refused("compile", model, "-o", out, "--calibration", blank, says="the text .*blank.txt is empty")
    refused("compile", model, "-o", out, "--calibration", binary, says="latin.txt is no UTF-8 text")
    refused("compile", model, "-o", out, "--calibration", tmp_path / "none.txt", says="cannot read the text .*No such file")
    refused("compile", model, "-o", out, "--calibration", tmp_path, says="cannot read the text .*Is a directory")
    refused("compile", model, "-o", out, "--evaluate", empty, says="the text .*empty.txt is empty")
    nothing_left(tmp_path, "empty.txt", "blank.txt", "latin.txt")


def test_empty_calibration_text_of_the_model(model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    (other / "calibration.txt").write_text("")
    refused("compile", other, "-o", tmp_path / "out", says="calibration.txt is empty")


def test_bad_texts_for_evaluation(compiled: Path, tmp_path: Path, text: Path) -> None:
    binary, damaged = tmp_path / "bin.txt", tmp_path / "bad.txt.xz"
    binary.write_bytes(bytes(range(256)))
    damaged.write_bytes(b"\xfd7zXZ\x00 and then nothing")
    refused("evaluate", compiled, "--data", binary, says="is no UTF-8 text")
    refused("evaluate", compiled, "--data", damaged, says="is no UTF-8 text")
    refused("energy", compiled, "--data", binary, says="is no UTF-8 text")
    refused("evaluate", compiled, "--data", text, "--window", 25, says="window of 25 tokens is longer than the model's context of 24")
    refused("evaluate", compiled, "--data", text, "--window", 1, says="at least 2 tokens")
    refused("evaluate", compiled, "--data", text, "--max-tokens", 0, says="at least 2 tokens")


def test_evaluate_against_another_vocabulary(compiled: Path, text: Path, tmp_path: Path) -> None:
    from ntc.testing import tiny_gpt2

    other = tmp_path / "other"
    tiny_gpt2(vocab_size=40, n_layer=1).save_pretrained(other)
    save_tokenizer(other, 40)
    refused("evaluate", compiled, "--data", text, "--against", other, says="30 tokens in its vocabulary .* 40: they are not the same")


def test_evaluate_when_the_original_is_gone(model: Path, tmp_path: Path, text: Path) -> None:
    moved = Path(shutil.copytree(model, tmp_path / "moved"))
    assert run_ntc("compile", moved, "-o", tmp_path / "out", "--no-measure").code == 0
    shutil.rmtree(moved)
    refused("evaluate", tmp_path / "out", "--data", text, says="is not there: give --against MODEL")


def test_bad_constants(compiled: Path, tmp_path: Path) -> None:
    file = tmp_path / "constants.toml"
    file.write_text("mac = 4.6")
    refused("energy", compiled, "--constants", file, says="no table of energy constants")
    refused("energy", compiled, "--constants", tmp_path / "none.toml", says="cannot read the energy constants")
