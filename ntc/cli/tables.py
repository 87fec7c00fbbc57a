"""Tables that more than one command shows: neurons, quality, energy."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from ntc.cli.output import count, percent, table

__all__ = ["by_role", "heading", "show_attention", "show_layers", "show_neurons", "show_quality", "show_widths", "unit_for"]

_ROLES = {
    "q": "queries", "k": "keys", "v": "values", "ssa": "attention output", "ffn": "feed-forward", "input": "inputs of linear layers",
    "": "others",
}  # fmt: skip

_PLACES = {"attention": "attention", "ffn": "feed-forward", "block": "after the block"}


def heading(console: Console, title: str, remark: str = "") -> None:
    """A title over a table, with a remark that says what it holds for."""
    console.print()
    console.print(Text(title, "bold").append(f"  {remark}" if remark else "", "not bold dim"), soft_wrap=False)


def by_role(populations: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Populations summed by their role, rates weighted by neurons."""
    rows: dict[str, dict[str, Any]] = {}
    for p in populations:
        row = rows.setdefault(
            p["role"],
            {"role": p["role"], "populations": 0, "neurons": 0, "steps": p["steps"], "events_per_value": 0.0, "firing_rate": 0.0,
             "dead": 0, "saturated": 0},
        )  # fmt: skip
        row["populations"] += 1
        row["steps"] = max(row["steps"], p["steps"])
        for key in ("neurons", "dead", "saturated"):
            row[key] += p[key]
        for key in ("events_per_value", "firing_rate"):
            row[key] += p[key] * p["neurons"]
    for row in rows.values():
        for key in ("events_per_value", "firing_rate"):
            row[key] /= max(1, row["neurons"])
    return list(rows.values())


def show_neurons(console: Console, roles: Iterable[Mapping[str, Any]], total: Mapping[str, Any], remark: str) -> None:
    """Neurons per token by role: how often they fire, and which never or always do."""
    heading(console, "Neurons", remark)
    rows = table("role", ">neurons", ">T", ">firing rate", ">events per value", ">dead", ">saturated")
    for r in roles:
        name = _ROLES.get(r["role"], r["role"])
        rows.add_row(name, count(r["neurons"]), str(r["steps"]), *_rates(r))
    rows.add_row("all", count(total["neurons"]), str(total["steps"]), *_rates(total), style="bold")
    console.print(rows)


