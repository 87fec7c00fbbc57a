"""Recipes that need no training, over time steps: perplexity, events per value, energy, what stays analog.

    python benchmarks/recipes.py SmolLM2-135M.gguf --data wikitext2-test.txt --calibration wikitext2-valid.txt --output recipes.jsonl
    python benchmarks/recipes.py examples/gpt2-books --data books-valid.txt --only lossless --steps 4,5 --windows 16 --markdown

Every row is a recipe with settings, run on the same captured network and measured on the same windows as the original: perplexity on all of
them, with the interval of its change (paired bootstrap over windows), operations, events and energy on the first --count-windows.
Calibration text is read by what asks for it. Each finished row is a line of --output; a second run measures only what is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from ntc.bootstrap import bootstrap_means, percentile_interval
from ntc.compiler import compile_model
from ntc.energy import measure_energy
from ntc.frontend import capture
from ntc.loading import load_tokenizer
from ntc.pipeline import run_pipeline
from ntc.program import Program
from ntc.recipe import Settings
from ntc.registry import find_pass
from ntc.registry import recipe as find_recipe
from ntc.text import Tokens, calibration_from, tokens_from


@dataclass(frozen=True)
class Row:
    """One program.

    Attributes:
        label: What the table calls it.
        recipe: Name of its recipe.
        steps: T.
        without: Passes that are left out.
        options: Settings beside T.
    """

    label: str
    recipe: str
    steps: int
    without: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.label}, T = {self.steps}"


def rows(steps: list[int]) -> Iterator[Row]:
    """All rows, the most wanted ones first."""
    for t in steps:
        yield Row("lossless", "lossless", t)
    yield Row("lossless, static", "lossless", 8, options={"scale": "static"})
    for events in (1.75, 1.5, 1.2):
        yield Row(f"lossless-sparse, {events:g} events", "lossless-sparse", 6, options={"events": events})
    for t in steps:
        yield Row("lossless, linear layers only", "lossless", t, without=("spike-products",))
    yield Row("sdllm", "sdllm", 7)
    yield Row("phase", "phase", 8)
    yield Row("las", "las", 16)
    for t in steps:
        yield Row("lossless, learned bases", "lossless", t, options={"base": "learned"})
    yield Row("lossless, per channel", "lossless", 8, options={"scale": "channel"})
    for t, price in ((6, 0.9), (6, 0.0), (5, 0.0), (5, 0.5)):
        yield Row(f"lossless, base 2, price {price:g}", "lossless", t, options={"base": 2.0, "price": price, "probability_steps": 4})
    for t in steps:
        yield Row("sdllm, phase", "sdllm", t, options={"code": "phase"})


def losses(program: Program, tokens: Tokens) -> torch.Tensor:
    """Mean next-token cross entropy of each window."""
    found = []
    with torch.no_grad():
        for ids in tokens.batches(1):
            logits = program(ids)[:, :-1]
            found.append(functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).double())
    return torch.stack(found)


def measure(row: Row, program: Program, analog: Program, tokens: Tokens, counted: Tokens, original: torch.Tensor) -> dict[str, Any]:
    """One row of the table."""
    started = time.process_time()
    ours = losses(program, tokens)
    seconds = time.process_time() - started
    ratios = (bootstrap_means(torch.stack([ours, original], 1)) @ torch.tensor([1.0, -1.0], dtype=torch.float64)).exp() - 1
    report = measure_energy(program, analog, counted, batch=1)
    total = report.to_json()["total"]
    spiking, dense = total["snn"], total["ann"]["dense_macs"]
    kinds = {kind["kind"]: kind for kind in report.to_json()["kinds"]}
    return {
        "key": row.key, "label": row.label, "recipe": row.recipe, "steps": row.steps, "options": dict(row.options),
        "without": list(row.without), "tokens": int(tokens.windows.numel()), "window": int(tokens.windows.shape[1]),
        "data": tokens.description, "counted_tokens": int(counted.windows.numel()),
        "perplexity": math.exp(float(ours.mean())), "perplexity_ann": math.exp(float(original.mean())),
        "change": math.exp(float(ours.mean() - original.mean())) - 1, "change_interval": list(percentile_interval(ratios)),
        "firing_rate": report.firing_rate, "events_per_value": _per_value(report), "analog_share": spiking["macs"] / dense,
        "acs_per_mac": spiking["acs"] / dense, "total": total, "kinds": kinds, "cpu_seconds": seconds,
    }  # fmt: skip


def _per_value(report: Any) -> dict[str, float]:
    """Spikes over coded values: of all, and of the two groups that they fall into."""
    groups = {"all": [0.0, 0.0], "linear layers": [0.0, 0.0], "attention": [0.0, 0.0]}
    for node in report.to_json()["nodes"]["snn"]:
        if node.get("neurons"):
            inside = node["op"] == "ntc.coded_attention" or node["node"].endswith(("_q_spikes", "_k_spikes", "_v_spikes"))
            for group in ("all", "attention" if inside else "linear layers"):
                groups[group][0] += node.get("spikes", 0.0)
                groups[group][1] += node["neurons"]
    return {name: spikes / values for name, (spikes, values) in groups.items() if values}


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown."""
    events = "events per value: all, linear, attention"
    columns = ("recipe", "T", "perplexity", "change", "95 %", events, "ACs per MAC", "analog MACs", "energy")
    head = f"| {' | '.join(columns)} |"
    out = [head, "|" + " --- |" * 9]
    for d in lines:
        events = ", ".join(f"{d['events_per_value'].get(k, float('nan')):.2f}" for k in ("all", "linear layers", "attention"))
        low, high = d["change_interval"]
        out.append(
            f"| {d['label']} | {d['steps']} | {d['perplexity']:.2f} | {100 * d['change']:+.2f} % | {100 * low:+.2f} ... {100 * high:+.2f} "
            f"| {events} | {d['acs_per_mac']:.2f} | {100 * d['analog_share']:.1f} % | {-100 * d['total']['reduction']:+.1f} % |"
        )
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True, help="text to measure on")
    parser.add_argument("--calibration", type=Path, help="text for what is calibrated; never the one that is measured on")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--count-windows", type=int, default=2)
    parser.add_argument("--steps", default="4,5,6,8", help="T of the recipes that are measured over T")
    parser.add_argument("--only", help="rows whose label begins so; several with ;")
    parser.add_argument("--output", type=Path, default=Path("recipes.jsonl"))
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    done = {d["key"]: d for d in map(json.loads, args.output.read_text().splitlines())} if args.output.exists() else {}
    wanted = [r for r in rows([int(t) for t in args.steps.split(",")]) if not args.only or any(r.label == o for o in args.only.split(";"))]
    if any(r.key not in done for r in wanted):
        network, tokenizer = capture(args.model), load_tokenizer(args.model)
        analog = run_pipeline(network, [find_pass("canonicalize")()])
        tokens = tokens_from(args.data, tokenizer, args.window, args.window * args.windows)
        counted = Tokens(tokens.windows[: args.count_windows], tokens.description, hashlib.sha256(b"").hexdigest())
        calibration = None
        if args.calibration:
            calibration = calibration_from(tokens_from(args.calibration, tokenizer, args.window, 4096))
        original = losses(analog, tokens)
        print(f"original: {math.exp(float(original.mean())):.4f} on {tokens.description}", flush=True)
        for row in wanted:
            if row.key in done:
                continue
            settings = Settings(options={**row.options, "steps": row.steps})
            chosen = find_recipe(row.recipe)
            for name in row.without:
                chosen = chosen.without(name)
            made = compile_model(
                analog, recipe=chosen.without("canonicalize"), settings=settings, calibration=calibration, tokenizer=tokenizer
            )  # fmt: skip
            done[row.key] = measure(row, made.program, made.analog, tokens, counted, original)
            with args.output.open("a") as lines:
                lines.write(json.dumps(done[row.key]) + "\n")
            print(table([done[row.key]]).splitlines()[-1], flush=True)
    if args.markdown:
        print(table([done[r.key] for r in wanted if r.key in done]))


if __name__ == "__main__":
    main()
