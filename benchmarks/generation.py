"""What does one more token cost, after how many tokens? Spiking attention with its memory against softmax attention with a cache.

    python benchmarks/generation.py --markdown --plot docs/generation
    python benchmarks/generation.py --contexts 100,1000 --width 128 --layers 2 --rounds 5 --json

One network with random weights (a GPT-2 with room for the longest context) in two streaming forms: the recipe's spiking program, and
the original. Both read a text of random tokens up to each context; then single tokens are timed in turns, all contexts and both
forms in each round, so that the noise of a shared machine meets all of them. The time is CPU time of one thread. A ratio is the median
over the rounds of time : time at the shortest context; beside it the quartiles. The cache grows by concatenation, as that of
transformers does, and copying it is part of a token's time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

import ntc
from ntc.generation import streaming_form
from ntc.program import Program
from ntc.recipe import Settings
from ntc.streaming import Stream
from ntc.testing import tiny_gpt2
from ntc.text import random_tokens

CONTEXTS = (100, 200, 500, 1000, 2000, 4000, 8000)
SPIKING, SOFTMAX = "spiking attention", "softmax attention, cache"
_PIECE = 250

Row = dict[str, Any]


def programs(options: argparse.Namespace) -> dict[str, Program]:
    """The two streaming forms of one network."""
    longest, sizes = max(options.contexts) + 1, {"n_layer": options.layers, "n_embd": options.width, "n_head": options.heads}
    model = tiny_gpt2(**sizes, vocab_size=options.vocabulary, n_positions=longest)
    calibration = random_tokens(options.vocabulary, min(128, longest), 512)
    made = ntc.compile(model, recipe=options.recipe, settings=Settings({"steps": options.steps}), calibration=calibration)
    return {SPIKING: streaming_form(made.program), SOFTMAX: streaming_form(made.analog)}


def read(program: Program, ids: Tensor, contexts: Sequence[int]) -> dict[int, Stream]:
    """The state after each context."""
    stream, found = Stream(program), {}
    for context in contexts:
        while stream.position < context:
            stream(ids[:, stream.position : min(stream.position + _PIECE, context)])
        found[context] = stream.fork()
    return found


def timed(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def measure(forms: dict[str, Program], contexts: Sequence[int], rounds: int) -> list[Row]:
    """Seconds of each round, by form and context."""
    vocabulary = next(iter(forms.values())).info.vocab_size
    ids = torch.randint(0, vocabulary, (1, max(contexts) + 1), generator=torch.Generator().manual_seed(0))
    streams = {name: read(program, ids, contexts) for name, program in forms.items()}
    seconds: dict[tuple[str, int], list[float]] = {}
    for number in range(rounds + 1):
        for name, by_context in streams.items():
            for context, stream in by_context.items():
                other = stream.fork()
                token = ids[:, context : context + 1]
                other(token)  # brings its state into the cache, and that of the one before out of it
                other = stream.fork()
                taken = timed(lambda other=other, token=token: other(token))
                if number:  # the first round warms up
                    seconds.setdefault((name, context), []).append(taken)
    return [row(name, context, seconds, min(contexts), streams[name][context]) for name, context in seconds]


def row(name: str, context: int, seconds: dict[tuple[str, int], list[float]], first: int, stream: Stream) -> Row:
    here, shortest = seconds[name, context], seconds[name, first]
    ratios = [a / b for a, b in zip(here, shortest, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    against = [a / b for a, b in zip(here, seconds[SPIKING, context], strict=True)]
    return {
        "form": name, "context": context, "milliseconds": 1e3 * statistics.median(here), "ratio": statistics.median(ratios),
        "ratio_quartiles": [quartiles[0], quartiles[2]], "against_spiking": statistics.median(against),
        "state_bytes": sum(value.numel() * value.element_size() for value in stream.state),
    }  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    lines = ["| tokens so far | spiking: time | state | softmax: time | state | softmax : spiking |", "| --- " * 6 + "|"]
    for spiking in (r for r in rows if r["form"] == SPIKING):
        (softmax,) = (r for r in rows if r["form"] == SOFTMAX and r["context"] == spiking["context"])
        cells = [f"{spiking['context']:,}"]
        for r in (spiking, softmax):
            low, high = r["ratio_quartiles"]
            cells += [f"{r['ratio']:.2f} ({low:.2f} ... {high:.2f})", f"{r['state_bytes'] / 1e6:,.2f} MB"]
        cells.append(f"{softmax['against_spiking']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> Path:
    """Time of a token against the context, both in the time of the spiking program at the shortest one."""
    style = {"svg.hashsalt": "ntc", "font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        unit = min(r["milliseconds"] for r in rows if r["form"] == SPIKING and r["context"] == min(x["context"] for x in rows))
        for name, color in ((SPIKING, "#0072b2"), (SOFTMAX, "#d55e00")):
            chosen = [r for r in rows if r["form"] == name]
            axes.plot([r["context"] for r in chosen], [r["milliseconds"] / unit for r in chosen], "o-", color=color, label=name)
        axes.set(xlabel="tokens so far", ylabel="time of the next token", xscale="log", ylim=(0, None))
        axes.set_xticks(sorted({r["context"] for r in rows}), [f"{c:,}" for c in sorted({r["context"] for r in rows})])
        axes.minorticks_off()
        axes.legend(frameon=False)
        target = path.with_suffix(".svg")
        figure.savefig(target, metadata={"Date": None, "Creator": None})
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=lambda text: tuple(sorted(int(part) for part in text.split(","))), default=CONTEXTS)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=4, help="T")
    parser.add_argument("--recipe", default="neurtransformer")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--markdown", action="store_true", help="print a table")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", type=Path, help="write PLOT.svg")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(programs(options), options.contexts, options.rounds)
    sizes = {key: getattr(options, key) for key in ("layers", "width", "heads", "vocabulary", "steps", "recipe", "rounds")}
    if options.json:
        print(json.dumps({"network": sizes, "rows": rows}, indent=1))
    if options.markdown or not options.json:
        print(markdown(rows))
    if options.plot:
        print(f"wrote {plot(rows, options.plot)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
