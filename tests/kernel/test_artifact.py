"""Compiled folders: the same program back bit for bit, the same bytes twice, damage found, no code run, nothing lost."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import CONTEXT, canonical, nano, spiking

import ntc
from ntc.artifact import FORMAT, load, load_analog, save, seal
from ntc.errors import ArtifactError, NtcError
from ntc.folders import check_output, is_artifact, replacing_folder
from ntc.meta import MADE_BY, MODULE, NEURON, ORIGIN, SOURCE, TYPE
from ntc.observe import count_by_shape
from ntc.pipeline import exact_limit, run_pipeline
from ntc.program import Program
from ntc.testing import NanoGPT, example_ids
from ntc.verify import verify
from ntc_passes.replace_attention import ReplaceAttention


def written(folder: Path, program: Program | None = None, **more: Any) -> Path:
    folder.mkdir(parents=True)
    save(program or spiking(n_layer=1), folder, analog=canonical(n_layer=1), about={"recipe": {"name": "x"}})
    seal(folder, **more)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path / "out", targets={"x": 1})


def edited(folder: Path, name: str, act: Callable[[Any], Any], *, resealed: bool = True) -> None:
    """Change a JSON file of a folder, with the manifest's hash put right, so that only the content is wrong."""
    path = folder / name
    data = json.loads(path.read_text())
    path.write_text(json.dumps(act(data) or data))
    if resealed and name != "manifest.json":
        seal(folder)


# ------------------------------------------------------------------------------------------------ round trip


@pytest.mark.parametrize("stage", ["canonical", "rates and split weights", "spiking", "hand-written, captured"])
def test_a_program_comes_back_as_it_was(tmp_path: Path, stage: str) -> None:
    program = {
        "canonical": lambda: canonical(n_layer=1),
        "rates and split weights": lambda: run_pipeline(nano(), [ReplaceAttention()], CONTEXT),
        "spiking": lambda: spiking(n_layer=1),
        "hand-written, captured": lambda: ntc.capture(NanoGPT(layers=1, mask="additive"), example_ids()),
    }[stage]()
    verify(program)  # capture alone writes no types
    again = load(written(tmp_path / "out", program))
    assert str(again) == str(program)
    for ids in (program.example, example_ids(batch=3, length=11), example_ids(batch=1, length=1)):
        # Weights are compared to the last bit below; where they lie in memory decides the order of sums on some processors.
        expected = program(ids)
        torch.testing.assert_close(again(ids), expected, rtol=0, atol=exact_limit(float(expected.detach().abs().max())))
    assert (again.facts, again.info, again.steps) == (program.facts, program.info, program.steps)
    assert [r.to_json() for r in again.history] == json.loads(json.dumps([r.to_json() for r in program.history]))
    assert torch.equal(again.example, program.example)
    for old, new in zip(program.graph.nodes, again.graph.nodes, strict=True):
        for key in (ORIGIN, MADE_BY, NEURON, TYPE):
            assert new.meta.get(key) == old.meta.get(key), (new.name, key)
        assert (new.meta[MODULE], new.meta[SOURCE]) == (old.meta.get(MODULE, ""), old.meta.get(SOURCE, ""))
    for name, tensor in program.tensors.items():
        assert torch.equal(again.tensor(name), tensor)
        assert isinstance(again.tensor(name), torch.nn.Parameter) == isinstance(tensor, torch.nn.Parameter)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in program.parameters())


def test_the_network_before_conversion_comes_back_as_shapes(folder: Path, tmp_path: Path) -> None:
    analog = load_analog(folder)
    assert analog is not None
    assert all(t.is_meta for t in analog.tensors.values())
    ours, theirs = (count_by_shape(p, [(2, 5)]).nodes for p in (analog, canonical(n_layer=1)))
    assert {n: r.counts for n, r in ours.items()} == {n: r.counts for n, r in theirs.items()}
    bare = tmp_path / "bare"
    bare.mkdir()
    save(spiking(n_layer=1), bare)
    seal(bare)
    assert load_analog(bare) is None


