"""``ntc compile``: a model in, a folder with a spiking network out, and a table of what became of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ntc.cli.finetune_command import config_from, show_finetuning, work_folder
from ntc.cli.options import (
    EmitOptions,
    EmittingCommand,
    Model,
    OutFolder,
    Overwrite,
    QuantizeBits,
    Recipe,
    SetOptions,
    SettingsFile,
    Steps,
    backend_options,
    settings_from,
)
from ntc.cli.output import JsonFlag, Output, Report, VerboseFlag, count, data_size, duration, files_in, names, session, table
from ntc.cli.tables import by_role, heading, show_attention, show_neurons, show_quality, show_targets
from ntc.cli.training_progress import training_progress

if TYPE_CHECKING:
    from ntc.compiler import Compilation
    from ntc.text import Tokens
    from ntc.training.config import TrainingConfig
    from ntc.training.run import Finetuned

__all__ = ["add_to"]

# Tokens of the closing measurement: enough to see what happened, few enough to take seconds. `ntc evaluate` takes more.
_CALIBRATION_TOKENS = 1024
_EVALUATION_TOKENS = 4096
_ENERGY_TOKENS = 512

_TUNE = "Fine-tuning (ntc finetune has more options)"


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(
        "compile",
        cls=EmittingCommand,
        epilog="Examples:\n\n"
        "ntc compile examples/gpt2-books -o build/demo --steps 4 --emit onnx,netlist,energy\n\n"
        "ntc compile gpt2 -o build/gpt2 --calibration my.txt --set activation=relu --overwrite\n\n"
        "ntc compile examples/gpt2-books -o build/integers --quantize 8 --set replace-attention.percentile=97\n\n"
        "ntc compile examples/gpt2-books -o build/ffn --recipe ffn-only --steps 32 --evaluate held-out.txt --json\n\n"
        "ntc compile examples/gpt2-books -o build/tuned --finetune books.txt.xz --finetune-minutes 30",
    )(compile_)


def compile_(
    model: Model,
    out: OutFolder,
    recipe: Recipe = "neurtransformer",
    steps: Steps = None,
    percentile: Annotated[
        float | None, typer.Option(help="Percentile of activations that becomes a threshold, in every pass (for one, see --set).")
    ] = None,
    settings: SettingsFile = None,
    set_: SetOptions = None,
    quantize: QuantizeBits = None,
    calibration: Annotated[Path | None, typer.Option(help="Text for thresholds (default: calibration.txt of the model).")] = None,
    emit: Annotated[list[str] | None, typer.Option(help="Also write: names that ntc backends lists, with commas.")] = None,
    emit_set: EmitOptions = None,
    overwrite: Overwrite = False,
    evaluate: Annotated[
        Path | None, typer.Option(help="Held-out text for the quality in the closing table (default: the calibration text).")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Measure quality and energy for the closing table.")] = True,
    scratch: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where weights lie while a large model is compiled (default: ~/.cache/ntc/scratch).")
    ] = None,
    finetune: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Fine-tune on this text, too; may be given more than once.", rich_help_panel=_TUNE),
    ] = None,
    finetune_tokens: Annotated[int | None, typer.Option(help="Tokens to train on (default: one million).", rich_help_panel=_TUNE)] = None,
    finetune_minutes: Annotated[float | None, typer.Option(help="Minutes to train for, instead.", rich_help_panel=_TUNE)] = None,
    group: Annotated[
        str | None, typer.Option(help="What is trained: ssa, thresholds, ffn or all (default).", rich_help_panel=_TUNE)
    ] = None,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Compile a language model to a spiking network.

    Quality in the closing table is measured on --evaluate TEXT if that is given, else on the calibration text, and says so.
    """
    with session(as_json, verbose) as out_put:
        options = {"max_tokens": finetune_tokens, "max_minutes": finetune_minutes, "group": group}
        data = _compile(
            out_put, model, out, recipe, settings_from(settings, set_, steps, percentile), quantize, calibration, names(emit),
            backend_options(emit_set, names(emit)), overwrite, evaluate, measure, finetune or [], _training_config(finetune, options),
            scratch,
        )  # fmt: skip
        for warning in data["warnings"]:
            out_put.warn(warning)
        out_put.result(data, lambda console: _show(console, data))


