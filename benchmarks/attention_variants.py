"""Spiking attention in its variants, before any training: normalisers, signs of Q, K and V, neurons, gains.

    python benchmarks/attention_variants.py --data books-valid.txt --tokens 32768 --markdown

Every variant is a set of options of replace-attention (VARIANTS), compiled from the same calibrated network and measured on the
same tokens, the FFN left analog unless --ffn spiking. Each finished row is a line of --output; a second run measures only what
is not there yet, so a run that was stopped goes on, and a variant that was added costs its own time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ntc.compiler import compile_model
from ntc.energy import measure_energy
from ntc.pipeline import Context, run_pipeline
from ntc.program import Program
from ntc.quality import evaluate
from ntc.recipe import Settings
from ntc.registry import find_pass, recipe
from ntc.text import Tokens, tokens_from
from ntc_passes.recipes import ATTENTION

TERNARY = {"signed_query": True, "signed_key": True, "signed_value": True}
BINARY = {"signed_query": False, "signed_key": False, "signed_value": False}
MIXED = {**BINARY, "signed_value": True}
NORMALIZERS = ("position", "learned-position", "leak", "channel-leak", "rms", "leak-rms", "row-sum")
CODES = {"": MIXED, ", binary": BINARY, ", ternary": TERNARY}

VARIANTS: dict[str, dict[str, Any]] = {
    "the recipe's": dict(ATTENTION),
    **{f"{n}{label}": {"normalizer": n, **signs} for label, signs in CODES.items() for n in NORMALIZERS},
    **{f"{n}, gain per head": {"normalizer": n, "gain": "head", **MIXED} for n in ("position", "leak", "leak-rms")},
    **{f"{n}, no output neuron": {"normalizer": n, "output": "current", **MIXED} for n in ("position", "leak-rms")},
    **{f"{n}, LIF": {"normalizer": n, "neuron": "lif", **BINARY} for n in ("position", "leak-rms")},
    **{f"leak-rms, {p}th percentile": {"normalizer": "leak-rms", "percentile": float(p), **MIXED} for p in (75, 99)},
}
"""Name and options of replace-attention; what they do not name is the pass's own default, whatever the recipe chooses."""

ROLES = ("q", "k", "v", "ssa")
COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "variant": lambda r: r["variant"],
    "perplexity": lambda r: f"{r['perplexity']:.2f}",
    "change": lambda r: f"{100 * r['perplexity_change']:+.1f} %",
    "cosine": lambda r: f"{r['cosine']:.4f}",
    "explained": lambda r: f"{r['explained']:.3f}",
    "firing rates q, k, v, ssa": lambda r: ", ".join("–" if r["rates"][k] is None else f"{r['rates'][k]:.2f}" for k in ROLES),
    "T·r": lambda r: "–" if r["steps_times_rate"] is None else f"{r['steps_times_rate']:.2f}",
    "energy saved": lambda r: _percent(r["energy_reduction"]),
    "streaming": lambda r: _percent(r["energy_reduction_streaming"]),
}


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def measure(program: Program, analog: Program, tokens: Tokens, energy_tokens: Tokens) -> dict[str, Any]:
    """The figures of one program."""
    q = evaluate(program, analog, tokens)
    energy = measure_energy(program, analog, energy_tokens).attention()
    explained = next(r for r in program.history if r.name == "replace-attention").notes
    streaming = energy["ssa_streaming_pj"]
    return {
        "perplexity": q.perplexity, "perplexity_ann": q.perplexity_ann, "perplexity_change": q.perplexity_change,
        "cosine": q.cosine, "top1_agreement": q.top1_agreement, "kl": q.kl,
        "explained": sum(explained["explained_variance"].values()) / len(explained["explained_variance"]),
        "explained_variance": explained["explained_variance"], "leaks": explained.get("leaks"),
        "rates": {role: _rate(q, role) for role in ROLES},
        "steps_times_rate": energy["steps_times_rate"], "energy_reduction": energy["reduction"],
        "energy_reduction_streaming": None if streaming is None else 1 - streaming / energy["asa_pj"],
    }  # fmt: skip


def _rate(quality: Any, role: str) -> float | None:
    """Spikes per neuron and step over all populations of a role."""
    chosen = [p for p in quality.populations if p.role == role]
    slots = sum(p.neurons * p.tokens * p.steps for p in chosen)
    return sum(float(p.spikes.sum()) for p in chosen) / slots if slots else None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Finished rows; a line that a stopped run left half-written is measured again."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if {"variant", "options", "measured_on"} <= row.keys():
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], markdown: bool) -> str:
    """Rows as a Markdown table, or as columns of text."""
    cells = [list(COLUMNS), *([show(r) for show in COLUMNS.values()] for r in rows)]
    if markdown:
        lines = [f"| {' | '.join(line)} |" for line in cells]
        return "\n".join([lines[0], "| --- " * len(COLUMNS) + "|", *lines[1:]])
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def main() -> None:
    root = Path(__file__).parents[1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(root / "examples" / "gpt2-books"))
    parser.add_argument("--calibration", type=Path, help="text; by default calibration.txt in the model's folder")
    parser.add_argument("--data", type=Path, required=True, help="text on which the variants are measured")
    parser.add_argument("--tokens", type=int, default=16384, help="so many tokens from its start")
    parser.add_argument("--energy-tokens", type=int, default=4096, help="of these, so many for counting operations")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--ffn", choices=("analog", "spiking"), default="analog")
    parser.add_argument("--only", action="append", metavar="NAME", choices=VARIANTS, help="this variant (may be given again)")
    parser.add_argument("--output", type=Path, default=root / "build" / "attention_variants.jsonl", help="finished rows")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print the rows as a JSON list")
    shown.add_argument("--markdown", action="store_true", help="print a Markdown table")
    args = parser.parse_args()

    chosen = recipe("neurtransformer")
    start = compile_model(args.model, recipe=chosen.until("calibrate"), calibration=args.calibration)
    rest = chosen.after("replace-attention") if args.ffn == "spiking" else chosen.after("replace-attention").without("convert-ffn")
    window = min(256, start.analog.info.context or 256)
    tokens, few = (tokens_from(args.data, start.tokenizer, window, n) for n in (args.tokens, min(args.tokens, args.energy_tokens)))
    context, settings = Context(start.calibration), {"steps": args.steps} if args.ffn == "spiking" else {}
    same = {
        "model": Path(args.model).name, "calibration": start.calibration.sha256, "data": tokens.sha256, "tokens": tokens.count,
        "energy_tokens": few.count, "steps": args.steps, "ffn": args.ffn,
    }  # fmt: skip
    done = {json.dumps([r["variant"], r["options"], r["measured_on"]], sort_keys=True): r for r in read_rows(args.output)}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in args.only or VARIANTS:
        attention = find_pass("replace-attention").configure({"steps": args.steps, **VARIANTS[name]})
        options = asdict(attention.options)
        key = json.dumps([name, options, same], sort_keys=True)
        if key not in done:
            program = run_pipeline(start.program, [attention, *rest.build(Settings(settings), find_pass)], context)
            done[key] = {"variant": name, "options": options, "measured_on": same, **measure(program, start.analog, tokens, few)}
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[key]) + "\n")
        rows.append(done[key])
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{same['model']} on {tokens.description}: perplexity {rows[0]['perplexity_ann']:.2f}; T = {args.steps}, FFN {args.ffn}\n")
    print(table(rows, args.markdown))


if __name__ == "__main__":
    main()
