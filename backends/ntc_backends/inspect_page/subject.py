"""What is inspected: a compiled folder, or a netlist alone. Both are seen as the elements of a netlist with their constants.

A compiled folder needs no ``netlist.json``: its program is lowered here, in the way in which the netlist back end does it, so that
names on the page are those of the netlist.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ntc.errors import ArtifactError, BackendError
from ntc.folders import is_artifact
from ntc_backends import netlist_schema as schema
from ntc_backends.netlist_reader import open_netlist

if TYPE_CHECKING:
    from ntc.program import Program

__all__ = ["Array", "Subject", "open_subject"]

Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class Subject:
    """A spiking network to look at.

    Attributes:
        path: As the user gave it.
        model: ``source``, ``architecture``, ``vocab_size``, ``context``, ``parameters``.
        steps: T, the largest number of time steps.
        codes: Spike codes in use.
        rounding: ``float``, or ``integer`` for the integer grade.
        elements: In an order in which they can run.
        input: Name of the source of token ids.
        logits: Endpoint of the logits.
        shapes: Shape of each constant by name.
        read: A constant by name, as a numpy array.
        passes: ``name`` and ``sites``, and of a compiled folder also options, misses, drift and notes.
        manifest: Of a compiled folder; empty for a netlist.
        files: SHA-256 of each file that the manifest or the netlist states.
        program: Of a compiled folder; None for a netlist.
    """

    path: Path
    model: Mapping[str, Any]
    steps: int
    codes: tuple[str, ...]
    rounding: str
    elements: tuple[schema.AnyElement, ...]
    input: str
    logits: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Array]
    passes: tuple[Mapping[str, Any], ...]
    manifest: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    program: Program | None = None

    def of_kind(self, kind: type) -> list[Any]:
        """The elements of one kind, in order."""
        return [e for e in self.elements if isinstance(e, kind)]

    @property
    def populations(self) -> list[schema.Population]:
        """The neurons."""
        return self.of_kind(schema.Population)

    def number(self, value: schema.Number | schema.Integer | None) -> Array | None:
        """A parameter of neurons as an array: one number, or one per neuron."""
        if value is None:
            return None
        return np.asarray(self.read(value.tensor) if isinstance(value, schema.TensorRef) else value).reshape(-1)

    def size_of(self, tensors: set[str]) -> int:
        """Numbers in some constants."""
        return sum(int(np.prod(self.shapes[name], dtype=np.int64)) for name in tensors)


def open_subject(path: Path) -> Subject:
    """Read what is to be inspected.

    Raises:
        ArtifactError: If it is neither a compiled folder nor a netlist, or is damaged.
        BackendError: If the program of the folder does not spike, or has neurons that netlists have no element for.
    """
    if path.is_dir() and is_artifact(path):
        return _from_folder(path)
    if path.is_dir() and not (path / "netlist.json").is_file():
        raise ArtifactError(f"{path} holds neither a compiled program nor a netlist: give a folder of ntc compile, or netlist.json")
    return _from_netlist(path)


def _from_folder(folder: Path) -> Subject:
    from ntc import artifact
    from ntc.meta import TYPE
    from ntc.ops import timed
    from ntc_backends.netlist_lower import lower, refusal_of

    program, manifest = artifact.load(folder), artifact.read_manifest(folder)
    if reason := refusal_of(program.facts):
        raise BackendError(f"{folder} cannot be drawn, because the page shows what a netlist holds: {reason}")
    lowered = lower(program)
    types = [node.meta.get(TYPE) for node in program.graph.nodes]
    populations = [e for e in lowered.elements if isinstance(e, schema.Population)]
    info = program.info
    tensors = lowered.tensors
    return Subject(
        path=folder,
        model={key: getattr(info, key) for key in ("source", "architecture", "vocab_size", "context", "parameters")},
        steps=program.steps,
        codes=tuple(sorted({t.code for t in types if timed(t)})),
        rounding="integer" if any(p.start is not None for p in populations) else "float",
        elements=tuple(lowered.elements),
        input=next(n for n in program.graph.nodes if n.op == "placeholder").name,
        logits=lowered.endpoints[program.results[0].name],
        shapes={name: tuple(t.shape) for name, t in tensors.items()},
        read=lambda name: tensors[name].detach().double().numpy() if tensors[name].is_floating_point() else tensors[name].numpy(),
        passes=tuple(manifest["history"]),
        manifest=manifest,
        files=manifest.get("files", {}),
        program=program,
    )


def _from_netlist(path: Path) -> Subject:
    netlist, file = open_netlist(path)
    elements = {e.name: e for e in netlist.elements()}
    return Subject(
        path=path,
        model=netlist.model.model_dump(),
        steps=netlist.time.steps,
        codes=tuple(netlist.conventions.codes),
        rounding=netlist.conventions.rounding,
        elements=tuple(elements[name] for name in netlist.order),
        input=netlist.input.name,
        logits=netlist.output.logits,
        shapes={name: tuple(entry.shape) for name, entry in netlist.tensors.items()},
        read=file.read,
        passes=tuple(record.model_dump() for record in netlist.history),
        manifest={"versions": {"ntc-compiler": netlist.generator.version}},
        files={netlist.blob.file: netlist.blob.sha256},
    )
