"""The sections of the network as the template draws them: boxes with sizes and firing rates, edges as SVG paths, in two orientations."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from ntc_backends import netlist_schema as schema
from ntc_backends.inspect_page.drawing import Drawing, draw
from ntc_backends.inspect_page.flow import Box, Flow, Section
from ntc_backends.inspect_page.subject import Subject

__all__ = ["RATE_STEPS", "Cell", "Pictured", "pictures", "rate_class", "rate_text"]

RATE_STEPS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5)
"""Upper ends of the colours of a firing rate; the first is for no spike at all, and one more colour lies above the last."""

_ROLES = {"q": "Q", "k": "K", "v": "V", "ssa": "attention out", "ffn": "FFN"}
_WIDE_LAYERS = 9
_ALIKE = 5  # so many sections alike in a row are folded, but for the first two and the last
_CELLS = 12


@dataclass(frozen=True)
class Cell:
    """A population in the row of a closed section."""

    name: str
    label: str
    rate: str
    colour: str


@dataclass(frozen=True)
class Pictured:
    """A section of the page.

    Attributes:
        name: Module of the block, or ``input``, ``head``, ``network``.
        title: Heading.
        sizes: What it holds, in words.
        cells: Its populations.
        more: How many populations have no cell.
        drawings: For each branch the drawing for wide screens and that for narrow ones.
        folded: Sections built like the one before, which this one stands for; then it has no drawing of its own.
    """

    name: str
    title: str
    sizes: str
    cells: tuple[Cell, ...] = ()
    more: int = 0
    drawings: tuple[tuple[Drawing, Drawing], ...] = ()
    folded: tuple[Pictured, ...] = ()


def rate_class(rate: float | None) -> str:
    """CSS class of a firing rate."""
    return "" if rate is None else f"rate{int(np.searchsorted(RATE_STEPS, rate))}"


def rate_text(rate: float | None) -> str:
    """A firing rate in words of at most six characters."""
    if rate is None:
        return ""
    return "0 %" if rate == 0 else "<0.1 %" if rate < 0.0005 else f"{100 * rate:.1f} %"


def pictures(subject: Subject, flow: Flow, rates: Mapping[str, float]) -> list[Pictured]:
    """All sections, those that are built alike folded if there are many.

    Args:
        subject: The network.
        flow: Its boxes.
        rates: Firing rate of each population that ran; empty if nothing did.
    """
    made = [(_shape_of(section), _pictured(subject, section, flow, rates)) for section in flow.sections]
    result: list[Pictured] = []
    for _, run in groupby(made, key=lambda pair: pair[0]):
        alike = [picture for _, picture in run]
        if len(alike) >= _ALIKE + 3:
            first, last = alike[2], alike[-2]
            title = f"{len(alike) - 3} blocks built like {alike[1].title}"
            names = f"{first.name} to {last.name}"
            alike = [*alike[:2], Pictured(names, title, _mean_rate(alike[2:-1], rates), folded=tuple(alike[2:-1])), alike[-1]]
        result += alike
    return result


def _mean_rate(sections: list[Pictured], rates: Mapping[str, float]) -> str:
    found = [rates[cell.name] for section in sections for cell in section.cells if cell.name in rates]
    sizes = f"each: {sections[0].sizes}"
    return f"{sizes}; firing rates {rate_text(min(found))} to {rate_text(max(found))}" if found else sizes


def _shape_of(section: Section) -> tuple[Any, ...]:
    """What two sections that are built alike have in common."""
    shape: list[Any] = []
    for branch in section.branches:
        place = {box.name: i for i, box in enumerate(branch.boxes)}
        shape.append(tuple((box.kind, *(_fixed_lines(box) if box.element else [box.title])) for box in branch.boxes))
        shape.append(tuple((place[a], place[b], kind) for a, b, kind in branch.edges))
        shape.append((tuple(place[name] for name in branch.taps), bool(branch.sum)))
    return tuple(shape)


def _pictured(subject: Subject, section: Section, flow: Flow, rates: Mapping[str, float]) -> Pictured:
    populations = [box for box in section.boxes if box.kind == "population"]
    cells = tuple(
        Cell(box.name, _population_title(box), rate_text(rates.get(box.name)), rate_class(rates.get(box.name))) for box in populations
    )
    titles = _titles(section, flow)
    drawings = []
    for branch in section.branches:
        labels = {box.name: _label(subject, box, titles, rates) for box in branch.boxes}
        outside = {source: flow.boxes[source].title for source, _ in branch.inlets}
        narrow = draw(branch, labels, outside, flow.has_stream, upright=True)
        wide = narrow if narrow.layers > _WIDE_LAYERS else draw(branch, labels, outside, flow.has_stream, upright=False)
        drawings.append((wide, narrow))
    number = re.search(r"\.(\d+)$", section.name)
    named = {"input": "Input", "head": "Head", "network": "Network"}
    return Pictured(
        section.name, f"Block {number[1]}" if number else named.get(section.name, section.name), _sizes(subject, section),
        cells[:_CELLS], max(0, len(cells) - _CELLS), tuple(drawings),
    )  # fmt: skip


def _sizes(subject: Subject, section: Section) -> str:
    """What a section holds, in words."""
    elements = [box.element for box in section.boxes if box.element is not None]
    neurons = sum(e.size for e in elements if isinstance(e, schema.Population))
    synapses = sum(e.synapses for e in elements if isinstance(e, schema.Projection))
    host = subject.size_of({t for box in section.boxes for t in box.tensors})
    sizes = ((neurons, "neurons"), (synapses, "synapses"), (host, "parameters on the host"))
    return ", ".join(f"{number:,} {what}" for number, what in sizes if number) or "no parameters"


def _titles(section: Section, flow: Flow) -> dict[str, str]:
    """Titles of projections: the module's last name, and the role of the neurons behind it where several share the module."""
    projections = [box for box in section.boxes if box.kind == "projection"]
    modules = Counter(box.module for box in projections)
    edges = [edge for branch in section.branches for edge in branch.edges]
    titles = {}
    for box in projections:
        tail = box.module.rpartition(".")[2] or box.name
        behind = [flow.boxes[b] for a, b, _ in edges if a == box.name and flow.boxes[b].kind == "population"]
        shared = modules[box.module] > 1 and behind
        titles[box.name] = f"{tail} · {_population_title(behind[0])}" if shared else tail
    return titles


