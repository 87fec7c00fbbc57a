"""What each nonlinear function costs when few-spikes neurons compute it: perplexity over the number of time steps.

    python benchmarks/nonlinear_functions.py examples/gpt2-books --data books-valid.txt --max-tokens 512
    python benchmarks/nonlinear_functions.py SmolLM2-135M.gguf --data wikitext2-test.txt --calibration wikitext2-valid.txt --rotate \
        --window 512 --max-tokens 2048 --steps 8 --recipe lossless-spiking

Prints a Markdown table (docs/recipes.md holds runs of it). One row for each kind of function alone, nothing else converted, and one for all
of them; with --recipe one for a whole recipe, for each T of --steps. Every row is measured on the program that it names, same tokens, the
original in the same run. A kind of function that the model does not have is left out. With --rotate the network is first brought to the
form that the recipe ``lossless`` codes, exactly: folded norms, a rotated residual stream.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from ntc.compiler import compile_model, default_calibration
from ntc.errors import NtcError
from ntc.frontend import capture
from ntc.loading import load_tokenizer
from ntc.pipeline import Context, run_pipeline
from ntc.program import Program
from ntc.quality import Quality, evaluate
from ntc.recipe import Settings
from ntc.registry import find_pass, recipe
from ntc.text import calibration_from, tokens_from
from ntc_passes.spike_functions import KINDS, SpikeFunctions

HEAD = "| spiking | T | intervals | perplexity | change | KL [nats] | events per value |\n" + "| --- " * 7 + "|"
FORM: tuple[tuple[str, dict[str, str]], ...] = (("fold-norms", {}), ("rotate", {"online": "ffn"}))  # of the recipe lossless


def programs(analog: Program, context: Context, args: argparse.Namespace) -> Iterator[tuple[str, int, int, Program]]:
    """Name, T and intervals of each row, and its program."""
    settings = [(intervals, steps) for intervals in args.intervals for steps in args.steps]
    start = run_pipeline(analog, [find_pass(name).configure(options) for name, options in FORM]) if args.rotate else analog
    for name in args.kinds:
        kinds = KINDS if name == "all" else (name,)
        for intervals, steps in settings:
            options = {**dict.fromkeys(kinds, "spiking"), "steps": steps, "intervals": intervals}
            program = run_pipeline(start, [SpikeFunctions.configure(options)], context)
            if not program.history[-1].sites:
                break
            yield name, steps, intervals, program
    for name in args.recipe:
        for intervals, steps in settings:
            chosen = recipe(name).without("canonicalize")
            given = {"steps": steps}
            if any(step.name == SpikeFunctions.name for step in chosen.steps):
                given["spike-functions.intervals"] = intervals
            made = compile_model(analog, recipe=chosen, settings=Settings(given), calibration=context.calibration)
            yield name, steps, intervals, made.program


def line(name: str, steps: int, intervals: int, q: Quality) -> str:
    """One row of the table."""
    change = f"{100 * q.perplexity_change:+.3f} %"
    return f"| {name} | {steps} | {intervals} | {q.perplexity:.3f} | {change} | {q.kl:.2e} | {q.events_per_value:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, help="text for what is calibrated; that of the model's folder if there is one")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 12, 16])
    parser.add_argument("--intervals", type=int, nargs="+", default=[32])
    parser.add_argument("--kinds", nargs="*", choices=(*KINDS, "all"), default=[*KINDS, "all"])
    parser.add_argument("--recipe", nargs="*", default=[], help="recipes that are measured as a whole")
    parser.add_argument("--rotate", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer, text = load_tokenizer(args.model), args.calibration or default_calibration(args.model)
    calibration = calibration_from(tokens_from(text, tokenizer, args.window, 4096)) if text else None
    analog = run_pipeline(capture(args.model), [find_pass("canonicalize")()])
    tokens = tokens_from(args.data, tokenizer, min(args.window, analog.info.context or args.window), args.max_tokens)
    print(f"{tokens.description}; calibration: {calibration.description if calibration else 'none'}", flush=True)
    head = HEAD
    for name, steps, intervals, program in programs(analog, Context(calibration), args):
        q = evaluate(program, analog, tokens, batch=1)
        if head:
            print(f"original network: {q.perplexity_ann:.3f}\n\n{head}", flush=True)
        head = ""
        print(line(name, steps, intervals, q), flush=True)


if __name__ == "__main__":
    try:
        main()
    except NtcError as error:
        raise SystemExit(f"error: {error}") from error
