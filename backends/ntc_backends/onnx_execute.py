"""``model.onnx`` in ONNX Runtime, for ``ntc verify``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ntc.errors import ArtifactError, BackendError, DisagreementError
from ntc.executors import Execution, Executor
from ntc.program import Program
from ntc.recording import populations, sources
from ntc_backends.onnx_run import Exposed
from ntc_backends.onnx_writer import DATA, MODEL

__all__ = ["OnnxExecutor"]


class OnnxExecutor(Executor):
    """Stock ONNX Runtime. Populations that the integer grade runs in closed form show their spike counts."""

    name = "onnx"

    def prepare(self, folder: Path, program: Program) -> None:
        """Load the model twice, whole and cut; the second one when it is needed."""
        import onnxruntime

        self.about = f"onnxruntime {onnxruntime.__version__}"
        self.path, self.populations = folder / MODEL, populations(program)
        self.inputs = tuple(dict.fromkeys(source.name for source in sources(self.populations.values()).values()))
        self.files = (MODEL, DATA) if (folder / DATA).is_file() else (MODEL,)
        self.cut: Exposed | None = None
        self.whole = self._load(cut=False)

    def _load(self, *, cut: bool) -> Exposed:
        try:
            return Exposed(self.path, self.populations, cut=cut)
        except DisagreementError:
            raise
        except BackendError as error:
            raise ArtifactError(f"{self.path} cannot be run: {error}") from error

    def run(self, ids: Tensor) -> Execution:
        """The model as it is."""
        return self._execution(self.whole, *self.whole.run(ids))

    def held(self, ids: Tensor, values: Mapping[str, Tensor]) -> Execution:
        """The model cut behind each population."""
        self.cut = self.cut or self._load(cut=True)
        return self._execution(self.cut, *self.cut.run(ids, {name: values[name] for name in (*self.populations, *self.cut.sources)}))

    @staticmethod
    def _execution(model: Exposed, logits: Tensor, found: dict[str, Tensor]) -> Execution:
        spikes = {name: value.to(torch.int8) for name, value in found.items() if name not in model.counts}
        return Execution(logits, spikes, {name: found[name] for name in found if name in model.counts})
