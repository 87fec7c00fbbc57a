"""What counting costs: ``ntc energy`` on a text against a plain evaluation of the same program on the same tokens.

    python benchmarks/energy_counting.py [DIR ...] [--tokens 2048] [--rounds 5] [--profile]

DIR is a compiled folder; without one, the reference GPT-2 is compiled with recipes and steps that spike differently. *Plain* is the
perplexity of the program alone (``ntc.quality.perplexity``), *counting* is all of ``ntc.energy.measure_energy``: the same run with its
perplexity, spikes, operations and bytes, and the original counted by shapes. *Evaluate* is what ``ntc evaluate`` does: both networks,
compared. All run in one process in turns, and CPU time is compared, so that other work matters less; the least of the rounds counts.
What counting adds is told as a share of the plain run and of the evaluation. ``--profile`` says which ops the difference goes to.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc import artifact
from ntc.compiler import compile_model, default_calibration
from ntc.energy import measure_energy
from ntc.frontend import capture
from ntc.loading import load_tokenizer
from ntc.observe import Activity
from ntc.program import Program, interpret, op_name
from ntc.quality import evaluate, perplexity
from ntc.recipe import Settings
from ntc.text import Tokens, tokens_from

MODEL = Path("examples/gpt2-books")
TEXT = Path("examples/data/books-sample.txt")
COMPILED = (("neurtransformer", 2), ("neurtransformer", 4), ("neurtransformer", 8), ("sdllm", 4))
WINDOW, BATCH = 256, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {given.tokens:,} tokens of {TEXT}, CPU seconds")
    print(f"{'program':32} {'plain':>8} {'counting':>9} {'evaluate':>9} {'of plain':>9} {'of evaluate':>12}")
    original = capture(str(MODEL))
    for name, program, analog, tokens in programs(given.folders, given.tokens):
        plain, counting, whole = least(
            given.rounds, lambda p=program, t=tokens: perplexity(p, t, BATCH),
            lambda p=program, a=analog, t=tokens: measure_energy(p, a, t, batch=BATCH),
            lambda p=program, t=tokens: evaluate(p, original, t, batch=BATCH),
        )  # fmt: skip
        more = counting - plain
        print(f"{name:32} {plain:8.2f} {counting:9.2f} {whole:9.2f} {100 * more / plain:7.1f} % {100 * more / whole:10.1f} %", flush=True)
        if given.profile:
            profile(program, tokens, given.rounds)


def programs(folders: list[Path], number: int) -> Any:
    """Name, program, original and tokens of each."""
    tokenizer = load_tokenizer(str(MODEL))

    def with_tokens(name: str, program: Program, analog: Program | None) -> tuple[str, Program, Program, Tokens]:
        assert analog is not None, f"{name} has no analog.json"
        return name, program, analog, tokens_from(TEXT, tokenizer, WINDOW, number, program.info.vocab_size)

    for folder in folders:
        yield with_tokens(folder.name, artifact.load(folder), artifact.load_analog(folder))
    for recipe, steps in () if folders else COMPILED:
        done = compile_model(
            str(MODEL), recipe=recipe, settings=Settings(options={"steps": steps}), tokenizer=tokenizer,
            calibration=default_calibration(str(MODEL)),
        )  # fmt: skip
        yield with_tokens(f"{recipe}, T = {steps}", done.program, done.analog)


def least(rounds: int, *calls: Callable[[], object]) -> list[float]:
    """CPU seconds of each call, in turns; the first round warms up."""
    best = [float("inf")] * len(calls)
    for turn in range(rounds + 1):
        for i, call in enumerate(calls):
            start = time.process_time()
            call()
            best[i] = min(best[i], time.process_time() - start) if turn else best[i]
    return best


def profile(program: Program, tokens: Tokens, rounds: int) -> None:
    """CPU time of watching, by op, as a share of that of running all ops."""
    running: Counter[str] = Counter()
    watching: Counter[str] = Counter()
    for turn in range(rounds + 1):
        activity = Activity()
        mark = 0.0

        def visit(node: Node, args: tuple[Any, ...], value: Tensor, watched: Activity = activity) -> None:
            nonlocal mark
            begin = time.process_time()
            name = op_name(node.target)
            running[name] += begin - mark
            watched.visit(node, args, value)
            mark = time.process_time()
            watching[name] += mark - begin

        with torch.no_grad():
            for rows in tokens.batches(BATCH):
                activity.start(rows)
                mark = time.process_time()
                interpret(program, rows, visit)
        if not turn:
            running.clear()
            watching.clear()
    total = sum(running.values())
    for name, seconds in watching.most_common(8):
        print(f"    {name:30} {100 * running[name] / total:5.1f} % of the run, watching {100 * seconds / total:5.1f} %")


if __name__ == "__main__":
    main()
