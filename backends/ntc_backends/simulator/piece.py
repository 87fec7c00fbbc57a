"""What all elements share while they run: the piece of the sequence that is computed, their state, their constants, what is counted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ntc.errors import BackendError
from ntc_backends import netlist_schema as schema
from ntc_backends.netlist_store import TensorFile

__all__ = ["Array", "Constants", "Counter", "Piece", "TokenCount", "dtype_of"]

Array: TypeAlias = NDArray[Any]


class TokenCount(int):
    """Number of tokens of the piece, where an op asks for the length of the sequence; knows how many came before."""

    before: int = 0

    def __new__(cls, value: int, before: int) -> TokenCount:
        """A number that remembers how many tokens came before."""
        found = super().__new__(cls, value)
        found.before = before
        return found


@dataclass
class Counter:
    """What was counted while elements ran.

    Attributes:
        tokens: Tokens of all sequences.
        spikes: Events per population.
        lowest: Smallest membrane before a reset, per population.
        highest: Largest one.
        synaptic: Synaptic operations per element: weights added, or elements of M read or written, because a neuron fired.
        macs: Multiply-accumulates of projections of analog vectors, per element.
        rasters: Where and when each population fired, ``[4, events]``: step, sequence, token, neuron; only if they are kept.
    """

    tokens: int = 0
    spikes: dict[str, int] = field(default_factory=dict)
    lowest: dict[str, float] = field(default_factory=dict)
    highest: dict[str, float] = field(default_factory=dict)
    synaptic: dict[str, int] = field(default_factory=dict)
    macs: dict[str, int] = field(default_factory=dict)
    rasters: dict[str, list[Array]] | None = None

    def membrane(self, name: str, lowest: float, highest: float) -> None:
        """Take note of a population's membrane."""
        self.lowest[name] = min(self.lowest.get(name, lowest), lowest)
        self.highest[name] = max(self.highest.get(name, highest), highest)

    def add(self, table: dict[str, int], name: str, number: int) -> None:
        """Count."""
        table[name] = table.get(name, 0) + number

    def fired(self, name: str, spikes: Array, before: int) -> None:
        """Count the spikes ``[T, B, L, C]`` of a population, whose first token is number ``before``."""
        self.add(self.spikes, name, int(np.count_nonzero(spikes)))
        if self.rasters is not None:
            where = np.stack(np.nonzero(spikes)).astype(np.int32)
            where[2] += before
            self.rasters.setdefault(name, []).append(where)


@dataclass
class Piece:
    """A piece of the sequences: some consecutive tokens of each.

    Attributes:
        batch: B.
        before: Tokens that came before it.
        length: Its tokens.
        stepwise: Work as a chip does, one time step after the other, event by event.
        state: What elements carry from piece to piece, by their name.
        counter: What is counted.
    """

    batch: int
    before: int
    length: int
    stepwise: bool
    state: dict[str, Any]
    counter: Counter

    @property
    def positions(self) -> Array:
        """Position of each token in its sequence."""
        return np.arange(self.before, self.before + self.length)


class Constants:
    """The tensors of the netlist, each read when it is first used, and held once however many elements use it."""

    def __init__(self, file: TensorFile) -> None:
        self.file = file
        self._held: dict[tuple[str, bool], Array] = {}

    def tensor(self, name: str) -> Array:
        """A tensor as it lies in the file."""
        return self._get(name, transposed=False)

    def by_column(self, name: str) -> Array:
        """A matrix with its columns one behind the other in memory: what a neuron that fires adds is one stretch of it."""
        return self._get(name, transposed=True)

    def _get(self, name: str, *, transposed: bool) -> Array:
        at = (self.file.table[name].key, transposed)
        if at not in self._held:
            value = self.file.read(name)
            self._held[at] = np.ascontiguousarray(value.T) if transposed else value
            self._held[at].flags.writeable = False
        return self._held[at]

    def number(self, value: schema.Number | None, dtype: np.dtype[Any]) -> Any:
        """A constant that is one number or a tensor, in the dtype of what it is used with."""
        if value is None:
            return None
        return np.asarray(self.tensor(value.tensor) if isinstance(value, schema.TensorRef) else value).astype(dtype)

    @property
    def held_bytes(self) -> int:
        """Memory of all that was read so far."""
        return sum(value.nbytes for value in self._held.values())


def dtype_of(port: schema.Port) -> np.dtype[Any]:
    """The dtype in which the simulator computes what an output carries; half precision is computed in float32.

    Raises:
        BackendError: For a dtype that numpy does not have.
    """
    name = "float32" if port.dtype in ("float16", "bfloat16") else port.dtype
    if name not in _DTYPES:
        raise BackendError(f"the simulator does not compute in {port.dtype!r}: float32, float64 and integers are what it knows")
    return np.dtype(name)


_DTYPES = frozenset({"float32", "float64", "int8", "int16", "int32", "int64", "bool"})
