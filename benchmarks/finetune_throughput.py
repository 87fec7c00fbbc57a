"""How fast is fine-tuning the spiking program, against fine-tuning the original with the same options? And what are options worth?

    python benchmarks/finetune_throughput.py --markdown                  # every row compiles a network, a minute or so each
    python benchmarks/finetune_throughput.py --only original --steps 8 --finetune group=ssa
    python benchmarks/finetune_throughput.py --only bf16 --only rows --convert normalizer=leak --json

Two runs are always timed in turns (A B, B A, A B, ...) with the same losses, teacher, windows and optimizer as ntc.finetune, so
that the noise of a shared machine meets both; a ratio is the median over the rounds of tokens/s A : tokens/s B, with the lowest and
the highest. Options are compared with the default one at a time, on the spiking program. Memory is what one step needs at its
peak beyond parameters and optimizer (Linux only); "first" is the time of the first step, which compiles.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ntc
from ntc.cli.options import named_values
from ntc.program import Program
from ntc.recipe import Settings
from ntc.text import tokens_from
from ntc.training.config import TrainingConfig, with_options
from ntc.training.form import TrainingForm
from ntc.training.groups import roles_of, trained
from ntc.training.losses import Objective
from ntc.training.optimizer import optimizer_for
from ntc.training.prepare import decided

ROOT = Path(__file__).parents[1]
SWITCHES = ("bf16", "compile", "checkpointing")
ORIGINAL, OPTIONS = "original", (*SWITCHES, "rows", "accumulate")


class Run:
    """One network in training; a step is that of ``ntc.training.loop.Trainer`` without its bookkeeping."""

    def __init__(self, program: Program, analog: Program, config: TrainingConfig, windows: Tensor) -> None:
        self.config, self.windows, self.at = config, windows, 0
        names = trained(roles_of(program), config.group)
        self.form = TrainingForm(
            program, names, surrogate=config.surrogate, width=config.surrogate_width, bf16=bool(config.bf16),
            checkpointing=config.checkpointing,
        )  # fmt: skip
        teacher = TrainingForm(analog, bf16=bool(config.bf16)) if config.needs_teacher else None
        self.objective = Objective(self.form, teacher, config, compile=bool(config.compile))
        self.optimizer = optimizer_for(self.form, config)
        started = time.perf_counter()
        self.step()
        self.first_seconds = time.perf_counter() - started
        self.step()  # the second one still allocates
        self.peak_mib = self._peak()

    def step(self) -> None:
        rows = torch.arange(self.at, self.at + self.config.rows) % len(self.windows)
        self.at += self.config.rows
        for piece in self.windows[rows].chunk(self.config.accumulate):
            (self.objective(piece).total / self.config.accumulate).backward()
        nn.utils.clip_grad_norm_(self.form.raw.values(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def tokens_per_second(self, steps: int) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            self.step()
        return steps * self.config.step_tokens / (time.perf_counter() - started)

    def _peak(self) -> float | None:
        """MiB that one step adds to what the process holds before it; None where the kernel does not tell."""
        gc.collect()
        try:
            ctypes.CDLL(None).malloc_trim(0)  # what malloc keeps for later would hide what the step takes
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
        except (AttributeError, OSError):
            return None
        before = _status("VmRSS")
        self.step()
        return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    """A line of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def in_turns(a: Run, b: Run, rounds: int, steps: int) -> dict[str, Any]:
    """Tokens/s of both and their ratio, from ``rounds`` rounds of ``steps`` steps each."""
    speeds: dict[Run, list[float]] = {a: [], b: []}
    for number in range(rounds):
        for run in (a, b) if number % 2 == 0 else (b, a):
            speeds[run].append(run.tokens_per_second(steps))
    ratios = [x / y for x, y in zip(speeds[a], speeds[b], strict=True)]
    return {
        "tokens_per_second": statistics.median(speeds[a]), "against_tokens_per_second": statistics.median(speeds[b]),
        "ratio": statistics.median(ratios), "ratio_lowest": min(ratios), "ratio_highest": max(ratios), "ratios": ratios,
        "peak_mib": a.peak_mib, "against_peak_mib": b.peak_mib, "first_seconds": a.first_seconds,
    }  # fmt: skip


def variants(base: TrainingConfig) -> dict[str, TrainingConfig]:
    """The default with one option changed."""
    switches = {f"{name} {_on(not getattr(base, name))}": {name: not getattr(base, name)} for name in SWITCHES}
    rows = {f"rows {rows}": {"rows": rows} for rows in (4, 8, 16) if rows != base.rows and rows % base.accumulate == 0}
    pieces = {f"accumulate {n}": {"accumulate": n} for n in (1, 2, 4) if n != base.accumulate and base.rows % n == 0}
    return {name: replace(base, **options) for name, options in (switches | rows | pieces).items()}


