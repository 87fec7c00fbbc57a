"""The energy report as one HTML page that loads nothing: ``ntc energy DIR --report FILE``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ntc.energy.bars import Bar, stacked
from ntc.energy.headline import headline
from ntc.energy.wording import count, percent, unit_of
from ntc.pages import part, render

__all__ = ["MARK", "page"]

MARK = "<!-- made by ntc energy -->"
"""In the second line of every page: a file with it may be written over."""

_COLUMNS = (("compute", "compute"), ("compute_and_memory", "compute and memory"))
_PARTS = (("attention", "attention block"), ("total", "everything"))
_COUNTS = (
    ("dense_macs", "dense MACs"), ("macs", "MACs"), ("effective_macs", "MACs with no factor zero"), ("acs", "ACs"),
    ("graded_macs", "graded MACs"), ("neuron_updates", "membrane updates"), ("elementwise", "elementwise"), ("spikes", "spikes"),
)  # fmt: skip

_BY_KIND = {"dense": "dense_macs", "macs": "macs", "acs": "acs", "updates": "neuron_updates", "elementwise": "elementwise"}


def page(data: Mapping[str, Any], name: str, command: str, versions: Mapping[str, str]) -> str:
    """The HTML text.

    Args:
        data: ``EnergyReport.to_json`` with its sensitivity.
        name: What was costed, for the title.
        command: The command line that makes this report again.
        versions: Of the programs that made it.
    """
    unit, size = unit_of(column[key] for column in data["total"]["columns"] for key in ("ann_pj", "snn_pj"))

    def energy(value: float | None) -> str:
        return "–" if value is None else f"{value / size:,.4g}"

    first, second = headline(data)
    return render(
        "ntc.energy", mark=MARK, style=part("ntc.energy", "page.css"), name=name, data=data, headline=first, second=second, percent=percent,
        count=count, unit=unit, command=command, figures=_figures(data, unit, size), columns=_columns(data, energy),
        baselines=_baselines(data, energy), operations=_operations(data), kinds=_kinds(data["kinds"]),
        nodes=_nodes(data["nodes"]["snn"]),
        levels=[{**row, "ann": energy(row["ann_pj"]), "snn": energy(row["snn_pj"])} for row in data["sensitivity"]["total"]["levels"]],
        numbers=data["sensitivity"]["total"]["numbers"], provenance=_provenance(data), facts=_facts(data, versions), **_charts(data),
    )  # fmt: skip


def _figures(data: Mapping[str, Any], unit: str, size: float) -> list[dict[str, str]]:
    found = []
    for column, name in zip(data["total"]["columns"], ("compute only", "with memory")):
        if column["snn_pj"] is not None:
            before = "" if column["ann_pj"] is None else f"original {column['ann_pj'] / size:,.4g} {unit}"
            chip = data["constants"]["device"]
            what = f"spikes, at figures for {chip}" if chip else f"spiking, {name}"
            found.append((what, f"{column['snn_pj'] / size:,.4g} {unit}", before or "no saving is stated"))
    if (perplexity := data["quality"]["perplexity"]) is not None:
        original = data["quality"]["perplexity_ann"]
        beside = "same run" if original is None else f"original {original:,.2f}"
        found.append(("perplexity of this program", f"{perplexity:,.2f}", f"{beside}, same {data['tokens']:,} tokens"))
    if data["firing_rate"] is not None:
        found.append(("firing rate", f"{data['firing_rate']:.3f}", f"spikes per neuron and step, T = {data['steps']}"))
    if (product := data["attention"]["steps_times_rate"]) is not None:
        found.append(("T·r of spiking attention", f"{product:.2f}", "ACs per MAC that they replace; NeurTransformer: 0.75 to 1.80"))
    return [{"what": what, "value": value, "remark": remark} for what, value, remark in found]


def _columns(data: Mapping[str, Any], energy: Any) -> list[dict[str, Any]]:
    return [
        {"part": said, **row, "ann": energy(row["ann_pj"]), "snn": energy(row["snn_pj"])}
        for part, said in _PARTS
        for row in data[part]["columns"]
    ]


def _baselines(data: Mapping[str, Any], energy: Any) -> list[dict[str, Any]]:
    def even(value: float | None, form: str) -> str:
        return "none" if value is None else form.format(value)

    return [
        {
            "part": said, "baseline": row["baseline"], "column": column, "ann": energy(row[key]["ann_pj"]),
            "snn": energy(row[key]["snn_pj"]), "reduction": row[key]["reduction"], "rate": even(row[key]["break_even_rate"], "{:.3g}"),
            "steps": even(row[key]["break_even_steps"], "{:.3g}"),
        }
        for part, said in _PARTS
        for row in data["baselines"][part]
        for key, column in _COLUMNS
    ]  # fmt: skip


def _operations(data: Mapping[str, Any]) -> list[dict[str, str]]:
    total = data["total"]
    rows = [{"what": what, "ann": count(total["ann"][key]), "snn": count(total["snn"][key])} for key, what in _COUNTS]
    for moved in data["moved"]:
        if moved["ann_bytes"] or moved["snn_bytes"]:
            where = "" if data["constants"]["device"] else f" ({moved['level']})"
            what = f"bytes of {moved['data'].replace('_', ' ')}{where}"
            rows.append({"what": what, "ann": count(moved["ann_bytes"]), "snn": count(moved["snn_bytes"])})
    return rows


def _kinds(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """One row per kind and network, of what computes or moves something."""
    rows = []
    for group in groups:
        for side, network in (("ann", "original"), ("snn", "spiking")):
            numbers = group[side]
            moved = sum(float(value) for key, value in numbers.items() if key.endswith("_bytes"))
            if moved or any(numbers[key] for key in _BY_KIND.values()):
                counted = {name: count(numbers[key]) for name, key in _BY_KIND.items()}
                rows.append({"kind": group["kind"], "network": network, "bytes": count(moved), **counted})
    return rows


def _nodes(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    def moved(row: Mapping[str, Any]) -> float:
        return sum(float(value) for key, value in row.items() if key.endswith("_bytes"))

    return [
        {
            "node": row["node"], "kind": row["kind"], "macs": count(row.get("macs", 0)),
            "effective": count(row.get("effective_macs", 0)), "acs": count(row.get("acs", 0)),
            "updates": count(row.get("neuron_updates", 0)), "spikes": count(row.get("spikes", 0)), "bytes": count(moved(row)),
            "pj": count(row["pj"]), "memory_pj": count(row["memory_pj"]),
        }
        for row in rows
    ]  # fmt: skip


def _charts(data: Mapping[str, Any]) -> dict[str, Any]:
    """Two bars per block, the original and the program: by kind of operation, and by what is moved. With the table of a chip one, since
    the original has no figure.
    """
    chip = data["constants"]["device"]
    blocks = {b["block"]: "outside of blocks" if b["block"] == "outside" else b["block"] for b in data["blocks"]}
    price = {m["data"]: m["pj_per_byte"] for m in data["moved"]}
    by_kind: dict[tuple[str, str], dict[str, float]] = {}
    by_data: dict[tuple[str, str], dict[str, float]] = {}
    for side in ("ann", "snn"):
        for row in data["nodes"][side]:
            at = (row["block"] or "outside", side)
            kinds, moved = by_kind.setdefault(at, {}), by_data.setdefault(at, {"compute": 0.0})
            kinds[row["kind"]] = kinds.get(row["kind"], 0.0) + row["pj"]
            moved["compute"] += row["pj"]
            for name, picojoules in price.items():
                if bytes_moved := row.get(f"{name}_bytes"):
                    said = name.replace("_", " ")
                    moved[said] = moved.get(said, 0.0) + bytes_moved * picojoules
    charts = {}
    for chart, found, label in (
        ("by_kind", by_kind, "compute energy per block, by kind of operation"),
        ("by_data", by_data, "energy per block, by what is moved"),
    ):
        bars = [
            Bar(name if side == "ann" or chip else "spiking", found.get((block, side), {}), side == "snn" and not chip)
            for block, name in blocks.items()
            for side in (("snn",) if chip else ("ann", "snn"))
        ]
        charts[chart] = stacked(bars, *unit_of(sum(bar.parts.values()) for bar in bars), label)
    return charts


def _provenance(data: Mapping[str, Any]) -> list[dict[str, str]]:
    constants, memory = data["constants"], data["memory"]
    rows = []
    for name in ("mac", "ac", "graded_mac", "update", "elementwise"):
        if constants[name] is not None:
            rows.append(_number(name.replace("_", " "), constants[name], constants))
    if constants["device"]:
        return rows
    for level in memory["levels"]:
        rows.append(_number(f"{level['level']}, {level['bits']} bits", level["picojoules"], memory, level["level"]))
    rows.append(_number("partial sums", memory["partial_sum_accesses"], memory))
    return rows


def _number(said: str, nominal: float, table: Mapping[str, Any], name: str = "") -> dict[str, str]:
    found = next((r for r in table["ranges"] if r["name"] in (name or said, said.replace(" ", "_"))), None)
    low, high = (found["low"], found["high"]) if found else (nominal, nominal)
    source = f"{found['source']}; {table['id']}" if found and found["source"] else table["id"]
    return {"name": said, "low": f"{low:g}", "nominal": f"{nominal:g}", "high": f"{high:g}", "source": source}


def _facts(data: Mapping[str, Any], versions: Mapping[str, str]) -> list[tuple[str, str]]:
    constants, memory = data["constants"], data["memory"]
    shared = memory["reuse_tokens"]
    phase = "a weight is read for each token" if shared == 1 else f"{shared:,} tokens share one read of a weight"
    bits = ", ".join(f"{name} {width}" for name, width in constants["bits"].items())
    holds = ", ".join(f"{name.replace('_', ' ')} in {level}" for name, level in memory["holds"].items())
    together = "together: membranes stay in registers" if memory["steps_together"] else "one after another: membranes are read and written"
    of_file = f", of its file {data['data_file_sha256']}" if data["data_file_sha256"] else ""
    of_memory = [
        ("phase", f"{data['phase']}: {phase}"), ("time steps", together), ("widths [bits]", bits), ("memory", holds),
        ("energies of memory", f"{memory['id']}: {memory['source']}; {memory['scope']}"),
    ]  # fmt: skip
    return [
        ("text", f"{data['data']}, sha256 of its token ids {data['data_sha256']}{of_file}"),
        ("measured", f"spikes, ACs, effective MACs and perplexity, on {data['tokens']:,} tokens in windows of {data['window']:,}"),
        ("counted from shapes", "dense MACs, MACs, elementwise operations, bytes; of the original everything"),
        ("energies per operation", f"{constants['id']}: {constants['source']}; {constants['scope']}"),
        *([] if constants["device"] else of_memory),
        ("mapped", "no: the program is placed on no chip; hops, packets and idle cores are not known"),
        ("made by", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