def _compile(
    output: Output, model: str, out: Path, recipe: str, settings: Any, bits: int | None, calibration: Path | None, emit: list[str],
    emit_options: dict[str, dict[str, Any]], overwrite: bool, evaluate: Path | None, measure: bool, texts: list[str],
    training: TrainingConfig | None, scratch: Path | None,
) -> dict[str, Any]:  # fmt: skip
    from ntc.compiler import compile_model, quantize, write
    from ntc.emit import emitters
    from ntc.folders import check_output
    from ntc.text import read_text
    from ntc.training.sources import find_parts

    started = time.perf_counter()
    # Everything that can be wrong is looked at before the work begins.
    check_output(out, overwrite)
    targets = emitters(emit, emit_options)
    if evaluate is not None:
        read_text(evaluate)
    if texts:
        find_parts(texts, "train")
    with output.progress() as report:
        done = compile_model(
            model, recipe=recipe, settings=settings, quantize=bits, until_quantize=training is not None, calibration=calibration,
            targets=targets, scratch=scratch, progress=report,
        )  # fmt: skip
    seconds = dict(done.seconds)
    tuned = None
    if training is not None:
        now = time.perf_counter()
        tuned = _finetune(output, done, texts, training, work_folder(out))
        done = replace(done, program=tuned.program)
        seconds["finetune"] = time.perf_counter() - now
        if bits is not None:
            now = time.perf_counter()
            with output.progress() as report:
                done = quantize(done, report)
            seconds["quantize"] = time.perf_counter() - now
    with output.progress() as report:
        tokens = _tokens(done, evaluate)
        quality = None
        if measure:
            now = time.perf_counter()
            quality = _quality(done, tokens, report)
            seconds["evaluate"] = time.perf_counter() - now
        now = time.perf_counter()
        measured = write(
            done, out, emit=emit, emit_options=emit_options, overwrite=overwrite, tokens=tokens.windows[:2], also=_adding(tuned),
            progress=report,
        )  # fmt: skip
        if tuned is not None:
            _forget(work_folder(out))
        seconds["write"] = time.perf_counter() - now
        energy = _energy(done, out, emit, tokens, report) if measure else None
        seconds["all"] = time.perf_counter() - started
    return {**_result(done, out, tokens, evaluate, quality, energy, measured, seconds), "finetune": tuned and tuned.to_json()}


def _training_config(texts: list[str] | None, options: dict[str, Any]) -> TrainingConfig | None:
    from ntc.errors import ConfigError

    if texts:
        return config_from(options)
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ConfigError(f"--{given[0].replace('max_', 'finetune-')} is for fine-tuning: give the text to train on, --finetune TEXT")
    return None


def _finetune(output: Output, done: Compilation, texts: list[str], config: TrainingConfig, work: Path) -> Finetuned:
    """The compiled program trained against the network that it was just made from."""
    from ntc.training.run import finetune

    with training_progress(output) as news:
        return finetune(done.program, texts, config=config, teacher=done.analog, tokenizer=done.tokenizer, work=work, news=news)


def _adding(tuned: Finetuned | None) -> Callable[[Path], None] | None:
    from ntc.training.record import add_training_files

    return None if tuned is None else partial(add_training_files, tuned)


def _forget(work: Path) -> None:
    from ntc.training.checkpoint import remove

    remove(work)


def _tokens(done: Compilation, evaluate: Path | None) -> Tokens:
    from ntc.text import tokens_from, tokens_of

    if evaluate is None:
        return tokens_of(done.calibration, _CALIBRATION_TOKENS)
    info = done.program.info
    return tokens_from(evaluate, done.tokenizer, min(256, info.context or 256), _EVALUATION_TOKENS, info.vocab_size)


def _quality(done: Compilation, tokens: Tokens, report: Report) -> dict[str, Any]:
    from ntc.quality import evaluate

    report("evaluate", 0, len(tokens.windows))
    return evaluate(done.program, done.analog, tokens, progress=lambda n, of: report("evaluate", n, of)).to_json()


