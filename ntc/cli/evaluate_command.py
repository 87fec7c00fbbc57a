"""``ntc evaluate``: quality of a compiled program against the network that it came from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ntc.cli.options import CompiledFolder
from ntc.cli.output import JsonFlag, Output, VerboseFlag, count, session
from ntc.cli.tables import by_role, show_layers, show_neurons, show_quality
from ntc.errors import ArtifactError, ConfigError, DataError

if TYPE_CHECKING:
    from ntc.program import Program

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(
        "evaluate",
        epilog="Examples:\n\n"
        "ntc evaluate build/demo --data examples/data/books-sample.txt --against examples/gpt2-books\n\n"
        "ntc evaluate build/tuned --data held-out.txt --tuned build/tuned/baseline --layers\n\n"
        "ntc evaluate build/demo --data held-out.txt.xz --max-tokens 20000 --json",
    )(evaluate)


def evaluate(
    folder: CompiledFolder,
    data: Annotated[Path, typer.Option(help="Text to evaluate on, UTF-8, plain or .xz.", show_default=False)],
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original model (default: where it was when it was compiled).")
    ] = None,
    tuned: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="The original, fine-tuned on the tokens that the program was fine-tuned on (default: DIR/baseline, if any)."
        ),
    ] = None,
    no_tuned: Annotated[bool, typer.Option("--no-tuned", help="Leave DIR/baseline out.")] = False,
    window: Annotated[int | None, typer.Option(help="Tokens per window (default: the context, at most 256).")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Read only so many tokens (default: all).")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Show how near every layer is to the original's.")] = False,
    seed: Annotated[int, typer.Option(help="Of the draws that confidence intervals come from.", min=0)] = 0,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Measure the quality of a compiled program against the original, on the same tokens in the same run.

    A program that was fine-tuned is also held against the original fine-tuned on the same tokens: what remains of the gap
    is what the spikes cost. One that was trained on another text, in another order or in another group is refused.
    """
    with session(as_json, verbose) as output:
        if tuned is not None and no_tuned:
            raise ConfigError("--tuned DIR and --no-tuned exclude each other: give one of them")
        tuned = None if no_tuned else tuned or _baseline_of(folder)
        result = _evaluate(output, folder, data, against, tuned, window, max_tokens, seed)
        output.result(result, lambda console: _show(console, result, layers))


def _evaluate(
    output: Output, folder: Path, data: Path, against: str | None, tuned: Path | None, window: int | None, max_tokens: int | None, seed: int
) -> dict[str, Any]:
    from ntc import artifact
    from ntc.frontend import capture
    from ntc.loading import load_tokenizer
    from ntc.quality import evaluate
    from ntc.similarity import same_channels
    from ntc.text import read_text, tokens_from

    info = artifact.read_manifest(folder).get("info", {})
    source = against or str(info.get("source", ""))
    if against is None and not Path(source).exists():
        raise ArtifactError(f"the model {source} that {folder} was compiled from is not there: give --against MODEL")
    context = int(info.get("context") or 0)
    if window is not None and context and window > context:
        raise DataError(f"a window of {window} tokens is longer than the model's context of {context}: give --window {context} or less")
    read_text(data)  # before the seconds that loading takes
    with output.progress() as report:
        report("load", 0, 1)
        program = artifact.load(folder)
        reference, training = (None, None) if tuned is None else _load_tuned(output, tuned, program)
        tokenizer = load_tokenizer(folder / "tokenizer") if (folder / "tokenizer").is_dir() else None
        tokens = tokens_from(data, tokenizer, window or min(256, context or 256), max_tokens, program.info.vocab_size)
        report("capture", 0, 1)
        analog = capture(source)
        report("evaluate", 0, len(tokens.windows))
        quality = evaluate(
            program, analog, tokens, tuned=reference, seed=seed, progress=lambda done, total: report("evaluate", done, total)
        )
    result = quality.to_json()
    about = {"folder": str(folder), "against": source, "tuned": None if tuned is None else str(tuned), "tuned_training": training}
    left_out = None
    if not result["layers"]:
        rotated = "its residual stream is rotated, so that its channels are not the original's"
        left_out = "no module of the model is called like a transformer block" if same_channels(program, analog) else rotated
    return {**about, **result, "layers_left_out": left_out, "roles": by_role(result["populations"])}


def _baseline_of(folder: Path) -> Path | None:
    """Where fine-tuning leaves the original network, fine-tuned on the same tokens."""
    from ntc.artifact import BASELINE

    return folder / BASELINE if (folder / BASELINE).is_dir() else None


def _load_tuned(output: Output, folder: Path, spiking: Program) -> tuple[Program, dict[str, Any]]:
    """The fine-tuned original of a compiled folder, and whether it is the reference of this program."""
    from ntc import artifact
    from ntc.reference import compare_training

    program = artifact.load(folder)
    if program.steps:
        raise DataError(
            f"{folder} holds a spiking program (T = {program.steps}): --tuned takes the original, fine-tuned without spikes, as "
            "fine-tuning with a baseline writes it"
        )
    found = compare_training(spiking, program)
    if found.contradictions:
        raise DataError(
            f"the network in {folder} was fine-tuned with {' and '.join(found.contradictions)}, so the difference would not be what the "
            "spikes cost: give the one that was trained with the program, --tuned DIR, or --no-tuned"
        )
    if found.same is None:
        output.warn(f"whether the network in {folder} has seen the same tokens cannot be checked: {found.remarks[0]}")
    elif not found.same:
        output.warn(f"the network in {folder} was fine-tuned on {found.remarks[0]}, so the difference is not only what the spikes cost")
    return program, found.to_json()


def _show(console: Console, result: dict[str, Any], layers: bool) -> None:
    console.print(
        Text(result["folder"], "bold").append(" against ", "not bold").append(result["against"], "bold")
        .append(f"  T = {result['steps']}, {count(result['tokens'])} tokens", "not bold dim")
    )  # fmt: skip
    show_neurons(console, result["roles"], result, f"per token, {result['data']}")
    show_quality(console, result, result["data"])
    show_layers(console, result["layers"], result["layers_left_out"], whole=layers)