def test_the_same_program_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    assert contents(written(tmp_path / "again", targets={"x": 1})) == contents(folder)
    second = written(tmp_path / "third", load(folder), targets={"x": 1})
    assert contents(second) == contents(folder), "and so does one that was loaded"


def test_the_manifest_says_what_is_there(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    files = contents(folder)
    del files["manifest.json"]
    assert manifest["files"] == files
    assert set(files) == {"program.json", "program.safetensors", "analog.json"}
    assert (manifest["ntc_format"], manifest["steps"], manifest["targets"], manifest["recipe"]) == (FORMAT, 4, {"x": 1}, {"name": "x"})
    assert manifest["conventions"] == {"comparison": ">=", "reset": "soft", "dt": 1, "time_axis": 0, "decode": "mean over steps"}
    assert [r["name"] for r in manifest["history"]][-1] == "insert-neurons"


def test_a_folder_inside_is_sealed_with_its_manifest(folder: Path) -> None:
    written(folder / "baseline")
    inside = {name: found for name, found in contents(folder).items() if name != "manifest.json"}
    assert "baseline/manifest.json" in inside
    assert seal(folder)["files"] == inside


def test_loading_needs_no_transformers(folder: Path) -> None:
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "tokenizers", "ntc_passes", "ntc_backends"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
import torch
from ntc.artifact import load
print(repr(float(load({str(folder)!r})(torch.arange(12).view(2, 6)).double().sum())))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == float(spiking(n_layer=1)(torch.arange(12).view(2, 6)).double().sum())


# ------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("name", ["program.json", "program.safetensors", "analog.json"])
def test_one_changed_byte_is_found(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    read = load_analog if name == "analog.json" else load
    with pytest.raises(ArtifactError, match=rf"{name} is damaged: its sha256 is not the one in the manifest"):
        read(folder)


@pytest.mark.parametrize("name", ["program.json", "program.safetensors", "manifest.json"])
def test_a_missing_or_cut_file_is_found(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="damaged"):
        load(folder)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"lacks|holds no compiled program"):
        load(folder)


def drop_tensor(data: Any) -> None:
    data["tensors"].pop("transformer.wte.weight")


def unknown_node(data: Any) -> None:
    data["nodes"][-1]["args"] = [{"node": "nobody"}]


def code_argument(data: Any) -> None:
    data["nodes"][5]["args"] = [{"eval": "1"}]


def no_nodes(data: Any) -> None:
    del data["nodes"]


@pytest.mark.parametrize(
    "target",
    [
        "aten.no_such_op.default", "aten.linear.no_such_overload", "aten.linear", "os.system", "operator.attrgetter", "prims.sin.default",
        "aten.linear.overloads", "aten.__class__.__name__",
    ],
)  # fmt: skip
def test_only_registered_ops_can_be_named(folder: Path, target: str) -> None:
    """``overloads`` is a method that getattr finds, ``prims`` a namespace of torch that no program of ours uses."""

    def act(data: Any) -> None:
        next(n for n in data["nodes"] if n["op"] == "call_function")["target"] = target

    edited(folder, "program.json", act)
    with pytest.raises(ArtifactError, match=rf"is damaged: ValueError: unknown op {target}$"):
        load(folder)


@pytest.mark.parametrize("act", [drop_tensor, unknown_node, code_argument, no_nodes])
def test_a_graph_that_makes_no_sense_is_refused(folder: Path, act: Callable[[Any], Any]) -> None:
    edited(folder, "program.json", act)
    with pytest.raises(ArtifactError, match="is damaged"):
        load(folder)


def test_a_graph_that_breaks_a_rule_is_refused(folder: Path) -> None:
    def wrong_code(data: Any) -> None:
        next(n for n in data["nodes"] if n["target"] == "ntc.decode.default")["args"][1] = "count"

    edited(folder, "program.json", wrong_code)
    with pytest.raises(NtcError, match="decode reads the count code"):
        load(folder)


def test_other_formats_and_foreign_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    edited(folder, "manifest.json", lambda m: {**m, "ntc_format": FORMAT - 1})
    for read in (load, load_analog):
        with pytest.raises(ArtifactError, match=f"written by an older ntc \\(format {FORMAT - 1}, this one reads {FORMAT}\\): compile it again"):
            read(folder)
    edited(folder, "manifest.json", lambda m: {**m, "ntc_format": FORMAT + 1})
    for read in (load, load_analog):
        with pytest.raises(ArtifactError, match=f"written by a newer ntc \\(format {FORMAT + 1}, this one reads {FORMAT}\\)"):
            read(folder)
    edited(folder, "manifest.json", lambda m: {"name": "an app"})
    with pytest.raises(ArtifactError, match="holds no compiled program"):
        load(folder)
    with pytest.raises(ArtifactError, match=r"there is no folder .*absent"):
        load(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="holds no compiled program"):
        load(tmp_path / "empty")


def test_nothing_is_a_pickle(folder: Path) -> None:
    for path in folder.rglob("*"):
        assert path.suffix in (".json", ".safetensors")
        assert not path.read_bytes().startswith((b"\x80", b"PK"))


# ------------------------------------------------------------------------------------------------ output folders


def test_rules_of_output_folders(folder: Path, tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "deep", overwrite=False)
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", overwrite=False)
    with pytest.raises(ArtifactError, match="is not empty; choose another one, or give --overwrite"):
        check_output(folder, overwrite=False)
    check_output(folder, overwrite=True)
    assert is_artifact(folder)
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ArtifactError):
            check_output(other, overwrite)
    with pytest.raises(ArtifactError, match="holds something else than a compiled program: it is left as it is"):
        check_output(other, overwrite=True)
    with pytest.raises(ArtifactError, match="is a file; give a folder"):
        check_output(other / "thesis.tex", overwrite=True)
    with pytest.raises(ArtifactError, match="is a file"):
        check_output(other / "thesis.tex" / "below", overwrite=False)


