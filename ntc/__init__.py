"""ntc: a compiler that turns pretrained language models into spiking networks.

>>> import ntc
>>> program = ntc.capture("path/to/gpt2")                      # doctest: +SKIP
>>> spiking = ntc.compile("path/to/gpt2", steps=4).program     # doctest: +SKIP
>>> logits = spiking(input_ids)                                # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ntc.artifact import load as load
    from ntc.compiler import Compilation as Compilation
    from ntc.compiler import compile_model as compile
    from ntc.compiler import export as export
    from ntc.compiler import write as write
    from ntc.energy import measure_energy as measure_energy
    from ntc.errors import ArtifactError as ArtifactError
    from ntc.errors import BackendError as BackendError
    from ntc.errors import CaptureError as CaptureError
    from ntc.errors import ConfigError as ConfigError
    from ntc.errors import DataError as DataError
    from ntc.errors import NtcError as NtcError
    from ntc.errors import PassError as PassError
    from ntc.errors import TrainingError as TrainingError
    from ntc.errors import VerifyError as VerifyError
    from ntc.frontend import capture as capture
    from ntc.generation import Generation as Generation
    from ntc.generation import generate as generate
    from ntc.pipeline import Calibration as Calibration
    from ntc.pipeline import Context as Context
    from ntc.pipeline import Override as Override
    from ntc.pipeline import Pass as Pass
    from ntc.pipeline import PassResult as PassResult
    from ntc.pipeline import run_pipeline as run_pipeline
    from ntc.program import Program as Program
    from ntc.quality import evaluate as evaluate
    from ntc.recipe import Recipe as Recipe
    from ntc.recipe import Settings as Settings
    from ntc.recipe import Step as Step
    from ntc.spike_type import SpikeType as SpikeType
    from ntc.streaming import Stream as Stream
    from ntc.training.config import TrainingConfig as TrainingConfig
    from ntc.training.run import Finetuned as Finetuned
    from ntc.training.run import finetune as finetune

__all__ = [
    "ArtifactError", "BackendError", "Calibration", "CaptureError", "Compilation", "ConfigError", "Context", "DataError",
    "Finetuned", "Generation", "NtcError", "Override", "Pass", "PassError", "PassResult", "Program", "Recipe", "Settings", "SpikeType",
    "Step", "Stream", "TrainingConfig", "TrainingError", "VerifyError", "capture", "compile", "evaluate", "export", "finetune",
    "generate", "load", "measure_energy", "run_pipeline", "write",
]  # fmt: skip

# Public names by module. They are imported when they are first used: torch takes seconds, and `ntc --help` has no use for it.
# No name may be that of a module of ours, which would take its place here as soon as it is imported.
_HOMES = {
    "artifact": ("load",),
    "compiler": ("Compilation", "export", "write"),
    "energy": ("measure_energy",),
    "errors": (
        "ArtifactError", "BackendError", "CaptureError", "ConfigError", "DataError", "NtcError", "PassError", "TrainingError",
        "VerifyError",
    ),
    "frontend": ("capture",),
    "generation": ("Generation", "generate"),
    "pipeline": ("Calibration", "Context", "Override", "Pass", "PassResult", "run_pipeline"),
    "program": ("Program",),
    "quality": ("evaluate",),
    "recipe": ("Recipe", "Settings", "Step"),
    "spike_type": ("SpikeType",),
    "streaming": ("Stream",),
    "training.config": ("TrainingConfig",),
    "training.run": ("Finetuned", "finetune"),
}  # fmt: skip
_LAZY = {name: (f"ntc.{module}", name) for module, names in _HOMES.items() for name in names}
_LAZY["compile"] = ("ntc.compiler", "compile_model")

if not TYPE_CHECKING:  # else a type checker would take any name for granted

    def __getattr__(name: str) -> object:
        if name not in _LAZY:
            raise AttributeError(f"module 'ntc' has no attribute {name!r}")
        module, attribute = _LAZY[name]
        value = getattr(import_module(module), attribute)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
