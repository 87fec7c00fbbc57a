"""``ntc check``: what a recipe would make of a model."""

from __future__ import annotations

import re
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from ntc.cli.options import Model, QuantizeBits, Recipe, SetOptions, SettingsFile, Steps, settings_from
from ntc.cli.output import JsonFlag, VerboseFlag, count, percent, session, table
from ntc.cli.tables import heading, show_widths

__all__ = ["add_to"]

_COLORS = {"spiking": "green", "analog": "cyan", "host": "dim", "unsupported": "red"}


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(
        "check",
        epilog="Examples:\n\n"
        "ntc check examples/gpt2-books\n\n"
        "ntc check my-model --recipe ffn-only --json\n\n"
        "ntc check examples/gpt2-books --quantize 8 --set replace-attention.percentile=97\n\n"
        "Exit code: 0 if every required site can be converted, 1 if not, 2 for bad input.",
    )(check)


def check(
    model: Model,
    recipe: Recipe = "neurtransformer",
    steps: Steps = None,
    settings: SettingsFile = None,
    set_: SetOptions = None,
    quantize: QuantizeBits = None,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Show what becomes spiking, what stays analog or on the host, and what is not supported; writes nothing.

    The recipe is run on random tokens, so the answer is what the passes really do. With -v every node is listed. With
    --quantize also the bits that each membrane, accumulator and memory needs.
    """
    from ntc.check import check_model

    with session(as_json, verbose) as output:
        with output.progress() as report:
            chosen = settings_from(settings, set_, steps, None)
            found = check_model(model, recipe=recipe, settings=chosen, quantize=quantize, progress=report)
        data = found.to_json()
        for warning in found.warnings:
            output.warn(warning)
        output.result(data, lambda console: _show(console, data, each=verbose > 0))
    if not found.ok:
        raise typer.Exit(1)


def _show(console: Console, data: dict[str, Any], each: bool) -> None:
    model = data["model"]
    console.print(
        Text(model["source"], "bold").append(
            f"  {model['architecture']}, {model['parameters'] / 1e6:,.1f} M parameters, recipe {data['recipe']}", "not bold dim"
        )
    )
    if data["nodes"]:
        _show_nodes(console, data, each)
    if data["widths"]:
        show_widths(console, data["widths"], each)
    _show_findings(console, data["findings"])
    console.print()
    if data["ok"]:
        sites = ", ".join(f"{name} {number}" for name, number in data["sites"].items() if name not in ("canonicalize", "calibrate"))
        console.print(Text("Every required site can be converted.", "green").append(f"  Sites: {sites}", "dim"))
    else:
        console.print(Text("Not every required site can be converted.", "red"))


def _show_nodes(console: Console, data: dict[str, Any], each: bool) -> None:
    heading(console, "What becomes of each operation", f"MACs: share of the dense ones, {data['window']} tokens per sequence")
    rows = table("becomes", "where", "operation", ">nodes", ">MACs", "note")
    total = sum(n["dense_macs"] for n in data["nodes"])
    for kind, color in _COLORS.items():
        groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        for n in data["nodes"]:
            if n["becomes"] == kind:
                where = n["module"] if each else re.sub(r"\.\d+(?=\.|$)", ".*", n["module"])
                groups.setdefault((where, n["op"], n["node"] if each else n["reason"]), []).append(n)
        if kind == "host" and not each:  # glue: one line per operation is enough
            merged: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
            for (_, op, reason), nodes in groups.items():
                merged.setdefault(("", op, reason), []).extend(nodes)
            groups = merged
        label = kind
        for (where, op, _), nodes in groups.items():
            macs = sum(n["dense_macs"] for n in nodes)
            share = percent(macs / total) if macs and total else ""
            rows.add_row(Text(label, color), where, op, count(len(nodes)), share, Text(nodes[0]["reason"], "dim"))
            label = ""
    console.print(rows)
    shares = ", ".join(
        f"{kind} {percent(share)}" for kind, share in data["dense_macs_share"].items() if share
    )
    console.print()
    console.print(Text("Dense MACs: ", "bold").append(shares, "not bold"))


def _show_findings(console: Console, findings: list[dict[str, Any]]) -> None:
    if not findings:
        return
    heading(console, "Left alone")
    groups: dict[tuple[str, str, bool], list[dict[str, Any]]] = {}
    for f in findings:
        general = re.sub(r"%\w+", "%...", f["reason"])
        groups.setdefault((f["stage"], general, f["required"]), []).append(f)
    for (stage, _, required), group in groups.items():
        first = group[0]
        more = f" and {len(group) - 1} more" if len(group) > 1 else ""
        label = Text("required  ", "red") if required else Text("optional  ", "dim")
        node = f" %{first['node']}{more}" if first["node"] else ""
        console.print(label.append(f"{stage}{node}: {first['reason']}", "default"))
        if place := ", ".join(filter(None, (first["module"], first["source"]))):
            console.print(Text(" " * 10 + place, "dim"))
