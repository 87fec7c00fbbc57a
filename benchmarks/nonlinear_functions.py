"""What each nonlinear function costs when few-spikes neurons compute it: perplexity over the number of time steps, nothing else converted.

    python benchmarks/nonlinear_functions.py examples/gpt2-books --data books-valid.txt --max-tokens 512

Prints a Markdown table (docs/recipes.md holds a run). Every row is measured on the program it names, same tokens. A kind of function that
the model does not have is left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ntc.compiler import compile_model
from ntc.errors import NtcError
from ntc.pipeline import Context, run_pipeline
from ntc.quality import evaluate
from ntc.registry import recipe
from ntc.text import tokens_from
from ntc_passes.spike_functions import KINDS, SpikeFunctions

HEAD = "| function | T | intervals | perplexity | change | KL [nats] | events per value |\n" + "| --- " * 7 + "|"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 12, 16])
    parser.add_argument("--intervals", type=int, nargs="+", default=[32])
    args = parser.parse_args()
    compiled = compile_model(args.model, recipe=recipe("neurtransformer").until("calibrate"))
    analog, context = compiled.analog, Context(compiled.calibration)
    tokens = tokens_from(args.data, compiled.tokenizer, min(args.window, analog.info.context or args.window), args.max_tokens)
    print(f"original network: {evaluate(analog, analog, tokens).perplexity:.3f} on {tokens.windows.numel():,} tokens\n\n{HEAD}", flush=True)
    for kinds in (*((kind,) for kind in KINDS), KINDS):
        for intervals in args.intervals:
            for steps in args.steps:
                options = {**dict.fromkeys(kinds, "spiking"), "steps": steps, "intervals": intervals}
                program = run_pipeline(analog, [SpikeFunctions.configure(options)], context)
                if not program.history[-1].sites:
                    break
                q = evaluate(program, analog, tokens)
                name = kinds[0] if len(kinds) == 1 else "all"
                print(
                    f"| {name} | {steps} | {intervals} | {q.perplexity:.3f} | {100 * q.perplexity_change:+.3f} % | {q.kl:.2e} "
                    f"| {q.events_per_value:.2f} |", flush=True,
                )  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except NtcError as error:
        raise SystemExit(f"error: {error}") from error
