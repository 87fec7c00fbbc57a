"""``ntc plan``: what a compilation would take, from a config alone."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ntc.cli.options import Recipe, SetOptions, SettingsFile, Steps, settings_from
from ntc.cli.output import JsonFlag, VerboseFlag, data_size, duration, session, table
from ntc.cli.tables import heading

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(
        "plan",
        epilog="Examples:\n\n"
        "ntc plan examples/configs/llama-7b.json --recipe sdllm\n\n"
        "ntc plan my-model --recipe sdllm --set scale=static --json",
    )(plan_)


def plan_(
    model: Annotated[
        str, typer.Argument(help="A config.json, a folder that has one, or a name on the hub; weights are not read.", show_default=False)
    ],
    recipe: Recipe = "neurtransformer",
    steps: Steps = None,
    settings: SettingsFile = None,
    set_: SetOptions = None,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Tell memory, time and disk of a compilation before it is made; for LLaMA-type models.

    The recipe is run on miniatures of the model, and what each pass takes of this machine is measured on them. With -v that is shown, too.
    The closing measurement of ntc compile is not included (--no-measure).
    """
    from ntc.plan import plan

    with session(as_json, verbose) as output:
        with output.progress() as report:
            data = plan(model, recipe=recipe, settings=settings_from(settings, set_, steps, None), progress=report).to_json()
        output.result(data, lambda console: _show(console, data, verbose > 0))


def _show(console: Console, data: dict[str, Any], measured: bool) -> None:
    about = f"  {data['architecture']}, {data['parameters'] / 1e6:,.1f} M parameters in {data['blocks']} blocks, recipe {data['recipe']}"
    console.print(Text(data["source"], "bold").append(about, "not bold dim"))
    threads = f"{data['threads']} thread{'s' if data['threads'] > 1 else ''}"
    heading(console, "What compiling it takes", f"processor time of this machine, measured with {threads}")
    rows = table("stage", ">time", ">memory", ">weights held")
    for stage in data["stages"]:
        rows.add_row(stage["name"], duration(stage["cpu_seconds"]), data_size(stage["memory_bytes"]), data_size(stage["weight_bytes"]))
    console.print(rows)
    console.print()
    where = "in the scratch folder" if data["on_disk"] else "in memory"
    memory = Text(f"Memory {data_size(data['memory_bytes'])}", "bold")
    console.print(memory.append(f"  without mapped files; weights lie {where}", "not bold dim"))
    console.print(Text(f"Time {duration(data['cpu_seconds'])}", "bold").append("  on one core", "not bold dim"))
    files = f"model {data_size(data['model_bytes'])}, scratch {data_size(data['scratch_bytes'])}, result {data_size(data['output_bytes'])}"
    total = data["model_bytes"] + data["scratch_bytes"] + data["output_bytes"]
    console.print(Text(f"Disk {data_size(total)}", "bold").append(f"  {files}", "not bold dim"))
    if measured:
        _show_rates(console, data["rates"])


def _show_rates(console: Console, rates: list[dict[str, Any]]) -> None:
    heading(console, "What a stage takes here", "processor time: fixed, for a block, for 10^9 parameters; memory: fixed, for each element")
    rows = table("stage", ">fixed", ">block", ">10^9 parameters", ">memory", ">bytes each", "element of")
    for r in rates:
        times = [duration(r["fixed_s"]), duration(r["block_s"]), duration(1e9 * r["parameter_s"])]
        of = "the largest weight" if r["by_largest"] else "all weights"
        rows.add_row(r["name"], *times, data_size(r["fixed_bytes"]), f"{r['element_bytes']:.1f}", of)
    console.print(rows)
