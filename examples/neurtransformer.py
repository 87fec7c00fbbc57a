r"""NeurTransformer (arXiv 2510.00133) in one script: makes a GPT-2 spiking in the paper's three steps and prints its table.

    1. softmax attention (ASA) becomes spiking self-attention (SSA)
    2. the feed-forward blocks become spiking, their thresholds folded into the weights
    3. the SSA blocks are fine-tuned with surrogate gradients, the original network being the teacher

    python examples/neurtransformer.py                                       # the reference GPT-2 and the texts that ship
    python examples/neurtransformer.py --train books-train.txt.xz --valid books-valid.txt --test books-test.txt --minutes 60
    python examples/neurtransformer.py --model gpt2-medium --train wikitext:wikitext-103-raw-v1 --calibration wiki.txt \
        --valid wiki-valid.txt --test wiki-test.txt --steps 4 --tokens 5000000 --finetune rows=8 --finetune lr=2e-4

For every number of time steps T: token-wise accuracy (share of next tokens that are the most likely one), cosine similarity of
the logits with the original's, perplexity, and the energy of SSA against ASA. The gap that the spikes leave is the one to the
original network after the same fine-tuning ("to tuned"). A run that was stopped goes on when the same command is given again: a T
that is done is not done again, and one in training goes on from its last checkpoint. OUT/T4/finetuned is for "ntc evaluate".
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import ntc
from ntc.cli.options import named_values
from ntc.compiler import default_calibration
from ntc.folders import is_artifact
from ntc.registry import find_pass, recipe
from ntc.text import Tokens, read_text, tokens_from
from ntc.training.checkpoint import remove
from ntc.training.config import with_options
from ntc.training.record import write_finetuned
from ntc.training.state import News

HERE = Path(__file__).parent
RECIPE = recipe("neurtransformer")
STEP_1, STEP_2, STEP_3, TUNED = "1: SSA", "2: spiking FFN", "3: fine-tuned", "original, tuned"

# Abstract of arXiv 2510.00133, for GPT-2 small. It says "5-12 % loss in cosine similarity and a 9.7 % reduction in perplexity"; the
# context reads as a degradation. Its T, texts and rows per model are not public. T r is what its energies imply (0.9 pJ, 4.6 pJ).
PAPER: dict[str, Any] = {
    "cosine": (0.88, 0.95), "perplexity_change": 0.097, "reduction": (0.6471, 0.8528), "steps_times_rate": (1.80, 0.75),
}  # fmt: skip
ENERGY_TOKENS = 4096  # rates are means over all neurons: more text changes the third digit

LOG = Console(stderr=True, highlight=False)
STATUS = LOG.status("calibrating")  # one line that tells what is going on; nothing where no terminal is


# ------------------------------------------------------------------------------------------------ the three steps

def convert(calibrated: ntc.Compilation, steps: int, options: dict[str, Any], *, ffn: bool) -> ntc.Compilation:
    """Steps 1 and 2: the rest of the recipe on the calibrated network, with or without what it does to the FFN."""
    chosen, settings = RECIPE if ffn else RECIPE.without("convert-ffn"), ntc.Settings({"steps": steps, **options})
    passes = chosen.after("calibrate").build(settings, find_pass)
    program = ntc.run_pipeline(calibrated.program, passes, ntc.Context(calibrated.calibration))
    return replace(calibrated, program=program, recipe=chosen, settings=settings)


def finetune(source: Path, out: Path, analog: ntc.Program, args: argparse.Namespace, shared: Path | None) -> None:
    """Step 3: train the program in ``source``, and the original on the same windows (or take it from ``shared``); both into ``out``."""
    work = out.with_suffix(".work")

    def news(n: News) -> None:
        if n.message and n.stage in ("warning", "resume"):
            LOG.print(n.message)
        figures = [f"{n.figures[k]:,.4g} {k.replace('_', ' ')}" for k in ("loss", "tokens_per_second", "seconds_left") if k in n.figures]
        STATUS.update(", ".join([f"{n.stage} {n.done}/{n.total}", *figures]))

    torch.compiler.reset()  # torch compiles one function for at most 8 networks, and then silently no more
    found = ntc.finetune(
        source, args.train, config=args.config, teacher=analog, validation=args.valid, work=work,
        baseline=shared is None, baseline_from=shared, news=news,
    )  # fmt: skip
    write_finetuned(found, out, source=source)
    remove(work)


def measure(program: ntc.Program, analog: ntc.Program, tuned: ntc.Program | None, tokens: Tokens, few: Tokens) -> dict[str, Any]:
    """Quality on the whole test text and energy on the start of it."""
    quality = ntc.evaluate(program, analog, tokens, tuned=tuned, progress=lambda i, n: STATUS.update(f"evaluate {i}/{n}")).to_json()
    energy = ntc.measure_energy(program, analog, few).attention()
    return {k: v for k, v in quality.items() if k not in ("layers", "populations")} | {"energy": energy}


def reproduce(steps: int, calibrate: Callable[[], ntc.Compilation], args: argparse.Namespace) -> dict[str, Any]:
    """All three steps for one T; what is finished is read from ``args.out``."""
    place, done = args.out / f"T{steps}", args.out / f"T{steps}.json"
    found: dict[str, Any] = {"steps": steps}
    if done.is_file():
        found |= json.loads(done.read_text(encoding="utf-8"))
        return found
    calibrated = calibrate()
    analog = calibrated.analog
    window = args.config.fitting(analog.info.context).window
    tokens, few = (
        tokens_from(args.test, calibrated.tokenizer, window, most, analog.info.vocab_size)
        for most in (args.test_tokens, min(args.test_tokens or ENERGY_TOKENS, ENERGY_TOKENS))
    )
    LOG.print(f"T = {steps}, step 1: attention becomes SSA")
    found[STEP_1] = measure(convert(calibrated, steps, args.convert, ffn=False).program, analog, None, tokens, few)
    LOG.print(f"T = {steps}, step 2: the FFN becomes spiking")
    if not is_artifact(place / "converted"):
        ntc.write(convert(calibrated, steps, args.convert, ffn=True), place / "converted")
    found[STEP_2] = measure(ntc.load(place / "converted"), analog, None, tokens, few)
    LOG.print(f"T = {steps}, step 3: fine-tuning, group {args.config.group}; log in {place / 'finetuned.work'}")
    if not is_artifact(place / "finetuned"):
        # With a budget of tokens the original is trained alike for every T, and so once.
        others = [] if args.config.max_minutes else sorted(args.out.glob("T*/finetuned/baseline"))
        finetune(place / "converted", place / "finetuned", analog, args, others[0] if others else None)
    program, tuned = ntc.load(place / "finetuned"), ntc.load(place / "finetuned" / "baseline")
    found[STEP_3] = measure(program, analog, tuned, tokens, few)
    write_text(done, json.dumps(found, indent=1))
    return found


# ------------------------------------------------------------------------------------------------ the table

COLUMNS = ("T", "network", "accuracy", "top-1", "cosine", "perplexity", "change", "to tuned", "energy", "T·r")


def number(value: float | None, form: str = ".3f") -> str:
    """A figure; a dash where there is none."""
    return "–" if value is None else f"{value:{form}}"


def table(results: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of the paper's table; ``change`` is that of the perplexity, ``energy`` that of SSA against ASA."""
    q = results[0][STEP_3]
    rows = [["–", "original", number(q["accuracy_ann"]), "1.000", "1.0000", number(q["perplexity_ann"], ".2f"), *"––––"]]
    for found in results:
        for name in (STEP_1, STEP_2, STEP_3):
            q, energy = found[name], found[name]["energy"]
            alike = number(q["accuracy"]), number(q["top1_agreement"]), number(q["cosine"], ".4f"), number(q["perplexity"], ".2f")
            changes = (number(q[key], "+.1%") for key in ("perplexity_change", "perplexity_change_tuned"))
            cost = number(energy["reduction"] and -energy["reduction"], "+.1%"), number(energy["steps_times_rate"])
            rows.append([str(found["steps"]), name, *alike, *changes, *cost])
        change = number(q["perplexity_tuned"] / q["perplexity_ann"] - 1, "+.1%")
        tuned = number(q["accuracy_tuned"]), "–", "–", number(q["perplexity_tuned"], ".2f")
        rows.append([str(found["steps"]), TUNED, *tuned, change, *"–––"])
    saved = "{:.1%} to {:.1%}".format(*(-share for share in PAPER["reduction"]))
    cosine, rate = ("{} to {}".format(*PAPER[key]) for key in ("cosine", "steps_times_rate"))
    return [*rows, ["?", "the paper's", "–", "–", cosine, "–", number(PAPER["perplexity_change"], "+.1%"), "–", saved, rate]]


