"""Damaged compiled folders and places that cannot be written: one clear sentence, nothing half-written, nothing lost."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import content, run_ntc
from tests.cli.refusals import nothing_left, refused, sentence

# ------------------------------------------------------------------------------------------------ compiled folders


def test_folder_without_a_program(tmp_path: Path, model: Path) -> None:
    refused("energy", tmp_path / "nowhere", says="there is no folder")
    refused("explain", model, "x", says="holds no compiled program")
    refused("export", model, "--emit", "netlist", says="holds no compiled program")


@pytest.mark.parametrize("name", ["program.safetensors", "program.json", "analog.json"])
def test_damaged_file(copied: Path, name: str) -> None:
    data = bytearray((copied / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copied / name).write_bytes(data)
    refused("energy", copied, says=f"{name} is damaged: its sha256")


@pytest.mark.parametrize(
    ("manifest", "says"),
    [("{", "is damaged"), ("[]", "is damaged"), ('{"ntc_format": "1"}', "not ours"), ('{"ntc_format": 99}', "newer ntc"), ('{"ntc_format": 1}', "older ntc"), ('{"ntc_format": 2}', "is damaged")],
)
def test_damaged_manifest(copied: Path, manifest: str, says: str) -> None:
    (copied / "manifest.json").write_text(manifest)
    refused("explain", copied, "h_0_add", says=says)


def test_incomplete_folder(copied: Path) -> None:
    (copied / "program.safetensors").unlink()
    refused("export", copied, "--emit", "netlist", says="lacks program.safetensors")


def test_explain_unknown_node(compiled: Path) -> None:
    refused("explain", compiled, "h_0_mlp_act_spike", says="did you mean h_0_mlp_act_spikes")
    refused("explain", compiled, "qqqqqqqqqq", says="nothing in .* is called qqqqqqqqqq")


# ------------------------------------------------------------------------------------------------ output folders


def test_output_folder_that_is_not_empty(model: Path, copied: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    before = content(tmp_path)
    refused("compile", model, "-o", foreign, says="is not empty; choose another one, or give --overwrite")
    refused("compile", model, "-o", foreign, "--overwrite", says="something else than a compiled program: it is left as it is")
    refused("compile", model, "-o", copied, says="is not empty")
    refused("compile", model, "-o", foreign / "thesis.txt", says="is a file; give a folder")
    refused("compile", model, "-o", foreign / "thesis.txt" / "out", says="is a file")
    assert content(tmp_path) == before


def test_output_that_cannot_be_written(model: Path) -> None:
    refused("compile", model, "-o", "/proc/ntc/out", says="cannot write /proc/ntc/out")


def test_failed_compile_loses_nothing(model: Path, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A back end that fails in the middle: the program that was there is there, to the byte."""
    from ntc_backends.netlist import NetlistBackend

    def fail(self: Any, program: Any, folder: Path, **more: Any) -> None:
        (folder / "netlist.json").write_text("half")
        raise ValueError("a library gave up")

    monkeypatch.setattr(NetlistBackend, "emit", fail)
    before = content(copied)
    refused("compile", model, "-o", copied, "--overwrite", "--emit", "netlist", "--no-measure", says="back end netlist failed: .*gave up")
    refused("export", copied, "--emit", "netlist", says="back end netlist failed")
    refused("compile", model, "-o", tmp_path / "a" / "b" / "out", "--emit", "netlist", "--no-measure", says="back end netlist failed")
    assert content(copied) == before
    nothing_left(tmp_path, copied.name)  # nor the folders above the output


@contextmanager
def files_of_at_most(limit: int) -> Iterator[None]:
    """Writing more into a file fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "program.json", "program.safetensors", "netlist.json", "netlist.safetensors"])
def test_full_disk(model: Path, copied: Path, tmp_path: Path, name: str) -> None:
    """The disk is full when a file is half written: the largest that still fits are those before it."""
    before = content(copied)
    limit = (copied / name).stat().st_size // 2
    with files_of_at_most(limit):
        ran = run_ntc("compile", model, "-o", copied, "--overwrite", "--emit", "netlist", "--no-measure", "--json")
    assert ran.code == 2, ran.err
    sentence(ran.err, "cannot write .*File too large")
    assert ran.json["error"].startswith("cannot write ")
    assert content(copied) == before
    nothing_left(tmp_path, copied.name)


def test_full_disk_on_export(copied: Path, tmp_path: Path) -> None:
    before = content(copied)
    with files_of_at_most(20_000):
        refused("export", copied, "--emit", "netlist", says="cannot write .*File too large")
    assert content(copied) == before
    nothing_left(tmp_path, copied.name)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_standard_output_that_is_full() -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-m", "ntc", "recipes", "--json"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2
    assert "No space left" in ended.stderr
    assert "Traceback" not in ended.stderr
