"""``ntc verify``: whether the artefacts of a compiled folder fire the same spikes as its program."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ntc.cli.options import CompiledFolder
from ntc.cli.output import JsonFlag, Output, VerboseFlag, count, duration, names, percent, session, table
from ntc.cli.tables import heading
from ntc.cli.texts import tokens_for
from ntc.errors import ArtifactError

__all__ = ["add_to"]

_TOKENS = 2048
_COLORS = {"exact": "green", "approximate": "yellow", "unsupported": "dim", "differs": "red"}


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(
        "verify",
        epilog="Examples:\n\n"
        "ntc verify build/demo\n\n"
        "ntc verify build/demo --tokens 10000 --targets onnx,netlist --data examples/data/books-sample.txt --json\n\n"
        "Exit code: 0 if no target does worse than a program of that grade promises, 1 if one does, 2 for bad input.",
    )(verify)


def verify(
    folder: CompiledFolder,
    tokens: Annotated[int, typer.Option(min=2, help="Run on so many tokens.")] = _TOKENS,
    data: Annotated[Path | None, typer.Option(help="Text to run on (default: the model's calibration.txt).")] = None,
    targets: Annotated[list[str] | None, typer.Option(help="Which artefacts, separated by commas (default: all).")] = None,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Run the program and its artefacts on the same tokens and compare every spike and every logit.

    What the folder does not have is exported into a temporary folder first. The result is written into the manifest, too.
    """
    with session(as_json, verbose) as output:
        result = _verify(output, folder, data, tokens, names(targets) or None)
        output.result(result, lambda console: _show(console, result, each=verbose > 0))
    if not result["agrees"]:
        raise typer.Exit(1)


def _verify(output: Output, folder: Path, data: Path | None, wanted: int, targets: list[str] | None) -> dict[str, Any]:
    from ntc import artifact
    from ntc.proof import KEY, prove

    started = time.perf_counter()
    with output.progress() as report:
        report("load", 0, 1)
        program = artifact.load(folder)
        tokens = tokens_for(output, folder, program, data, wanted, "spikes are compared on random tokens")
        found = prove(folder, tokens, targets=targets, program=program, progress=report)
    if tokens.count < wanted - tokens.windows.shape[1]:
        output.warn(f"the text has {tokens.count:,} tokens and not {wanted:,}: give a longer one with --data FILE")
    try:
        artifact.annotate(folder, KEY, found)
    except ArtifactError as error:
        output.warn(f"the result is not in the manifest: {error}")
    return {"folder": str(folder), **found, "seconds": time.perf_counter() - started}


def _show(console: Console, result: dict[str, Any], each: bool) -> None:
    found = result["targets"]
    console.print(
        Text(result["folder"], "bold").append(
            f"  {result['grade']} program, T = {result['steps']}, {count(result['neurons'])} neurons; {result['data']}; "
            f"{duration(result['seconds'])}", "not bold dim",
        )
    )  # fmt: skip
    _show_targets(console, found, result["grade"])
    _show_layers(console, found)
    _show_first(console, found)
    _show_left(console, found, each)
    console.print()
    sentence = "No target does worse than the grade of the program promises." if result["agrees"] else "Not all targets agree."
    if not any(row["verdict"] != "unsupported" for row in found.values()):
        sentence = "Nothing could be compared."
    console.print(Text(sentence, "green" if result["agrees"] else "red"))


def _show_targets(console: Console, found: dict[str, Any], grade: str) -> None:
    heading(console, "Targets", "against the program; given equal spikes: what reads a population is held to the program's")
    floating = grade == "float"
    held = (">given equal spikes", ">max |Δ logit|") if floating else ()
    rows = table("target", "verdict", ">spikes differ", ">of", ">max |Δ logit|", *held, ">neurons", "runs in")
    for name, row in found.items():
        verdict = Text(row["verdict"], _COLORS[row["verdict"]])
        if row["verdict"] == "unsupported":
            rows.add_row(name, verdict)
            continue
        more = (count(row["held"]["spike_mismatches"]), _number(row["held"]["max_logit_diff"])) if floating else ()
        written = ", exported for this" if row["artefact"] == "temporary" else ""
        rows.add_row(
            name, verdict, count(row["spike_mismatches"]), count(row["compared"]), _number(row["max_logit_diff"]), *more,
            percent(row["coverage"]["share"]), row["runs_in"] + written,
        )  # fmt: skip
    console.print(rows)
    for name, row in found.items():
        console.print(Text(name, "bold").append(f"  {row['reason']}", "not bold"))


def _show_layers(console: Console, found: dict[str, Any]) -> None:
    """Populations as rows, targets as columns."""
    shown = {name: row for name, row in found.items() if any(layer["compared"] for layer in row["layers"])}
    if not shown:
        return
    by_node = {name: {layer["node"]: layer for layer in row["layers"]} for name, row in shown.items()}
    heading(console, "Spikes that differ", "counts: steps are not visible there" if _counted(shown) else "")
    rows = table("population", "module", ">neurons", ">spikes", *(f">{name}" for name in shown))
    for node, layer in next(iter(by_node.values())).items():
        spikes = max(layers[node]["spikes"] for layers in by_node.values())
        cells = [_cell(layers[node]) for layers in by_node.values()]
        rows.add_row(f"%{node}", layer["module"], count(layer["neurons"]), count(spikes), *cells)
    console.print(rows)


def _counted(found: dict[str, Any]) -> bool:
    return any(layer["by"] == "counts" for row in found.values() for layer in row["layers"])


def _cell(layer: dict[str, Any]) -> Text:
    if layer["by"] == "nothing":
        return Text("-", "dim")
    number = layer["spike_mismatches"] or layer["held_mismatches"]
    return Text(count(number) + (" counts" if layer["by"] == "counts" else ""), "red" if number else "green")


def _show_first(console: Console, found: dict[str, Any]) -> None:
    """Where it begins, and how far from the thresholds that was."""
    differing = [(name, layer) for name, row in found.items() for layer in row["layers"] if layer["first"] or layer["held_mismatches"]]
    if not differing:
        return
    heading(console, "Where they differ first", "positions, steps and neurons from 0; distance and rounding as a share of the threshold")
    rows = table(
        "target", "population", ">sequence", ">token", ">step", ">neuron", ">given equal spikes", ">ties", ">distance", ">rounding reaches"
    )  # fmt: skip
    for name, layer in differing:
        first = layer["first"] or dict.fromkeys(("sequence", "position", "step", "neuron"))
        at = ["-" if first[key] is None else str(first[key]) for key in ("sequence", "position", "step", "neuron")]
        held = count(layer["held_mismatches"]), count(layer["ties"]), _number(layer["margin"]), _number(layer["margin_limit"])
        rows.add_row(name, f"%{layer['node']}", *at, *held)
    console.print(rows)


def _show_left(console: Console, found: dict[str, Any], each: bool) -> None:
    """Nodes that a target does not have."""
    for name, row in found.items():
        if not row["unsupported"]:
            continue
        heading(console, f"Not in {name}", f"{len(row['unsupported'])} nodes of the program")
        groups: dict[str, list[str]] = {}
        for left in row["unsupported"]:
            groups.setdefault(left["reason"], []).append(f"%{left['node']}")
        rows = table(">nodes", "such as", "why")
        for reason, nodes in groups.items():
            rows.add_row(count(len(nodes)), ", ".join(nodes if each else nodes[:2]), reason)
        console.print(rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"
