"""The NIR back end: what NIR can say of a spiking program, as NIR files, and an index of the whole.

The network is cut where NIR has no words (norms, products of two signals, the end of a token); each piece between two cuts is one file.
``nir/index.json`` says how they connect and how faithful each node is: see ``nir_index`` and ``docs/nir.md``. How neurons are said:
``nir_neurons``. After writing, the files are read back, run on the inputs that they have in the program (``nir_execute``), and compared.
"""

from __future__ import annotations

import shutil
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
from torch import Tensor
from torch.fx import Node

from ntc.errors import ArtifactError, BackendError
from ntc.meta import NEURON, TYPE, block_of, module_of
from ntc.ops import spec_of, timed
from ntc.program import Program, op_name
from ntc.spike_type import SpikeType
from ntc_backends import nir_index as schema
from ntc_backends.nir_check import compare
from ntc_backends.nir_execute import run_file
from ntc_backends.nir_neurons import Array, arguments, full, neuron_of
from ntc_backends.nir_options import NirOptions, require_nir
from ntc_backends.nir_parts import NO_NEURONS, Part, Plan, plan

__all__ = ["NirBackend"]

_STATE = "NIR has no state that goes on from token to token: export the parallel program, without to-streaming"


class NirBackend:
    """Writes NIR files and their index."""

    name = "nir"
    files = (schema.INDEX,)
    summary = "NIR files of the layers and neurons, with an index of how they connect and how faithful they are"
    Options = NirOptions

    def __init__(self, options: NirOptions | None = None) -> None:
        require_nir()
        self.options = options or NirOptions()

    def refusal(self, facts: frozenset[str]) -> str:
        """Why no program of those facts has NIR files, or an empty string."""
        if "streaming" in facts:
            return _STATE
        if "neurons-annotated" in facts:
            return "NIR holds neurons, and there are firing rates in their places: run insert-neurons first"
        return NO_NEURONS if "coded" in facts and "integrate-fire" not in facts else ""  # beside others, coded ones have no file

    def emit(self, program: Program, folder: Path, *, analog: Program | None = None, tokens: Tensor | None = None) -> dict[str, Any]:
        """Write the folder ``nir``; an older one is replaced.

        Args:
            program: The spiking program.
            folder: An existing folder.
            analog: Not used.
            tokens: Token ids ``[B, L]`` to compare on; ``program.example`` if there are none.

        Returns:
            Counts of files, nodes by fidelity and spikes that differ.

        Raises:
            BackendError: If the program is not spiking or has a state, or a file that should be exact is not.
            ArtifactError: If the folder cannot be written.
        """
        if program.state:
            raise BackendError(_STATE)
        work, target = Path(folder) / f".{schema.FOLDER}.partial", Path(folder) / schema.FOLDER
        try:
            work.mkdir()
            index, left = self._write(program, work, program.example if tokens is None else tokens)
            (work / Path(schema.INDEX).name).write_text(index.text(), encoding="utf-8")
            shutil.rmtree(target, ignore_errors=True)
            work.rename(target)
        except OSError as error:
            raise ArtifactError(f"cannot write {target}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return self._said(index, left)

    def _write(self, program: Program, work: Path, ids: Tensor) -> tuple[schema.NirIndex, list[str]]:
        """The index, and the populations that no file holds."""
        from ntc_backends.nir_files import read_file, write_file
        from ntc_backends.nir_graph import draw

        planned = plan(program, self.options)
        entries: dict[str, schema.FileEntry] = {}
        made: dict[str, list[str]] = {}
        for part in planned.parts:
            drawn = draw(program, part, self.options)
            path = work / f"{part.name}.nir"
            digest = write_file(path, drawn.graph({"index": Path(schema.INDEX).name, "part": part.name}), self.options.compat)
            entries[part.name] = self._entry(program, part, drawn, path, digest)
            made |= drawn.made

        def run(part: Part, value: Array, reading: Any) -> dict[str, Array]:
            entry = entries[part.name]
            return run_file(entry, *read_file(work / entry.file), value, reading)

        def exact(node: Node, reading: str) -> bool:
            return planned.verdicts[node].fidelity == "exact" and (reading == "definition" or not neuron_of(program, node).hard)

        readings = ("definition", "subtract") if self.options.reset == "annotate" and not self.options.subtracts else ("definition",)
        measured = compare(program, planned.parts, ids, run, readings, exact)
        files = [entry.model_copy(update={"measured": measured[name]}) for name, entry in entries.items()]
        kinds = {node: spec.element for node in planned.verdicts if (spec := spec_of(node)) is not None}
        left = [n.name for n, verdict in planned.verdicts.items() if kinds.get(n) == "population" and verdict.fidelity == "unsupported"]
        return self._index(program, planned, files, made), left

    def _entry(self, program: Program, part: Part, drawn: Any, path: Path, digest: str) -> schema.FileEntry:
        start = drawn.start
        return schema.FileEntry(
            name=part.name, file=path.name, sha256=digest, bytes=path.stat().st_size, block=block_of(part.nodes[0]),
            steps=_steps(part), dtype=np.dtype(part.dtype).name,
            input=schema.InputPort(
                port="input", value=part.source.name, channels=drawn.channels, held=part.held, start=part.start,
                start_current=None if start is None else _number(start) or [float(v) for v in start],
            ),
            outputs=[
                schema.OutputPort(
                    port=drawn.ports[n.name], value=n.name, channels=int(n.meta["val"].shape[-1]),
                    kind="spikes" if isinstance(n.meta[TYPE], SpikeType) else "current", code=n.meta[TYPE].code,
                    used_by=[u.name for u in n.users if u not in part.nodes],
                )
                for n in part.outputs
            ],
            populations=[_population(program, part, n, drawn.exits[n.name]) for n in part.populations],
            measured=[],
        )  # fmt: skip

    def _index(self, program: Program, planned: Plan, files: list[schema.FileEntry], made: dict[str, list[str]]) -> schema.NirIndex:
        file_of = {node: part.name for part in planned.parts for node in part.nodes}
        sources = [n.name for n in program.graph.nodes if n.op == "placeholder"]
        return schema.NirIndex(
            format="ntc-nir", schema_version=schema.SCHEMA_VERSION, generator=f"ntc {_version()}", model=_portable(program.info.source),
            nir_version=self.options.compat, steps=program.steps,
            conventions=schema.Conventions(
                dt=1.0, comparison=">", program_comparison=">=", reset=self.options.reset,
                bias="a bias acts at every step, as a constant current",
                state="every token is a run from empty state: integrators begin at 0, also those with v_leak, and loops carry 0",
                loop="an integrator gives its state after the input of the same step; what its own output causes arrives at the next step",
                exact="the same function of the inputs as in the program; floating-point sums in another order can move a membrane that "
                "is within rounding of its threshold, and a spike then comes a step earlier or later",
            ),
            sources=sources, results=[node.name for node in program.results], files=files,
            nodes=[
                schema.NodeEntry(
                    name=node.name, op=op_name(node.target), module=module_of(node),
                    reads=[a.name for a in node.all_input_nodes if a.op != "get_attr"], file=file_of.get(node),
                    parts=made.get(node.name, []), fidelity=verdict.fidelity, reason=verdict.reason,
                )
                for node, verdict in planned.verdicts.items()
            ],
        )  # fmt: skip

    def _said(self, index: schema.NirIndex, left: list[str]) -> dict[str, Any]:
        fidelity = Counter(node.fidelity for node in index.nodes if node.file is not None)
        spiking = sum(p.size for f in index.files for p in f.populations)
        first = [f.measured[0] for f in index.files if f.measured]
        events, differing = sum(m.events for m in first), sum(m.differing for m in first)
        by_rounding = sum(m.by_rounding for m in first)
        words = f"{len(index.files)} files, {fidelity['exact']} nodes exact, {fidelity['approximate']} approximate"
        if left:
            words += f", {len(left)} populations not said (such as {left[0]})"
        words += f"; {differing:,} of {events:,} spikes differ" + (f", {by_rounding:,} by rounding" if by_rounding else "")
        return {
            "summary": words, "reset": self.options.reset, "compat": self.options.compat, "nir_files": len(index.files), "neurons": spiking,
            "exact": fidelity["exact"], "approximate": fidelity["approximate"], "populations_not_said": left,
            "events": events, "differing": differing, "by_rounding": by_rounding, "tokens": max((m.tokens for m in first), default=0),
        }  # fmt: skip


def _population(program: Program, part: Part, node: Node, spikes: str) -> schema.PopulationEntry:
    neuron, spec = neuron_of(program, node), node.meta.get(NEURON)
    v0 = None if neuron.integer else _number(full(program, arguments(node)["v0"], neuron.size))
    return schema.PopulationEntry(
        name=node.name, model="if" if neuron.tau is None else "lif", form=part.forms[node], size=neuron.size,
        role=spec.role if spec else "", signed=neuron.signed, reset="hard" if neuron.hard else "soft", threshold=_number(neuron.threshold),
        start=_number(neuron.start), v0=v0, arithmetic="integer" if neuron.integer else "float",
        tau=None if neuron.tau is None else _number(neuron.tau), spikes=spikes,
    )  # fmt: skip


def _steps(part: Part) -> int:
    kinds = [n.meta[TYPE] for n in (part.source, *part.nodes)]
    return int(next(kind.steps for kind in kinds if timed(kind)))


def _number(values: Array) -> float | None:
    """The one value that all elements have, or None."""
    return float(values[0]) if bool((values == values[0]).all()) else None


def _portable(source: str) -> str:
    """A model's name without the path to it on this machine."""
    absolute = Path(source).is_absolute() or PureWindowsPath(source).is_absolute() or source.startswith("~")
    return PureWindowsPath(source).name if absolute else source


def _version() -> str:
    try:
        return version("ntc-compiler")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
