"""``netlist.json`` in the simulator, for ``ntc verify``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntc.errors import DisagreementError
from ntc.executors import Execution, Executor
from ntc.program import Program
from ntc.recording import populations
from ntc_backends import netlist_schema as schema
from ntc_backends.netlist_reader import JSON_NAME
from ntc_backends.simulator.engine import Simulator
from ntc_backends.simulator.piece import Array, Piece

__all__ = ["NetlistExecutor"]


class NetlistExecutor(Executor):
    """The simulator, layer by layer, on whole sequences."""

    name = "netlist"

    def prepare(self, folder: Path, program: Program) -> None:
        """Read and check the netlist."""
        self.simulator = _Watched(folder)
        self.files = (JSON_NAME, self.simulator.netlist.blob.file)
        self.about = f"the simulator of ntc, numpy {np.__version__}"
        missing = populations(program).keys() - {p.name for p in self.simulator.netlist.populations}
        if missing:
            raise DisagreementError(f"the netlist has no population {min(missing)}")

    def run(self, ids: Tensor) -> Execution:
        """From token ids to logits."""
        return self._run(ids, {})

    def held(self, ids: Tensor, values: Mapping[str, Tensor]) -> Execution:
        """With the program's trains behind each population."""
        return self._run(ids, {p.name: values[p.name].numpy() for p in self.simulator.netlist.populations})

    def _run(self, ids: Tensor, held: Mapping[str, Array]) -> Execution:
        logits, fired = self.simulator.watch(ids.numpy(), held)
        return Execution(torch.from_numpy(logits), {name: torch.from_numpy(train) for name, train in fired.items()})


class _Watched(Simulator):
    """The simulator with its populations seen, and their trains replaced for those who read them."""

    def __init__(self, path: Path) -> None:
        self.fired: dict[str, Array] = {}
        self.held: Mapping[str, Array] = {}
        super().__init__(path)

    def watch(self, ids: Array, held: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        """Logits, and what each population fires; readers see what is in ``held``."""
        self.held, self.fired = held, {}
        logits = self.run(ids)
        fired, self.fired, self.held = self.fired, {}, {}
        return logits, fired

    def _runner(self, element: schema.AnyElement) -> Any:
        runner = super()._runner(element)
        if not isinstance(element, schema.Population):
            return runner

        def watched(piece: Piece, current: Array) -> Array:
            train: Array = runner(piece, current)
            self.fired[element.name] = train
            return self.held.get(element.name, train)

        return watched
