"""Recipes that need no training, over time steps: perplexity, events per value, energy, what stays analog.

    python benchmarks/recipes.py SmolLM2-135M.gguf --data wikitext2-test.txt --calibration wikitext2-valid.txt --output smollm2.jsonl
    python benchmarks/recipes.py examples/gpt2-books --data books-test.txt --only "lossless;ecmt" --steps 4,5 --markdown
    python benchmarks/recipes.py examples/gpt2-books --data books-test.txt --compiled "neurtransformer=build/tuned" --output gpt2.jsonl
    python benchmarks/recipes.py examples/gpt2-books --stored --output gpt2.jsonl --page docs/comparison.md

Every row is a recipe with settings, run on the same captured network and measured on the same windows as the original: perplexity on all of
them, with the interval of its change (paired bootstrap over windows), operations, events and energy on the first --count-windows.
Calibration text is read by what asks for it. Each finished row is a line of --output; a second run measures only what is missing.
``--page`` makes the tables of docs/comparison.md of all lines of --output, between the marks that name the model; rows of the page that
have no line stay as they are, if they are of the same text and the same original.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from ntc import artifact
from ntc.bootstrap import bootstrap_means, percentile_interval
from ntc.compiler import compile_model
from ntc.energy import EnergyReport, load_constants, measure_energy
from ntc.frontend import capture
from ntc.loading import load_tokenizer
from ntc.ops import Counts
from ntc.pipeline import run_pipeline
from ntc.program import Program
from ntc.recipe import Settings
from ntc.registry import find_pass
from ntc.registry import recipe as find_recipe
from ntc.text import Tokens, calibration_from, tokens_from
from ntc.training.groups import roles_of, trained

GROUPS = ("all", "linear layers", "attention")
"""Coded values: of all, and of the two groups that they fall into."""

FEW_BITS = "horowitz-45nm-int8"
"""Table for the compute column in integers: 8-bit factors, 32-bit sums."""


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
    for events in (1.5, 1.4, 1.2):  # twelve steps at first: each site has its own in the end
        yield Row(f"lossless-sparse, {events:g} events", "lossless-sparse", 12, options={"events": events})
    yield Row("lossless-sparse, 1 % predicted", "lossless-sparse", 12, options={"events": 0, "change": 0.01})
    yield Row("lossless-sparse, 1.2 events, Hadamard axes", "lossless-sparse", 12, options={"events": 1.2, "kind": "hadamard"})
    yield Row("lossless-sparse, 1.2 events, as it is", "lossless-sparse", 12, without=("rotate",), options={"events": 1.2})
    for t in steps:
        yield Row("lossless, linear layers only", "lossless", t, without=("spike-products",))
    yield Row("sdllm", "sdllm", 7)
    yield Row("phase", "phase", 8)
    yield Row("las", "las", 16)
    for t in (4, 10):
        yield Row("ecmt", "ecmt", t)
    yield Row("lossless-spiking", "lossless-spiking", 8)
    for t in steps:
        yield Row("lossless, learned bases", "lossless", t, options={"base": "learned"})
    yield Row("lossless, per channel", "lossless", 8, options={"scale": "channel"})
    for t, price in ((6, 0.9), (6, 0.0), (5, 0.0), (5, 0.5)):
        yield Row(f"lossless, base 2, price {price:g}", "lossless", t, options={"base": 2.0, "price": price, "probability_steps": 4})
    for t in steps:
        yield Row("sdllm, phase", "sdllm", t, options={"code": "phase"})


# ------------------------------------------------------------------------------------------------ measuring


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
        "acs_per_mac": spiking["acs"] / dense, "zero_train_share": zero_train_share(program), "total": total, "kinds": kinds,
        "constants": report.constants.id, "memory": report.memory.id, "cpu_seconds": seconds,
    }  # fmt: skip


def zero_train_share(program: Program) -> float:
    """Share of a program's parameters that no gradient step has set: all but those of the groups that its history says were fine-tuned.

    Closed forms, searches on unlabelled text and exact changes of basis are no training; a gradient that only chooses a step is none.
    """
    groups = {str(record.options["group"]) for record in program.history if record.name == "finetune"}
    roles = roles_of(program)
    touched = {name for group in groups for name in trained(roles, group)}
    sizes = {name: tensor.numel() for name, tensor in program.tensors.items() if tensor.is_floating_point()}
    return 1 - sum(size for name, size in sizes.items() if name in touched) / sum(sizes.values())


def _per_value(report: EnergyReport) -> dict[str, float]:
    """Spikes over coded values."""
    groups = {name: [0.0, 0.0] for name in GROUPS}
    for node in report.to_json()["nodes"]["snn"]:
        if node.get("neurons"):
            inside = node["op"] == "ntc.coded_attention" or node["node"].endswith(("_q_spikes", "_k_spikes", "_v_spikes", "_p_spikes"))
            for group in ("all", "attention" if inside else "linear layers"):
                groups[group][0] += node.get("spikes", 0.0)
                groups[group][1] += node["neurons"]
    return {name: spikes / values for name, (spikes, values) in groups.items() if values}


# ------------------------------------------------------------------------------------------------ tables


def _markdown(columns: Sequence[str], cells: Iterator[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in cells])


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:+.{digits}f} %"


def table(lines: list[dict[str, Any]]) -> str:
    """Fidelity, events and what stays analog, as Markdown."""

    def cells() -> Iterator[Sequence[str]]:
        for d in lines:
            low, high = d["change_interval"]
            events = (f"{e:.2f}" if (e := d["events_per_value"].get(k)) is not None else "–" for k in GROUPS)
            rate = "–" if d["firing_rate"] is None else f"{d['firing_rate']:.3f}"
            multiplied = d["total"]["snn"]["graded_macs"] / d["total"]["ann"]["dense_macs"]
            graded = f" + {multiplied:.2f} graded" if multiplied else ""
            # Lines without the share were written before there were rows of trained programs.
            trained_none = f"{100 * d.get('zero_train_share', 1.0):.0f} %"
            yield (
                d["label"], str(d["steps"]), f"{d['perplexity']:.2f}", _percent(d["change"], 2), f"{100 * low:+.2f} ... {100 * high:+.2f}",
                *events, rate, f"{d['acs_per_mac']:.2f}{graded}", f"{100 * d['analog_share']:.1f} %", trained_none,
            )  # fmt: skip

    return _markdown(
        ("recipe", "T", "perplexity", "change", "95 %", "events per value", "of linear layers", "of attention", "firing rate",
         "ACs per MAC", "analog MACs", "zero-train"),
        cells(),
    )  # fmt: skip


def energy_table(lines: list[dict[str, Any]]) -> str:
    """Both sides of the columns of ``ntc energy``, µJ per token, and the compute column against networks of few bits, as Markdown."""
    int8 = load_constants(FEW_BITS)

    def cells() -> Iterator[Sequence[str]]:
        for d in lines:
            columns = {c["column"]: c for c in d["total"]["columns"]}
            compute, both = ([columns[name][side] / 1e6 for side in ("ann_pj", "snn_pj")] for name in ("compute", "compute and memory"))
            memory = [b - c for b, c in zip(both, compute, strict=True)]
            ann, snn = (Counts(**{f.name: d["total"][side][f.name] for f in fields(Counts)}) for side in ("ann", "snn"))
            bits = math.ceil(math.log2(d["steps"] + 1))
            # As docs/energy.md has it: 8-bit weights on both sides, the original with 8-bit activations, then with as few as T steps tell.
            few = (int8.cost(snn) / base.cost(ann) - 1 for base in (int8, int8.quantised(bits)))
            pairs = (f"{before:,.1f} → {after:,.1f}" for before, after in (compute, memory, both))
            first, second, third = pairs
            yield (
                d["label"], str(d["steps"]), first, _percent(compute[1] / compute[0] - 1), second, third, _percent(both[1] / both[0] - 1),
                *map(_percent, few), str(bits),
            )  # fmt: skip

    return _markdown(
        ("recipe", "T", "compute", "change", "memory", "compute and memory", "change", "compute, int8", "compute, b bits", "b"), cells()
    )  # fmt: skip


def _merged(new: str, old: str, order: Sequence[str]) -> str:
    """A table with the rows of an older one of the same columns that it lacks; rows are known by label and T, and stand in order."""
    head, rows = new.splitlines()[:2], {}
    for line in [*old.splitlines(), *new.splitlines()]:
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if line.startswith("|") and line not in head and len(cells) == head[0].count(" | ") + 1:
            rows[f"{cells[0]}, T = {cells[1]}"] = line
    return "\n".join([*head, *(rows[key] for key in dict.fromkeys([*order, *rows]) if key in rows)])


def section(lines: list[dict[str, Any]], page: str = "", order: Sequence[str] = ()) -> str:
    """The two tables of one network, with what they were measured on.

    Args:
        lines: New rows.
        page: The same section as it was: rows that are not measured anew stay.
        order: Keys of rows, in order; others follow.

    Raises:
        SystemExit: If the lines are not of one original on one text, or those of the page are of another.
    """
    texts = sorted({d["data"] for d in lines})
    if len(texts) != 1:
        raise SystemExit(f"a section of the page has one text, and these lines have {len(texts)}: {'; '.join(texts) or 'no line at all'}")
    ann = sorted({round(d["perplexity_ann"], 4) for d in lines})
    if ann[-1] - ann[0] > 1e-3 * ann[0]:
        raise SystemExit(f"these lines are of different originals: their perplexities are {ann[0]} to {ann[-1]}")
    tables = sorted({f"`{d.get('constants', 'horowitz-45nm-fp32')}`, `{d.get('memory', 'horowitz-45nm-sram')}`" for d in lines})
    counted = sorted({d["counted_tokens"] for d in lines})
    measured = (
        f"{texts[0]}; the original has a perplexity of {ann[0]:.2f}. Events and operations of the first "
        f"{' or '.join(f'{n:,}' for n in counted)} tokens."
    )
    columns = (
        f"Energy, µJ per token, original → program ({'; '.join(tables)}; the changes under int8 and b bits are those of `{FEW_BITS}`):"
    )
    parts = page.strip().split("\n\n")
    if len(parts) != 4:  # no such section yet
        parts = [measured, "", columns, ""]
    if [parts[0], parts[2]] != [measured, columns]:
        raise SystemExit(f"these lines are of {measured} Rows of the page are not: remove them from it, or measure all of them again")
    return "\n\n".join([measured, _merged(table(lines), parts[1], order), columns, _merged(energy_table(lines), parts[3], order)])


def read_between(page: Path, name: str) -> str:
    """The text between the marks ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` of a page.

    Raises:
        SystemExit: If the page has no such marks.
    """
    return _cut(page, name)[1]


def write_between(page: Path, name: str, text: str) -> None:
    """Put text between the marks ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` of a page.

    Raises:
        SystemExit: If the page has no such marks.
    """
    before, _, after = _cut(page, name)
    page.write_text(f"{before}\n\n{text}\n\n{after}", encoding="utf-8")


def _cut(page: Path, name: str) -> tuple[str, str, str]:
    """A page up to the end of the first mark, between the marks, and from the second one on."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    between, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{page} has no marks {begin} and {end}: put them where the tables of {name} belong")
    return before + begin, between, end + after


