"""Tables that more than one command shows: neurons, quality, energy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from ntc.cli.output import count, percent, table

__all__ = ["by_role", "heading", "show_attention", "show_neurons", "show_quality", "unit_for"]

_ROLES = {
    "q": "queries", "k": "keys", "v": "values", "ssa": "attention output", "ffn": "feed-forward", "": "others",
}  # fmt: skip


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
    """Quality against the network on the same tokens."""
    heading(console, "Quality", remark)
    rows = table("", ">network", ">spiking", ">difference")
    change = quality["perplexity_change"]
    change_text = Text(f"{100 * change:+.1f} %", "green" if change < 0.05 else "yellow" if change < 1 else "red")
    rows.add_row("perplexity", f"{quality['perplexity_ann']:,.2f}", f"{quality['perplexity']:,.2f}", change_text)
    rows.add_row("same most likely token", "", percent(quality["top1_agreement"]), "")
    rows.add_row("cosine of logits", "", f"{quality['cosine']:.4f}", "")
    if quality["cosine_hidden"] is not None:
        rows.add_row("cosine of hidden states", "", f"{quality['cosine_hidden']:.4f}", "")
    rows.add_row("KL divergence [nats]", "", f"{quality['kl']:.4f}", "")
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
