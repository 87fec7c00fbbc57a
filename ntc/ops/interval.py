"""Intervals of integers: what the width analysis computes with (``ntc.widths``), one rule per op (``OpSpec.bound``).

An interval is a pair of bounds for each channel (the last axis), or one pair for all. Bounds are Python integers, in numpy arrays of
objects: an analysis of overflows must not overflow itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Bound", "BoundRule", "Inside", "Integers", "Interval", "as_interval", "bits_of", "integers"]

Integers: TypeAlias = NDArray[np.object_]


def integers(value: Tensor | int) -> Integers:
    """Python integers, ``[n]``, of an integer tensor or of one number."""
    flat = value.detach().flatten().tolist() if isinstance(value, Tensor) else [value]
    result = np.empty(len(flat), dtype=object)
    result[:] = flat
    return result


def bits_of(low: int, high: int) -> int:
    """Bits that hold every integer of an interval: two's complement, or unsigned if none is negative."""
    if low >= 0:
        return max(high.bit_length(), 1)
    return max((-low - 1).bit_length(), max(high, 0).bit_length()) + 1


@dataclass(frozen=True)
class Interval:
    """``low <= value <= high`` for each channel.

    Attributes:
        low: ``[C]``, or ``[1]`` for all channels alike.
        high: As ``low``.
    """

    low: Integers
    high: Integers

    @staticmethod
    def of(low: int, high: int) -> Interval:
        """One interval for all channels."""
        return Interval(integers(low), integers(high))

    @staticmethod
    def over_rows(table: Tensor) -> Interval:
        """What a constant ``[..., C]`` holds, per channel."""
        low, high = torch.aminmax(table.detach().reshape(-1, table.shape[-1] if table.dim() else 1), dim=0)
        return Interval(integers(low), integers(high))

    @property
    def ends(self) -> tuple[int, int]:
        """The interval of all channels together."""
        return int(min(self.low)), int(max(self.high))

    @property
    def magnitude(self) -> int:
        """Largest absolute value."""
        low, high = self.ends
        return max(abs(low), abs(high))

    def wide(self, channels: int) -> Interval:
        """The same with a bound for each of that many channels."""
        return Interval(*(np.broadcast_to(end, (channels,)) for end in (self.low, self.high)))

    def __add__(self, other: Interval) -> Interval:
        return Interval(self.low + other.low, self.high + other.high)

    def __sub__(self, other: Interval) -> Interval:
        return Interval(self.low - other.high, self.high - other.low)

    def __mul__(self, other: Interval) -> Interval:
        corners = [a * b for a in (self.low, self.high) for b in (other.low, other.high)]
        return Interval(np.minimum.reduce(corners), np.maximum.reduce(corners))

    def __or__(self, other: Interval) -> Interval:
        """The smallest interval that holds both."""
        return Interval(np.minimum(self.low, other.low), np.maximum(self.high, other.high))

    def map(self, function: Callable[[Integers], Integers]) -> Interval:
        """The image under a function that does not decrease."""
        return Interval(function(self.low), function(self.high))

    def clamp(self, low: int, high: int) -> Interval:
        """The image under ``clamp``."""
        return self.map(lambda end: np.minimum(np.maximum(end, low), high))

    def round_shift(self, shift: int) -> Interval:
        """The image under ``round(a / 2**shift)``."""
        half = (1 << shift) >> 1
        return self.map(lambda end: (end + half) >> shift)


@dataclass(frozen=True)
class Inside:
    """A value that an op holds while it computes, and the range that it has to stay in.

    Attributes:
        what: ``membrane``, ``memory``, ``accumulator``, ``product`` ...
        low: Smallest value.
        high: Largest value.
        least: Smallest that is allowed.
        most: Largest that is allowed.
        remedy: What makes it smaller, for the error.
    """

    what: str
    low: int
    high: int
    least: int
    most: int
    remedy: str

    @staticmethod
    def over(what: str, value: Interval, register: int, remedy: str) -> Inside:
        """One for all channels of an interval, in a signed register of that many bits."""
        return Inside(what, *value.ends, -(1 << register - 1), (1 << register - 1) - 1, remedy)


@dataclass(frozen=True)
class Bound:
    """What a rule says.

    Attributes:
        result: Of the op's result, or of the first if it has several.
        inside: What is held inside, in the order of the computation.
        others: Of the results behind the first.
    """

    result: Interval
    inside: tuple[Inside, ...] = ()
    others: tuple[Interval, ...] = ()


def as_interval(value: Interval | Tensor | int) -> Interval:
    """An argument of an op that may be computed, a constant or a number."""
    if isinstance(value, Interval):
        return value
    return Interval.over_rows(value) if isinstance(value, Tensor) else Interval.of(value, value)


BoundRule: TypeAlias = Callable[..., Bound]
"""Called with the node, the most tokens of a sequence (0 = not limited), and the arguments of the node by their names.

Values that the program computes are an ``Interval`` with bounds for each channel, constants are tensors, ids, positions and a state None,
the rest is what it is. A rule may assume that types and shapes are right, and that a state is what tokens have made of zeros.
"""
