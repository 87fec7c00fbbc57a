"""``ntc simulate``: run a netlist from its files. Imported for ``ntc --help`` too, so numpy comes in when the command runs."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ntc.cli.output import JsonFlag, Output, VerboseFlag, count, data_size, duration, percent, session, table
from ntc.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from ntc_backends.simulator.piece import Array

__all__ = ["add_to"]

_PATIENCE_SECONDS = 2.0
"""A bar appears when a run takes longer than that."""


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(
        "simulate",
        epilog="Examples:\n\n"
        "ntc simulate build/demo --tokens 5,9,2\n\n"
        "ntc simulate build/demo --data examples/data/books-sample.txt --max-tokens 64 --raster spikes.npz --raster spikes.png\n\n"
        "ntc simulate netlist.json --ids ids.npy --online --logits logits.npy --json",
    )(simulate)


def simulate(
    netlist: Annotated[Path, typer.Argument(help="netlist.json, its folder, or a compiled folder with one.", show_default=False)],
    tokens: Annotated[str | None, typer.Option(metavar="IDS", help="Token ids, such as 5,9,2.")] = None,
    ids: Annotated[Path | None, typer.Option(help="Token ids \\[L] or \\[B, L]: a .npy file or a JSON list.")] = None,
    data: Annotated[Path | None, typer.Option(help="A text, if the folder has a tokenizer.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of the text to use (default: a context full).")] = None,
    online: Annotated[bool, typer.Option("--online", help="Token by token, step by step, event by event, as a chip works.")] = False,
    logits: Annotated[Path | None, typer.Option(help="Write the logits to this .npy file.")] = None,
    raster: Annotated[list[Path] | None, typer.Option(help="Write where and when neurons fired: .npz (arrays), .png (a picture).")] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Compare the SHA-256 of every tensor first.")] = True,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Run a netlist: spikes, firing rates, synaptic operations, membranes and logits, from its files alone."""
    with session(as_json, verbose) as output:
        import numpy as np

        from ntc_backends.simulator.engine import Simulator
        from ntc_backends.simulator.raster import check_raster, write_raster

        if sum(given is not None for given in (tokens, ids, data)) != 1:
            raise ConfigError("a simulation needs token ids: give one of --tokens, --ids and --data")
        rasters = raster or []
        for path in rasters:
            check_raster(path)
        for path in (*rasters, *([logits] if logits else [])):
            if not path.parent.is_dir():
                raise ArtifactError(f"cannot write {path}: there is no folder {path.parent}")
        opened = time.perf_counter()
        simulator = Simulator(netlist, verify_hashes=verify)
        given = _ids(netlist, tokens, ids, data, max_tokens, simulator.netlist.model.context)
        started = time.perf_counter()
        found = _run(output, simulator, given, online, bool(rasters))
        seconds = time.perf_counter() - started
        if logits is not None:
            try:
                with logits.open("wb") as file:
                    np.save(file, found)
            except OSError as error:
                raise ArtifactError(f"cannot write {logits}: {error.strerror or error}") from error
        for path in rasters:
            write_raster(path, simulator.netlist, simulator.counter.rasters or {})
        activity = simulator.activity
        result = {
            "netlist": str(netlist), "order": "online" if online else "whole", **activity,
            "memory_bytes": activity["memory_bytes"] | {"peak": _peak_bytes()},
            "next_token": int(found.reshape(-1, found.shape[-1])[-1].argmax()),
            "seconds": seconds, "load_seconds": started - opened,
            "tokens_per_second": activity["tokens"] / seconds,
            "synaptic_operations_per_second": activity["synaptic_operations"] / seconds,
            "files": [str(path) for path in (*([logits] if logits else []), *rasters)],
        }  # fmt: skip
        output.result(result, lambda console: _show(console, result))


def _ids(netlist: Path, tokens: str | None, ids: Path | None, data: Path | None, most: int | None, context: int) -> Array:
    from ntc_backends.simulator.inputs import ids_from_file, ids_from_list, ids_from_text

    if data is None and most is not None:
        raise ConfigError("--max-tokens goes with --data")
    if tokens is not None:
        return ids_from_list(tokens)
    if ids is not None:
        return ids_from_file(ids)
    assert data is not None
    whole = context or 1024
    return ids_from_text(data, netlist if netlist.is_dir() else netlist.parent, min(most or whole, whole))


def _run(output: Output, simulator: Any, ids: Array, online: bool, rasters: bool) -> Array:
    """The logits; a bar appears if it takes long."""
    started = time.perf_counter()
    with ExitStack() as stack:
        bar: Any = None

        def report(what: str, done: int, total: int) -> None:
            nonlocal bar
            if bar is None and time.perf_counter() - started > _PATIENCE_SECONDS:
                bar = stack.enter_context(output.progress())
            if bar is not None:
                bar(what, done, total)

        found: Array = simulator.run(ids, stepwise=online, rasters=rasters, progress=report)
        return found


def _peak_bytes() -> int:
    """Largest memory of this process so far, as the system counts it."""
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    import sys

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def _show(console: Console, result: dict[str, Any]) -> None:
    rows = table("population", ">neurons", ">spikes", ">rate", ">membrane min", ">max", ">bits")
    for p in result["populations"]:
        ends = [f"{p[key]:.4g}" if isinstance(p[key], float) else str(p[key]) for key in ("membrane_minimum", "membrane_maximum")]
        rows.add_row(p["name"], count(p["neurons"]), count(p["spikes"]), percent(p["rate"]), *ends, str(p["membrane_bits"] or "-"))
    console.print(rows)
    facts = table("", "")
    facts.show_header = False
    memory, speed, load = result["memory_bytes"], count(result["tokens_per_second"]), duration(result["load_seconds"])
    for label, value in (
        ("tokens", f"{count(result['tokens'])}, T = {result['steps']}, {result['grade']} grade, {result['order']}"),
        ("time", f"{duration(result['seconds'])} ({speed} tokens/s), loaded in {load}"),
        ("spikes", f"{count(result['spikes'])} of {count(result['neurons'])} neurons, {percent(result['rate'])} of all steps"),
        ("synaptic operations", f"{count(result['synaptic_operations'])} ({count(result['synaptic_operations_per_second'])}/s)"),
        ("analog products", f"{count(result['macs'])} multiply-accumulates in front of neurons"),
        ("memory", f"weights {data_size(memory['weights'])}, state {data_size(memory['state'])}, process {data_size(memory['peak'])}"),
        ("most likely next token", str(result["next_token"])),
        *(("written", file) for file in result["files"]),
    ):  # fmt: skip
        facts.add_row(Text(label, "dim"), value)
    console.print()
    console.print(facts)