def text_of(rows: list[list[str]], *, markdown: bool) -> str:
    """The table with aligned columns."""
    lines = [list(COLUMNS), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    if markdown:
        lines.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(w) if i == 1 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" if markdown else f"{'  '.join(line)}\n" for line in padded)


# ------------------------------------------------------------------------------------------------ the command

def parse() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(HERE / "gpt2-books"), help="folder, or gpt2, gpt2-medium, gpt2-large [default: the reference]")
    p.add_argument("--train", action="append", help="training text: file, folder, glob, hub data set; may be repeated [default: a sample]")
    p.add_argument("--valid", type=Path, help="validation text [default: the end of the training text, held out]")
    p.add_argument("--test", type=Path, default=HERE / "data" / "books-sample.txt", help="text to measure on [default: a sample]")
    p.add_argument("--calibration", type=Path, help="text for thresholds [default: the model's calibration.txt, else the training text]")
    p.add_argument("--test-tokens", type=int, help="measure on so many tokens from its start [default: all]")
    p.add_argument("--steps", type=numbers, default="1,2,4,8", help="numbers of time steps T [default: %(default)s]")
    budget = p.add_mutually_exclusive_group()
    budget.add_argument("--tokens", type=int, default=262_144, help="train on so many, for each T [default: %(default)s]")
    budget.add_argument("--minutes", type=float, help="train for so long instead, for each T; the original in as many steps")
    p.add_argument("--group", default="ssa", choices=("ssa", "ffn", "all"), help="what is trained [default: %(default)s, the paper's]")
    p.add_argument("--convert", action="append", default=[], metavar="KEY=VALUE", help="option of the conversion, such as normalizer=leak")
    p.add_argument("--finetune", action="append", default=[], metavar="KEY=VALUE", help="option of the training, such as lr=5e-4")
    p.add_argument("--out", type=Path, default=Path("build/neurtransformer"), help="folder for programs and figures [default: %(default)s]")
    p.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    p.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    args = p.parse_args()
    args.train = args.train or [str(HERE / "gpt2-books" / "calibration.txt")]
    args.calibration = args.calibration or default_calibration(args.model) or Path(args.train[0])
    args.convert = named_values("--convert", args.convert)
    given = {"max_tokens": None if args.minutes else args.tokens, "max_minutes": args.minutes, "group": args.group}
    args.config = with_options(ntc.TrainingConfig(), given | named_values("--finetune", args.finetune))
    return args