def _on(value: Any) -> str:
    return "on" if value else "off"


COLUMNS = ("run", "against", "tokens/s", "its tokens/s", "ratio", "lowest", "highest", "peak of a step [MiB]", "first step [s]")


def cells(row: dict[str, Any]) -> list[str]:
    peak = "–" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
    ratios = (f"{row[key]:.2f}" for key in ("ratio", "ratio_lowest", "ratio_highest"))
    speeds = (f"{row[key]:,.0f}" for key in ("tokens_per_second", "against_tokens_per_second"))
    return [row["run"], row["against"], *speeds, *ratios, peak, f"{row['first_seconds']:.1f}"]


def table(rows: list[dict[str, Any]], markdown: bool) -> str:
    lines = [list(COLUMNS), *map(cells, rows)]
    if markdown:
        lines.insert(1, ["---"] * len(COLUMNS))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(ROOT / "examples" / "gpt2-books"), help="[default: the reference GPT-2]")
    p.add_argument("--data", type=Path, help="text to train on [default: calibration.txt in the model's folder]")
    p.add_argument("--steps", type=int, default=4, help="T [default: %(default)s]")
    p.add_argument("--rounds", type=int, default=6, help="turns of each run [default: %(default)s]")
    p.add_argument("--turn", type=int, default=3, help="training steps per turn [default: %(default)s]")
    p.add_argument("--only", action="append", choices=(ORIGINAL, *OPTIONS), help="this comparison; may be repeated [default: all]")
    p.add_argument("--convert", action="append", default=[], metavar="KEY=VALUE", help="option of the conversion")
    p.add_argument("--finetune", action="append", default=[], metavar="KEY=VALUE", help="option of the training, for all runs")
    shown = p.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print one JSON object")
    shown.add_argument("--markdown", action="store_true", help="print a Markdown table")
    args = p.parse_args()
    args.only = args.only or (ORIGINAL, *OPTIONS)
    args.convert, args.finetune = named_values("--convert", args.convert), named_values("--finetune", args.finetune)
    return args


def main() -> None:
    args = parse()
    # Torch compiles one function for at most 8 networks and then runs it uncompiled; here each run is another network.
    torch._dynamo.config.recompile_limit = 64
    compiled = ntc.compile(args.model, settings=Settings({"steps": args.steps, **args.convert}))
    program, analog = compiled.program, compiled.analog
    options = {"compile": True, **args.finetune}
    config = decided(with_options(TrainingConfig(), options).fitting(analog.info.context), program, 1)
    text = args.data or Path(args.model) / "calibration.txt"
    windows = tokens_from(text, compiled.tokenizer, config.window or 0, 64 * config.step_tokens, analog.info.vocab_size).windows
    if windows.shape[1] != config.window:
        raise ntc.DataError(f"{text} has {windows.numel()} tokens, less than one window of {config.window}")

    def measure(name: str, against: str, run: Run, other: Run) -> None:
        row = {"run": name, "against": against, **in_turns(run, other, args.rounds, args.turn)}
        print("  ".join(cells(row)), file=sys.stderr, flush=True)
        rows.append(row)

    rows: list[dict[str, Any]] = []
    base = Run(program, analog, config, windows)
    if ORIGINAL in args.only:
        measure(f"spiking, T = {args.steps}", ORIGINAL, base, Run(analog, analog, config, windows))
    for name, changed in variants(config).items():
        if name.split()[0] in args.only:
            measure(f"spiking, {name}", "default", Run(program, analog, changed, windows), base)
    setup = {
        "model": Path(args.model).name, "steps": args.steps, "convert": args.convert, "config": config.to_json(), "rounds": args.rounds,
        "turn": args.turn, "threads": torch.get_num_threads(), "torch": torch.__version__, "cpu": torch.cpu.get_capabilities()["cpu_name"],
    }  # fmt: skip
    if args.json:
        print(json.dumps({"setup": setup, "rows": rows}, indent=1))
        return
    default = [f"{name} {getattr(config, name)}" for name in ("group", "rows", "window", "accumulate", "kl", "ce")]
    default += [f"{name} {_on(getattr(config, name))}" for name in SWITCHES]
    print(f"{setup['model']}, T = {args.steps}, {', '.join(default)}; {setup['threads']} threads\n")
    print(table(rows, args.markdown))


if __name__ == "__main__":
    try:
        main()
    except ntc.NtcError as error:
        sys.exit(f"finetune_throughput: {error}")
