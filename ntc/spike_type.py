"""What a value of the graph is: analog, integer, index, firing rate, spike train or synaptic current.

Mixing decode conventions (mean, sum, weighted sum over the time steps) is the classic bug of spiking-network tools.
Here every node carries one of the types below (``node.meta["ntc.type"]``), every op declares what it takes and gives,
and a mismatch is an error that names both nodes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "ANALOG", "INDEX", "INTEGER", "Analog", "Code", "CurrentType", "Index", "Integer", "Levels", "NodeType", "RateType", "Scale",
    "SpikeType", "from_json", "to_json", "type_of_tensor",
]  # fmt: skip

Code: TypeAlias = Literal["rate", "phase", "count", "fitted"]
Levels: TypeAlias = Literal["binary", "ternary", "graded"]
Scale: TypeAlias = Literal["none", "tensor", "channel", "token"]


@dataclass(frozen=True)
class Analog:
    """An ordinary real-valued tensor, such as ``[B, L, C]``."""

    def __str__(self) -> str:
        return "analog"


@dataclass(frozen=True)
class Index:
    """Token ids, positions, sizes: exact, never spiking."""

    def __str__(self) -> str:
        return "index"


@dataclass(frozen=True)
class Integer:
    """A fixed-point number ``[B, L, C]`` of the integer grade: int8, int16 or int32; n stands for n times the scale of its node."""

    def __str__(self) -> str:
        return "integer"


@dataclass(frozen=True)
class RateType:
    """The firing rate that a spike train has in the limit of many time steps, in ``[0, 1]`` or ``[-1, 1]``.

    A program whose neurons are not inserted yet holds rates where the spiking program will hold spikes: it is the
    float limit (T to infinity) of the neurons, and can be run and measured.
    """

    signed: bool = False

    def __str__(self) -> str:
        return "rate ±" if self.signed else "rate"


@dataclass(frozen=True)
class SpikeType:
    """A spike train ``[T, B, L, C]``: axis 0 is the time step.

    Attributes:
        steps: T, the number of time steps.
        code: How the train decodes to a value: ``rate`` = mean over t, ``count`` = sum over t,
            ``phase`` = sum over t of ``2**-(t+1) * s(t)``; ``fitted`` = by weights that each neuron has for itself, which
            ``ntc::fs_synapse`` puts on.
        levels: Values that one step can carry: ``binary`` {0, 1}, ``ternary`` {-1, 0, 1}, ``graded`` (a spike with a
            payload, as after a per-channel scale).
        scale: Granularity of the factor that a graded spike carries.
        static: Whether that factor is known at compile time.
    """

    steps: int
    code: Code = "rate"
    levels: Levels = "binary"
    scale: Scale = "none"
    static: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"a spike train needs at least one time step, got steps={self.steps}")

    def __str__(self) -> str:
        return f"spikes T={self.steps} {self.levels} {self.code}" + ("" if self.scale == "none" else f" x{self.scale}")


@dataclass(frozen=True)
class CurrentType:
    """A synaptic current per time step ``[T, B, L, C]``: real-valued, what a linear layer makes of spikes."""

    steps: int
    code: Code = "rate"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"a current over time needs at least one time step, got steps={self.steps}")

    def __str__(self) -> str:
        return f"current T={self.steps} {self.code}"


NodeType: TypeAlias = Analog | Integer | Index | RateType | SpikeType | CurrentType

ANALOG = Analog()
INDEX = Index()
INTEGER = Integer()

_KINDS: dict[str, type] = {
    "analog": Analog, "integer": Integer, "index": Index, "rate": RateType, "spikes": SpikeType, "current": CurrentType,
}  # fmt: skip
_FIXED_POINT = frozenset({torch.int8, torch.int16, torch.int32})


def type_of_tensor(value: object) -> NodeType:
    """The type of a value without time steps, by its dtype: floating point is analog, int8 to int32 integer, the rest index.

    Ids, positions, masks and sizes are int64 or bool, so a fixed-point value is never taken for one of them.
    """
    if isinstance(value, Tensor) and value.is_floating_point():
        return ANALOG
    return INTEGER if isinstance(value, Tensor) and value.dtype in _FIXED_POINT else INDEX


def to_json(value: NodeType) -> dict[str, Any]:
    """A type as plain data; ``from_json`` is its inverse."""
    kind = next(name for name, cls in _KINDS.items() if cls is type(value))
    return {"kind": kind, **asdict(value)}


def from_json(data: dict[str, Any]) -> NodeType:
    """The type that ``to_json`` wrote."""
    fields = dict(data)
    result: NodeType = _KINDS[fields.pop("kind")](**fields)
    return result
