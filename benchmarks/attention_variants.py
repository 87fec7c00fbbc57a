"""Spiking attention in its variants, before training and after: normalisers, signs of Q, K and V, neurons, gains, procedures.

    python benchmarks/attention_variants.py --data books-valid.txt --tokens 32768 --markdown
    python benchmarks/attention_variants.py --data books-valid.txt --tokens 32768 --markdown \\
        --train books-train.txt.xz --blockwise-tokens 131072 --finetune-tokens 393216 --target-rate 0.15 --group ssa

Every variant is a set of options of replace-attention (VARIANTS), compiled from the same calibrated network and measured on the
same tokens, the FFN left analog unless --ffn spiking. With --train each is also fitted layer by layer and then fine-tuned end
to end, all on the same windows of text, and the recipe's variant is trained by other procedures too (procedures.py), on as many
tokens together. "To tuned" compares with the original network after --blockwise-tokens + --finetune-tokens of its own training.

Each finished row is a line of --output; a second run measures only what is not there yet, so a run that was stopped goes on (one
in training from its last checkpoint, in the folder beside --output), and a variant that was added costs its own time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from procedures import BOTH, END_TO_END, FREE, ORIGINAL, PROCEDURES, Training

from ntc.cli.options import named_values
from ntc.compiler import Compilation, compile_model
from ntc.energy import measure_energy
from ntc.errors import ConfigError, NtcError, TrainingError
from ntc.pipeline import Context, Override, Pass, run_pipeline
from ntc.program import Program
from ntc.quality import evaluate
from ntc.recipe import Settings
from ntc.registry import find_pass, recipe
from ntc.text import Tokens, tokens_from
from ntc.training.checkpoint import remove
from ntc.training.config import TrainingConfig, with_options
from ntc.training.run import Finetuned
from ntc.training.validation import Validation
from ntc_passes.recipes import ATTENTION

ROOT = Path(__file__).parents[1]

TERNARY = {"signed_query": True, "signed_key": True, "signed_value": True}
BINARY = {"signed_query": False, "signed_key": False, "signed_value": False}
MIXED = {**BINARY, "signed_value": True}
NORMALIZERS = ("position", "learned-position", "leak", "channel-leak", "rms", "leak-rms", "row-sum")
CODES = {"": MIXED, ", binary": BINARY, ", ternary": TERNARY}
DEFAULT = "the recipe's"

VARIANTS: dict[str, dict[str, Any]] = {
    DEFAULT: dict(ATTENTION),
    **{f"{n}{label}": {"normalizer": n, **signs} for label, signs in CODES.items() for n in NORMALIZERS},
    **{f"{n}, gain per head": {"normalizer": n, "gain": "head", **MIXED} for n in ("position", "leak", "leak-rms")},
    **{f"{n}, no output neuron": {"normalizer": n, "output": "current", **MIXED} for n in ("position", "leak-rms")},
    **{f"{n}, LIF": {"normalizer": n, "neuron": "lif", **BINARY} for n in ("position", "leak-rms")},
    **{f"leak-rms, {p}th percentile": {"normalizer": "leak-rms", "percentile": float(p), **MIXED} for p in (75, 99)},
    "leak, ternary, 97th percentile": {"normalizer": "leak", "percentile": 97.0, **TERNARY},
}
"""Name and options of replace-attention; what they do not name is the pass's own default, whatever the recipe chooses."""

ROLES = ("q", "k", "v", "ssa")

Row = dict[str, Any]


# ------------------------------------------------------------------------------------------------ measuring


def measure(program: Program, analog: Program, tokens: Tokens, energy_tokens: Tokens) -> Row:
    """The figures of one program."""
    q = evaluate(program, analog, tokens)
    energy = measure_energy(program, analog, energy_tokens).attention()
    fits = [r.notes for r in program.history if r.name == "replace-attention"]  # several if blocks were replaced one by one
    explained, leaks = ({b: v for notes in fits for b, v in notes.get(key, {}).items()} for key in ("explained_variance", "leaks"))
    streaming = energy["ssa_streaming_pj"]
    return {
        "perplexity": q.perplexity, "perplexity_ann": q.perplexity_ann, "perplexity_change": q.perplexity_change,
        "cosine": q.cosine, "top1_agreement": q.top1_agreement, "kl": q.kl,
        "explained": sum(explained.values()) / len(explained) if explained else None,
        "explained_variance": explained, "leaks": leaks or None,
        "rates": {role: _rate(q, role) for role in ROLES},
        "attention_rate": Validation(q.perplexity, q.populations).attention_rate if q.populations else None,
        "steps_times_rate": energy["steps_times_rate"], "energy_reduction": energy["reduction"],
        "energy_reduction_streaming": None if streaming is None else 1 - streaming / energy["asa_pj"],
    }  # fmt: skip


