"""What conversion alone costs, without fine-tuning: pass by pass, and for the FFN over the number of time steps.

    python benchmarks/conversion_quality.py examples/gpt2-books --data books-valid.txt --max-tokens 16384

Prints Markdown tables (docs/results.md holds a run). Every row is measured on the program it names, same tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ntc.compiler import compile_model
from ntc.pipeline import Context, run_pipeline
from ntc.program import Program
from ntc.quality import Quality, evaluate
from ntc.recipe import Settings
from ntc.registry import find_pass, recipe
from ntc.text import Tokens, tokens_from


def row(name: str, q: Quality) -> str:
    spikes = f"{q.firing_rate:.3f} | {q.events_per_value:.3f}" if q.steps else "– | –"
    return (
        f"| {name} | {q.perplexity:.2f} | {100 * q.perplexity_change:+.1f} % | {q.cosine:.4f} | {q.cosine_hidden:.4f} "
        f"| {q.top1_agreement:.3f} | {q.kl:.3f} | {spikes} |"
    )


COLUMNS = ("program", "perplexity", "change", "cosine", "cosine, hidden", "top-1", "KL [nats]", "firing rate", "events per value")
HEAD = f"| {' | '.join(COLUMNS)} |\n{'| --- ' * len(COLUMNS)}|"

# What the attention's options are compared with; said in full, so that the table does not depend on what the recipe chooses.
PLAIN = {"normalizer": "position", "signed_query": False, "signed_key": False, "signed_value": True, "output": "spikes"}


def pass_by_pass(analog: Program, context: Context, tokens: Tokens, steps: int) -> None:
    print(f"\n## Pass by pass, T = {steps}\n\n{HEAD}", flush=True)
    chosen = recipe("neurtransformer")
    passes = chosen.build(Settings({"steps": steps}), find_pass)
    program = analog
    print(row("original network", evaluate(analog, analog, tokens)), flush=True)
    for step in passes[1:]:
        program = run_pipeline(program, [step], context)
        if step.name in ("calibrate", "fold-thresholds"):
            continue  # they change no result
        kind = " (float limit)" if step.name != "insert-neurons" else f" (T = {steps})"
        print(row(f"after {step.name}{kind}", evaluate(program, analog, tokens)), flush=True)
    for title, without in (("attention alone", "convert-ffn"), ("FFN alone", "replace-attention")):
        alone = run_pipeline(analog, chosen.without(without).build(Settings({"steps": steps}), find_pass)[1:], context)
        print(row(f"{title} (T = {steps})", evaluate(alone, analog, tokens)), flush=True)


def attention_variants(analog: Program, context: Context, tokens: Tokens, steps: int) -> None:
    print(f"\n## Attention alone, its options, T = {steps}\n\n{HEAD}", flush=True)
    chosen = recipe("neurtransformer").without("convert-ffn")
    for label, options in (
        ("binary Q, K; ternary V; output neuron", {}),
        ("no output neuron", {"output": "current"}),
        ("binary V", {"signed_value": False}),
        ("thresholds at the 75th percentile", {"percentile": 75.0}),
        ("thresholds at the 99th percentile", {"percentile": 99.0}),
        ("twice the steps", {"steps": 2 * steps}),
    ):
        program = run_pipeline(analog, chosen.build(Settings({**PLAIN, "steps": steps, **options}), find_pass)[1:], context)
        print(row(label, evaluate(program, analog, tokens)), flush=True)


def ffn_curve(analog: Program, context: Context, tokens: Tokens, treatment: str) -> None:
    print(f"\n## FFN conversion alone, activation = {treatment}\n\n{HEAD}", flush=True)
    chosen, settings = recipe("ffn-only"), {"activation": treatment}
    limit = run_pipeline(analog, chosen.without("insert-neurons").build(Settings(settings), find_pass)[1:], context)
    for steps in (4, 8, 16, 32, 64):
        program = run_pipeline(analog, chosen.build(Settings({**settings, "steps": steps}), find_pass)[1:], context)
        print(row(f"T = {steps}", evaluate(program, analog, tokens, batch=2)), flush=True)
    print(row("float limit (T to infinity)", evaluate(limit, analog, tokens)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--max-tokens", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", choices=("passes", "attention", "ffn"), help="one of the tables")
    args = parser.parse_args()
    compiled = compile_model(args.model)
    window = min(256, compiled.analog.info.context or 256)
    tokens = tokens_from(args.data, compiled.tokenizer, window, args.max_tokens)
    context = Context(compiled.calibration)
    print(f"{args.model} on {tokens.description}; calibrated on {compiled.calibration.description}")
    if args.only in (None, "passes"):
        pass_by_pass(compiled.analog, context, tokens, args.steps)
    if args.only in (None, "attention"):
        attention_variants(compiled.analog, context, tokens, args.steps)
    for treatment in ("fit", "relu") if args.only in (None, "ffn") else ():
        ffn_curve(compiled.analog, context, tokens, treatment)


if __name__ == "__main__":
    main()
