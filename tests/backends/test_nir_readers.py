"""The files in other people's hands: the nir package new and old, nirtorch, snnTorch. Where one misreads, the test says how."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nir_cases import Toy, emitted, trains

from ntc.ops import aten
from ntc.program import Program
from ntc_backends.nir_index import NirIndex

nir = pytest.importorskip("nir", reason="pip install 'ntc-compiler[nir]'")

OLD = Path(os.environ.get("NTC_NIR_1_0_4", Path(__file__).parents[2] / "build" / "nir-1.0.4"))
needs_old = pytest.mark.skipif(
    not (OLD / "nir").is_dir(), reason="nir 1.0.4 is not here: pip install --no-deps --target build/nir-1.0.4 nir==1.0.4"
)


def block(signed: bool, v0: float = 0.5) -> Program:
    """A layer, neurons, a layer; every number a multiple of 1/8, so that nothing rounds."""
    g = torch.Generator().manual_seed(4)

    def eighths(*shape: int, low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=g).float() / 8

    made = Toy(eighths(50, 5, low=-8, high=8))
    current = made(aten.linear.default, made.last, eighths(6, 5, low=-8, high=8), eighths(6, low=-4, high=4), name="fc")
    spikes = made.fire(current, torch.ones(6), torch.full((1,), v0), 8, signed, name="act")
    back = made(aten.linear.default, spikes, eighths(3, 6, low=-8, high=8), eighths(3, low=-4, high=4), name="proj")
    made(torch.ops.ntc.decode.default, back, "rate", name="decoded")
    return made.done()


# ------------------------------------------------------------------------------------------------ the nir package


@pytest.mark.parametrize("signed", [False, True])
def test_nir_reads_and_checks_the_types(tmp_path: Path, signed: bool) -> None:
    emitted(block(signed), tmp_path)
    graph = nir.read(tmp_path / "nir" / "fc.nir")
    assert graph.check_types()
    assert graph.input_type["input"].tolist() == [5]
    assert graph.output_type["output"].tolist() == [3]
    assert json.loads(graph.metadata["ntc"]) == {"index": "index.json", "part": "fc"}
    assert json.loads(graph.nodes["act_membrane"].metadata["ntc"]) == {"node": "act", "part": "membrane"}
    assert not any("/" in name or "." in name for name in graph.nodes)
    assert all(np.ndim(v) > 0 for node in graph.nodes.values() for v in vars(node).values() if isinstance(v, np.ndarray))  # no 0-d ones


def test_annotation_survives(tmp_path: Path) -> None:
    emitted(block(False), tmp_path, reset="annotate")
    assert json.loads(nir.read(tmp_path / "nir" / "fc.nir").nodes["act"].metadata["ntc"])["reset"] == "soft"


@needs_old
@pytest.mark.parametrize(("reset", "signed"), [("explicit", False), ("explicit", True), ("annotate", False), ("annotate", True)])
def test_nir_1_0_4_reads_files_made_for_it(tmp_path: Path, reset: str, signed: bool) -> None:
    code = (
        "import json, sys, nir\n"
        "graph = nir.read(sys.argv[1]); graph.infer_types()\n"
        "print(json.dumps([nir.version if hasattr(nir, 'version') else '', sorted(type(n).__name__ for n in graph.nodes.values()),\n"
        "  {k: v.v_threshold.tolist() for k, v in graph.nodes.items() if hasattr(v, 'v_threshold')}, len(graph.edges), nir.__file__]))\n"
    )

    def old(path: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(OLD)}
        )

    emitted(block(signed), tmp_path, reset=reset, compat="1.0.4")
    ran = old(tmp_path / "nir" / "fc.nir")
    assert ran.returncode == 0, ran.stderr
    _, kinds, thresholds, edges, where = json.loads(ran.stdout.splitlines()[-1])
    assert Path(where).is_relative_to(OLD)
    now = nir.read(tmp_path / "nir" / "fc.nir")
    assert kinds == sorted(type(n).__name__ for n in now.nodes.values())
    assert edges == len(now.edges)
    assert thresholds == {k: v.v_threshold.tolist() for k, v in now.nodes.items() if hasattr(v, "v_threshold")}
    emitted(block(signed), tmp_path, reset=reset)  # why compat is there at all
    assert "unexpected keyword argument" in old(tmp_path / "nir" / "fc.nir").stderr


# ------------------------------------------------------------------------------------------------ nirtorch


class Integrate(torch.nn.Module):
    def __init__(self, r: Any) -> None:
        super().__init__()
        self.r = torch.nn.Parameter(torch.from_numpy(r))

    def forward(self, x: torch.Tensor, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        v = (0 if state is None else state) + self.r * x
        return v, v


class Pointwise(torch.nn.Module):
    def __init__(self, value: Any, rule: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.value, self.rule = torch.nn.Parameter(torch.from_numpy(value)), rule

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rule(x, self.value)


def affine(node: Any) -> torch.nn.Linear:
    layer = torch.nn.Linear(node.weight.shape[1], node.weight.shape[0])
    layer.weight.data, layer.bias.data = torch.from_numpy(node.weight), torch.from_numpy(node.bias)
    return layer


MAP: dict[Any, Callable[[Any], torch.nn.Module]] = {
    nir.I: lambda n: Integrate(n.r),
    nir.Threshold: lambda n: Pointwise(n.threshold, lambda x, limit: (x > limit).to(x.dtype)),
    nir.Scale: lambda n: Pointwise(n.scale, lambda x, factor: x * factor),
    nir.Affine: affine,
}


def by_nirtorch(path: Path, index: NirIndex, x: np.ndarray[Any, Any], mapping: Any = MAP) -> np.ndarray[Any, Any]:
    nirtorch = pytest.importorskip("nirtorch", reason="pip install nirtorch")
    network = nirtorch.nir_to_torch(nir.read(path), mapping)
    state, steps = None, []
    with torch.no_grad():
        for _ in range(index.files[0].steps):
            y, state = network(torch.from_numpy(x), state)
            steps.append(y.numpy())
    return np.stack(steps)


@pytest.mark.parametrize("signed", [False, True])
def test_nirtorch_runs_the_loop_spike_for_spike(tmp_path: Path, signed: bool) -> None:
    program = block(signed)
    index, values = emitted(program, tmp_path), trains(program)
    assert np.count_nonzero(values["act"]) > 200
    found = by_nirtorch(tmp_path / "nir" / "fc.nir", index, values["x"])
    np.testing.assert_array_equal(found, values["proj"])  # the currents that the spikes cause, step by step


def test_nirtorch_2_6_needs_a_rule_for_affine(tmp_path: Path) -> None:
    """Its own one forgets the bias and leaves a random one (neuromorphs/NIRTorch#55)."""
    pytest.importorskip("nirtorch", reason="pip install nirtorch")
    if version("nirtorch") != "2.6":
        pytest.skip("this is a mistake of nirtorch 2.6")
    program = block(False)
    index, values = emitted(program, tmp_path), trains(program)
    without = {kind: rule for kind, rule in MAP.items() if kind is not nir.Affine}
    assert (by_nirtorch(tmp_path / "nir" / "fc.nir", index, values["x"], without) != values["proj"]).any()


def test_code_of_the_documents_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nirtorch", reason="pip install nirtorch")
    (tmp_path / "DIR").mkdir()
    emitted(block(False), tmp_path / "DIR")
    text = (Path(__file__).parents[2] / "docs" / "nir.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code) == 2
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(code), "docs/nir.md", "exec"), {"__name__": "docs"})


