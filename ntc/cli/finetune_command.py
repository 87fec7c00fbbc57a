"""``ntc finetune``: train a compiled program until it is as good as the network that it came from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ntc.cli.options import CompiledFolder, OutFolder, Overwrite, named_values
from ntc.cli.output import JsonFlag, Output, VerboseFlag, count, duration, files_in, session, table
from ntc.cli.tables import heading
from ntc.cli.training_progress import training_progress
from ntc.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from ntc.training.config import TrainingConfig
    from ntc.training.run import Finetuned

__all__ = ["add_to", "is_first_process", "show_finetuning", "work_folder"]

_WHAT, _HOW, _LOSS, _RUN, _BASE = "What is trained", "Training", "Losses", "Checkpoints and validation", "The original network"


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(
        "finetune",
        epilog="Examples:\n\n"
        "ntc finetune build/demo --data examples/gpt2-books/calibration.txt -o build/tuned --max-tokens 100000\n\n"
        "ntc finetune build/demo --data books.txt.xz --data more.jsonl -o build/tuned --max-minutes 60 --group ssa --baseline\n\n"
        "accelerate launch --multi_gpu --num_processes 2 -m ntc finetune build/demo --data books.txt.xz -o build/tuned --json",
    )(finetune)


def finetune(
    folder: CompiledFolder,
    data: Annotated[
        list[str], typer.Option(help="Training text: file, folder, glob or hub data set; may be given more than once.", show_default=False)
    ],
    out: OutFolder,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens to train on end to end (default: one million).")] = None,
    max_minutes: Annotated[float | None, typer.Option(help="Minutes to train for, instead.")] = None,
    group: Annotated[str, typer.Option(help="ssa, thresholds, ffn or all.", rich_help_panel=_WHAT)] = "all",
    surrogate: Annotated[
        str | None, typer.Option(help="triangular, sigmoid, atan or straight-through (default: the program's).", rich_help_panel=_WHAT)
    ] = None,
    width: Annotated[
        float | None, typer.Option(help="Width of the surrogate, in thresholds (default: the program's).", rich_help_panel=_WHAT)
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.", rich_help_panel=_HOW)] = None,
    neuron_lr: Annotated[
        float | None, typer.Option(help="Likewise for thresholds, leaks and scales (default: --lr).", rich_help_panel=_HOW)
    ] = None,
    rows: Annotated[int | None, typer.Option(help="Windows per step, over all processes.", rich_help_panel=_HOW)] = None,
    accumulate: Annotated[int | None, typer.Option(help="Pieces that a step is run in; takes less memory.", rich_help_panel=_HOW)] = None,
    blockwise_tokens: Annotated[
        int | None,
        typer.Option(
            help="First fit every layer to the original's by itself, on so many tokens (default: as many as --max-tokens, or half of "
            "--max-minutes).",
            rich_help_panel=_HOW,
        ),
    ] = None,
    window: Annotated[int | None, typer.Option(help="Tokens per window (default: the context, at most 256).", rich_help_panel=_HOW)] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order of the text.", rich_help_panel=_HOW)] = None,
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="torch.compile (default: if it pays).", rich_help_panel=_HOW)
    ] = None,
    bf16: Annotated[
        bool | None, typer.Option("--bf16/--no-bf16", help="bfloat16 products (default: if the processor has them).", rich_help_panel=_HOW)
    ] = None,
    checkpointing: Annotated[
        bool | None, typer.Option("--checkpointing", help="Recompute membranes; takes less memory.", rich_help_panel=_HOW)
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Original network, or a compiled folder (default: the one compiled).", rich_help_panel=_LOSS),
    ] = None,
    kl: Annotated[float | None, typer.Option(help="Weight of the divergence from the teacher's logits.", rich_help_panel=_LOSS)] = None,
    ce: Annotated[float | None, typer.Option(help="Weight of the next token's cross entropy.", rich_help_panel=_LOSS)] = None,
    hidden: Annotated[float | None, typer.Option(help="Weight of the distance of hidden states.", rich_help_panel=_LOSS)] = None,
    target_rate: Annotated[
        float | None, typer.Option(help="Spikes per neuron and step that Q, K and V may have.", rich_help_panel=_LOSS)
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Weight of the penalty above it (default: 5).", rich_help_panel=_LOSS)] = None,
    validation: Annotated[
        Path | None, typer.Option(help="Validation text (default: the end of the training text, held out).", rich_help_panel=_RUN)
    ] = None,
    validation_windows: Annotated[int | None, typer.Option(help="Windows of it to measure on.", rich_help_panel=_RUN)] = None,
    validate_every: Annotated[int | None, typer.Option(help="Steps between validations.", rich_help_panel=_RUN)] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many validations without a better one (default: never).", rich_help_panel=_RUN)
    ] = None,
    result: Annotated[
        str | None, typer.Option(help="The program to write: best, in validation, or last (default: best).", rich_help_panel=_RUN)
    ] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.", rich_help_panel=_RUN)] = None,
    keep_best: Annotated[
        bool, typer.Option("--keep-best", help="If training fails, write the best program so far.", rich_help_panel=_RUN)
    ] = False,
    keep_work: Annotated[bool, typer.Option("--keep-work", help="Leave the checkpoints in OUT.work.", rich_help_panel=_RUN)] = False,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Train the original on the same windows too, into OUT/baseline.", rich_help_panel=_BASE)
    ] = False,
    baseline_lr: Annotated[float | None, typer.Option(help="Its peak learning rate (default: --lr).", rich_help_panel=_BASE)] = None,
    baseline_from: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Take it from an earlier run on the same windows.", rich_help_panel=_BASE)
    ] = None,
    text_field: Annotated[str, typer.Option(help="Column of the text in jsonl, parquet and data sets.")] = "text",
    split: Annotated[str, typer.Option(help="Split of a hub data set.")] = "train",
    streaming: Annotated[bool, typer.Option("--streaming", help="Read in order, without a cache of tokens.")] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other option: weight_decay, betas, clip, warmup, ...")
    ] = None,
    overwrite: Overwrite = False,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Fine-tune a compiled program with surrogate gradients.

    Checkpoints and log lie in OUT.work until it is done: the same command goes on where a kill stopped it.
    """
    options = {
        "max_tokens": max_tokens, "max_minutes": max_minutes, "blockwise_tokens": blockwise_tokens,
        "group": group, "surrogate": surrogate, "surrogate_width": width, "lr": lr,
        "neuron_lr": neuron_lr, "rows": rows, "accumulate": accumulate, "window": window, "seed": seed, "compile": compile, "bf16": bf16,
        "checkpointing": checkpointing, "kl": kl, "ce": ce, "hidden": hidden, "target_rate": target_rate, "rate": rate,
        "validation_windows": validation_windows, "validate_every": validate_every, "patience": patience, "result": result,
        "save_every": save_every,
    }  # fmt: skip
    with session(as_json, verbose) as output:
        config = config_from(options, set_)
        found = _finetune(
            output, folder, out, config, overwrite, keep_best, keep_work, data=data, teacher=teacher, validation=validation,
            baseline=baseline, baseline_lr=baseline_lr, baseline_from=baseline_from, text_field=text_field, split=split,
            streaming=streaming,
        )  # fmt: skip
        if found is not None:
            output.result(found, lambda console: _show(console, found))


