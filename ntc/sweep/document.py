"""A sweep as one HTML page that loads nothing: ``ntc sweep MODEL --report FILE``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ntc.energy.wording import percent, unit_of
from ntc.pages import part, render
from ntc.sweep.chart import Dot, scatter
from ntc.sweep.plan import COSTS

__all__ = ["MARK", "page"]

MARK = "<!-- made by ntc sweep -->"
"""In the second line of every page: a file with it may be written over."""


def page(data: Mapping[str, Any], command: str, versions: Mapping[str, str]) -> str:
    """The HTML text.

    Args:
        data: What ``ntc.sweep.sweep`` returns.
        command: The command line that makes this page again.
        versions: Of the programs that made it.
    """
    cost, known = data["cost"], [row for row in data["points"] if "error" not in row]
    unit, size = unit_of(row["energy"][cost][side] for row in known for side in ("snn_pj", "ann_pj"))
    first, second = _headline(data, known)
    return render(
        "ntc.sweep", mark=MARK, style=part("ntc.energy", "page.css") + part("ntc.sweep", "chart.css"), data=data, headline=first,
        second=second, percent=percent, unit=unit, rows=_rows(known, cost, size), original=_original(known, cost, size),
        chart=_chart(known, cost, unit, size), failed=[row for row in data["points"] if "error" in row], command=command,
        facts=_facts(data, versions),
    )  # fmt: skip


def _headline(data: Mapping[str, Any], known: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """What the best settings reach, each with what it is compared with."""
    part, front = COSTS[data["cost"]], [row for row in known if row["front"]]
    said = "; ".join(
        f"{row['label']}: perplexity {_number(row['perplexity'])} instead of {_number(row['perplexity_ann'])}, "
        f"{_saved(row['energy'][data['cost']]['reduction'])}" for row in front
    )  # fmt: skip
    beaten = f"{len(front)} of {len(known)} settings are" if len(front) != 1 else f"One of {len(known)} settings is"
    return f"{beaten} beaten by no other in both perplexity and energy of the {part}.", (
        f"Against the original in the same arithmetic, {data['constants']['title']}: {said}."
        if front
        else "No setting has a perplexity that is finite."
    )


def _saved(share: float | None) -> str:
    if share is None:
        return "with no energy to compare"
    return f"{percent(share)} less energy" if share >= 0 else f"{1 - share:,.2f} times the energy"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.2f}"


def _rows(known: Sequence[Mapping[str, Any]], cost: str, size: float) -> list[dict[str, Any]]:
    return [
        {
            "label": row["label"], "front": row["front"], "perplexity": _number(row["perplexity"]), "change": _change(row),
            "top1": f"{row['top1_agreement']:.3f}", "rate": "–" if row["firing_rate"] is None else f"{row['firing_rate']:.3f}",
            "product": _number(row["steps_times_rate"]), "energy": f"{row['energy'][cost]['snn_pj'] / size:,.4g}",
            "saved": row["energy"][cost]["reduction"], "uncounted": percent(row["uncounted_share"]),
        }
        for row in known
    ]  # fmt: skip


def _change(row: Mapping[str, Any]) -> str:
    """The change of perplexity with its interval, if there is one."""
    if (change := row["perplexity_change"]) is None:
        return "–"
    interval = row.get("perplexity_change_interval")
    between = f" ({100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})" if interval else ""
    return f"{100 * change:+.1f} %{between}"


def _original(known: Sequence[Mapping[str, Any]], cost: str, size: float) -> dict[str, str]:
    return {"perplexity": _number(known[0]["perplexity_ann"]), "energy": f"{known[0]['energy'][cost]['ann_pj'] / size:,.4g}"}


def _chart(known: Sequence[Mapping[str, Any]], cost: str, unit: str, size: float) -> dict[str, Any] | None:
    def dot(row: Mapping[str, Any], side: str, label: str, group: str) -> Dot:
        energy, perplexity = row["energy"][cost][f"{side}_pj"] / size, row["perplexity" if side == "snn" else "perplexity_ann"]
        title = f"{label}: perplexity {perplexity:,.2f}, {energy:,.4g} {unit} per token"
        return Dot(energy, perplexity, label, title, group)

    dots = [dot(row, "snn", row["label"], "front" if row["front"] else "beaten") for row in known if row["perplexity"]]
    originals = {row["energy"][cost]["ann_pj"]: row for row in known if row["perplexity_ann"]}
    dots += [dot(row, "ann", "original network", "original") for row in originals.values()]
    return scatter(dots, f"energy of the {COSTS[cost]} [{unit} per token]", "perplexity", "quality against energy") if dots else None


def _facts(data: Mapping[str, Any], versions: Mapping[str, str]) -> list[tuple[str, str]]:
    constants = data["constants"]
    return [
        ("network", data["model"]),
        ("text", f"{data['data']}, sha256 of the file {data['data_sha256']}"),
        ("measured", f"perplexity on up to {data['tokens']:,} tokens, spikes and operations on up to {data['energy_tokens']:,} of them"),
        ("energies per operation", f"{constants['id']}: {constants['source']}; {constants['scope']}"),
        ("made by", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
