"""``ntc verify`` as a command: tables, JSON keys, manifest, exit codes."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from agreement_cases import changed, constant_of, floating, quantized, saved

from ntc.program import Program
from ntc.registry import backend
from tests.cli.conftest import content, run_ntc
from tests.cli.test_commands import check_keys

PROGRAMS = {"float": cache(floating), "integer": cache(quantized)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Compiled folders by grade, with a netlist in the one of integers; tests do not write here."""
    made = {grade: saved(make(), tmp_path_factory.mktemp("verify") / grade) for grade, make in PROGRAMS.items()}
    backend("netlist").emit(PROGRAMS["integer"](), made["integer"], analog=None, tokens=None)
    return made


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Any:
    return lambda grade: Path(shutil.copytree(folders[grade], tmp_path / grade))


def other(program: Program) -> Program:
    return changed(program, constant_of(program, "v", 1), lambda t: t * 2)


@pytest.mark.parametrize("grade", ["float", "integer"])
def test_all_targets(copied: Any, grade: str) -> None:
    folder = copied(grade)
    before = content(folder)
    ran = run_ntc("verify", folder, "--tokens", 120, "--json")
    assert ran.code == 0, ran.err
    data = ran.json
    check_keys("verify", data)
    assert (data["grade"], data["agrees"], data["tokens"]) == (grade, True, 120)
    assert data["targets"].keys() == {"onnx", "netlist", "nir"}
    verdicts = {name: found["verdict"] for name, found in data["targets"].items()}
    assert set(verdicts.values()) <= {"exact"} if grade == "integer" else {"exact", "approximate"}
    written = {name: found["artefact"] for name, found in data["targets"].items()}
    assert written == {"onnx": "temporary", "nir": "temporary", "netlist": "folder" if grade == "integer" else "temporary"}
    after = content(folder)  # nothing but the manifest
    assert after.keys() == before.keys() and {n for n in after if after[n] != before[n]} == {"manifest.json"}
    kept = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["verification"]
    assert kept == {k: v for k, v in data.items() if k not in ("folder", "seconds")}


def test_again_gives_the_same_manifest_and_another_run_replaces_it(copied: Any) -> None:
    folder = copied("float")
    manifest = folder / "manifest.json"
    assert run_ntc("verify", folder, "--tokens", 48, "--targets", "onnx").code == 0
    first = manifest.read_bytes()
    assert run_ntc("verify", folder, "--tokens", 48, "--targets", "onnx").code == 0 and manifest.read_bytes() == first
    assert run_ntc("verify", folder, "--tokens", 24, "--targets", "netlist", "--json").code == 0
    kept = json.loads(manifest.read_text(encoding="utf-8"))
    assert kept["verification"]["targets"].keys() == {"netlist"} and kept["verification"]["tokens"] == 24
    import ntc

    ntc.load(folder)


def test_table(copied: Any) -> None:
    ran = run_ntc("verify", copied("integer"), "--tokens", 48)
    assert ran.code == 0, ran.err
    for text in ("integer program", "exported for this", "%ffn", "0 counts", "Not in nir", "multiplies two signals", "No target does worse"):
        assert text in ran.out
    assert "random tokens" in ran.err  # there is no text


@pytest.mark.parametrize("grade", ["float", "integer"])
def test_wrong_artefact(copied: Any, grade: str) -> None:
    folder, program = copied(grade), PROGRAMS[grade]()
    for target in ("onnx", "netlist", "nir"):
        backend(target).emit(wrong := other(program), folder, analog=None, tokens=wrong.example)
    ran = run_ntc("verify", folder, "--tokens", 120)
    assert ran.code == 1
    assert ran.out.count("differs") >= 3 and "node %v" in ran.out and "Not all targets agree" in ran.out
    assert "Where they differ first" in ran.out
    data = run_ntc("verify", folder, "--tokens", 120, "--json")
    assert data.code == 1 and not data.json["agrees"]
    check_keys("verify", data.json)
    rows = {n: next(x for x in t["layers"] if x["node"] == "v") for n, t in data.json["targets"].items()}
    assert all(x["spike_mismatches"] > 0 and x["first"]["position"] >= 0 for x in rows.values())
    kept = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["verification"]
    assert kept["agrees"] is False  # a bad result is kept, too


