"""Energies, shares and numbers of operations as text."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["count", "energy", "percent", "unit_of"]


def percent(share: float | None) -> str:
    """A share that is saved, as text; of what takes more than twice as much, how many times."""
    if share is None:
        return "–"
    return f"{1 - share:,.1f} × as much" if share < -1 else f"{100 * share:.1f} %"


def count(number: float | None) -> str:
    """A number of operations as text."""
    if number is None:
        return "not known"
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= limit:
            return f"{number / {'T': 1e12, 'G': 1e9, 'M': 1e6, 'k': 1e3}[letter]:,.4g} {letter}"
    return f"{number:,.4g}"


def unit_of(values: Iterable[float | None]) -> tuple[str, float]:
    """The unit of energy that suits the largest value, and its size in pJ."""
    largest = max((v for v in values if v is not None), default=0.0)
    units = (("J", 1e12), ("mJ", 1e9), ("µJ", 1e6), ("nJ", 1e3))
    return next(((u, s) for u, s in units if largest >= s), ("pJ", 1.0))


def energy(picojoules: float) -> str:
    """An energy with the unit that suits it."""
    unit, size = unit_of([picojoules])
    return f"{picojoules / size:,.4g} {unit}"
