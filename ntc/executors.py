"""What runs an artefact of a program, so that it can be compared with the program: entry points ``ntc.executors``.

An executor has the name of the back end whose artefact it runs. It reads nothing but that artefact and the token ids, and gives the
spikes of every population under the name of its node in the program. ``ntc.agreement`` compares.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from ntc.program import Program

__all__ = ["Execution", "Executor"]


@dataclass(frozen=True)
class Execution:
    """What an executor did with some token ids ``[B, L]``.

    Attributes:
        logits: ``[B, L, V]``; None if the artefact does not reach them.
        spikes: Trains ``[T, B, L, C]`` by population.
        counts: Of populations that the artefact runs in closed form, the sums of the trains, ``[B, L, C]``.
        values: Of the nodes in ``Executor.outputs``, in the held run.
    """

    logits: Tensor | None
    spikes: Mapping[str, Tensor]
    counts: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Tensor] = field(default_factory=dict)


class Executor(ABC):
    """Runs one kind of artefact. ``prepare`` sets what is not a constant of the class.

    Attributes:
        name: Of the executor and of the back end.
        free: Whether it runs from token ids to logits. If not, only ``held`` is called.
        about: What runs it, with version.
        files: Files of the artefact that were read.
        inputs: Nodes of the program whose values ``held`` takes beside the trains of the populations.
        outputs: Nodes whose values leave a piece, and whose mistakes would show in no spike and no logit of the held run.
        unsupported: Nodes of the program that the artefact does not have, and why.
        approximate: Populations that the artefact has, as another neuron, by its own account; and why.
        behind: Populations and outputs behind others inside of a piece that ``held`` does not cut, by name: where one of those in front
            fires something else, what these do is a consequence.
    """

    name: ClassVar[str]
    free: ClassVar[bool] = True
    about: str = ""
    files: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    unsupported: tuple[tuple[str, str], ...] = ()
    approximate: tuple[tuple[str, str], ...] = ()
    behind: Mapping[str, tuple[str, ...]] = {}

    @abstractmethod
    def prepare(self, folder: Path, program: Program) -> None:
        """Read the artefact.

        Args:
            folder: A folder with the files of the back end.
            program: The program that it should be; tells names and shapes, and nothing that is computed.

        Raises:
            ArtifactError: If the artefact is damaged.
            DisagreementError: If it does not have what the program has.
            BackendError: If it holds something that this executor cannot run.
            ConfigError: If a package is missing.
        """

    def run(self, ids: Tensor) -> Execution:
        """From token ids to logits, freely.

        Args:
            ids: ``[B, L]``, int64.
        """
        raise NotImplementedError(f"the executor {self.name} runs pieces only")

    @abstractmethod
    def held(self, ids: Tensor, values: Mapping[str, Tensor]) -> Execution:
        """What each population fires if all that read populations are given the program's spikes, so that nothing accumulates.

        Args:
            ids: ``[B, L]``, int64.
            values: The program's trains ``[T, B, L, C]``, int8, of all populations, and its values of the nodes in ``inputs``.
        """
