"""The tables of the page: populations, passes, verification, widths, provenance. Plain data for the template."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np

from ntc_backends import netlist_schema as schema
from ntc_backends.inspect_page.activity import Fired
from ntc_backends.inspect_page.flow import Flow
from ntc_backends.inspect_page.picture import rate_class, rate_text
from ntc_backends.inspect_page.prompt import Prompt
from ntc_backends.inspect_page.subject import Subject

__all__ = ["commands", "headline", "pass_rows", "population_rows", "verify_rows", "width_rows"]

_SMALLEST = 1e-7  # left end of the bars of drift


def headline(subject: Subject, flow: Flow, fired: Mapping[str, Fired]) -> list[tuple[str, str, str]]:
    """(figure, what it is, explanation) at the top of the page."""
    populations = subject.populations
    neurons = sum(p.size for p in populations)
    synapses = sum(p.synapses for p in subject.of_kind(schema.Projection))
    host = subject.size_of({t for box in flow.boxes.values() for t in box.tensors})
    levels = "/".join(sorted({"ternary" if p.signed else "binary" for p in populations}))
    found = [
        (str(subject.steps), "time steps T", "per token"),
        (", ".join(subject.codes), "code", f"{levels}, {'integers' if subject.rounding == 'integer' else 'floating point'}"),
        (f"{neurons:,}", "neurons", f"in {len(populations)} populations"),
        (_short(synapses), "synapses", f"{synapses:,} in {len(subject.of_kind(schema.Projection))} projections"),
        (_short(host), "host parameters", f"in {len(subject.of_kind(schema.HostIsland))} host islands"),
    ]
    if fired:
        spikes = sum(int(f.counts.sum()) for f in fired.values())
        rate = spikes / sum(f.element.size * f.most for f in fired.values())
        events = spikes / sum(f.element.size * f.tokens for f in fired.values())
        found.append((rate_text(rate), "firing rate", f"{events:.2f} spikes per value, {spikes:,} spikes"))
        dead, saturated = (sum(getattr(f, key) for f in fired.values()) for key in ("dead", "saturated"))
        found.append((f"{dead:,}", "dead neurons", f"and {saturated:,} saturated, on this prompt"))
    return found


def _short(number: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**4)):
        if number >= size:
            return f"{number / (1000 if unit == 'k' else size):.1f} {unit}"
    return f"{number:,}"


def population_rows(subject: Subject, flow: Flow, fired: Mapping[str, Fired]) -> list[dict[str, Any]]:
    """One row per population."""
    rows: list[dict[str, Any]] = []
    for i, element in enumerate(subject.populations):
        row = {
            "name": element.name, "block": flow.boxes[element.name].block, "role": element.role, "neurons": element.size, "order": i,
            "model": element.model.upper() + (", ternary" if element.signed else ""), "steps": element.steps,
            "threshold": _range(subject, element.threshold), "start": _start(subject, element), "bits": element.membrane_bits,
        }  # fmt: skip
        if found := fired.get(element.name):
            row |= {
                "rate": found.rate, "rate_text": rate_text(found.rate), "colour": rate_class(found.rate), "events": found.events_per_value,
                "dead": found.dead, "saturated": found.saturated, "spark": _spark(found.histogram),
            }  # fmt: skip
        rows.append(row)
    return rows


def _range(subject: Subject, value: schema.Number | schema.Integer | None) -> str:
    numbers = subject.number(value)
    if numbers is None:
        return ""
    low, high = numbers.min(), numbers.max()
    style = ",d" if np.issubdtype(numbers.dtype, np.integer) else ".4g"
    return f"{low:{style}}" if low == high else f"{low:{style}} to {high:{style}}"


def _start(subject: Subject, element: schema.Population) -> str:
    return _range(subject, element.start) if element.start is not None else f"{_range(subject, element.v0)} θ"


def _spark(histogram: list[int]) -> str:
    """The histogram as one SVG path in a box of 60 by 18; heights by the square root, so that few neurons are seen too."""
    most, width = math.sqrt(max(histogram)) or 1.0, 60 / len(histogram)
    bars = []
    for i, number in enumerate(histogram):
        if number:
            height = max(1.0, 18 * math.sqrt(number) / most)
            bars.append(f"M{i * width:g} 18v-{height:.1f}h{width - 0.6:g}v{height:.1f}z")
    return "".join(bars)


def pass_rows(subject: Subject) -> list[dict[str, Any]]:
    """The history, with the drift of the logits on a logarithmic scale."""
    drifts = [record["drift"] for record in subject.passes if record.get("drift")]
    top = max([*drifts, 1.0])
    rows = []
    for record in subject.passes:
        drift = record.get("drift")
        share = 0.0 if not drift or drift <= _SMALLEST else math.log(drift / _SMALLEST) / math.log(top / _SMALLEST)
        rows.append({
            "name": record["name"], "sites": record["sites"], "missed": list(record.get("missed", ())), "drift": drift, "bar": 100 * share,
            "drift_text": "" if drift is None else "0" if drift == 0 else f"{drift:.2g}",
            "details": {k: json.dumps(v, indent=1, ensure_ascii=False) for k in ("options", "notes") if (v := record.get(k))},
        })  # fmt: skip
    return rows


def verify_rows(subject: Subject) -> list[dict[str, Any]]:
    """What ``ntc verify`` left in the manifest: one row per artefact; empty if it has not run."""
    from ntc.proof import KEY

    found = subject.manifest.get(KEY)
    targets = found.get("targets", {}) if isinstance(found, Mapping) else {}
    rows = []
    for name, target in targets.items():
        if not isinstance(target, Mapping):
            continue
        given = target.get("held")
        held = given if isinstance(given, Mapping) else {}
        rows.append({
            "name": name, "verdict": str(target.get("verdict", "")), "agrees": target.get("agrees"),
            "reason": str(target.get("reason", "")),
            "mismatches": target.get("spike_mismatches"), "compared": target.get("compared"), "held": held.get("spike_mismatches"),
            "difference": target.get("max_logit_diff"), "top1": target.get("top1_agreement"),
            "runs_in": str(target.get("runs_in", "")),
        })  # fmt: skip
    return rows


def width_rows(subject: Subject) -> list[dict[str, Any]]:
    """Of the integer grade: how wide registers have to be, one row per kind; empty for floating point."""
    if subject.rounding != "integer":
        return []
    found: dict[tuple[str, str], list[tuple[int, str, int | None, int | None]]] = {}
    if subject.program is not None:
        from ntc.widths import widths

        for width in widths(subject.program):
            found.setdefault((width.op, width.what), []).append((width.bits, width.node, width.low, width.high))
    else:
        for element in subject.elements:
            for key in ("membrane_bits", "accumulator_bits", "weight_bits", "state_bits", "count_bits"):
                if (bits := getattr(element, key, None)) is not None:
                    found.setdefault((type(element).__name__, key.removesuffix("_bits")), []).append((bits, element.name, None, None))
    rows = []
    for (op, what), registers in found.items():
        widest = max(registers, key=lambda r: r[0])
        interval = "" if widest[2] is None else f"{widest[2]:,} … {widest[3]:,}"
        rows.append({
            "op": op, "what": what, "number": len(registers), "least": min(r[0] for r in registers), "most": widest[0], "node": widest[1],
            "interval": interval,
        })  # fmt: skip
    return sorted(rows, key=lambda row: -row["most"])


def commands(subject: Subject, prompt: Prompt | None) -> list[str]:
    """What to type to have the folder and this page again."""
    manifest, lines = subject.manifest, []
    if recipe := manifest.get("recipe"):
        parts = ["ntc", "compile", str(subject.model["source"]), "-o", str(subject.path), "--recipe", str(recipe["name"])]
        settings = manifest.get("settings", {})
        for key, value in settings.get("options", {}).items():
            parts += ["--set", f"{key}={_toml(value)}"]
        ran = {record["name"]: record for record in subject.passes}
        if "quantize" in ran:
            parts += ["--quantize", str(ran["quantize"].get("options", {}).get("weight_bits", 8))]
        known = ((bool(settings.get("overrides")), "with the overrides of its settings"), ("finetune" in ran, "then ntc finetune"))
        said = ", ".join(text for holds, text in known if holds)
        lines.append(shlex.join(parts) + (f"  # {said}" if said else ""))
    parts = ["ntc", "inspect", str(subject.path), *(prompt.option if prompt else ()), "-o", "page.html"]
    return [*lines, shlex.join(parts)]


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