def _energy(done: Compilation, out: Path, emit: list[str], tokens: Tokens, report: Report) -> dict[str, Any]:
    """The energy report: the one that was just written, or a measurement on as many tokens."""
    from ntc.energy import measure_energy

    if "energy" in emit:
        written: dict[str, Any] = json.loads((out / "energy.json").read_text(encoding="utf-8"))
        return written
    rows = max(1, _ENERGY_TOKENS // tokens.windows.shape[1])
    few = tokens.first(rows)
    report("energy", 0, len(few.windows))
    return measure_energy(done.program, done.analog, few, progress=lambda n, of: report("energy", n, of)).to_json()


def _result(
    done: Compilation, out: Path, tokens: Tokens, evaluate: Path | None, quality: dict[str, Any] | None, energy: dict[str, Any] | None,
    targets: dict[str, Any], seconds: dict[str, float],
) -> dict[str, Any]:  # fmt: skip
    info = done.program.info
    populations = (quality or {}).pop("populations", [])
    activity = ("neurons", "events_per_value", "firing_rate", "dead", "saturated")
    return {
        "folder": str(out),
        "model": {"source": info.source, "architecture": info.architecture, "parameters": info.parameters},
        "recipe": done.recipe.name,
        "steps": done.program.steps,
        "passes": [
            {
                "name": r.name, "sites": r.sites, "missed": [{"node": n, "reason": why} for n, why in r.missed], "drift": r.drift,
                "seconds": r.seconds or seconds.get(r.name, 0.0),
            }
            for r in done.program.history
        ],
        "calibration": {"data": done.calibration.description, "tokens": done.calibration.tokens, "sha256": done.calibration.sha256},
        **{key: (quality or {}).get(key) for key in activity},
        "roles": by_role(populations),
        "quality": quality and {**quality, "on_calibration_text": evaluate is None and done.calibrated},
        "energy": energy and _energy_summary(energy, tokens.description),
        "files": files_in(out),
        "targets": targets,
        "seconds": seconds,
        "warnings": list(done.warnings),
    }  # fmt: skip


def _energy_summary(report: dict[str, Any], data: str) -> dict[str, Any]:
    total = {k: report["total"][k] for k in ("ann_pj", "snn_pj", "reduction")}
    constants = report["constants"]
    return {
        "attention": report["attention"], "total": total, "uncounted_share": report["uncounted_share"], "tokens": report["tokens"],
        "data": data.split(",")[0], "unit": report["unit"], "constants": constants["title"], "scope": constants["scope"],
    }  # fmt: skip


def _show(console: Console, data: dict[str, Any]) -> None:
    model = data["model"]
    about = f"{model['architecture']}, {model['parameters'] / 1e6:,.1f} M parameters, recipe {data['recipe']}, T = {data['steps']}"
    console.print(Text("Compiled ").append(model["source"], "bold").append(" to ").append(data["folder"], "bold"))
    console.print(Text(about, "dim"))
    _show_passes(console, data)
    if data["quality"]:
        quality = data["quality"]
        remark = quality["data"] + ("; the text that thresholds came from, so a bit flattering" if quality["on_calibration_text"] else "")
        show_neurons(console, data["roles"], data, f"per token, {quality['data']}")
        show_quality(console, quality, remark)
    if data["finetune"]:
        show_finetuning(console, data["finetune"])
    if data["energy"]:
        energy = data["energy"]
        uncounted = f", {100 * energy['uncounted_share']:.1f} % of MACs not counted" if energy["uncounted_share"] else ""
        show_attention(
            console, energy["attention"], energy["total"],
            f"per token, {energy['constants']}, {energy['data']}, {count(energy['tokens'])} tokens{uncounted}",
        )  # fmt: skip
        console.print(Text(energy["scope"], "dim"))
    show_targets(console, data["targets"])
    _show_files(console, data)
    _show_end(console, data)


def _show_passes(console: Console, data: dict[str, Any]) -> None:
    heading(console, "Passes")
    rows = table("pass", ">sites", ">missed", ">drift of logits", ">time")
    for p in data["passes"]:
        missed = Text(count(len(p["missed"])), "yellow") if p["missed"] else Text("-", "dim")
        drift = "-" if p["drift"] is None else f"{p['drift']:.2g}"
        rows.add_row(p["name"], count(p["sites"]), missed, drift, duration(p["seconds"]))
    console.print(rows)
    reasons: dict[tuple[str, str], list[str]] = {}
    for p in data["passes"]:
        for miss in p["missed"]:
            general = " ".join("%..." if w.startswith("%") else w for w in miss["reason"].split())
            reasons.setdefault((p["name"], general), []).append(miss["node"])
    for (name, reason), nodes in reasons.items():
        console.print(Text(f"{name} left {len(nodes)} alone, such as %{nodes[0]}: {reason}", "dim"))


def _show_files(console: Console, data: dict[str, Any]) -> None:
    heading(console, f"Files in {data['folder']}")
    rows = table("file", ">size")
    inner = [f for f in data["files"] if "/" in f["name"]]
    for f in data["files"]:
        if "/" not in f["name"]:
            rows.add_row(f["name"], data_size(f["bytes"]))
    for folder in dict.fromkeys(f["name"].split("/")[0] for f in inner):
        rows.add_row(folder + "/", data_size(sum(f["bytes"] for f in inner if f["name"].startswith(folder + "/"))))
    console.print(rows)


def _show_end(console: Console, data: dict[str, Any]) -> None:
    seconds = data["seconds"]
    stages = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items() if name != "all")
    console.print()
    console.print(Text(f"Done in {duration(seconds['all'])}").append(f"  {stages}", "dim"))
    console.print(Text("Next: ", "bold").append(f"ntc evaluate {data['folder']} --data TEXT", "cyan"))
