"""``ntc simulate``: a netlist alone in a folder, its reports, and what is wrong with what it is given."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from netlist_cases import cached
from simulator_cases import integer_case, reference, trains

from ntc_backends.simulator import Simulator
from tests.cli.conftest import Ran, run_ntc, save_tokenizer
from tests.cli.test_commands import check_keys

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")


@pytest.fixture
def netlist(tmp_path: Path) -> Path:
    """The two files and nothing else."""
    folder = tmp_path / "alone"
    folder.mkdir()
    for name in ("netlist.json", "netlist.safetensors"):
        shutil.copy(integer_case("leaking").folder / name, folder / name)
    return folder


def result(*arguments: object) -> dict:
    ran = run_ntc("simulate", *arguments, "--json")
    assert ran.code == 0, ran.err
    return ran.json


def refused(*arguments: object) -> str:
    ran: Ran = run_ntc("simulate", *arguments)
    assert (ran.code, ran.out) == (2, ""), ran.err
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1, ran.err
    return ran.err


@pytest.mark.parametrize("order", [[], ["--online"]])
def test_everything_it_reports(netlist: Path, tmp_path: Path, order: list[str]) -> None:
    logits, raster = tmp_path / "logits.npy", tmp_path / "spikes.npz"
    data = result(netlist, "--tokens", "5,9,2,0,7", *order, "--logits", logits, "--raster", raster)
    check_keys("simulate", data)
    ids = torch.tensor([[5, 9, 2, 0, 7]])
    expected = reference(integer_case("leaking").program, ids)
    assert np.array_equal(np.load(logits), expected.logits[0])
    assert data["spikes"] == sum(int((train != 0).sum()) for train in expected.spikes.values())
    assert data["next_token"] == int(expected.logits[0, -1].argmax())
    assert data["order"] == ("online" if order else "whole")
    assert data["memory_bytes"]["weights"] > 0 and data["memory_bytes"]["state"] > 0 and data["memory_bytes"]["peak"] > 1e6
    with np.load(raster) as stored:
        for name, train in expected.spikes.items():
            step, sequence, token, neuron = (stored[f"{name}.{axis}"] for axis in ("step", "sequence", "token", "neuron"))
            assert np.array_equal(np.stack([step, sequence, token, neuron]), np.stack(np.nonzero(train)))


def test_both_orders_write_the_same_files(netlist: Path, tmp_path: Path) -> None:
    for name, order in (("whole", []), ("online", ["--online"])):
        (tmp_path / name).mkdir()
        files = ["--logits", tmp_path / name / "logits.npy", "--raster", tmp_path / name / "spikes.npz"]
        result(netlist, "--tokens", "1,2,3,4,5,6,7,8,9", *order, *files)
    for file in ("logits.npy", "spikes.npz"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "online" / file).read_bytes()


def test_it_imports_no_torch_and_no_compiler(netlist: Path) -> None:
    code = (
        "import sys; sys.argv = ['ntc', 'simulate', sys.argv[1], '--tokens', '1,2,3', '--json']\n"
        "from ntc.cli import main\n"
        "try:\n main()\n"
        "except SystemExit as end:\n assert not end.code\n"
        "heavy = {'torch', 'transformers', 'networkx', 'onnx', 'tokenizers', 'matplotlib'} & set(sys.modules)\n"
        "kernel = [m for m in sys.modules if m.startswith('ntc.') and not m.startswith(('ntc.cli', 'ntc.errors', 'ntc.registry'))]\n"
        "assert not heavy, heavy; assert not kernel, kernel; assert 'numpy' in sys.modules\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, netlist], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["tokens"] == 3


def test_the_simulator_alone_needs_only_the_errors(netlist: Path) -> None:
    code = (
        "import sys; from ntc_backends.simulator import Simulator; Simulator(sys.argv[1]).run([1, 2, 3])\n"
        "kernel = [m for m in sys.modules if m.startswith('ntc.')]\n"
        "assert kernel == ['ntc.errors'], kernel; assert 'torch' not in sys.modules\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, netlist], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr


def test_ids_from_files_and_text(netlist: Path, tmp_path: Path) -> None:
    wanted = result(netlist / "netlist.json", "--tokens", "1,2,3")
    np.save(tmp_path / "ids.npy", np.array([1, 2, 3], dtype=np.int32))
    (tmp_path / "ids.json").write_text("[1, 2, 3]")
    for file in ("ids.npy", "ids.json"):
        found = result(netlist, "--ids", tmp_path / file)
        assert {k: found[k] for k in ("tokens", "spikes", "next_token")} == {k: wanted[k] for k in ("tokens", "spikes", "next_token")}
    (tmp_path / "two.json").write_text("[[1, 2, 3], [1, 2, 3]]")
    assert result(netlist, "--ids", tmp_path / "two.json")["spikes"] == 2 * wanted["spikes"]
    text = tmp_path / "text.txt"
    text.write_text("abcabcabc")
    assert "has no tokenizer" in refused(netlist, "--data", text)
    save_tokenizer(netlist / "tokenizer")
    assert result(netlist, "--data", text, "--max-tokens", "3")["spikes"] == wanted["spikes"]  # a, b, c are 1, 2, 3
    assert result(netlist, "--data", text)["tokens"] == 9


def test_shown_for_people(netlist: Path, tmp_path: Path) -> None:
    picture = tmp_path / "spikes.png"
    ran = run_ntc("simulate", netlist, "--tokens", "1,2,3", "--raster", picture)
    assert ran.code == 0, ran.err
    for text in ("attention", "synaptic operations", "most likely next token", "integer grade, whole"):
        assert text in ran.out or text == "attention"
    assert picture.read_bytes().startswith(b"\x89PNG")
    listed = run_ntc("--help").out
    assert "simulate" in listed
    assert "Examples" in run_ntc("simulate", "--help").out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give one of --tokens, --ids and --data"), (["--tokens", "1", "--ids", "x.npy"], "give one of"),
        (["--tokens", "1,b"], "numbers with commas"), (["--tokens", "99"], "run from 0 to 12, and 99 is none"),
        (["--tokens", "1", "--max-tokens", "3"], "--max-tokens goes with --data"), (["--ids", "nowhere.npy"], "cannot read the token ids"),
        (["--tokens", "1", "--raster", "spikes.txt"], "is written as .npz .* or .png"),
        (["--tokens", "1", "--logits", "nowhere/logits.npy"], "there is no folder nowhere"),
        (["--tokens", "1", "--raster", "nowhere/spikes.npz"], "there is no folder nowhere"),
        (["--tokens", "99999999999999999999"], "numbers with commas"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence(netlist: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str) -> None:
    import re

    monkeypatch.chdir(netlist)
    assert re.search(says, refused(netlist, *arguments))
    assert sorted(p.name for p in netlist.iterdir()) == ["netlist.json", "netlist.safetensors"]


def test_ids_that_are_no_ids(netlist: Path, tmp_path: Path) -> None:
    for name, content in (("a.json", b"{"), ("a.npy", b"\x93NUMPYx"), ("b.npy", b""), ("c.json", b'["a"]'), ("d.json", b"[[1], [2, 3]]")):
        (tmp_path / name).write_bytes(content)
        refused(netlist, "--ids", tmp_path / name)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    assert "holds no token ids" in refused(netlist, "--ids", tmp_path / "objects.npy")


def test_netlists_that_are_none(tmp_path: Path) -> None:
    assert "there is no netlist at" in refused(tmp_path, "--tokens", "1")
    (tmp_path / "manifest.json").write_text("{}")
    assert "--emit netlist" in refused(tmp_path, "--tokens", "1")
    assert "there is no netlist at" in refused(tmp_path / "nowhere", "--tokens", "1")


def test_rasters_of_a_batch_of_sequences() -> None:
    case, ids = cached("spikes", 1), torch.randint(0, 61, (3, 7), generator=torch.Generator().manual_seed(0))
    simulator = Simulator(case.folder)
    simulator.run(ids.numpy(), rasters=True)
    whole = trains(simulator, 3, 7)
    simulator.run(ids.numpy(), rasters=True, stepwise=True)
    online = trains(simulator, 3, 7)
    for name, train in reference(case.program, ids).spikes.items():
        assert np.array_equal(whole[name], train != 0)
        assert np.array_equal(online[name], train != 0)