# ------------------------------------------------------------------------------------------------ the command


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, help="text to measure on")
    parser.add_argument("--calibration", type=Path, help="text for what is calibrated; never the one that is measured on")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--count-windows", type=int, default=2)
    parser.add_argument("--steps", default="4,5,6,8", help="T of the recipes that are measured over T")
    parser.add_argument("--only", help="rows of these labels; several with ;")
    parser.add_argument("--compiled", action="append", default=[], metavar="LABEL=DIR", help="a compiled folder as one more row")
    parser.add_argument("--output", type=Path, default=Path("recipes.jsonl"))
    parser.add_argument("--stored", action="store_true", help="measure nothing: the lines that --output has")
    parser.add_argument("--markdown", action="store_true", help="print the tables")
    parser.add_argument("--page", type=Path, help="put the tables of all lines of --output between this page's marks of the model")
    args = parser.parse_args()
    if args.data is None and not args.stored:
        parser.error("give the text to measure on, --data FILE, or --stored for the lines that there are")
    return args


def main() -> None:
    args = _arguments()
    torch.set_num_threads(1)
    done = {d["key"]: d for d in map(json.loads, args.output.read_text().splitlines())} if args.output.exists() else {}
    chosen = args.only.split(";") if args.only else None
    wanted = [r for r in rows([int(t) for t in args.steps.split(",")]) if chosen is None or r.label in chosen]
    if not args.stored:
        _measure_missing(args, wanted, done)
    order = [*(r.key for r in rows(sorted({*(int(t) for t in args.steps.split(",")), *(d["steps"] for d in done.values())}))), *done]
    found = [done[key] for key in dict.fromkeys(order) if key in done]
    if args.markdown:
        print(table([d for d in found if chosen is None or d["label"] in chosen]))
    if args.page:
        name = Path(args.model).name
        write_between(args.page, name, section(found, read_between(args.page, name), order))


