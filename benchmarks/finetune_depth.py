"""Does the loss of conversion grow with depth? Narrow GPT-2s of 2, 4, 8 and 12 layers, trained, compiled and fine-tuned alike.

    python benchmarks/finetune_depth.py --train books-train.txt.xz --valid books-valid.txt --test books-test.txt \\
        --work build/depth > build/depth.md 2>> build/depth.log &

Per depth, in --work: L4 (the model, by examples/train_gpt2.py, with the reference model's tokenizer), L4.work (its checkpoints),
L4.converted, L4.finetuned (program and, in baseline/, the original after the same fine-tuning) and L4.json (the figures). What is
there is not done again, and a training that was stopped goes on from its last checkpoint: the same command goes on in all cases.
Says on standard error what it does, a line per stage, and prints the table; depth.md, .json, .png and .svg are in --work.

The measure is the relative perplexity: program / original fine-tuned equally - 1. The paper (NeurTransformer, arXiv 2510.00133)
fails above 300 M parameters, its error growing with depth; the aim is that 12 layers lose at most twice what 4 layers lose.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import ntc
from ntc.cli.options import named_values
from ntc.figures import Point, write_scatter
from ntc.folders import is_artifact
from ntc.loading import load_tokenizer
from ntc.recipe import Settings
from ntc.text import read_text, tokens_from
from ntc.training.checkpoint import remove
from ntc.training.config import TrainingConfig, with_options
from ntc.training.prepare import network_from
from ntc.training.record import write_finetuned
from ntc.training.state import News

ROOT = Path(__file__).parents[1]
TRAINER, REFERENCE = ROOT / "examples" / "train_gpt2.py", ROOT / "examples" / "gpt2-books"
TOKENIZER, TOKENS = ("tokenizer.json", "tokenizer_config.json"), "train-tokens.npy"
ENERGY_TOKENS = 4096


def log(message: str) -> None:
    """One line with the time of day: what runs in the background is read afterwards."""
    print(f"{time.strftime('%H:%M:%S')}  {message}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------ models


def model_of(layers: int, args: argparse.Namespace) -> Path:
    """The GPT-2 with so many layers, trained unless it is there."""
    folder: Path = args.work
    out, work = folder / f"L{layers}", folder / f"L{layers}.work"
    if (out / "config.json").is_file():
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        asked = {"n_layer": layers, "n_embd": args.width, "n_head": args.heads, "n_positions": args.context}
        if other := [f"{k} = {config.get(k)}" for k, v in asked.items() if config.get(k) != v]:
            raise ntc.ConfigError(f"the model in {out} has {', '.join(other)}: give the same again, or another --work")
        return out
    work.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER:  # the second one says that the tokenizer is complete
        shutil.copy(REFERENCE / name, work)
    if not (work / TOKENS).exists():
        for packed in sorted(args.work.glob(f"*.work/{TOKENS}"))[:1]:  # all depths read the same text
            shutil.copy(packed, work / f"{TOKENS}.part")
            os.replace(work / f"{TOKENS}.part", work / TOKENS)
    steps = max(1, round(args.pretrain_tokens / (args.batch * args.context)))
    options = {
        "text": args.train, "valid": args.valid, "test": args.test, "out": out, "work": work, "layers": layers, "width": args.width,
        "heads": args.heads, "context": args.context, "batch": args.batch, "steps": steps, "warmup": min(200, max(1, steps // 5)),
        "every": min(200, steps),
    }  # fmt: skip
    command = [sys.executable, str(TRAINER), *(str(x) for name, value in options.items() for x in (f"--{name}", value))]
    log(f"{layers} layers: training {steps} steps; {work / 'training.jsonl'} grows")
    done = subprocess.run([*command, *(["--no-compile"] if args.no_compile else [])], stdout=2, check=False)  # 2: standard error
    if done.returncode:
        raise ntc.TrainingError(f"the training of {out} ended with status {done.returncode}: its message is above")
    return out


# ------------------------------------------------------------------------------------------------ one depth


def measure(layers: int, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of one depth; read from its file if they are there."""
    done, folder = args.work / f"L{layers}.json", args.work / f"L{layers}"
    if done.is_file():
        found: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        return found
    model = model_of(layers, args)
    converted, finetuned = (folder.with_name(f"{folder.name}.{what}") for what in ("converted", "finetuned"))
    if not is_artifact(converted):
        log(f"{layers} layers: compiling")
        ntc.write(ntc.compile(model, settings=Settings({"steps": args.steps, **args.convert})), converted)
    analog = network_from(model)
    if not is_artifact(finetuned):
        log(f"{layers} layers: fine-tuning program and original, group {args.config.group}")
        torch.compiler.reset()  # torch compiles one function for at most 8 networks, and then silently no more
        work = folder.with_name(f"{folder.name}.finetuning")
        result = ntc.finetune(
            converted, args.train, config=args.config, teacher=analog, validation=args.valid, work=work, baseline=True, news=narrator()
        )
        write_finetuned(result, finetuned, source=converted)
        remove(work)
    log(f"{layers} layers: measuring")
    tokens, few = (
        tokens_from(args.test, load_tokenizer(model), args.config.fitting(analog.info.context).window or 0, most)
        for most in (args.test_tokens, min(ENERGY_TOKENS, args.test_tokens or ENERGY_TOKENS))
    )
    before, program, tuned = ntc.load(converted), ntc.load(finetuned), ntc.load(finetuned / "baseline")
    quality = [ntc.evaluate(p, analog, tokens, tuned=tuned).to_json() for p in (before, program)]
    plain = [{k: v for k, v in q.items() if k not in ("populations", "layers")} for q in quality]
    found = {
        "layers": layers, "parameters": analog.info.parameters, "converted": plain[0], "finetuned": plain[1],
        "by_layer": quality[1]["layers"], "energy": ntc.measure_energy(program, analog, few).attention(),
    }  # fmt: skip
    _write(done, json.dumps(found, indent=1) + "\n")
    change, (low, high) = plain[1]["perplexity_change_tuned"], _interval(plain[1])
    log(f"{layers} layers: {change:+.1%} against the original fine-tuned equally [{low:+.1%}, {high:+.1%}]")
    return found