def _population_title(box: Box) -> str:
    role = box.element.role if isinstance(box.element, schema.Population) else ""
    return _ROLES.get(role, role) or box.name.removesuffix("_spikes")


def _label(subject: Subject, box: Box, titles: Mapping[str, str], rates: Mapping[str, float]) -> dict[str, Any]:
    """What stands in and behind a box."""
    title, *lines = _fixed_lines(box)
    title = titles.get(box.name, title)
    rate = rates.get(box.name)
    if box.kind == "population" and rate is not None:
        lines[-1] = f"fires {rate_text(rate)}"
    if box.kind == "host" and box.tensors:
        lines = [f"{subject.size_of(set(box.tensors)):,} param."]
    lines += _widths(box.element)
    place = f"host island {box.island}: {', '.join(box.ops)}" if box.island else box.kind
    hint = " · ".join(filter(None, (box.name, place, box.module, *lines)))
    return {"title": title, "lines": lines, "hint": hint, "colour": rate_class(rate), "link": box.name if rate is not None else ""}


def _fixed_lines(box: Box) -> list[str]:
    """Title and lines of a box, without what was measured and without the names of its tensors."""
    element = box.element
    match element:
        case schema.Population():
            levels = "ternary" if element.signed else "binary"
            return [_population_title(box), f"{element.size:,} neurons", f"{element.model.upper()}, {levels}"]
        case schema.Projection():
            post, pre = element.shape
            return [box.module.rpartition(".")[2], f"{pre:,} → {post:,}", f"{element.synapses:,} syn."]
        case schema.DynamicProduct():
            leaky = element.leak is not None or element.renewal is not None
            state = int(np.prod(element.state_shape))
            return ["SSA, leaky" if leaky else "SSA", f"{element.heads} heads × {element.head_size}", f"{state:,} states"]
        case schema.Decode():
            return ["decode", f"{'mean' if element.code == 'rate' else 'sum'} of {len(element.step_weights)} steps"]
        case schema.Scale():
            return [{"constant": "gain", "position": "÷ position", "table": "× position", "rms": "÷ rms", "row-sum": "÷ row sum"}.get(
                element.kind, element.kind
            ), "per step"]  # fmt: skip
    return [box.title, box.island] if box.island else [box.title]


def _widths(element: schema.AnyElement | None) -> list[str]:
    """Of the integer grade: the register that matters most on a chip."""
    match element:
        case schema.Population(membrane_bits=int(bits)):
            return [f"v {bits} bit"]
        case schema.Projection(accumulator_bits=int(bits)):
            return [f"sum {bits} bit"]
        case schema.DynamicProduct(state_bits=int(bits)):
            return [f"M {bits} bit"]
    return []
