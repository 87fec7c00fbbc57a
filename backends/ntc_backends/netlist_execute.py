"""``netlist.json`` in the simulator, for ``ntc verify``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ntc.errors import DisagreementError
from ntc.executors import Execution, Executor
from ntc.program import Program
from ntc.recording import populations
from ntc_backends.netlist_reader import JSON_NAME
from ntc_backends.simulator.engine import Simulator
from ntc_backends.simulator.piece import Array

__all__ = ["NetlistExecutor"]


class NetlistExecutor(Executor):
    """The simulator, layer by layer, on whole sequences."""

    name = "netlist"

    def prepare(self, folder: Path, program: Program) -> None:
        """Read and check the netlist."""
        self.simulator = Simulator(folder)
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
        fired: dict[str, Tensor] = {}

        def see(name: str, train: Array) -> Array | None:
            fired[name] = torch.from_numpy(train)
            return held.get(name)

        logits = self.simulator.run(ids.numpy(), spikes=see)
        return Execution(torch.from_numpy(logits), fired)
