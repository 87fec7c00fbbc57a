"""Energies per operation, as tables with their source: ``ntc/data/energy``, or a file of the user's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ntc.energy.numbers import Level, Number, number, shipped, table_of, whole
from ntc.errors import ConfigError
from ntc.ops import Counts

__all__ = ["DEFAULT", "Bits", "Constants", "list_constants", "load_constants"]

DEFAULT = "horowitz-45nm-fp32"

_OPERATIONS = {"mac": "macs", "ac": "acs", "graded_mac": "graded_macs", "update": "neuron_updates", "elementwise": "elementwise"}
"""Fields of ``Counts`` by the name of their energy."""

_SPIKES = {"ac", "update"}
"""What a table of a chip must have; others need not be known."""


@dataclass(frozen=True)
class Bits:
    """Width of one stored element, by what it is [bits]."""

    weights: int = 32
    activations: int = 32
    membranes: int = 32
    state: int = 32


@dataclass(frozen=True)
class Constants:
    """Energy per operation [pJ], with where the numbers come from.

    Attributes:
        id: Name of the table.
        title: What it is, in a line.
        source: Where its numbers come from.
        scope: What they leave out.
        mac: One multiply-accumulate; None = the source has no figure, which only a table of a chip may leave out. Likewise the others.
        ac: One accumulate.
        graded_mac: One multiply-accumulate that a graded spike causes.
        update: One update of a membrane.
        elementwise: One operation of a norm, an activation, a softmax.
        bits: Widths of what the arithmetic reads and writes.
        ranges: Low and high values with their sources, by name, of numbers that have any.
        baselines: Tables that the original network is costed with, too.
        device: The chip, if the numbers are published figures of one and not of arithmetic in a technology. They then contain the memory
            of the chip, and no other network can be costed with them.
        multiplier: Energy of one multiplication [pJ] and its width in bits, for networks with fewer bits; None = not known.
    """

    id: str
    title: str
    source: str
    scope: str
    mac: float | None
    ac: float | None
    graded_mac: float | None
    update: float | None
    elementwise: float | None = 0.0
    bits: Bits = field(default_factory=Bits)
    ranges: Mapping[str, Number] = field(default_factory=dict)
    baselines: tuple[str, ...] = ()
    multiplier: tuple[float, int] | None = None
    device: str = ""

    def cost(self, counts: Counts) -> float:
        """Energy of the counts [pJ]; those without a figure (``unpriced``) are not in it."""
        return (
            (self.mac or 0.0) * counts.macs + (self.ac or 0.0) * counts.acs + (self.graded_mac or 0.0) * counts.graded_macs
            + (self.update or 0.0) * counts.neuron_updates + (self.elementwise or 0.0) * counts.elementwise
        )  # fmt: skip

    def unpriced(self, counts: Counts) -> dict[str, float]:
        """Operations that the table has no figure for, by field of ``Counts``."""
        found = {field: getattr(counts, field) for name, field in _OPERATIONS.items() if getattr(self, name) is None}
        return {field: number for field, number in found.items() if number}

    def stated(self, counts: Counts) -> float | None:
        """``cost``, or None if there are operations and the table has a figure for none of them."""
        cost = self.cost(counts)
        return cost if cost or not self.unpriced(counts) else None

    def at(self, level: Level, only: str | None = None) -> Constants:
        """The table with its low or high values, or with that of one number alone."""
        changed: dict[str, Any] = {name: n.at(level) for name, n in self.ranges.items() if only in (None, name)}
        return replace(self, **changed)

    def quantised(self, bits: int) -> Constants:
        """The table for a network whose activations have so many bits; weights and sums keep theirs.

        A multiplier's energy goes with the product of its widths.

        Raises:
            ConfigError: If the table does not say what a multiplication takes.
        """
        if self.multiplier is None:
            raise ConfigError(f"the energy constants {self.id} do not say what a multiplication takes: add [multiplier] to the table")
        picojoules, width = self.multiplier
        mac = picojoules * bits / width + (self.ac or 0.0)
        title = f"{self.title}; activations of {bits} bit{'s' if bits != 1 else ''}, multiplier in proportion to its widths"
        return replace(
            self, id=f"{self.id}-a{bits}", title=title, mac=mac, graded_mac=mac, bits=replace(self.bits, activations=bits), ranges={}
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data with stable keys (docs/json.md)."""
        found = {name: getattr(self, name) for name in ("id", "title", "source", "scope", "device", *_OPERATIONS)}
        ranges = [{"name": name, **asdict(n)} for name, n in self.ranges.items()]
        return {**found, "bits": asdict(self.bits), "ranges": ranges}


def load_constants(table: str | Path | None = None) -> Constants:
    """The constants of a table that ships with ntc, by name, or of a TOML file; by default 45 nm, fp32.

    Raises:
        ConfigError: If there is no such table, it lacks a number, or a number makes no sense.
    """
    where = table or DEFAULT
    with table_of(where, "energy", "energy constants") as data:
        numbers = {name: number(f"the energy constants {where}", name, value) for name, value in data["picojoules"].items()}
        ranges = {name: n for name, n in numbers.items() if not n.certain or n.source}
        device, baselines = data.get("device", ""), tuple(data.get("baselines", ()))
        return Constants(
            data["id"], data["title"], data["source"], data["scope"], **_nominal(numbers, device, baselines),
            bits=_bits(data.get("bits", {})), ranges=ranges, baselines=baselines, multiplier=_multiplier(data.get("multiplier")),
            device=device,
        )  # fmt: skip


def _nominal(numbers: Mapping[str, Number], device: str, baselines: tuple[str, ...]) -> dict[str, float | None]:
    """Nominal values; None for what a table of a chip leaves out."""
    if device and baselines:
        raise ValueError(f"figures of {device} contain its memory and cannot be set against bare arithmetic: it may name no baselines")
    needed = _SPIKES if device else _OPERATIONS.keys() - {"elementwise"}
    if missing := needed - numbers.keys():
        raise ValueError(f"it has no energy of {', '.join(sorted(missing))}")
    if unknown := numbers.keys() - _OPERATIONS.keys():
        raise ValueError(f"there are no operations called {', '.join(sorted(unknown))}")
    absent = dict.fromkeys(_OPERATIONS) if device else {"elementwise": 0.0}
    return {**absent, **{name: n.nominal for name, n in numbers.items()}}


def _bits(given: Mapping[str, Any]) -> Bits:
    return Bits(**{name: whole(width, f"the width of {name}") for name, width in given.items()})


def _multiplier(given: Mapping[str, Any] | None) -> tuple[float, int] | None:
    if given is None:
        return None
    return number("the multiplier", "picojoules", given["picojoules"]).nominal, whole(given["bits"], "the width of the multiplier")


def list_constants() -> list[Constants]:
    """The tables that ship with ntc."""
    return [load_constants(name) for name in shipped("energy")]
