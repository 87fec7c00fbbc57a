"""What a back end can never write of a recipe is refused before the recipe runs, and nothing else is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ntc
from ntc.emit import check_facts, check_recipe, emitters
from ntc.errors import BackendError, PassError
from ntc.pipeline import Context, Pass, PassResult
from ntc.program import Program
from ntc.recipe import Recipe, Settings, Step
from ntc.registry import Backend, backend, recipe
from ntc.testing import example_ids, tiny_gpt2

CODED = {"ecmt", "las", "lossless", "lossless-sparse", "lossless-spiking", "phase", "sdllm"}
OTHERS = {"ffn-only", "neurtransformer", "ssa-only"}


class Emitter:
    """A back end of somebody's; ``refusal`` is not asked of it."""

    name = "somebodys"
    files = ("x.json",)
    summary = "x"

    def emit(self, program: Program, folder: Any, *, analog: Program | None, tokens: Any | None) -> dict[str, Any]:
        return {}


class Picky(Emitter):
    """One that has reasons."""

    def refusal(self, facts: frozenset[str]) -> str:
        return "somebody's chip computes with integers only" if "integer" not in facts else ""


class Broken(Emitter):
    def refusal(self, facts: frozenset[str]) -> str:
        raise KeyError("no")


class Plain(Pass):
    """Somebody's pass, which says nothing of the neurons that it makes."""

    name = "plain"
    requires = frozenset({"canonical"})
    provides = frozenset({"spiking"})

    def run(self, program: Program, context: Context) -> PassResult:
        raise AssertionError("nothing runs")


class Lowered(Plain):
    """One that makes other neurons of coded ones."""

    name = "lowered"
    removes = frozenset({"coded"})


def mine(*steps: str | type[Pass]) -> Recipe:
    return Recipe("mine", "", "", "", "", tuple(Step(s) for s in ("canonicalize", *steps)))


def ahead(chosen: Recipe, *targets: str | Backend) -> None:
    check_recipe(chosen, Settings(), [backend(t) if isinstance(t, str) else t for t in targets])


@pytest.mark.parametrize("name", sorted(CODED))
def test_netlist_and_nir_of_coded_recipes_are_refused(name: str) -> None:
    with pytest.raises(BackendError, match=rf"^netlist cannot be written of what recipe {name} makes: .* spikes have weights or sizes"):
        ahead(recipe(name), "onnx", "energy", "netlist")
    with pytest.raises(BackendError, match=rf"^nir cannot be written of what recipe {name} makes: .* those that integrate and fire"):
        ahead(recipe(name), "nir")
    ahead(recipe(name), "onnx", "energy")


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_recipes_of_plain_neurons_are_not(name: str) -> None:
    ahead(recipe(name), "onnx", "energy", "netlist", "nir", "onnx-streaming")


def test_nothing_is_captured_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without a model would be refused by the capture, if it came to that."""
    monkeypatch.setattr("ntc.compiler.capture", lambda *_: pytest.fail("captured"))
    with pytest.raises(BackendError, match="netlist cannot be written"):
        ntc.compile(tmp_path, recipe="sdllm", targets=["netlist"])
    with pytest.raises(PassError, match=r"^pass quantize cannot take what encode-linears makes: .*neurtransformer"):
        ntc.compile(tmp_path, recipe="sdllm", quantize=8)
    with pytest.raises(BackendError, match=r"pass to-streaming cannot take .* known are softmax and spiking attention"):
        ntc.compile(tmp_path, recipe="lossless", targets=["onnx-streaming"])


def test_recipes_and_passes_of_ones_own() -> None:
    """A pass that says nothing of its neurons is believed to make whatever the back end wants; what is coded stays so until a pass says no."""
    ahead(mine(Plain), "netlist", "nir")
    with pytest.raises(BackendError, match=r"^netlist cannot be written of what recipe mine makes"):
        ahead(mine("encode-linears", Plain), "netlist")
    ahead(mine("encode-linears", Lowered), "netlist", "nir", "onnx-streaming")
    with pytest.raises(BackendError, match="the program holds no neurons that NIR has words for"):
        ahead(mine("encode-linears"), "nir")
    ahead(mine("calibrate", "convert-ffn", "insert-neurons", "encode-linears"), "nir")  # coded ones beside others
    with pytest.raises(BackendError, match="a netlist holds neurons, and there are firing rates in their places"):
        ahead(mine("calibrate", "convert-ffn"), "netlist")
    with pytest.raises(BackendError, match="NIR holds neurons, and there are firing rates in their places"):
        ahead(mine("calibrate", "convert-ffn"), "nir")
    for target in ("netlist", "nir"):
        with pytest.raises(BackendError, match="without to-streaming"):
            ahead(mine("calibrate", "convert-ffn", "insert-neurons", "to-streaming"), target)
    with pytest.raises(PassError, match="pass insert-neurons needs a program that is neurons-annotated"):
        ahead(mine("insert-neurons"))


def test_back_ends_of_ones_own() -> None:
    ahead(recipe("lossless"), Emitter())
    with pytest.raises(BackendError, match=r"^somebodys cannot be written of what recipe neurtransformer makes: somebody's chip .* only$"):
        ahead(recipe("neurtransformer"), Picky())
    ahead(ntc.compiler.quantizing("neurtransformer", 8), Picky())
    with pytest.raises(BackendError, match=r"^back end somebodys failed: KeyError"):
        ahead(recipe("neurtransformer"), Broken())


def test_a_program_that_is_there_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    made = ntc.compile(tiny_gpt2(n_layer=1), recipe="sdllm", calibration=ntc.Calibration.of(example_ids()))
    assert {"spiking", "coded"} <= made.program.facts and "integrate-fire" not in made.program.facts
    with pytest.raises(BackendError, match=r"^netlist cannot be written of this program"):
        ntc.write(made, tmp_path / "out", emit=["onnx", "netlist"])
    assert list(tmp_path.iterdir()) == []
    ntc.write(made, tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BackendError, match=r"^netlist cannot be written of this program"):
        ntc.compiler.export(tmp_path / "out", ["onnx", "netlist"], tokens=torch.zeros(1, 4, dtype=torch.int64))
    assert sorted(tmp_path.rglob("*")) == before
    check_facts(emitters(["onnx", "energy", "onnx-streaming"]), made.program.facts)
