"""The NIR files of a compiled folder, run by ``nir_execute``, for ``ntc verify``.

NIR cannot say what the host does, so there is no free run: each file gets what the program has at its input. What is not in a
file is listed with the reason that the index gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ntc.errors import ArtifactError, DisagreementError
from ntc.executors import Execution, Executor
from ntc.program import Program
from ntc.recording import populations
from ntc_backends.nir_execute import run_file
from ntc_backends.nir_index import FOLDER, INDEX, load_index
from ntc_backends.nir_neurons import numpy_of
from ntc_backends.nir_options import require_nir

__all__ = ["NirExecutor"]


class NirExecutor(Executor):
    """Files on the program's values, one time step after another, in numpy."""

    name = "nir"
    free = False

    def prepare(self, folder: Path, program: Program) -> None:
        """Read the index and all files."""
        require_nir()
        from ntc_backends.nir_files import digest_of, read_file

        index = load_index(folder)
        self.about = f"numpy {np.__version__}, by the definitions of NIR {index.nir_version}"
        self.files = (INDEX, *(f"{FOLDER}/{entry.file}" for entry in index.files))
        self.entries = []
        for entry in index.files:
            path = folder / FOLDER / entry.file
            if not path.is_file() or digest_of(path) != entry.sha256:
                raise ArtifactError(f"{path} is missing or has changed since its index was written: export it again")
            self.entries.append((entry, *read_file(path)))
        self.inputs = tuple(dict.fromkeys(entry.input.value for entry in index.files))
        self.unsupported = tuple((node.name, node.reason) for node in index.nodes if node.fidelity == "unsupported")
        inside = {p.name for entry in index.files for p in entry.populations}
        self.approximate = tuple((n.name, n.reason) for n in index.nodes if n.fidelity == "approximate" and n.name in inside)
        inside_of = {entry.name: tuple(p.name for p in entry.populations) for entry in index.files}
        self.behind = {name: names[:i] for names in inside_of.values() for i, name in enumerate(names)}
        currents = [(entry, o.value) for entry in index.files for o in entry.outputs if o.value not in inside]
        self.outputs = tuple(value for _, value in currents)
        self.behind |= {value: inside_of[entry.name] for entry, value in currents}
        missing = populations(program).keys() - inside - {name for name, _ in self.unsupported}
        if missing:
            raise DisagreementError(f"the index has no population {min(missing)}")

    def held(self, ids: Tensor, values: Mapping[str, Tensor]) -> Execution:
        """Each file on the value that the program has at its input."""
        spikes: dict[str, Tensor] = {}
        currents: dict[str, Tensor] = {}
        for entry, graph, version in self.entries:
            found = run_file(entry, graph, version, numpy_of(values[entry.input.value]))
            spikes |= {p.name: torch.from_numpy(found[p.name].astype(np.int8)) for p in entry.populations}
            currents |= {o.value: torch.from_numpy(found[o.value]) for o in entry.outputs if o.value in self.outputs}
        return Execution(None, spikes, values=currents)
