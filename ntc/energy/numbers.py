"""Numbers of a table with a low and a high value beside the nominal one, and the reading of such tables."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ntc.errors import ConfigError

__all__ = ["LEVELS", "Level", "Number", "number", "shipped", "table_of", "whole"]

Level: TypeAlias = Literal["low", "nominal", "high"]
LEVELS: tuple[Level, ...] = ("low", "nominal", "high")


@dataclass(frozen=True)
class Number:
    """One number of a table.

    Attributes:
        nominal: What figures are made of.
        low: Smallest value that is defensible; the nominal one if none is given.
        high: Largest one.
        source: Where it comes from; empty = the table's source.
    """

    nominal: float
    low: float
    high: float
    source: str = ""

    def at(self, level: Level) -> float:
        """Its value at that level."""
        return float(getattr(self, level))

    @property
    def certain(self) -> bool:
        """Whether there is no range."""
        return self.low == self.high


def number(table: object, name: str, value: object) -> Number:
    """A number as a table writes it: plain, or ``{ nominal = , low = , high = , source = }``.

    Raises:
        ConfigError: If it is negative, not finite, or out of order.
        TypeError: If it is no number.
    """
    given: Mapping[str, Any] = value if isinstance(value, Mapping) else {"nominal": value}
    if unknown := given.keys() - {"nominal", "low", "high", "source"}:
        raise TypeError(f"{name} has nominal, low, high and source, and no {min(unknown)}")
    nominal = given["nominal"]
    values = [given.get("low", nominal), nominal, given.get("high", nominal)]
    for one in values:
        if isinstance(one, bool) or not isinstance(one, int | float):
            raise TypeError(f"{name} is {one!r} and no number")
        if not 0 <= one < float("inf"):
            raise ConfigError(f"{table} give {float(one)} pJ for {name}: it must be finite and not negative")
    if values != sorted(values):
        raise ConfigError(f"{table} give {name} as {values[0]} (low), {values[1]} (nominal), {values[2]} (high): they must rise")
    low, middle, high = (float(v) for v in values)
    return Number(middle, low, high, str(given.get("source", "")))


def shipped(folder: str) -> Iterator[str]:
    """Names of the tables that come with ntc, in order."""
    names = sorted(p.name for p in (files("ntc") / "data" / folder).iterdir() if p.name.endswith(".toml"))
    return (name.removesuffix(".toml") for name in names)


def whole(value: object, what: str) -> int:
    """A number of bits, of tokens.

    Raises:
        ValueError: If it is no whole number from 1 on.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} is {value!r}, and no whole number from 1 on")
    return value


@contextmanager
def table_of(where: str | Path, folder: str, what: str) -> Iterator[dict[str, Any]]:
    """A table of that name, or in that file; what the block around it misses or cannot read in it is said of the table.

    Raises:
        ConfigError: If there is no such table and no such file, it is no TOML, or it lacks something.
    """
    data = _read(where, folder, what)
    try:
        yield data
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{where} is no table of {what}: {error}") from error


def _read(where: str | Path, folder: str, what: str) -> dict[str, Any]:
    name = str(where)
    try:
        if name in shipped(folder):
            text = (files("ntc") / "data" / folder / f"{name}.toml").read_text("utf-8")
        else:
            text = Path(where).read_text(encoding="utf-8")
        return tomllib.loads(text)
    except FileNotFoundError as error:
        known = ", ".join(shipped(folder))
        raise ConfigError(f"cannot read the {what} {where}: {error.strerror}; the tables that ship with ntc are {known}") from error
    except OSError as error:
        raise ConfigError(f"cannot read the {what} {where}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{where} is no table of {what}: {error}") from error