def _measure_missing(args: argparse.Namespace, wanted: Sequence[Row], done: dict[str, dict[str, Any]]) -> None:
    """Measure the rows that have no line, and append theirs."""
    compiled = []
    for text in args.compiled:
        label, found, folder = text.partition("=")
        if not found:
            raise SystemExit(f"--compiled takes LABEL=DIR, got {text!r}")
        about = artifact.read_manifest(folder)
        compiled.append((Row(label, str(about.get("recipe", {}).get("name", "")), int(about["steps"])), folder))
    missing = [r for r in wanted if r.key not in done]
    if not missing and all(r.key in done for r, _ in compiled):
        return
    network, tokenizer = capture(args.model), load_tokenizer(args.model)
    analog = run_pipeline(network, [find_pass("canonicalize")()])
    tokens = tokens_from(args.data, tokenizer, args.window, args.window * args.windows)
    counted = tokens.first(args.count_windows)
    calibration = calibration_from(tokens_from(args.calibration, tokenizer, args.window, 4096)) if args.calibration else None
    original = losses(analog, tokens)
    print(f"original: {math.exp(float(original.mean())):.4f} on {tokens.description}", flush=True)

    def keep(row: Row, program: Program, canonical: Program) -> None:
        done[row.key] = measure(row, program, canonical, tokens, counted, original)
        with args.output.open("a") as lines:
            lines.write(json.dumps(done[row.key]) + "\n")
        print(table([done[row.key]]).splitlines()[-1], flush=True)

    for row in missing:
        recipe = find_recipe(row.recipe).without("canonicalize")
        for name in row.without:
            recipe = recipe.without(name)
        settings = Settings(options={**row.options, "steps": row.steps})
        made = compile_model(analog, recipe=recipe, settings=settings, calibration=calibration, tokenizer=tokenizer)
        keep(row, made.program, made.analog)
    for row, folder in compiled:
        if row.key not in done:
            keep(row, artifact.load(folder), artifact.load_analog(folder) or analog)


if __name__ == "__main__":
    main()