def config_from(options: dict[str, Any], pairs: list[str] | None = None) -> TrainingConfig:
    """Options by name, then ``--set KEY=VALUE``; None means not given.

    Raises:
        ConfigError: If a pair has no ``=``, there is no such option, or its value does not do.
    """
    from ntc.training.config import TrainingConfig, with_options

    return with_options(TrainingConfig(), {**options, **named_values("--set", pairs)})


def is_first_process() -> bool:
    """Whether this process shows and writes; ``accelerate launch`` numbers them."""
    return int(os.environ.get("RANK") or 0) == 0


def work_folder(out: Path) -> Path:
    """Where checkpoints and log of a run lie until it is done: beside the folder that it will write."""
    out = out.absolute()
    return out.with_name(out.name + ".work")


def _finetune(
    output: Output, folder: Path, out: Path, config: TrainingConfig, overwrite: bool, keep_best: bool, keep_work: bool, **options: Any
) -> dict[str, Any] | None:
    from ntc.folders import check_output
    from ntc.training.checkpoint import remove
    from ntc.training.record import write_finetuned
    from ntc.training.run import finetune

    check_output(out, overwrite)
    if out.resolve() == folder.resolve():
        raise ConfigError(f"{out} is the folder of the program itself: choose another --out, so that the two can be compared")
    work = work_folder(out)
    with training_progress(output, silent=not is_first_process()) as news:
        try:
            found = finetune(folder, config=config, work=work, keep_best=keep_best, news=news, **options)
        except TrainingError as error:
            if error.best is None:
                raise
            _write_best(error, folder, out, write_finetuned)
    if not found.is_main:
        return None
    write_finetuned(found, out, source=folder)
    if not keep_work:
        remove(work)
    return _result(found, folder, out)