# ------------------------------------------------------------------------------------------------ snnTorch


def snntorch_import(path: Path) -> Any:
    pytest.importorskip("snntorch", reason="pip install snntorch")
    from snntorch.import_nir import import_from_nir

    return import_from_nir(nir.read(path))


def test_snntorch_refuses_the_loop(tmp_path: Path) -> None:
    emitted(block(False), tmp_path)
    with pytest.raises(ValueError, match="mapping does not exist"):
        snntorch_import(tmp_path / "nir" / "fc.nir")


def test_snntorch_1_0_reads_if_as_a_leaky_neuron(tmp_path: Path) -> None:
    """An IF node becomes ``Leaky(beta=0.9)``: it forgets a tenth of its membrane at each step, which nobody asked for."""
    program = block(False)
    index = emitted(program, tmp_path, reset="annotate")
    if version("snntorch") != "1.0.0":
        pytest.skip("this is a mistake of snnTorch 1.0.0")
    network = snntorch_import(tmp_path / "nir" / "fc.nir")
    cell = network.get_submodule("act")
    assert float(cell.beta) == pytest.approx(0.9)
    assert cell._reset_mechanism == "subtract"
    assert torch.equal(network.get_submodule("fc").weight, torch.from_numpy(nir.read(tmp_path / "nir" / "fc.nir").nodes["fc"].weight))
    assert index.files[0].input.start == "channel"


def test_snntorch_reads_a_soft_lif_as_one_that_resets_to_zero(tmp_path: Path) -> None:
    """Metadata say soft, and its reader does not look; nor does it look at the length of a step."""
    made = Toy(torch.tensor([[1.0, -0.5], [0.25, 2.0]]))
    current = made(aten.linear.default, made.last, torch.tensor([[0.5, 0.25], [-0.5, 1.0]]), torch.zeros(2), name="fc")
    one = torch.ones(1)
    spikes = made(torch.ops.ntc.leaky_integrate_fire.default, current, one, 2 * one, 0 * one, 4, False, False, "atan", 1.0, name="act")
    made(torch.ops.ntc.decode.default, made(aten.linear.default, spikes, torch.eye(2), None, name="proj"), "rate", name="decoded")
    index = emitted(made.done(), tmp_path, reset="annotate")
    assert index.files[0].populations[0].reset == "soft"
    cell = snntorch_import(tmp_path / "nir" / "fc.nir").get_submodule("act")
    assert cell._reset_mechanism == "zero"
    assert float(cell.beta.max()) == pytest.approx(1 - 1e-4 / 2)  # its step is 1e-4 of NIR's time: tau = 2 steps became 20,000
