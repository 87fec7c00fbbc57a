"""What ``ntc energy`` shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from ntc.cli.output import count, data_size, percent, table
from ntc.cli.tables import heading, show_attention, unit_for

__all__ = ["show_constants", "show_energy"]

_PAPER_RANGE = "0.75 to 1.80"  # T·r at which 0.9 pJ per AC save 64.71 to 85.28 % of 4.6 pJ per MAC: docs/energy.md


def show_energy(console: Console, result: Mapping[str, Any]) -> None:
    """The whole report: what it is of, both columns, baselines, where energy goes, counts, what is not counted, sources."""
    constants, memory = result["constants"], result["memory"]
    if constants["device"]:
        _show_at_figures_of_a_chip(console, result)
        return
    console.print(Text(result["folder"], "bold").append(f"  T = {result['steps']}, rates of {result['data']}", "not bold dim"))
    console.print(Text(_about(result), "dim"))
    show_attention(console, result["attention"], result["total"], f"per token, {constants['title']}")
    _show_columns(console, result)
    for part, title in (("attention", "Attention block"), ("total", "Everything")):
        _show_baselines(console, title, result["baselines"][part])
    _show_moved(console, result["moved"])
    _show_groups(console, "By kind of operation", "kind", result["kinds"])
    _show_groups(console, "By block", "block", result["blocks"])
    _show_operations(console, result["total"])
    if result["sensitivity"]:
        _show_sensitivity(console, result["sensitivity"]["total"])
    _show_uncounted(console, result)
    console.print()
    if result["report"]:
        console.print(Text("Wrote ").append(result["report"], "bold"))
    for what in (constants, memory):
        console.print(Text(f"{what['id']}: {what['scope']}. {what['source']}", "dim"))


def _show_at_figures_of_a_chip(console: Console, result: Mapping[str, Any]) -> None:
    """What spikes cause, at figures that were published for one chip: no comparison, no memory of another table, no total."""
    from ntc.energy.headline import headline

    constants = result["constants"]
    console.print(Text(result["folder"], "bold").append(f"  T = {result['steps']}, rates of {result['data']}", "not bold dim"))
    for sentence in headline(result):
        console.print(sentence)
    groups = [g for g in result["kinds"] if g["snn_pj"]]
    unit, size = _energies(g["snn_pj"] for g in groups)
    heading(console, "By kind of operation", f"{unit} per token, {constants['title']}")
    rows = table("kind", ">ACs", ">neuron updates", ">energy")
    for g in groups:
        rows.add_row(g["kind"], count(g["snn"]["acs"]), count(g["snn"]["neuron_updates"]), f"{g['snn_pj'] / size:,.3f}")
    console.print(rows)
    placed = result["total"]["columns"][-1]
    console.print(Text(f"{placed['column']}: {placed['remark']}", "dim"))
    _show_operations(console, result["total"])
    _show_uncounted(console, result)
    console.print()
    if result["report"]:
        console.print(Text("Wrote ").append(result["report"], "bold"))
    console.print(Text(f"{constants['id']}: {constants['scope']}. {constants['source']}", "dim"))


def _about(result: Mapping[str, Any]) -> str:
    shared = result["memory"]["reuse_tokens"]
    phase = "decoding, a weight is read for each token" if shared == 1 else f"prefill, {count(shared)} tokens share one read of a weight"
    perplexity = result["quality"]["perplexity"]
    said = [phase]
    if result["firing_rate"] is not None:
        said.append(f"firing rate {result['firing_rate']:.3f}")
    if (product := result["attention"]["steps_times_rate"]) is not None:
        said.append(f"T·r of spiking attention {product:.2f} (the NeurTransformer paper's savings: {_PAPER_RANGE})")
    if perplexity is not None:
        original = result["quality"]["perplexity_ann"]
        beside = "" if original is None else f", of the original {original:,.2f}"
        said.append(f"perplexity of this very program {perplexity:,.2f}{beside}")
    return "; ".join(said)


def _energies(values: Iterable[float | None]) -> tuple[str, float]:
    return unit_for(max((v for v in values if v is not None), default=0.0))


def _saved(share: float | None) -> Text:
    said = f"{1 - share:,.1f} x as much" if share is not None and share < -1 else percent(share)
    return Text(said, "" if share is None else "green" if share > 0 else "red" if share < 0 else "")


def _show_columns(console: Console, result: Mapping[str, Any]) -> None:
    rows = [(part, row) for part in ("attention", "total") for row in result[part]["columns"]]
    unit, size = _energies(row[key] for _, row in rows for key in ("ann_pj", "snn_pj"))
    heading(console, "Compute, and compute with memory", f"{unit} per token, original in the same arithmetic; {result['memory']['title']}")
    shown = table("", "", ">network", ">spiking", ">saved")
    for part, row in rows:
        name = "attention" if part == "attention" else "all"
        if row["ann_pj"] is not None:
            shown.add_row(name, row["column"], f"{row['ann_pj'] / size:,.3f}", f"{row['snn_pj'] / size:,.3f}", _saved(row["reduction"]))
    console.print(shown)
    placed = result["total"]["columns"][-1]
    console.print(Text(f"{placed['column']}: {placed['remark']}", "dim"))


def _show_baselines(console: Console, title: str, baselines: Iterable[Mapping[str, Any]]) -> None:
    rows = list(baselines)
    if not rows:
        return
    unit, size = _energies(row[column]["ann_pj"] for row in rows for column in ("compute", "compute_and_memory"))
    heading(console, f"{title} against the original in other arithmetics", f"{unit} per token; even: where both cost the same")
    shown = table("original", "", ">network", ">spiking", ">saved", ">even at rate", ">even at T")
    for row in rows:
        for column in ("compute", "compute_and_memory"):
            cell = row[column]
            shown.add_row(
                row["baseline"], column.replace("_", " "), f"{cell['ann_pj'] / size:,.3f}", f"{cell['snn_pj'] / size:,.3f}",
                _saved(cell["reduction"]), _or_never(cell["break_even_rate"]), _or_never(cell["break_even_steps"]),
            )  # fmt: skip
    console.print(shown)


def _or_never(value: float | None) -> str:
    """A break-even; none if the original costs less than the program without a spike."""
    return "none" if value is None else f"{value:.3g}"


def _show_moved(console: Console, moved: Iterable[Mapping[str, Any]]) -> None:
    heading(console, "Data moved", "per token")
    rows = table("data", "in", ">pJ per byte", ">network", ">spiking")
    for row in moved:
        if row["ann_bytes"] or row["snn_bytes"]:
            sizes = (data_size(round(row[key])) for key in ("ann_bytes", "snn_bytes"))
            rows.add_row(row["data"].replace("_", " "), row["level"], f"{row['pj_per_byte']:,.2f}", *sizes)
    console.print(rows)


def _show_groups(console: Console, title: str, key: str, groups: Iterable[Mapping[str, Any]]) -> None:
    names = ("ann_pj", "snn_pj", "ann_memory_pj", "snn_memory_pj")
    shown = [g for g in groups if any(g[name] for name in names)]
    unit, size = _energies(g[name] for g in shown for name in names)
    heading(console, title, f"{unit} per token")
    rows = table(key, ">network", ">spiking", ">saved", ">memory: network", ">spiking", ">saved with memory")
    for g in shown:
        with_memory = [g[f"{side}_pj"] + g[f"{side}_memory_pj"] for side in ("ann", "snn")]
        rows.add_row(
            g[key], f"{g['ann_pj'] / size:,.3f}", f"{g['snn_pj'] / size:,.3f}", _saved(_share(g["ann_pj"], g["snn_pj"])),
            f"{g['ann_memory_pj'] / size:,.3f}", f"{g['snn_memory_pj'] / size:,.3f}", _saved(_share(*with_memory)),
        )  # fmt: skip
    console.print(rows)


def _share(before: float, after: float) -> float | None:
    return 1 - after / before if before else None


def _show_operations(console: Console, total: Mapping[str, Any]) -> None:
    heading(console, "Operations", "per token")
    rows = table("operation", ">network", ">spiking")
    for key, label in (
        ("dense_macs", "multiply-accumulates if dense"), ("macs", "multiply-accumulates"),
        ("effective_macs", "  with no factor zero"), ("acs", "accumulates by spikes"),
        ("graded_macs", "graded multiply-accumulates"), ("neuron_updates", "membrane updates"),
        ("elementwise", "elementwise"), ("spikes", "spikes"),
    ):  # fmt: skip
        rows.add_row(label, *("not known" if total[side][key] is None else count(total[side][key]) for side in ("ann", "snn")))
    console.print(rows)


def _show_sensitivity(console: Console, found: Mapping[str, Any]) -> None:
    unit, size = _energies(row[key] for row in found["levels"] for key in ("ann_pj", "snn_pj"))
    heading(console, "With other constants", f"{unit} per token, everything")
    rows = table("", "constants", ">network", ">spiking", ">saved")
    for row in found["levels"]:
        rows.add_row(row["column"], row["level"], f"{row['ann_pj'] / size:,.3f}", f"{row['snn_pj'] / size:,.3f}", _saved(row["reduction"]))
    console.print(rows)
    if found["numbers"]:
        heading(console, "One constant at a time", "what is saved with its low and its high value")
        rows = table("constant", "", ">low", ">high", ">saved, low", ">saved, high")
        for row in found["numbers"]:
            values = (f"{row[key]:g}" for key in ("low", "high"))
            rows.add_row(row["number"], row["column"], *values, _saved(row["reduction_low"]), _saved(row["reduction_high"]))
        console.print(rows)


def _show_uncounted(console: Console, result: Mapping[str, Any]) -> None:
    rows = result["uncounted"]
    if not rows:
        console.print()
        console.print(Text("Every multiply-accumulate of both networks is counted.", "dim"))
        return
    heading(console, "Not counted", f"{percent(result['uncounted_share'])} of the dense multiply-accumulates")
    listed = table("side", "node", "op", "module")
    for row in rows:
        listed.add_row(row["side"], f"%{row['node']}", row["op"], row["module"])
    console.print(listed)


def show_constants(console: Console, listed: Mapping[str, Any]) -> None:
    """The tables of energies that ship with ntc."""
    heading(console, "Energies per operation", "--constants NAME [pJ]")
    rows = table("name", ">mac", ">ac", ">graded mac", ">update", "what")
    for c in listed["constants"]:
        energies = (c[key] for key in ("mac", "ac", "graded_mac", "update"))
        rows.add_row(c["id"], *("-" if value is None else f"{value:g}" for value in energies), c["title"])
    console.print(rows)
    heading(console, "Energies of moving data", "--memory NAME [pJ per access]")
    rows = table("name", "levels", "what")
    for m in listed["memories"]:
        levels = ", ".join(f"{level['level']} {level['picojoules']:g} / {level['bits']} bits" for level in m["levels"])
        rows.add_row(m["id"], levels, m["title"])
    console.print(rows)
    for source in dict.fromkeys(x["source"] for x in (*listed["constants"], *listed["memories"])):
        console.print(Text(source, "dim"))