def _rates(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    return f"{row['firing_rate']:.3f}", f"{row['events_per_value']:.2f}", count(row["dead"]), count(row["saturated"])


def show_quality(console: Console, quality: Mapping[str, Any], remark: str) -> None:
    """Quality against the network, and against the fine-tuned network if there is one, on the same tokens."""
    heading(console, "Quality", remark)
    confidence = quality["confidence"]
    interval = f"{100 * confidence['level']:g} % interval" if confidence else ""
    _comparison(console, quality, "", ("", ">network", ">spiking", f">{interval}"))
    if quality["perplexity_tuned"] is not None:
        same = (quality.get("tuned_training") or {}).get("same", True)
        fair = "Against the network fine-tuned on the same tokens", "what remains is what the spikes cost"
        heading(console, *(fair if same else ("Against a fine-tuned network", "not known to have seen the same tokens")))
        _comparison(console, quality, "_tuned", ("", ">fine-tuned", ">spiking", f">{interval}"))
    if confidence:
        said = f"intervals: bootstrap over {count(confidence['windows'])} windows, {count(confidence['resamples'])} draws"
    else:
        windows = quality["tokens"] // quality["window"]
        said = f"no confidence intervals: {windows} window{'s' if windows != 1 else ''} of text {'are' if windows != 1 else 'is'} too few"
    console.print(Text(said, "dim"))


def _comparison(console: Console, quality: Mapping[str, Any], suffix: str, columns: tuple[str, ...]) -> None:
    """One table: the program against the network (no suffix) or the fine-tuned network (``_tuned``)."""
    intervals, network = quality["confidence"] or {}, suffix or "_ann"
    rows = table(*columns)

    def row(label: str, name: str, other: str, show: Callable[[float], str], style: str = "") -> None:
        def known(value: float | None) -> str:
            return "-" if value is None else show(value)  # logits that are no numbers

        between = " … ".join(map(known, intervals[name])) if name in intervals else ""
        rows.add_row(label, known(quality[other]) if other else "", Text(known(quality[name]), style), Text(between, "dim"))

    change = quality["perplexity_change" + suffix]
    row("perplexity", "perplexity", "perplexity" + network, lambda v: f"{v:,.2f}")
    style = "red" if change is None or change >= 1 else "green" if change < 0.05 else "yellow"
    row("  difference", "perplexity_change" + suffix, "", lambda v: f"{100 * v:+.1f} %", style)
    row("next token right", "accuracy", "accuracy" + network, percent)
    row("same most likely token", "top1_agreement" + suffix, "", percent)
    row("cosine of logits", "cosine" + suffix, "", lambda v: f"{v:.4f}")
    if not suffix and quality["cosine_hidden"] is not None:
        row("cosine of hidden states", "cosine_hidden", "", lambda v: f"{v:.4f}")
    row("KL divergence [nats]", "kl" + suffix, "", lambda v: f"{v:.4f}")
    console.print(rows)


def show_layers(console: Console, layers: Sequence[Mapping[str, Any]], left_out: str | None, *, whole: bool) -> None:
    """How near each layer comes to the original's: all of them, or one sentence on the worst; or why none was compared."""
    if not layers:
        console.print(Text(f"Layers are not compared: {left_out}.", "dim"))
        return
    if not whole:
        worst, last = min(layers, key=lambda r: -math.inf if r["cosine"] is None else r["cosine"]), layers[-1]
        low, end = ("-" if r["cosine"] is None else f"{r['cosine']:.4f}" for r in (worst, last))
        console.print(
            Text("Layers: ", "bold").append(
                f"cosine with the original's {low} or more (worst: {_PLACES[worst['where']]} of {worst['block']}), {end} after the last "
                "block; --layers shows all", "not bold",
            )
        )  # fmt: skip
        return
    heading(console, "Layers", "cosine with the original's and relative error; attention and FFN: what they add to the residual stream")
    places = [place for place in _PLACES if any(r["where"] == place for r in layers)]
    rows = table("block", *(column for place in places for column in (f">{_PLACES[place]}", ">error")))
    for block in dict.fromkeys(r["block"] for r in layers):
        cells = [block]
        for place in places:
            of = [r for r in layers if (r["block"], r["where"]) == (block, place)]
            cells.append(" ".join("-" if r["cosine"] is None else f"{r['cosine']:.4f}" for r in of))
            cells.append(" ".join("-" if r["relative_error"] is None else f"{r['relative_error']:.3f}" for r in of))
        rows.add_row(*cells)
    console.print(rows)


def show_targets(console: Console, targets: Mapping[str, Mapping[str, Any]]) -> None:
    """What each back end says of its artefact in one sentence."""
    said = {name: found["summary"] for name, found in targets.items() if "summary" in found}
    if said:
        heading(console, "Artefacts")
        for name, sentence in said.items():
            console.print(Text(name, "bold").append(f"  {sentence}", "not bold"))


def unit_for(largest: float) -> tuple[str, float]:
    """A unit of energy in which a number of picojoules reads well, and its size."""
    return next(((u, s) for u, s in (("mJ", 1e9), ("µJ", 1e6), ("nJ", 1e3)) if largest >= s), ("pJ", 1.0))


def show_attention(console: Console, attention: Mapping[str, Any], total: Mapping[str, Any], remark: str) -> None:
    """Energy of the attention block (ASA against SSA) and of everything."""
    unit, size = unit_for(max(total["ann_pj"], total["snn_pj"]))
    heading(console, "Energy", remark)
    rows = table("", f">network [{unit}]", f">spiking [{unit}]", ">saved")
    wide = attention["with_projections"]
    for label, ann, snn, saved in (
        ("attention (ASA, SSA)", attention["asa_pj"], attention["ssa_pj"], attention["reduction"]),
        ("  with its projections", wide["asa_pj"], wide["ssa_pj"], wide["reduction"]),
        ("all", total["ann_pj"], total["snn_pj"], total["reduction"]),
    ):
        style = "" if saved is None else "green" if saved > 0 else "red"
        rows.add_row(label, f"{ann / size:,.3f}", f"{snn / size:,.3f}", Text(percent(saved), style))
    console.print(rows)


# What a chip has to provide; other registers exist for the length of one op on the host.
_REGISTERS = ("membrane", "accumulator", "memory", "count")


def show_widths(console: Console, rows: Iterable[Mapping[str, Any]], each: bool) -> None:
    """Bits that membranes, accumulators, memories and the residual stream of an integer program need, whatever the text."""
    heading(console, "Widths", "bits that hold every value that can occur, proven from the weights")
    listed = table("where", "what", ">places", ">bits", ">smallest", ">largest")
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        what = "residual stream" if row["op"] == "add" and row["what"] == "result" else row["what"]
        if each or what in (*_REGISTERS, "residual stream"):
            where = row["node"] if each else re.sub(r"(?<=_)\d+(?=_|$)", "*", row["node"])
            groups.setdefault((where, what), []).append(row)
    for (where, what), group in groups.items():
        low, high = min(r["low"] for r in group), max(r["high"] for r in group)
        listed.add_row(where, what, count(len(group)), str(max(r["bits"] for r in group)), count(low), count(high))
    console.print(listed)
