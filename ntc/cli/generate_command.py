"""``ntc generate``: a text goes on, token by token."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from ntc.cli.output import JsonFlag, Output, VerboseFlag, percent, session
from ntc.errors import ConfigError, DataError

if TYPE_CHECKING:
    from ntc.program import Program

__all__ = ["add_to"]

_MAX_TOKENS = 100


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(
        "generate",
        epilog="Examples:\n\n"
        'ntc generate build/demo "It was a dark and stormy night"\n\n'
        'ntc generate build/demo "Once" --temperature 0.8 --top-k 40 --seed 1 --stop "." --json\n\n'
        "echo 'Once upon a time' | ntc generate examples/gpt2-books -",
    )(generate)


def generate(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder that ntc compile or ntc finetune wrote, or an original model.", show_default=False)
    ],
    prompt: Annotated[str, typer.Argument(help="Beginning of the text; - reads it from standard input.", show_default=False)],
    max_tokens: Annotated[int, typer.Option(help="Most new tokens.", min=1)] = _MAX_TOKENS,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the most probable token (the default).")] = False,
    temperature: Annotated[float | None, typer.Option(help="Draw tokens; divides the logits (1 if another option below is given).")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the most probable tokens with that probability together.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draws (default: 0).", min=0)] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text; may be repeated.")] = None,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Continue a text with a compiled program, or with the network that it came from.

    The program runs in its streaming form: the prompt at once, then one token after the other at constant cost. The
    continuation goes to standard output as it comes, figures to standard error.
    """
    with session(as_json, verbose) as output:
        settings = _settings(greedy, temperature, top_k, top_p, seed)
        text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
        result = _generate(output, folder, text, max_tokens, settings, stop or [])
        output.result(result, lambda console: output.errors.print(_figures(result)))


def _settings(greedy: bool, temperature: float | None, top_k: int | None, top_p: float | None, seed: int | None) -> dict[str, Any]:
    """Keywords of ``ntc.generate``: greedy unless something about draws was said."""
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    said = {key: value for key, value in given.items() if value is not None}
    if greedy and said:
        other = next(iter(said)).replace("_", "-")
        raise ConfigError(f"--greedy takes the most probable token, and --{other} is about draws: give one of them")
    return {"temperature": 1.0 if said else 0.0, "top_k": 0, "top_p": 1.0, "seed": 0, **said}


def _generate(output: Output, folder: Path, prompt: str, max_tokens: int, settings: dict[str, Any], stop: list[str]) -> dict[str, Any]:
    from ntc.generation import Pieces, Sampling, generate, streaming_form

    Sampling(**settings)  # a wrong setting costs no time
    with output.progress() as report:
        report("load", 0, 1)
        program, tokenizer = _load(folder)
        ids = tokenizer(prompt)["input_ids"]
        if not ids:
            raise DataError("the prompt is empty: give the beginning of a text")
        report("to-streaming", 0, 1)
        program = streaming_form(program)
    ends = {tokenizer.eos_token_id, program.info.config.get("eos_token_id")} - {None}
    generation = generate(program, ids, max_tokens=max_tokens, stop=ends, **settings)
    pieces, tokens, logprobs, parts = Pieces(tokenizer, ids, stop), [], [], []

    def show(piece: str) -> None:
        parts.append(piece)
        if not output.as_json and piece:
            output.stdout.write(piece)
            output.stdout.flush()

    started = begun = time.perf_counter()
    for number, new in enumerate(generation):
        if number == 0:
            begun = time.perf_counter()
        tokens.append(new.token)
        logprobs.append(new.logprob)
        show(pieces.push(new.token))
        if pieces.stopped:
            break
    show(pieces.rest())
    ended = time.perf_counter()
    if not output.as_json:
        output.stdout.write("\n")
        output.stdout.flush()
    firing_rate = _firing_rate(program, generation.ids)
    empty, one = (sum(part.bytes(past) for part in program.state) for past in (0, 1))
    return {
        "folder": str(folder), "prompt": prompt, "text": "".join(parts), "prompt_tokens": ids, "tokens": tokens, "logprobs": logprobs,
        "reason": "stop" if pieces.stopped else generation.reason, **settings,
        "prompt_seconds": begun - started, "tokens_per_second": (len(tokens) - 1) / (ended - begun) if len(tokens) > 1 else None,
        "steps": program.steps, "firing_rate": firing_rate, "context": program.info.context or None,
        "state_bytes": empty, "state_bytes_per_token": one - empty,
    }  # fmt: skip


def _load(folder: Path) -> tuple[Program, Any]:
    """A compiled folder or an original model, and its tokenizer."""
    from ntc import artifact
    from ntc.folders import MANIFEST
    from ntc.frontend import capture
    from ntc.loading import load_tokenizer

    is_compiled = (folder / MANIFEST).is_file()
    source = folder / "tokenizer" if is_compiled else folder
    program = artifact.load(folder) if is_compiled else capture(folder)
    tokenizer = load_tokenizer(source) if source.exists() or not folder.exists() else None
    if tokenizer is None:
        raise DataError(f"{folder} holds no tokenizer, so text cannot become tokens: use ntc.generate on token ids, from Python")
    return program, tokenizer


def _firing_rate(program: Program, ids: list[int]) -> float | None:
    """Spikes per neuron and step on all tokens that the program was given; None if nothing spikes."""
    import torch

    from ntc.observe import Activity, observe

    if not program.steps:
        return None
    activity = Activity(operations=False)
    observe(program, [torch.tensor([ids])], activity)
    populations = activity.populations.values()
    slots = sum(p.neurons * p.tokens * p.steps for p in populations)
    return sum(float(p.spikes.sum()) for p in populations) / slots if slots else None


def _figures(result: dict[str, Any]) -> Text:
    ends = {"length": "", "stop": "", "context": f"; the model's context of {result['context']} tokens is full"}
    speed = result["tokens_per_second"]
    said = f"{len(result['tokens'])} tokens" + (f", {speed:.1f} tokens/s" if speed else "") + ends[result["reason"]]
    if result["firing_rate"] is not None:
        said += f"; T = {result['steps']}, {percent(result['firing_rate'])} of the neurons fire at a step"
    return Text(said, "dim")