def everything(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): "" if p.is_dir() else p.read_bytes().hex() for p in root.rglob("*")}


@pytest.mark.parametrize("error", [ArtifactError("no"), RuntimeError("bug"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_failure_leaves_the_old_folder_and_nothing_beside_it(folder: Path, tmp_path: Path, error: BaseException) -> None:
    before = everything(tmp_path)

    def attempt() -> None:
        with replacing_folder(folder) as beside:
            (beside / "half.json").write_text("{")
            raise error

    with pytest.raises(ArtifactError if isinstance(error, OSError) else type(error)) as caught:
        attempt()
    if isinstance(error, OSError):
        assert "No space left on device" in str(caught.value)
    assert everything(tmp_path) == before


def test_a_rename_that_fails_puts_the_old_folder_back(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, replace = everything(tmp_path), os.replace

    def failing(source: Any, target: Any) -> None:
        if Path(target) == folder and not str(source).endswith(".old"):
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(ArtifactError, match="Input/output error"), replacing_folder(folder) as beside:
        (beside / "new.json").write_text("{}")
    assert everything(tmp_path) == before


def test_success_replaces_the_folder_as_a_whole(folder: Path, tmp_path: Path) -> None:
    with replacing_folder(folder) as beside:
        assert beside.parent == tmp_path, "on the same disk, so that the rename cannot fail half-way"
        (beside / "only.json").write_text("{}")
        assert (folder / "program.json").exists()
    assert everything(tmp_path) == {"out": "", "out/only.json": b"{}".hex()}
    with replacing_folder(tmp_path / "deep" / "new") as beside:
        (beside / "x").write_text("x")
    assert (tmp_path / "deep" / "new" / "x").is_file()


