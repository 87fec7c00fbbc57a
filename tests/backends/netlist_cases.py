"""What the tests of the netlist back end share: compiled tiny models and their netlists."""

from __future__ import annotations

import functools
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from netlist_executor import Executor

import ntc
from ntc.program import Program, interpret
from ntc.recipe import Settings
from ntc.registry import find_pass, recipe
from ntc.testing import example_ids, tiny_gpt2
from ntc.verify import verify
from ntc_backends.netlist import NetlistBackend

# Said in full, so that these tests do not depend on what the recipe chooses.
PLAIN = {"normalizer": "position", "signed_query": False, "signed_key": False, "signed_value": True, "output": "spikes"}
TERNARY = {"signed_query": True, "signed_key": True, "signed_value": True}

VARIANTS = {
    "default": ("neurtransformer", {}),
    "current": ("neurtransformer", PLAIN | {"output": "current"}),
    "spikes": ("neurtransformer", PLAIN),
    "forgetting": ("neurtransformer", PLAIN | {"normalizer": "channel-leak"}),
    "ffn-only": ("ffn-only", {}),
    "binary": ("neurtransformer", PLAIN | {"signed_value": False, "steps": 3}),
    "learned-position": ("neurtransformer", {"normalizer": "learned-position", "output": "current"}),
    "leak-rms": ("neurtransformer", PLAIN | TERNARY | {"normalizer": "leak-rms"}),
    "row-sum": ("neurtransformer", PLAIN | TERNARY | {"normalizer": "row-sum", "steps": 3}),
}


def compiled(variant: str, layers: int = 2) -> Program:
    name, options = VARIANTS[variant]
    program = ntc.capture(tiny_gpt2(n_layer=layers))
    passes = recipe(name).build(Settings(options), find_pass)
    calibration = ntc.Calibration((example_ids(batch=4, length=20, seed=5),), "random ids", "0")
    return ntc.run_pipeline(program, passes, ntc.Context(calibration))


@dataclass
class Case:
    program: Program
    folder: Path
    counts: dict[str, Any]

    @property
    def json(self) -> dict[str, Any]:
        return json.loads((self.folder / "netlist.json").read_text(encoding="utf-8"))

    def edited(self, folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
        """A copy whose JSON was changed."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        data = self.json
        edit(data)
        (folder / "netlist.json").write_text(json.dumps(data), encoding="utf-8")
        return folder


def emitted(program: Program, folder: Path) -> Case:
    return Case(program, folder, NetlistBackend().emit(program, folder, analog=None, tokens=None))


@functools.cache
def cached(variant: str, layers: int = 2) -> Case:
    """A variant with its netlist, made once for all test files of a process."""
    folder = tempfile.TemporaryDirectory(prefix="ntc-netlist-")
    _KEEP.append(folder)
    return emitted(compiled(variant, layers), Path(folder.name))


_KEEP: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


def agreement(program: Program, folder: Path, ids: torch.Tensor) -> tuple[float, int, int]:
    """Largest difference of the logits, number of spikes that differ, number of spikes."""
    spikes: dict[str, torch.Tensor] = {}

    def visit(node: Any, args: Any, value: Any) -> None:
        if "fire" in str(node.target):
            spikes[node.name] = value

    with torch.no_grad():
        expected = interpret(program, ids, visit)
        run = Executor(folder)
        found = run(ids)
    assert run.events.keys() == spikes.keys()
    differ = sum(int((run.events[name] != train).sum()) for name, train in spikes.items())
    return float((found - expected).abs().max()), differ, sum(int((t != 0).sum()) for t in spikes.values())


def doubled(program: Program) -> Program:
    """In float64: there no membrane of a random model comes within rounding of its threshold, on any machine."""
    other = program.with_graph(program.copy().graph, {name: tensor.double() for name, tensor in program.tensors.items()})
    other.refresh()
    verify(other)
    return other


def changed(program: Program, change: Callable[[Program], None]) -> Program:
    """A verified copy of a program after an edit."""
    other = program.copy()
    change(other)
    other.refresh()
    verify(other)
    return other


def masked(text: str) -> str:
    """Without what depends on versions and on the order of float sums of a machine."""
    text = re.sub(r'"sha256": "\w+"', '"sha256": "..."', text)
    text = re.sub(r'"(source)": "(\w+\.py):\d+', r'"\1": "\2:..', text)
    return re.sub(r'"version": "[^"]*"', '"version": "..."', text)


def element(data: dict[str, Any], table: str, **having: Any) -> dict[str, Any]:
    return next(e for e in data[table] if all(e[k] == v for k, v in having.items()))