def narrator() -> Callable[[News], None]:
    """Logs every validation of a run, once."""
    known: dict[str, float] = {}

    def tell(news: News) -> None:
        if news.message and news.stage in ("resume", "warning"):
            log(f"  {news.message}")
        perplexity = news.figures.get("valid_perplexity")
        if news.stage.endswith("train") and perplexity is not None and known.get(news.stage) != perplexity:
            known[news.stage] = perplexity
            speed = news.figures.get("tokens_per_second", 0.0)
            log(f"  {news.stage} {news.done}/{news.total}, validation perplexity {perplexity:.2f}, {speed:,.0f} tokens/s")

    return tell


def settled(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures in ``args.work`` depend on; figures of another run are not mixed with these."""
    names = ("train", "valid", "test", "width", "heads", "context", "batch", "pretrain_tokens", "steps", "convert", "test_tokens")
    named = {name: getattr(args, name) for name in names} | {f"finetune.{k}": v for k, v in args.config.to_json().items()}
    asked: dict[str, Any] = json.loads(json.dumps(named, default=str))
    path = args.work / "settings.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else asked
    if other := [f"{k} = {before.get(k)}" for k in asked if before.get(k) != asked[k]]:
        raise ntc.ConfigError(f"{args.work} holds figures of a run with {', '.join(other)}: give the same again, or another --work")
    for text in (args.train, args.valid, args.test):
        read_text(text)  # what cannot be read should be known now
    args.work.mkdir(parents=True, exist_ok=True)
    _write(path, json.dumps(asked, indent=1))
    return asked


def _interval(quality: Mapping[str, Any]) -> tuple[float, float]:
    """Of the change against the original fine-tuned equally; without enough windows, the figure itself."""
    name = "perplexity_change_tuned"
    low, high = (quality["confidence"] or {}).get(name) or (quality[name], quality[name])
    return low, high


def _write(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


# ------------------------------------------------------------------------------------------------ all depths

COLUMNS = (
    "layers", "parameters", "original", "original, tuned", "converted", "fine-tuned", "to original", "to tuned", "95 %", "cosine", "top-1",
    "T·r", "SSA energy",
)  # fmt: skip


def cells(found: Mapping[str, Any]) -> list[str]:
    """A row: perplexities, changes of the fine-tuned program, agreement, energy."""
    q, energy = found["finetuned"], found["energy"]
    low, high = _interval(q)
    perplexities = (q["perplexity_ann"], q["perplexity_tuned"], found["converted"]["perplexity"], q["perplexity"])
    return [
        str(found["layers"]), f"{found['parameters'] / 1e6:.2f} M", *(f"{p:.2f}" for p in perplexities), f"{q['perplexity_change']:+.1%}",
        f"{q['perplexity_change_tuned']:+.1%}", f"{low:+.1%} to {high:+.1%}", f"{q['cosine']:.4f}", f"{q['top1_agreement']:.3f}",
        "–" if energy["steps_times_rate"] is None else f"{energy['steps_times_rate']:.2f}", f"{-energy['reduction']:+.1%}",
    ]  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (COLUMNS, ["---"] * len(COLUMNS), *map(cells, results)))


def verdict(results: list[dict[str, Any]]) -> str:
    """The deepest network's loss against that of 4 layers (else of the shallowest)."""
    losses = {r["layers"]: r["finetuned"]["perplexity_change_tuned"] for r in results}
    deep, base = max(losses), 4 if 4 in losses else min(losses)
    factor = f"{losses[deep] / losses[base]:.2f} times" if losses[base] > 0 else "not to be compared with"
    return f"{deep} layers: {losses[deep]:+.1%}, {factor} the {losses[base]:+.1%} of {base} layers; the aim is at most 2 times"


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Perplexity ratio over depth, against the original and, fine-tuned, against the original fine-tuned equally.

    A ratio, since a loss can be nothing or less, which has no logarithm.
    """
    series = {"converted": ("converted", "perplexity_change"), "fine-tuned": ("finetuned", "perplexity_change_tuned")}
    points = [
        Point(f"{r[which][change]:+.1%}", float(r["layers"]), 1 + r[which][change], name)
        for name, (which, change) in series.items()
        for r in sorted(results, key=lambda r: int(r["layers"]))
    ]
    write_scatter(
        points, path, x_label="transformer blocks", y_label="perplexity / perplexity of the original, trained equally",
        levels={"no loss": 1.0}, join=True,
    )  # fmt: skip


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--train", type=Path, required=True, help="text to train and fine-tune on, plain or .xz")
    p.add_argument("--valid", type=Path, required=True, help="validation text")
    p.add_argument("--test", type=Path, required=True, help="text to measure on")
    p.add_argument("--work", type=Path, default=Path("build/depth"), help="folder for everything [default: %(default)s]")
    p.add_argument("--layers", default="2,4,8,12", help="depths [default: %(default)s]")
    p.add_argument("--width", type=int, default=128, help="channels [default: %(default)s]")
    p.add_argument("--heads", type=int, default=4, help="attention heads [default: %(default)s]")
    p.add_argument("--context", type=int, default=256, help="tokens per window [default: %(default)s]")
    p.add_argument("--batch", type=int, default=16, help="windows per step of the training [default: %(default)s]")
    p.add_argument("--pretrain-tokens", type=int, default=15_000_000, help="each model is trained on so many [default: %(default)s]")
    p.add_argument("--finetune-tokens", type=int, default=2_000_000, help="and fine-tuned on so many [default: %(default)s]")
    p.add_argument("--test-tokens", type=int, help="measure on so many tokens from its start [default: all]")
    p.add_argument("--steps", type=int, default=4, help="T [default: %(default)s]")
    p.add_argument("--convert", action="append", default=[], metavar="KEY=VALUE", help="option of the conversion")
    p.add_argument("--finetune", action="append", default=[], metavar="KEY=VALUE", help="option of the fine-tuning, such as group=ssa")
    p.add_argument("--no-compile", action="store_true", help="without torch.compile in both trainings")
    shown = p.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    shown.add_argument("--markdown", action="store_true", help="print the table alone [default: with what it says of the aim]")
    args = p.parse_args()
    args.layers = [int(n) for n in args.layers.split(",")]
    args.convert, chosen = named_values("--convert", args.convert), named_values("--finetune", args.finetune)
    options = {"max_tokens": args.finetune_tokens, "compile": False if args.no_compile else None}
    args.config = with_options(TrainingConfig(), options | chosen)
    return args


def main() -> None:
    args = parse()
    settings = settled(args)
    results = []
    for layers in args.layers:
        results.append(measure(layers, args))
        draw(results, args.work / "depth")  # after every depth: one can look while the next is trained
        _write(args.work / "depth.md", f"{table(results)}\n\n{verdict(results)}\n")
    figures = json.dumps({"settings": settings, "results": results}, indent=1)
    _write(args.work / "depth.json", figures + "\n")
    print(figures if args.json else table(results))
    if not (args.json or args.markdown):
        print(f"\n{verdict(results)}")


if __name__ == "__main__":
    try:
        main()
    except ntc.NtcError as error:
        sys.exit(f"finetune_depth: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on where it was")
