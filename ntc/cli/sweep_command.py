"""``ntc sweep``: quality against energy over settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ntc.cli.options import Model, SetOptions, SettingsFile, named_values, settings_from
from ntc.cli.output import JsonFlag, VerboseFlag, count, energy, names, percent, session, table
from ntc.cli.tables import heading

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ntc.sweep import Setting

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(
        "sweep",
        epilog="Examples:\n\n"
        "ntc sweep examples/gpt2-books --data held-out.txt --steps 1,2,4,8 -o build/sweep\n\n"
        "ntc sweep examples/gpt2-books --data held-out.txt --steps 2,4 --vary replace-attention.percentile=80,90,97 "
        "--recipe neurtransformer,ssa-only --cost attention -o build/sweep\n\n"
        "ntc sweep examples/gpt2-books --data held-out.txt --steps 4,8 --also build/tuned -o build/sweep --report front.html",
    )(sweep)


def sweep(
    model: Model,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for points and figures; a sweep that is there goes on.", show_default=False)
    ],
    data: Annotated[Path, typer.Option(help="Text to measure on, UTF-8, plain or .xz.", show_default=False)],
    recipe: Annotated[list[str] | None, typer.Option(help="Recipes, separated by commas (default: neurtransformer).")] = None,
    steps: Annotated[str, typer.Option(metavar="T,T,...", help="Numbers of time steps.")] = "1,2,4,8",
    vary: Annotated[
        list[str] | None, typer.Option(metavar="[PASS.]KEY=VALUE,VALUE,...", help="Values of another option; may be given more than once.")
    ] = None,
    also: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="A compiled folder as one more point; may be given more than once.")
    ] = None,
    set_: SetOptions = None,
    settings: SettingsFile = None,
    calibration: Annotated[Path | None, typer.Option(help="Text for thresholds (default: calibration.txt of the model).")] = None,
    cost: Annotated[str, typer.Option(help="The energy that decides: total, or attention.")] = "total",
    max_tokens: Annotated[int, typer.Option(help="Measure quality on so many tokens.", min=2)] = 8192,
    energy_tokens: Annotated[int, typer.Option(help="Count operations on so many of them.", min=2)] = 2048,
    workers: Annotated[
        int | None, typer.Option(help="Processes (default: as many as processors, settings and memory allow).", min=1)
    ] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the front as one HTML page without a network.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Measure anew what an earlier sweep has left in the folder.")] = False,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Compile with many settings, measure quality and energy of each, and name those that no other setting beats in both.

    Every combination of --recipe, --steps and --vary is one point. The folder gets all figures (sweep.json) and a picture (front.png,
    front.svg), --report a page to look at and to print. A sweep that was stopped goes on with the same command, and one with more
    settings measures the new ones only.
    """
    with session(as_json, verbose) as output:
        from ntc.sweep import Plan, sweep

        if report is not None:
            from ntc.folders import check_page
            from ntc.sweep.document import MARK

            check_page(report, MARK, "ntc sweep", "front.html")
        plan = Plan(model, data, calibration, settings_from(settings, set_, None, None), max_tokens, energy_tokens)
        chosen = _settings(names(recipe), steps, vary, also or [])
        with output.progress() as advance:
            result = sweep(plan, chosen, out, cost=cost, workers=workers, overwrite=overwrite, progress=advance)
        result["report"] = None if report is None else str(report)
        if report is not None:
            lists = {"--recipe": [",".join(names(recipe))], "--steps": [steps], "--vary": vary, "--also": also, "--set": set_}
            single = {"--settings": settings, "--calibration": calibration, "--cost": cost, "--max-tokens": max_tokens}
            options = {**lists, **{key: [value] for key, value in single.items()}, "--energy-tokens": [energy_tokens], "--report": [report]}
            _write(report, result, ["ntc", "sweep", model, "--data", str(data), "-o", str(out)], options)
        for row in result["points"]:
            if "error" in row:
                output.warn(f"{row['label']} could not be measured: {row['error']}")
        output.result(result, lambda console: _show(console, result))


def _write(page_file: Path, result: dict[str, Any], words: list[str], options: Mapping[str, Sequence[object] | None]) -> None:
    """The page, with the command line that makes it again."""
    import shlex
    from importlib.metadata import version

    from ntc.folders import write_page
    from ntc.sweep.document import page

    given = [word for name, values in options.items() for value in values or () if value not in (None, "") for word in (name, str(value))]
    write_page(page_file, page(result, shlex.join([*words, *given]), {name: version(name) for name in ("ntc-compiler", "torch")}))


def _settings(recipes: list[str], steps: str, vary: list[str] | None, also: list[Path]) -> list[Setting]:
    """The points that the options ask for."""
    from ntc.compiler import DEFAULT_RECIPE
    from ntc.sweep import Setting, grid

    values: dict[str, list[Any]] = {}
    for pair in [f"steps={steps}", *(vary or [])]:
        key, _, listed = pair.partition("=")
        for value in listed.split(","):
            for name, read in named_values("--vary", [f"{key}={value}"] if "=" in pair else [pair]).items():
                values.setdefault(name, []).append(read)
    return [*grid(recipes or [DEFAULT_RECIPE], values), *(Setting(folder=str(folder)) for folder in also)]


def _show(console: Console, result: dict[str, Any]) -> None:
    rows = [row for row in result["points"] if "error" not in row]
    cost, ann = result["cost"], rows[0]
    where = f"  {result['data']}, {count(result['tokens'])} tokens"
    console.print(Text(f"{len(rows)} settings of ").append(result["model"], "bold").append(where, "dim"))
    block = "attention block" if cost == "attention" else "whole network"
    heading(console, "Quality against energy", f"per token, {block}; * no other setting is better in both")
    listed = table("", "setting", ">perplexity", ">change", ">top-1", ">firing rate", ">T·r", ">energy", ">saved")
    listed.add_row(
        "", "original network", _number(ann["perplexity_ann"]), "", "", "", "", energy(ann["energy"][cost]["ann_pj"]), "", style="dim"
    )
    for row in rows:
        tr = row["steps_times_rate"]
        listed.add_row(
            "*" if row["front"] else "", row["label"], _number(row["perplexity"]), percent(row["perplexity_change"]),
            f"{row['top1_agreement']:.3f}", "-" if row["firing_rate"] is None else f"{row['firing_rate']:.3f}",
            "-" if tr is None else f"{tr:.2f}", energy(row["energy"][cost]["snn_pj"]), percent(row["energy"][cost]["reduction"]),
            style="bold" if row["front"] else "",
        )  # fmt: skip
    console.print(listed)
    console.print()
    console.print(Text("Written to ").append(result["folder"], "bold").append(f"  {', '.join(result['files'])}", "dim"))
    if result["report"]:
        console.print(Text("Wrote ").append(result["report"], "bold"))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"
