"""Energies per operation, as tables with their source: ``ntc/data/energy``, or a file of the user's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ntc.energy.numbers import Level, Number, number, read_table, shipped
from ntc.errors import ConfigError
from ntc.ops import Counts

__all__ = ["DEFAULT", "Bits", "Constants", "list_constants", "load_constants"]

DEFAULT = "horowitz-45nm-fp32"

_OPERATIONS = ("mac", "ac", "graded_mac", "update")


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
        mac: One multiply-accumulate.
        ac: One accumulate.
        graded_mac: One multiply-accumulate that a graded spike causes.
        update: One update of a membrane.
        elementwise: One operation of a norm, an activation, a softmax.
        bits: Widths of what the arithmetic reads and writes.
        ranges: Low and high values with their sources, by name, of numbers that have any.
        baselines: Tables that the original network is costed with, too.
        multiplier: Energy of one multiplication [pJ] and its width in bits, for networks with fewer bits; None = not known.
    """

    id: str
    title: str
    source: str
    scope: str
    mac: float
    ac: float
    graded_mac: float
    update: float
    elementwise: float = 0.0
    bits: Bits = field(default_factory=Bits)
    ranges: Mapping[str, Number] = field(default_factory=dict)
    baselines: tuple[str, ...] = ()
    multiplier: tuple[float, int] | None = None

    def cost(self, counts: Counts) -> float:
        """Energy of the counts [pJ]."""
        return (
            self.mac * counts.macs + self.ac * counts.acs + self.graded_mac * counts.graded_macs + self.update * counts.neuron_updates
            + self.elementwise * counts.elementwise
        )  # fmt: skip

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
        mac = picojoules * bits / width + self.ac
        title = f"{self.title}; activations of {bits} bit{'s' if bits != 1 else ''}, multiplier in proportion to its widths"
        return replace(
            self, id=f"{self.id}-a{bits}", title=title, mac=mac, graded_mac=mac, bits=replace(self.bits, activations=bits), ranges={}
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data with stable keys (docs/json.md)."""
        found = {name: getattr(self, name) for name in ("id", "title", "source", "scope", *_OPERATIONS, "elementwise")}
        ranges = [{"name": name, **asdict(n)} for name, n in self.ranges.items()]
        return {**found, "bits": asdict(self.bits), "ranges": ranges}


def load_constants(table: str | Path | None = None) -> Constants:
    """The constants of a table that ships with ntc, by name, or of a TOML file; by default 45 nm, fp32.

    Raises:
        ConfigError: If there is no such table, it lacks a number, or a number makes no sense.
    """
    where = table or DEFAULT
    data = read_table(where, "energy", "energy constants")
    try:
        numbers = {name: number(f"the energy constants {where}", name, value) for name, value in data["picojoules"].items()}
        ranges = {name: n for name, n in numbers.items() if not n.certain or n.source}
        return Constants(
            data["id"], data["title"], data["source"], data["scope"], **{name: n.nominal for name, n in numbers.items()},
            bits=_bits(data.get("bits", {})), ranges=ranges, baselines=tuple(data.get("baselines", ())),
            multiplier=_multiplier(data.get("multiplier")),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{where} is no table of energy constants: {error}") from error


def _bits(given: Mapping[str, Any]) -> Bits:
    for name, width in given.items():
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(f"the width of {name} is {width!r} and no number of bits")
    return Bits(**given)


def _multiplier(given: Mapping[str, Any] | None) -> tuple[float, int] | None:
    if given is None:
        return None
    picojoules, bits = number("the multiplier", "picojoules", given["picojoules"]).nominal, given["bits"]
    _bits({"weights": bits})
    return picojoules, bits


def list_constants() -> list[Constants]:
    """The tables that ship with ntc."""
    return [load_constants(name) for name in shipped("energy")]