def _rate(quality: Any, role: str) -> float | None:
    """Spikes per neuron and step over all populations of a role."""
    chosen = [p for p in quality.populations if p.role == role]
    slots = sum(p.neurons * p.tokens * p.steps for p in chosen)
    return sum(float(p.spikes.sum()) for p in chosen) / slots if slots else None


@dataclass(frozen=True)
class Bench:
    """What all rows have in common.

    Attributes:
        start: The calibrated network.
        rest: Passes behind replace-attention.
        tokens: What programs are measured on.
        few: Those on which operations are counted.
        work: Folder for checkpoints.
    """

    start: Compilation
    rest: list[Pass]
    tokens: Tokens
    few: Tokens
    work: Path

    def figures(self, program: Program) -> Row:
        return measure(program, self.start.analog, self.tokens, self.few)

    def convert(self, attention: Pass, program: Program, left: tuple[Override, ...] = ()) -> Program:
        """The program with spiking attention where no override leaves it, thresholds and gains from the program as it is."""
        passes = [find_pass("calibrate").configure({}), attention, *self.rest]
        return run_pipeline(program, passes, Context(self.start.calibration, left))

    def trained(self, attention: Pass, training: Training, procedure: str, place: Path) -> Row:
        """The figures after each stage; of a training that failed, those of the best program before that."""
        row: Row = {"blockwise": None, "end_to_end": None, "failed": None}
        try:
            found = training.run(procedure, self.start.program, partial(self.convert, attention), place)
        except TrainingError as error:
            row["failed"] = str(error)
            if not isinstance(error.best, Finetuned):
                return row
            found = error.best
        if found.blockwise is not None:
            row["blockwise"] = self.figures(found.blockwise)
        row["end_to_end"] = self.figures(found.program)
        outcome = found.outcome
        return row | {
            "steps": outcome.steps, "best_step": outcome.best_step, "tokens_per_second": outcome.tokens_per_second,
            "warnings": list(found.warnings),
        }  # fmt: skip


# ------------------------------------------------------------------------------------------------ rows


def read_rows(path: Path) -> list[Row]:
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


def key_of(row: Row) -> str:
    """What a row depends on; an option that is younger than the row had its default."""
    options = {**asdict(find_pass("replace-attention").Options()), **row["options"]}
    training = row.get("training")
    if training is not None:
        default = {k: v for k, v in TrainingConfig().to_json().items() if k not in FREE}
        training = {**training, "config": {**default, **training["config"]}}
    return json.dumps([row["variant"], options, row["measured_on"], training], sort_keys=True)


