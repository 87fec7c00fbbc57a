"""The netlist back end: a spiking program as ``netlist.json`` and ``netlist.safetensors``, for chip mappers and simulators.

The format is described by ``netlist_schema`` and in ``docs/netlist.md``. The files hold no time and no absolute path: the same
program gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PureWindowsPath
from typing import Any

from torch import Tensor

from ntc.errors import ArtifactError
from ntc.meta import TYPE
from ntc.ops import timed
from ntc.program import Program
from ntc_backends import netlist_schema as schema
from ntc_backends.netlist_blob import tensor_table, write_blob
from ntc_backends.netlist_check import check_graph, check_shapes
from ntc_backends.netlist_lower import lower, refusal_of
from ntc_backends.netlist_makers import Lowered
from ntc_backends.netlist_reader import JSON_NAME, load_netlist, to_networkx

__all__ = ["NetlistBackend", "load_netlist", "netlist_text", "to_networkx"]

BLOB_NAME = "netlist.safetensors"


class NetlistBackend:
    """Writes the netlist of a spiking program."""

    name = "netlist"
    files = (JSON_NAME, BLOB_NAME)
    summary = "populations, synapses and host islands as JSON with safetensors, for neuromorphic chips"

    def refusal(self, facts: frozenset[str]) -> str:
        """Why no program of those facts has a netlist, or an empty string."""
        return refusal_of(facts)

    def emit(self, program: Program, folder: Path, *, analog: Program | None = None, tokens: Tensor | None = None) -> dict[str, Any]:
        """Write ``netlist.json`` and ``netlist.safetensors``.

        Args:
            program: The spiking program.
            folder: An existing folder.
            analog: Not used.
            tokens: Not used: the netlist is checked for structure here, and run by a simulator.

        Returns:
            Counts per token (``neurons``, ``synapses``, ...), and size and SHA-256 of the files.

        Raises:
            BackendError: If the program is not spiking or holds what the format cannot express.
            ArtifactError: If the folder cannot be written.
        """
        folder = Path(folder)
        lowered = lower(program)
        table = tensor_table(lowered.tensors)
        # The tensors first: a netlist that is there always finds them.
        with _beside(folder / BLOB_NAME) as (partial, finish):
            blob = write_blob(partial, BLOB_NAME, lowered.tensors, table)
            netlist = _netlist(program, lowered, table, blob)
            check_graph(netlist)
            check_shapes(netlist)
            finish()
        text = netlist_text(netlist).encode()
        with _beside(folder / JSON_NAME) as (partial, finish):
            partial.write_bytes(text)
            finish()
        counts = {
            "populations": len(netlist.populations),
            "neurons": sum(p.size for p in netlist.populations),
            "projections": len(netlist.projections),
            "synapses": sum(p.synapses for p in netlist.projections),
            "dynamic_products": len(netlist.dynamic_products),
            "host_islands": len(netlist.host),
            "host_ops": sum(len(island.ops) for island in netlist.host),
        }
        said = ", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in counts.items())
        return {
            "summary": f"{said}; structure checked, not run",
            **counts,
            "bytes": {JSON_NAME: len(text), BLOB_NAME: blob.bytes},
            "sha256": {JSON_NAME: hashlib.sha256(text).hexdigest(), BLOB_NAME: blob.sha256},
        }


def netlist_text(netlist: schema.Netlist) -> str:
    """The JSON text: fields in the order of the schema, indented by one, no NaN."""
    return json.dumps(netlist.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _netlist(program: Program, lowered: Lowered, table: dict[str, schema.TensorEntry], blob: schema.Blob) -> schema.Netlist:
    by_kind: dict[type, list[Any]] = {}
    for element in lowered.elements:
        by_kind.setdefault(type(element), []).append(element)
    info = program.info
    source = next(n for n in program.graph.nodes if n.op == "placeholder")
    logits = program.results[0]
    names = {source.name, *(e.name for e in lowered.elements)}
    populations: list[schema.Population] = by_kind[schema.Population]
    resets = {p.reset for p in populations}
    codes = sorted({given.code for n in program.graph.nodes if timed(given := n.meta.get(TYPE))})
    return schema.Netlist(
        format="ntc-netlist",
        schema_version=schema.SCHEMA_VERSION,
        generator=schema.Generator(name="ntc", version=_version()),
        model=schema.Model(
            source=_portable(info.source), architecture=info.architecture, vocab_size=info.vocab_size, context=info.context,
            parameters=info.parameters,
        ),
        history=[schema.PassName(name=record.name, sites=record.sites) for record in program.history],
        time=schema.Time(steps=program.steps, dt="step"),
        conventions=schema.Conventions(
            comparison=">=", reset=resets.pop() if len(resets) == 1 else "mixed", codes=codes,
            rounding="integer" if any(p.start is not None for p in populations) else "float",
            weight_dtypes=sorted({table[p.weight].dtype for p in by_kind.get(schema.Projection, [])}), layout="T,B,L,C",
        ),
        input=schema.Source(name=source.name, ids=schema.Port(kind="index", dtype="int64", shape=["B", "L"])),
        output=schema.Sink(name="logits" if "logits" not in names else "logits_output", logits=lowered.endpoints[logits.name]),
        order=[e.name for e in lowered.elements],
        populations=populations,
        projections=by_kind.get(schema.Projection, []),
        dynamic_products=by_kind.get(schema.DynamicProduct, []),
        scales=by_kind.get(schema.Scale, []),
        decodes=by_kind.get(schema.Decode, []),
        host=by_kind.get(schema.HostIsland, []),
        tensors=table,
        blob=blob,
    )  # fmt: skip


def _portable(source: str) -> str:
    """A model's name without the path to it on this machine."""
    absolute = Path(source).is_absolute() or PureWindowsPath(source).is_absolute() or source.startswith("~")
    return PureWindowsPath(source).name if absolute else source  # takes both kinds of slashes


def _version() -> str:
    try:
        return version("ntc-compiler")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


@contextmanager
def _beside(path: Path) -> Iterator[tuple[Path, Any]]:
    """A file next to ``path`` to write to, and the call that puts it in place; without that call nothing is left."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial, lambda: os.replace(partial, path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
