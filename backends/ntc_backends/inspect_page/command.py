"""``ntc inspect``: a spiking network as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ntc.cli.output import JsonFlag, Output, VerboseFlag, count, data_size, percent, session, table

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(
        "inspect",
        epilog="Examples:\n\n"
        "ntc inspect build/demo -o demo.html\n\n"
        'ntc inspect build/demo --prompt "It was a bright cold day in April" -o demo.html\n\n'
        "ntc inspect build/demo/netlist.json -o structure.html --json",
    )(inspect)


def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="DIR|NETLIST", help="Folder that ntc compile wrote, or a netlist alone.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="PAGE", help="HTML file to write.", show_default=False)],
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Text to run, for spikes and membranes (default: a sentence).")] = None,
    tokens: Annotated[str | None, typer.Option(metavar="IDS", help="Token ids to run instead, such as 1,2,3.")] = None,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Draw a spiking network: data flow, spikes, membranes, rates, drift and widths on one HTML page without a network."""
    with session(as_json, verbose) as output:
        result = _inspect(output, path, out, prompt, tokens)
        output.result(result, lambda console: _show(console, result))


def _inspect(output: Output, path: Path, out: Path, text: str | None, tokens: str | None) -> dict[str, Any]:
    from ntc.folders import check_page, write_page
    from ntc_backends.inspect_page.activity import run
    from ntc_backends.inspect_page.document import MARK, page
    from ntc_backends.inspect_page.prompt import prompt_for
    from ntc_backends.inspect_page.subject import open_subject

    check_page(out, MARK, "ntc inspect", "page.html")
    with output.progress() as report:
        report("load", 0, 1)
        subject = open_subject(path)
        prompt = prompt_for(subject, text, tokens)
        report("run", 0, 1)
        fired = run(subject, prompt.ids) if prompt else {}
        report("draw", 0, 1)
        html = page(subject, prompt, fired)
    write_page(out, html)
    spikes = sum(int(f.counts.sum()) for f in fired.values())
    places = sum(f.element.size * f.most for f in fired.values())
    return {
        "page": str(out), "bytes": len(html.encode()), "source": str(path), "kind": "netlist" if subject.program is None else "folder",
        "prompt": prompt.description if prompt else None, "tokens": len(prompt.ids) if prompt else 0, "steps": subject.steps,
        "populations": len(subject.populations), "neurons": sum(p.size for p in subject.populations),
        "neurons_shown": sum(len(f.rows) for f in fired.values()), "membranes_shown": sum(len(f.traces) for f in fired.values()),
        "spikes": spikes if fired else None, "firing_rate": spikes / places if fired else None,
        "dead": sum(f.dead for f in fired.values()) if fired else None,
        "saturated": sum(f.saturated for f in fired.values()) if fired else None,
    }  # fmt: skip


def _show(console: Console, result: dict[str, Any]) -> None:
    console.print(Text("Wrote ").append(result["page"], "bold").append(f"  {data_size(result['bytes'])}", "dim"))
    rows = table("", ">")
    rows.add_row("populations", count(result["populations"]))
    rows.add_row("neurons", count(result["neurons"]))
    if result["firing_rate"] is not None:
        rows.add_row("tokens run", count(result["tokens"]))
        rows.add_row("spikes", count(result["spikes"]))
        rows.add_row("firing rate", percent(result["firing_rate"]))
        rows.add_row("dead, saturated neurons", f"{count(result['dead'])}, {count(result['saturated'])}")
    console.print(rows)