class Rows:
    """Rows of a file; those that are not there are made and added."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done = {key_of(row): row for row in read_rows(path)}
        path.parent.mkdir(parents=True, exist_ok=True)

    def get(self, about: Row, make: Callable[[], Row]) -> Row:
        key = key_of(about)
        if key not in self.done:
            procedure = about["training"]["procedure"] if "training" in about else "not trained"
            print(f"{about['variant']}: {procedure}", file=sys.stderr, flush=True)
            self.done[key] = {**about, **make()}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.done[key]) + "\n")
        return self.done[key]


def measured(bench: Bench, rows: Rows, name: str, same: Row, training: Training | None, procedure: str = BOTH) -> Row:
    """A variant before training and, if it is trained, after."""
    attention = find_pass("replace-attention").configure({"steps": same["steps"], **VARIANTS.get(name, {})})
    about = {"variant": name, "options": asdict(attention.options), "measured_on": same}
    found: Row = {"variant": name}
    if procedure == ORIGINAL:
        about |= {"options": {}}
    else:
        found = rows.get(about, lambda: bench.figures(bench.convert(attention, bench.start.program)))
    if training is None:
        return found
    about = {**about, "training": training.about(procedure)}
    place = bench.work / hashlib.sha256(key_of(about).encode()).hexdigest()[:16]
    trained = rows.get(about, lambda: bench.trained(attention, training, procedure, place))
    for folder in (*place.glob("block*"), place):
        remove(folder)
    return {**trained, "untrained": found}


# ------------------------------------------------------------------------------------------------ tables

Columns = Mapping[str, Callable[[Mapping[str, Any]], str]]

COLUMNS: Columns = {
    "variant": lambda r: r["variant"],
    "perplexity": lambda r: f"{r['perplexity']:.2f}",
    "change": lambda r: f"{100 * r['perplexity_change']:+.1f} %",
    "cosine": lambda r: f"{r['cosine']:.4f}",
    "explained": lambda r: f"{r['explained']:.3f}",
    "firing rates q, k, v, ssa": lambda r: ", ".join(_number(r["rates"][k]) for k in ROLES),
    "T·r": lambda r: _number(r["steps_times_rate"]),
    "energy saved": lambda r: _percent(r["energy_reduction"]),
    "streaming": lambda r: _percent(r["energy_reduction_streaming"]),
}


def _number(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else f"{value:{form}}"


def _percent(share: float | None, form: str = ".1f") -> str:
    return "–" if share is None else f"{100 * share:{form}} %"


def trained_columns(first: str, tuned: Row) -> Columns:
    """Columns of a table after training: before it, after the stage by layers, after the one end to end."""

    def perplexity(row: Mapping[str, Any], stage: str) -> str:
        figures = row[stage]
        text = "–" if figures is None else f"{figures['perplexity']:.2f}"
        return f"{text}, failed" if row["failed"] and stage == "end_to_end" else text

    def of(stage: str, key: str, show: Callable[[float | None], str]) -> Callable[[Mapping[str, Any]], str]:
        return lambda row: show((row[stage] or {}).get(key))

    def to_tuned(row: Mapping[str, Any]) -> str:
        pair = row["end_to_end"], tuned["end_to_end"]
        return "–" if None in pair else _percent(pair[0]["perplexity"] / pair[1]["perplexity"] - 1, "+.1f")

    def spikes(stage: str, label: str) -> Columns:
        return {
            f"{label}: rate q, k, v": of(stage, "attention_rate", lambda v: _number(v, ".3f")),
            f"{label}: T·r": of(stage, "steps_times_rate", _number),
            f"{label}: saved": of(stage, "energy_reduction", _percent),
        }

    return {
        first: lambda r: r["training"]["procedure"] if first == "procedure" else r["variant"],
        "untrained": lambda r: f"{r['untrained']['perplexity']:.2f}",
        "blockwise": lambda r: perplexity(r, "blockwise"), **spikes("blockwise", "blockwise"),
        "end to end": lambda r: perplexity(r, "end_to_end"), "to tuned": to_tuned,
        "cosine": of("end_to_end", "cosine", lambda v: _number(v, ".4f")), **spikes("end_to_end", "end to end"),
        "streaming": of("end_to_end", "energy_reduction_streaming", _percent),
    }  # fmt: skip


def table(rows: Iterable[Mapping[str, Any]], markdown: bool, columns: Columns = COLUMNS) -> str:
    """Rows as a Markdown table, or as columns of text."""
    cells = [list(columns), *([show(r) for show in columns.values()] for r in rows)]
    if markdown:
        lines = [f"| {' | '.join(line)} |" for line in cells]
        return "\n".join([lines[0], "| --- " * len(columns) + "|", *lines[1:]])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def show_trained(rows: Sequence[Row], procedures: Sequence[Row], tuned: Row, training: Training, *, markdown: bool) -> None:
    config, whole = training.config, training.by(END_TO_END)
    figures = tuned["end_to_end"]
    original = "failed" if figures is None else f"{figures['perplexity']:.2f}"
    rate = "no target rate" if config.target_rate is None else f"target rate {config.target_rate:g}"
    print(
        f"Trained: group {config.group}, {config.blockwise_tokens:,} tokens blockwise and {config.max_tokens:,} end to end, {rate}; "
        f"the original network after {whole.max_tokens:,} tokens: {original}\n"
    )
    for first, part in (("variant", rows), ("procedure", procedures)):
        if part:
            print(table(part, markdown, trained_columns(first, tuned)), end="\n\n")


# ------------------------------------------------------------------------------------------------ the command


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "examples" / "gpt2-books"))
    parser.add_argument("--calibration", type=Path, help="text; by default calibration.txt in the model's folder")
    parser.add_argument("--data", type=Path, required=True, help="text on which the variants are measured")
    parser.add_argument("--tokens", type=int, default=16384, help="so many tokens from its start")
    parser.add_argument("--energy-tokens", type=int, default=4096, help="of these, so many for counting operations")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--ffn", choices=("analog", "spiking"), default="analog")
    names = (*VARIANTS, *PROCEDURES)
    parser.add_argument("--only", action="append", metavar="NAME", choices=names, help="this variant or procedure (may be given again)")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "attention_variants.jsonl", help="finished rows")
    training = parser.add_argument_group("training")
    training.add_argument("--train", metavar="TEXT", help="train every variant on this text, and measure again")
    training.add_argument("--validation", type=Path, metavar="TEXT", help="chooses the best step [default: the end of the training text]")
    training.add_argument("--blockwise-tokens", type=int, default=131_072, help="fit layers one by one on so many [default: %(default)s]")
    training.add_argument("--finetune-tokens", type=int, default=262_144, help="then end to end on so many [default: %(default)s]")
    training.add_argument("--target-rate", type=float, help="spikes per neuron and step that Q, K and V may have")
    training.add_argument("--group", choices=("ssa", "all"), default="ssa", help="what is trained [default: %(default)s]")
    training.add_argument("--finetune", action="append", default=[], metavar="KEY=VALUE", help="more options, such as lr=5e-4")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print the rows as a JSON list")
    shown.add_argument("--markdown", action="store_true", help="print Markdown tables")
    args = parser.parse_args()
    given = {
        "group": args.group, "blockwise_tokens": args.blockwise_tokens, "max_tokens": args.finetune_tokens, "target_rate": args.target_rate,
    }  # fmt: skip
    args.config = with_options(TrainingConfig(), given | named_values("--finetune", args.finetune))
    if args.train is None and (trained := [name for name in args.only or () if name in PROCEDURES]):
        raise ConfigError(f"{trained[0]!r} is a way to train, and there is no text to train on: give --train TEXT")
    return args


def main() -> None:
    args = parse()
    chosen = recipe("neurtransformer")
    start = compile_model(args.model, recipe=chosen.until("calibrate"), calibration=args.calibration)
    rest = chosen.after("replace-attention") if args.ffn == "spiking" else chosen.after("replace-attention").without("convert-ffn")
    settings = Settings({"steps": args.steps} if args.ffn == "spiking" else {})
    window = min(256, start.analog.info.context or 256)
    tokens, few = (tokens_from(args.data, start.tokenizer, window, n) for n in (args.tokens, min(args.tokens, args.energy_tokens)))
    same = {
        "model": Path(args.model).name, "calibration": start.calibration.sha256, "data": tokens.sha256, "tokens": tokens.count,
        "energy_tokens": few.count, "steps": args.steps, "ffn": args.ffn,
    }  # fmt: skip
    training = None
    if args.train is not None:
        training = Training.on(args.train, args.validation, args.config, start.analog, start.tokenizer)
    bench = Bench(start, rest.build(settings, find_pass), tokens, few, args.output.with_suffix(".work"))
    known, names = Rows(args.output), args.only or (*VARIANTS, *(PROCEDURES if training is not None else ()))
    tuned = None if training is None else measured(bench, known, ORIGINAL, same, training, ORIGINAL)
    rows = [measured(bench, known, n, same, training) for n in names if n in VARIANTS]
    procedures = [measured(bench, known, DEFAULT, same, training, n) for n in names if n in PROCEDURES]
    if args.json:
        print(json.dumps([*rows, *procedures, *([] if tuned is None else [tuned])], indent=1))
        return
    ann = (rows or [r["untrained"] for r in procedures])[0]
    ann = ann.get("untrained", ann)["perplexity_ann"]
    print(f"{same['model']} on {tokens.description}: perplexity {ann:.2f}; T = {args.steps}, FFN {args.ffn}\n")
    if training is None or tuned is None:
        print(table(rows, args.markdown))
    else:
        show_trained(rows, procedures, tuned, training, markdown=args.markdown)


if __name__ == "__main__":
    try:
        main()
    except NtcError as error:
        sys.exit(f"attention_variants: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on where it was")
