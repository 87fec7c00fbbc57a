"""Options of back ends on the command line: ``--emit-set nir.reset=hard``, which is ``--nir-reset hard``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ntc import registry
from ntc.cli.options import backend_options
from ntc.errors import ConfigError
from tests.cli.conftest import run_ntc
from tests.cli.refusals import refused


@pytest.fixture
def folder(compiled: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(compiled, tmp_path / "out"))


def said(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "nir" / "index.json").read_text(encoding="utf-8"))["conventions"]


@pytest.mark.parametrize(
    "options",
    [["--nir-reset", "hard"], ["--nir-reset=hard"], ["--emit-set", "nir.reset=hard"], ["--emit-set", "nir.reset=explicit", "--nir-reset", "hard"]],
)
def test_spellings(folder: Path, options: list[str]) -> None:
    ran = run_ntc("export", *options, folder, "--emit", "nir", "--json")
    assert ran.code == 0, ran.err
    assert said(folder)["reset"] == "hard"
    assert ran.json["targets"]["nir"]["reset"] == "hard"
    assert json.loads((folder / "manifest.json").read_text())["targets"]["nir"]["reset"] == "hard"
    assert "nir/index.json" in {f["name"] for f in ran.json["files"]}


def test_compile_takes_them_too(model: Path, tmp_path: Path) -> None:
    ran = run_ntc(
        "compile", model, "-o", tmp_path / "out", "--emit", "nir", "--nir-reset", "annotate", "--nir-compat", "1.0.4", "--no-measure", "--json"
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert said(tmp_path / "out")["reset"] == "annotate"
    assert ran.json["targets"]["nir"]["compat"] == "1.0.4"
    files = {f["name"] for f in ran.json["files"]}
    assert any(name.startswith("nir/") and name.endswith(".nir") for name in files)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--nir-reset", "soft"], "reset is one of explicit, hard, annotate, not 'soft'"),
        (["--nir-resett", "hard"], "back end nir has no option 'resett'; did you mean reset"),
        (["--nir-compat", "2"], "compat is one of 1.0.6, 1.0.4, not 2"),
        (["--nir-reset", "hard", "--nir-compat", "1.0.4"], "take reset=annotate"),
        (["--emit-set", "nir"], "takes BACKEND.KEY=VALUE, got 'nir'"),
        (["--emit-set", "nir.reset"], "takes BACKEND.KEY=VALUE"),
        (["--emit-set", "reset=hard"], "takes BACKEND.KEY=VALUE"),
        (["--netlist-reset", "hard"], "back end netlist, which is not asked for: give --emit netlist"),
        (["--nir-reset"], "--nir-reset needs a value"),
        (["--nri-reset", "hard"], "No such option: --nri-reset"),
    ],
)
def test_refused_before_any_work(model: Path, tmp_path: Path, options: list[str], says: str) -> None:
    refused("compile", model, "-o", tmp_path / "out", "--emit", "nir", *options, says=says)
    assert not list(tmp_path.iterdir())


def test_back_ends_without_options(folder: Path) -> None:
    refused("export", folder, "--emit", "netlist", "--netlist-reset", "hard", says="back end netlist has no option 'reset'; it has none")


def test_values_are_those_of_toml() -> None:
    found = backend_options(["a.n=3", "a.text=1.0.4", "my-chip.some-key=[1, 2]"], ["a", "my-chip"])
    assert found == {"a": {"n": 3, "text": "1.0.4"}, "my-chip": {"some_key": [1, 2]}}


def test_the_registry_hands_them_over() -> None:
    assert registry.backend("nir").options.reset == "explicit"  # type: ignore[attr-defined]
    assert registry.backend("nir", {"reset": "hard"}).options.reset == "hard"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="reset is one of"):
        registry.backend("nir", {"reset": 1})


def test_without_the_packages_it_says_how_to_get_them(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "nir" else there(name, *rest))
    refused("compile", model, "-o", tmp_path / "out", "--emit", "nir", says=r"needs nir, not installed here: pip install 'ntc-compiler\[nir\]'")
    assert not list(tmp_path.iterdir())