def _write_best(error: TrainingError, folder: Path, out: Path, write: Any) -> None:
    best: Any = error.best
    write(best, out, source=folder)
    step, perplexity = best.outcome.best_step, best.outcome.after.get("valid_perplexity") or 0.0
    raise TrainingError(f"{error}; the best program so far, of step {step} with perplexity {perplexity:.2f}, is in {out}") from error


def _result(found: Finetuned, folder: Path, out: Path) -> dict[str, Any]:
    return {"folder": str(out), "from": str(folder), **found.to_json(), "files": files_in(out)}


def _show(console: Console, result: dict[str, Any]) -> None:
    console.print(Text("Fine-tuned ").append(result["from"], "bold").append(" to ").append(result["folder"], "bold"))
    show_finetuning(console, result)
    console.print()
    console.print(Text("Next: ", "bold").append(f"ntc evaluate {result['folder']} --data TEXT", "cyan"))


def show_finetuning(console: Console, result: dict[str, Any]) -> None:
    """What a run gained: perplexity and firing rates before and after."""
    about = (
        f"{count(result['trained_parameters'])} numbers in {result['trained_tensors']} tensors (group {result['group']}), "
        f"{count(result['steps'])} steps, {count(result['tokens'])} tokens of {result['data']['description'].split(',')[0]}, "
        f"{duration(result['seconds'])}, {count(result['tokens_per_second'])} tokens/s"
    )
    console.print(Text(about, "dim"))
    heading(console, "Fine-tuning", result["validation"]["description"])
    rows = table("", ">before", ">after", ">original", *([">original, tuned"] if result["baseline"] else []))
    last = [_number(result["perplexity_tuned"])] if result["baseline"] else []
    figures = [_number(result[f"perplexity_{which}"]) for which in ("before", "after", "ann")]
    rows.add_row("perplexity", *figures, *last)
    changes = [_change(result["perplexity_change_tuned"])] if result["baseline"] else []
    rows.add_row("  program against it", "", "", _change(result["perplexity_change"]), *changes)
    if result["firing_rate_after"] is not None:
        figures = [_number(result[f"firing_rate_{which}"], 3) for which in ("before", "after")]
        rows.add_row("firing rate", *figures, "", *("" for _ in last))
    console.print(rows)
    roles = _by_role(result["rates"])
    if roles:
        console.print(Text("firing rates  " + ", ".join(f"{role} {a:.3f} > {b:.3f}" for role, (a, b) in roles.items()), "dim"))


def _by_role(rates: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Mean rates before and after of the populations of each role, which their names end in."""
    roles: dict[str, list[tuple[float, float]]] = {}
    for row in rates:
        roles.setdefault(row["population"].rsplit(".", 1)[-1], []).append((row["before"] or 0.0, row["after"]))
    return {role: (sum(a for a, _ in of) / len(of), sum(b for _, b in of) / len(of)) for role, of in roles.items()}


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _change(value: float | None) -> Text:
    if value is None:
        return Text("-")
    return Text(f"{100 * value:+.1f} %", "green" if value < 0.05 else "yellow" if value < 1 else "red")
