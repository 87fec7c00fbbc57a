"""``ntc quantize``: a compiled or fine-tuned program becomes one that computes with integers."""

from __future__ import annotations

import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ntc.cli.options import CompiledFolder, OutFolder, Overwrite, named_values
from ntc.cli.output import JsonFlag, Output, VerboseFlag, count, duration, files_in, session, table
from ntc.cli.tables import heading, show_widths
from ntc.cli.texts import tokens_for

__all__ = ["add_to"]

_CALIBRATION_TOKENS = 4096
_MEASURED_TOKENS = 1024
_REGISTERS = ("membrane", "accumulator", "memory")


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(
        "quantize",
        epilog="Examples:\n\n"
        "ntc quantize build/demo -o build/demo-int8\n\n"
        "ntc quantize build/tuned -o build/tuned-int4 --weight-bits 4 --data my.txt --json\n\n"
        "ntc quantize build/demo -o build/plain --set error_compensation=false --overwrite",
    )(quantize)


def quantize(
    folder: CompiledFolder,
    out: OutFolder,
    weight_bits: Annotated[int, typer.Option(help="Bits of a weight: 4, 8 or 16.")] = 8,
    activation_bits: Annotated[int, typer.Option(help="Bits of what comes out of a norm, a lookup or a decode: 4 to 16.")] = 8,
    data: Annotated[Path | None, typer.Option(help="Text that scales are chosen on (default: the model's calibration.txt).")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other option of the pass quantize; ntc passes lists them.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Measure the perplexity before and after.")] = True,
    overwrite: Overwrite = False,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Make integers of weights, thresholds, membranes and everything between: all executors then agree to the last bit.

    Every register is proven wide enough, whatever the text. Softmax attention, leaky neurons and normalisers that divide by what
    the token gives are refused. Tokenizer, and log and baseline of a fine-tuning, are copied; artefacts are not, ntc export writes them.
    """
    with session(as_json, verbose) as output:
        options = {"weight_bits": weight_bits, "activation_bits": activation_bits, **named_values("--set", set_)}
        result = _quantize(output, folder, out, options, data, measure, overwrite)
        output.result(result, lambda console: _show(console, result, each=verbose > 0))


def _quantize(
    output: Output, folder: Path, out: Path, options: dict[str, Any], data: Path | None, measure: bool, overwrite: bool
) -> dict[str, Any]:
    from ntc import artifact
    from ntc.compiler import quantize_folder
    from ntc.folders import check_output
    from ntc.quality import perplexity
    from ntc.text import calibration_from, read_text, tokens_of
    from ntc.widths import widths

    started = time.perf_counter()
    check_output(out, overwrite)
    if data is not None:
        read_text(data)
    with output.progress() as report:
        report("load", 0, 1)
        tokens = tokens_for(output, folder, artifact.load(folder), data, _CALIBRATION_TOKENS, "scales are those of random tokens")
        calibration = calibration_from(tokens)
        before, after = quantize_folder(folder, out, options, calibration=calibration, overwrite=overwrite, progress=report)
        report("measure", 0, 1)
        text = tokens_of(calibration, _MEASURED_TOKENS)
        figures = [perplexity(p, text) if measure else None for p in (before, after)]
        rows = widths(after)
    record = after.history[-1]
    sites = [{"node": name, **notes} for name, notes in record.notes["sites"].items()]
    return {
        "folder": str(out), "source": str(folder), "steps": after.steps, "options": dict(record.options), "drift": record.drift,
        "calibration": {"data": calibration.description, "tokens": record.notes["tokens"], "sha256": calibration.sha256},
        "residual_exponent": record.notes["residual_exponent"],
        "sites": [{**dict.fromkeys(_SITE_KEYS), **site} for site in sites],
        "widths": [asdict(row) for row in rows],
        "bits": {what: max((r.bits for r in rows if r.what == what), default=None) for what in _REGISTERS},
        "perplexity": figures[1], "perplexity_before": figures[0], "perplexity_data": text.description if measure else None,
        "files": files_in(out),
        "seconds": time.perf_counter() - started,
    }  # fmt: skip


_SITE_KEYS = (
    "bits", "scale", "weight_bits", "weight_scale", "threshold", "period", "gain", "leak_error", "input_scale", "input_zero",
    "relative_squared_error",
)  # fmt: skip


def _show(console: Console, result: dict[str, Any], each: bool) -> None:
    options = result["options"]
    console.print(Text("Quantized ").append(result["source"], "bold").append(" to ").append(result["folder"], "bold"))
    about = f"weights of {options['weight_bits']} bits, activations of {options['activation_bits']}, T = {result['steps']}"
    console.print(Text(f"{about}, scales from {result['calibration']['data']}", "dim"))
    _show_sites(console, result["sites"], each)
    show_widths(console, result["widths"], each)
    if result["perplexity"] is not None:
        before, after = result["perplexity_before"], result["perplexity"]
        console.print()
        console.print(
            Text("Perplexity: ", "bold").append(f"{before:.2f} before, {after:.2f} after ({100 * (after / before - 1):+.2f} %)", "not bold")
            .append(f"  {result['perplexity_data']}", "not bold dim")
        )  # fmt: skip
    console.print(Text(f"Done in {duration(result['seconds'])}", "dim"))
    console.print(Text("Next: ", "bold").append(f"ntc evaluate {result['folder']} --data TEXT", "cyan"))


def _show_sites(console: Console, sites: list[dict[str, Any]], each: bool) -> None:
    heading(console, "What rounding costs", "squared error of each place, relative to what it gives")
    rows = table("place", ">places", ">bits", ">mean error", ">largest")
    groups: dict[tuple[str, int], list[float]] = {}
    for site in sites:
        if site["relative_squared_error"] is None:
            continue
        place = site["node"] if each else re.sub(r"(?<=_)\d+(?=_)", "*", site["node"])
        groups.setdefault((place, site["weight_bits"] or site["bits"]), []).append(site["relative_squared_error"])
    for (place, bits), errors in groups.items():
        rows.add_row(place, count(len(errors)), str(bits), f"{sum(errors) / len(errors):.1e}", f"{max(errors):.1e}")
    console.print(rows)