def test_targets_that_cannot_be_written(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ntc.errors import BackendError
    from ntc_backends.netlist import NetlistBackend
    from ntc_backends.nir_export import NirBackend

    def refuse(self: Any, *args: Any, **options: Any) -> Any:
        raise BackendError("this network is too round")

    def fail(self: Any, *args: Any, **options: Any) -> Any:
        raise ZeroDivisionError("of a library")

    monkeypatch.setattr(NetlistBackend, "emit", refuse)
    monkeypatch.setattr(NirBackend, "emit", fail)
    folder = Path(shutil.copytree(folders["float"], tmp_path / "f"))
    ran = run_ntc("verify", folder, "--tokens", 24, "--json")
    assert ran.code == 0, ran.err
    found = ran.json["targets"]
    assert (found["netlist"]["verdict"], found["netlist"]["reason"]) == ("unsupported", "this network is too round")
    assert found["nir"]["verdict"] == "unsupported" and "ZeroDivisionError" in found["nir"]["reason"]
    check_keys("verify", ran.json)
    alone = run_ntc("verify", folder, "--tokens", 24, "--targets", "netlist,nir")
    assert alone.code == 1 and "Nothing could be compared" in alone.out  # nothing is proven


def test_artefact_that_its_back_end_finds_wrong(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ntc_backends import onnx_export

    build = onnx_export.build
    monkeypatch.setattr(onnx_export, "build", lambda program: build(other(program)))
    ran = run_ntc("verify", Path(shutil.copytree(folders["float"], tmp_path / "f")), "--tokens", 24, "--targets", "onnx", "--json")
    assert ran.code == 1 and ran.json["targets"]["onnx"]["verdict"] == "differs"
    assert "disagrees with the program" in ran.json["targets"]["onnx"]["reason"]


def test_bad_input(copied: Any, tmp_path: Path) -> None:
    folder = copied("integer")

    def refused(*arguments: object, says: str) -> None:
        ran = run_ntc("verify", *arguments)
        assert (ran.code, ran.out) == (2, "") and says in " ".join(ran.err.split()), ran.err

    refused(tmp_path / "nowhere", says="there is no folder")
    refused(folder, "--targets", "onx", says="did you mean onnx?")
    refused(folder, "--tokens", "1", says="--tokens")
    refused(folder, "--data", tmp_path / "none.txt", says="no tokenizer")
    (folder / "netlist.json").write_text("{", encoding="utf-8")
    refused(folder, "--targets", "netlist", says="netlist.json")


def test_program_without_neurons(tmp_path: Path) -> None:
    from agreement_cases import VOCABULARY, Named, noise

    from ntc.ops import aten

    b = Named(noise(VOCABULARY, 8, seed=1))
    folder = saved(b.program(b.call(aten.linear.default, b.embedded, noise(VOCABULARY, 8, seed=2), None)), tmp_path / "analog")
    ran = run_ntc("verify", folder)
    assert ran.code == 2 and "has no neurons" in ran.err


def test_manifest_that_cannot_be_written(copied: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    folder = copied("integer")
    before = content(folder)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    ran = run_ntc("verify", folder, "--tokens", 24, "--targets", "netlist", "--json")
    assert ran.code == 0 and ran.json["agrees"] and "not in the manifest" in ran.err
    assert content(folder) == before


def test_text_shorter_than_asked(copied: Any, tmp_path: Path) -> None:
    from tests.cli.conftest import save_tokenizer

    folder = copied("float")
    save_tokenizer(folder / "tokenizer")
    (tmp_path / "short.txt").write_text("the quick brown fox " * 3, encoding="utf-8")
    ran = run_ntc("verify", folder, "--data", tmp_path / "short.txt", "--targets", "nir")
    assert ran.code == 0 and "the text has 60 tokens and not 2,048" in " ".join(ran.err.split())