def numbers(text: str) -> list[int]:
    """``1,2,4`` as numbers."""
    return [int(t) for t in text.split(",")]


def write_text(path: Path, text: str) -> None:
    """Write beside, then rename: a kill leaves no half of it."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def settled(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures in ``args.out`` depend on; figures of another run are not mixed with these."""
    names = ("model", "train", "valid", "test", "calibration", "test_tokens", "convert")
    asked: dict[str, Any] = json.loads(json.dumps({name: getattr(args, name) for name in names} | args.config.to_json(), default=str))
    path = args.out / "settings.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else asked
    if other := [f"{k} = {before.get(k)}" for k in asked if before.get(k) != asked[k]]:
        raise ntc.ConfigError(f"{args.out} holds figures of a run with {', '.join(other)}: give the same again, or another --out")
    for text in filter(None, (args.calibration, args.test, args.valid)):
        read_text(text)  # what cannot be read should be known now
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asked, indent=1))
    return asked


def main() -> None:
    """Calibrate once, convert and fine-tune for every T, print the table."""
    args = parse()
    settings = settled(args)
    calibrate = cache(lambda: ntc.compile(args.model, recipe=RECIPE.until("calibrate"), calibration=args.calibration))
    with STATUS:
        results = [reproduce(steps, calibrate, args) for steps in args.steps]
    figures = json.dumps({"settings": settings, "paper": PAPER, "results": results}, indent=1) + "\n"
    write_text(args.out / "results.json", figures)
    write_text(args.out / "results.md", text_of(table(results), markdown=True))
    print(figures if args.json else text_of(table(results), markdown=args.markdown), end="")


if __name__ == "__main__":
    try:
        main()
    except ntc.NtcError as error:
        sys.exit(f"neurtransformer: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on where it was")
