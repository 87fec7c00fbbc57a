"""``ntc energy``: operations and energy of a compiled program against the network that it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ntc.cli.options import CompiledFolder
from ntc.cli.output import JsonFlag, Output, VerboseFlag, count, percent, session, table
from ntc.cli.tables import heading, show_attention, unit_for
from ntc.cli.texts import tokens_for
from ntc.errors import ArtifactError

__all__ = ["add_to"]

_MAX_TOKENS = 2048


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(
        "energy",
        epilog="Examples:\n\n"
        "ntc energy build/demo --data examples/data/books-sample.txt\n\n"
        "ntc energy build/demo --constants my_process.toml --json",
    )(energy)


def energy(
    folder: CompiledFolder,
    data: Annotated[Path | None, typer.Option(help="Text to measure firing rates on (default: the model's calibration.txt).")] = None,
    max_tokens: Annotated[int, typer.Option(help="Read only so many tokens.")] = _MAX_TOKENS,
    constants: Annotated[Path | None, typer.Option(help="TOML file with energies per operation (default: 45 nm, fp32).")] = None,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Count operations and energy per token, with the firing rates that the program really has."""
    with session(as_json, verbose) as output:
        result = _energy(output, folder, data, max_tokens, constants)
        output.result(result, lambda console: _show(console, result))


def _energy(output: Output, folder: Path, data: Path | None, max_tokens: int, constants: Path | None) -> dict[str, Any]:
    from ntc import artifact
    from ntc.energy import load_constants, measure_energy

    numbers = load_constants(constants)
    with output.progress() as report:
        report("load", 0, 1)
        program, analog = artifact.load(folder), artifact.load_analog(folder)
        if analog is None:
            raise ArtifactError(f"{folder} has no analog.json, which energy is compared with; compile again")
        tokens = tokens_for(output, folder, program, data, max_tokens, "firing rates are those of random tokens")
        report("energy", 0, len(tokens.windows))
        measured = measure_energy(program, analog, tokens, numbers, progress=lambda done, total: report("energy", done, total))
    return {"folder": str(folder), **measured.to_json()}


def _show(console: Console, result: dict[str, Any]) -> None:
    constants = result["constants"]
    console.print(
        Text(result["folder"], "bold").append(f"  T = {result['steps']}, rates of {result['data']}", "not bold dim")
    )  # fmt: skip
    show_attention(console, result["attention"], result["total"], f"per token, {constants['title']}")
    _show_groups(console, "By kind of operation", "kind", result["kinds"])
    _show_groups(console, "By block", "block", result["blocks"])
    _show_operations(console, result["total"])
    rows = result["uncounted"]
    if rows:
        heading(console, "Not counted", f"{percent(result['uncounted_share'])} of the dense multiply-accumulates")
        listed = table("side", "node", "op", "module")
        for row in rows:
            listed.add_row(row["side"], f"%{row['node']}", row["op"], row["module"])
        console.print(listed)
    console.print()
    console.print(Text(f"{constants['scope']} Source: {constants['source']}", "dim"))


def _show_groups(console: Console, title: str, key: str, groups: list[dict[str, Any]]) -> None:
    shown = [g for g in groups if g["ann_pj"] or g["snn_pj"]]
    unit, size = unit_for(max((max(g["ann_pj"], g["snn_pj"]) for g in shown), default=0.0))
    heading(console, title, f"{unit} per token")
    rows = table(key, ">network", ">spiking", ">saved")
    for g in shown:
        saved = 1 - g["snn_pj"] / g["ann_pj"] if g["ann_pj"] else None
        style = "" if saved is None else "green" if saved > 0 else "red" if saved < 0 else ""
        rows.add_row(g[key], f"{g['ann_pj'] / size:,.3f}", f"{g['snn_pj'] / size:,.3f}", Text(percent(saved), style))
    console.print(rows)


def _show_operations(console: Console, total: dict[str, Any]) -> None:
    heading(console, "Operations", "per token")
    rows = table("operation", ">network", ">spiking")
    for key, label in (
        ("dense_macs", "multiply-accumulates if dense"), ("macs", "multiply-accumulates"), ("acs", "accumulates by spikes"),
        ("graded_macs", "graded multiply-accumulates"), ("neuron_updates", "membrane updates"),
        ("elementwise", "elementwise (not costed)"), ("spikes", "spikes"),
    ):  # fmt: skip
        rows.add_row(label, count(total["ann"][key]), count(total["snn"][key]))
    console.print(rows)
