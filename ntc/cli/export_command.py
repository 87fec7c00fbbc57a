"""``ntc export``: more artefacts of a compiled program."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ntc.cli.options import CompiledFolder, EmitOptions, EmittingCommand, backend_options
from ntc.cli.output import JsonFlag, VerboseFlag, data_size, duration, names, session, table
from ntc.cli.tables import show_targets
from ntc.cli.texts import tokens_for

__all__ = ["add_to"]

_TOKENS = 512


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(
        "export",
        cls=EmittingCommand,
        epilog="Examples:\n\n"
        "ntc export build/demo --emit onnx,netlist\n\n"
        "ntc export build/demo --emit nir --nir-reset annotate --nir-compat 1.0.4\n\n"
        "ntc export build/demo --emit energy --data examples/data/books-sample.txt --json",
    )(export)


def export(
    folder: CompiledFolder,
    emit: Annotated[list[str], typer.Option(help="What to write: names that ntc backends lists, with commas.", show_default=False)],
    emit_set: EmitOptions = None,
    data: Annotated[Path | None, typer.Option(help="Text to check and measure on (default: the model's calibration.txt).")] = None,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Add artefacts to a compiled folder; those that are there already are written anew."""
    from ntc import artifact
    from ntc.compiler import export as export_to
    from ntc.registry import backend

    with session(as_json, verbose) as output:
        started = time.perf_counter()
        wanted = names(emit)
        options = backend_options(emit_set, wanted)
        files = [f for name in wanted for f in backend(name, options.get(name)).files]  # an unknown name costs no time
        with output.progress() as report:
            report("load", 0, 1)
            tokens = tokens_for(output, folder, artifact.load(folder), data, _TOKENS, "files are checked and measured on random tokens")
            targets = export_to(folder, wanted, emit_options=options, tokens=tokens.windows[:2], progress=report)
        written = [{"name": f, "bytes": (folder / f).stat().st_size} for f in files if (folder / f).is_file()]
        result: dict[str, Any] = {
            "folder": str(folder), "targets": targets, "files": written, "data": tokens.description,
            "seconds": time.perf_counter() - started,
        }  # fmt: skip
        output.result(result, lambda console: _show(console, result))


def _show(console: Console, result: dict[str, Any]) -> None:
    rows = table("file", ">size")
    for f in result["files"]:
        rows.add_row(f["name"], data_size(f["bytes"]))
    console.print(Text(f"Exported to {result['folder']} in {duration(result['seconds'])}"))
    console.print(rows)
    show_targets(console, result["targets"])
